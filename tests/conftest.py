"What several test files share: the command in this process, the embedded model, small models of two families."
import contextlib
import importlib.util
import io
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

root = Path(__file__).resolve().parents[1]


errors = io.StringIO        # what stands for stderr


def run_command(*argv):
    "What `stasc ARGV` gives: code, out and err."
    from stasc.cli import main
    out, err = io.StringIO(), errors()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        for kind in (DeprecationWarning, PendingDeprecationWarning): warnings.simplefilter("ignore", kind)      # as outside of pytest
        code = main([str(a) for a in argv])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def command():
    return run_command


@pytest.fixture(scope="session")
def embedded():
    "An engine on the embedded model, LoRA, on the CPU. Tests that train it put it back with use(None)."
    from stasc.core import Config
    from stasc.train import Engine
    return Engine(Config.demo(device="cpu", train_batch=4))


def write_questions(path, n):
    rows = [dict(id=f"q{i}", question=f"Which number stands at place {i} of the list?", answer=[str(i), f"number {i}"]) for i in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "numbers.jsonl", 40)


# --- Qwen2 and Phi-3 with random weights, about 5 million parameters each

SPECIAL = dict(qwen2=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
               phi3=["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"])
TEMPLATE = dict(qwen2="qwen2_5", phi3="phi3")
SHAPE = dict(vocab_size=12_288, hidden_size=128, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.3)


def family_tokenizer(family):
    "A byte-level BPE with the family's special tokens and its real chat template."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    trl = importlib.util.find_spec("trl")
    if trl is None: pytest.skip("trl is not installed: its package holds the chat templates of the families")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [p.read_text(encoding="utf-8") for o in ("*.py", "prompts/*.yaml") for p in sorted((root / "stasc").glob(o))]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, special_tokens=SPECIAL[family], show_progress=False,
                                                       initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    eos = dict(qwen2="<|im_end|>", phi3="<|endoftext|>")[family]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token="<|endoftext|>", padding_side="left",
                                        extra_special_tokens=[t for t in SPECIAL[family] if t not in (eos, "<|endoftext|>")])
    tokenizer.chat_template = (Path(trl.origin).parent / f"chat_templates/{TEMPLATE[family]}.jinja").read_text(encoding="utf-8")
    return tokenizer


def family_model(family, tokenizer, **changes):
    "A model with random weights; as in the real ones the vocabulary is padded, and several tokens end a text."
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM
    config, model = dict(qwen2=(Qwen2Config, Qwen2ForCausalLM), phi3=(Phi3Config, Phi3ForCausalLM))[family]
    ends = tokenizer.convert_tokens_to_ids(dict(qwen2=["<|im_end|>", "<|endoftext|>"], phi3=["<|endoftext|>", "<|end|>"])[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        m = model(config(**(SHAPE | changes), bos_token_id=None, eos_token_id=ends[0], pad_token_id=tokenizer.pad_token_id))
    m.generation_config.eos_token_id = ends
    return m


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    "Folders of a Qwen2 and of a Phi-3 model, as a user would have them."
    folders = {}
    for family in SPECIAL:
        folders[family] = folder = tmp_path_factory.mktemp("models") / family
        tokenizer = family_tokenizer(family)
        family_model(family, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders
