"The trajectory browser and the report in headless Chromium: clicked, searched, filtered, key-driven, without scripts, without a network."
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile import HOSTILE, hostile_run

from stasc.core import Config
from stasc.loop import STaSC
from stasc.view import visible


@pytest.fixture(scope="session")
def demo(embedded, tmp_path_factory):
    "A real run of the embedded model, small."
    return STaSC(Config.demo(device="cpu", iterations=2, n_train=60, n_test=30), tmp_path_factory.mktemp("runs") / "demo", engine=embedded, callbacks=[]).run()


@pytest.fixture(scope="session")
def report(demo): return demo.report()


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    run = hostile_run(tmp_path_factory.mktemp("hostile") / "run")
    return run, run.report()


@pytest.fixture
def opened(page):
    "Open a file, offline, and note what should never happen: dialogs, requests for anything but the file, faults of the script."
    def go(path, hash=""):
        page.goto(f"{path.as_uri()}{hash}")
        page.wait_for_selector("html[data-ready]")
        return page
    bad = []
    page.context.set_offline(True)
    page.on("dialog", lambda d: (bad.append(f"dialog {d.message}"), d.dismiss()))
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "about:")) or bad.append(f"request {r.url}"))
    page.on("pageerror", lambda e: bad.append(f"error {e}"))
    page.on("console", lambda m: m.type == "error" and bad.append(f"console {m.text}"))
    yield go
    assert bad == []


def ids(page): return page.eval_on_selector_all("#list li", "es => es.map(e => e.dataset.id)")
def chosen(page): return page.get_attribute("#list li[aria-selected=true]", "data-id")
def count(page): return [int(x.replace(",", "")) for x in re.findall(r"\d[\d,]*", page.inner_text("#count"))]
def corrections(page): return page.locator("#detail .corr").count()


def test_every_trajectory_is_there(opened, demo, report):
    page, t = opened(report), demo.trajectories
    for split in ("train", "test"):
        page.select_option("#split", split)
        rows = t[t.split == split]
        assert count(page) == [rows.question_id.nunique(), len(rows), len(rows)]
        assert ids(page) == list(rows.question_id.drop_duplicates())[:len(ids(page))]
        for q in ids(page)[:3]:
            page.click(f'#list li[data-id="{q}"]')
            mine = rows[rows.question_id == q]
            assert corrections(page) == len(mine)
            assert page.locator("#detail .col").count() == demo.n_done
            assert page.eval_on_selector_all("#detail .corr", "es => es.map(e => e.querySelector('.verdict b').textContent.slice(2))") == list(mine.sort_values(["iteration", "init_index", "corr_index"]).corr_answer)
            for seed in (*mine.corr_seed, *mine.init_seed): assert page.locator("#detail", has_text=f"seed {seed}").count() == 1


def test_filters_select_what_pandas_selects(opened, demo, report):
    page, t = opened(report), demo.trajectories.query("split == 'train'")
    words = dict(fixed="improved", broken="worsened", stuck="unchanged", stable="stable")
    for name, outcome in words.items():
        page.select_option("#outcome", name)
        want = t[t.outcome == outcome]
        assert count(page)[:2] == [want.question_id.nunique(), len(want)]
    page.select_option("#outcome", ""); page.select_option("#kept", "kept"); page.select_option("#at", "1")
    want = t[t.kept & (t.iteration == 1)]
    assert count(page)[:2] == [want.question_id.nunique(), len(want)]
    page.check("#only")
    assert corrections(page) == (want.question_id == chosen(page)).sum()
    page.select_option("#kept", "dropped"); page.select_option("#outcome", "fixed")
    assert count(page)[:2] == [0, 0] and "No trajectory matches" in page.inner_text("#detail")


def test_patterns_are_a_filter(opened, demo, report):
    from stasc.patterns import label
    page, t = opened(report), label(demo.trajectories, [*demo.data.train, *demo.data.test]).query("split == 'train'")
    for pattern, n in t.pattern.value_counts().items():
        page.select_option("#pattern", pattern)
        tagged = t.tags.map(lambda tags: pattern in tags)
        assert count(page)[1] == ((t.pattern == pattern) | tagged).sum() >= n


