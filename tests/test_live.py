"A run watched: one display in a kernel, one line for each phase in a terminal, estimates against a clock that is known."
import io
import itertools
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasc import live as module
from stasc.core import Config, Question, Variant, all_variants
from stasc.data import Data
from stasc.live import Live, Pace, about, phases_of, texts_per_question, timed_before
from stasc.loop import STaSC
from stasc.train import ScriptedEngine

QUESTIONS = [Question(str(i), f"What is {i} plus {i}?", (str(2 * i),)) for i in range(10)]


def adder(prompt, rng, skill):
    i = int(re.findall(r"What is (\d+)", prompt)[-1])
    return f"Final Answer: {2 * i if rng.random() < .4 + .1 * skill else i}"


def make(path, *callbacks, engine=None, **options):
    cfg = Config(**(dict(iterations=2, n_init=2, n_corr=2, shots=0, part_size=2) | options))
    return STaSC(cfg, path, data=Data(QUESTIONS[:6], QUESTIONS[6:]), engine=engine or ScriptedEngine(adder), callbacks=callbacks)


def blank(run):
    from matplotlib.figure import Figure
    return Figure(figsize=(1, 1))


class Shown(Live):
    "What a notebook would show, kept in a list."
    def __init__(self, every=0, picture=blank, **kw):
        super().__init__(picture, notebook=True, **kw)
        self.every, self.bundles = every, []
    def _show(self, bundle):
        if self._timer: self._timer.cancel()
        self._timer, self._shown, self._cell = None, module.time.monotonic(), module._cell()
        self.bundles.append(bundle)
    said = property(lambda self: [b["text/plain"] for b in self.bundles])


class Tired(ScriptedEngine):
    "Gives up at a call."
    def __init__(self, at): super().__init__(adder); self.left = at
    def sample(self, *args):
        self.left -= 1
        if self.left < 0: raise KeyboardInterrupt
        return super().sample(*args)


# --- in a terminal

@pytest.mark.parametrize("variant", [str(v) for v in all_variants()])
def test_one_line_for_each_phase_at_its_end(tmp_path, capsys, variant):
    run = make(tmp_path / "run", Live(), variant=variant).run()
    lines = capsys.readouterr().out.splitlines()
    want = []
    for n in range(run.n_done):
        want += [(f"M_{n}", p) for p in phases_of(run, n)] + [repr(run[n])]
    assert [l if l in map(repr, map(run.__getitem__, range(run.n_done))) else tuple(l.split()[:2]) for l in lines if l != run.ended] == want
    drawn = re.findall(r"(\S+)\s+(\d+) questions, (\d+) texts", "\n".join(lines))
    for phase, questions, texts in drawn: assert int(texts) == int(questions) * texts_per_question(run.cfg, phase)
    logged = [json.loads(l)["phase"] for l in (run.dir/"log.jsonl").read_text().splitlines()]
    assert [p for p in logged if p == "train" or "." in p] == [l.split()[1] for l in lines if "/s" in l]


@pytest.mark.parametrize("at", range(0, 25, 3))
def test_a_stopped_run_says_where_and_goes_on(tmp_path, at):
    whole = make(tmp_path / "whole", Live(notebook=False, file=io.StringIO())).run()
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt): make(tmp_path / "run", Live(notebook=False, file=out), engine=Tired(at)).run()
    stopped = out.getvalue().splitlines()[-1]
    assert re.fullmatch(r"M_\d+ +\S+ +stopped after \d+ of \d+; run it again to go on from there", stopped)
    make(tmp_path / "run", Live(notebook=False, file=out)).run()
    lines = [tuple(l.split()[:2]) for l in out.getvalue().splitlines() if "/s" in l]
    assert lines == [(f"M_{n}", p) for n in range(3) for p in phases_of(whole, n)]
    m = int(re.search(r"after (\d+)", stopped)[1])              # a phase that goes on counts what is drawn now
    assert (total := re.search(rf"^{re.escape(stopped[:24].rstrip())} +(\d+) questions", out.getvalue(), re.M)) and int(total[1]) == int(re.search(r"of (\d+)", stopped)[1]) - m


def test_a_complete_run_prints_nothing_more(tmp_path):
    out = io.StringIO()
    make(tmp_path / "run").run()
    make(tmp_path / "run", Live(notebook=False, file=out)).run()
    assert out.getvalue() == ""


