"Pictures: nothing clipped or written over, no formula in a name, true figures in the alt text, the same bytes each time."
import io
import itertools
import random
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile import HOSTILE
from stasc import plot
from stasc.core import Config, DataError, Question, StascError, StoreError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.metrics import named_runs, paper_table
from stasc.paper import printed_tables, published
from stasc.plot import (alarm_rates, alarms, correlation, figure_html, heatmap, kept_counts, pattern_shares, plain, reward_curves, save, side_by_side, spread,
                        transitions)
from stasc.train import ScriptedEngine

NAMES = [*HOSTILE.values(), "", " ", "$", "$$", r"\$x_1$", r"$\frac{", "long name " * 30, "실험 実験 😀", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
         "z" + "\u0301\u0316" * 60, "a\nb\tc", "\ufdfd" * 40, "^_^{}", "%s %d {x}", "_hidden"]


def table(runs=1, iterations=5, seed=0, n=20, questions=6):
    "Trajectories with random rewards, lengths and texts."
    rng = random.Random(seed)
    rows = []
    for it, split, q, j in itertools.product(range(iterations + 1), ("train", "test"), range(questions), range(2)):
        init = dict(init_text=f"step {rng.randrange(3)}\nFinal Answer: {rng.randrange(3)}", init_reward=float(rng.random() < .4), init_n_tokens=rng.randrange(1, 60),
                    init_finish_reason=rng.choice(["stop", "length"]))
        for k in range(3):
            rows.append(dict(iteration=it, split=split, question_id=f"q{q}", init_index=j, corr_index=k, corr_text=rng.choice([init["init_text"], f"step 9\nFinal Answer: {k}"]),
                             corr_reward=float(rng.random() < .5), corr_n_tokens=rng.randrange(1, 60), corr_finish_reason=rng.choice(["stop", "length"]), **init))
    out = pd.DataFrame(rows)
    for w in ("init", "corr"): out[f"{w}_answer"] = out[f"{w}_text"].str.split(": ").str[-1]
    return out


def run_of(trajectories, name="a run", variant="EIE", **more):
    "What the pictures take for a run: a name, settings, trajectories and their metrics."
    m = trajectories.groupby(["iteration", "split"]).agg(acc_t1=("init_reward", "mean"), acc_t2=("corr_reward", "mean"), n=("init_reward", "size")).unstack()
    m.columns = [f"{s}_{k}" for k, s in m.columns]
    m.insert(0, "n_kept", range(0, 7 * len(m), 7))
    return SimpleNamespace(name=name, model="some/model", variant=variant, n_init=2, n_corr=3, seed=0, trajectories=trajectories, metrics=m, **more)


def pictures(run, others=()):
    "Every kind of picture, of one run and some others."
    runs = {str(getattr(r, "name", "")): r for r in [run, *others]}
    yield reward_curves(run)
    yield reward_curves(run, split="test", paper=others[0] if others else None)
    yield side_by_side(runs)
    yield side_by_side(runs, ("acc_t1", "acc_t2"), "train")
    yield heatmap(paper_table(runs))
    yield transitions(run)
    yield kept_counts(run)
    yield kept_counts(runs)
    yield correlation(runs)
    yield alarms(run)
    yield pattern_shares(run)


def texts(fig):
    "All words that are drawn, and where."
    from matplotlib.text import Text
    fig.draw_without_rendering()                                    # settles the layout
    drawn, draw = [], Text.draw
    def record(self, renderer, *args, **kw):
        if self.get_visible() and self.get_text().strip(): drawn.append((self, Text.get_window_extent(self, renderer)))
        return draw(self, renderer, *args, **kw)
    with mock.patch.object(Text, "draw", record): fig.draw_without_rendering()
    return drawn


def check_words(fig):
    "Every word inside the picture, none over another, none smaller than 11 points, none read as a formula."
    found = texts(fig)
    box = fig.bbox
    for t, b in found:
        assert b.x0 >= -1 and b.y0 >= -1 and b.x1 <= box.x1 + 1 and b.y1 <= box.y1 + 1, f"{t.get_text()!r} leaves the picture: {b}"
        assert t.get_fontsize() >= 11
        assert not t._preprocess_math(t.get_text())[1]
    for (a, x), (b, y) in itertools.combinations(found, 2):
        wide, high = min(x.x1, y.x1) - max(x.x0, y.x0), min(x.y1, y.y1) - max(x.y0, y.y0)
        assert wide <= 1 or high <= 3, f"{a.get_text()!r} and {b.get_text()!r} lie over each other in {fig.alt[:60]}"


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def run():
    return run_of(table())


