"""Whole small loops of the model families that people train: random weights, the real chat templates, killed between phases and resumed.

The templates are read from the trl package. SmolLM2's is not there: it is ChatML, and Qwen 2.5's stands for it. GPT-NeoX (Pythia) has none.
"""
import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import root, write_questions

from stasc.core import Config, PromptError, Question, SamplingParams
from stasc.loop import STaSC
from stasc.prompt import correction_messages, initial_messages, prompt_set, render, render_text

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=704, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=1024, initializer_range=0.2)
GROUPED = SMALL | dict(num_key_value_heads=2)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
PHI = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
LAYERS = ["sliding_attention", "full_attention"]


def family(model, config, template, special, eos, pad, ends, **more):
    return SimpleNamespace(model=model, config=config, template=template, special=special, eos=eos, pad=pad, ends=ends, **dict(bos=None, plain=()) | more)


# the tokens, what pads, what ends a text, tied or untied, windows and layers are as in the families' own checkpoints; every vocabulary is larger than the tokenizer
FAMILIES = dict(
    qwen2=family("Qwen2", GROUPED | dict(tie_word_embeddings=True), "qwen2_5", CHATML, "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
    qwen3=family("Qwen3", GROUPED | dict(head_dim=32, tie_word_embeddings=True), "qwen3", CHATML, "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"],
                 plain=["<think>", "</think>"]),
    phi3=family("Phi3", SMALL | dict(sliding_window=64, tie_word_embeddings=False), "phi3", PHI, "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>", "<|end|>"]),
    llama3=family("Llama", GROUPED | dict(tie_word_embeddings=False), "llama3_2", LLAMA, "<|eot_id|>", None, ["<|end_of_text|>", "<|eot_id|>"],
                  bos="<|begin_of_text|>", kw=dict(clean_up_tokenization_spaces=True)),
    gemma3=family("Gemma3", GROUPED | dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=64, layer_types=LAYERS, tie_word_embeddings=True), "gemma3", GEMMA, "<eos>",
                  "<pad>", ["<eos>", "<end_of_turn>"], bos="<bos>"),
    smollm2=family("Llama", SMALL | dict(tie_word_embeddings=True), "qwen2_5", CHATML, "<|im_end|>", "<|im_end|>", ["<|im_end|>"], bos="<|im_start|>", post=False),
    neox=family("GPTNeoX", SMALL | dict(rotary_pct=0.25, tie_word_embeddings=False), None, ["<|endoftext|>"], "<|endoftext|>", None, ["<|endoftext|>"],
                bos="<|endoftext|>", post=False))


