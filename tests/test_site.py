"The site: the check of pages, links and alt texts finds what is wrong, says it in one sentence, and raises no false alarm."
import importlib.util
import io
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("ci_pages", root / ".ci/pages.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


def markdown(text, id="m"):
    return dict(cell_type="markdown", id=id, source=text.splitlines(True))


def code(*outputs, id="c"):
    return dict(cell_type="code", id=id, source=["draw()"], outputs=list(outputs))


def shown(data, **metadata):
    return dict(output_type="display_data", data=data, metadata=metadata)


HEAD = markdown("# Title\n\n> What it is for")


def write(folder, name, *cells, head=HEAD):
    path = folder / "nbs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(metadata={}, cells=[*([head] if head else []), *cells])), encoding="utf-8")


def list_pages(folder, contents):
    (folder / "_quarto.yml").write_text(yaml.safe_dump(dict(website=dict(sidebar=dict(contents=contents)))), encoding="utf-8")


@pytest.fixture
def site(tmp_path):
    "A small repository without a fault."
    write(tmp_path, "index.ipynb", markdown("## How it works\n\n## How it works\n\n## A `run`: 3 *steps*, 2.5 s {#given .x}\n\n### 1. Über [das](https://a.org) Ziel_2"))
    write(tmp_path, "tutorials/start.ipynb", code())
    list_pages(tmp_path, ["index.ipynb", dict(section="Learn", contents=[dict(href="tutorials/start.ipynb", text="Start")])])
    (tmp_path / "nbs/images").mkdir()
    (tmp_path / "nbs/images/a b.png").touch()
    (tmp_path / "stasc").mkdir()
    (tmp_path / "README.md").write_text("# x\n\n## How it works?\n\n[there](#how-it-works) [y](nbs/index.ipynb#how-it-works-1)", encoding="utf-8")
    return tmp_path


def only(folder):
    "The one fault of a repository."
    found = list(pages.faults(folder))
    assert len(found) == 1, found
    assert found[0].endswith(".") and "\n" not in found[0]
    return found[0]


def test_the_repository_has_no_fault():
    assert list(pages.faults()) == []


def test_a_small_site_has_no_fault(site):
    assert list(pages.faults(site)) == []


# --- the list of pages

def test_a_page_that_is_not_listed(site):
    write(site, "new.ipynb")
    assert "nbs/new.ipynb stands nowhere in _quarto.yml" in only(site)


def test_a_page_that_is_listed_twice(site):
    list_pages(site, ["index.ipynb", "tutorials/start.ipynb", dict(section="x", href="index.ipynb", contents=[])])
    assert "lists index.ipynb 2 times" in only(site)


def test_an_entry_without_a_page(site):
    list_pages(site, ["index.ipynb", "tutorials/start.ipynb", dict(section="x", contents=["gone.ipynb"])])
    assert "lists gone.ipynb, which is no notebook" in only(site)


@pytest.mark.parametrize("contents", ["tutorials/*.ipynb", "auto"])
def test_pages_listed_by_a_pattern(site, contents):
    list_pages(site, ["index.ipynb", "tutorials/start.ipynb", dict(section="x", contents=contents)])
    assert f"by a pattern, {contents}" in only(site)


def test_hidden_folders_are_no_pages(site):
    write(site, ".ipynb_checkpoints/index.ipynb", head=None)
    write(site, "_drafts/x.ipynb", head=None)
    assert list(pages.faults(site)) == []


# --- title and quote

@pytest.mark.parametrize("head", [None, markdown("# Title"), markdown("> quote"), markdown("## Title\n\n> quote"), markdown("#Title\n\n> quote"),
                                  markdown("# Title\n\nProse first.\n\n> quote"), code()])
def test_a_page_without_title_and_quote(site, head):
    write(site, "tutorials/start.ipynb", markdown("Some words."), head=head)
    assert "nbs/tutorials/start.ipynb does not begin with a title and a quote" in only(site)


@pytest.mark.parametrize("kind", ["raw", "markdown"])
def test_front_matter_may_stand_before_the_title(site, kind):
    write(site, "tutorials/start.ipynb", HEAD, head=markdown("---\nskip_exec: true\n---") | dict(cell_type=kind))
    assert list(pages.faults(site)) == []


def test_an_empty_notebook(site):
    write(site, "tutorials/start.ipynb", head=None)
    assert "does not begin with a title" in only(site)


def test_a_page_with_two_titles(site):
    write(site, "tutorials/start.ipynb", markdown("```\n# a comment\n```"), markdown("# Again"))
    assert "2 titles, the last `Again`" in only(site)


# --- links

@pytest.mark.parametrize("text", [
    "[up](../index.ipynb) [again](../index.ipynb#how-it-works) [third](../index.ipynb#how-it-works-1 'title')",
    "[given](../index.ipynb#given) [last](../index.ipynb#über-das-ziel_2)",
    "## Here\n\n[here](#here) <a id='spot'></a> [spot](#spot)",
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/a/b/blob/main/c.ipynb)",
    "[by name][one]\n\n[one]: ../index.ipynb",
    "<a href='../index.ipynb'>x</a> <img alt='words' src='../images/a%20b.png'>",
    "![words](<../images/a b.png>) ![words](data:image/png;base64,iVBOR) [mail](mailto:a@b.org)",
    "`[x](gone.ipynb)` and `d[0](k)`, a list\n\n    [x](gone.ipynb)\n\n```\n![](gone.png)\n```",
    "<https://doi.org/10.1145/2660193.2660195> [local](http://localhost:8888/lab) [q](https://a.org/x?y=1&z=2#w)",
])
def test_good_links(site, text):
    write(site, "tutorials/start.ipynb", markdown(text))
    assert list(pages.faults(site)) == []


