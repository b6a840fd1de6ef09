"Studies: intervals over clusters, nested samples, the 90% rule, and what a study refuses."
import hashlib
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasc.core import Config, DataError, Question, StascError, StoreError
from stasc.data import Data
from stasc.facts import couple_of, fact_questions
from stasc.loop import STaSC
from stasc.study import (_read_off, answers, cluster_of, contrast, differences, digit_share, fewest_kept, filter_study, held_out, kept_grades, pool, regraded, reward_study,
                         sampling_gains, sampling_picture, sampling_study, study_runs, transfer_study)
from stasc.sweep import Engines
from stasc.train import ScriptedEngine


def guess(prompt, rng, skill): return f"Final Answer: {70 if (u := (skill + rng.randrange(99)) % 7) < 2 else 75 if u < 4 else rng.randrange(60)}"


class Sensitive(ScriptedEngine):
    "Its answers depend on the model it started from, on each example in its order and on the seed."
    def __init__(self, cfg=None): super().__init__(guess)

    def train(self, examples, start, out, cfg, seed):
        self.use(start)
        key = repr((self.skill, [(e.prompt_ids, e.completion_ids) for e in examples], seed)).encode()
        (out / "skill.txt").write_text(str(int(hashlib.sha256(key).hexdigest()[:8], 16)))
        return dict(steps=len(examples), tokens=0, first_loss=0.0, last_loss=0.0, seconds=0.0)


def ask(n, s): return tuple(Question(f"{s}{i}", f"{s} number {i}?", ("70",)) for i in range(n))


QUESTIONS = Data(ask(6, "train"), ask(4, "test"))
BASE = Config(iterations=2, n_init=2, n_corr=2, n_train=6, n_test=4, part_size=4, data="own", variant="EIE", reward="exact_match")
SCRIPTED = dict(data=QUESTIONS, engine=Sensitive, shown=None)


# --- intervals

def table(rng, questions, draws, rate):
    return pd.DataFrame([dict(question_id=q, init_index=j, init_reward=float(rng.random() < rate(q)), corr_reward=float(rng.random() < rate(q))) for q in questions for j in range(draws)])


def plain_bootstrap(a, b, column, cluster, n, rng):
    "Clusters drawn one by one, with everything in them."
    by = [[(t[column].to_numpy(), np.array([cluster(q) for q in t.question_id])) for t in side] for side in (a, b)]
    names = sorted({c for side in by for _, cs in side for c in cs})
    sums = [np.array([[sum(x[cs == c].sum() for x, cs in side), sum((cs == c).sum() for _, cs in side)] for c in names]) for side in by]
    out = []
    for _ in range(n):
        w = rng.choice(len(names), len(names))
        out.append(sums[1][w, 0].sum() / sums[1][w, 1].sum() - sums[0][w, 0].sum() / sums[0][w, 1].sum())
    return np.quantile(out, [.025, .975])


@pytest.mark.parametrize("facts", [False, True])
def test_interval_is_the_plain_bootstrap_over_clusters(facts):
    rng = np.random.default_rng(3)
    names = [q.id for q in fact_questions("test", 90)] if facts else [f"q{i}" for i in range(40)]
    cluster = couple_of if facts else str
    level = {c: rng.random() for c in {cluster(q) for q in names}}
    a = [table(rng, names, 4, lambda q: .3 * level[cluster(q)]) for _ in range(2)]
    b = [table(rng, names, 4, lambda q: level[cluster(q)]) for _ in range(2)]
    found = contrast(a, b, ("acc_t1", "acc_t2"), cluster, n_boot=4000)
    for r, column in zip(found.itertuples(), ("init_reward", "corr_reward")):
        assert r.difference == pytest.approx(np.mean([t[column] for t in b]) - np.mean([t[column] for t in a]))
        assert (r.lo, r.hi) == pytest.approx(tuple(plain_bootstrap(a, b, column, cluster, 4000, rng)), abs=.012)
        assert r.n_clusters == len(level)
    by_question = contrast(a, b, ("acc_t1", "acc_t2"))
    if facts: assert ((found.hi - found.lo) > 1.3 * (by_question.hi - by_question.lo)).all()       # answers about a couple agree: fewer witnesses than questions
    else: pd.testing.assert_frame_equal(by_question, contrast(a, b, ("acc_t1", "acc_t2"), cluster))


