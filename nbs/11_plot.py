# ---
# jupyter:
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pictures
#
# > Reward curves, variants side by side, heat maps, transitions and signs of collapse, each with its figures told in words.

# %%
#| default_exp plot

# %%
#| export
import base64, contextlib, functools, html, io, itertools, re, unicodedata
from pathlib import Path
import numpy as np, pandas as pd
from stasc.core import DataError, StoreError, unknown
from stasc.metrics import MEASURES, by_iteration, kept_changes, kept_correlation, named_runs, paper_table
from stasc.paper import Published, published
from stasc.patterns import label, pattern_counts
from stasc.store import whole

# %%
#| hide
import random, tempfile, warnings
from fastcore.test import test_eq, test_fail
from stasc.core import Config, Question
from stasc.data import Data
from stasc.loop import STaSC
from stasc.train import ScriptedEngine

# %% [markdown]
# ## One style
#
# Every picture here keeps the same rules. Colours are those of [Okabe and Ito](https://jfly.uni-koeln.de/color/), which people with any of the usual colour blindnesses can tell apart, and no colour stands alone: each line has a marker and a stroke of its own, each area a hatch. Labels stand at the ends of lines or outside the axes, so that they cover no data. The style is the package's own, whatever style the notebook has set; the fonts are the user's.

# %%
#| export
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
_INK, _FAINT = "#222222", "#767676"
_STYLE = {"font.size": 12, "axes.titlesize": 13, "axes.titlelocation": "left", "figure.titlesize": 13, "legend.fontsize": 12, "legend.frameon": False,
          "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": .3, "lines.linewidth": 2, "lines.markersize": 7,
          "hatch.linewidth": .8, "text.usetex": False, "svg.fonttype": "path", "svg.hashsalt": "stasc"}

@contextlib.contextmanager
def _style():
    import matplotlib as mpl
    fonts = {k: mpl.rcParams[k] for k in mpl.rcParams if k in ("font.family", "font.sans-serif", "font.serif", "font.monospace")}
    from matplotlib.style import context
    with context(["default", fonts | _STYLE]): yield

def _drawn(f):
    "Draw in this style, and give the picture its alt text."
    @functools.wraps(f)
    def draw(*args, **kw):
        with _style(): fig, fig.alt = f(*args, **kw)
        return fig
    return draw

# %% [markdown]
# A picture tells in words what it shows: `fig.alt`. It is what a screen reader gets, what a terminal prints in place of the picture, and what goes into a saved file. A notebook shows the picture as the value of a cell; `pyplot` is not involved, so nothing is shown twice and nothing piles up.

# %%
#| export
@functools.cache
def _picture():
    from matplotlib.figure import Figure
    class Picture(Figure):
        "A figure that says in words what it shows."
        alt = ""
        def __repr__(self): return self.alt or super().__repr__()
        def _repr_mimebundle_(self, include=None, exclude=None):
            return {"image/png": _small_png(self), "text/plain": self.alt}, {"image/png": {"alt": self.alt}}
    return Picture

def _new(width, height, rows=1, columns=1, **kw):
    "A figure and its axes as an array of rows."
    fig = _picture()(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **kw)

# %% [markdown]
# As a file, too, a picture carries its alt text: an SVG as `<title>` and `<desc>`, where browsers and screen readers look, a PNG in its metadata. Neither holds a date, so the same picture gives the same bytes. Letters in an SVG are drawn as outlines: it looks the same where fonts are missing, and a name in it cannot be anything but a drawing.

# %%
#| export
def _small_png(fig):
    "A PNG for a notebook, of 128 colours: a third of the size, which every saved notebook and every redrawing carries."
    from PIL import Image
    out = io.BytesIO()
    Image.open(io.BytesIO(_bytes(fig, "png", 100))).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()

def _bytes(fig, kind, dpi=200):
    "A picture as PNG or SVG."
    out, alt = io.BytesIO(), _told(getattr(fig, "alt", ""), 100_000)
    with _style(): fig.savefig(out, format=kind, dpi=dpi, metadata=dict(Date=None) if kind == "svg" else dict(Description=alt))
    if kind == "png": return out.getvalue()
    title, head = html.escape(alt.split(", ")[0].split(". ")[0]), '<svg role="img" aria-labelledby="title desc" '
    text = out.getvalue().decode().replace("<svg ", head, 1)
    end = text.index(">", text.index(head)) + 1
    return f'{text[:end]}\n <title id="title">{title}</title>\n <desc id="desc">{html.escape(alt)}</desc>{text[end:]}'.encode()

# %% [markdown]
# ## Names that somebody else chose
#
# A run's name may hold anything. In a picture, a dollar sign is a dollar sign and starts no formula; marks that turn the direction of text and control characters are taken out; what the fonts cannot draw becomes �; and what is too long for its place loses its middle. The width is measured with the fonts that will be used, since 40 letters of one script are twice as wide as those of another.

# %%
#| export
def _fonts():
    "Fonts that text will be drawn with, in the order in which they are tried."
    from matplotlib import font_manager as fm, rcParams
    names = [n for f in rcParams["font.family"] for n in (rcParams.get(f"font.{f}") or [f])]
    return _open_fonts(tuple(n for n in names if n in set(fm.fontManager.get_font_names())) or ("DejaVu Sans",))

@functools.cache
def _open_fonts(names):
    from matplotlib import font_manager as fm
    return tuple(fm.get_font(fm.findfont(n)) for n in names)

@functools.lru_cache(4096)
def _width(c, fonts):
    "Width of a character in em; None if none of the fonts has it."
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path
    if not any(f.get_char_index(ord(c)) for f in fonts): return None
    return text_to_path.get_text_width_height_descent(c, FontProperties(size=10), False)[0] / 10 if not c.isspace() else .32

# %%
#| export
def plain(text,                 # anything; its str() is shown
          em: float = 30,       # room, in font sizes: two letters or so each
         ) -> str:              # what matplotlib draws as just that
    "A text of unknown origin, fit to stand in a picture."
    text = unicodedata.normalize("NFC", re.sub(r"\s+", " ", _cut(str(text), 1000)))
    text = "".join(c for c in text if unicodedata.category(c)[0] != "C").strip()
    text = re.sub(r"[\u0300-\u036f\u20d0-\u20ff]{3,}", "", text)                # marks piled up on a letter
    fonts = _fonts()
    text = "".join(c if _width(c, fonts) is not None else "\N{REPLACEMENT CHARACTER}" for c in text)
    return _shorten(text, em, [_width(c, fonts) for c in text]).replace("$", r"\$")

