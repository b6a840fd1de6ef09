"The widgets without a browser: what they say against loops over the stored tables, what they show of hostile texts, what they refuse."
import html.parser
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from hostile import HOSTILE, hostile_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stasc.core import Config, ConfigError, DataError, FilterError, Question, RewardError, StascError, StoreError
from stasc.data import Data
from stasc.filter import FILTERS
from stasc.loop import STaSC
from stasc.metrics import MEASURES
from stasc.paper import published
from stasc.reward import _REWARDS, final_answer, get_reward, judge
from stasc.sample import ByteTokenizer
from stasc.train import ScriptedEngine
from stasc.view import visible
from stasc.widgets import CurveExplorer, FilterExplorer, Panel, PromptInspector, RewardDebugger, _find_answer, _text_html, _texts


def script(prompt, rng, skill):
    words = rng.choices(["Paris", "Lima", "Oslo", "the city"], k=rng.randrange(4))
    return rng.choice(["Final Answer: ", "final answer is ", "no marker ", "The final answer, perhaps.\nFinal answer - "]) + " ".join(words)


def scripted(folder, **options):
    train = [Question(f"q{i}", f"What is city {i}?", ("Paris", "Lima Oslo")) for i in range(6)]
    cfg = Config(**dict(iterations=2, n_init=2, n_corr=2, reward="token_f1", threshold=.6, prompts="default", shots=1) | options)
    return STaSC(cfg, folder, data=Data(train, [Question("t", "What is it?", ("Oslo",))]), engine=ScriptedEngine(script), callbacks=[]).run()


SETTINGS = [dict(variant="ENE"), dict(variant="FIF", pairing="crossed"), dict(variant="ENF", pairing="crossed", non_decreasing="stable", scope="full", reward="in_accuracy", threshold=1.0, train_prompt="no_examples")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = [scripted(tmp_path_factory.mktemp("run") / "run", **o) for o in SETTINGS]
    assert all(r.n_done == 3 for r in made)
    return made


@pytest.fixture(scope="module")
def hostile(tmp_path_factory): return hostile_run(tmp_path_factory.mktemp("hostile") / "run")


@pytest.fixture(scope="module")
def demo(embedded, tmp_path_factory):
    cfg = Config.demo(device="cpu", iterations=1, n_train=24, n_test=12)
    return STaSC(cfg, tmp_path_factory.mktemp("runs") / "demo", engine=embedded, callbacks=[]).run()


def panels(run, tokenizer=None):
    return [CurveExplorer({"a <b> $x$ \u202e": run}), FilterExplorer(run, filter="all"), RewardDebugger(run, listed="all", position=0), PromptInspector(run, tokenizer, phase="correction")]


# --- filters

RULES = dict(improving=lambda a, b, t: b > a, stable=lambda a, b, t: a == b >= t, non_decreasing=lambda a, b, t: b > a or a == b >= t, correct=lambda a, b, t: b >= t, all=lambda a, b, t: True)


def kept_by(run, n, name, t, pairing):
    "Algorithm 1 as loops over the stored tables."
    first, second = run.dir.table(n if run.variant.evolving_init else 0, "initial.train"), run.dir.table(n, "corrections.train")
    return {(a.question_id, a.init_index, b.init_index, b.corr_index): (a.init_reward, b.corr_reward)
            for a in first.itertuples() for b in second.itertuples() if a.question_id == b.question_id and (pairing == "crossed" or a.init_index == b.init_index)
            and RULES[name](a.init_reward, b.corr_reward, t)}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2), st.sampled_from(sorted(FILTERS)), st.sampled_from([1e-6, .3, .5, .6, 2 / 3, 1]), st.sampled_from(["sampled", "crossed"]), st.integers(0, 2))