@pytest.mark.parametrize("text, said", [
    ("[x](gone.ipynb)", "links to gone.ipynb, which does not exist"),
    ("[x](index.ipynb)", "links to index.ipynb, which does not exist"),
    ("<a href=\"gone.html\">x</a>", "links to gone.html, which does not exist"),
    ("[x][y]\n\n[y]: gone.md", "links to gone.md, which does not exist"),
    ("![words](../images/gone.png)", "links to ../images/gone.png, which does not exist"),
    ("[x](../../../etc/passwd)", "which does not exist"),
    ("[![words](https://a.org/b.svg)](gone)", "links to gone, which does not exist"),
    ("[x](../index.ipynb#how-it-worked)", "links to ../index.ipynb#how-it-worked, where no heading has that name"),
    ("[x](../index.ipynb#how-it-works-2)", "where no heading"),
    ("[x](../index.ipynb#How-it-works)", "where no heading"),
    ("[x](../index.ipynb#title)", "where no heading"),
    ("[x](#nowhere)", "links to #nowhere, where no heading"),
    ("[x](/nbs/index.ipynb)", "no address on the web"),
    ("[x](https//a.org)", "which does not exist"),
    ("[x](http://)", "no address on the web"),
    ("[x](https://nodots/x)", "no address on the web"),
    ("[x](htps://a.org)", "no address on the web"),
    ("<a href='javascript:alert(1)'>x</a>", "no address on the web"),
    ("[x](https://[a.org)", "no address"),
    ("<a href='https://a.org/b c'>x</a>", "no address on the web"),
])
def test_broken_links(site, text, said):
    write(site, "tutorials/start.ipynb", markdown(text, id="cell7"))
    fault = only(site)
    assert fault.startswith("nbs/tutorials/start.ipynb, cell cell7 links to ") and said in fault


def test_links_of_texts_beside_the_notebooks(site):
    (site / "CONTRIBUTING.md").write_text("[x](nbs/start.ipynb)", encoding="utf-8")
    assert only(site).startswith("CONTRIBUTING.md links to nbs/start.ipynb, which does not exist")
    (site / "CONTRIBUTING.md").write_text("[x](README.md#how-it-works) [y](README.md#how-it-works?)", encoding="utf-8")
    assert "README.md#how-it-works?" in only(site)


def test_links_of_docstrings_count_from_the_notebooks(site):
    (site / "stasc/a.py").write_text('def f():\n    "See [start](tutorials/start.ipynb), not [this](start.ipynb)."\n', encoding="utf-8")
    assert only(site).startswith("stasc/a.py, docstring of f links to start.ipynb, which does not exist")


@pytest.mark.parametrize("data", [{"text/html": "<a href='gone.html'>x</a>"}, {"text/markdown": ["[x](gone", ".html)"]}])
def test_links_of_outputs(site, data):
    write(site, "tutorials/start.ipynb", code(shown(data), id="c3"))
    assert only(site).startswith("nbs/tutorials/start.ipynb, cell c3 links to gone.html")


@pytest.mark.parametrize("text, github, quarto", [
    ("How it works", "how-it-works", "how-it-works"),
    ("What is new?", "what-is-new", "what-is-new"),
    ("1. First step", "1-first-step", "first-step"),
    ("Version 2.14, and _more_", "version-214-and-_more_", "version-2.14-and-_more_"),
    ("A & B", "a--b", "a-b"),
    ("r(Ŷ¹) rises", "rŷ¹-rises", "rŷ¹-rises"),
    ("2024", "2024", "section"),
    ("self-correction", "self-correction", "self-correction"),
])
def test_names_of_headings(text, github, quarto):
    assert pages.github_slug(text) == github and pages.quarto_slug(text) == quarto


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.sampled_from("aB3 -_.?!"), min_size=1, max_size=8).filter(lambda o: o.strip(" -_.?!#")), min_size=1, max_size=6), st.booleans())
def test_every_heading_has_a_name_of_its_own(texts, notebook):
    found = pages.Found("".join(f"<h2>{o}</h2>" for o in texts))
    names = pages.anchors(found, notebook)
    assert len(names) == len(texts) == len(found.headings)


