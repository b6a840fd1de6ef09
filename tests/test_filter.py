"Filters, pairing and metrics against Algorithm 1 written out as loops."
import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasc.core import Config, FilterError, Question, all_variants
from stasc.data import Data
from stasc.filter import FILTERS, apply_filter, pair
from stasc.loop import STaSC, split_metrics
from stasc.train import ScriptedEngine

rewards = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
thresholds = st.one_of(st.just(1.0), st.sampled_from([0.0, 0.5]), st.floats(0, 1))


@st.composite
def answers(draw):
    "Tables of initial answers and corrections as nested lists: question -> [(reward, [rewards of its corrections])]."
    n_init, n_corr = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    corrections = st.lists(rewards, min_size=n_corr, max_size=n_corr)
    return draw(st.lists(st.lists(st.tuples(rewards, corrections), min_size=n_init, max_size=n_init), min_size=1, max_size=4))


def tables(world, order=None):
    initial = [dict(question_id=f"q{i}", init_index=j, init_reward=r) for i, q in enumerate(world) for j, (r, _) in enumerate(q)]
    corrections = [dict(question_id=f"q{i}", init_index=j, corr_index=k, corr_reward=r)
                   for i, q in enumerate(world) for j, (_, cs) in enumerate(q) for k, r in enumerate(cs)]
    return pd.DataFrame(initial), pd.DataFrame(corrections)


def algorithm_1(world, name, t, pairing):
    "Pairs (i, j of the initial answer, j the correction was drawn for, k) that are kept, in the order of the indices."
    kept = []
    for i, question in enumerate(world):
        for j, (r1, _) in enumerate(question):
            for j2, (_, corrections) in enumerate(question):
                if pairing == "sampled" and j2 != j: continue
                for k, r2 in enumerate(corrections):
                    plus, equal = r2 > r1, r2 == r1 and r1 >= t
                    if dict(improving=plus, non_decreasing=plus or equal, stable=equal, all=True, correct=r2 >= t)[name]:
                        kept.append((f"q{i}", j, j2, k))
    return kept


@settings(max_examples=80, deadline=None)
@given(answers(), st.sampled_from(sorted(FILTERS)), thresholds, st.sampled_from(["sampled", "crossed"]))
def test_kept_is_algorithm_1(world, name, t, pairing):
    out = apply_filter(pair(*tables(world), pairing), name, t)
    kept = out[out.kept]
    assert list(zip(kept.question_id, kept.init_index, kept.corr_init_index, kept.corr_index)) == algorithm_1(world, name, t, pairing)


@settings(max_examples=30, deadline=None)
@given(answers(), st.sampled_from(["sampled", "crossed"]), st.integers(0, 99))
def test_order_of_corrections_does_not_matter(world, pairing, seed):
    initial, corrections = tables(world)
    pd.testing.assert_frame_equal(pair(initial, corrections, pairing), pair(initial, corrections.sample(frac=1, random_state=seed), pairing))


@settings(max_examples=50, deadline=None)
@given(answers(), thresholds)
def test_every_row_has_one_outcome_and_reason(world, t):
    out = apply_filter(pair(*tables(world)), "non_decreasing", t)
    assert out.why.notna().all()
    assert (out.kept == out.outcome.isin(["improved", "stable"])).all()
    assert (apply_filter(out, "improving", t).kept == (out.outcome == "improved")).all()
    assert (apply_filter(out, "stable", t).kept == (out.outcome == "stable")).all()
    for r1, r2, o in zip(out.init_reward, out.corr_reward, out.outcome):
        assert o == ("improved" if r2 > r1 else "worsened" if r2 < r1 else "stable" if r1 >= t else "unchanged")


def test_crossed_pairs_multiply_and_sampled_pairs_do_not():
    world = [[(0.0, [1.0, 0.0]), (1.0, [1.0, 1.0])]]
    assert len(pair(*tables(world), "sampled")) == 4 and len(pair(*tables(world), "crossed")) == 8


@pytest.mark.parametrize("column", ["question_id", "init_index", "init_reward"])
def test_missing_column_is_named(column):
    initial, corrections = tables([[(0.0, [1.0])]])
    with pytest.raises(FilterError, match=column): pair(initial.drop(columns=column), corrections)