def test_hostile_model_names_stay_words(tmp_path):
    live = Shown()
    make(tmp_path / "run", live, model="<script>alert(1)</script><img src=x onerror=alert(2)>").run()

    class Tags(HTMLParser):
        seen = set()
        def handle_starttag(self, tag, attrs): self.seen.add((tag, *sorted(k for k, _ in attrs)))
    for b in live.bundles: Tags().feed(b["text/html"])
    assert {t[0] for t in Tags.seen} == {"div", "img", "progress"}
    assert all("onerror" not in t for t in Tags.seen)


# --- in a notebook

def test_every_state_is_shown_when_there_is_no_hurry(tmp_path):
    live = Shown()
    run = make(tmp_path / "run", live).run()
    phases = list(dict.fromkeys(s.split(",")[0] for s in live.said if s.startswith("M_")))
    assert phases == [f"M_{n} {p}" for n in range(3) for p in phases_of(run, n)]
    assert "M_0 corrections.train, 4 of 6 questions" in " ".join(live.said)
    assert live.said[-1].startswith("embedded EIE (2, 2) seed 0: complete, M_0 to M_2. Held-out questions: initial answers")
    for b in live.bundles[:-1]: assert b["text/html"].count("<img") <= 1
    assert live.bundles[-1]["text/html"].count("<img") == 1 and "<progress" not in live.bundles[-1]["text/html"]


def test_quick_updates_are_dropped_but_not_the_end(tmp_path):
    live = Shown(every=1000)
    make(tmp_path / "run", live).run()
    assert len(live.bundles) == 2 and "complete" in live.said[-1]


def test_an_update_that_came_too_early_is_sent_later(tmp_path):
    live, run = Shown(every=.05), make(tmp_path / "run")
    live.on_phase(run, 0, "initial.train", 0, 6)
    live.on_phase(run, 0, "initial.train", 2, 6)
    live.on_phase(run, 0, "initial.train", 4, 6)
    live._timer.join(30)
    assert [re.search(r"\d+ of 6", s)[0] for s in live.said] == ["0 of 6", "4 of 6"]


def test_a_late_update_never_follows_the_end(tmp_path):
    live = Shown(every=.02)
    for i in range(5):
        make(tmp_path / f"run {i}", live, iterations=1).run()
        assert "complete" in live.said[-1]
    before = len(live.bundles)
    live._late()
    assert len(live.bundles) == before and live._run is None


def test_the_end_holds_no_times_and_no_paths(tmp_path):
    ends = []
    for i in range(2):
        live = Shown(picture=None)
        make(tmp_path / str(i) / "run", live).run()
        ends.append(live.bundles[-1])
    assert ends[0] == ends[1]
    assert not re.search(r"/s\b|\bleft\b|\d s\b", ends[0]["text/plain"]) and str(tmp_path) not in json.dumps(ends)


@pytest.mark.parametrize("at", [0, 4, 12, 20])
def test_a_stopped_run_leaves_what_is_complete(tmp_path, at):
    live = Shown()
    with pytest.raises(KeyboardInterrupt): make(tmp_path / "run", live, engine=Tired(at)).run()
    done = make(tmp_path / "run").n_done
    assert ("no model is complete yet" if not done else f"{done} of the models M_0 to M_2") in live.said[-1]
    assert "<progress" not in live.bundles[-1]["text/html"] and live.bundles[-1]["text/html"].count("<img") == (done > 0)


def test_a_run_that_ends_early_says_why(tmp_path):
    live = Shown()
    make(tmp_path / "run", live, engine=ScriptedEngine(lambda *_: "Final Answer: none")).run()
    assert "none of its corrections passed the improving filter" in live.said[-1]


def test_a_picture_that_fails_does_not_end_the_run(tmp_path):
    def broken(run): raise ValueError("<b>no</b>")
    live = Shown(picture=broken)
    assert make(tmp_path / "run", live).run().n_done == 3
    assert "the picture could not be drawn: ValueError: &lt;b&gt;no&lt;/b&gt;" in live.bundles[-1]["text/html"]


def test_unknown_phases_do_not_end_the_run(tmp_path):
    live, run = Shown(), make(tmp_path / "run")
    live.on_phase(run, 0, "initial.test", 0, 4)
    live.on_phase(run, 1, "judging.train", 0, 6)
    live.on_phase(run, 1, "judging.train", 3, 6)
    assert "judging.train, 3 of 6 questions" in live.said[-1] and "time left: unknown" in live.said[-1]


