"Fine-tuning: what the loss reaches, where a training starts, what a failed one leaves behind."
import hashlib
import math

import pytest

from stasc.core import Config, TrainError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.train import Engine, Example, collate, fine_tune

torch = pytest.importorskip("torch")


@pytest.fixture
def lm(embedded):
    yield embedded.lm
    embedded.lm.cfg = Config.demo(device="cpu", train_batch=4)
    embedded.use(None)


@pytest.fixture
def examples(embedded):
    return [Example(tuple(embedded.tokenizer("What is 347 + 285?" + " more" * k)["input_ids"]),
                    tuple(embedded.tokenizer(f"Final Answer: {632 + k}")["input_ids"]) + (embedded.tokenizer.eos_token_id,)) for k in range(6)]


def loss_of(lm, batch):
    "Loss and its gradient at every logit."
    with torch.enable_grad():
        logits = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach().requires_grad_()
        loss = lm.base.loss_function(logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1])
        loss.backward()
    return loss.item(), logits.grad


def digest(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def trained(engine, examples, start, out, seed=1):
    out.mkdir()
    engine.train(examples, start, out, engine.lm.cfg, seed)
    return digest(out)


# --- what the loss reaches

def test_labels_are_the_completion_and_nothing_else(lm, examples):
    batch = collate(examples, lm.pad_id)
    for row, mask, e in zip(batch["labels"].tolist(), batch["attention_mask"].tolist(), examples):
        p, c = len(e.prompt_ids), len(e.completion_ids)
        assert row == [-100] * p + list(e.completion_ids) + [-100] * (len(row) - p - c)
        assert mask == [1] * (p + c) + [0] * (len(row) - p - c)


def test_gradient_is_zero_at_every_logit_that_does_not_predict_a_completion_token(lm, examples):
    lm.use(None)
    _, grad = loss_of(lm, collate(examples, lm.pad_id))
    reached = grad.abs().sum(-1) > 0
    for row, e in zip(reached, examples):
        p, c = len(e.prompt_ids), len(e.completion_ids)
        assert row.nonzero()[:, 0].tolist() == list(range(p - 1, p + c - 1))        # the last one predicts the end token


def test_loss_is_the_mean_over_the_completion_tokens_written_out(lm, examples):
    lm.use(None)
    batch = collate(examples, lm.pad_id)
    logp = torch.log_softmax(lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach(), -1)
    picked = [logp[i, len(e.prompt_ids) - 1 + j, token].item() for i, e in enumerate(examples) for j, token in enumerate(e.completion_ids)]
    assert loss_of(lm, batch)[0] == pytest.approx(-math.fsum(picked) / len(picked), rel=1e-5)


def test_perturbing_the_target_of_any_other_token_does_not_change_the_loss(lm, examples):
    "The model reads the same ids; what it should have said at each position is exchanged in turn."
    lm.use(None)
    batch = collate(examples[:2], lm.pad_id)
    with torch.no_grad(): logits = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def loss(target):
        labels = torch.where(batch["labels"] == -100, -100, target)
        return lm.base.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1]).item()
    clean = loss(batch["input_ids"])
    for i, j in ((i, j) for i in range(2) for j in range(batch["input_ids"].shape[1])):
        target = batch["input_ids"].clone()
        target[i, j] = (target[i, j] + 1) % logits.shape[-1]
        assert (loss(target) != clean) == (batch["labels"][i, j] != -100).item(), (i, j)


def test_padding_changes_no_loss(lm, examples):
    lm.use(None)
    single = [loss_of(lm, collate([e], lm.pad_id))[0] for e in examples]
    weights = [len(e.completion_ids) for e in examples]
    for pad in (lm.pad_id, lm.tokenizer.eos_token_id, 5):
        assert loss_of(lm, collate(examples, pad))[0] == pytest.approx(sum(s * w for s, w in zip(single, weights)) / sum(weights), rel=1e-4)


