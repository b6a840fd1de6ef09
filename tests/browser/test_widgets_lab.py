"The widgets in a real JupyterLab, in headless Chromium: clicked, typed into and looked at, with the answers of a real run and with hostile ones."
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile import hostile_run

from stasc.core import Config
from stasc.loop import STaSC
from stasc.metrics import MEASURES, by_iteration
from stasc.widgets import FilterExplorer, PromptInspector, RewardDebugger, _texts

NO_NEWS = {"@jupyterlab/apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
           "@jupyterlab/notebook-extension/tracker": dict(windowingMode="none")}
SHOTS = os.environ.get("STASC_SHOTS")           # a folder to leave screenshots in

IMPORTS = """import warnings; warnings.simplefilter("ignore")
from stasc.loop import STaSC
from stasc.sample import ByteTokenizer
from stasc.widgets import CurveExplorer, FilterExplorer, PromptInspector, RewardDebugger"""
DEMO = [IMPORTS + """
runs = {v: STaSC.open(v, callbacks=[]) for v in ("EIE", "FIE")}
def first_wrong(init_reward, corr_reward, t=1.0): return init_reward < t
def last_digit(prediction, references): return float(prediction.strip()[-1:] == references[0][-1:])""",
        "c = CurveExplorer(runs); c", "f = FilterExplorer(runs['EIE'], [first_wrong]); f", "d = RewardDebugger(runs['EIE'], other=last_digit); d",
        "p = PromptInspector(runs['EIE']); p", "c.set(measure='i_to_c', split='train'); print('set')"]
HOSTILE = [IMPORTS + "\nrun = STaSC.open('hostile', callbacks=[])",
           "CurveExplorer({'<img src=x onerror=alert(1)> $$x$$': run}, measure='acc_t1')", "FilterExplorer(run, filter='all')", "RewardDebugger(run, other='in_accuracy', other_scope='full')",
           "PromptInspector(run, ByteTokenizer(), phase='correction')"]


