"The embedded model: its files, its tokenizer, the mixture it learned from, and what it answers."
import json
import random
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasc.arithmetic import arithmetic_questions, parse_scratchpad, partition_of, scratchpad
from stasc.core import ModelError
from stasc.embedded import (attempt_example, blank_model, drill_example, embedded_messages, embedded_path, encode, measure, pretrain,
                            pretrain_example, sample_answers, save_embedded, tokenizer_texts, train_tokenizer)
from stasc.prompt import render_text
from stasc.train import collate

folder = embedded_path()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- files

def test_checkpoints_are_small():
    files = [p for p in folder.parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 4e6
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        p.name for p in folder.iterdir()}


def test_no_machine_left_its_path():
    for path in folder.iterdir():
        assert not re.search(rb"_name_or_path|/(home|root|tmp|work|Users)/|[A-Z]:\\\\", path.read_bytes()), path.name


def test_unknown_model_names_the_known():
    with pytest.raises(ModelError, match="did you mean 'arithmetic'"): embedded_path("arithmatic")


def test_import_is_light():
    code = "import sys, stasc.embedded; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- model

def test_checkpoint_loads(model, tokenizer):
    import torch
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    assert model.num_parameters() < 400_000 and model.config.max_position_embeddings >= 512
    assert model.config.vocab_size == len(tokenizer) and model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id


def test_bfloat16_weights_are_exact_in_float32(model):
    for name, weight in model.named_parameters(): assert weight.bfloat16().float().equal(weight), name


# --- tokenizer

def test_special_tokens(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token != tokenizer.eos_token
    assert tokenizer.bos_token is None and tokenizer.padding_side == "left"


@given(st.text())
def test_any_text_round_trips(tokenizer, text):
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", ["", " ", "  a  b ", "\r\n\t\n", "don't , stop .", "naïve 日本 🙂‍↔️", "\x00\x1f\x7f", "a\u200b\u202eb", "١٢٣", "½"])
def test_awkward_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@given(st.integers(0, 10**12))
def test_digits_are_single_tokens(tokenizer, n):
    assert tokenizer.tokenize(str(n)) == list(str(n))


def test_every_way_of_loading_gives_the_same_tokens(tokenizer):
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
    text = render_text(tokenizer, embedded_messages(arithmetic_questions("dev", 1)[0], scratchpad(347, 285)))
    for cls in (PreTrainedTokenizerFast, Qwen2Tokenizer):
        assert cls.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


def test_tokenizer_is_the_one_this_code_trains(tokenizer):
    trained = train_tokenizer(tokenizer_texts())
    assert trained.get_vocab() == tokenizer.get_vocab() and trained.chat_template == tokenizer.chat_template


def test_chat_template(tokenizer):
    turns = [dict(role="system", content="S"), dict(role="user", content="U"), dict(role="assistant", content="A")]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n")
    assert render_text(tokenizer, turns[1:2]) == "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_answers_and_prompts_are_short(tokenizer):
    question, longest = arithmetic_questions("test", 1)[0], scratchpad(999, 999)
    assert len(tokenizer(longest).input_ids) + 1 <= 64
    assert len(tokenizer(render_text(tokenizer, embedded_messages(question, longest))).input_ids) + 64 <= 160


# --- mixture and training

def test_only_pretraining_pairs_are_seen():
    rng = random.Random(0)
    for _ in range(2000):
        messages, _ = attempt_example(rng)
        a, b = re.match(r"What is (\d+) \+ (\d+)\?", messages[-1]["content"]).groups()
        assert partition_of(int(a), int(b)) == "pretrain"


def test_mixture_has_the_stated_shares():
    rng, n = random.Random(0), 4000
    seen = [attempt_example(rng, p_forget=.5, p_slip=1, p_single=.4, p_repeat=.5) for _ in range(n)]
    corrections = [(m[-1]["content"], answer) for m, answer in seen if "first answer" in m[-1]["content"]]
    assert len(corrections) / n == pytest.approx(.6, abs=.03)
    repeated = sum(answer in user for user, answer in corrections) / len(corrections)
    assert .5 <= repeated < .65      # a fresh attempt now and then comes out the same
    drills = sum("+ 1?" in pretrain_example(rng, p_drill=.25)[0][-1]["content"] for _ in range(n)) / n
    assert drills == pytest.approx(.25, abs=.03)


def test_drills_are_right():
    rng = random.Random(0)
    for _ in range(200):
        messages, answer = drill_example(rng)
        x, y = map(int, re.findall(r"\d", messages[-1]["content"])[:2])
        assert answer == f"{x}+{y}+1={x + y + 1}\nFinal Answer: {x + y + 1}"


def test_labels_cover_the_answer_and_its_end(tokenizer):
    examples = [pretrain_example(random.Random(i)) for i in range(8)]
    batch = collate(encode(tokenizer, examples), tokenizer.pad_token_id)
    for (messages, answer), ids, mask, labels in zip(examples, *batch.values()):
        assert tokenizer.decode(labels[labels != -100]) == answer + "<|im_end|>"
        assert tokenizer.decode(ids[mask == 1]) == render_text(tokenizer, messages) + answer + "<|im_end|>"
        assert (labels[mask == 0] == -100).all() and (ids[mask == 0] == tokenizer.pad_token_id).all()


def test_pretraining_repeats_and_saves(tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM
    runs = []
    for _ in range(2):
        tiny = blank_model(tokenizer, seed=1, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        runs.append([loss for _, loss in pretrain(tiny, tokenizer, steps=12, schedule=12, batch_size=8, seed=1)])
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0]
    state = torch.get_rng_state()
    measure(tiny, tokenizer, arithmetic_questions("dev", 4))
    save_embedded(tiny, tokenizer, tmp_path / "made/here")
    assert torch.equal(state, torch.get_rng_state())
    assert "_name_or_path" not in json.loads((tmp_path / "made/here/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "made/here", dtype=torch.float32)
    for name, weight in tiny.named_parameters(): assert again.get_parameter(name).equal(weight.bfloat16().float())


# --- answers

@pytest.mark.parametrize("temperature", [0, .7])
def test_answers_have_the_form(model, tokenizer, temperature):
    questions = arithmetic_questions("dev", 100, seed=1)
    initial = sample_answers(model, tokenizer, [embedded_messages(q) for q in questions], temperature)
    correction = sample_answers(model, tokenizer, [embedded_messages(q, a) for q, a in zip(questions, initial)], temperature)
    for texts in (initial, correction): assert sum(parse_scratchpad(t) is not None for t in texts) >= 97


def test_m0_is_partly_competent(model, tokenizer):
    "On development questions; the test partition is for measuring runs."
    figures = measure(model, tokenizer, arithmetic_questions("dev", 300, seed=1))
    assert .22 < figures["initial"]["right"] < .42 and .22 < figures["correction"]["right"] < .46
    wrong = 1 - figures["initial"]["right"]
    assert figures["initial"]["forgotten carry"] > .6 * wrong and figures["initial"]["other"] < .05


def test_sampling_repeats(model, tokenizer):
    prompts = [embedded_messages(q) for q in arithmetic_questions("dev", 8)]
    assert sample_answers(model, tokenizer, prompts, seed=5) == sample_answers(model, tokenizer, prompts, seed=5)
    assert sample_answers(model, tokenizer, prompts, seed=5) != sample_answers(model, tokenizer, prompts, seed=6)
