"Measures against loops, intervals and tests against enumeration and simulation, tables that cannot be measured."
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stasc.core import Config, DataError, Question, StascError
from stasc.data import Data
from stasc.loop import STaSC, split_metrics
from stasc.metrics import (MEASURES, by_iteration, compare, gap, kept_changes, kept_correlation, measure, named_runs, over_seeds, paper_row,
                           paper_table)
from stasc.train import ScriptedEngine

binary = st.sampled_from([0.0, 1.0])
graded = st.one_of(binary, st.floats(0, 1), st.just(0.5))


def worlds(rewards, n_questions=st.integers(1, 5), balanced=False):
    "Questions as lists of (reward of an initial answer, rewards of its corrections)."
    if balanced:
        shape = st.tuples(st.integers(1, 3), st.integers(1, 3))
        return st.tuples(shape, n_questions).flatmap(lambda o: st.lists(st.lists(st.tuples(rewards, st.lists(
            rewards, min_size=o[0][1], max_size=o[0][1])), min_size=o[0][0], max_size=o[0][0]), min_size=o[1], max_size=o[1]))
    answers = st.lists(st.tuples(rewards, st.lists(rewards, min_size=1, max_size=3)), min_size=1, max_size=3)
    return n_questions.flatmap(lambda n: st.lists(answers, min_size=n, max_size=n))


def table(world, **columns):
    rows = [dict(question_id=f"q{i}", init_index=j, corr_index=k, init_reward=a, corr_reward=b)
            for i, q in enumerate(world) for j, (a, bs) in enumerate(q) for k, b in enumerate(bs)]
    return pd.DataFrame(rows).assign(**columns)


def by_loops(world, t):
    "The definitions, one question after another."
    pairs = [(a, b) for q in world for a, bs in q for b in bs]
    n = len(pairs)
    share = lambda holds: sum(holds(a >= t, b >= t) for a, b in pairs) / n
    out = dict(acc_t1=math.fsum(a for a, _ in pairs) / n, acc_t2=math.fsum(b for _, b in pairs) / n, i_to_c=share(lambda a, b: b and not a),
               c_to_i=share(lambda a, b: a and not b), right_right=share(lambda a, b: a and b), wrong_wrong=share(lambda a, b: not a and not b))
    out["delta"] = out["acc_t2"] - out["acc_t1"]
    pa, survived, not_a, mended = [], [], [], []
    for q in world:
        p = sum(a >= t for a, _ in q) / len(q)
        after = {right: [b >= t for a, bs in q if (a >= t) == right for b in bs] for right in (True, False)}
        pa.append(p); not_a.append(1 - p)
        survived.append(p * sum(after[True]) / len(after[True]) if after[True] else 0)
        mended.append((1 - p) * sum(after[False]) / len(after[False]) if after[False] else 0)
    out["cl"] = sum(survived) / sum(pa) if any(a >= t for q in world for a, _ in q) else math.nan
    out["cs"] = sum(mended) / sum(not_a) if any(a < t for q in world for a, _ in q) else math.nan
    p1, p2 = share(lambda a, b: a), share(lambda a, b: b)
    out["rss"] = (p2 - p1**2) / (2 * p1 * (1 - p1)) if 0 < p1 < 1 else math.nan
    return out


def same(x, y): return math.isclose(x, y, abs_tol=1e-9) or (math.isnan(x) and math.isnan(y))


def run_of(*iterations, name="a run", **columns):
    "What the functions ask of a run: trajectories, and the metrics that belong to them."
    rows = pd.concat([table(w, iteration=n, split="test") for n, w in enumerate(iterations)], ignore_index=True)
    m = [{f"{s}_{k}": v for s in ("test", "train") for k, v in split_metrics(r.init_reward, r.corr_reward).items()} for _, r in rows.groupby("iteration")]
    return SimpleNamespace(name=name, trajectories=rows, metrics=pd.DataFrame(m).rename_axis("iteration").assign(n_kept=range(len(m)), **columns))


# --- measures

@settings(max_examples=150, deadline=None)
@given(worlds(graded), st.sampled_from([1.0, 0.5, 0.3]))
def test_measures_are_the_definitions(world, t):
    m, expected = measure(table(world), t), by_loops(world, t)
    assert set(m) == {"n", "n_questions", *MEASURES} and set(expected) == set(MEASURES)
    assert m["n"] == sum(len(bs) for q in world for _, bs in q) and m["n_questions"] == len(world)
    assert all(same(m[k], expected[k]) for k in expected), {k: (m[k], expected[k]) for k in expected}