def test_end_token_is_learned_also_where_it_pads_the_batch(lm, examples, monkeypatch):
    eos = lm.tokenizer.eos_token_id
    monkeypatch.setattr(type(lm), "pad_id", property(lambda self: eos))
    batch = collate(examples, lm.pad_id)
    assert [(row == eos).sum().item() for row in batch["labels"]] == [1] * len(examples)
    never_ends = [Example(e.prompt_ids[:-2], (e.completion_ids[0], eos)) for e in examples]

    def end(): return torch.softmax(lm.model(torch.tensor([[*never_ends[0].prompt_ids, never_ends[0].completion_ids[0]]])).logits[0, -1].detach(), -1)[eos].item()
    lm.cfg = lm.cfg.replace(epochs=10, learning_rate=5e-3)
    lm.start(None, 0)
    before = end()
    fine_tune(lm, never_ends, lm.cfg, 0)
    assert before < 0.1 and end() > 0.5


def test_trainer_reports_the_loss_of_the_completions(lm, examples):
    lm.cfg = lm.cfg.replace(train_batch=len(examples))
    lm.start(None, 0)
    expected = loss_of(lm, collate(examples, lm.pad_id))[0]             # a fresh adapter changes nothing
    report = fine_tune(lm, examples, lm.cfg, 0)
    assert report["first_loss"] == pytest.approx(expected, rel=1e-4)
    assert report["steps"] == 1 and report["tokens"] == sum(len(e.completion_ids) for e in examples)


def test_gradient_accumulation_equals_a_larger_batch(lm, examples, tmp_path):
    from safetensors.torch import load_file
    made = []
    for name, batch, accumulation in (("one", 6, 1), ("two", 3, 2)):
        lm.cfg = lm.cfg.replace(train_batch=batch, grad_accumulation=accumulation)
        lm.start(None, 0)
        report = fine_tune(lm, examples, lm.cfg, 0)
        (tmp_path / name).mkdir(); lm.save(tmp_path / name)
        made.append((report["steps"], report["first_loss"], load_file(tmp_path / name / "adapter_model.safetensors")))
    assert made[0][0] == made[1][0] == 1
    assert made[0][1] == pytest.approx(made[1][1], rel=1e-4)
    # one step of AdamW moves by the sign of the gradient, which noise may flip where the gradient is almost zero
    moved = [(a - b).abs() for a, b in ((made[0][2][k], made[1][2][k]) for k in made[0][2])]
    assert torch.cat([m.flatten() for m in moved]).gt(1e-4).float().mean() < 0.01


# --- where a training starts

