"Fine-tuning: what the loss reaches, where a training starts, what a failed one leaves behind."
import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasc.core import Config, TrainError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.train import Engine, Example, collate, completion_loss, fine_tune, packed, passes, same_loss, training_arguments

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


# --- what is trained on

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(IDS, IDS, IDS, IDS)
def test_an_example_is_its_ids_however_they_come(a, b, c, d):
    import array, copy, pickle
    import numpy as np
    e = Example(a, b)
    assert (e.prompt_ids, e.completion_ids) == (tuple(a), tuple(b)) and all(type(i) is int for i in e.prompt_ids)
    for kind in (tuple, iter, packed, lambda x: array.array("l", x), torch.tensor, *(lambda x, t=t: np.array(x, t) for t in ("int32", "int64", "uint32", ">i4")), lambda x: np.array([x, x], np.int32).T[:, 0]):
        same = Example(kind(a), kind(b))
        assert same == e and hash(same) == hash(e) and repr(same) == repr(e)
    for again in (pickle.loads(pickle.dumps(e)), copy.deepcopy(e), eval(repr(e))): assert again == e and again.prompt_ids == tuple(a)
    assert (e == Example(c, d)) == ((a, b) == (c, d)) and e != (a, b)
    with pytest.raises(AttributeError): e.prompt = b""


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), st.integers(0, 9))
def test_a_batch_is_what_lists_of_numbers_give(pairs, pad):
    batch, longest = collate([Example(p, c) for p, c in pairs], pad), max(len(p) + len(c) for p, c in pairs)
    fill = lambda rows, value: [r + [value] * (longest - len(r)) for r in rows]
    expected = dict(input_ids=fill([p + c for p, c in pairs], pad), attention_mask=fill([[1] * len(p + c) for p, c in pairs], 0), labels=fill([[-100] * len(p) + c for p, c in pairs], -100))
    assert {k: v.tolist() for k, v in batch.items()} == expected and all(v.dtype == torch.int64 for v in batch.values())


def test_bytes_are_a_sequence_of_ids_unless_they_were_packed():
    assert Example(b"ab12", b"c").prompt_ids == (97, 98, 49, 50)
    assert Example(packed(b"ab12"), ()).prompt_ids == (97, 98, 49, 50)


@pytest.mark.parametrize("wrong", [(1.5,), (2**31,), (-2**31 - 1,), "12", (None,), 7, None, [[1]]])
def test_what_is_no_sequence_of_ids_is_refused_in_one_sentence(wrong):
    with pytest.raises(TrainError, match="expected whole numbers below 2.31") as e: Example((1,), wrong)
    assert "\n" not in str(e.value)


def test_examples_with_one_prompt_hold_it_once():
    import pickle, tracemalloc
    prompt = packed(range(1000, 1678))
    tracemalloc.start()
    kept = [Example(prompt, range(i, i + 128)) for i in range(200)]
    size = tracemalloc.get_traced_memory()[0] / len(kept)
    tracemalloc.stop()
    assert all(e.prompt is prompt for e in kept) and size < 700            # bytes: 512 of ids, two headers, a place in the list
    assert len(pickle.dumps(kept)) < 200 * 600 + 3000                       # nor is it sent to another process twice
    sent = pickle.loads(pickle.dumps(kept))
    assert sent == kept and len({id(e.prompt) for e in sent}) == 1


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


# --- logits for the completions alone

SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = dict(Qwen2={}, Phi3={}, Llama=dict(tie_word_embeddings=True), Gemma=dict(head_dim=16), Gemma2=dict(head_dim=16, final_logit_softcapping=3.0),
                Granite=dict(logits_scaling=4.0), Cohere=dict(logit_scale=0.3), Mixtral=dict(num_local_experts=4))
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, output_router_logits=True)


def random_model(family, **changes):
    import transformers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES.get(family, {}) | changes)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def loss_and_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_are_those_of_full_logits(family):
    model = random_model(family)
    rows = [Example(tuple(range(5, 5 + p)), tuple(range(90, 90 + c))) for p, c in ((40, 3), (1, 20), (17, 1))]
    batch = collate(rows, 0)
    expected, gradient = loss_and_gradient(model, model(**batch).loss)
    assert same_loss(model, rows, 0)
    for piece in (2**26, 10 * 300, 300, 1):                             # one piece, three, one token each, more pieces than tokens
        loss, g = loss_and_gradient(model, completion_loss(model, batch, piece=piece))
        assert loss == pytest.approx(expected, abs=1e-5)
        assert (g - gradient).norm() <= 1e-5 * gradient.norm()
    assert completion_loss(model, batch, n=48).item() == pytest.approx(expected / 2, abs=1e-5)
    assert "forward" not in vars(model.get_decoder())