def test_addresses_that_do_not_answer(site, monkeypatch):
    def open_(request, timeout):
        if "gone" in request.full_url: raise OSError("HTTP Error 404: Not Found")
        return io.BytesIO()
    monkeypatch.setattr(pages.urllib.request, "urlopen", open_)
    write(site, "tutorials/start.ipynb", markdown("[a](https://a.org/here) [b](https://a.org/gone) [c](https://a.org/gone) [d](mailto:a@b.org)"))
    assert list(pages.dead_links(site)) == ["https://a.org/gone does not answer: HTTP Error 404: Not Found."]


# --- alt texts

@pytest.mark.parametrize("text", ["![](../images/a%20b.png)", "![ ](../images/a%20b.png)", "<img src='../images/a%20b.png'>", "<img src='../images/a%20b.png' alt=''>",
                                  "<svg viewBox='0 0 1 1'></svg>", "[![](../images/a%20b.png)](../index.ipynb)"])
@pytest.mark.parametrize("as_output", [False, True])
def test_a_picture_without_words(site, text, as_output):
    write(site, "tutorials/start.ipynb", code(shown({"text/markdown": text}), id="x1") if as_output else markdown(text, id="x1"))
    assert only(site).startswith("nbs/tutorials/start.ipynb, cell x1 shows a picture without alt text")


@pytest.mark.parametrize("output, fine", [
    (shown({"image/png": "iVBOR", "text/plain": ["<Figure size 600x300 with 1 Axes>"]}), False),
    (shown({"image/png": "iVBOR"}), False),
    (shown({"image/svg+xml": ["<svg/>"], "text/plain": ["<IPython.core.display.SVG object>"]}), False),
    (shown({"image/png": "iVBOR", "text/plain": [" "]}, **{"image/png": {"width": 3}}), False),
    (shown({"image/png": "iVBOR", "text/plain": ["<Figure size 600x300 with 1 Axes>"]}, **{"image/png": {"alt": "A curve rises."}}), True),
    (shown({"image/png": "iVBOR", "text/plain": ["A curve ", "rises."]}), True),
    (shown({"text/plain": ["<Figure size 600x300 with 1 Axes>"]}), True),
    (dict(output_type="stream", name="stdout", text=["x"]), True),
])
def test_figures_of_outputs(site, output, fine):
    write(site, "tutorials/start.ipynb", code(output, id="f1"))
    if fine: assert list(pages.faults(site)) == []
    else: assert only(site).startswith("nbs/tutorials/start.ipynb, cell f1 shows a figure without alt text")


def test_quarto_is_told_the_words_of_figures(site):
    odd = 'r(Ŷ²): "0.3" to 0.5 \\ $x$ # no comment\nand a line'
    picture = lambda alt: shown({"image/png": "iVBOR", "text/plain": alt})
    write(site, "tutorials/start.ipynb", code(picture(odd), id="one"), code(picture("a"), picture("b"), id="two"), code(shown({"text/plain": "3"}), id="none"))
    for _ in range(2):      # a second time changes nothing
        pages.for_quarto(site / "nbs")
        _, one, two, none = json.loads((site / "nbs/tutorials/start.ipynb").read_text(encoding="utf-8"))["cells"]
        option = lambda cell: [yaml.safe_load(o.removeprefix("#| "))["fig-alt"] for o in pages.source(cell).splitlines() if o.startswith("#| ")]
        assert option(one) == [odd] and option(two) == [["a", "b"]] and option(none) == []
        assert pages.source(one).endswith("\ndraw()")


@pytest.mark.parametrize("elsewhere, place", [("", "results"), ("https://a.org/b/blob/main", "[results](https://a.org/b/blob/main/bench/results)")])
def test_links_that_leave_the_site(site, elsewhere, place):
    kept = "[a](../index.ipynb#given) ![b](../images/a%20b.png) [c](https://a.org/../x) [d](#e)\n\n```\n[x](../../README.md)\n```\n\n"
    write(site, "tutorials/start.ipynb", markdown(kept + "See [results](../../bench/results)."))
    pages.for_quarto(site / "nbs", elsewhere)
    assert pages.source(json.loads((site / "nbs/tutorials/start.ipynb").read_text(encoding="utf-8"))["cells"][1]) == kept + f"See {place}."


def test_the_site_is_in_the_order_of_reading():
    contents = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert contents[0]["contents"][0]["href"] == "index.ipynb"
    assert [o["section"] for o in contents if isinstance(o, dict)][-1] == "Library"