def test_search_and_sort(opened, demo, report):
    page, t = opened(report), demo.trajectories.query("split == 'train'")
    word = t.corr_answer.iloc[5]
    page.keyboard.press("/"); page.keyboard.type(word)
    asked = {q.id: "\n".join([q.id, q.text, *q.references]) for q in demo.data.train}
    want = t[t.init_text.str.contains(word) | t.corr_text.str.contains(word) | t.question_id.map(asked).str.contains(word)]
    page.wait_for_function("n => document.querySelector('#count').textContent.startsWith(n)", arg=f"{want.question_id.nunique()} questions, {len(want)} of")
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelector('#search').value === ''")
    last = t[t.iteration == t.iteration.max()].groupby("question_id").corr_reward.mean()
    for name, best in (("right", last.max()), ("wrong", last.min())):
        page.select_option("#sort", name)
        assert last[ids(page)[0]] == best


def test_keys(opened, report):
    page = opened(report)
    first = ids(page)
    for key, at in (("ArrowDown", 1), ("j", 2), ("ArrowUp", 1), ("k", 0)):
        page.focus("#list"); page.keyboard.press(key)
        assert chosen(page) == first[at]
    here = lambda: page.inner_text("#detail .here h3")[:3]
    assert here() == "M_0"
    page.keyboard.press("ArrowRight"); assert here() == "M_1"
    page.keyboard.press("ArrowLeft"); assert here() == "M_0"
    page.keyboard.press("PageDown")
    assert "page 2" in page.inner_text("#page") and ids(page)[0] == chosen(page) != first[0]
    page.keyboard.press("ArrowUp")                                  # over the border of two pages
    assert "page 1" in page.inner_text("#page") and chosen(page) == first[-1]
    page.keyboard.press("/"); page.keyboard.type("jk")              # letters belong to the search now
    assert page.input_value("#search") == "jk"


def test_permalink(opened, demo, report):
    page = opened(report)
    page.select_option("#split", "test"); page.select_option("#outcome", "fixed"); page.keyboard.press("Escape")
    page.focus("#list"); page.keyboard.press("ArrowDown"); page.keyboard.press("ArrowRight")
    link, question, n = page.get_attribute("#detail header a", "href"), chosen(page), count(page)
    assert page.url.endswith(link)
    page.goto("about:blank")
    page = opened(report, link)
    assert (chosen(page), count(page), page.inner_text("#detail .here h3")[:3]) == (question, n, "M_1")
    page = opened(report, "#split=nowhere&q=nobody&it=77&outcome=%3Cimg%3E")       # an address that makes no sense changes nothing
    assert page.input_value("#outcome") in ("", "fixed") and page.locator("#list li").count() > 0


def test_word_differences(opened, demo, report):
    page = opened(report)
    t = demo.trajectories.query("split == 'train' and init_text != corr_text")
    page.click(f'#list li[data-id="{ids(page)[0]}"]')
    for before, after in page.evaluate("""[...document.querySelectorAll('#detail .init')].flatMap(i => [...i.querySelectorAll('.corr .text')].map(c => {
            const of = x => { const e = c.cloneNode(true); e.querySelectorAll(x).forEach(y => y.remove()); return e.textContent; };
            return [[i.querySelector('.text').textContent, of('ins')], [of('del')]].flat() })).map(([a, b, c]) => [a === b, c])"""):
        assert before is True and after in set(demo.trajectories.corr_text)         # without what was added, it is the initial answer; without what was taken, the correction
    assert len(t) and page.locator("#detail ins").count() > 0
    page.uncheck("#diff")
    assert page.locator("#detail ins").count() == 0


