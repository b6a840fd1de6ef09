"Baselines against figures worked out by hand from what is on disk; killed calls; a run that they may not disturb."
import tempfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from stasc.baseline import baseline_rewards, baselines, baselines_of, majority
from stasc.core import Config, DataError, Question
from stasc.data import Data
from stasc.loop import STaSC
from stasc.reward import normalise
from stasc.train import ScriptedEngine


def clerk(prompt, rng, skill):
    "Wordy corrections, five wrong answers, now and then no answer at all."
    if rng.random() < 0.1: return "I do not know."
    better = skill and "first answer" in prompt
    text = f"Final Answer: {'right' if rng.random() < (0.8 if better else 0.4) else f'wrong {rng.randrange(5)}'}"
    return f"{'so ' * rng.randrange(30)}\n{text}" if "first answer" in prompt else text


def ask(split, n): return [Question(f"{split}{i}", f"{split} question {i}?", ("right",)) for i in range(n)]


def made(out, variant="EIE", engine=None, **options):
    cfg = Config(**dict(variant=variant, iterations=2, n_init=2, n_corr=2, shots=0, part_size=7, n_test_init=2) | options)
    return STaSC(cfg, out, data=Data(ask("train", 10), ask("test", 24)), engine=engine or ScriptedEngine(clerk), callbacks=[])


@pytest.fixture(scope="module", params=["EIE", "FIE"])
def run(request, tmp_path_factory): return made(tmp_path_factory.mktemp("run") / "run", request.param).run()


def own_files(run): return {p.relative_to(run.dir.path).as_posix(): p.read_bytes() for p in run.dir.path.rglob("*")
                            if p.is_file() and "again" not in p.as_posix() and p.name not in (".lock", "log.jsonl", "manifest.jsonl")}


# --- the vote

answers = st.lists(st.tuples(st.sampled_from([None, "", "The Rome", "rome.", "Paris", "paris!", "Oslo", "the"]), st.floats(0, 1)), min_size=1, max_size=8)


@given(answers)
def test_the_vote_is_the_first_of_the_most_frequent(drawn):
    names, rewards = zip(*drawn)
    forms = [normalise(n or "") for n in names]
    best, winner = 0, 0
    for i, f in enumerate(forms):                   # strictly more votes are needed to beat one that came earlier
        if f and f not in forms[:i] and forms.count(f) > best: best, winner = forms.count(f), i
    assert majority(list(names), list(rewards)) == rewards[winner]


@given(answers, st.randoms())
def test_without_ties_order_does_not_matter_to_the_winner(drawn, rng):
    forms = Counter(f for f in (normalise(n or "") for n, _ in drawn) if f)
    if len(forms) < 1 or [v for _, v in forms.most_common(2)].count(max(forms.values())) > 1: return
    reward = {f: i for i, f in enumerate(forms)}
    again = list(drawn); rng.shuffle(again)
    of = lambda d: majority([n for n, _ in d], [reward.get(normalise(n or ""), -1) for n, _ in d])
    assert of(drawn) == of(again)


# --- the table

def read(run, n, phase): return pd.concat([pd.read_parquet(run.dir / p) for p in run.dir.part_names(n, phase)])


def test_every_row_is_what_the_files_say(run):
    rewards, costs = baseline_rewards(run, more=(5,), reading=False)
    fixed = run.cfg.variant[0] == "F"
    mean = lambda t, c: t.groupby("question_id")[c].mean()
    for n in (0, 2):
        first = read(run, n, "transfer.test" if fixed and n else "initial.test")
        corr = read(run, n, "corrections.test")
        groups = [first, *(read(run, n, f"again.test.{i}") for i in range(1, 5))]
        keyed = [g.set_index(["question_id", "init_index"]) for g in groups]
        expected = {"no correction": mean(first, "init_reward"), "resample": mean(groups[1], "init_reward"),
                    "trained correction" if n else "self-refine": mean(corr, "corr_reward")}
        for k in (2, 5):
            votes = pd.Series({key: majority([g.init_answer[key] for g in keyed[:k]], [g.init_reward[key] for g in keyed[:k]]) for key in keyed[0].index})
            best = pd.concat([g.init_reward for g in keyed[:k]], axis=1).max(axis=1)
            expected["majority of 2, as many samples" if k == 2 else f"majority of {k}"] = votes.groupby(level=0).mean()
            expected[f"oracle: pass@{k}"] = best.groupby(level=0).mean()
        for method, values in expected.items():
            pd.testing.assert_series_equal(rewards[f"M_{n}", method].sort_index(), values.sort_index(), check_names=False, check_dtype=False)
        asked = read(run, 0 if fixed else n, "initial.test")
        c = costs.loc[f"M_{n}", "trained correction" if n else "self-refine"]
        assert c.samples == 2 and c.tokens == pytest.approx(asked.init_n_tokens.mean() + corr.corr_n_tokens.mean())


def test_as_many_tokens_is_the_largest_vote_that_does_not_cost_more(run):
    for reading in (True, False):
        table = run.baselines(reading=reading, n_boot=10)
        spent = table.tokens + table.read if reading else table.tokens
        budget = spent["M_2", "trained correction"]
        for model in ("M_0", "M_2"):
            (method,) = [m for m in table.loc[model].index if "as many tokens" in m]
            k = int(method.split("of ")[1].split(",")[0])
            one = spent[model, "no correction"]
            assert k == table.samples[model, method] == max(1, int(budget / one + 1e-9)) and k > 2


