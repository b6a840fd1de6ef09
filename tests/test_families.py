"Two real architectures with random weights: the command line, plain PEFT, greedy decoding and the ids that are trained on."
import json

import pytest
from conftest import root, run_command

from stasc.core import Config, Question, SamplingParams
from stasc.loop import STaSC

torch = pytest.importorskip("torch")

NQ = root.parent / "shared/data/nq_open/NQ-open.dev.jsonl"
COMBOS = [(f, t) for f in ("qwen2", "phi3") for t in ("lora", "qlora", "full")]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="session")
def run_of(families, questions_file, tmp_path_factory):
    "A finished run of `stasc run` for a family and a way of fine-tuning, made when first asked for."
    made = {}

    def run(family, finetune):
        if finetune == "qlora": pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
        if (family, finetune) not in made:
            out = tmp_path_factory.mktemp("family-runs") / f"{family}-{finetune}"
            done = run_command("run", "--data", questions_file, "--model", families[family], "--n-train", 5, "--n-test", 3, "--iterations", 2,
                               "--n-init", 1, "--n-corr", 2, "--max-new-tokens", 8, "--shots", 2 if (family, finetune) == ("phi3", "lora") else 1, "--filter", "all", "--finetune", finetune,
                               "--learning-rate", 0.01 if finetune != "full" else 1e-3, "--train-batch", 5, "--device", "cpu", "--out", out)
            made[family, finetune] = out, done
        return made[family, finetune]
    return run


def opened(out, sampler_batch=3): return STaSC.open(out, callbacks=[], sample_batch=sampler_batch)


def prompts_of(run): return [run.prompter.initial(Question(str(i), "Which number? " * k, ("1",))) for i, k in enumerate((1, 9, 4))]


def generated(model, prompt, lm):
    "What transformers' own greedy decoding says to one prompt."
    with torch.no_grad():
        out = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                             max_new_tokens=GREEDY.max_new_tokens, eos_token_id=lm.stop_ids, pad_token_id=lm.pad_id)
    return out[0, len(prompt):].tolist()


# --- the command line

@pytest.mark.parametrize("family,finetune", COMBOS)
def test_run_ends_well(run_of, family, finetune):
    out, done = run_of(family, finetune)
    assert done.code == 0, done.err
    for n in range(3):
        m = json.loads((out / f"iter_{n:02d}/metrics.json").read_text())
        assert m["n_kept"] == (10 if n else 0)
        assert m["test"]["n"] == 3 and m["train"]["n"] == 10
    kind = "model" if finetune == "full" else "adapter"
    assert all((out / f"iter_{n:02d}/{kind}").is_dir() for n in (1, 2)) and not (out / "iter_00" / kind).exists()


