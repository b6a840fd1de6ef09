"vLLM for real, on its CPU build. Without it these tests are skipped; `make test-vllm` installs and requires it."
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stasc.core import Config, ModelError, SampleError, SamplingParams, derive_seed
from stasc.sample_vllm import VLLMSampler, check_vllm

try: check_vllm(Config(sampler="vllm"))
except SampleError as e:
    if os.environ.get("STASC_VLLM") == "required": raise
    pytest.skip(f"vLLM is not installed here: `make test-vllm` installs it and runs these tests ({e})", allow_module_level=True)

import torch

from stasc.loop import STaSC
from stasc.model import LM, embedded_path
from stasc.sample import HFSampler
from stasc.train import Engine

GREEDY = SamplingParams(0.0, 1.0, 0, 24)
SHAPE = dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)


def save_model(folder, family):
    "A model with random weights and the embedded model's tokenizer."
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM
    config, model = dict(qwen2=(Qwen2Config, Qwen2ForCausalLM), phi3=(Phi3Config, Phi3ForCausalLM))[family]
    tokenizer = AutoTokenizer.from_pretrained(embedded_path())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model(config(**SHAPE | dict(vocab_size=len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shaken(lm, folder, seed, strength=0.1):
    "Save an adapter that is not zero."
    folder.mkdir()
    lm.start(None, seed)
    with torch.no_grad():
        torch.manual_seed(seed)
        for n, p in lm.model.named_parameters():
            if "lora_B" in n: p.normal_(0, strength)
    lm.save(folder)
    lm.use(None)
    return folder


class Both:
    "The two samplers on one model, and two adapters."
    def __init__(self, cfg, tmp):
        self.lm = LM(cfg)
        self.hf, self.vllm = HFSampler(self.lm, 64), VLLMSampler(self.lm, 64)
        self.a, self.b = shaken(self.lm, tmp / "a", 1), shaken(self.lm, tmp / "b", 2)
        rng = np.random.default_rng(0)
        vocabulary = len(self.lm.tokenizer)
        head = rng.integers(3, vocabulary, 70).tolist()         # some share a beginning, as corrections do
        self.prompts = [(head if i % 2 else []) + rng.integers(3, vocabulary, rng.integers(1, 90)).tolist() for i in range(200)]


@pytest.fixture(scope="module", params=["qwen2", "phi3", "embedded"])
def both(request, tmp_path_factory):
    tmp = tmp_path_factory.mktemp(request.param)
    model = "embedded" if request.param == "embedded" else str(save_model(tmp / "model", request.param))
    both = Both(Config(model=model, device="cpu", sampler="vllm", lora_r=4, lora_alpha=8), tmp)
    yield both
    both.vllm.close()


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("model")
    both = Both(Config(model=str(save_model(tmp / "qwen2", "qwen2")), device="cpu", sampler="vllm", lora_r=4, lora_alpha=8), tmp)
    yield both
    both.vllm.close()


def seeds_of(prompts, n): return [[derive_seed(0, i, j) for j in range(n)] for i in range(len(prompts))]


def flat(drawn): return [s for row in drawn for s in row]


# --- the same model

@pytest.mark.parametrize("which", [None, "a", "b"])
def test_greedy_texts_are_those_of_transformers(both, which):
    adapter = which and getattr(both, which)
    drawn = []
    for sampler in (both.vllm, both.hf):
        sampler.use(adapter)
        drawn.append(flat(sampler.sample(both.prompts, 1, GREEDY, seeds_of(both.prompts, 1))))
    ours, theirs = drawn
    assert [s.token_ids for s in ours] == [s.token_ids for s in theirs]
    assert [(s.text, s.finish_reason, s.seed) for s in ours] == [(s.text, s.finish_reason, s.seed) for s in theirs]
    assert np.allclose([s.logprob for s in ours], [s.logprob for s in theirs], atol=1e-4)
    assert len({s.token_ids for s in ours}) > 20


def test_adapters_change_the_texts_and_go_again(qwen2):
    texts = {}
    for name, adapter in (("M_0", None), ("a", qwen2.a), ("b", qwen2.b), ("a again", qwen2.a), ("M_0 again", None)):
        qwen2.vllm.use(adapter)
        texts[name] = [s.token_ids for s in flat(qwen2.vllm.sample(qwen2.prompts[:20], 1, GREEDY, seeds_of(qwen2.prompts[:20], 1)))]
    assert texts["M_0"] == texts["M_0 again"] and texts["a"] == texts["a again"]
    assert texts["M_0"] != texts["a"] != texts["b"] != texts["M_0"]


def test_texts_end_at_each_stop_token(qwen2, monkeypatch):
    qwen2.vllm.use(None)
    often = np.bincount([t for s in flat(qwen2.vllm.sample(qwen2.prompts[:40], 1, GREEDY, seeds_of(qwen2.prompts[:40], 1))) for t in s.token_ids]).argsort()[-3:].tolist()
    monkeypatch.setattr(type(qwen2.lm), "stop_ids", property(lambda self: often))
    drawn = flat(qwen2.vllm.sample(qwen2.prompts[:40], 2, SamplingParams(1.0, 1.0, 0, 24), seeds_of(qwen2.prompts[:40], 2)))
    assert {s.finish_reason for s in drawn} == {"stop", "length"}
    for s in drawn:
        ended = s.token_ids[-1] in often
        assert s.finish_reason == ("stop" if ended else "length") and not set(s.token_ids[:-1]) & set(often)
        assert ended or s.n_tokens == 24


def test_log_probabilities_are_at_temperature_1(qwen2):
    "Whatever they were drawn with."
    for sampler in (qwen2.vllm, qwen2.hf): sampler.use(qwen2.a)
    for params in (SamplingParams(0.5, 0.8, 0, 12), SamplingParams(2.0, 1.0, 7, 12)):
        for prompt, (s,) in zip(qwen2.prompts, qwen2.vllm.sample(qwen2.prompts[:8], 1, params, seeds_of(qwen2.prompts[:8], 1))):
            with torch.no_grad(): logits = qwen2.lm.model(torch.tensor([prompt + list(s.token_ids)])).logits[0, len(prompt) - 1:-1]
            true = torch.log_softmax(logits, -1).gather(-1, torch.tensor(s.token_ids)[:, None]).mean()
            assert s.logprob == pytest.approx(true.item(), abs=1e-4)


def truncated(p, params):
    "The probabilities that top-k, then top-p leave; no two of them are equal."
    order = np.argsort(-p)[:params.top_k or None]
    before = np.cumsum(p[order]) - p[order]
    stays = order[before < params.top_p * p[order].sum()]
    out = np.zeros_like(p)
    out[stays] = p[stays] / p[stays].sum()
    return out


@pytest.mark.parametrize("params", [SamplingParams(0.7, 0.9, 0, 1), SamplingParams(1.0, 1.0, 5, 1), SamplingParams(1.3, 0.6, 20, 1), SamplingParams(1.0, 1.0, 0, 1)],
                         ids=["top-p", "top-k", "both", "neither"])
def test_tokens_are_drawn_from_our_distribution(qwen2, params):
    n, prompt = 4000, qwen2.prompts[0]
    for sampler in (qwen2.vllm, qwen2.hf): sampler.use(None)
    with torch.no_grad(): logits = qwen2.lm.model(torch.tensor([prompt])).logits[:, -1].double()
    p = truncated(torch.softmax(logits / params.temperature, -1)[0].numpy(), params)
    share = np.bincount([s.token_ids[0] for s in flat(qwen2.vllm.sample([prompt], n, params, seeds_of([prompt], n)))], minlength=len(p)) / n
    assert (share[p == 0] == 0).all()
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()


# --- seeds

def test_texts_depend_on_the_seed_alone(qwen2):
    "Not on neighbours, order, number of samples, batch, what is cached, or a restart; float32, on this machine."
    params, prompts, n = SamplingParams(1.0, 0.9, 0, 24), qwen2.prompts[:30], 4
    seeds, v = seeds_of(prompts, n), qwen2.vllm
    v.use(qwen2.a)
    whole = v.sample(prompts, n, params, seeds)
    assert len({s.token_ids for s in flat(whole)}) > 100
    assert v.sample(prompts, n, params, seeds) == whole
    assert v.sample(prompts[::-1], n, params, seeds[::-1])[::-1] == whole
    assert [v.sample([p], n, params, [row])[0] for p, row in zip(prompts, seeds)] == whole
    assert [[v.sample([p], 1, params, [[s]])[0][0] for s in row] for p, row in zip(prompts[:5], seeds)] == whole[:5]
    assert [row[:2] for row in whole] == v.sample(prompts, 2, params, seeds)
    v.close()
    assert v.sample(prompts, n, params, seeds) == whole                 # started again, with its adapter
    other = [[s + 1 for s in row] for row in seeds]
    assert sum(a.token_ids == b.token_ids for a, b in zip(flat(whole), flat(v.sample(prompts, n, params, other)))) < 10


def test_rows_decoded_together_do_not_matter(qwen2):
    params, prompts = SamplingParams(1.0, 0.9, 0, 24), qwen2.prompts[:30]
    narrow = VLLMSampler(qwen2.lm, 3)
    qwen2.vllm.use(None)
    try: assert narrow.sample(prompts, 4, params, seeds_of(prompts, 4)) == qwen2.vllm.sample(prompts, 4, params, seeds_of(prompts, 4))
    finally: narrow.close()


# --- adapters that are not what they should be

def instead(sampler, monkeypatch, folder):
    "Hand vLLM another adapter than the one that is meant, every time."
    ask = sampler._ask
    def swapped(do, **fields): return ask(do, **fields | dict(folder=fields["folder"] and str(folder)) if do == "use" else fields)
    monkeypatch.setattr(sampler, "_ask", swapped)


def test_an_ignored_adapter_is_an_error(qwen2, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    shaken(qwen2.lm, empty, 3, strength=0.0)
    qwen2.vllm.use(None)
    with monkeypatch.context() as m:
        instead(qwen2.vllm, m, empty)
        with pytest.raises(SampleError, match="did not take the adapter .*what M_0 says"): qwen2.vllm.use(qwen2.a)
        assert qwen2.vllm.child is None
        with pytest.raises(SampleError, match="did not take"): qwen2.vllm.sample(qwen2.prompts[:1], 1, GREEDY, [[1]])       # not M_0 instead
    qwen2.vllm.use(qwen2.a)


def test_a_stale_adapter_is_an_error(qwen2, monkeypatch):
    qwen2.vllm.use(qwen2.a)
    instead(qwen2.vllm, monkeypatch, qwen2.a)
    with pytest.raises(SampleError, match="did not take the adapter .*what the adapter before it says"): qwen2.vllm.use(qwen2.b)


def test_zero_and_very_small_adapters_are_none(qwen2, tmp_path):
    "A fresh adapter changes nothing; one too small to be seen is found to be on all the same."
    for name, strength in (("zero", 0.0), ("small", 1e-12)):
        qwen2.vllm.use(shaken(qwen2.lm, tmp_path / name, 4, strength))
        for sampler in (qwen2.vllm, qwen2.hf): sampler.use(tmp_path / name)
        ours, theirs = (flat(s.sample(qwen2.prompts[:20], 1, GREEDY, seeds_of(qwen2.prompts[:20], 1))) for s in (qwen2.vllm, qwen2.hf))
        assert [s.token_ids for s in ours] == [s.token_ids for s in theirs]


def test_an_adapter_that_changes_in_place_is_read_again(qwen2, tmp_path):
    first = shaken(qwen2.lm, tmp_path / "first", 5)
    qwen2.vllm.use(first)
    before = qwen2.vllm.last[1]
    for f in shaken(qwen2.lm, tmp_path / "second", 6).iterdir(): f.replace(first / f.name)
    qwen2.vllm.use(first)
    assert qwen2.vllm.last[1] != before


def test_another_models_adapter_is_an_error(qwen2, tmp_path):
    other = LM(Config(device="cpu", lora_r=4))                          # the embedded model: three layers, not two
    with pytest.raises(ModelError, match="does not fit this model: 0 weights missing, 14 unknown"): qwen2.vllm.use(shaken(other, tmp_path / "other", 1))
    wide = LM(qwen2.lm.cfg.replace(lora_r=8))
    with pytest.raises(ModelError, match="does not fit this model: .* is "): qwen2.vllm.use(shaken(wide, tmp_path / "wide", 1))
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelError, match="cannot be read"): qwen2.vllm.use(tmp_path / "none")
    with pytest.raises(ModelError, match="is not there"): qwen2.vllm.use(tmp_path / "nowhere")
    qwen2.vllm.use(None)


# --- the process

def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" if Path("/proc").is_dir() else True


def gone(pid, seconds=30):
    "Does it end?"
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until: time.sleep(0.1)
    return not alive(pid)


def test_too_long_a_prompt_is_an_error_and_the_next_call_goes_on(qwen2):
    qwen2.vllm.use(None)
    with pytest.raises(SampleError, match="may take 524 tokens, and vLLM has room for 512"): qwen2.vllm.sample([[5] * 500], 1, GREEDY, [[1]])
    assert len(qwen2.vllm.sample([[5] * 480], 1, GREEDY, [[1]])) == 1 and qwen2.vllm.sample([], 1, GREEDY, []) == []


def test_more_prompts_than_a_step_reads(qwen2):
    "vLLM fails where a prompt with a seed of its own is read in two steps on a CPU; so none is."
    qwen2.vllm.use(None)
    params, prompts = SamplingParams(1.0, 1.0, 0, 8), [[3 + (i * 7 + j) % 100 for j in range(300 + i % 150)] for i in range(64)]
    drawn = qwen2.vllm.sample(prompts, 3, params, seeds_of(prompts, 3))
    assert [len(row) for row in drawn] == [3] * 64
    alone = qwen2.vllm.sample(prompts[:1], 3, params, seeds_of(prompts, 3)[:1])
    assert [s.token_ids for s in alone[0]] == [s.token_ids for s in drawn[0]]


def test_an_error_of_vllm_is_one_sentence(qwen2):
    qwen2.vllm.use(None)
    with pytest.raises(SampleError, match="^vLLM failed while it was sampling: index out of range") as e: qwen2.vllm.sample([[5, 9999]], 1, GREEDY, [[1]])
    assert "\n" not in str(e.value)
    assert qwen2.vllm.child is None and len(qwen2.vllm.sample([[5]], 1, GREEDY, [[1]])) == 1


def test_a_killed_child_is_an_error_and_starts_again(qwen2):
    qwen2.vllm.use(qwen2.b)
    before, pid = qwen2.vllm.sample(qwen2.prompts[:5], 1, GREEDY, seeds_of(range(5), 1)), qwen2.vllm.child.process.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SampleError, match=r"^the process of vLLM ended while it was sampling \(signal 9\).*smaller sample_batch"):
        qwen2.vllm.sample(qwen2.prompts[:5], 1, GREEDY, seeds_of(range(5), 1))
    assert gone(pid)
    assert qwen2.vllm.sample(qwen2.prompts[:5], 1, GREEDY, seeds_of(range(5), 1)) == before


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background jobs ignore it
from stasc.core import Config, SamplingParams
from stasc.model import LM
from stasc.sample_vllm import VLLMSampler
sampler = VLLMSampler(LM(Config(model=sys.argv[1], device="cpu", sampler="vllm")))
sampler.use(None)
type(sampler.lm).stop_ids = property(lambda self: [])
print(sampler.child.process.pid, flush=True)
sampler.sample([[5]] * 400, 50, SamplingParams(1.0, 1.0, 0, 500), [[j for j in range(50)]] * 400)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_child_never_outlives_its_parent(qwen2, how):
    "In the middle of its work."
    parent = subprocess.Popen([sys.executable, "-c", PARENT, qwen2.lm.cfg.model], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        time.sleep(1)
        assert alive(pid) and parent.poll() is None
        parent.send_signal(how)
        parent.wait(30)
        assert gone(pid)
        assert how != signal.SIGINT or "KeyboardInterrupt" in parent.stderr.read()
    finally:
        parent.kill()
        with contextlib.suppress(NameError, ProcessLookupError): os.kill(pid, signal.SIGKILL)


def test_a_forgotten_sampler_ends_its_child(qwen2):
    sampler = VLLMSampler(qwen2.lm)
    sampler.use(None)
    pid = sampler.child.process.pid
    del sampler
    assert gone(pid, 5)


# --- the loop

SMALL = dict(device="cpu", sampler="vllm", iterations=1, n_train=24, n_test=8, n_init=2, n_corr=2, part_size=16, threshold=1.0, train_batch=2)


def test_an_iteration_of_the_demo(tmp_path, capsys):
    run = STaSC(Config.demo(**SMALL), tmp_path / "run", callbacks=[]).run()
    assert run.n_done == 2 and len(run.kept) > 0
    assert run.metrics.train_acc_t1[0] > 0.2                            # the embedded model, not noise
    assert "sampled with vLLM" in capsys.readouterr().out
    again = STaSC(Config.demo(**SMALL), tmp_path / "again", callbacks=[], engine=run.engine).run()
    assert again.trajectories.equals(run.trajectories)
    assert STaSC.open(tmp_path / "run", callbacks=[]).cfg.sampler == "vllm"
    run.engine.sampler.close()


def test_whole_models(tmp_path):
    "Full fine-tuning: a process for each iteration's model; its texts are those of transformers."
    cfg = Config.demo(**SMALL, finetune="full")
    run = STaSC(cfg, tmp_path / "run", callbacks=[]).run()
    assert run.n_done == 2
    engine, prompts = run.engine, [run.prompter.initial(q) for q in run.data.test]
    hf, first = HFSampler(engine.lm, 16), None
    for folder in (None, tmp_path / "run/iter_01/model"):
        engine.use(folder); hf.use(folder)
        ours, theirs = (s.sample(prompts, 1, SamplingParams(0.0, 1.0, 0, 40), seeds_of(prompts, 1)) for s in (engine, hf))
        assert [s.token_ids for s in flat(ours)] == [s.token_ids for s in flat(theirs)]
        assert np.allclose([s.logprob for s in flat(ours)], [s.logprob for s in flat(theirs)], atol=1e-4)
        assert first != [s.logprob for s in flat(ours)]
        first = [s.logprob for s in flat(ours)]
    engine.sampler.close()


def test_an_engine_that_cannot_be_had_is_refused_before_a_model_is_loaded():
    with pytest.raises(SampleError, match="qlora"): Engine(Config(model="no/such-model", sampler="vllm", finetune="qlora"))