@settings(max_examples=80, deadline=None)
@given(worlds(binary, balanced=True))
def test_identities_of_a_binary_reward(world):
    m = measure(table(world))
    assert same(m["delta"], m["i_to_c"] - m["c_to_i"])
    assert same(m["right_right"] + m["wrong_wrong"] + m["i_to_c"] + m["c_to_i"], 1)
    kept, mended = (0 if math.isnan(m[k]) else m[k] for k in ("cl", "cs"))
    assert same(m["acc_t2"], m["acc_t1"] * kept + (1 - m["acc_t1"]) * mended)


@settings(max_examples=40, deadline=None)
@given(worlds(graded), st.randoms(use_true_random=False))
def test_order_of_rows_and_names_of_questions_do_not_matter(world, rng):
    rows = table(world, iteration=3, split="test")
    order = rng.sample(range(len(rows)), len(rows))
    again = rows.iloc[order].set_axis(order)
    assert all(same(a, b) for a, b in zip(measure(rows).values(), measure(again).values()))
    pd.testing.assert_frame_equal(by_iteration(rows, n_boot=20), by_iteration(again, n_boot=20))
    renamed = rows.assign(question_id=rows.question_id.map(lambda q: "x" + q))
    assert all(same(a, b) for a, b in zip(measure(rows).values(), measure(renamed).values()))
    o = compare(rows, again, n_boot=20)
    assert same(o["difference"], 0) and o["p"] == 1


def test_measures_agree_with_those_a_run_stores(tmp_path):
    def numbers(prompt, rng, skill): return f"Final Answer: {7 if rng.random() < .3 + .2 * skill else rng.randrange(7)}"
    ask = lambda n, s: tuple(Question(f"{s}{i}", f"{s} number {i}?", ("7",)) for i in range(n))
    cfg = Config(variant="FIE", iterations=2, n_init=2, n_corr=3, n_train=9, n_test=8, n_test_init=2, data="own")
    run = STaSC(cfg, tmp_path / "run", data=Data(ask(9, "train"), ask(8, "test")), engine=ScriptedEngine(numbers), callbacks=[]).run()
    for split in ("train", "test"):
        found = by_iteration(run, split, n_boot=5)
        for k in ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i"): np.testing.assert_allclose(found[k], run.metrics[f"{split}_{k}"])
    assert paper_table(run).iloc[0].to_dict()["variant"] == "FIE" and math.isnan(paper_table(run).max_initial_sd.iloc[0] or math.nan)
    same_run = compare(run, STaSC.open(run.dir.path, callbacks=[]))
    assert same_run["difference"] == 0 and same_run["p"] == 1 and same_run["iterations"] == (2, 2)


# --- intervals

def clustered(rng, n_questions, n_corr=4):
    "Questions that are easy or hard: corrections to one question agree."
    return [[(0.0, [float(rng.random() < p) for _ in range(n_corr)])] for p in rng.choice([.1, .9], n_questions)]


def test_bootstrap_is_resampling_of_whole_questions():
    "Each draw gives what `measure` finds in a table in which the drawn questions stand as often as they were drawn."
    from stasc.metrics import _draws, _measures, _sums
    rng = np.random.default_rng(0)
    world = [[(float(rng.integers(2)), [float(rng.integers(2)) for _ in range(rng.integers(1, 4))]) for _ in range(2)] for _ in range(6)]
    _, ids, sums = _sums(table(world), 1.0)
    for counts in np.concatenate(list(_draws(6, 30, seed=1))).astype(int):
        drawn = measure(table([world[int(ids[i][1:])] for i, n in enumerate(counts) for _ in range(n)]))
        found = _measures(counts @ sums[0])
        assert all(same(float(found[k]), drawn[k]) for k in MEASURES)


def test_blocks_of_draws_are_whole(monkeypatch):
    from stasc.metrics import _draws, _swaps
    drawn = list(_draws(3_000_000, 3, 0))
    assert [len(o) for o in drawn] == [1, 1, 1] and {int(o.sum()) for o in drawn} == {3_000_000}
    assert sum(len(o) for o in _swaps(900_000, 9, 0)) == 9
    assert sorted(map(tuple, next(_swaps(3, 8, 0)))) == sorted(itertools.product((0, 1), repeat=3))