def template(name):
    trl = importlib.util.find_spec("trl")
    if trl is None: pytest.skip("trl is not installed: its package holds the chat templates of the families")
    return (Path(trl.origin).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


@functools.lru_cache
def merges():
    "A byte-level BPE without special tokens, as text."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [p.read_text(encoding="utf-8") for p in sorted((root / "stasc/prompts").glob("*.yaml"))]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=640, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return bpe.to_str()


def tokenizer_of(f):
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer.from_str(merges())
    bpe.add_special_tokens(f.special)
    bpe.add_tokens([AddedToken(t, normalized=False) for t in f.plain])
    if f.bos and getattr(f, "post", True):                  # the tokenizer puts a begin token before what it is given, and so does the template
        bpe.post_processor = processors.TemplateProcessing(single=f"{f.bos} $A", special_tokens=[(f.bos, bpe.token_to_id(f.bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=f.eos, pad_token=f.pad, bos_token=f.bos, padding_side="left",
                                        extra_special_tokens=[t for t in f.special if t not in (f.eos, f.pad, f.bos)], **getattr(f, "kw", {}))
    if f.template: tokenizer.chat_template = template(f.template)
    return tokenizer


def save(f, folder):
    "The folder of a model, as a user would have it."
    tokenizer = tokenizer_of(f)
    assert len(tokenizer) < f.config["vocab_size"]
    ids = tokenizer.convert_tokens_to_ids
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(f.model, f"{f.model}Config"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{f.model}ForCausalLM")(config(**f.config, bos_token_id=f.bos and ids(f.bos), eos_token_id=ids(f.eos), pad_token_id=f.pad and ids(f.pad)))
    model.generation_config.eos_token_id = ids(f.ends)
    rows, pad = model.get_input_embeddings().weight, f.pad and ids(f.pad)
    if pad is not None: rows.data[pad] = rows.data[pad + 1].flip(0)         # a fresh model's row of the pad token is zero; a trained one's is not
    model.save_pretrained(folder); tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda name: save(FAMILIES[name], tmp_path_factory.mktemp("model") / name))


@pytest.fixture(scope="module")
def tokenizer(folder_of):
    return functools.cache(lambda name: transformers.AutoTokenizer.from_pretrained(folder_of(name)))


# --- what the model reads

QUESTION = Question("q", "Which number, if any?", ("7",))
THOUGHT = "<think>\nIt may be 7 .\n\n</think>\n\nStep-by-step reasoning: two  spaces , one isn 't /no_think\nFinal Answer: 7"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_has_one_begin_token_and_holds_every_message_whole(tokenizer, name):
    t, ps = tokenizer(name), prompt_set("default")
    for messages in (initial_messages(ps, QUESTION), correction_messages(ps, QUESTION, THOUGHT, 2)):
        ids = render(t, messages)
        text = t.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert [text.count(m["content"].strip()) for m in messages] == [1] * len(messages)
        if getattr(FAMILIES[name], "post", True) and t.bos_token: assert ids[0] == t.bos_token_id and ids.count(t.bos_token_id) == 1
        if t.chat_template: assert ids[-1] != t.eos_token_id and text.rstrip().endswith(("assistant", "assistant<|end_header_id|>", "<|assistant|>", "model"))
    assert THOUGHT in text


def shipped():
    trl = importlib.util.find_spec("trl")
    return sorted(p.stem for p in (Path(trl.origin).parent / "chat_templates").glob("*.jinja") if not p.stem.endswith("_training")) if trl else []


@pytest.mark.parametrize("name", shipped())
def test_every_template_shows_the_corrector_the_initial_answer_as_it_was_sampled(tokenizer, name):
    "Templates that take reasoning out of earlier turns, that have no system role, or that want content in parts."
    t = tokenizer("llama3")
    before, t.chat_template = t.chat_template, template(name)
    try:
        for messages in (initial_messages(prompt_set("default"), QUESTION), correction_messages(prompt_set("default"), QUESTION, THOUGHT, 1)):
            text = render_text(t, messages)
            assert [text.count(m["content"]) for m in messages] == [1] * len(messages)
            assert len(render(t, messages)) == len(t(text, add_special_tokens=False)["input_ids"])
    finally: t.chat_template = before


@pytest.mark.parametrize("body", ["{% for m in messages %}{{ m['role'] }}: {% endfor %}", "{{ messages[0]['content'][:9] }}",
                                  "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}"])
def test_a_template_that_drops_what_it_is_given_is_refused(tokenizer, body):
    t = tokenizer("qwen3")
    before, t.chat_template = t.chat_template, body
    try:
        with pytest.raises(PromptError, match="chat template of .* leaves out"): render(t, correction_messages(prompt_set("default"), QUESTION, THOUGHT, 1))
    finally: t.chat_template = before


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer"])
def test_a_template_that_asks_for_the_date_gives_the_same_prompt_every_day(tokenizer, monkeypatch, name):
    import datetime

    import transformers.utils.chat_template_utils as utils
    t, texts = tokenizer("llama3"), []
    before, t.chat_template = t.chat_template, template(name)
    try:
        for year in (2025, 2031):
            class Clock(datetime.datetime):
                @classmethod
                def now(cls, tz=None): return cls(year, 3, 1)
            monkeypatch.setattr(utils, "datetime", Clock)
            texts.append(render_text(t, initial_messages(prompt_set("default"), QUESTION)))
    finally: t.chat_template = before
    assert texts[0] == texts[1] and "2031" not in texts[0]


def test_a_prompt_without_a_template_does_not_end_with_an_end_token(tokenizer):
    "Tokenizers of some base models put the end token behind all that they are given."
    from tokenizers import processors
    t = tokenizer_of(FAMILIES["neox"])
    plain = t("Which number?\n\n", add_special_tokens=False)["input_ids"]
    t.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", t.eos_token_id)])
    assert render(t, [dict(role="user", content="Which number?")]) == [t.eos_token_id, *plain]


# --- the loop

class Killed(BaseException): "As SIGKILL, no handler of the run sees it coming."


class Kill:
    "Ends the run at an iteration's phase."
    def __init__(self, *at): self.at = at
    def on_phase(self, run, iteration, phase, done, total):
        if (iteration, phase, done) == self.at: raise Killed


@pytest.fixture(scope="module")
def loop_of(folder_of, tmp_path_factory):
    "A run of two iterations, killed before its first training, before its last corrections and after its last training; what was sampled and what was trained on."
    import stasc.train as train
    from stasc.sample import HFSampler
    questions = write_questions(tmp_path_factory.mktemp("questions") / "q.jsonl", 8)

    @functools.cache
    def loop(name):
        seen, real_sample, real_collate = SimpleNamespace(drawn=[], batches=[]), HFSampler.sample, train.collate

        def sample(self, prompts, n, params, seeds):
            out = real_sample(self, prompts, n, params, seeds)
            seen.drawn += [(tuple(p), s.token_ids) for p, row in zip(prompts, out) for s in row]
            return out

        def collate(examples, pad_id):
            seen.batches.append(batch := real_collate(examples, pad_id))
            return batch

        cfg = Config(model=folder_of(name), data=str(questions), n_train=3, n_test=1, iterations=2, n_init=1, n_corr=2, max_new_tokens=6, shots=0, temperature=1.0, top_p=1.0,
                     filter="all", learning_rate=0.01, train_batch=4, device="cpu", seed=1)
        out = tmp_path_factory.mktemp("loop") / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HFSampler, "sample", sample)
            patch.setattr(train, "collate", collate)
            for i, at in enumerate([(1, "train", 0), (1, "corrections.train", 0), (2, "train", 6), None]):
                run = STaSC.open(out, callbacks=[Kill(*at)] if at else []) if i else STaSC(cfg, out, callbacks=[Kill(*at)])
                if at:
                    with pytest.raises(Killed): run.run()
                else: run.run()
        return SimpleNamespace(run=run, out=out, **vars(seen))
    return loop


@pytest.mark.parametrize("name", FAMILIES)
def test_a_killed_and_resumed_loop_ends_with_two_adapters(loop_of, name):
    done = loop_of(name)
    assert done.run.n_done == 3
    for n in range(3):
        m = json.loads((done.out / f"iter_{n:02d}/metrics.json").read_text())
        assert m["train"]["n"] == 6 and m["test"]["n"] == 1 and m["n_kept"] == (6 if n else 0)
        assert (done.out / f"iter_{n:02d}/adapter/adapter_model.safetensors").exists() == (n > 0)


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("log.jsonl", ".lock")}


@pytest.mark.parametrize("name", ["gemma3", "neox"])
def test_a_loop_that_was_never_killed_writes_the_same_bytes(loop_of, tmp_path, name):
    done = loop_of(name)
    STaSC(done.run.cfg, tmp_path / "whole", callbacks=[]).run()
    assert files(tmp_path / "whole") == files(done.out)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_on_continues_the_sampled_prompt_token_by_token(loop_of, name):
    done, rows = loop_of(name), []
    pad = done.run.engine.lm.pad_id
    for batch in done.batches:
        for ids, mask, labels in zip(*(batch[k].tolist() for k in ("input_ids", "attention_mask", "labels"))):
            size, learned = sum(mask), [i for i, label in enumerate(labels) if label != -100]
            first = learned[0]
            assert mask == [1] * size + [0] * (len(ids) - size) and ids[size:] == [pad] * (len(ids) - size)
            assert learned == list(range(first, size)) and labels[first:size] == ids[first:size]
            rows.append((tuple(ids[:first]), tuple(ids[first:size])))
    whole = [r for r in rows if r in set(done.drawn)]
    others = [r for r in rows if r not in set(done.drawn)]           # the probe of the loss cuts the first example short
    assert len(whole) >= 12 and len(others) <= 4 and all(any(p[-len(a):] == a and c[:len(b)] == b for p, c in done.drawn) for a, b in others)


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_of_a_vocabulary_larger_than_the_tokenizer_decode_and_are_kept_as_sampled(loop_of, tokenizer, name):
    done, t = loop_of(name), tokenizer(name)
    table = done.run._pairs(0, "train")
    drawn = {i for _, ids in done.drawn for i in ids}
    assert max(drawn) < FAMILIES[name].config["vocab_size"]
    for text, ids in zip(table.corr_text, table.corr_token_ids):
        known = [i for i in ids if i < len(t)]
        assert text == t.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for row, prompt in zip(table.itertuples(), (e.prompt_ids for e in done.run._examples(table))):
        if row.init_text.strip(): assert row.init_text.strip() in t.decode(prompt, clean_up_tokenization_spaces=False)


GREEDY = SamplingParams(temperature=0, max_new_tokens=5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapters_reload_in_plain_peft_and_say_the_same(loop_of, folder_of, name):
    from peft import PeftModel
    done = loop_of(name)
    run, prompts = done.run, [list(p) for p, _ in done.drawn[:2]] + [list(done.drawn[-1][0])]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, done.out / "iter_01/adapter", adapter_name="first").eval()
    plain.load_adapter(done.out / "iter_02/adapter", adapter_name="second")
    said = {}
    for n, adapter in ((1, "first"), (2, "second")):
        run.engine.use(done.out / f"iter_{n:02d}/adapter"); plain.set_adapter(adapter)
        said[n] = [list(s[0].token_ids) for s in run.engine.sample(prompts, 1, GREEDY, [[0]] * 3)]
        for p, ids in zip(prompts, said[n]):
            with torch.no_grad(): out = plain.generate(input_ids=torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), do_sample=False,
                                                       max_new_tokens=5, eos_token_id=run.engine.lm.stop_ids, pad_token_id=run.engine.lm.pad_id)
            assert out[0, len(p):].tolist() == ids
    weights = [(done.out / f"iter_{n:02d}/adapter/adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert weights[0] != weights[1]


# --- the end token is learned, whatever pads

@pytest.mark.parametrize("name,finetune", [(n, "lora") for n in FAMILIES] + [("gemma3", "full"), ("smollm2", "full"), ("neox", "full")])
def test_two_texts_of_unlike_length_are_learned_to_their_end(folder_of, tmp_path, name, finetune):
    "Padding is the end token itself in some families: were it masked by its number, the end would never be learned."
    from stasc.train import Engine, Example
    cfg = Config(model=folder_of(name), device="cpu", finetune=finetune, learning_rate=0.02 if finetune == "lora" else 0.003, epochs=40, train_batch=2, weight_decay=0.0, schedule="constant_with_warmup")
    engine = Engine(cfg)
    t = engine.tokenizer
    end = t.convert_tokens_to_ids("<end_of_turn>") if name == "gemma3" else t.eos_token_id
    assert (engine.lm.pad_id == t.eos_token_id) == (FAMILIES[name].pad in (None, FAMILIES[name].eos))
    prompts = [render(t, [dict(role="user", content=c)]) for c in ("Which number?", "Name a colour, any colour at all.")]
    texts = [[*t("Seven.", add_special_tokens=False)["input_ids"], end], [*t("A reddish kind of blue.", add_special_tokens=False)["input_ids"], end]]
    (tmp_path / "m").mkdir()
    report = engine.train([Example(tuple(p), tuple(c)) for p, c in zip(prompts, texts)], None, tmp_path / "m", cfg, 0)
    assert report["tokens"] == sum(map(len, texts))
    other = Engine(cfg)
    other.use(tmp_path / "m")
    drawn = other.sample(prompts, 1, SamplingParams(temperature=0, max_new_tokens=20), [[0]] * 2)
    assert [list(s[0].token_ids) for s in drawn] == texts and {s[0].finish_reason for s in drawn} == {"stop"}
    other.use(None)
    assert [list(s[0].token_ids) for s in other.sample(prompts, 1, SamplingParams(temperature=0, max_new_tokens=20), [[0]] * 2)] != texts


def test_a_pad_token_that_the_model_has_no_row_for_is_not_used(tmp_path):
    "Somebody gave the tokenizer a pad token, and did not enlarge the model."
    from stasc.train import Engine
    f = SimpleNamespace(**vars(FAMILIES["llama3"]))
    folder = save(f, tmp_path)
    t = transformers.AutoTokenizer.from_pretrained(folder)
    t.add_tokens([f"<filler {i}>" for i in range(f.config["vocab_size"] - len(t))])
    t.add_special_tokens(dict(pad_token="[PAD]"))
    assert t.pad_token_id >= f.config["vocab_size"]
    t.save_pretrained(folder)
    engine = Engine(Config(model=folder, device="cpu"))
    prompts = [engine.tokenizer(o)["input_ids"] for o in ("one", "one two three")]
    engine.sampler.shared = False
    together = engine.sample(prompts, 1, GREEDY, [[0]] * 2)
    assert [s[0].token_ids for s in together] == [engine.sample([p], 1, GREEDY, [[0]])[0][0].token_ids for p in prompts]
    from stasc.core import SampleError
    with pytest.raises(SampleError, match=r"token 7\d\d, but .* knows 704 tokens"): engine.sample([engine.tokenizer("<filler 70>[PAD]")["input_ids"]], 1, GREEDY, [[0]])