def _key(name, em):
    "A name in a legend, from which matplotlib leaves out what begins with an underscore."
    return " " * str(name).startswith("_") + plain(name, em)

def _cut(text, n): return text if len(text) <= n else f"{text[:n * 2 // 3]}…{text[len(text) - n // 3:]}"

def _shorten(text, em, widths):
    if sum(widths) <= em: return text
    head = np.searchsorted(np.cumsum(widths), em * .65)
    tail = np.searchsorted(np.cumsum(widths[::-1]), em * .35 - 1)
    return text[:head] + "…" + text[len(text) - tail:]

# %%
[plain(x, 16) for x in ("lr $5 to $10", "a\u202eevil\nname", "Phi-3 " + "mini " * 60, "实验 😀 run", "<script>alert(1)</script>")]

# %%
#| hide
test_eq(plain("EIE"), "EIE"); test_eq(plain(r"\$5"), r"\\$5")
assert len(plain("x" * 300, 20)) < 40 and plain("x" * 300).count("…") == 1

# %% [markdown]
# Alt texts have more room; only characters that no XML file may hold are taken out.

# %%
#| export
def _told(text, n=300): return "".join(c for c in re.sub(r"\s+", " ", _cut(str(text), n)) if unicodedata.category(c)[0] != "C")

def _from_to(values, digits=3):
    "Say how a curve goes: first and last value."
    v = pd.Series(values).dropna()
    if v.empty: return "no value"
    f = lambda x: f"{x:.{digits}f}"
    return f(v.iloc[0]) if len(v) == 1 else f"{f(v.iloc[0])} to {f(v.iloc[-1])}"

# %%
test_eq(_from_to([.35, .5, .8133]), "0.350 to 0.813")

# %% [markdown]
# What the functions below take for a run is anything with `metrics`, as a run of STaSC or a published one has it; several runs are a dictionary of names or a list.

# %%
#| export
def _one(run):
    "A run's name and its metrics."
    name = next(iter(named_runs(run)))
    if run.metrics.empty: raise DataError(f"{_told(name)} has no complete iteration yet, so there is nothing to draw: run it first")
    return name, run.metrics

def _rows(run):
    "A run's trajectories."
    if (rows := getattr(run, "trajectories", None)) is None: raise DataError(f"{_told(next(iter(named_runs(run))))} has no trajectories, which this picture is drawn from")
    return rows

def _model(run): return Path(str(getattr(getattr(run, "cfg", run), "model", None) or "")).name

def _threshold(run): return getattr(getattr(run, "cfg", None), "threshold", 1.0)

def _several(runs):
    "Names and runs that have something to show."
    runs = named_runs(runs)
    for r in runs.values(): _one(r)
    return runs

def _axis(ax, last, label="iteration n (0 is M₀)"):
    "Whole iterations from 0 to `last`."
    from matplotlib.ticker import MaxNLocator
    ax.set_xlabel(label)
    ax.set_xlim(-.1 - .02 * last, last + .1 + .02 * last)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))

# %% [markdown]
# ## Labels at the ends of lines
#
# A label beside the last point of a line needs no legend, but lines that end together would write over each other. So labels move apart: each as little as possible, in their order, at least one line's height from the next. That is isotonic regression, which the merging of neighbours into blocks solves.