# --- words

def check_file(fig):
    svg = plot._bytes(fig, "svg").decode()
    assert "<script" not in svg and "<img" not in svg and "<style>body" not in svg and "\u202e" not in fig.alt
    ET.fromstring(svg)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_only_a_name_in_a_title(name):
    a, b = run_of(table(seed=1, iterations=1), name or "empty"), run_of(table(seed=2, iterations=1), f"{name} too")
    fig = reward_curves(a, paper=b, level=None, split="test")
    check_words(fig)
    assert len(fig.alt) < 1500


@pytest.mark.parametrize("part", range(6))
def test_any_name_is_only_a_name_at_a_line_or_in_a_legend(part):
    runs = {name: run_of(table(seed=k, iterations=2), name) for k, name in enumerate(NAMES[part::6])}
    for fig in (side_by_side(runs), kept_counts(runs), correlation(runs)):
        check_words(fig)
        check_file(fig)


@given(st.text(max_size=80), st.floats(3, 40))
@settings(max_examples=150, deadline=None)
def test_plain_text_fits_and_is_no_formula(text, em):
    from matplotlib import cbook
    out = plain(text, em)
    fonts = plot._fonts()
    assert not cbook.is_math_text(out)
    shown = out.replace(r"\$", "$")
    assert sum(plot._width(c, fonts) for c in shown) <= em + 1
    assert not re.search(r"[\n\r\t\u200e\u200f\u202a-\u202e\u2066-\u2069]", shown)


@pytest.mark.parametrize("text", ["lr 1e-4, $5 to $10", r"\$", r"\\$$", "$$", "a$b$c"])
def test_dollars_come_out_as_they_went_in(text):
    from matplotlib.figure import Figure
    shown, math = Figure().text(0, 0, plain(text))._preprocess_math(plain(text))
    assert shown == text and not math


@pytest.mark.parametrize("seed", range(4))
def test_words_neither_leave_the_picture_nor_overlap(seed):
    rng = random.Random(seed)
    iterations = [0, 1, 10, 25][seed]
    others = [run_of(table(seed=10 * seed + i, iterations=max(1, iterations), questions=rng.randrange(1, 9)), f"run number {i}", rng.choice(["EIE", "FIF", "ENE"]))
              for i in range(rng.randrange(1, 4))]
    first = run_of(table(seed=seed, iterations=iterations), "the first run of all")
    for fig in pictures(first, others) if iterations else [reward_curves(first), transitions(first), alarms(first), pattern_shares(first)]: check_words(fig)


def test_published_pictures():
    for fig in [side_by_side(published()), side_by_side(published("qwen"), "acc_t1"), heatmap(printed_tables()[0]), heatmap(printed_tables()[0], "max_initial"),
                heatmap(published("phi")), kept_counts(published()), correlation(published()), *map(reward_curves, published()[::4])]: check_words(fig)


def test_many_runs_in_one_panel():
    runs = {f"run {i}": run_of(table(seed=i % 3, iterations=3), f"run {i}") for i in range(24)}
    for fig in (side_by_side(runs), kept_counts(runs), correlation(runs)): check_words(fig)
    lines = [(l.get_color(), l.get_marker(), l.get_linestyle(), str(l._unscaled_dash_pattern)) for l in side_by_side(runs).axes[0].lines if len(l.get_xdata()) > 1]
    assert len(set(lines)) == len(runs) == len(lines)


# --- labels at the ends

@given(st.lists(st.floats(-1e3, 1e3), max_size=30), st.floats(.1, 50))
def test_spread_keeps_order_and_distance_and_the_middle(ys, gap):
    ys = sorted(ys)
    out = spread(ys, gap)
    assert len(out) == len(ys)
    assert all(b - a >= gap - 1e-6 for a, b in zip(out, out[1:]))
    if ys: assert abs(np.mean(out) - np.mean(ys)) < 1e-6
    if all(b - a >= gap for a, b in zip(ys, ys[1:])): assert np.allclose(out, ys)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_spread_is_the_least_sum_of_squares(ys):
    ys, cost = sorted(ys), lambda zs: sum((z - y)**2 for y, z in zip(ys, zs))
    grid = np.arange(-4, 11, .5)
    best = min(cost(zs) for zs in itertools.combinations(grid, len(ys)) if all(b - a >= 1 for a, b in zip(zs, zs[1:])))
    assert cost(spread(ys, 1)) <= best + 1e-9