def test_same_seed_gives_the_same_bytes_and_another_seed_others(embedded, lm, examples, tmp_path):
    a, b, c = (trained(embedded, examples, None, tmp_path / x, seed) for x, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b and a["adapter_model.safetensors"] != c["adapter_model.safetensors"]


def test_fixed_fine_tuning_starts_from_m0_whatever_was_trained_before(embedded, lm, examples, tmp_path):
    trained(embedded, examples[:3], None, tmp_path / "before", 5)
    embedded.use(tmp_path / "before")
    here = trained(embedded, examples, None, tmp_path / "here")
    fresh = trained(Engine(Config.demo(device="cpu", train_batch=4)), examples, None, tmp_path / "fresh")
    assert here == fresh


def test_fixed_full_fine_tuning_starts_from_m0_whatever_was_trained_before(examples, tmp_path):
    cfg = Config.demo(device="cpu", finetune="full", train_batch=4)
    engine = Engine(cfg)
    trained(engine, examples[:3], None, tmp_path / "before", 5)
    here = trained(engine, examples, None, tmp_path / "here")
    assert here == trained(Engine(cfg), examples, None, tmp_path / "fresh")
    assert here["model.safetensors"] != digest(tmp_path / "before")["model.safetensors"]


def test_evolving_fine_tuning_continues_from_the_folder_given(embedded, lm, examples, tmp_path):
    first = trained(embedded, examples, None, tmp_path / "first")
    here = trained(embedded, examples, tmp_path / "first", tmp_path / "here")
    embedded.use(None)
    assert here == trained(embedded, examples, tmp_path / "first", tmp_path / "again")
    assert here["adapter_model.safetensors"] != first["adapter_model.safetensors"]
    # a learning rate of 0 shows the start itself
    lm.cfg = lm.cfg.replace(learning_rate=0)
    assert trained(embedded, examples, tmp_path / "first", tmp_path / "same") == first


def test_m0_is_untouched_by_training(embedded, lm, examples, tmp_path):
    weights = {k: v.clone() for k, v in lm.base.state_dict().items() if "lora" not in k}
    trained(embedded, examples, None, tmp_path / "a")
    embedded.use(None)
    assert all(torch.equal(v, lm.base.state_dict()[k]) for k, v in weights.items())


def test_training_leaves_the_callers_random_state_alone(embedded, lm, examples, tmp_path):
    import random
    random.seed(3); torch.manual_seed(3)
    expected = random.random(), torch.rand(1).item()
    random.seed(3); torch.manual_seed(3)
    trained(embedded, examples, None, tmp_path / "a")
    assert (random.random(), torch.rand(1).item()) == expected


def test_examples_leave_the_training_prompt_where_asked(embedded):
    from stasc.core import Question
    from stasc.prompt import Prompter
    q, base = Question("a", "How many?", ("1",)), dict(model="embedded", data="own", shots=2)
    same, without = (Prompter(embedded.tokenizer, Config(**base, train_prompt=t)) for t in ("same", "no_examples"))
    none = Prompter(embedded.tokenizer, Config(**base | dict(shots=0)))
    assert same.correction(q, "2", training=True) == same.correction(q, "2") == without.correction(q, "2")
    assert without.correction(q, "2", training=True) == none.correction(q, "2") != without.correction(q, "2")


# --- a training that fails

def spoil(monkeypatch, lm, step):
    "From a step on the loss is not a number."
    from transformers import Trainer
    honest, seen = Trainer.compute_loss, []

    def compute_loss(self, *args, **kw):
        seen.append(1)
        loss = honest(self, *args, **kw)
        return loss * float("nan") if len(seen) >= step else loss
    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("step", [1, 2])
def test_loss_that_is_no_number_is_an_error_that_names_the_step(embedded, lm, examples, tmp_path, monkeypatch, step):
    spoil(monkeypatch, lm, step)
    (tmp_path / "a").mkdir()
    with pytest.raises(TrainError, match=f"from step {step} on; lower learning_rate"): embedded.train(examples, None, tmp_path / "a", lm.cfg, 0)
    assert not list((tmp_path / "a").iterdir())


def test_gradient_that_is_no_number_is_an_error_too(embedded, lm, examples, tmp_path):
    "The loss of the only step is still finite, the weights after it are not."
    lm.cfg = lm.cfg.replace(train_batch=len(examples))
    weight = next(p for n, p in lm.model.named_parameters() if "lora_B" in n)
    weight.requires_grad_(True)
    hook = weight.register_hook(lambda g: g * float("nan"))
    (tmp_path / "a").mkdir()
    try:
        with pytest.raises(TrainError): embedded.train(examples, None, tmp_path / "a", lm.cfg, 0)
    finally: hook.remove()
    assert not list((tmp_path / "a").iterdir())


def test_failed_training_leaves_no_adapter_and_the_run_can_be_resumed(tmp_path, monkeypatch):
    def make(): return STaSC(Config.demo(n_train=6, n_test=3, iterations=1, filter="all", max_new_tokens=6, n_init=1, n_corr=1, device="cpu"), tmp_path / "run", callbacks=[])
    run = make()
    with monkeypatch.context() as m:
        spoil(m, None, 1)
        with pytest.raises(TrainError): run.run()
    assert not (tmp_path / "run/iter_01/adapter").exists() and not list((tmp_path / "run").rglob(".tmp-*"))
    assert make().run().n_done == 2


def test_nothing_to_train_on_is_an_error(lm):
    with pytest.raises(TrainError, match="no correction was kept"): fine_tune(lm, [], lm.cfg, 0)
