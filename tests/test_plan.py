"The plan: counts against real models, memory against what autograd and safetensors keep, choices that hold their promises."
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasc.core import Config, ConfigError, ModelError
from stasc.plan import (_SHAPES, GPU, GPUS, Assumed, Shape, _halves, activation_bytes, adapter_parameters, choose, disk_bytes, parameters, plan, sampling_bytes,
                        shape_of, texts_of, training_bytes, weight_bytes)

QWEN, PHI = _SHAPES["qwen2.5-1.5b"], _SHAPES["phi-3-mini"]
FAMILIES = dict(qwen2="Qwen2", qwen3="Qwen3", phi3="Phi3", llama="Llama", gemma2="Gemma2", gemma3_text="Gemma3")


def on_meta(s):
    "The real architecture at these shapes, without its numbers."
    import torch
    import transformers
    name = FAMILIES[s.kind]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
        hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        intermediate_size=s.inner, vocab_size=s.vocabulary, tie_word_embeddings=s.tied, pad_token_id=0)
    with torch.device("meta"): return getattr(transformers, f"{name}ForCausalLM")(config)


# --- counts

@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-7b", "qwen3-0.6b", "phi-3-mini", "llama-3.2-1b", "gemma-2-2b", "gemma-3-1b"])
def test_parameters_and_adapters_are_those_of_the_real_architecture(name):
    from peft import LoraConfig, get_peft_model
    s = _SHAPES[name]
    model = on_meta(s)
    assert sum(p.numel() for p in model.parameters()) == sum(parameters(s).values())
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == adapter_parameters(s, 16)


def test_ten_adapters_of_a_1_5b_model_and_its_tables_stay_under_a_gigabyte(tmp_path):
    "Measured: an adapter of true shape through PEFT's own names and safetensors."
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    adapted = get_peft_model(on_meta(QWEN), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    save_file({k: torch.zeros(v.shape) for k, v in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}, tmp_path / "adapter.safetensors")
    written = (tmp_path / "adapter.safetensors").stat().st_size
    disk = disk_bytes(QWEN, Config.paper(finetune="lora"), new=128)
    assert 10 * written == pytest.approx(disk["models"], rel=1e-3)
    assert 10 * written + disk["tables"] < 1e9


def test_tables_of_a_run_take_no_more_than_said(tmp_path):
    "Ids and words without any likeness between samples, which is the worst case."
    import random

    from stasc.loop import STaSC
    from stasc.train import ScriptedEngine

    def script(prompt, rng, skill): return " ".join("".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 7))) for _ in range(30))
    cfg = Config(iterations=1, n_train=60, n_test=20, n_init=2, n_corr=3, filter="all", shots=0, part_size=64)
    run = STaSC(cfg, tmp_path / "run", engine=ScriptedEngine(script), callbacks=[]).run()
    files = [p for p in run.dir.path.rglob("part-*.parquet")]
    length = run.dir.table(0, "corrections.train").corr_n_tokens.mean()
    said = disk_bytes(QWEN, cfg, length)["tables"]
    assert 0.2 * said < sum(p.stat().st_size for p in files) < said
    assert sum(len(run.dir.table(n, phase)) for n in (0, 1) for phase in texts_of(cfg)) == sum(drawn * times for _, drawn, times in texts_of(cfg).values())


def test_quantised_weights_take_what_bitsandbytes_takes():
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    import torch
    q, state = bnb.quantize_4bit(torch.randn(512, 512), quant_type="nf4", compress_statistics=True)
    held = q.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    s = Shape(512, 1, 8, 8, 64, 512, 10, True)
    assert held / 512**2 * parameters(s)["linear"] == pytest.approx(weight_bytes(s, "qlora") - 2 * (parameters(s)["vocabulary"] + parameters(s)["rest"]), rel=1e-3)


# --- shapes