# --- what the pictures tell

def test_alt_texts_hold_true_figures(run):
    m = run.metrics
    f = lambda c: f"{m[c].iloc[0]:.3f} to {m[c].iloc[-1]:.3f}"
    told = reward_curves(run).alt
    for c in ("test_acc_t1", "train_acc_t2"): assert f(c) in told
    assert "a run" in told and "iterations 0 to 5" in told
    assert f("test_acc_t2") in side_by_side([run]).alt
    assert f"{m.n_kept.iloc[1]} to {m.n_kept.iloc[-1]}" in kept_counts(run).alt
    assert "training questions" in side_by_side([run], "n_kept").alt       # what is kept is of the training questions, whichever split is asked for
    rows = run.trajectories.query("split == 'test' and iteration == 5")
    share = ((rows.init_reward == 1) & (rows.corr_reward == 0)).mean()
    assert re.search(rf"right → wrong [\d.]+ to {share:.3f}", transitions(run).alt)


def test_every_picture_says_what_it_shows(run):
    for fig in pictures(run, [run_of(table(seed=5), "other", "FIF")]):
        assert len(fig.alt) > 40 and repr(fig) == fig.alt
        data, meta = fig._repr_mimebundle_()
        assert data["text/plain"] == fig.alt == meta["image/png"]["alt"] and set(data) == {"image/png", "text/plain"}


def test_alarm_rates_against_loops(run):
    rows = run.trajectories
    for split in ("test", "train"):
        out = alarm_rates(run, split)
        for it in out.index:
            first, corr = {}, []
            for r in rows.to_dict("records"):
                if (r["iteration"], r["split"]) != (it, split): continue
                first[r["question_id"], r["init_index"]] = r
                corr.append(r)
            assert out.init_tokens[it] == pytest.approx(np.mean([r["init_n_tokens"] for r in first.values()]))
            assert out.corr_tokens[it] == pytest.approx(np.mean([r["corr_n_tokens"] for r in corr]))
            assert out.init_cut_off[it] == pytest.approx(np.mean([r["init_finish_reason"] == "length" for r in first.values()]))
            assert out.corr_cut_off[it] == pytest.approx(np.mean([r["corr_finish_reason"] == "length" for r in corr]))
            assert out.repeats[it] == pytest.approx(np.mean([r["init_text"].split() == r["corr_text"].split() for r in corr]))


def test_stacked_bars_fill_the_whole_and_differ_in_more_than_colour(run):
    for fig in (transitions(run), pattern_shares(run)):
        ax, heights, kinds = fig.axes[0], {}, set()
        for c in ax.containers:
            kinds.add(c[0].get_hatch())
            for bar in c: heights[round(bar.get_x(), 3)] = heights.get(round(bar.get_x(), 3), 0) + bar.get_height()
        assert np.allclose(list(heights.values()), 1)
        assert len(kinds) == len(ax.containers)


@pytest.mark.parametrize("pairing, share", [("sampled", "25%"), ("crossed", "12%")])
def test_counts_are_shown_with_their_share_of_the_pairs(pairing, share):
    run = run_of(table(iterations=2), cfg=SimpleNamespace(pairing=pairing, n_init=2, n_corr=3, model="m", variant="EIE", seed=0, filter=None, iterations=2))
    run.metrics["n_kept"] = [0, 9, 18]
    assert [t.get_text() for t in kept_counts(run).axes[0].texts] == [f"9\n{share}", f"18\n{50 if pairing == 'sampled' else 25}%"]
    assert [t.get_text() for t in kept_counts(published("phi", "EIF", 5, 5)).axes[0].texts][0] == "5,017"         # how they were paired is not in the data


