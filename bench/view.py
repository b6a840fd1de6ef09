"""How long 12,500 trajectories take to open in a web browser: the trajectory browser against the table that pandas writes.

    python bench/view.py [--questions 500] [--rounds 5]

Needs Chromium and playwright (`make test-browser` sets them up). The texts are made of words, about 60 a text, all different.
"""
import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from shutil import which

import pandas as pd
from playwright.sync_api import sync_playwright

import common
from stasc.core import Question
from stasc.filter import apply_filter
from stasc.view import html_page, page_data

FRAMES = """async n => { const list = document.querySelector(n); let worst = 0, last = performance.now(), frames = 0;
  for (let i = 0; i < 60; i++) { list.scrollTop += 40; await new Promise(requestAnimationFrame); const now = performance.now(); worst = Math.max(worst, now - last); last = now; frames++; }
  return worst }"""


def trajectories(n_questions, n_init=5, n_corr=5):
    rng, words = random.Random(0), [f"word{i}" for i in range(2000)]
    say = lambda: f"Step-by-step reasoning: {' '.join(rng.choices(words, k=rng.randint(30, 90)))}.\nFinal Answer: {rng.choice(words[:4])}"
    rows = []
    for i in range(n_questions):
        for j in range(n_init):
            first = say()
            for k in range(n_corr):
                second = say()
                rows.append(dict(iteration=0, split="train", question_id=f"q{i}", init_index=j, corr_index=k) | answer("init", first, rng) | answer("corr", second, rng))
    return apply_filter(pd.DataFrame(rows), "improving"), [Question(f"q{i}", f"Which {' '.join(rng.choices(words, k=8))}?", ("word0",)) for i in range(n_questions)]


def answer(p, text, rng):
    final = text.rpartition(": ")[2]
    return {f"{p}_{k}": v for k, v in dict(text=text, answer=final, reward=float(final == "word0"), n_tokens=len(text.split()), finish_reason="stop", seed=rng.getrandbits(62), logprob=-1.).items()}


def opened(page, path, ready):
    start = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector(ready)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")        # painted
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=500, help="each with 5 initial answers of 5 corrections")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="folder of the table [bench/results]")
    args = parser.parse_args()
    table, questions = trajectories(args.questions)
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        start = time.perf_counter()
        ours, plain = Path(tmp) / "browser.html", Path(tmp) / "pandas.html"
        ours.write_text(html_page("bench", page_data(table, questions, limit=10**9)), encoding="utf-8")
        written = time.perf_counter() - start
        plain.write_text(f"<meta charset=utf-8>{table.to_html()}", encoding="utf-8")
        browser = p.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        seconds, scroll = {"trajectory browser": [], "pandas to_html": []}, []
        for _ in range(args.rounds):
            for name, path, ready in (("trajectory browser", ours, "html[data-ready]"), ("pandas to_html", plain, "tr:last-child")):
                page = browser.new_page()
                page.set_default_timeout(300_000)
                seconds[name].append(opened(page, path, ready))
                if path is ours: scroll.append(page.evaluate(FRAMES, "#list"))
                page.close()
        size = {k: f.stat().st_size / 1e6 for k, f in (("trajectory browser", ours), ("pandas to_html", plain))}
    rows = [{"page": name, "opens in": f"{statistics.median(s):.2f} s", "size": f"{size[name]:.1f} MB", "longest frame while the list scrolls": f"{statistics.median(scroll):.0f} ms" if name == "trajectory browser" else ""}
            for name, s in seconds.items()]
    common.write("view", f"Opening {len(table):,} trajectories in Chromium", rows, f"About 60 words a text; median of {args.rounds}. The page took {written:.1f} s to write.", args.out)


if __name__ == "__main__":
    main()