def test_contrast_is_antisymmetric_and_keeps_seeds_apart():
    rng = np.random.default_rng(0)
    a, b = ([table(rng, "abcdefgh", 4, lambda q: p) for _ in range(3)] for p in (.3, .6))
    x, y = contrast(a, b), contrast(b, a)
    assert np.allclose(x.difference, -y.difference) and np.allclose(x.p, y.p) and np.allclose(x.least, -y.most)
    assert len(pool(a)) == 3 * 32 and not pool(a).duplicated(["question_id", "init_index"]).any()
    with pytest.raises(DataError, match="different questions"): contrast(a, [t[t.question_id != "a"] for t in b])


# --- nested samples

@pytest.mark.parametrize("changes", [dict(), dict(variant="FNE"), dict(filter="all", pairing="crossed"), dict(variant="EIF", n_test_corr=2)], ids=str)
def test_each_cell_is_the_run_that_would_have_been(tmp_path, changes):
    base = BASE.replace(**changes)
    cells = sampling_study(tmp_path / "study", base, (1, 2, 3), (1, 3), seeds=(5,), data=QUESTIONS, engine=Sensitive, shown=None)
    assert set(zip(cells.n_init, cells.n_corr)) == {(0, 0), *itertools.product((1, 2, 3), (1, 3))}
    for i, k in itertools.product((1, 2, 3), (1, 3)):
        run = STaSC(base, tmp_path / f"{i}{k}", seed=5, n_init=i, n_corr=k, iterations=1, n_test_init=4, data=QUESTIONS, engine=Sensitive(), callbacks=[]).run()
        cell, columns = cells[(cells.n_init == i) & (cells.n_corr == k)], ["question_id", "init_index", "init_reward", "corr_reward"]
        if run.n_done == 1: assert cell.n_kept.iloc[0] == 0; continue
        assert set(cell.n_kept) == {run.metrics.n_kept[1]} and set(cell.n_drawn) == {len(run._pairs(0, "train", base.pairing))}
        pd.testing.assert_frame_equal(cell[columns].reset_index(drop=True), held_out(run)[columns].reset_index(drop=True), check_dtype=False)


def test_a_study_that_was_broken_off_goes_on_and_ends_the_same(tmp_path):
    whole = sampling_study(tmp_path / "whole", BASE, (1, 2), (1, 2), seeds=(0, 1), data=QUESTIONS, engine=Sensitive, shown=None)
    trained = []

    class Tired(Sensitive):
        def train(self, *args):
            if len(trained) in (1, 3): trained.append(0); raise KeyboardInterrupt
            trained.append(1)
            return super().train(*args)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): sampling_study(tmp_path / "broken", BASE, (1, 2), (1, 2), seeds=(0, 1), data=QUESTIONS, engine=Tired, shown=None)
    pd.testing.assert_frame_equal(sampling_study(tmp_path / "broken", BASE, (1, 2), (1, 2), seeds=(0, 1), data=QUESTIONS, engine=Tired, shown=None), whole)
    assert sum(trained) <= 8                                                            # no cell twice
    for cells in ((1, 2), (1, 2, 3)):
        with pytest.raises(StascError): sampling_study(tmp_path / "broken", BASE, cells, (1, 2), seeds=(0,), data=Data(ask(6, "other"), ask(4, "test")), engine=Sensitive, shown=None)
    next((tmp_path / "broken" / "seed=0" / "cells").iterdir()).write_bytes(b"PAR1 cut")
    with pytest.raises(StoreError, match="delete it and run the study again"): sampling_study(tmp_path / "broken", BASE, (1, 2), (1, 2), seeds=(0,), data=QUESTIONS, engine=Sensitive, shown=None)
    with pytest.raises(StoreError): sampling_study(tmp_path / "broken", BASE.replace(temperature=.9), (1, 2), (1, 2), seeds=(0,), data=QUESTIONS, engine=Sensitive, shown=None)


# --- the fewest kept corrections

@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-3, 8)), min_size=1, max_size=9), st.sampled_from([.3, .5, .9, 1.]))
def test_the_rule_by_brute_force(cells, share):
    kept, gains = np.array(cells).T
    best, found = _read_off(kept.astype(float), gains.astype(float), share)
    assert gains[best] == max(gains)
    if max(gains) <= 0: assert found is None; return
    enough = [(k, -g) for k, g in cells if g >= share * max(gains) - 1e-12]
    assert (kept[found], -gains[found]) == min(enough)