def test_missing_cells_are_hatched_and_named():
    fig = heatmap(printed_tables()[0])
    qwen = fig.axes[0]
    hatched = [p for p in qwen.patches if p.get_hatch()]
    assert len(hatched) == 1 and hatched[0].get_xy() == (-.5, -.5)
    assert [t.get_text() for t in qwen.texts][0] == "none" and "0.250\n± 0.024" in [t.get_text() for t in qwen.texts]
    assert "(1, 1) none" in fig.alt


def test_cells_with_several_runs_show_their_mean():
    rows = pd.DataFrame([dict(model="m", variant="EIE", n_init=1, n_corr=c, max_correction=v, max_correction_sd=.1) for c, v in ((1, .2), (1, .4), (2, .5), (3, None))])
    assert [t.get_text() for t in heatmap(rows).axes[0].texts] == ["0.300\nmean of 2", "0.500\n± 0.100", "none"]


def test_a_filter_of_ones_own_is_not_mixed_with_the_variant():
    cfg = lambda f: SimpleNamespace(model="m", variant="EIE", n_init=2, n_corr=3, seed=0, filter=f, threshold=1.0)
    runs = {f or "own": SimpleNamespace(cfg=cfg(f), metrics=run_of(table(seed=i)).metrics) for i, f in enumerate((None, "all"))}
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in heatmap(runs).axes]
    assert any("EIE, filter all" in t for t in titles) and any(t.endswith("EIE") for t in titles)


def test_overlay_by_model_and_variant_or_name(run):
    mine = SimpleNamespace(**vars(run) | dict(model="/models/Qwen2.5-1.5B-Instruct", variant="FNE", n_init=2))
    assert "dotted: Qwen2.5-1.5B FNE (5, 5)" in reward_curves(mine, paper=True).alt
    exact = published("phi", "EIF", 3, 3)[0]
    assert "dotted: Phi-3-mini EIF (3, 3)" in reward_curves(exact, paper=True).alt
    assert "0.372 to 0.364" in reward_curves(run, paper="Phi-3-mini EIF (3, 3)").alt
    with pytest.raises(DataError, match="no curve of EIE with model"): reward_curves(run, paper=True)
    with pytest.raises(DataError, match="did you mean 'Phi-3-mini EIF"): reward_curves(run, paper="Phi3-mini EIF (3, 3)")


def test_a_run_under_way_shows_how_far_it_has_to_go(run):
    going = run_of(table(iterations=2), cfg=SimpleNamespace(iterations=9, threshold=1.0, model="m", variant="EIE", n_init=2, n_corr=3, seed=0, filter=None))
    assert 9 < reward_curves(going).axes[0].get_xlim()[1] < 10
    assert 2 < reward_curves(SimpleNamespace(**vars(going), ended="no more")).axes[0].get_xlim()[1] < 3


def test_graded_rewards_and_thresholds():
    t = table(seed=3)
    t["init_reward"], t["corr_reward"] = t.init_reward * .7, t.corr_reward * .9
    shares = [transitions(run_of(t, cfg=SimpleNamespace(threshold=x, iterations=5, model="m", variant="EIE", n_init=2, n_corr=3, seed=0, filter=None))).alt for x in (.5, .8)]
    assert "right → right 0.000 to 0.000" not in shares[0] and "right → right 0.000 to 0.000" in shares[1]


# --- files

def test_saved_pictures_are_the_same_bytes_and_carry_their_words(run, tmp_path):
    from PIL import Image
    for k in "ab":
        fig = side_by_side({"</title><script>alert(1)</script> & \"quotes\"": run})
        for kind in ("svg", "PNG"): save(fig, tmp_path / k / f"x.{kind}")
    assert (tmp_path / "a/x.svg").read_bytes() == (tmp_path / "b/x.svg").read_bytes()
    assert (tmp_path / "a/x.PNG").read_bytes() == (tmp_path / "b/x.PNG").read_bytes()
    with Image.open(tmp_path / "a/x.PNG") as png: assert png.info["Description"] == fig.alt and "Creation Time" not in png.info
    svg = ET.parse(tmp_path / "a/x.svg").getroot()
    ns = "{http://www.w3.org/2000/svg}"
    assert svg.find(f"{ns}desc").text == fig.alt and fig.alt.startswith(svg.find(f"{ns}title").text) and svg.get("role") == "img"
    assert not svg.findall(f".//{ns}script") and b"<dc:date>" not in (tmp_path / "a/x.svg").read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["x.PNG", "x.svg"]


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.svg.gz", "x.", ".png"])
def test_other_endings_are_refused_in_one_sentence(run, tmp_path, name):
    with pytest.raises(StoreError) as e: save(kept_counts(run), tmp_path / name)
    assert "\n" not in str(e.value) and ".png or .svg" in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"): save(kept_counts(run), tmp_path / "file" / "x.png")