def notebook(path, cells):
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    cell = lambda i, code: dict(cell_type="code", id=f"cell{i}", metadata={}, execution_count=None, outputs=[], source=code)
    path.write_text(json.dumps(dict(cells=[cell(i, c) for i, c in enumerate(cells)], metadata=kernel, nbformat=4, nbformat_minor=5)), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(embedded, tmp_path_factory):
    "A folder with two notebooks and the runs that they open."
    folder = tmp_path_factory.mktemp("lab") / "root"
    for v in ("EIE", "FIE"):
        cfg = Config.demo(device="cpu", variant=v, iterations=1, n_train=24, n_test=12)
        STaSC(cfg, folder / v, engine=embedded, callbacks=[]).run()
    hostile_run(folder / "hostile")
    notebook(folder / "demo.ipynb", DEMO)
    notebook(folder / "hostile.ipynb", HOSTILE)
    return folder


@pytest.fixture(scope="module")
def lab(chromium, folder):
    "A JupyterLab server on a free port, with no settings but its own."
    own, token = folder.parent, secrets.token_hex(16)
    for name, settings in NO_NEWS.items():
        (own / "settings" / name).parent.mkdir(parents=True, exist_ok=True)
        (own / "settings" / f"{name}.jupyterlab-settings").write_text(json.dumps(settings))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    homes = {k: str(own / k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
               f"--IdentityProvider.token={token}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (own / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=os.environ | homes | dict(JUPYTERLAB_SETTINGS_DIR=str(own / "settings"), OMP_NUM_THREADS="1"))
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None: pytest.fail(f"JupyterLab ended: {(own / 'lab.log').read_text()[-2000:]}")
            try: urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=5).close(); break
            except OSError: time.sleep(.1)
        yield SimpleNamespace(url=url, token=token)
    finally:
        server.terminate()
        server.wait(20)


def opened(chromium, lab, name):
    "A notebook with all its cells run, and a list of what should never happen."
    page = chromium.new_context(viewport=dict(width=1280, height=900)).new_page()
    page.bad = []
    page.on("dialog", lambda d: (page.bad.append(f"dialog {d.message}"), d.dismiss()))
    page.on("request", lambda r: r.url.startswith((lab.url, lab.url.replace("http", "ws"), "data:", "blob:")) or page.bad.append(f"request {r.url}"))
    page.on("pageerror", lambda e: page.bad.append(f"error {e}"))
    page.on("console", lambda m: m.type == "error" and page.bad.append(f"console {m.text} {m.location}"))
    page.set_default_timeout(60_000)
    page.goto(f"{lab.url}/lab/workspaces/{name.split('.')[0]}/tree/{name}?token={lab.token}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    idle = page.get_by_text("Python 3 (ipykernel) | Idle")
    idle.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    last = page.locator(".jp-Cell").last
    last.locator(".jp-OutputArea-output").first.wait_for()
    idle.wait_for()
    assert not page.locator("[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']").count()
    return page


@pytest.fixture(scope="module")
def demo(chromium, lab):
    page = opened(chromium, lab, "demo.ipynb")
    yield page
    assert page.bad == []
    page.context.close()


@pytest.fixture(scope="module")
def hostile(chromium, lab):
    page = opened(chromium, lab, "hostile.ipynb")
    yield page
    page.context.close()


def output(page, i): return page.locator(f".jp-Cell >> nth={i} >> .jp-OutputArea-output").first
def picture(out): return out.locator("img").get_attribute("src")


def shot(page, i, name):
    if SHOTS: output(page, i).screenshot(path=f"{SHOTS}/{name}.png")


def eventually(want, of, seconds=30):
    "Wait until `of()` is `want`."
    end = time.time() + seconds
    while (got := of()) != want:
        if time.time() > end: assert got == want
        time.sleep(.05)


def table(out, n=0):
    "The cells of a table that is shown, row by row, with their row's head."
    return out.locator("table").nth(n).locator("tbody tr").evaluate_all("rows => rows.map(r => [...r.children].map(c => c.innerText.trim()))")


def curves(out):
    "The columns of the table of curves, each with its head."
    heads = out.locator("table thead th").all_inner_texts()
    return {h: [*c] for h, *c in zip(heads, *table(out))} if heads else {}


# --- the curves

def test_curves_follow_the_choices(demo, folder):
    out, runs = output(demo, 1), {v: STaSC.open(folder / v, callbacks=[]) for v in ("EIE", "FIE")}
    says = lambda run, measure, split: [f"{r[measure]:.3f} ({r[measure + '_lo']:.3f}–{r[measure + '_hi']:.3f})" for _, r in by_iteration(run, split).iterrows()]
    shot(demo, 1, "curves")
    for measure, split in (("acc_t1", "test"), ("c_to_i", "train"), ("acc_t2", "train"), ("acc_t2", "test")):
        before = picture(out)
        out.get_by_label("measure").select_option(label=MEASURES[measure])
        out.get_by_label("on", exact=True).select_option("training questions" if split == "train" else "held-out questions")
        eventually({v: says(r, measure, split) for v, r in runs.items()}, lambda: {h: c for h, c in curves(out).items() if h != "iteration"})
        assert picture(out) != before and MEASURES[measure] in out.locator("img").get_attribute("alt")
    assert out.locator("img").evaluate("i => i.complete && i.naturalWidth > 300")
    out.get_by_label("variants").select_option(["FIE"])
    eventually(["iteration", "FIE"], lambda: [*curves(out)])
    out.get_by_label("published").select_option(["Phi-3-mini EIF (5, 5)", "Qwen2.5-1.5B EIF (5, 5)"])
    eventually({"iteration", "FIE", "Qwen2.5-1.5B EIF (5, 5)", "Phi-3-mini EIF (5, 5)"}, lambda: {*curves(out)})
    shot(demo, 1, "curves_paper")
    out.get_by_label("measure").select_option(label="RSS")
    out.get_by_text("was not published for").wait_for()
    out.get_by_label("variants").select_option(["EIE", "FIE"])
    eventually(["iteration", "EIE", "FIE"], lambda: [*curves(out)])


def test_a_choice_made_in_python_moves_the_controls(demo):
    out = output(demo, 1)
    out.get_by_label("measure").select_option(label="Critique Score")
    eventually(True, lambda: "Critique Score" in out.locator("img").get_attribute("alt"))
    demo.locator(".jp-Cell").nth(5).locator(".cm-content").click()
    demo.keyboard.press("Control+Enter")
    chosen = lambda label: out.get_by_label(label, exact=True).evaluate("s => s.options[s.selectedIndex].text").replace("\xa0", " ")
    eventually(["Δ i→c", "training questions"], lambda: [chosen("measure"), chosen("on")])
    eventually(True, lambda: "Δ i→c on training questions" in out.locator("img").get_attribute("alt"))


# --- the filters

def test_another_filter_is_counted_and_shown(demo, folder):
    out, f = output(demo, 2), FilterExplorer(STaSC.open(folder / "EIE", callbacks=[]), {"first_wrong": lambda a, b, t: a < t})
    counts = lambda: [[str(n), *(f"{v:,}" for v in r[:6])] for n, r in zip(f.table().index, f.table().itertuples(index=False))]
    for name, pairing, threshold in (("correct", "sampled", "0.5"), ("first_wrong", "crossed", "0.5"), ("all", "crossed", "1"), ("non_decreasing", "sampled", "1")):
        for choice, make in ((dict(filter=name), lambda: out.get_by_label("filter", exact=True).select_option(name)), (dict(pairing=pairing), lambda: out.get_by_label("pairing").select_option(pairing)),
                             (dict(threshold=float(threshold)), lambda: (out.get_by_label("threshold t").fill(threshold), out.get_by_label("threshold t").press("Tab")))):
            make()
            f.set(**choice)
            eventually(counts(), lambda: [r[:7] for r in table(out)])
    shot(demo, 2, "filters")
    out.get_by_label("examples", exact=True).select_option("kept by this choice")
    out.get_by_label("examples from").select_option("samples of M_1")
    kept = f.table().kept[1]
    out.get_by_text(f"{kept:,} pairs of M").wait_for()
    assert kept > 3 and "1 to 3 of them" in out.inner_text()
    texts = [out.locator("pre").all_inner_texts()]
    out.get_by_role("button", name="next").click()
    out.get_by_text(re.compile(r"\b4 to \d+ of them")).wait_for()
    assert out.locator("pre").all_inner_texts() != texts[0]
    out.get_by_role("button", name="previous").click()
    eventually(texts[0], lambda: out.locator("pre").all_inner_texts())
    shown = {t.strip() for t in texts[0]}
    assert shown & set(f.set(iteration=1).kept().init_text)
    out.get_by_label("threshold t").fill("0")
    out.get_by_label("threshold t").press("Tab")
    out.get_by_role("alert").wait_for()
    assert "above 0 and at most 1" in out.get_by_role("alert").inner_text()
    out.get_by_label("threshold t").fill("1")
    out.get_by_label("threshold t").press("Tab")
    eventually(0, lambda: out.get_by_role("alert").count())


# --- the rewards

def test_a_text_is_typed_and_explained(demo, folder):
    out = output(demo, 3)
    d = RewardDebugger(STaSC.open(folder / "EIE", callbacks=[]), other=last_digit)
    every = _texts(d).drop_duplicates(["split", "question_id", "text"])
    out.get_by_text(f"{len(d.disagreements()):,} of {len(every):,} different texts").wait_for()
    shot(demo, 3, "rewards")
    for position in (1, 2, 1):
        out.get_by_role("button", name="next" if position != 1 or d.state["position"] == 0 else "previous").click()
        d.set(position=position)
        eventually(d.state["text"].strip(), lambda: out.locator("pre").inner_text().strip())
        assert out.get_by_label("text", exact=True).input_value() == d.state["text"]
        assert out.get_by_label("references").input_value() == "\n".join(d.state["references"])
    out.get_by_label("number").fill("3"); out.get_by_label("number").press("Tab")
    eventually(d.set(position=2).state["text"].strip(), lambda: out.locator("pre").inner_text().strip())

    out.get_by_label("text", exact=True).fill("")
    out.get_by_label("text", exact=True).press_sequentially("The final answer is hard.\nFinal Answer: **The Big-Ben!**", delay=5)
    out.get_by_label("references").fill("")
    out.get_by_label("references").press_sequentially("London Eye\n\nbig ben", delay=30)
    eventually([["The Big-Ben!"], "Final Answer:"], lambda: [out.locator("mark").all_inner_texts(), out.locator("pre u").first.inner_text().strip()])
    eventually("big ben", lambda: dict((r[0] + r[1], r[-1]) for r in table(out)).get("exact_matchfinal"))
    assert dict((r[0] + r[1], r[2]) for r in table(out))["in_accuracyfull"] == "1.000"
    assert ["final answer", "The Big-Ben!", "big · ben"] in table(out, 1)
    assert out.locator("pre s").inner_text().strip() == "final answer is"
    assert "a text of your own" in out.inner_text() and out.get_by_label("references").input_value() == "London Eye\n\nbig ben"
    shot(demo, 3, "rewards_typed")
    out.get_by_label("step through").select_option("all")
    out.get_by_role("button", name="next").click()
    out.get_by_text(f"Shown is 1 of {len(every):,}").wait_for()
    out.get_by_label("compared with").select_option("exact_match")
    out.get_by_text("0 of ").wait_for()


def last_digit(prediction, references): return float(prediction.strip()[-1:] == references[0][-1:])


# --- the prompts

def test_tokens_are_shown_as_the_loss_sees_them(demo, folder):
    out, p = output(demo, 4), PromptInspector(STaSC.open(folder / "EIE", callbacks=[]))
    titles = lambda tag: out.locator(f"pre {tag}").evaluate_all("es => es.map(e => [parseInt(e.title), e.title.split(' (').pop().slice(0, -1)])")
    of = lambda *kinds: [[i, k] for i, _, k in p.tokens() if k.split()[0] in kinds]
    eventually(of("learned"), lambda: titles("b"))
    assert titles("span") == of("prompt") and "continues the prompt that was sampled from, token for token" in out.inner_text()
    styles = out.locator("pre b").last.evaluate("e => [getComputedStyle(e).borderTopStyle, getComputedStyle(e).textDecorationLine, getComputedStyle(e).fontWeight]")
    assert styles == ["solid", "underline", "700"]                  # the end token: special, and learned
    shot(demo, 4, "prompts")
    ids = [i for _, i in p._questions(p.state)]
    out.get_by_role("button", name="next").click()
    p.set(question=ids[1])
    eventually(of("learned"), lambda: titles("b"))
    assert out.get_by_label("split").locator("option").all_inner_texts() == ["train"]            # held-out questions are not trained on
    out.get_by_label("show").select_option("an initial answer, as sampled")
    out.get_by_text("None of them is learned").wait_for()
    out.get_by_label("split").select_option("test")
    out.get_by_label("iteration").select_option("M_1")
    question = p.set(phase="initial", split="test", iteration=1, question=3).selected()["question"]
    eventually(12, lambda: out.get_by_label("question").locator("option").count())
    out.get_by_label("question").select_option(index=[i for _, i in p._questions(p.state)].index(question))
    eventually(of("generated"), lambda: titles("i"))
    assert titles("span") == of("prompt") and not titles("b")
    assert "".join(t for _, t, k in p.tokens() if k == "generated").strip() in re.sub("⏎", "", out.locator("pre").inner_text())


# --- hostile answers

NEVER = """() => ({pwned: document.querySelectorAll('#pwned').length, math: document.querySelectorAll('.jp-OutputArea-output mjx-container, .jp-OutputArea-output .katex').length,
  inside: document.querySelectorAll('.jp-OutputArea-output :is(script, iframe, svg, style, h1, a, [onerror], [onload])').length,
  images: [...document.querySelectorAll('.jp-OutputArea-output img')].filter(i => !i.src.startsWith('data:image/svg+xml;base64,')).length, hidden: getComputedStyle(document.body).display})"""
CLEAN = dict(pwned=0, math=0, inside=0, images=0, hidden="block")


def test_hostile_texts_stay_texts(hostile, folder):
    page = hostile
    filters, rewards, prompts = (output(page, i) for i in (2, 3, 4))
    seen = []
    for which, n in (("kept by this choice alone", 10), ("kept by this choice", 20)):
        filters.get_by_label("examples", exact=True).select_option(which)
        filters.get_by_text(f"{n} pairs of M0 {which}, 1 to 3 of them").wait_for()
        for first in (*range(4, n + 1, 3), None):
            seen += filters.locator("pre").all_inner_texts()
            assert page.evaluate(NEVER) == CLEAN
            if first: filters.get_by_role("button", name="next").click(); filters.get_by_text(f"{first} to {min(first + 2, n)} of them").wait_for()
    assert len(seen) == 60
    every = "\n".join(seen)
    for want in ("<script>alert('script')", "<img src=x onerror=", "</details></div>", "$$\\frac{1}{0}$$", "⟨RLO⟩", "␛[31m", "javascript:alert('link')", "characters left out"): assert want in every
    shot(page, 2, "hostile_filters")
    rewards.get_by_label("step through").select_option("all")
    rewards.get_by_text("Shown is 1 of").wait_for()
    total = int(re.search(r"Shown is 1 of (\d+)", rewards.inner_text())[1])
    assert total >= 38
    for n in range(2, total + 1):
        rewards.get_by_role("button", name="next").click()
        rewards.get_by_text(f"Shown is {n} of {total}").wait_for()
        assert page.evaluate(NEVER) == CLEAN
        if n == 12: shot(page, 3, "hostile_rewards")
    labels = prompts.get_by_label("question").locator("option").all_inner_texts()
    assert len(labels) == 20 and max(map(len, labels)) < 80 and "<script>" in labels[0] and not any("\u202e" in x for x in labels)
    for n, label in enumerate(labels):
        prompts.get_by_label("question").select_option(index=n)
        eventually(True, lambda: f"case {n:02d}" in prompts.locator("pre").inner_text().replace("⏎", "") or "left out" in prompts.inner_text())
        assert page.evaluate(NEVER) == CLEAN
    shot(page, 4, "hostile_prompts"); shot(page, 1, "hostile_curves")
    assert len(prompts.inner_html()) < 3_000_000
    assert page.bad == []


def test_nothing_ever_went_wrong(demo):
    assert demo.bad == []
