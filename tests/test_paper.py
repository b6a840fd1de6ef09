"The published figures: read as they were published, and every run against its rows of the printed tables."
import json
import math
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stasc.core import Config, ConfigError, Question
from stasc.data import Data
from stasc.loop import STaSC
from stasc.metrics import gap, kept_changes, kept_correlation, over_seeds, paper_row, paper_table
from stasc.paper import MISPRINTS, Published, printed_tables, published, published_correlation, reproduce
from stasc.train import ScriptedEngine

stored = resources.files("stasc").joinpath("data/paper.json")
reference = Path(__file__).resolve().parents[2] / "shared/data/paper_reference.json"
COLUMNS = ["max_initial", "max_initial_sd", "max_correction", "max_correction_sd"]
SETTING = ["model", "variant", "n_init", "n_corr"]


def setting(o): return tuple(o[k] if isinstance(o, dict) else getattr(o, k) for k in SETTING)


def none(x): return None if x is None or (isinstance(x, float) and math.isnan(x)) else x


# --- the file

def test_file_is_figures_with_their_source():
    text = stored.read_text(encoding="utf-8")
    data = json.loads(text)
    assert len(text) < 16_000 and "2503.08681" in data["source"]["tables"] and "VityaVitalich/STASC" in data["source"]["curves"]
    for r in data["runs"] + data["kept_only"]:
        values = [v for x in r.values() if isinstance(x, list) for v in x]
        assert values and all(isinstance(v, (int, float)) for v in values)


def test_file_holds_the_reference():
    if not reference.exists(): pytest.skip("../shared is absent: the reference data cannot be compared")
    ref, data = json.loads(reference.read_text(encoding="utf-8")), json.loads(stored.read_text(encoding="utf-8"))
    assert data["runs"] == [{k: r[k] for k in data["runs"][0]} for r in ref["runs"]]
    for name in ("table1", "table2"): assert data[name] == [[*setting(r), *(r[c] for c in COLUMNS)] for r in ref[name]]
    kept = {setting(r): r["n_kept"] for r in ref["kept"]}
    assert kept.items() <= {setting(r): r["n_kept"] for r in data["runs"] + data["kept_only"]}.items()
    assert {setting(r) for r in data["kept_only"]} == set(kept) - {setting(r) for r in data["runs"]}
    for k in ("pearson_r", "pearson_p", "spearman_r", "spearman_p"): assert data["correlation"][k] == ref["correlation"][k]


# --- the tables

def expected(run, table):
    "The columns in which the misprints say that a table differs from the curves."
    m = next((m for m in MISPRINTS.values() if m.table == table and m.instead and setting(m) == setting(run)), None)
    return m.columns if m else ()


@pytest.mark.parametrize("run", published(), ids=lambda r: r.name)
def test_run_gives_its_rows(run):
    found, seen = paper_row(run), 0
    for number, table in enumerate(printed_tables(), 1):
        for row in table.to_dict("records"):
            if setting(row) != setting(run): continue
            seen += 1
            differs = [c for c in COLUMNS if (none(row[c]) is None) != (found[c] is None) or none(row[c]) is not None and f"{row[c]:.3f}" != f"{found[c]:.3f}"]
            assert differs == list(expected(run, number)), f"Table {number}: {row}, recomputed {found}"
    assert seen == (2 if run.name == "Qwen2.5-1.5B EIF (5, 5)" else 1)


def test_misprints_with_another_figure_are_those_that_differ():
    found = {(o.table, o.run, c) for o in reproduce().itertuples() for c in o.differs}
    named = {(m.table, Published(*setting(m)).name, c) for m in MISPRINTS.values() if m.instead for c in m.columns}
    assert len(found) == 6 and named - found == {(2, "Phi-3-mini EIF (1, 5)", "max_correction_sd")}         # no curve was published of that one
    assert not published("phi", "EIF", 1, 5)


def test_tables_contradict_each_other_where_it_says_so():
    one, two = ({setting(r): r for r in t.to_dict("records")} for t in printed_tables())
    differ = {(k, c) for k in one.keys() & two.keys() for c in COLUMNS if one[k][c] != two[k][c]}
    named = {(setting(m), c) for name, m in MISPRINTS.items() if name in ("Phi-3 EIF deviation", "Qwen EIF (5, 5) in Table 1") for c in m.columns}
    assert differ == named