@pytest.mark.parametrize("model,shape", [("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"), ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"), ("Qwen/Qwen2.5-1.5B", "qwen2.5-1.5b"),
                                         ("google/gemma-3-1b-it", "gemma-3-1b")])
def test_models_are_known_by_name(model, shape, monkeypatch):
    import stasc.plan
    monkeypatch.setattr(stasc.plan, "_cached", lambda hub_id: None)
    assert shape_of(model) == _SHAPES[shape]


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-1.5Bx", "nobody/none"])
def test_unknown_models_are_refused(model, monkeypatch):
    import stasc.plan
    monkeypatch.setattr(stasc.plan, "_cached", lambda hub_id: None)
    with pytest.raises(ModelError, match="not on this computer"): shape_of(model)


GOOD = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=100)


@pytest.mark.parametrize("text,says", [("{", "cannot be read"), ("[]", "hidden_size"), ("{}", "hidden_size"), (json.dumps(GOOD | dict(vocab_size="many")), "vocab_size"),
                                       (json.dumps(GOOD | dict(hidden_size=0)), "hidden_size"), (json.dumps(GOOD | dict(num_local_experts=8)), "mixture of experts")])
def test_bad_configurations_are_one_sentence(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text); (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=says): shape_of(str(tmp_path))


def test_configuration_in_a_folder_is_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gemma3", text_config=GOOD | dict(model_type="gemma3_text", num_key_value_heads=2))))
    assert shape_of(str(tmp_path)) == Shape(64, 2, 4, 2, 16, 96, 100, True, "gemma3_text")
    (tmp_path / "config.json").write_text(json.dumps(GOOD | dict(model_type="newest")))
    assert any("newest is not known" in n for n in plan(Config(model=str(tmp_path))).notes)


# --- choices

shapes = st.builds(Shape, hidden=st.sampled_from([64, 896, 2048, 4096]), layers=st.integers(1, 48), heads=st.integers(1, 32), kv_heads=st.integers(1, 8), head_dim=st.sampled_from([64, 128]),
                   inner=st.sampled_from([128, 4864, 14336]), vocabulary=st.sampled_from([355, 32064, 262144]), tied=st.booleans(), kind=st.sampled_from(sorted(FAMILIES)))


@settings(max_examples=150, deadline=None)
@given(shapes, st.sampled_from(list(GPUS.values())), st.sampled_from(["lora", "qlora", "full"]), st.integers(1, 64), st.sampled_from(["auto", "on", "off"]), st.integers(1, 3000))
def test_what_is_said_to_fit_does(s, gpu, finetune, batch, checkpointing, prompt):
    cfg = Config(train_batch=batch, gradient_checkpointing=checkpointing)
    c = choose(s, gpu, finetune, cfg, prompt)
    assert c.fits == (c.peak <= .9e9 * gpu.memory)
    assert c.training == training_bytes(s, finetune, 16, c.train_batch, prompt, 256, True, c.checkpointing)
    assert 1 <= c.train_batch <= batch and batch <= c.train_batch * c.grad_accumulation < batch + c.train_batch
    assert c.checkpointing in dict(auto=(True, False), on=(True,), off=(False,))[checkpointing]
    bigger = dataclasses.replace(gpu, memory=2 * gpu.memory)
    assert not c.fits or choose(s, bigger, finetune, cfg, prompt).fits
    if c.fits and c.train_batch == batch and not c.checkpointing: return
    if c.fits and not (checkpointing == "on" and c.train_batch == batch):       # one step up would not have fitted
        tried = [(k, b) for k in ((False, True) if checkpointing == "auto" else (c.checkpointing,)) for b in _halves(batch)]
        k, b = tried[tried.index((c.checkpointing, c.train_batch)) - 1]
        assert sum(training_bytes(s, finetune, 16, b, prompt, 256, True, k).values()) > .9e9 * gpu.memory


@given(st.integers(1, 4096))
def test_halves_fall_to_one(n):
    h = _halves(n)
    assert h[0] == n and h[-1] == 1 and all(a > b for a, b in zip(h, h[1:]))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 32), st.integers(10, 2000), st.booleans())