def test_output_layer_sees_the_completions_alone(lm, examples):
    seen, lm.cfg = [], lm.cfg.replace(train_batch=3)
    lm.start(None, 0)
    hook = lm.base.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.numel() // out.shape[-1]) if lm.model.training else None)
    try: fine_tune(lm, examples, lm.cfg, 0)
    finally: hook.remove()
    assert len(seen) == 2 and sum(seen) == sum(len(e.completion_ids) for e in examples)


def plain_trainer(lm, examples, cfg, seed, tmp_path):
    "What is usually written: the Trainer with the model's own loss and full logits."
    from transformers import DataCollatorForSeq2Seq, Trainer
    rows = [dict(input_ids=[*e.prompt_ids, *e.completion_ids], labels=[-100] * len(e.prompt_ids) + [*e.completion_ids],
                 attention_mask=[1] * (len(e.prompt_ids) + len(e.completion_ids))) for e in examples]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(lm.tokenizer, "padding_side", "right")
        trainer = Trainer(model=lm.model, args=training_arguments(cfg, lm.device, lm.dtype, seed, str(tmp_path)), train_dataset=rows,
                          data_collator=DataCollatorForSeq2Seq(lm.tokenizer, padding="longest"))
        trainer.train()
    for k in ("forward", "_original_forward", "_is_accelerate_prepared"): vars(lm.model).pop(k, None)
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.mark.parametrize("batch,accumulation", [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_training_is_that_of_the_plain_trainer(lm, examples, tmp_path, batch, accumulation):
    cfg = lm.cfg = lm.cfg.replace(train_batch=batch, grad_accumulation=accumulation, epochs=2, learning_rate=1e-2)
    lm.start(None, 0)
    expected = plain_trainer(lm, examples, cfg, 3, tmp_path)
    weights = {k: v.clone() for k, v in lm.model.state_dict().items() if "lora" in k}
    lm.start(None, 0)
    report = fine_tune(lm, examples, cfg, 3)
    assert [report["first_loss"], report["last_loss"], report["steps"]] == pytest.approx([expected[0], expected[-1], len(expected)], abs=1e-4)
    apart = torch.cat([(v - lm.model.state_dict()[k]).abs().flatten() for k, v in weights.items()])
    assert apart.gt(1e-3).float().mean() < 0.01                         # AdamW moves by the sign of a gradient, also of one that is almost zero


def test_model_with_a_loss_of_its_own_keeps_it_and_says_so(tmp_path, embedded, examples):
    folder = tmp_path / "moe"
    random_model("Qwen2Moe", vocab_size=400, **MOE).save_pretrained(folder)
    embedded.tokenizer.save_pretrained(folder)
    engine = Engine(Config(model=str(folder), device="cpu", train_batch=4, learning_rate=1e-3, seed=0))
    assert not same_loss(engine.lm.base, examples, engine.lm.pad_id)
    engine.lm.start(None, 0)
    expected = plain_trainer(engine.lm, examples, engine.lm.cfg, 3, tmp_path)
    engine.lm.start(None, 0)
    with pytest.warns(UserWarning, match="full logits"): report = fine_tune(engine.lm, examples, engine.lm.cfg, 3)
    assert [report["first_loss"], report["last_loss"]] == pytest.approx([expected[0], expected[-1]], abs=1e-6)


@pytest.mark.parametrize("lie", [lambda x: x * 1.01, lambda x: x + 0.1 * x.roll(1, -1)])
def test_head_that_treats_short_input_otherwise_is_found_out(lie):
    "A model whose logits depend on how many tokens the output layer sees."
    model = random_model("Qwen2")
    model.lm_head.register_forward_hook(lambda m, args, out: lie(out) if out.shape[0] == 1 else out)
    assert not same_loss(model, [Example((11, 12, 13), (21, 22, 2))], 0)


def test_half_precision_base_trains_on_the_completions_alone(examples, tmp_path):
    engine = Engine(Config.demo(device="cpu", dtype="bfloat16", train_batch=4))
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = trained(engine, examples, None, tmp_path / "a")
    assert "adapter_model.safetensors" in made


# --- rows of a step, and what they are divided into

@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=40), st.integers(1, 9))
def test_passes_hold_every_row_once_and_pad_no_more_than_the_order_drawn(lengths, batch):
    rows = [Example((1,) * p, (2,) * c) for p, c in lengths]
    made = passes(rows, batch)
    assert sorted(map(id, sum(made, []))) == sorted(map(id, rows))
    assert all(len(p) == batch for p in made[:-1]) and 0 < len(made[-1]) <= batch
    assert len(rows) > batch or made == [rows]
    def width(p): return max(len(e.prompt_ids) + len(e.completion_ids) for e in p)
    drawn = [rows[i:i + batch] for i in range(0, len(rows), batch)]
    if len(rows) % batch == 0: assert sum(map(width, made)) <= sum(map(width, drawn))


