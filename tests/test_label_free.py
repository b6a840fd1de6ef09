"Rewards without references: agreement against a brute-force oracle, confidence against the model, runs stopped and resumed, what is refused."
import itertools
import json
import math

import pytest
from hypothesis import given, settings, strategies as st

from stasc.baseline import majority
from stasc.core import Config, ConfigError, DataError, Question, StoreError
from stasc.data import Data, DataWarning, load_questions, read_questions
from stasc.filter import pair
from stasc.label_free import label_free_reward, majority_answer
from stasc.loop import STaSC, default_out
from stasc.reward import final_answer, normalise
from stasc.star import STaR
from stasc.train import ScriptedEngine

TIMES = {".lock", "log.jsonl"}


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in TIMES}


def ask(split, n, *references): return [Question(f"{split}{i}", f"{split} question {i}?", references) for i in range(n)]


BARE = Data(ask("train", 7), ask("test", 4, "7"))


def numbers(prompt, rng, skill):
    kind = rng.random()
    if kind < 0.15: return "I cannot say."
    if kind < 0.25: return "Final Answer: The"                          # no answer either: nothing is left of it
    return f"Final Answer: {'The ' if rng.random() < .5 else ''}{rng.choice([7, 7, 7, 8, 9]) if rng.random() < .4 + .2 * skill else rng.randrange(7)}"


class Unsure(ScriptedEngine):
    "Gives each text a log-probability, and stops at the k-th call."
    def __init__(self, k=None): super().__init__(numbers); self.k, self.calls = k, 0
    def _call(self):
        if self.calls == self.k: raise KeyboardInterrupt
        self.calls += 1
    def sample(self, *a):
        self._call()
        return [[type(s)(s.text, s.token_ids, s.finish_reason, s.seed, -(s.seed % 1000) / 700) for s in row] for row in super().sample(*a)]
    def train(self, *a): self._call(); return super().train(*a)


def made(out, kind="agreement", engine=None, data=BARE, make=STaSC, **options):
    cfg = Config(**dict(label_free=kind, iterations=2, n_init=4, n_corr=2, n_test=4, part_size=3, shots=0, prompts="default", data="own") | options)
    return make(cfg, out, data=data, engine=engine or Unsure(), callbacks=[])


# --- the vote

answers = st.lists(st.one_of(st.none(), st.sampled_from(["7", "The 7", "seven", "", "the", "?", "7.", "SEVEN"])), max_size=8)


@given(answers)
def test_the_majority_is_the_most_frequent_form_and_the_first_among_equals(texts):
    forms = [normalise(a) if a else "" for a in texts]
    best = max((f for f in forms if f), key=lambda f: (forms.count(f), -forms.index(f)), default="")
    assert majority_answer(texts) == best
    rewards = [label_free_reward("agreement", a, 0., best) for a in texts]
    assert rewards == [float(bool(f) and f == best) for f in forms]
    if best: assert majority(texts, rewards) == 1.0 and majority(texts, [1 - r for r in rewards]) == 0.0       # as the vote of the baselines


@given(st.floats(-50, 1e-6), st.sampled_from([None, "", "the", "x", "forty two"]))
def test_confidence_is_a_probability_and_nothing_without_an_answer(logprob, answer):
    r = label_free_reward("confidence", answer, logprob)
    assert 0 <= r <= 1 and (r == 0 if answer in (None, "", "the") else abs(r - math.exp(logprob)) < 1e-4)


def tables(run, split="train"):
    "Every iteration's initial answers and corrections as they are stored."
    for n in range(run.n_done):
        of = n if run.variant.evolving_init else 0
        yield run.dir.table(of, f"initial.{split}"), run.dir.table(n, f"corrections.{split}")


@pytest.mark.parametrize("options", [dict(), dict(variant="FIE"), dict(variant="ENF"), dict(pairing="crossed"), dict(scope="full")], ids=str)
def test_agreement_in_a_run_against_an_oracle(tmp_path, options):
    run = made(tmp_path / "run", **options).run()
    assert run.n_done == 3
    for initial, corrections in tables(run):
        for q, some in initial.groupby("question_id"):
            forms = [normalise(final_answer(t) or "") for t in some.sort_values("init_index").init_text]
            counts = {f: forms.count(f) for f in forms if f}
            winner = next((f for f in forms if counts.get(f) == max(counts.values(), default=0)), None)
            assert some.init_reward.tolist() == [float(f == winner) for f in forms]
            asked = corrections[corrections.question_id == q]
            assert asked.corr_reward.tolist() == [float(bool(winner) and normalise(final_answer(t) or "") == winner) for t in asked.corr_text]
    for initial, corrections in tables(run, "test"):                    # these have references
        assert initial.init_reward.tolist() == [float(normalise(final_answer(t) or "") == "7") if options.get("scope") != "full" else float("7" in t) for t in initial.init_text]
    pairs = pair(*(t.drop(columns=["iteration", "split"]) for t in next(tables(run))), run.cfg.pairing)
    expected = pairs[pairs.corr_reward > pairs.init_reward] if run.variant.filter == "improving" else pairs[(pairs.corr_reward > pairs.init_reward) | (pairs.corr_reward == 1) & (pairs.init_reward == 1)]
    assert len(run.kept[run.kept.iteration == 1]) == len(expected) > 0