# %%
#| export
def spread(ys,              # wished positions, ascending
           gap: float,      # least distance between neighbours
          ) -> list:        # positions in the same order
    "Move positions apart, by the least sum of squares."
    blocks = []                                                     # (mean, size) of ys[i] - i * gap
    for i, y in enumerate(ys):
        blocks.append((y - i * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [v + i * gap for i, v in enumerate(v for v, n in blocks for _ in range(n))]

# %%
spread([1, 1.2, 1.3, 5], 1)

# %%
#| hide
test_eq(spread([], 1), []); test_eq(spread([0, 2, 4], 1), [0, 2, 4]); test_eq(spread([1, 1], 1), [.5, 1.5])

# %%
#| export
def _label_ends(fig, ends):         # for each axes (line, text)
    "Write a label, with its marker, behind the last point of each line."
    placed = []
    for _ in range(2):                                              # the labels take room, which moves the lines' ends
        fig.get_layout_engine().execute(fig)
        for a in placed: a.remove()
        placed = [a for ax, e in ends.items() for a in _label_panel(ax, [(*_end(l), [l], text) for l, text in e if np.isfinite(_end(l)).all()])]

def _end(line): return float(line.get_xdata()[-1]), float(line.get_ydata()[-1])

def _label_panel(ax, ends):         # (x, y, lines, text) -> what was drawn
    "Labels of one panel; lines that end a little early share the margin."
    groups, last, out = {}, max([e[0] for e in ends], default=0), []
    for x, y, lines, text in sorted(ends, key=lambda e: e[1]):
        group = groups.setdefault(last if last - x <= .2 * last else x, [])
        if group and (group[-1][0], group[-1][3]) == (x, text): group[-1][2].extend(lines)           # one label does for lines that end as one
        else: group.append((x, y, lines, text))
    for column, group in groups.items():
        at = [ax.transData.transform(e[:2])[1] * 72 / ax.figure.dpi for e in group]
        for (x, y, lines, text), old, new in zip(group, at, spread(at, 14)): out += _label_end(ax, column, x, y, new - old, lines, text)
    return out

def _label_end(ax, column, x, y, up, lines, text):
    from matplotlib.lines import Line2D
    from matplotlib.transforms import offset_copy
    at = lambda points: offset_copy(ax.transData, ax.figure, points, up, units="points")
    leader = dict(arrowstyle="-", color=_FAINT, lw=.7, shrinkA=0, shrinkB=4, relpos=(0, .5)) if abs(up) > 3 or column != x else None
    if column < ax.get_xlim()[1] - 1: lines = []                    # within the axes a marker would pass for a point
    said = ax.annotate(text, (x, y), (column, y), textcoords=at(21 + 9 * len(lines) if lines else 9), va="center", size=11, color=_INK, arrowprops=leader, annotation_clip=False)
    keys = [Line2D([column], [y], marker=l.get_marker(), ms=6, color=l.get_color(), mfc=l.get_markerfacecolor(), mec=l.get_color(), transform=at(22 + 9 * k), clip_on=False)
            for k, l in enumerate(lines)]
    return [said, *map(ax.add_artist, keys)]

def _legend(fig):
    "One legend below all axes, each entry once, in as many columns as fit."
    seen = {}
    for ax in fig.axes: seen |= {l: h for h, l in zip(*ax.get_legend_handles_labels()) if l not in seen}
    for columns in range(len(seen), 0, -1):
        legend = fig.legend(list(seen.values()), list(seen), loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.6)
        if columns == 1 or legend.get_window_extent().width < .97 * fig.bbox.width: return
        legend.remove()

# %% [markdown]
# ## Reward curves
#
# The picture of the method: mean reward of initial answers and of corrections, by iteration, on held-out and on training questions. The bands are bootstrap intervals over questions (of `stasc.metrics`); a published run has no trajectories to draw from, so it has none. With Fixed Initialization the first answers stay those of $M_0$; what $M_n$ would answer first is drawn beside them.

# %%
#| export
_LINES = dict(acc_t1=("initial answers", dict(color=BLUE, marker="o", ls="-")), acc_t2=("corrections", dict(color=RED, marker="s", ls=(0, (6, 1.5)))),
              own=("Mₙ's own first answers", dict(color=GREEN, marker="^", ls=":")))
_SPLITS = dict(test="held-out questions", train="training questions")

def _check_split(split):
    if split not in _SPLITS: raise DataError(unknown("split", split, _SPLITS))

def _curves(run, split, level):
    "acc_t1 and acc_t2 by iteration, with the ends of intervals where there are trajectories and a level."
    rows, m = getattr(run, "trajectories", None) if level else None, run.metrics
    if rows is not None: return by_iteration(rows, split, _threshold(run), level)
    return pd.DataFrame({k: m[f"{split}_{k}"] for k in ("acc_t1", "acc_t2")})

def _draw_line(ax, t, column, label, style):
    "A line with the band of its intervals; error bars where there is a single point."
    style = style | dict(label=label, markeredgecolor="white", markeredgewidth=.8)
    if f"{column}_lo" in t:
        lo, hi = t[f"{column}_lo"], t[f"{column}_hi"]
        if len(t) > 1: ax.fill_between(t.index, lo, hi, color=style["color"], alpha=.16, lw=0)
        else: ax.errorbar(t.index, t[column], [t[column] - lo, hi - t[column]], color=style["color"], capsize=5)
    ax.plot(t.index, t[column], **style)

# %%
#| export
def _overlay(run, paper):
    "The published run that is meant."
    if not paper or hasattr(paper, "metrics"): return paper or None
    names = {p.name: p for p in published()}
    if isinstance(paper, str):
        if paper not in names: raise DataError(unknown("published run", paper, names))
        return names[paper]
    c, model = getattr(run, "cfg", run), _model(run)
    found = published(model, c.variant, c.n_init, c.n_corr) or published(model, c.variant)
    if not found: raise DataError(f"the paper has no curve of {c.variant} with {_told(model)}; name one of {', '.join(names)}")
    return found[0]

def _last(run):
    "The iteration up to which a run goes: the planned one while it is under way."
    return run.metrics.index[-1] if getattr(run, "ended", None) or not hasattr(run, "cfg") else max(run.metrics.index[-1], run.cfg.iterations)

@_drawn
def reward_curves(run,                      # a run, or a published one
                  paper=None,               # True: the paper's curve of the same model and variant; or its name, or any run to lay behind
                  level: float = 0.95,      # of the bootstrap intervals; None draws none
                  split: str|None = None,   # "test" or "train"; None draws both
                 ):                         # matplotlib Figure
    "Mean reward of initial answers and corrections by iteration."
    if split is not None: _check_split(split)
    (name, m), other, splits = _one(run), _overlay(run, paper), [split] if split else list(_SPLITS)
    fig, axes = _new(*((7, 4.3) if split else (10, 4.6)), 1, len(splits), sharey=True)
    told = [f"Mean reward by iteration of {_told(name)}, {_iterations(m)}{f'; dotted: {_told(next(iter(named_runs(other))))}' if other else ''}."]
    for ax, s in zip(axes[0], splits): told.append(_draw_split(ax, run, s, level, other))
    low, high = np.min([ax.dataLim.y0 for ax in axes[0]]), np.max([ax.dataLim.y1 for ax in axes[0]])
    axes[0, 0].set_ylim(*_limits(low, high)); axes[0, 0].set_ylabel("mean reward")
    room = 34 if split else 52
    behind = f"\ndotted: {plain(next(iter(named_runs(other))), room - 10)}{', published' * isinstance(other, Published)}" if other else ""
    fig.suptitle(plain(name, room) + behind, x=.01, ha="left")
    if level and axes[0, 0].collections: axes[0, 0].fill_between([], [], color=_FAINT, alpha=.25, lw=0, label=f"{level:.0%} interval")
    _legend(fig)
    for ax in axes[0]: _axis(ax, max(_last(run), other.metrics.index[-1] if other else 0))
    _label_ends(fig, {ax: _free_ends(ax) for ax in axes[0]})
    return fig, " ".join(told)

# %%
#| export
def _iterations(m): return f"iteration {m.index[0]} alone" if len(m) == 1 else f"iterations {m.index[0]} to {m.index[-1]}"

def _limits(low, high):
    "Limits of an axis of rewards: what is drawn and some room, at least a tenth, within [0, 1]."
    low, high = (low, high) if np.isfinite([low, high]).all() else (0, 1)
    room = max(.06 * (high - low), (.1 - (high - low)) / 2, .005)
    return max(-.02, low - room), min(1.02, high + room)

def _free_ends(ax):
    "Lines behind whose end no other line goes on, and their last values."
    lines = [l for l in ax.lines if len(l.get_xdata()) and l.get_label()[:6] != "_child"]
    return [(l, f"{_end(l)[1]:.2f}") for l in lines if _end(l)[0] >= .8 * max(_end(x)[0] for x in lines)]

def _draw_split(ax, run, split, level, other):      # what is to be told
    "The curves of one split."
    t, told = _curves(run, split, level), []
    if split == "test" and "transfer_acc_t1" in run.metrics: t = t.assign(own=run.metrics.transfer_acc_t1)
    for column, (label, style) in _LINES.items():
        if other is not None and column != "own" and (o := other.metrics[f"{split}_{column}"].dropna()).size:
            ax.plot(o.index, o, color=style["color"], marker=style["marker"], ls=(0, (1, 1.6)), lw=1.3, ms=5, mfc="white", label=f"_dotted {column}", alpha=.9)
            told.append(f"{label} of the dotted run {_from_to(o)}")
        if column in t and t[column].notna().any():
            _draw_line(ax, t[t[column].notna()], column, label, style)
            band = f" (interval of the last {t[f'{column}_lo'].iloc[-1]:.3f} to {t[f'{column}_hi'].iloc[-1]:.3f})" if f"{column}_lo" in t else ""
            told.append(f"{label} {_from_to(t[column])}{band}")
    ax.set_title(_SPLITS[split])
    return f"{_SPLITS[split].capitalize()}: {', '.join(told) or 'nothing published'}."

# %%
from stasc.paper import published
mine = published("phi", "EIF", 3, 3)[0]
fig = reward_curves(mine, split="test")
fig

# %%
print(fig.alt)

# %%
#| hide
assert "initial answers 0.334 to 0.324" in fig.alt
test_fail(lambda: reward_curves(mine, paper="Phi-3-mini EIF (3, 4)"), contains="did you mean")
test_fail(lambda: reward_curves(mine, split="dev"), contains="unknown split 'dev'")

# %% [markdown]
# ## A run to look at
#
# The other pictures need trajectories. A script that multiplies, and gets better with each fine-tuning, gives them in a second; with a model nothing below would read differently.

# %%
tables = [Question(f"{a}x{b}", f"What is {a} times {b}?", (str(a * b),)) for a in range(2, 12) for b in range(2, 12)]
def pupil(prompt, rng, skill):
    "Right with a probability that grows with skill; a correction repeats the first answer, or tries again."
    a, b = map(int, re.findall(r"What is (\d+) times (\d+)\?", prompt)[-1])
    first = re.findall(r"Final Answer: (\d+)", prompt.split("Initial answer")[-1])
    if first and rng.random() < .3 + .05 * skill: return f"I said so before. Final Answer: {first[-1]}"
    answer = a * b if rng.random() < .3 + .07 * skill + .1 * bool(first) else a * b + rng.choice([-b, -1, 1, b])
    return f"{'Let me see. ' * rng.randrange(1, 7 - min(skill, 5))}Final Answer: {answer}"

# %%
tmp = tempfile.TemporaryDirectory()
def scripted(variant, **options):
    "A run by the pupil."
    cfg = Config(variant=variant, iterations=5, n_init=2, n_corr=3, shots=0, model="pupil").replace(**options)
    return STaSC(cfg, Path(tmp.name)/f"{variant}{options}", data=Data(tables[::2], tables[1::2]), engine=ScriptedEngine(pupil), callbacks=[]).run()
run = scripted("EIE")
reward_curves(run)

# %% [markdown]
# A published curve, or any other run, may lie behind a run's own:

# %%
reward_curves(scripted("FIE"), split="test", paper="Phi-3-mini FIE (1, 5)")

# %% [markdown]
# ## Variants side by side
#
# The paper's Figures 2 to 4: a column of panels for each model, a row each for Evolving and for Fixed Initialization, a line for each variant. Stroke and marker belong to the variant and stay the same in every picture.

# %%
#| export
_VARIANT_STYLES = dict(IE=dict(color=BLUE, marker="o", ls="-"), IF=dict(color=RED, marker="s", ls=(0, (6, 1.5))),
                       NE=dict(color=GREEN, marker="^", ls=(0, (4, 1.5, 1, 1.5))), NF=dict(color=PURPLE, marker="D", ls=(0, (1.2, 1.2))))
_DASHES = ["-", (0, (6, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1.2, 1.2)), (0, (8, 2, 2, 2))]

def _line_style(k):
    "A style for line k; the first 280 all differ."
    return dict(color=[BLUE, RED, GREEN, PURPLE, BLACK, ORANGE, SKY][k % 7], marker="osD^vPX<"[k % 8], ls=_DASHES[k % 5])

def _facts(run):
    c = getattr(run, "cfg", run)
    return {k: getattr(c, k, None) for k in ("model", "variant", "n_init", "n_corr", "filter", "seed")}

def _line_names(runs, own_names):
    "What each line of a panel is called: the variant, and what else it takes to tell it from the others; or the name it was given."
    facts = {n: _facts(r) for n, r in runs.items()}
    if own_names or any(f["variant"] is None for f in facts.values()): return {n: plain(n, 14) for n in runs}
    more = [k for k in ("filter", "n_init", "n_corr", "seed") if len({f[k] for f in facts.values() if f["variant"]}) > 1]
    words = dict(filter="{}", n_init="N_init {}", n_corr="N_corr {}", seed="seed {}")
    out = {n: ", ".join([f["variant"], *(words[k].format(f[k]) for k in more if f[k] is not None)]) for n, f in facts.items()}
    return {n: plain(t if list(out.values()).count(t) == 1 else n, 20) for n, t in out.items()}

# %%
#| export
def _series(run, measure, split="test"):
    "A measure by iteration: from metrics where it stands there, else from the trajectories."
    m = run.metrics
    for c in (measure, f"{split}_{measure}"):
        if c in m: return m[c].dropna()
    if measure not in MEASURES: raise DataError(unknown("measure", measure, [*MEASURES, "n_kept"]))
    return by_iteration(run, split, n_boot=1)[measure].dropna()

def _panels(runs):
    "Runs by (row, column): Evolving before Fixed Initialization, models in their order."
    out = {}
    for n, r in runs.items():
        out.setdefault((str(_facts(r)["variant"])[:1], _model(r)), {})[n] = r
    rows, columns = [x for x in ("E", "F", "N") if any(k[0] == x for k in out)], list(dict.fromkeys(k[1] for k in out))
    return rows, columns, out

# %%
#| export
@_drawn
def side_by_side(runs,                          # dict of names, or list; published runs among them
                 measure="acc_t2",              # one of `MEASURES`, or "n_kept"; a pair draws both, the first one faintly
                 split: str = "test",           # or "train"
                ):                              # matplotlib Figure
    "A measure by iteration, with a panel for each model and kind of initialization."
    _check_split(split)
    measures, (rows, columns, panels) = [measure] if isinstance(measure, str) else list(measure), _panels(_several(runs))
    fig, axes = _new(max(7, 5 * len(columns)), max(3.9, *(.2 * len(x) + 1.6 for x in panels.values()), 0) * len(rows) + .4, len(rows), len(columns), sharey="col")
    words, told, ends = " and ".join(map(_words, measures)), [], {}
    for (i, r), (j, c) in itertools.product(enumerate(rows), enumerate(columns)):
        ax, inside = axes[i, j], panels.get((r, c), {})
        if not inside: ax.set_axis_off(); continue
        lines, ends[ax] = _draw_panel(ax, inside, measures, split, isinstance(runs, dict))
        told.append(f"{', '.join(x for x in (_told(c), _INITIALIZATION[r]) if x) or 'Runs'}: {lines}.")
        ax.set_title("\n".join(x for x in (plain(c, 20), _INITIALIZATION[r]) if x))
        if not any(panels.get((r, x)) for x in columns[:j]): ax.set_ylabel(words if len(measures) == 1 else "mean reward")
    if len(measures) > 1:
        for m, style in zip(measures, (dict(lw=1.2, mfc="white", ls=":", marker="o"), dict(marker="o"))): ax.plot([], [], color=_FAINT, label=_words(m), **style)
        _legend(fig)
    _label_ends(fig, {ax: _with_digits(ax, e) for ax, e in ends.items()})
    return fig, f"{words} on {_SPLITS[split]}, by iteration. {' '.join(told)}"

# %%
#| export
_INITIALIZATION = dict(E="Evolving Initialization", F="Fixed Initialization", N="")
def _words(measure): return dict(MEASURES, n_kept="kept corrections", acc_t1="r(Ŷ¹), initial answers", acc_t2="r(Ŷ²), corrections").get(measure, str(measure))

def _with_digits(ax, ends):
    "Labels with values, to as many digits as tell them apart on this axis."
    low, high = ax.get_ylim()
    digits = 0 if high > 20 else 3 if high - low < .3 else 2
    return [(l, f"{name} {_end(l)[1]:.{digits}f}") for l, name in ends]

def _draw_panel(ax, runs, measures, split, own_names):      # what is to be told; ends of lines
    "The lines of one panel."
    names, ends, told = _line_names(runs, own_names), [], []
    alone = len({_facts(r)["variant"] for r in runs.values()}) == len(runs)         # each variant once: its own style
    for k, (n, r) in enumerate(runs.items()):
        style = (alone and _VARIANT_STYLES.get(str(_facts(r)["variant"])[1:])) or _line_style(k)
        for i, measure in enumerate(measures):
            v, faint = _series(r, measure, split), i < len(measures) - 1
            if v.empty: continue
            line, = ax.plot(v.index, v, **style | (dict(lw=1.2, ms=5, mfc="white", ls=":") if faint else dict(markeredgecolor="white", markeredgewidth=.8)))
            told.append(f"{_told(n) if own_names else names[n]} {f'{_words(measure)} ' * (len(measures) > 1)}{_from_to(v, 0 if measure == 'n_kept' else 3)}")
            if not faint: ends.append((line, names[n]))
    _axis(ax, max(r.metrics.index[-1] for r in runs.values()))
    return ", ".join(told), ends

# %%
qwen = published("qwen")
fig = side_by_side(qwen)
fig

# %%
print(fig.alt)

# %% [markdown]
# Figure 4 lays corrections over the initial answers they start from:

# %%
side_by_side([r for r in qwen if r.variant in ("EIE", "EIF")], ("acc_t1", "acc_t2"))

# %%
#| hide
test_fail(lambda: side_by_side(qwen, "accuracy"), contains="unknown measure")
assert "i→c" in side_by_side({"a": run}, "i_to_c").alt

# %% [markdown]
# ## Heat map of $N_{init} \times N_{corr}$
#
# The paper's Table 1 as a picture, from `paper_table` of one's own runs or from what is printed. The figure stands in its cell, with the deviation over iterations where there is one; a cell without a run is hatched, so that it cannot be taken for a low value. Each model has a scale of its own, since models differ by more than the cells of one.

# %%
#| export
def _on(colour):
    "Black or white, whichever reads better on a colour."
    from matplotlib.colors import to_rgb
    rgb = [c / 12.92 if c <= .04045 else ((c + .055) / 1.055)**2.4 for c in to_rgb(colour)]
    return "black" if np.dot(rgb, [.2126, .7152, .0722]) > .18 else "white"

@_drawn
def heatmap(table,                              # of `paper_table` or `printed_tables`; or runs
            value: str = "max_correction",      # column to show; VALUE_sd is shown beside it
           ):                                   # matplotlib Figure
    "A figure for each N_init and N_corr, with a panel for each model and variant."
    if not isinstance(table, pd.DataFrame): table = _table(table)
    numbers = [c for c in table if pd.api.types.is_numeric_dtype(table[c]) and c not in ("n_init", "n_corr")]
    if value not in numbers: raise DataError(unknown("column", value, numbers))
    if table.empty or (lacking := [c for c in ("n_init", "n_corr") if c not in table]): raise DataError(f"the table has no {'rows' if table.empty else ' and '.join(lacking)}, so there is no grid to draw")
    groups = list(table.groupby([c for c in ("model", "variant") if c in table] or (lambda _: 0), sort=False, dropna=False))
    shape = [sorted(table[c].unique()) for c in ("n_init", "n_corr")]
    fig, axes = _new(max(5, (1.5 * len(shape[1]) + 1.5) * len(groups)), 1.05 * len(shape[0]) + 2, 1, len(groups))
    told = [_draw_grid(fig, ax, key if isinstance(key, tuple) else (key,), rows, value, shape) for ax, (key, rows) in zip(axes[0], groups)]
    words = _VALUES.get(value, value)
    fig.suptitle(plain(words, 45), x=.01, ha="left")
    return fig, f"{words} by N_init and N_corr. {' '.join(told)}"

# %%
#| export
def _table(runs):
    "Rows for runs; one with a filter of its own counts as another variant."
    table, filters = paper_table(runs), [_facts(r)["filter"] for r in named_runs(runs).values()]
    return table.assign(variant=[f"{v}, filter {f}" if f else v for v, f in zip(table.variant, filters)])

_VALUES = dict(max_correction="max r(Ŷ²) over iterations", max_initial="max r(Ŷ¹) over iterations")

def _draw_grid(fig, ax, key, rows, value, shape):       # what is to be told
    "One panel of the heat map."
    from matplotlib.patches import Rectangle
    mean = lambda c: rows.groupby(["n_init", "n_corr"])[c].mean().unstack().reindex(index=shape[0], columns=shape[1]) if c in rows else None
    v, sd, told = mean(value), mean(f"{value}_sd"), []
    image = ax.imshow(np.ma.masked_invalid(v.to_numpy(float)), cmap="cividis", aspect="auto")
    for (i, a), (j, b) in itertools.product(enumerate(v.index), enumerate(v.columns)):
        x, n = v.iloc[i, j], int(((rows.n_init == a) & (rows.n_corr == b) & rows[value].notna()).sum())
        if np.isnan(x): ax.add_patch(Rectangle((j - .5, i - .5), 1, 1, fc="white", ec=_FAINT, hatch="///", lw=0))
        text = "none" if np.isnan(x) else f"{x:.3f}" + (f"\n± {sd.iloc[i, j]:.3f}" if n == 1 and sd is not None and sd.iloc[i, j] == sd.iloc[i, j] else f"\nmean of {n}" * (n > 1))
        ax.text(j, i, text, ha="center", va="center", color="black" if np.isnan(x) else _on(image.cmap(image.norm(x))), bbox=dict(fc="white", ec="none", pad=1.5) if np.isnan(x) else None)
        told.append(f"({a}, {b}) {text.splitlines()[0]}")
    ax.set(xticks=range(len(shape[1])), xticklabels=shape[1], yticks=range(len(shape[0])), yticklabels=shape[0], xlabel="N_corr", ylabel="N_init")
    ax.grid(False); ax.tick_params(length=0)
    name = [Path(str(k)).name for k in key if k == k and k is not None and k != 0]
    ax.set_title("\n".join(plain(k, 7.5 * len(shape[1]) + 3) for k in name)); fig.colorbar(image, ax=ax, shrink=.9)
    return f"{_told(', '.join(name)) or 'All runs'}: {', '.join(told)}."

# %%
from stasc.paper import printed_tables
fig = heatmap(printed_tables()[0])
fig

# %%
#| hide
assert "Qwen2.5-1.5B-Instruct, EIF: (1, 1) none" in fig.alt and "(5, 5) 0.376" in fig.alt
test_fail(lambda: heatmap(printed_tables()[0], "max"), contains="unknown column 'max'")

# %% [markdown]
# ## Right and wrong
#
# What corrections do to answers, by iteration: those that were right and stay right, those that are mended, those that are spoiled, those that stay wrong. The two lower parts of a bar make up Accuracy@t2. A run may gain while it also spoils more than at the start; the two curves alone do not show that.

# %%
#| export
def _stack(ax, shares, styles):         # shares: index iteration, a column for each part
    "Stacked bars, each share written where there is room."
    bottom, room = np.zeros(len(shares)), len(shares) <= 13
    for c in shares:
        v, (colour, hatch) = shares[c].to_numpy(float), styles[c]
        ax.bar(shares.index, v, .84, bottom, color=colour, hatch=hatch, edgecolor="white", lw=.8, label=_key(c, 14))
        for x, b, h in zip(shares.index, bottom, v):
            if room and h >= .055: ax.text(x, b + h / 2, f"{h:.0%}", ha="center", va="center", size=11, color=_on(colour), bbox=dict(fc=colour, ec="none", pad=.8))
        bottom += v
    ax.set_ylim(0, 1); ax.set_yticks([0, .25, .5, .75, 1], ["0%", "25%", "50%", "75%", "100%"])
    ax.spines[:].set_visible(False); ax.grid(False)
    _axis(ax, shares.index[-1]); ax.set_xlim(-.5, shares.index[-1] + .5)
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(handles[::-1], labels[::-1], loc="outside right center", handleheight=1.4)

@_drawn
def transitions(run, split: str = "test"):      # matplotlib Figure
    "Shares of corrections by whether the initial answer was right and whether the correction is."
    _check_split(split)
    (name, m), t = _one(run), by_iteration(_rows(run), split, _threshold(run), n_boot=1)
    shares = pd.DataFrame({"right → right": t.right_right, "wrong → right": t.i_to_c, "right → wrong": t.c_to_i, "wrong → wrong": t.wrong_wrong})
    fig, axes = _new(8, 4.3)
    _stack(axes[0, 0], shares, {c: s for c, s in zip(shares, ((GREEN, ""), (SKY, "//"), (RED, "xx"), ("#C8C8C8", "..")))})
    axes[0, 0].set(title=f"{plain(name, 36)}\n{_SPLITS[split]}", ylabel="share of corrections")
    return fig, f"What corrections of {_told(name)} do on {_SPLITS[split]}, {_iterations(m)}: {', '.join(f'{c} {_from_to(shares[c])}' for c in shares)}."

# %%
fig = transitions(run)
fig

# %%
print(fig.alt)

# %%
#| hide
test_fail(lambda: transitions(mine), contains="has no trajectories")

# %% [markdown]
# ## Kept corrections
#
# How many corrections each model learned from. A single run shows the counts themselves and their share of all pairs on training questions; several runs are lines, on a logarithmic axis where they lie far apart.

# %%
#| export
def _pairs(run):
    "How many pairs each model's corrections were chosen from; NaN where the pairing is not known."
    cfg, m = getattr(run, "cfg", None), run.metrics
    return m.train_n.shift(1) * (cfg.n_init if cfg.pairing == "crossed" else 1) if cfg else pd.Series(np.nan, m.index)

@_drawn
def kept_counts(runs):          # matplotlib Figure
    "Kept corrections by the iteration that learned from them."
    named = {n: r.metrics.n_kept.iloc[1:].dropna() for n, r in _several(runs).items()}
    named = {n: v for n, v in named.items() if len(v)}
    if not named: raise DataError("no corrections have been filtered yet, so there are no counts to draw: run at least one iteration")
    fig, axes = _new(7, max(4.2, .2 * len(named) + 1.6))
    ax, last = axes[0, 0], max(v.index[-1] for v in named.values())
    if len(named) == 1: _draw_bars(ax, *next(iter(named.items())), _pairs(next(iter(_several(runs).values()))))
    else:
        lines = [ax.plot(v.index, v, **s, markeredgecolor="white", markeredgewidth=.8)[0] for v, s in zip(named.values(), map(_line_style, itertools.count()))]
        low, high = min(v.min() for v in named.values()), max(v.max() for v in named.values())
        if high > 20 * max(low, 1): _far_apart(ax, low)
        else: ax.set_ylim(0, 1.1 * max(high, 1))
        ax.yaxis.set_major_formatter("{x:,.0f}")
    _axis(ax, last, "iteration n (Mₙ learned from them)"); ax.set_xlim(*((.4, last + .6) if len(named) == 1 else (.8 - .02 * last, None)))
    ax.set(ylabel="kept corrections", title="" if len(named) > 1 else plain(next(iter(named)), 45))
    if len(named) > 1: _label_ends(fig, {ax: [(l, f"{plain(n, 16)} {v.iloc[-1]:,.0f}") for l, (n, v) in zip(lines, named.items())]})
    return fig, f"Kept corrections by iteration: {'; '.join(f'{_told(n)} {_from_to(v, 0)}' for n, v in named.items())}."

def _far_apart(ax, low):
    from matplotlib.ticker import LogLocator, NullLocator, SymmetricalLogLocator
    ax.set_yscale("log" if low > 0 else "symlog")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if low > 0 else SymmetricalLogLocator(base=10, linthresh=2))
    ax.yaxis.set_minor_locator(NullLocator())

def _draw_bars(ax, name, kept, pairs):
    bars = ax.bar(kept.index, kept, .7, color=BLUE)
    share = (kept / pairs.reindex(kept.index)).map(lambda x: f"\n{x:.0%}" if x <= 1 else "")
    if len(kept) <= 11: ax.bar_label(bars, [f"{k:,.0f}{s}" for k, s in zip(kept, share)], padding=2, size=11)
    ax.margins(y=.16); ax.yaxis.set_major_formatter("{x:,.0f}")

# %%
kept_counts(run)

# %%
kept_counts(published("phi", "EIF"))

# %% [markdown]
# ## Does keeping more help?
#
# Each point is an iteration: how many corrections of $M_n$ were kept, and by how many points its successor corrects better. The paper reads a negative correlation from such points (Section 4.2). Points of one run are not independent of each other, so the p value is a description rather than a test.

# %%
#| export
@_drawn
def correlation(runs):          # matplotlib Figure
    "Kept corrections against the next change of test accuracy, with the correlation of all points."
    _several(runs)
    c, r = kept_changes(runs), kept_correlation(runs)
    if c.empty: raise DataError("no run has two iterations yet, so there is no change to draw: run at least one iteration")
    fig, axes = _new(8, max(4.4, .27 * c.run.nunique() + .6))
    ax = axes[0, 0]
    ax.axhline(0, color=_FAINT, lw=1)
    for (name, g), style in zip(c.groupby("run", sort=False), map(_line_style, itertools.count())):
        ax.plot(g.n_kept, g.next_change, ls="", color=style["color"], marker=style["marker"], ms=8, alpha=.85, mec="white", label=_key(name, 17))
    if np.isfinite(r["pearson_r"]):
        ends = np.array([c.n_kept.min(), c.n_kept.max()])
        ax.plot(ends, np.polyval(np.polyfit(c.n_kept, c.next_change, 1), ends), color=BLACK, lw=1.3, ls="--")
    ax.set(xlabel="kept corrections of Mₙ", ylabel="next change of r(Ŷ²), points", title=(words := _correlation_words(r)))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    if c.run.nunique() > 1: fig.legend(loc="outside right center", handletextpad=.1)
    return fig, f"Kept corrections against the next change of test accuracy@t2, {c.run.nunique()} run{'s' * (c.run.nunique() > 1)}. {words}."

def _correlation_words(r):
    p = lambda x: "p < 0.001" if x < .001 else f"p = {x:.3f}"
    if not np.isfinite(r["pearson_r"]): return f"n = {r['n']}, too few different points for a correlation"
    return f"Pearson r = {r['pearson_r']:.2f}, {p(r['pearson_p'])}; Spearman ρ = {r['spearman_r']:.2f}, {p(r['spearman_p'])}; n = {r['n']}".replace("= -", "= −")

# %%
correlation(published("phi", "EIF"))

# %% [markdown]
# ## Signs of collapse
#
# A model that trains on its own texts may fall into a rut before the reward shows it: answers that shrink to nothing or grow until they are cut off, and corrections that copy the initial answer word for word. Initial answers are counted once, however many corrections they got.

# %%
#| export
def alarm_rates(run,                    # a run, or a table of trajectories
                split: str = "test",    # or "train"
               ) -> pd.DataFrame:       # index iteration; init_tokens, corr_tokens (means), repeats, init_cut_off, corr_cut_off (shares)
    "Length of texts, and how many are copies or cut off, by iteration."
    rows = run if isinstance(run, pd.DataFrame) else _rows(run)
    _check_split(split)
    corr = rows[rows["split"] == split]
    init = corr.drop_duplicates(["iteration", "question_id", "init_index"])
    same = pd.Series([a.split() == b.split() for a, b in zip(corr.init_text, corr.corr_text)], corr.index, dtype=bool)
    by = lambda x, t: x.groupby(t["iteration"]).mean()
    return pd.DataFrame(dict(init_tokens=by(init.init_n_tokens, init), corr_tokens=by(corr.corr_n_tokens, corr), repeats=by(same, corr),
                             init_cut_off=by(init.init_finish_reason == "length", init), corr_cut_off=by(corr.corr_finish_reason == "length", corr)))

# %%
alarm_rates(run)

# %%
#| export
_ALARMS = [("mean length, tokens", ("init_tokens", "corr_tokens")), ("corrections that repeat the initial answer word for word", ("repeats",)), ("cut off at the limit of tokens", ("init_cut_off", "corr_cut_off"))]

@_drawn
def alarms(run, split: str = "test"):       # matplotlib Figure
    "Answer length, share of corrections that repeat the initial answer, and share of texts cut off, by iteration."
    (name, m), t = _one(run), alarm_rates(run, split)
    fig, axes = _new(7, 7.4, 3, 1, sharex=True)
    for ax, (title, columns) in zip(axes[:, 0], _ALARMS):
        for c in columns:
            label, style = _LINES["acc_t1" if c.startswith("init") else "acc_t2"]
            ax.plot(t.index, t[c], **style, label=label, markeredgecolor="white", markeredgewidth=.8)
        ax.set_title(title); _axis(ax, _last(run), "")
        if len(columns) and "tokens" in columns[0]: ax.set_ylim(0, 1.1 * max(1, np.nanmax(t[list(columns)])))
        else: ax.set_ylim(-.09, 1.07); ax.set_yticks([0, .5, 1], ["0%", "50%", "100%"])
    _axis(axes[-1, 0], _last(run))
    fig.suptitle(f"{plain(name, 32)}, {_SPLITS[split]}", x=.01, ha="left"); _legend(fig)
    _label_ends(fig, {ax: [(l, f"{_end(l)[1]:{'.0f' if i == 0 else '.0%'}}") for l in ax.lines] for i, ax in enumerate(axes[:, 0])})
    told = (f"{words} {_from_to(t[c], 1 if 'tokens' in c else 3)}" for c, words in zip(t, ("tokens of initial answers", "tokens of corrections",
            "share of corrections that repeat the initial answer", "share of initial answers cut off", "share of corrections cut off")))
    return fig, f"Signs of collapse in {_told(name)} on {_SPLITS[split]}, {_iterations(m)}: {', '.join(told)}."

# %%
alarms(run)

# %% [markdown]
# ## Patterns of correction
#
# What corrections did, by the rules of `stasc.patterns`, as shares of an iteration's trajectories. With more than eight patterns the rarest are drawn as one.

# %%
#| export
_AREAS = [(BLUE, ""), (RED, "xx"), ("#C8C8C8", ".."), (YELLOW, "//"), (SKY, "\\\\"), (GREEN, "||"), (PURPLE, "--"), (ORANGE, "++")]

@_drawn
def pattern_shares(labelled,                # made by `label`; or a run
                   split: str = "train",    # or "test"
                  ):                        # matplotlib Figure
    "Shares of the correction patterns by iteration."
    _check_split(split)
    name = "" if isinstance(labelled, pd.DataFrame) else _one(labelled)[0]
    if name: labelled = label(_rows(labelled), getattr(labelled, "data", None), _threshold(labelled))
    shares = pattern_counts(labelled, split, share=True)
    shares = shares.loc[:, shares.any()]
    if shares.empty: raise DataError(f"there are no trajectories on {_SPLITS[split]}, so there are no patterns to draw")
    common = shares.mean().nlargest(7).index if shares.shape[1] > 8 else shares.columns
    if len(common) < shares.shape[1]: shares = shares[[c for c in shares if c in common]].assign(**{"all others": shares.drop(columns=common).sum(axis=1)})
    fig, axes = _new(8, 4.3)
    _stack(axes[0, 0], shares, dict(zip(shares, _AREAS)))
    axes[0, 0].set(title=f"{plain(name, 36)}\n{_SPLITS[split]}".strip(), ylabel="share of corrections")
    return fig, f"Correction patterns{f' of {_told(name)}' * bool(name)} on {_SPLITS[split]}, {_iterations(shares)}: {', '.join(f'{_told(c)} {_from_to(shares[c])}' for c in shares)}."

# %%
fig = pattern_shares(run)
fig

# %%
print(fig.alt)

# %% [markdown]
# ## Saving
#
# By the ending of the name, in one piece or not at all; and as an `<img>` for pages, which needs no file beside it.

# %%
#| export
def save(fig,                   # a picture of this module, or any matplotlib Figure
         path: str|Path,        # ends in .png or .svg
        ):
    "Write a picture to a file, its alt text in it."
    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg"): raise StoreError(f"{path}: a picture is saved as .png or .svg, not as {kind or 'a file without suffix'}; give the name another ending")
    data = _bytes(fig, kind[1:])
    with whole(path) as tmp: tmp.write_bytes(data)

def figure_html(fig,            # a picture of this module, or any matplotlib Figure
                kind: str = "svg",      # or "png", which is smaller where there are many points
               ) -> str:        # an <img> that needs no file beside it
    "A picture with its alt text for a page; its size is given, so that nothing moves when it loads."
    w, h = (round(100 * x) for x in fig.get_size_inches())
    data = f"png;base64,{_small_png(fig)}" if kind == "png" else f"svg+xml;base64,{base64.b64encode(_bytes(fig, 'svg')).decode()}"
    return (f'<img alt="{html.escape(_told(getattr(fig, "alt", ""), 100_000))}" width="{w}" height="{h}" decoding="sync" style="max-width:100%;height:auto" '
            f'src="data:image/{data}">')

# %%
where = Path(tmp.name)
save(fig, where/"patterns.svg"); save(fig, where/"patterns.png")
print((where/"patterns.svg").read_text(encoding="utf-8").split("<metadata>")[0][-700:])

# %%
#| hide
from PIL import Image
test_eq(Image.open(where/"patterns.png").info["Description"], fig.alt)
before = (where/"patterns.svg").read_bytes(), (where/"patterns.png").read_bytes()
save(pattern_shares(run), where/"patterns.svg"); save(pattern_shares(run), where/"patterns.png")
test_eq(((where/"patterns.svg").read_bytes(), (where/"patterns.png").read_bytes()), before)
assert figure_html(fig).startswith('<img alt="Correction patterns of pupil EIE')

# %% [markdown]
# Any other ending is refused before anything is written:

# %%
try: save(fig, "patterns.jpg")
except StoreError as e: print(e)

# %% [markdown]
# A name may be as hostile as it likes; it stays a name:

# %%
with warnings.catch_warnings():
    warnings.simplefilter("error")
    fig = side_by_side({"$$x^2$$ <script>": run, "\u202egnp.exe " + "long " * 60: scripted("EIF"), "😀 实验": scripted("ENE")})
fig

# %%
#| hide
tmp.cleanup()
import nbdev; nbdev.nbdev_export()