KERNEL = """
import sys; sys.path[:0] = {paths!r}
import tempfile
from pathlib import Path
from test_live import Live, Tired, make
tmp = tempfile.TemporaryDirectory()
Live.every = {every}
"""


def execute(every, cells):
    "Run cells in a kernel: the notebook and what came from the kernel, by cell."
    import nbformat
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    from pathlib import Path
    here, messages = Path(__file__).parent, []

    class Client(NotebookClient):
        def process_message(self, msg, cell, index):
            if msg["msg_type"] not in ("status", "execute_input"): messages.append((index, msg["msg_type"], msg["content"]))
            return super().process_message(msg, cell, index)
    nb = new_notebook(cells=[new_code_cell(c) for c in [KERNEL.format(paths=[str(here), str(here.parent)], every=every), *cells]])
    Client(nb, timeout=240, kernel_name="python3").execute()
    nbformat.validate(nb)
    return nb, messages


def test_one_display_in_a_kernel(tmp_path):
    pytest.importorskip("nbclient")
    whole = "_ = make(Path(tmp.name)/'{}', live := Live()).run()"
    nb, messages = execute(0, [whole.format("a"), "run = make(Path(tmp.name)/'b', Live()); _ = run.step()", "_ = run.step()", "_ = run.step()", whole.format("c"),
                               "Live.every = 1000; _ = make(Path(tmp.name)/'d', Live()).run()",
                               "try: make(Path(tmp.name)/'e', Live(), engine=Tired(15)).run()\nexcept KeyboardInterrupt: pass"])
    for i in range(1, 8):
        mine = [(kind, content) for index, kind, content in messages if index == i]
        assert [kind for kind, _ in mine].count("display_data") == 1 and {kind for kind, _ in mine} <= {"display_data", "update_display_data"}
        assert len({content["transient"]["display_id"] for _, content in mine}) == 1
        assert len(nb.cells[i].outputs) == 1 and set(nb.cells[i].outputs[0].data) == {"text/html", "text/plain"}
        assert "<progress" not in nb.cells[i].outputs[0].data["text/html"]
    assert sum(index == 6 for index, *_ in messages) == 2                                   # no more updates than are allowed
    assert sum(index == 1 for index, *_ in messages) > 30
    ends = [nb.cells[i].outputs[0].data["text/plain"].split(". ")[0] for i in range(1, 8)]
    assert ends == ["embedded EIE (2, 2) seed 0: " + e for e in ("complete, M_0 to M_2", "1 of the models M_0 to M_2", "2 of the models M_0 to M_2",
                                                                 "complete, M_0 to M_2", "complete, M_0 to M_2", "complete, M_0 to M_2", "1 of the models M_0 to M_2")]
    assert nb.cells[1].outputs == nb.cells[5].outputs


def test_a_sweep_is_one_table_in_a_kernel(tmp_path):
    pytest.importorskip("nbclient")
    setup = "from test_sweep import BASE, LiveTable, QUESTIONS, Moody, sweep; LiveTable.every = .02"
    nb, messages = execute(1, [setup, "s = sweep(dict(seed=[0, 1]), Path(tmp.name)/'s', BASE, data=QUESTIONS, engine=Moody)",
                               "s = sweep(None, Path(tmp.name)/'s', data=QUESTIONS, engine=Moody, live=False)"])
    mine = [(kind, content) for index, kind, content in messages if index == 2]
    assert mine[0][0] == "display_data" and len(mine) > 3 and {kind for kind, _ in mine[1:]} == {"update_display_data"}     # no lines, no bars
    assert len({content["transient"]["display_id"] for _, content in mine}) == 1
    assert any("running" in content["data"]["text/plain"] for _, content in mine[1:-1])
    (output,) = nb.cells[2].outputs
    assert output.data["text/plain"].splitlines()[0] == "Sweep of 2 trials: 1 complete, 1 failed" and "<progress" not in output.data["text/html"]
    assert "RuntimeError: the loss is not a number" in output.data["text/html"]
    assert "1 of 2 trials were done before" in "".join(o.get("text", "") for o in nb.cells[3].outputs)


# --- time left