def test_accuracies_that_are_no_share_of_500():
    odd = {(n, setting(r), c) for n, t in enumerate(printed_tables(), 1) for r in t.to_dict("records") for c in ("max_initial", "max_correction")
           if none(r[c]) is not None and round(r[c] * 1000) % 2}
    assert odd == {(m.table, setting(m), c) for m in MISPRINTS.values() if not m.instead for c in m.columns}


def test_reproduced_rows_are_all_rows_with_curves():
    o = reproduce()
    assert len(o) == 17 and set(o.run) == {r.name for r in published()} and (o.differs.map(bool)).sum() == 3


# --- runs

def test_curves_have_the_names_of_a_runs_own(tmp_path):
    cfg = Config(variant="EIE", iterations=1, n_init=1, n_corr=1, n_train=2, n_test=2, data="own")
    ask = lambda s: tuple(Question(f"{s}{i}", f"{s} {i}?", ("7",)) for i in range(2))
    run = STaSC(cfg, tmp_path / "run", data=Data(ask("a"), ask("b")), engine=ScriptedEngine(lambda p, rng, skill: f"Final Answer: {rng.randrange(6, 8)}"), callbacks=[])
    next(iter(run))
    for r in published(curves=False):
        m = r.metrics
        assert set(m) <= set(run.metrics) and m.index.name == "iteration" and m.index.tolist() == list(range(len(m)))
        assert m.n_kept[0] == 0 and m.n_kept[1:].tolist() == list(r.n_kept[:len(m) - 1])
    assert paper_table([run, *published()]).index.is_unique
    assert len(over_seeds([run, *published()])) == 17


def test_constant_of_fixed_initialization_stands_in_every_row():
    for r in published():
        assert (r.metrics.test_acc_t1.nunique() == 1) == (r.variant[0] == "F") and not r.metrics.isna().any(axis=None)


def test_runs_are_chosen_by_setting():
    assert {r.variant for r in published("QWEN")} == {"EIE", "EIF", "ENE", "ENF", "FIE", "FIF", "FNE", "FNF"}
    assert len(published(n_init=5, n_corr=5)) == 9 and published(variant="fne", n_init=1) == published("phi", "FNE")
    assert published("embedded") == [] and len(published(curves=False)) == 24
    with pytest.raises(ConfigError, match="unknown variant"): published(variant="XIE")
    with pytest.raises(AttributeError): published()[0].variant = "EIE"


def test_gap_of_the_run_that_learnt_its_questions():
    g = gap(published("qwen", "EIE")[0])
    assert math.isclose(g.acc_t1[0], .2232 - .212) and math.isclose(g.acc_t1_change.iloc[-1], (.3876 - .214) - (.2232 - .212))


# --- the correlation

def test_correlation_takes_what_was_kept_from_an_iteration_and_the_change_after_it():
    r = published("qwen", "ENF")[0]
    c = kept_changes(r)
    assert c.n_kept.tolist() == list(r.n_kept[:10]) and np.allclose(c.next_change, 100 * np.diff(r.test_correction))
    assert math.isclose(kept_correlation(r)["pearson_r"], stats.pearsonr(r.n_kept[:10], np.diff(r.test_correction))[0])


def test_published_correlation_agrees_with_itself():
    "40 points and r give p; the runs it was taken over are not all published."
    o = published_correlation()
    for kind in ("pearson", "spearman"):
        t = o[f"{kind}_r"] * math.sqrt(38 / (1 - o[f"{kind}_r"]**2))
        assert math.isclose(2 * stats.t.sf(abs(t), 38), o[f"{kind}_p"], rel_tol=1e-6) and o["n"] == 40
    assert {r.variant for r in published("phi") if (r.variant[2], r.n_init, r.n_corr) == ("E", 1, 5)} == {"FIE", "FNE"}


def test_kept_counts_without_curves_are_counts_alone():
    r = next(r for r in published(curves=False) if r.name == "Phi-3-mini EIE (1, 5)")
    m = r.metrics
    assert m.n_kept.tolist() == [0, *r.n_kept[:-1]] and m.test_acc_t2.isna().all() and isinstance(m, pd.DataFrame)