def study_table(rights, kept, n=12, seeds=(0,)):
    "M_0 and cells of which so many of n answers are right."
    cells = {(0, 0): (0, rights[0]), **{(1, i): o for i, o in enumerate(zip(kept, rights[1:]), 1)}}
    return pd.DataFrame([dict(seed=s, n_init=c[0], n_corr=c[1], n_kept=k, question_id=f"q{q}", init_index=0, init_reward=0., corr_reward=float(q < r))
                         for s in seeds for c, (k, r) in cells.items() for q in range(n)])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=3, max_size=6), st.data())
def test_fewest_kept_by_brute_force(rights, data):
    kept = data.draw(st.lists(st.integers(1, 99), min_size=len(rights) - 1, max_size=len(rights) - 1))
    cells = study_table(rights, kept)
    gains = [(r - rights[0]) / 12 for r in rights[1:]]
    assert sampling_gains(cells, n_boot=5).gain.tolist() == pytest.approx(gains)
    if max(gains) <= 0:
        with pytest.raises(DataError, match="no cell gains"): fewest_kept(cells, n_boot=5)
        return
    f = fewest_kept(cells, n_boot=20)
    assert f["n_kept"] == min(k for k, g in zip(kept, gains) if g >= .9 * max(gains) - 1e-12)
    assert f["best_gain"] == pytest.approx(max(gains)) and f["gain"] >= .9 * f["best_gain"] - 1e-5
    assert min(kept) <= f["lo"] <= f["hi"] <= max(kept) and 0 <= f["same_cell"] <= 1


def test_the_interval_of_the_fewest_by_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    right = {(0, 0): .3, (1, 1): .35, (1, 2): .55, (1, 3): .6, (1, 4): .6}
    kept = {(0, 0): 0, (1, 1): 10, (1, 2): 20, (1, 3): 40, (1, 4): 80}
    cells = pd.DataFrame([dict(seed=s, n_init=c[0], n_corr=c[1], n_kept=kept[c] + s, question_id=q, init_index=j, init_reward=0., corr_reward=float(rng.random() < p))
                          for s in (0, 1) for c, p in right.items() for q in range(30) for j in range(4)])
    f, means = fewest_kept(cells, level=.8, n_boot=4000), cells.groupby(["n_init", "n_corr", "question_id"]).corr_reward.mean().unstack()
    gain = (means - means.loc[(0, 0)]).drop(index=[(0, 0)]).to_numpy()
    k, found = np.array([kept[c] + .5 for c in right if c != (0, 0)]), []
    for _ in range(4000):
        g = gain[:, rng.choice(30, 30)].mean(1)
        found.append(min(x for x, y in zip(k, g) if y >= .9 * g.max()))
    assert (f["lo"], f["hi"]) == pytest.approx(tuple(np.quantile(found, [.1, .9])))
    assert f["same_cell"] == pytest.approx(np.mean(np.array(found) == f["n_kept"]), abs=.05)


# --- transfer

def test_answers_are_kept_under_all_they_depend_on(tmp_path):
    run, = study_runs(tmp_path / "s", BASE, "filter", ["correct"], (0,), **SCRIPTED)["correct"]
    asked, out = [], tmp_path / "answers"

    class Counting(Sensitive):
        def sample(self, prompts, *args): asked.append(len(prompts)); return super().sample(prompts, *args)

    get = lambda questions=QUESTIONS.test, n=0, draws=2: answers(run, list(questions), n, draws, out, Engines(Counting))
    first = get()
    assert sum(asked) == 4 * 2 * 2 and len(first) == 8
    pd.testing.assert_frame_equal(get(), first)
    assert sum(asked) == 16
    for other in (dict(n=1), dict(draws=3), dict(questions=QUESTIONS.test[:3]), dict(questions=[Question(q.id, q.text, ("75",)) for q in QUESTIONS.test])): get(**other)
    assert len(list(out.iterdir())) == 5
    pd.testing.assert_frame_equal(get(draws=3)[lambda t: t.init_index < 2].reset_index(drop=True), first)       # more draws, the same to begin with


