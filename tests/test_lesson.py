"The lesson and the quickstart as their readers meet them: first results early, every picture told in words, and no figure in the prose that no output shows."
import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from stasc.core import all_variants

tutorials = Path(__file__).resolve().parents[1] / "nbs/tutorials"
both = pytest.mark.parametrize("name", ["teach_self_correction", "quickstart"])


@cache
def cells(name):
    "(kind, source, outputs) of each cell."
    nb = json.loads((tutorials / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [(c["cell_type"], "".join(c["source"]), c.get("outputs", [])) for c in nb["cells"]]


def prose(name):
    return "\n".join(s for kind, s, _ in cells(name) if kind == "markdown")


def code(name):
    "Cells that a reader sees run."
    return [(s, o) for kind, s, o in cells(name) if kind == "code" and "#| hide" not in s]


def texts(outputs):
    "What outputs show, in words."
    for o in outputs:
        yield "".join(o.get("text", ""))
        for mime, data in o.get("data", {}).items():
            if mime.startswith("text/"):
                yield "".join(data)
        yield o.get("metadata", {}).get("image/png", {}).get("alt", "")


def shown(name):
    return "\n".join(t for *_, outputs in cells(name) for t in texts(outputs))


def table(html):
    "The rows of a table that pandas drew: row name -> cells."
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.S)
    strip = [[re.sub(r"<[^>]+>", "", c).strip() for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r, re.S)] for r in rows]
    return {r[0]: r[1:] for r in strip if r and r[0]}


def first_table(name, word):
    return next(table("".join(o["data"]["text/html"])) for s, outputs in code(name) if word in s for o in outputs if "text/html" in o.get("data", {}))


def questions(text):
    "(number, question, answer) of each question with a folded answer."
    form = r"\*\*Question (\d+)\.\*\*(.*?)<details><summary>Answer</summary>\n\n(.*?)\n\n</details>"
    return re.findall(form, text, re.S)


def test_answers_are_folded_away():
    text = prose("teach_self_correction")
    found = questions(text)
    assert len(found) >= 6
    assert [int(n) for n, *_ in found] == list(range(1, len(found) + 1)), "a question lacks its answer, or they are out of order"
    assert len(re.findall("<details", text)) == len(re.findall("</details>", text)) == len(found)
    for n, question, answer in found:
        assert "?" in question, f"question {n} asks nothing"
        assert len(answer.split()) > 15 and "<details" not in question + answer, f"question {n}"


def test_an_hour():
    rows = re.findall(r"^\| (\d) \| (.+?) \| (\d+) \|$", prose("teach_self_correction"), re.M)
    assert sum(int(minutes) for *_, minutes in rows) == 60
    headings = re.findall(r"^## (\d)\. (.+)$", prose("teach_self_correction"), re.M)
    assert [n for n, _ in headings] == [n for n, *_ in rows]


def test_six_short_cells():
    "Each step of the algorithm has its cell, and it is one that can be read at a glance."
    steps, before = {}, ""
    for kind, source, _ in cells("teach_self_correction"):
        if kind == "code" and (found := re.findall(r"\*\*Step (\d): ", before)):
            steps[int(found[-1])] = source
        before = source if kind == "markdown" else ""
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    for n, source in steps.items():
        assert len(source.strip().splitlines()) <= 9, f"step {n} is long"
        assert not {"apply_filter", "STaSC"} & {x.id for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Name)}, f"step {n} leaves the work to the library"


def test_checked_against_the_library():
    "Every variant by hand is compared with the library's run, and the filter with the library's."
    source = "\n".join(s for s, _ in code("teach_self_correction"))
    asserts = [ast.unparse(x) for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Assert)]
    assert any("theirs(" in a and "by_hand" in a for a in asserts)
    assert any("theirs(" in a and "library(v)" in a for a in asserts)
    assert any("verdict.kept" in a for a in asserts)


def test_eight_variants_are_those_measured():
    "The table that the lesson quotes is what the notebook of the variants has in its outputs."
    quoted = first_table("teach_self_correction", "measured = ")
    measured = first_table("eight_variants", "s.brief()")
    for v in map(str, all_variants()):
        initial, correction = (float(c.split()[0]) for c in measured[v][1:3])
        assert [float(x) for x in quoted[v]] == [initial, correction, pytest.approx(correction - initial, abs=.0011)], v


def test_figures_in_the_prose_are_measured():
    "Three decimals in the prose of the lesson stand in an output, there or where it says it has them from; or follow from the four counts."
    four = first_table("teach_self_correction", "pd.crosstab")
    (rr, rw), (wr, ww) = ([int(x) for x in four[k]] for k in ("right", "wrong"))
    n = rr + rw + wr + ww
    follow = {f"{x:.3f}" for x in ((rr + rw) / n, (rr + wr) / n, (rr + rw + wr) / n, abs(wr - rw) / n)}
    there = set(re.findall(r"\d\.\d{3}(?!\d)", shown("teach_self_correction") + shown("eight_variants")))
    quoted = set(re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", prose("teach_self_correction")))
    assert len(quoted) > 10
    assert not quoted - there - follow


@both
def test_first_result_by_the_fifth_code_cell(name):
    assert any(outputs for _, outputs in code(name)[:5])
    assert not any("#| slow" in s for s, _ in code(name)[:5])


def test_quickstart_curve_by_the_fifth_code_cell():
    "A picture whose words tell of first answers that rise."
    alt = next(t for _, outputs in code("quickstart")[:5] for o in outputs if "image/png" in o.get("data", {}) for t in texts([o]) if "to" in t)
    first, last = map(float, re.search(r"initial answers (0\.\d+) to (0\.\d+)", alt).groups())
    assert last > first + .25


def test_quickstart_goes_on():
    "Curve, one question, browser, real model: in this order; and on to the walk-throughs beside it."
    order = ["reward_curves(run)", "## One question", "run.browse(split", "## Now with a real model"]
    text = "\n".join(s for _, s, _ in cells("quickstart"))
    at = [text.index(o) for o in order]
    assert at == sorted(at)
    for link in ("colab_qlora", "teach_self_correction", "your_own_task"):
        assert f"]({link}.ipynb)" in prose("quickstart"), link


@both
def test_pictures_are_told_in_words(name):
    pictures = [o for _, outputs in code(name) for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    for o in pictures:
        alt = o["metadata"].get("image/png", {}).get("alt", "")
        assert len(alt.split()) > 10 and re.search(r"\d\.\d", alt), alt


@both
def test_each_cell_is_led_up_to(name):
    "A code cell that a reader sees has prose before it; imports may follow the opening."
    before = None
    for kind, source, _ in cells(name):
        if kind == "code" and "#| hide" not in source:
            assert before == "markdown", source
        if "#| hide" not in source:
            before = kind


@both
def test_outputs_are_kept_and_none_is_an_error(name):
    for source, outputs in code(name):
        assert not any(o["output_type"] == "error" for o in outputs), source
        if "#| slow" in source:
            assert outputs, f"the kept output is missing: {source}"


@both
def test_no_link_of_its_own_is_dead(name):
    for target in re.findall(r"\]\(([^)#\s]+\.ipynb)", prose(name)):
        assert (tutorials / target).exists(), target