def test_without_scripts_the_page_shows_all_its_trajectories(chromium, demo, report):
    context = chromium.new_context(java_script_enabled=False, offline=True)
    page, t = context.new_page(), demo.trajectories.query("split == 'train'")
    page.goto(report.as_uri())
    shown = page.locator("#static details.question")
    questions = list(t.question_id.drop_duplicates())[:shown.count()]
    assert page.locator("#browser").is_hidden() and len(questions) >= 5
    for i, q in enumerate(questions):
        shown.nth(i).locator("summary").first.click()
        assert shown.nth(i).locator(".corr").first.is_visible()
        assert shown.nth(i).locator(".corr").count() == (t.question_id == q).sum()
    context.close()


def test_the_report_has_curves_tables_and_settings(opened, report):
    page = opened(report)
    pictures = page.eval_on_selector_all(".pictures img", "es => es.map(e => [e.naturalWidth > 0, e.alt.length > 20, e.src.slice(0, 5)])")
    assert len(pictures) >= 4 and all(p == [True, True, "data:"] for p in pictures)
    headings = page.eval_on_selector_all("h2", "es => es.map(e => e.textContent)")
    assert any("Held-out" in h for h in headings) and any("Training" in h for h in headings)
    page.click("summary:has-text('settings')")
    assert "learning_rate" in page.inner_text("details table")


def nodes_of_ours(page):
    "Elements that only a text could have brought, by name."
    return page.evaluate("""[...document.querySelectorAll('#pwned, iframe, object, embed, base, svg, #browser img, #browser style, #browser script, a[href^="javascript"], #static img, [onerror], [onload], [onclick]')].map(e => e.outerHTML.slice(0, 80))""")


def test_hostile_texts_are_texts(opened, hostile):
    run, path = hostile
    page = opened(path)
    for i, (name, text) in enumerate(HOSTILE.items()):
        page.click(f"#list li >> nth={i % 50}") if i < page.locator("#list li").count() else page.focus("#list") or page.keyboard.press("ArrowDown")
        want = visible(f"{text}\nFinal Answer: {text}")
        assert page.locator("#detail .init .text").first.text_content() == want, name
        assert nodes_of_ours(page) == [], name
    assert page.title().startswith("STaSC") and page.evaluate("document.querySelectorAll('script').length") == 2


def test_hostile_texts_are_texts_without_scripts(chromium, hostile):
    _, path = hostile
    context = chromium.new_context(java_script_enabled=False)
    page, asked = context.new_page(), []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(path.as_uri())
    n = page.locator("#static details.question").count()
    texts = [page.locator("#static details.question").nth(i).locator(".init > .text").first.text_content() for i in range(n)]
    assert texts == [visible(f"{t}\nFinal Answer: {t}") for t in list(HOSTILE.values())[:n]] and n >= 5
    assert page.locator("#pwned, #static img, #static svg, #static iframe, #static style").count() == 0
    assert [u for u in asked if not u.startswith(("file:", "data:"))] == []
    context.close()


def test_the_policy_stops_what_is_not_ours(page, report):
    "Even markup that got into the page would not run."
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.evaluate("""document.body.insertAdjacentHTML('beforeend', '<img src=x onerror="window.pwned = 1">');
                     const s = document.createElement('script'); s.textContent = 'window.pwned = 2'; document.body.append(s);""")
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned") is None


def test_in_a_notebook_frame(page, demo, tmp_path):
    "`run.browse()` as a notebook embeds it: a sandboxed frame that works and reaches nothing outside."
    host = tmp_path / "cell.html"
    host.write_text(f"<!doctype html><meta charset=utf-8><body>{demo.browse(split='test')._repr_html_()}</body>", encoding="utf-8")
    page.goto(host.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#list li").first.wait_for()
    before = frame.locator("#detail h2").text_content()
    frame.locator("#list").press("ArrowDown")
    assert frame.locator("#detail h2").text_content() != before
    assert page.frames[1].evaluate("(() => { try { return parent.document.title } catch (e) { return e.name } })()") == "SecurityError"