def test_a_figure_of_ones_own_can_be_saved(tmp_path):
    from matplotlib.figure import Figure
    save(Figure(), tmp_path / "x.svg")
    ET.parse(tmp_path / "x.svg")
    assert figure_html(Figure(), "png").startswith('<img alt="" ')


def test_html_escapes_the_alt_text(run):
    for kind in ("svg", "png"):
        page = figure_html(side_by_side({'"><script>alert(1)</script>': run}), kind)
        assert page.count("<") == 1 and 'alt="' in page and "&quot;&gt;&lt;script&gt;" in page


# --- the user's own matplotlib

def test_pyplot_and_the_users_style_are_left_alone(run):
    import matplotlib
    import matplotlib.pyplot as plt
    plain_bytes = plot._bytes(reward_curves(run), "png", 60)
    with plt.style.context("dark_background"), matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.grid": False, "svg.fonttype": "none", "image.cmap": "jet"}):
        before = dict(matplotlib.rcParams)
        fig = reward_curves(run)
        assert plot._bytes(fig, "png", 60) == plain_bytes
        assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_matplotlib_is_loaded_when_something_is_drawn():
    code = "import sys, stasc.plot, stasc.live; print([m for m in ('matplotlib', 'scipy', 'torch', 'IPython', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- what cannot be drawn

OLD = published("qwen", "EIE")[0]
NEW = SimpleNamespace(name="new", metrics=pd.DataFrame())


@pytest.mark.parametrize("draw, says", [
    (lambda r: reward_curves(r, split="dev"), "unknown split 'dev'"),
    (lambda r: reward_curves(NEW), "no complete iteration"),
    (lambda r: side_by_side([r], "accuracy"), "unknown measure"),
    (lambda r: side_by_side([r], split="x"), "unknown split"),
    (lambda r: side_by_side([]), "no runs"),
    (lambda r: heatmap(pd.DataFrame(dict(n_init=[1], x=[2.])), "x"), "n_corr"),
    (lambda r: heatmap(paper_table([r]), "max"), "unknown column"),
    (lambda r: heatmap(paper_table([r]).iloc[:0]), "no rows"),
    (lambda r: transitions(OLD), "no trajectories"),
    (lambda r: transitions(r, "dev"), "unknown split"),
    (lambda r: alarms(OLD), "no trajectories"),
    (lambda r: alarms(r, "dev"), "unknown split"),
    (lambda r: kept_counts(run_of(table(iterations=0))), "no corrections have been filtered"),
    (lambda r: kept_counts({"new": NEW}), "no complete iteration"),
    (lambda r: correlation(run_of(table(iterations=0))), "no change to draw"),
    (lambda r: pattern_shares(r, "dev"), "unknown split"),
    (lambda r: pattern_shares(r.trajectories), "label")])
def test_what_cannot_be_drawn_is_said_in_one_sentence(run, draw, says):
    with pytest.raises(StascError, match=says) as e: draw(run)
    assert "\n" not in str(e.value)


def test_a_stored_run_can_be_drawn_whole(tmp_path):
    qs = [Question(str(i), f"What is {i} plus {i}?", (str(2 * i),)) for i in range(12)]
    right = lambda prompt: 2 * int(re.findall(r"What is (\d+)", prompt)[-1])
    script = lambda prompt, rng, skill: f"Final Answer: {rng.choice([rng.randrange(24), right(prompt)])}"
    run = STaSC(Config(variant="FIE", iterations=2, n_init=2, n_corr=2, shots=0), tmp_path / "run", data=Data(qs[:6], qs[6:]), engine=ScriptedEngine(script), callbacks=[]).run()
    for fig in pictures(run): check_words(fig)
    assert "own first answers" in reward_curves(run).alt
    assert next(iter(named_runs(run))) in reward_curves(run).alt