def test_confidence_in_a_run_is_what_the_sampler_said(tmp_path):
    run = made(tmp_path / "run", "confidence").run()
    for initial, corrections in tables(run):
        for t, p in ((initial, "init"), (corrections, "corr")):
            expected = [round(math.exp(l), 4) if normalise(final_answer(x) or "") else 0. for x, l in zip(t[f"{p}_text"], t[f"{p}_logprob"])]
            assert t[f"{p}_reward"].tolist() == expected and len(set(expected)) > 5
    assert set(run.trajectories.query("split == 'test'").init_reward) <= {0., 1.}


@pytest.mark.parametrize("kind, make, options", [("agreement", STaSC, {}), ("confidence", STaSC, dict(variant="FIE")), ("agreement", STaR, {}), ("confidence", STaR, dict(threshold=.5))], ids=str)
def test_stopped_at_any_call_and_resumed_gives_the_same_bytes(tmp_path, kind, make, options):
    whole = made(tmp_path / "whole", kind, make=make, **options).run()
    expected, total = contents(tmp_path / "whole"), whole.engine.calls
    assert whole.n_done == 3
    for k in range(2, total, 9):
        out = tmp_path / f"stopped{k}"
        with pytest.raises(KeyboardInterrupt): made(out, kind, Unsure(k), make=make, **options).run()
        made(out, kind, make=make, **options).run()
        assert contents(out) == expected, k


def test_star_gives_no_hint_where_there_is_none_to_give(tmp_path):
    run = made(tmp_path / "star", make=STaR, data=Data([*BARE.train, *ask("known", 5, "77")], BARE.test)).run()
    hinted = {q for n in range(run.n_done) for q in run._hinted(n, False).question_id}
    assert hinted and all(q.startswith("known") for q in hinted)


# --- what has references keeps them

def test_questions_with_references_are_judged_by_them(tmp_path):
    mixed = Data([*ask("bare", 4), *ask("known", 4, "7")], BARE.test)
    run = made(tmp_path / "run", data=mixed).run()
    t = run.trajectories.query("split == 'train'")
    known = t[t.question_id.str.startswith("known")]
    assert (known.init_reward == [float(normalise(a or "") == "7") if isinstance(a, str) else 0. for a in known.init_answer]).all()
    assert run[1].metrics["label_free"] == dict(train=4, test=0) and "label-free by agreement" in repr(run)


def test_where_held_out_questions_have_none_either_the_figures_are_marked(tmp_path):
    run = made(tmp_path / "run", data=Data(BARE.train, ask("test", 4)), n_test_init=3).run()
    assert run[0].metrics["label_free"] == dict(train=7, test=4)
    assert repr(run[0]).count("(label-free)") == 2 and "test (label-free)" in run[0]._repr_html_()
    assert all("label-free" in l.get_label() for l in run.curves().axes[0].get_lines())
    honest = made(tmp_path / "honest").run()
    assert repr(honest[0]).count("(label-free)") == 1 and (honest.metrics.label_free_test == 0).all()
    first = run.evaluate(ask("new", 3))
    assert set(first.init_reward) <= {0., 1.} and len(first) == 3


def test_off_is_as_it_was(tmp_path):
    known = Data(ask("train", 7, "7"), BARE.test)
    off = made(tmp_path / "off", "off", data=known).run()
    assert "label_free" not in (off.dir / "iter_01/metrics.json").read_text() and "label" not in repr(off[1])
    on = made(tmp_path / "on", data=known).run()
    same = lambda r: {k: v for k, v in contents(r.dir.path).items() if k.endswith(".parquet")}
    assert same(on) == same(off)                                        # nothing lacks a reference
    assert default_out(Config(label_free="agreement")) != default_out(Config())
    with pytest.raises(StoreError, match="label_free: 'off' there"): made(tmp_path / "off", data=known)
    config = json.loads((off.dir / "config.json").read_text())
    del config["config"]["label_free"]                                  # a run from before there was the option
    (off.dir / "config.json").write_text(json.dumps(config))
    assert STaSC.open(off.dir.path).cfg == off.cfg
    made(off.dir.path, "off", data=known, iterations=3).run()


# --- what is refused

@pytest.mark.parametrize("options, error, sentence", [
    (dict(kind="off"), DataError, "training questions without references: 7 \\('train0', 'train1', 'train2', …\\)"),
    (dict(n_init=1), ConfigError, "n_init = 1"),
    (dict(data=Data(ask("train", 3, "x"), ask("test", 3))), ConfigError, "n_test_init = 1"),
    (dict(kind="confidence", filter="correct"), ConfigError, "lower threshold"),
    (dict(kind="confidence", make=STaR), ConfigError, "lower threshold"),
    (dict(kind="confidence", variant="ENE", non_decreasing="stable"), ConfigError, "lower threshold")], ids=str)