def test_transfer_says_what_neither_can_do(tmp_path):
    runs = study_runs(tmp_path / "s", BASE, "filter", ["correct"], (0, 1), **SCRIPTED)["correct"]
    t = transfer_study(runs, {"same": list(QUESTIONS.test), "$\\frac{": [Question("a", "Who?", ("Anna",)), Question("b", "Whom?", ("Bert",))]}, engine=Sensitive)
    assert set(t[t.task != "same"].verdict) == {"neither can do it"} and (t[t.task != "same"].difference == 0).all()
    assert "neither" not in " ".join(t[t.task == "same"].verdict) and set(t.n_seeds) == {2}
    assert "$\\frac{" in differences(t, "task", "$x_{").alt


# --- rewards

@settings(max_examples=200, deadline=None)
@given(st.text("0123456789 -x", max_size=6), st.lists(st.integers(0, 99999).map(str), max_size=3))
def test_digit_share_by_hand(prediction, references):
    p, best = prediction.strip(), 0.
    for r in references if p.isdigit() else []:
        width = max(len(p), len(r))
        best = max(best, sum(x == y != " " for x, y in zip(p.rjust(width), r.rjust(width))) / width)
    assert digit_share(prediction, references) == pytest.approx(best)
    assert 0 <= digit_share(prediction, references) <= 1 and (digit_share(prediction, references) == 1) == (p in references)


def test_rewards_against_each_other(tmp_path):
    runs = study_runs(tmp_path / "s", BASE, "reward", ["exact_match", "digit_share"], (0, 1), **SCRIPTED)
    t, k = reward_study(runs), kept_grades(runs)
    true = {r: np.mean([(x.trajectories.query("split == 'test' and iteration == iteration.max()").corr_answer == "70").mean() for x in runs[r]]) for r in runs}
    row = t[(t.judged_by == "exact_match") & (t.measure == "acc_t2")].iloc[0]
    assert (row.a, row.b) == pytest.approx((true["exact_match"], true["digit_share"]))
    assert (k.right + k.better_not_right + k.neither == k.kept).all() and k[k.reward == "exact_match"].better_not_right.sum() == 0
    assert k[k.reward == "digit_share"].better_not_right.sum() > 0
    r = runs["digit_share"][0]
    assert regraded(r, "digit_share").corr_reward.tolist() == held_out(r).corr_reward.tolist()


# --- what is refused

def test_a_trial_that_failed_is_named(tmp_path):
    class Broken(Sensitive):
        def train(self, *args): raise RuntimeError("no more memory")
    with pytest.raises(StoreError, match="filter=correct,seed=0 is failed .*no more memory"): study_runs(tmp_path, BASE, "filter", ["correct"], (0,), data=QUESTIONS, engine=Broken, shown=None)


def test_unfit_input_is_refused_in_one_sentence(tmp_path):
    runs = study_runs(tmp_path, BASE, "filter", ["correct", "all"], (0,), **SCRIPTED)
    assert {r.cfg.n_test_init for rs in runs.values() for r in rs} == {4} and cluster_of(runs["all"][0])("a/b") == "a/b"
    run, cells = runs["all"][0], study_table([1, 3, 5], [10, 20])
    for bad in (lambda: filter_study({"correct": runs["correct"]}), lambda: held_out(run, 3), lambda: held_out(run, -4), lambda: contrast([held_out(run)], [held_out(run)], ("cl",)),
                lambda: answers(run, [], 0), lambda: answers(run, list(QUESTIONS.test), 9), lambda: transfer_study([], {"x": list(QUESTIONS.test)}), lambda: transfer_study([run], {}),
                lambda: reward_study(runs), lambda: kept_grades({}), lambda: fewest_kept(cells, 0), lambda: fewest_kept(cells, 2), lambda: fewest_kept(cells.drop(columns="n_kept")),
                lambda: fewest_kept(cells[cells.n_init > 0]), lambda: sampling_gains(cells.iloc[1:]), lambda: sampling_picture(cells, "delta"), lambda: differences(cells, "n_init"),
                lambda: regraded(run, "exact_match", 5), lambda: study_runs(tmp_path / "x", BASE, "filters", ["all"], **SCRIPTED), lambda: study_runs(tmp_path / "y", BASE, "filter", ["best"], **SCRIPTED)):
        with pytest.raises(StascError) as e: bad()
        assert "\n" not in str(e.value) and len(str(e.value)) > 20