def test_no_correction_and_corrections_are_the_runs_own_figures(run):
    table, m = run.baselines(n_boot=10), run.metrics
    assert table.accuracy["M_0", "no correction"] == pytest.approx(m.test_acc_t1[0])
    assert table.accuracy["M_0", "self-refine"] == pytest.approx(m.test_acc_t2[0])
    assert table.accuracy["M_2", "trained correction"] == pytest.approx(m.test_acc_t2[2])
    own = m.transfer_acc_t1[2] if run.cfg.variant[0] == "F" else m.test_acc_t1[2]
    assert table.accuracy["M_2", "no correction"] == pytest.approx(own)
    d = table.accuracy["M_2", "trained correction"] - table.accuracy
    assert ((table.difference - d).abs() < 1e-9).all() and (table.difference_lo <= table.difference + 1e-9).all()


def test_oracles_are_labelled_and_bound_the_votes(run):
    rewards, _ = baseline_rewards(run, more=(3,))
    table = run.baselines(more=(3,), n_boot=10)
    assert [m for (_, m), o in zip(table.index, table.oracle) if o] == [m for _, m in table.index if m.startswith("oracle: pass@")]
    for model in ("M_0", "M_2"): assert (rewards[model]["oracle: pass@3"] >= rewards[model]["majority of 3"]).all()


def test_an_earlier_iteration_and_m0_alone(run):
    assert set(run.baselines(1, n_boot=10).index.get_level_values(0)) == {"M_0", "M_1"}
    zero = run.baselines(0, n_boot=10)
    assert set(zero.index.get_level_values(0)) == {"M_0"} and zero.difference["M_0", "self-refine"] == 0


# --- the run is not disturbed

class Stop(BaseException): pass


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_call_that_was_cut_off_goes_on_and_gives_the_same_table(tmp_path, at):
    whole = made(tmp_path / "whole").run().baselines(n_boot=10)
    run = made(tmp_path / "cut").run()
    before, engine, calls = own_files(run), run.engine, []
    real = engine.sample
    def sample(*a):
        if len(calls) == at: raise Stop
        calls.append(1)
        return real(*a)
    engine.sample = sample
    with pytest.raises(Stop): run.baselines(n_boot=10)
    reopened = STaSC.open(run.dir.path, engine=ScriptedEngine(clerk), callbacks=[])
    pd.testing.assert_frame_equal(reopened.baselines(n_boot=10), whole)
    assert own_files(run) == before and reopened.n_done == 3


@pytest.mark.parametrize("variant", ["EIE", "FIE"])
def test_baselines_before_and_between_iterations_change_nothing_in_the_run(tmp_path, variant):
    plain = made(tmp_path / "plain", variant).run()
    asked = made(tmp_path / "asked", variant)
    zero = asked.baselines(n_boot=10)                                   # before M_0 is complete
    assert asked.n_done == 0
    asked = STaSC.open(tmp_path / "asked", engine=ScriptedEngine(clerk), callbacks=[])      # the questions are there already
    for _ in asked: asked.baselines(n_boot=10)
    assert own_files(asked) == own_files(plain)
    pd.testing.assert_frame_equal(zero, plain.baselines(0, n_boot=10))


def test_without_a_run_the_rows_of_m0(tmp_path):
    cfg = made(tmp_path / "run").cfg
    alone = baselines_of(ScriptedEngine(clerk), ask("test", 24), cfg, n_boot=10)
    pd.testing.assert_frame_equal(alone, made(tmp_path / "run").baselines(n_boot=10))
    kept = tmp_path / "kept"
    baselines_of(ScriptedEngine(clerk), ask("test", 24), cfg, kept, n_boot=10)
    def refuse(*_): raise AssertionError("nothing may be drawn again")
    pd.testing.assert_frame_equal(baselines_of(ScriptedEngine(refuse), ask("test", 24), cfg, kept, n_boot=10), alone)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_graded_rewards_give_means_in_range(seed):
    def half(prediction, references): return {"right": 1.0}.get(prediction, 0.5 if prediction.endswith("2") else 0.0)
    with tempfile.TemporaryDirectory() as tmp:
        run = STaSC(Config(seed=seed, shots=0), Path(tmp) / "r", engine=ScriptedEngine(clerk), reward=half, callbacks=[])
        run._data = Data([], ask("test", 6))                # as `baselines_of` does: there is nothing to train
        table = baselines(run, n_boot=20)
    assert table.accuracy.between(0, 1).all() and (table.lo <= table.accuracy + 1e-9).all() and (table.accuracy <= table.hi + 1e-9).all()


@pytest.mark.parametrize("more", [(0,), (-1,), (2.5,), ("3",)])
def test_a_size_of_a_vote_that_is_none_is_refused(run, more):
    with pytest.raises(DataError, match="sizes of votes"): run.baselines(more=more)


def test_no_questions_are_refused():
    with pytest.raises(DataError, match="no questions"): baselines_of(ScriptedEngine(clerk), [])