def test_intervals_cover_the_truth_by_question():
    "About 95 of 100 intervals hold the mean of the population, though trajectories of a question agree."
    rng, covered, too_narrow = np.random.default_rng(0), 0, 0
    for n in range(150):
        rows = table(clustered(rng, 40))
        o = by_iteration(rows, n_boot=300, seed=n).iloc[0]
        covered += o.acc_t2_lo <= .5 <= o.acc_t2_hi
        half = 1.96 * math.sqrt(.25 / len(rows))                # as if trajectories were independent
        too_narrow += abs(o.acc_t2 - .5) <= half
    assert .89 <= covered / 150 <= .99 and too_narrow / 150 < .85


def test_copies_of_trajectories_bring_no_certainty():
    rng = np.random.default_rng(1)
    world = clustered(rng, 30)
    twice = [[(a, bs * 5) for a, bs in q] for q in world]
    a, b = (by_iteration(table(w), n_boot=100) for w in (world, twice))
    np.testing.assert_allclose(a, b)


def test_intervals_of_what_never_varies_and_of_what_is_undefined():
    right = by_iteration(table([[(1.0, [1.0])]] * 5), n_boot=50).iloc[0]
    assert right.acc_t2 == right.acc_t2_lo == right.acc_t2_hi == 1 and right.cl == 1
    assert all(math.isnan(right[k]) for k in ("cs", "cs_lo", "rss", "rss_hi"))
    rare = by_iteration(table([[(1.0, [1.0])]] + [[(0.0, [0.0])]] * 4), n_boot=400).iloc[0]
    assert rare.cl == rare.cl_lo == rare.cl_hi == 1             # undefined in a third of the draws, 1 in the others


def test_wider_levels_and_other_seeds():
    rows = table(clustered(np.random.default_rng(2), 30))
    a, b, c = by_iteration(rows, level=.5).iloc[0], by_iteration(rows, level=.99).iloc[0], by_iteration(rows, seed=1).iloc[0]
    assert b.acc_t2_lo < a.acc_t2_lo < a.acc_t2 < a.acc_t2_hi < b.acc_t2_hi
    assert a.acc_t2 == c.acc_t2 and abs(c.acc_t2_lo - by_iteration(rows).iloc[0].acc_t2_lo) < .05


# --- two runs

def two(rng, n):
    return [[[(float(rng.random() < .5), [float(rng.random() < p) for _ in range(2)]) for _ in range(2)] for _ in range(n)] for p in (.4, .7)]


@pytest.mark.parametrize("measured", ["acc_t2", "delta", "i_to_c", "cl", "rss"])
@pytest.mark.parametrize("seed", range(3))
def test_permutation_test_is_the_enumeration(measured, seed):
    a, b = two(np.random.default_rng(seed), 7)
    value = lambda w: measure(table(w))[measured]
    found = value(b) - value(a)
    swapped = [value([y if s else x for x, y, s in zip(b, a, swap)]) - value([x if s else y for x, y, s in zip(b, a, swap)])
               for swap in itertools.product((False, True), repeat=7)]
    swapped = [d for d in swapped if not math.isnan(d)]
    expected = sum(abs(d) >= abs(found) - 1e-9 for d in swapped) / len(swapped)
    o = compare(table(a), table(b), measured, n_boot=200)
    assert same(o["difference"], found) and same(o["p"], expected)


def test_random_swaps_come_near_the_enumeration():
    a, b = two(np.random.default_rng(5), 12)
    exact = compare(table(a), table(b), n_boot=4096)["p"]
    assert abs(compare(table(a), table(b), n_boot=4000)["p"] - exact) < .03 and 0 < exact < 1


def test_no_difference_is_seldom_significant():
    rng, small = np.random.default_rng(0), 0
    for _ in range(200):
        easy = rng.random(30)
        a, b = ([[(0.0, [float(rng.random() < p)])] for p in easy] for _ in range(2))
        small += compare(table(a), table(b), n_boot=199)["p"] <= .05
    assert small / 200 < .1