class World:
    "A run of known pace, on a clock of its own."
    def __init__(self, monkeypatch, seconds, iterations=3, variant="EIE", kept=20):
        self.now, self.seconds, self.kept = 100.0, seconds, kept
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.run = SimpleNamespace(cfg=Config(iterations=iterations, variant=variant, n_init=3, n_corr=2), variant=Variant(variant), data=Data(QUESTIONS[:6], QUESTIONS[6:]),
                                   metrics=pd.DataFrame(), n_done=0, dir=SimpleNamespace(__truediv__=None), ended=None)
        self.events = []
        for n in range(iterations + 1):
            for p in phases_of(self.run, n):
                total = kept if p == "train" else len(getattr(self.run.data, p.split(".")[1]))
                self.events += [(n, p, a, total) for a in ([0, total] if p == "train" else [*range(0, total, 2), total])]

    def play(self, live):
        "Each event and the time at which it comes."
        for (n, p, a, total), (n2, p2, b, _) in itertools.pairwise([*self.events, (None, None, None, None)]):
            live.on_phase(self.run, n, p, a, total)
            yield n, p, a, self.now
            if (n, p) == (n2, p2): self.now += (b - a) * self.seconds[p]


@pytest.mark.parametrize("variant", ["EIE", "FIF"])
def test_time_left_is_right_in_a_world_of_constant_pace(monkeypatch, variant):
    seconds = {"train": .7, "initial.train": 1.5, "corrections.train": 4.0, "initial.test": .25, "corrections.test": .5, "transfer.test": .25}
    monkeypatch.setattr(module, "timed_before", lambda run: Pace(run.cfg))
    world, live, seen = World(monkeypatch, seconds, variant=variant), Live(notebook=False, file=io.StringIO()), []
    for n, p, a, now in world.play(live): seen.append((n, p, a, now, live._left()))
    ends = {n: max(now for m, *_, now, _ in seen if m == n) for n, *_ in seen}
    for n, p, a, now, (this, all_) in seen:
        if n >= 2:
            assert this == pytest.approx(ends[n] - now) and all_ == pytest.approx(ends[3] - now)
        if n == 0: assert all_ is None
    assert seen[0][4] == (None, None)
    first = next(s for s in seen if s[:3] == (0, "corrections.train", 2))
    assert first[4][0] is not None and first[4][1] is None


@given(st.floats(0, 1e7))
@settings(max_examples=200)
def test_spans_of_time_are_near_what_they_say(seconds):
    said = about(seconds)
    if seconds < 1: assert said == "less than 1 s"
    else:
        unit = dict(h=3600, min=60, s=1)
        value = sum(int(n) * unit[u] for n, u in re.findall(r"(\d+) (h|min|s)", said))
        assert abs(value - seconds) <= max(.5, 5 if seconds >= 59.5 else 0, 30 if seconds >= 3570 else 0) + 1e-6
        assert all(int(n) < 60 for n, u in re.findall(r"(\d+) (min|s)", said))
    assert about(None) == "unknown"


def test_a_resumed_run_knows_its_pace_from_the_log(tmp_path):
    make(tmp_path / "run", iterations=1).run()
    run = make(tmp_path / "run", iterations=3)
    log = run.dir/"log.jsonl"
    good = [dict(iteration=n, phase=p, seconds=6.0) for n in (0, 1) for p in ("initial.train", "corrections.train")] + [dict(iteration=1, phase="train", seconds=5.0)]
    odd = [{}, [], None, dict(phase=3), dict(iteration=0, phase="nothing", seconds=1), dict(iteration=9, phase="train", seconds=1),
           dict(iteration=0, phase="initial.train", seconds="x"), dict(iteration=0, phase="initial.train", seconds=-5)]
    log.write_text("\n".join([*map(json.dumps, good + odd), "", "{", '{"iteration": 1, "phase": "init']))
    pace = timed_before(run)
    assert {k: len(v) for k, v in pace.seen.items()} == {"initial.train": 2, "corrections.train": 2, "train": 1}
    assert pace.seconds("initial.train", 6) == pytest.approx(6) and pace.seconds("train", int(run.metrics.n_kept[1])) == pytest.approx(5)
    assert pace.seconds("initial.test", 4) == pytest.approx(6 / 12 * 4)                    # by the text, of the other split
    live = Shown()
    run.callbacks = [live]
    run.run()
    assert "left in this iteration" in live.said[0] and "unknown" not in live.said[0]


def test_without_a_log_nothing_is_known(tmp_path):
    assert timed_before(make(tmp_path / "run")).seen == {}
    assert Pace(Config()).seconds("train", 5) is None and Pace(Config()).seconds("initial.test", 5) is None