def test_another_filter_is_algorithm_1_on_the_stored_samples(runs, which, name, t, pairing, n):
    run = runs[which]
    f = FilterExplorer(run, filter=name, threshold=t, pairing=pairing, iteration=n)
    mine, own = kept_by(run, n, name, t, pairing), kept_by(run, n, run.cfg.filter_name, run.cfg.threshold, run.cfg.pairing)
    row, keys = f.table().loc[n], lambda df: set(zip(df.question_id, df.init_index, df.corr_init_index, df.corr_index))
    assert (row.kept, row.run_kept, row.both, row.only_run, row.only_this) == (len(mine), len(own), len(mine.keys() & own.keys()), len(own.keys() - mine.keys()), len(mine.keys() - own.keys()))
    assert row.pairs == len(kept_by(run, n, "all", 1, pairing))
    assert keys(f.kept()) == set(mine) and keys(f.difference()) == set(mine) ^ set(own)
    d = f.difference()
    assert (d.run_kept == ~d.kept).all() and keys(d[d.run_kept]) == set(own) - set(mine) and keys(f.kept()[lambda k: k.run_kept]) == set(mine) & set(own)
    share = lambda a, b: sum((x >= run.cfg.threshold, y >= run.cfg.threshold) == (a, b) for x, y in mine.values()) / len(mine)
    if mine: assert [row.wrong_right, row.right_right, row.wrong_wrong, row.right_wrong] == pytest.approx([share(False, True), share(True, True), share(False, False), share(True, False)])
    else: assert row[["wrong_right", "right_right", "wrong_wrong", "right_wrong"]].isna().all()


def test_the_runs_own_choice_keeps_what_was_trained_on(runs):
    for run in runs:
        f = FilterExplorer(run)
        assert len(f.difference()) == 0 and f.table().kept[:2].tolist() == run.metrics.n_kept[1:].tolist()
        for n in (0, 1):
            stored, mine = run.dir.table(n + 1, "kept"), f.set(iteration=n).kept()
            pd.testing.assert_frame_equal(stored, mine[stored.columns], check_dtype=False, check_index_type=False, obj="kept") if list(mine.index) == list(stored.index) \
                else pd.testing.assert_frame_equal(stored, mine[stored.columns].reset_index(drop=True), check_dtype=False)


def test_a_users_filter_sees_the_pairs_that_are_offered_and_its_faults_are_told(runs):
    seen = []
    def spy(init_reward, corr_reward, t): seen.append(len(init_reward)); return corr_reward.rank() > 3
    def broken(init_reward, corr_reward, t): return 1 / 0
    f = FilterExplorer(runs[1], {"spy": spy}, filter="spy", pairing="sampled")
    assert f.table().pairs.tolist() == [24] * 3 == seen[:3]
    with pytest.raises(FilterError, match="filter broken failed on the samples of M_0: ZeroDivisionError"): f.set(filter=broken).table()
    f.widget
    assert "ZeroDivisionError" in f._html.value and "role=alert" in f._html.value
    f._controls["filter"].value = "all"
    assert "role=alert" not in f._html.value


@pytest.mark.parametrize("t", [0, -1, 1.1, float("nan"), "1", None, True])
def test_a_threshold_out_of_range_is_refused(runs, t):
    f = FilterExplorer(runs[0])
    with pytest.raises(StascError): f.set(threshold=t)
    assert f.selected()["threshold"] == .6