def test_a_clear_difference_is_found_and_turns_round():
    a, b = (table([[(0.0, [x])]] * 40) for x in (0.0, 1.0))
    there, back = compare(a, b, n_boot=999), compare(b, a, n_boot=999)
    assert there["difference"] == there["lo"] == there["hi"] == 1 and there["p"] == .001
    assert (back["difference"], back["p"], back["a"], back["b"]) == (-1, .001, 1, 0)


def test_only_shared_questions_count():
    a, b = table([[(0.0, [0.0])], [(0.0, [1.0])], [(0.0, [1.0])]]), table([[(0.0, [1.0])]] * 9)
    o = compare(a, b.assign(question_id=b.question_id.map(lambda q: f"q{int(q[1:]) + 1}")))
    assert (o["n_questions"], o["a"], o["b"]) == (2, 1, 1)


def test_iterations_are_chosen():
    r = run_of([[(0.0, [0.0])]], [[(0.0, [1.0])]], [[(1.0, [1.0])]])
    assert compare(r, r, iteration=(0, 1))["difference"] == 1 and compare(r, r, iteration=(0, -1))["iterations"] == (0, 2)
    for wrong in (3, -4, (0, 7)):
        with pytest.raises(DataError, match="is not there: the run has 0, 1, 2"): compare(r, r, iteration=wrong)


def test_ids_that_stand_for_other_questions():
    a, b = run_of([[(0.0, [0.0])]]), run_of([[(0.0, [1.0])]])
    a.data, b.data = (Data((), (Question("q0", text, ("x",)),)) for text in ("Who?", "Where?"))
    with pytest.raises(DataError, match="'q0'"): compare(a, b)
    b.data = a.data
    assert compare(a, b)["difference"] == 1


# --- tables over runs

def curves(first, second, kept, name="r", **settings):
    m = pd.DataFrame(dict(test_acc_t1=first, test_acc_t2=second, train_acc_t1=first, train_acc_t2=second, n_kept=kept)).rename_axis("iteration")
    return SimpleNamespace(name=name, metrics=m, **settings)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12), st.sampled_from(["EIE", "FNF"]))
def test_row_of_the_paper(points, variant):
    first, second = zip(*points)
    if variant[0] == "F": first = first[:1] * len(first)
    row = paper_row(curves(first, second, [0] * len(first), variant=variant))
    sd = lambda x: math.sqrt(math.fsum((v - math.fsum(x) / len(x))**2 for v in x) / len(x))
    assert row["max_initial"] == max(first) and row["max_correction"] == max(second) and math.isclose(row["max_correction_sd"], sd(second), abs_tol=1e-9)
    assert row["max_initial_sd"] is None if variant[0] == "F" else math.isclose(row["max_initial_sd"], sd(first), abs_tol=1e-9)


def test_one_iteration_has_no_deviation():
    row = paper_row(curves([.5], [.6], [0], variant="EIE"))
    assert row == dict(max_initial=.5, max_initial_sd=None, max_correction=.6, max_correction_sd=None)


def test_seeds_are_grouped_by_all_other_settings():
    def run(seed, last, **options):
        cfg = Config(variant="EIE", seed=seed, **options)
        return SimpleNamespace(cfg=cfg, metrics=curves([.1, last], [.2, last], [0, 5]).metrics)
    runs = [run(0, .5), run(1, .6), run(2, .9), run(0, .1, learning_rate=1e-3), run(7, .3, filter="all")]
    o = over_seeds(runs)
    assert o.n_seeds.tolist() == [3, 1, 1] and o.learning_rate.tolist() == [1e-4, 1e-3, 1e-4] and o["filter"].tolist()[-1] == "all"
    low, high = stats.t.interval(.95, 2, np.mean([.5, .6, .9]), stats.sem([.5, .6, .9]))
    assert np.allclose(o.loc[0, ["last_correction", "last_correction_lo", "last_correction_hi"]].astype(float), [2 / 3, low, high])
    assert o.last_initial_lo.isna().tolist() == [False, True, True]
    with pytest.raises(DataError, match="count twice"): over_seeds([run(0, .5), run(0, .5)])
    longer = SimpleNamespace(cfg=Config(variant="EIE", seed=5), metrics=curves([.1] * 3, [.2] * 3, [0] * 3).metrics)
    assert over_seeds([run(0, .5), longer]).n_seeds.tolist() == [1, 1]          # not as many iterations: another maximum