@pytest.mark.parametrize("family,finetune", [("qwen2", "lora"), ("phi3", "full")])
def test_run_on_natural_questions_ends_well(families, tmp_path, family, finetune):
    if not NQ.exists(): pytest.skip("../shared/data/nq_open is absent: the same is run on made-up questions above")
    done = run_command("run", "--data", NQ, "--model", families[family], "--n-train", 40, "--n-test", 40, "--iterations", 2, "--n-init", 1,
                       "--n-corr", 1, "--shots", 0, "--max-new-tokens", 4, "--filter", "all", "--finetune", finetune, "--device", "cpu",
                       "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert (tmp_path / "run/iter_02/metrics.json").exists()


def test_run_in_which_nothing_improves_ends_in_good_order(families, questions_file, tmp_path):
    argv = ["run", "--data", questions_file, "--model", families["qwen2"], "--n-train", 3, "--n-test", 2, "--iterations", 2, "--n-init", 1,
            "--n-corr", 1, "--max-new-tokens", 4, "--shots", 0, "--device", "cpu", "--out", tmp_path / "run"]
    done = run_command(*argv)
    assert done.code == 0, done.err
    for word in ("n_init, now 1", "n_corr, now 1", "temperature (now 0.6)", "improving filter"): assert word in done.out
    assert not (tmp_path / "run/iter_01/adapter").exists() and not (tmp_path / "run/iter_01/metrics.json").exists()
    again = run_command("resume", tmp_path / "run")
    assert again.code == 0 and "nothing to train M_1 on" in " ".join(again.out.split())


# --- M_n is what plain transformers and PEFT load

@pytest.mark.parametrize("family", ["qwen2", "phi3"])
@pytest.mark.parametrize("n", [1, 2])
def test_adapter_loads_with_plain_peft_and_says_the_same(run_of, families, family, n):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    out, _ = run_of(family, "lora")
    run = opened(out)
    base = AutoModelForCausalLM.from_pretrained(families[family], dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, out / f"iter_{n:02d}/adapter").eval()
    prompts, seeds = prompts_of(run), [[0]] * 3
    run.engine.use(out / f"iter_{n:02d}/adapter")
    on = [list(s[0].token_ids) for s in run.engine.sample(prompts, 1, GREEDY, seeds)]
    run.engine.use(None)
    off = [list(s[0].token_ids) for s in run.engine.sample(prompts, 1, GREEDY, seeds)]
    assert on == [generated(plain, p, run.engine.lm) for p in prompts]
    with plain.disable_adapter(): assert off == [generated(plain, p, run.engine.lm) for p in prompts]
    assert on != off


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_full_model_loads_with_plain_transformers_and_says_the_same(run_of, families, family):
    from transformers import AutoModelForCausalLM
    out, _ = run_of(family, "full")
    run = opened(out)
    prompts, seeds, said = prompts_of(run), [[0]] * 3, {}
    for n, folder in ((1, out / "iter_01/model"), (0, families[family]), (2, out / "iter_02/model")):
        run.engine.use(folder if n else None)
        said[n] = [list(s[0].token_ids) for s in run.engine.sample(prompts, 1, GREEDY, seeds)]
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert said[n] == [generated(plain, p, run.engine.lm) for p in prompts]
    assert said[0] != said[2]


def test_quantised_base_with_an_adapter_says_the_same_through_plain_peft(run_of, families):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from stasc.model import _nf4, _with_gradient
    out, _ = run_of("qwen2", "qlora")
    run = opened(out)
    base = AutoModelForCausalLM.from_pretrained(families["qwen2"], quantization_config=_nf4(torch.float32), dtype=torch.float32, device_map={"": "cpu"})
    _with_gradient(base)            # packed weights, where the CPU has them, compute in bfloat16
    plain = PeftModel.from_pretrained(base, out / "iter_02/adapter").eval()
    run.engine.use(out / "iter_02/adapter")
    prompts = prompts_of(run)
    assert [list(s[0].token_ids) for s in run.engine.sample(prompts, 1, GREEDY, [[0]] * 3)] == [generated(plain, p, run.engine.lm) for p in prompts]


# --- what is trained on is what was sampled, token by token

@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_training_examples_are_the_sampled_ids(run_of, family):
    out, _ = run_of(family, "lora")
    run = opened(out)
    pairs = run._pairs(0, "train")
    examples = run._examples(pairs[pairs.kept])
    assert len(examples) == 10
    questions = {q.id: q for q in run.data.train}
    for e, row in zip(examples, pairs.itertuples()):
        assert list(e.prompt_ids) == run.prompter.correction(questions[row.question_id], row.init_text)
        assert list(e.completion_ids) == list(row.corr_token_ids) and len(e.completion_ids) == row.corr_n_tokens
        assert (e.completion_ids[-1] in run.engine.lm.stop_ids) == (row.corr_finish_reason == "stop")
        assert not set(e.completion_ids[:-1]) & set(run.engine.lm.stop_ids)
    # the ids are not those of the decoded text: random weights draw tokens that no tokenizer would give
    assert any(run.engine.tokenizer(r.corr_text, add_special_tokens=False)["input_ids"] != list(r.corr_token_ids) for r in pairs.itertuples())


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_prompts_are_what_the_chat_template_gives(run_of, family):
    from stasc.prompt import initial_messages
    out, _ = run_of(family, "lora")
    run = opened(out)
    q = run.data.train[0]
    expected = run.engine.tokenizer.apply_chat_template(initial_messages(run.prompter.set, q), add_generation_prompt=True, tokenize=True, return_dict=True)
    assert run.prompter.initial(q) == list(expected["input_ids"])
    text = run.engine.tokenizer.decode(run.prompter.initial(q))
    assert text.count(q.text) == 1 and text.rstrip().endswith("assistant" if family == "qwen2" else "<|assistant|>")


# --- attention windows and padded batches

def test_prompts_longer_than_the_sliding_window_decode_as_in_transformers(tmp_path):
    from conftest import family_model, family_tokenizer

    from stasc.train import Engine
    tokenizer = family_tokenizer("phi3")
    model = family_model("phi3", tokenizer, sliding_window=16, num_hidden_layers=2)
    model.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    engine = Engine(Config(model=str(tmp_path), device="cpu", sample_batch=8))
    prompts = [tokenizer("a number " * k)["input_ids"] for k in (3, 30, 11)]
    expected = [generated(model.eval(), p, engine.lm) for p in prompts]
    for n in (1, 2):
        drawn = engine.sample(prompts, n, GREEDY, [[0] * n] * 3)
        assert [[list(s.token_ids) for s in row] for row in drawn] == [[e] * n for e in expected]