def test_more_of_anything_never_takes_less_memory(s, rows, length, half):
    for finetune in ("lora", "qlora", "full"):
        a = activation_bytes(s, finetune, rows, length, half)
        assert a <= activation_bytes(s, finetune, rows + 1, length, half) and a <= activation_bytes(s, finetune, rows, length + 1, half)
        assert a <= activation_bytes(dataclasses.replace(s, layers=s.layers + 1), finetune, rows, length, half)
    half_, quarter = weight_bytes(s, "lora", half), weight_bytes(s, "qlora", half)
    assert quarter < half_ <= weight_bytes(s, "full", half)
    assert sum(sampling_bytes(s, "lora", 16, rows, length).values()) < sum(sampling_bytes(s, "lora", 16, rows + 1, length).values())


def test_t4_computes_in_float16_and_the_others_in_bfloat16():
    made = {r["gpu"]: r["dtype"] for r in plan(Config.paper()).rows}
    assert made.pop("T4") == "float16" and set(made.values()) == {"bfloat16"}
    assert all(r["dtype"] == "float32" for r in plan(Config.paper(dtype="float32")).rows)


def test_faster_cards_and_less_to_do_take_less_time():
    def hours(**kw): return {r["gpu"]: r["hours"] for r in plan(Config.paper(finetune="lora", **kw)).rows if r["finetune"] == "lora"}
    base = hours()
    assert base["A100 80GB"] <= base["RTX 4090"] <= base["L4"] <= base["T4"]
    for less in (dict(iterations=5), dict(n_corr=2), dict(variant="FIE"), dict(max_new_tokens=64), dict(n_train=100)):
        assert all(hours(**less)[g] < base[g] for g in base), less
    slow = plan(Config.paper(finetune="lora"), assumed=Assumed(matrix=.1, bandwidth=.1)).rows[0]["hours"]
    assert slow > base["T4"]


# --- what a person sees

def test_page_and_text_hold_every_card_and_escape_what_is_hostile(tmp_path):
    folder = tmp_path / "<script>alert(1)"
    folder.mkdir(); (folder / "tokenizer.json").write_text("{}"); (folder / "config.json").write_text(json.dumps(GOOD | dict(model_type="<b>x")))
    p = Config(model=str(folder)).plan()
    assert "<script>" not in p._repr_html_() and "<b>" not in p._repr_html_() and "<table>" in p._repr_html_()
    for g in GPUS: assert g in repr(p)
    assert "none of this was measured on a GPU" in repr(p)


def test_what_fits_nowhere_is_said():
    big = Config.paper("Qwen/Qwen2.5-7B-Instruct")
    assert "No card here holds full fine-tuning" in repr(big.plan()) and "No card here holds full fine-tuning" in repr(big.plan("T4"))
    assert [r["finetune"] for r in big.plan("T4").rows if r["fits"]] == ["qlora"]


def test_command_prints_the_plan_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("plan", "--preset", "paper", "--finetune", "lora", "--gpu", "L4", "--prompt-tokens", "600")
    assert done.code == 0 and "L4" in done.out and "T4" not in done.out and "600 tokens" in done.out
    assert command("plan", "--gpu", "H1000").code == 2 and command("plan", "--model", "./nowhere").code == 2
    assert not list(tmp_path.iterdir())


def test_plan_is_light():
    import subprocess
    import sys
    line = "import sys; from stasc.plan import plan; from stasc.core import Config; plan(Config.paper()); print([m for m in ('torch', 'transformers', 'pandas', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", line], capture_output=True, text=True).stdout.strip() == "[]"


def test_unknown_card_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="A100 40GB"): plan(Config(), "A100 4GB")
    assert choose(QWEN, GPU("tiny", 0.1, (8, 0), 1, 1), "qlora", Config(), 600).fits is False