# --- memory

def starved(monkeypatch, times):
    "The first passes of a training find the memory full."
    import stasc.train
    honest, left = stasc.train.completion_loss, [times]

    def completion_loss(model, batch, *args, **kw):
        if torch.is_grad_enabled() and left[0] > 0 and len(batch["labels"]) == 2:       # the second batch: one step is done already
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(model, batch, *args, **kw)
    monkeypatch.setattr(stasc.train, "completion_loss", completion_loss)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_gradient_checkpointing_changes_no_bit_also_where_memory_ran_out_halfway(examples, tmp_path, monkeypatch, finetune):
    engine = Engine(Config.demo(device="cpu", train_batch=4, finetune=finetune, lora_dropout=0.3))
    off, on = (trained_with(engine, examples, tmp_path / c, c) for c in ("off", "on"))
    starved(monkeypatch, 1)
    assert not engine.short_of_memory
    auto = trained_with(engine, examples, tmp_path / "auto", "auto")
    assert off == on == auto and engine.short_of_memory
    assert not any(getattr(m, "gradient_checkpointing", False) for m in engine.lm.base.modules())


def trained_with(engine, examples, out, how):
    engine.lm.cfg = engine.lm.cfg.replace(gradient_checkpointing=how)
    return trained(engine, examples, None, out)


@pytest.mark.parametrize("how", ["on", "off", "auto"])
def test_memory_that_stays_too_small_is_an_error(examples, tmp_path, monkeypatch, how):
    engine = Engine(Config.demo(device="cpu", train_batch=4))
    starved(monkeypatch, 2)
    with pytest.raises(TrainError, match="memory does not suffice to fine-tune on 4 corrections"): trained_with(engine, examples, tmp_path / "a", how)
    assert not list((tmp_path / "a").iterdir())
    assert all(p.grad is None for p in engine.lm.model.parameters())


def test_gradient_checkpointing_recomputes(lm, examples):
    "Each layer runs twice in a step."
    count = {}
    for on in (False, True):
        lm.start(None, 0)
        seen = []
        hook = lm.base.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1) if lm.model.training else None)
        try: fine_tune(lm, examples, lm.cfg, 0, checkpointing=on)
        finally: hook.remove()
        count[on] = len(seen)
    assert count[True] == 2 * count[False] == 4


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


def test_gradients_through_a_quantised_base_are_those_of_its_weights_also_after_sampling(examples):
    "bitsandbytes may pack weights anew in evaluation mode, into a layout that has no gradient."
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    engine, made = Engine(Config.demo(device="cpu", finetune="qlora", train_batch=4)), []
    batch = collate(examples, engine.lm.pad_id)
    for first in ("train", "sample"):
        if first == "sample":
            engine.lm.model.eval()
            with torch.no_grad(): engine.lm.model(batch["input_ids"])
        engine.lm.start(None, 0)
        engine.lm.model.train()
        with torch.no_grad():
            for n, p in engine.lm.model.named_parameters():
                if "lora_B" in n: p.fill_(0.01)
        made.append(loss_and_gradient(engine.lm.model, completion_loss(engine.lm.base, batch)))
    assert made[0][0] == made[1][0] and torch.equal(made[0][1], made[1][1])
    # the decoder's first layer has a gradient that came through the layers above
    first = next(p for n, p in engine.lm.model.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n)
    assert first.grad.abs().max() > 0


# --- a training that fails

def spoil(monkeypatch, lm, step):
    "From a step on the loss is not a number."
    import stasc.train
    honest, seen = stasc.train.completion_loss, []

    def completion_loss(model, batch, *args, **kw):
        loss = honest(model, batch, *args, **kw)
        if torch.is_grad_enabled(): seen.append(1)                      # not the comparison before the training
        return loss * float("nan") if len(seen) >= step else loss
    monkeypatch.setattr(stasc.train, "completion_loss", completion_loss)


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