def test_unknown_filter_and_pairing_are_named():
    pairs = pair(*tables([[(0.0, [1.0])]]))
    with pytest.raises(FilterError, match="did you mean 'improving'"): apply_filter(pairs, "improve")
    with pytest.raises(FilterError, match="did you mean 'crossed'"): pair(*tables([[(0.0, [1.0])]]), "cross")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_metrics_are_the_plain_formulas(rows):
    m = split_metrics(pd.Series([float(a) for a, _ in rows]), pd.Series([float(b) for _, b in rows]))
    n = len(rows)
    expected = dict(n=n, acc_t1=sum(a for a, _ in rows) / n, acc_t2=sum(b for _, b in rows) / n,
                    i_to_c=sum(b and not a for a, b in rows) / n, c_to_i=sum(a and not b for a, b in rows) / n)
    expected["delta"] = expected["acc_t2"] - expected["acc_t1"]
    assert set(m) == set(expected)
    assert all(math.isclose(m[k], expected[k], abs_tol=1e-12) for k in m)
    assert math.isclose(m["delta"], m["i_to_c"] - m["c_to_i"], abs_tol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(rewards, rewards), min_size=1, max_size=20), thresholds)
def test_metrics_of_continuous_rewards(rows, t):
    m = split_metrics(pd.Series([a for a, _ in rows]), pd.Series([b for _, b in rows]), t)
    assert math.isclose(m["acc_t1"], math.fsum(a for a, _ in rows) / len(rows), abs_tol=1e-12)
    assert math.isclose(m["i_to_c"], sum(a < t <= b for a, b in rows) / len(rows), abs_tol=1e-12)
    assert math.isclose(m["c_to_i"], sum(b < t <= a for a, b in rows) / len(rows), abs_tol=1e-12)


# --- the same in a whole run: what is kept, and whose answers were corrected

def numbers(prompt, rng, skill):
    "First answers and corrections that are right more often with each fine-tuning."
    return f"Final Answer: {7 if rng.random() < 0.3 + 0.2 * skill else rng.randrange(7)}"


def ask(n, s): return tuple(Question(f"{s}{i}", f"{s} number {i}?", ("7",)) for i in range(n))


@pytest.mark.parametrize("variant,pairing", [(v.name, "sampled") for v in all_variants()] + [("EIE", "crossed"), ("FNF", "crossed")])
def test_a_run_keeps_what_algorithm_1_keeps(tmp_path, variant, pairing):
    cfg = Config(variant=variant, pairing=pairing, iterations=2, n_init=2, n_corr=3, n_train=5, n_test=3, part_size=2, data="own")
    run = STaSC(cfg, tmp_path / "run", data=Data(ask(5, "train"), ask(3, "test")), engine=ScriptedEngine(numbers), callbacks=[]).run()
    name = "improving" if variant[1] == "I" else "non_decreasing"
    for n in range(1, run.n_done):
        initial = run.dir.table(n - 1 if variant[0] == "E" else 0, "initial.train")
        corrections = run.dir.table(n - 1, "corrections.train")
        world = [[(r1, list(corrections[(corrections.question_id == q.id) & (corrections.init_index == j)].sort_values("corr_index").corr_reward))
                  for j, r1 in enumerate(initial[initial.question_id == q.id].sort_values("init_index").init_reward)] for q in run.data.train]
        ids = {f"q{i}": q.id for i, q in enumerate(run.data.train)}
        kept = run.dir.table(n, "kept")
        assert list(zip(kept.question_id, kept.init_index, kept.corr_init_index, kept.corr_index)) == \
            [(ids[q], *rest) for q, *rest in algorithm_1(world, name, 1.0, pairing)]
        skill = int((run.dir / f"iter_{n:02d}/adapter/skill.txt").read_text())
        assert skill == (n if variant[2] == "E" else 1)
    assert len(list(run.dir.path.rglob("initial.train"))) == (run.n_done if variant[0] == "E" else 1)


@pytest.mark.parametrize("variants", [("EIE", "EIF"), ("FIE", "FIF"), ("ENE", "ENF"), ("FNE", "FNF")])
def test_fine_tuning_letter_makes_no_difference_in_the_first_iteration(tmp_path, variants):
    made = []
    for v in variants:
        cfg = Config(variant=v, iterations=1, n_init=2, n_corr=2, n_train=4, n_test=2, data="own")
        run = STaSC(cfg, tmp_path / v, data=Data(ask(4, "train"), ask(2, "test")), engine=ScriptedEngine(numbers), callbacks=[]).run()
        written = {p.relative_to(run.dir.path): p.read_bytes() for p in run.dir.path.rglob("*") if p.is_file() and p.name not in ("config.json", "log.jsonl", "manifest.jsonl", ".lock")}
        made.append((written, [(name, e.get("sha256")) for name, e in run.dir.manifest.items()]))      # the manifest marks the settings, which differ by that letter
    assert made[0] == made[1]