def test_kept_counts_stand_beside_the_change_they_made():
    r = curves([.1] * 4, [.30, .34, .33, .40], [0, 50, 60, 70], name="x")
    c = kept_changes(r)
    assert c.run.tolist() == ["x"] * 3 and c.iteration.tolist() == [0, 1, 2] and c.n_kept.tolist() == [50, 60, 70]
    assert np.allclose(c.next_change, [4, -1, 7])
    o = kept_correlation({"x": r, "y": r})
    assert o["n"] == 6 and math.isclose(o["pearson_r"], stats.pearsonr([50, 60, 70] * 2, [4, -1, 7] * 2)[0])
    assert math.isclose(o["spearman_p"], stats.spearmanr([50, 60, 70] * 2, [4, -1, 7] * 2)[1])
    flat = kept_correlation(curves([.1] * 4, [.3] * 4, [0, 5, 6, 7]))
    assert flat["n"] == 3 and all(math.isnan(flat[k]) for k in flat if k != "n")
    assert kept_changes(curves([.1], [.2], [0])).empty


def test_gap_is_train_minus_test():
    r = curves([.2, .2], [.2, .3], [0, 1])
    r.metrics["train_acc_t2"] = [.25, .5]
    assert np.allclose(gap(r), [[0, .05, 0, 0], [0, .2, 0, .15]])


def test_names_of_runs():
    a, b = SimpleNamespace(cfg=Config(model="org/Tiny-1B", variant="ENF", filter="all", n_init=1, n_corr=2, seed=3), metrics=1), SimpleNamespace(name="mine", metrics=1)
    assert list(named_runs([a, b, a])) == ["Tiny-1B ENF-all (1, 2) seed 3", "mine", "Tiny-1B ENF-all (1, 2) seed 3 #2"]
    assert named_runs({"k": a}) == {"k": a} and list(named_runs(b)) == ["mine"]
    assert list(named_runs(r for r in (a, b)))[1] == "mine"


# --- what cannot be measured

good = table([[(0.0, [1.0])], [(1.0, [0.0, 1.0])]])
broken = {
    "columns question_id, init_index": lambda: measure(good.drop(columns=["question_id", "init_index"])),
    "lacks the columns corr_reward": lambda: by_iteration(good.drop(columns="corr_reward")),
    "has no rows": lambda: measure(good.iloc[:0]),
    "init_reward is 2.0 in row 1": lambda: measure(good.assign(init_reward=[0, 2., 1])),
    "corr_reward is nan": lambda: measure(good.assign(corr_reward=[0, math.nan, 1])),
    "corr_reward is 'right'": lambda: measure(good.assign(corr_reward=[0, 1, "right"])),
    "answer 0 of question 'q0' has two rewards": lambda: measure(pd.concat([good, good.assign(init_reward=1 - good.init_reward)])),
    "iteration is empty in row 2": lambda: by_iteration(good.assign(iteration=[0, 0, None])),
    "question_id is empty in row 1": lambda: measure(good.assign(question_id=["a", None, "b"])),
    "mixes 2 values of split": lambda: measure(good.assign(split=["test", "train", "test"])),
    "t = 0": lambda: measure(good, 0),
    "t = 1.5": lambda: by_iteration(good, t=1.5),
    "unknown split 'tset', did you mean 'test'": lambda: by_iteration(good.assign(split="test"), "tset"),
    "level = 95": lambda: by_iteration(good, level=95),
    "n_boot = 0": lambda: compare(good, good, n_boot=0),
    "unknown measure 'acc2'": lambda: compare(good, good, "acc2"),
    "share no test questions": lambda: compare(good, good.assign(question_id=["x", "y", "y"])),
    "unknown measure 'max'": lambda: over_seeds([run_of([[(0.0, [1.0])]])], ("max",)),
    "got dict": lambda: measure({}),
    "a run has no trajectories": lambda: by_iteration(SimpleNamespace(name="a run", metrics=1)),
    "no runs were given": lambda: paper_table([]),
    "'0' is no run but str": lambda: kept_correlation(["runs/demo"]),
    "no complete iteration yet": lambda: paper_row(SimpleNamespace(name="new", metrics=pd.DataFrame())),
}


@pytest.mark.parametrize("said", broken)
def test_one_sentence_says_what_is_wrong(said):
    with pytest.raises(StascError) as e: broken[said]()
    assert said in str(e.value) and "\n" not in str(e.value)