def test_what_cannot_teach_anything_is_refused_before_anything_is_written(tmp_path, options, error, sentence):
    with pytest.raises(error, match=sentence): made(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'agreement'"): Config(label_free="agreemnt")


# --- files without references

@pytest.mark.parametrize("name, text", [
    ("bare.csv", "question\n" + "".join(f"What is {i}?\n" for i in range(9))),
    ("empty.csv", "question,answer\n" + "".join(f"What is {i}?,\n" for i in range(9))),
    ("bare.jsonl", "".join(json.dumps(dict(question=f"What is {i}?")) + "\n" for i in range(9))),
    ("null.jsonl", "".join(json.dumps(dict(question=f"What is {i}?", answer=None)) + "\n" for i in range(9))),
    ("bare.json", json.dumps([dict(question=f"What is {i}?", references=[]) for i in range(9)]))])
def test_files_without_references_are_read_where_they_are_asked_for(tmp_path, name, text):
    f = tmp_path / name
    f.write_text(text)
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(dict(question=f"Held out {i}?", answer="7")) + "\n" for i in range(4)))
    options = dict(data=str(f), test_data=str(test), n_train=9, n_test=4)
    with pytest.raises(DataError): load_questions(Config(**options))
    with pytest.raises(DataError): STaSC(Config(**options), tmp_path / "off", engine=Unsure(), callbacks=[]).run()
    data = load_questions(Config(label_free="agreement", **options))
    assert {q.references for q in data.train} == {()} and {q.references for q in data.test} == {("7",)} and data.notes == ()
    cfg = Config(label_free="agreement", iterations=1, n_init=3, n_corr=2, shots=0, **options)
    run = STaSC(cfg, tmp_path / "run", engine=Unsure(), callbacks=[]).run()
    assert run.metrics.label_free_train.tolist() == [9] * run.n_done
    assert STaSC.open(run.dir.path).data.fingerprint == data.fingerprint


@given(st.lists(st.sampled_from([None, "", "  ", [], "x", ["x", "y"], dict(text=[]), dict(value="x", aliases=[]), "absent"]), min_size=1, max_size=6), st.booleans())
@settings(deadline=None)
def test_references_here_and_there(tmp_path_factory, cells, first):
    f = tmp_path_factory.mktemp("cells") / "f.jsonl"
    rows = [dict(question=f"What is {i}?") | (dict(answer=c) if c != "absent" else {}) for i, c in enumerate(cells)]
    f.write_text("".join(json.dumps(r) + "\n" for r in rows))
    full = lambda c: c not in (None, "absent") and c != [] and c != dict(text=[]) and not (isinstance(c, str) and not c.strip())
    expected = [tuple(c) if isinstance(c, list) else ("x",) if full(c) else () for c in cells]
    assert [q.references for q in read_questions(f, bare=True)] == expected


def test_a_column_that_was_named_must_be_there_and_full_files_get_a_note(tmp_path):
    f = tmp_path / "f.jsonl"
    f.write_text("".join(json.dumps(dict(question=f"What is {i}?", answer="7")) + "\n" for i in range(9)))
    with pytest.raises(DataError, match="no column 'gold'"): load_questions(Config(data=str(f), reference_column="gold", label_free="agreement"))
    with pytest.warns(DataWarning, match="changes nothing"): load_questions(Config(data=str(f), n_train=5, n_test=3, label_free="agreement"))


# --- the embedded model

@pytest.mark.parametrize("kind", ["agreement", "confidence"])
def test_a_tiny_run_on_the_embedded_model_learns_something_and_resumes_to_the_same_bytes(embedded, tmp_path, kind):
    cfg = Config.demo(device="cpu", label_free=kind, n_init=3, n_corr=2, iterations=1, n_train=16, n_test=8, part_size=8)
    known = load_questions(cfg.replace(label_free="off"))
    data = Data([Question(q.id, q.text, ()) for q in known.train], known.test)
    run = STaSC(cfg, tmp_path / "whole", data=data, engine=embedded, callbacks=[]).run()
    assert run.n_done == 2 and run.metrics.n_kept[1] > 0

    class Stops:
        def __init__(self): self.left = 3
        def on_phase(self, *a):
            self.left -= 1
            if not self.left: raise KeyboardInterrupt
    stops = 0
    while True:
        again = STaSC(cfg, tmp_path / "again", data=data, engine=embedded, callbacks=[Stops()])
        try: again.run(); break
        except KeyboardInterrupt: stops += 1
    assert stops > 1 and contents(tmp_path / "again") == contents(tmp_path / "whole")
    if kind == "confidence":
        t = run.dir.table(0, "initial.train")
        q = {q.id: q for q in data.train}
        embedded.use(None)
        for r in itertools.islice(t.itertuples(), 4): assert r.init_reward == pytest.approx(plain_confidence(embedded.lm, run.prompter.initial(q[r.question_id]), r.init_token_ids), abs=2e-4)
    embedded.use(None)


def plain_confidence(lm, prompt, ids):
    "One text, one forward pass, nothing shared."
    import torch
    with torch.no_grad(): logp = lm.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return math.exp(sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)) / len(ids))