def test_pages_show_every_pair_once(runs):
    f = FilterExplorer(runs[0], filter="all", which="only_this")
    n, shown = len(f.difference()), 0
    for page in range(-(-n // 3)):
        f.set(page=page)
        shown += f._page().count("<pre") // 2
    assert shown == n > 6 and f.set(page=10**6)._page() == f.set(page=(n - 1) // 3)._page()


# --- rewards

pieces = st.lists(st.one_of(st.sampled_from(["Final Answer", "final  answer", "FINAL ANSWER:", " is", ":", " - ", "\n", "**", "# ", "> ", "- ", "the Eiffel Tower", "Paris", "\t", "\u2028", "`"]), st.text(max_size=5)), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(pieces)
def test_the_answer_stands_where_it_is_said_to_stand(text):
    e = _find_answer(text)
    assert e["answer"] == final_answer(text)
    if e["answer"]: assert text[slice(*e["span"])] == e["answer"] and e["span"][0] >= e["chosen"][1]
    assert (e["chosen"] is None) == (e["answer"] is None) == (not e["markers"]) and (e["chosen"] is None or e["chosen"] in e["markers"])


@settings(max_examples=80, deadline=None)
@given(pieces, st.lists(st.sampled_from(["Paris", "eiffel tower", "The", "", "Final answer"]), max_size=3))
def test_verdicts_are_those_of_judge(text, references):
    v = RewardDebugger(text=text, references=references).verdicts()
    assert len(v) == 2 * len(_REWARDS)
    for r in v.itertuples():
        assert r.value == judge(text, references, r.reward, r.scope)[1]
        if r.value: assert r.matched is None or (r.matched in references and judge(text, [r.matched], r.reward, r.scope)[1] == r.value)
        if r.value and r.reward != "token_f1": assert r.matched is not None
        assert bool(r.note) == (r.scope == "final" and not final_answer(text))


def brute(run, a, b):
    "(split, question, text) on which two verdicts differ."
    questions, out = {q.id: q for q in [*run.data.train, *run.data.test]}, {}
    for r in run.trajectories.itertuples():
        for text in (r.init_text, r.corr_text):
            right = lambda o: judge(text, questions[r.question_id].references, *o)[1] >= run.cfg.threshold
            out[r.split, r.question_id, text] = right(a) != right(b)
    return {k for k, v in out.items() if v}, len(out)


@pytest.mark.parametrize("which", range(3))
def test_disagreements_are_all_there(runs, which):
    run = runs[which]
    d = RewardDebugger(run)
    for a, b in ((("token_f1", "final"), ("exact_match", "full")), (("in_accuracy", "full"), ("in_accuracy", "final")), (("token_f1", "full"), ("token_f1", "full"))):
        d.set(reward=a[0], scope=a[1], other=b[0], other_scope=b[1])
        want, total = brute(run, a, b)
        found = d.disagreements()
        assert set(zip(found.split, found.question_id, found.text)) == want and len(found) == len(want)
        assert len(d.set(listed="all")._repr_html_()) and f"{len(want):,} of {total:,} different texts" in d._page()
        d.set(listed="disagreements")
    d.set(reward="token_f1", scope="full", other="exact_match", other_scope="final", iteration=1)
    assert set(_texts(d).text[_texts(d).iteration == 1]) >= set(d.disagreements().text) and (d.disagreements().iteration == 1).all()


def test_a_reward_that_fails_is_looked_into(runs):
    def picky(prediction, references): return 1 / (prediction.strip() != "Paris")
    d = RewardDebugger(runs[0], other=picky)
    assert (d.disagreements().text.map(final_answer) == "Paris").any()
    row = d.set(text="Final Answer: Paris", references=["Paris"]).verdicts().set_index(["reward", "scope"]).loc[("picky", "final")]
    assert pd.isna(row.value) and "ZeroDivisionError" in row.note
    assert d.selected()["position"] is None and "picky failed" in d._page()
    def picky(prediction, references): return 0.
    assert d.set(other=picky, listed="all", position=0).verdicts().query("reward == 'picky'").value.eq(0).all()


def test_stepping_and_typing(runs):
    d = RewardDebugger(runs[0], other="in_accuracy", other_scope="full")
    rows = d.disagreements()
    assert len(rows) > 2 and d.selected()["text"] == rows.text[0] and d.selected()["references"] == ("Paris", "Lima Oslo")
    d.widget
    back, on = d._buttons
    on.click(); on.click(); back.click()
    assert d.selected()["text"] == rows.text[1] == d._controls["text"].value and d._controls["position"].value == 2
    back.click(); back.click(); assert d.selected()["position"] == 0
    d._controls["position"].value = 10**6; assert d.selected()["position"] == len(rows) - 1 and d._controls["position"].value == len(rows)
    d._controls["references"].value = "a\n\n b "; assert d.selected()["references"] == ("a", " b ") and d.selected()["position"] is None
    d._controls["text"].value = "Final Answer: a"; assert "of your own" in d._html.value
    assert d._controls["references"].value == "a\n\n b "            # what is being typed is left alone
    on.click(); assert d.selected()["text"] == rows.text[0]


# --- prompts

@pytest.mark.parametrize("which", range(3))
def test_tokens_are_what_was_sampled_and_trained_on(runs, which):
    run, p = runs[which], PromptInspector(runs[which])
    for n in range(3):
        pairs = run._pairs(n, "train", run.cfg.pairing)
        kept = pairs[pairs.kept]
        for r, e in zip(kept.itertuples(), run._examples(kept)):
            p.set(phase="training", iteration=n, question=r.question_id, sample=(r.init_index, r.corr_init_index, r.corr_index))
            assert [(i, k.split()[0]) for i, _, k in p.tokens()] == [*((i, "prompt") for i in e.prompt_ids), *((i, "learned") for i in e.completion_ids)]
            assert p.tokens()[-1] == (256, "⟨256⟩", "learned special")
            assert p.continues() == dict(same_prompt=run.cfg.train_prompt == "same", same_ids=True)
        for split in ("train", "test"):
            r, q = run._pairs(n, split).iloc[-1], getattr(run.data, split)[-1]
            p.set(phase="correction", split=split, iteration=n, question=q.id, sample=(r.init_index, r.corr_init_index, r.corr_index))
            assert [i for i, _, _ in p.tokens()] == [*run.prompter.correction(q, r.init_text), *r.corr_token_ids] and not any("learned" in k for k in p.counts())
            p.set(phase="initial", sample=(r.init_index, r.init_index, 0))
            first = run.dir.table(n if run.variant.evolving_init else 0, f"initial.{split}").iloc[-1]
            assert [i for i, _, _ in p.tokens()] == [*run.prompter.initial(q), *first.init_token_ids] and p.continues()["same_prompt"]


def test_the_embedded_models_tokens_need_no_weights(demo, monkeypatch):
    import stasc.model
    monkeypatch.setattr(stasc.model, "load_base", lambda *a: pytest.fail("weights were loaded"))
    run = STaSC.open(demo.dir.path, callbacks=[])
    for phase in ("initial", "correction", "training"):
        p = PromptInspector(run, phase=phase)
        text = "".join(t for _, t, _ in p.tokens())
        assert text.count("<|im_start|>") == 2 and text.endswith("<|im_end|>") and [k for _, t, k in p.tokens() if t == "<|im_end|>"][-1] == f"{'learned' if phase == 'training' else 'generated'} special"
        assert text == p.tokenizer.decode([i for i, _, _ in p.tokens()])
    assert run._engine is None


def test_another_tokenizer_is_found_out(hostile, demo):
    with pytest.raises(ConfigError, match="does not turn the stored ids into the stored text"): PromptInspector(STaSC.open(hostile.dir.path, callbacks=[])).tokens()
    with pytest.raises(ConfigError, match="give that one as tokenizer="): PromptInspector(demo, ByteTokenizer(), phase="initial").tokens()


def test_tokens_of_two_families_join_to_the_text():
    from conftest import family_tokenizer

    from stasc.widgets import _special_ids, _token_text
    for family in ("qwen2", "phi3"):
        tokenizer = family_tokenizer(family)
        ids = tokenizer("What is the capital of Peru?\n  Lima, I think.\t<|end|>", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert "".join(_token_text(tokenizer, i) for i in ids) == tokenizer.decode(ids)
        assert tokenizer.eos_token_id in _special_ids(tokenizer)


def test_an_iteration_without_kept_rows_says_so(tmp_path):
    run = scripted(tmp_path / "run", reward="exact_match", iterations=1)
    p = PromptInspector(run)
    table, p._tables = run._pairs(0, "train"), {}
    run._pairs = lambda *a, **k: table.assign(kept=False)
    p.set(iteration=1)
    assert p.selected()["question"] is None and "no correction of M_1 was kept" in p._page()
    p.widget; p._buttons[0].click()


# --- curves

def test_curves_are_the_metrics(runs):
    c = CurveExplorer({"a": runs[0], "b": runs[1], "c": runs[2]})
    for split in ("test", "train"):
        for measure in ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i"):
            wide = c.set(split=split, measure=measure).frame().pivot(index="iteration", columns="run", values="value")
            for name, run in zip("abc", runs): assert wide[name].tolist() == pytest.approx(run.metrics[f"{split}_{measure}"].tolist())
    assert c.set(variants=["FIF"]).frame().run.unique().tolist() == ["b"]
    assert c.set(runs=["a", "b"], variants=["ENE", "ENF"]).frame().run.unique().tolist() == ["a"]
    for measure in MEASURES: assert MEASURES[measure] in c.set(measure=measure).figure().alt


def test_published_runs_alone_can_be_explored():
    c = CurveExplorer(published(variant="EIF"), measure="acc_t1")
    assert len(c.frame()) and c.frame().lo.isna().all() and c._page().count("<img") == 1
    c.set(measure="cl"); assert "No curve is chosen" in c._page()
    with pytest.raises(DataError, match="no curve to draw"): c.figure()


def test_a_run_without_iterations_is_refused_in_one_sentence(tmp_path):
    run = STaSC(Config(), tmp_path / "run", data=Data([Question("a", "b", ("c",))], [Question("d", "e", ("f",))]), engine=ScriptedEngine(script), callbacks=[])
    for make in (FilterExplorer, RewardDebugger, PromptInspector):
        with pytest.raises(StoreError, match="has no complete iteration yet"): make(run)
    assert "No curve is chosen" in CurveExplorer(run)._page()


# --- what all have in common

class Page(html.parser.HTMLParser):
    "Tags and attributes of a page."
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text); self.close()
    def handle_starttag(self, tag, attrs):
        self.tags.add(tag); self.attributes |= {k for k, _ in attrs}
        if tag == "img": assert dict(attrs)["src"].startswith("data:image/svg+xml;base64,")
    def handle_data(self, data): self.text += data
    def handle_comment(self, data): raise AssertionError(f"a comment: {data}")
    handle_decl = handle_pi = unknown_decl = handle_comment


TAGS = set("div p b i u s mark em small code pre span table thead tbody tr th td br sub img del ins h3".split())
ATTRIBUTES = {"style", "class", "title", "scope", "role", "aria-current", "src", "alt", "width", "height", "decoding"}
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(list("<>&\"'$\\") + ["<b>", "</pre>", "\u202e", "\x1b[0m", "\r\n", "\ud800"])).map("".join)), st.integers(0, 9), st.integers(0, 9))
def test_any_text_is_shown_as_it_is(text, a, n):
    spans = [(a, a + n, "mark")] if n and a + n <= len(text) else []
    page = Page(f"<pre>{_text_html(text, spans)}</pre>")
    assert page.tags <= {"pre", "mark"} and not UNSEEN.search(page.text)
    assert page.text == (visible(text) if not spans else "".join(map(visible, (text[:a], text[a:a + n], text[a + n:]))))


def test_hostile_answers_in_every_panel(hostile):
    for panel in panels(hostile):
        if isinstance(panel, RewardDebugger): steps = [dict(position=i) for i in range(len(panel.set(position=0) and _texts(panel)))]
        elif isinstance(panel, PromptInspector): steps = [dict(phase=p, question=i) for p in ("initial", "correction") for i in range(20)]
        else: steps = [dict(which=w, page=i) for w in ("this", "only_this") for i in range(7)] if isinstance(panel, FilterExplorer) else [{}]
        for step in steps:
            shown = panel.set(**step)._repr_html_()
            page = Page(shown)
            assert page.tags <= TAGS and page.attributes <= ATTRIBUTES and "role=alert" not in shown
            assert len(shown) < 700_000 and not UNSEEN.search(page.text)
            assert not UNSEEN.search(repr(panel))
        panel.widget
        assert panel._html.value == panel._page()
        for c in panel._controls.values():
            for label, _ in getattr(c, "options", ()): assert len(label) < 100 and not UNSEEN.search(label) and "\n" not in label
        json.dumps([c.value for c in panel._controls.values()] + [panel._html.value], ensure_ascii=False).encode()


def test_every_hostile_text_is_seen(hostile):
    d, seen = RewardDebugger(hostile, listed="all", position=0), ""
    for i in range(len(_texts(d))): seen += Page(d.set(position=i)._page()).text
    for name, text in HOSTILE.items(): assert (visible(text) if len(text) < 5000 else text[:2000]) in seen, name
    assert "characters left out" in seen


def test_surrogates_and_long_texts_pass_through_the_controls():
    d = RewardDebugger(text="Final Answer: \ud800 x", references=["\udfff"])
    d.widget
    assert d._controls["text"].value == "Final Answer: \ufffd x" and "\ud800" not in d._html.value
    d.set(text="A" * 1_000_000 + "\nFinal Answer: b")
    assert d._controls["text"].value == "" and len(d._html.value) < 100_000 and "<mark>b</mark>" in d._html.value
    assert d.selected()["text"].endswith("b")


def test_a_choice_that_cannot_be_had_changes_nothing(runs):
    for panel in panels(runs[0]):
        before = panel.selected()
        for wrong in (dict(nonsense=1), {k: "no such value" for k in panel._menus()}, {next(iter(panel._menus())): object()}):
            with pytest.raises(StascError): panel.set(**wrong)
            assert panel.selected() == before
        with pytest.raises((ConfigError, RewardError), match="unknown"): panel.set(**{next(iter(panel._menus())): "no such value"})


def test_controls_and_choices_are_one(runs):
    for panel in panels(runs[0]):
        panel.widget
        for name, c in panel._controls.items():
            assert panel._from_control(name, c.value) == panel.selected()[name] or panel.selected()["position"] is None
            options = [v for _, v in getattr(c, "options", ())]
            for v in options:
                if name in panel._many: v = (v,)
                c.value = v
                assert panel.selected()[name] == v
            assert panel._html.value == panel._page()
            if name == "phase": c.value = "correction"
        assert panel.selected().keys() >= panel._controls.keys()


def test_what_is_shown_without_a_front_end(runs):
    for panel in panels(runs[0]):
        bundle = panel._repr_mimebundle_()
        assert set(bundle) == {"text/plain", "text/html"} and panel._box is None
        assert bundle["text/html"] == panel.static().data == panel._repr_html_() and panel.title in bundle["text/html"]
        assert len(bundle["text/plain"].splitlines()) > 2


def test_with_a_kernel_the_widget_is_shown_as_well(runs, monkeypatch):
    import IPython
    monkeypatch.setattr(IPython, "get_ipython", lambda: type("Shell", (), dict(kernel=object())))
    bundle = panels(runs[0])[1]._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    panel = panels(runs[0])[1]
    assert set(panel._repr_mimebundle_()) == {"text/plain", "text/html"}
    with pytest.raises(ConfigError, match="pip install ipywidgets"): panel.widget


def test_importing_loads_nothing_heavy():
    code = "import sys, stasc.widgets; print([m for m in ('torch', 'transformers', 'matplotlib', 'ipywidgets', 'IPython', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_panel_alone_has_no_choices():
    assert Panel().selected() == {}
    with pytest.raises(ConfigError, match="unknown choice"): Panel().set(x=1)
