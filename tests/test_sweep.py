"A sweep is the same as its runs one by one: whatever they share, wherever they run, and however often it is killed."
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from conftest import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from stasc.core import Config, ConfigError, Question, StoreError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.sweep import LiveTable, Sweep, Trial, recipe, sweep, trial_name, trials_of
from stasc.train import ScriptedEngine

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL and no fork")
VARIANTS = [a + b + c for a in "EF" for b in "IN" for c in "EF"]


def tree(folder):
    "Every file but the times and the locks."
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file() and p.name not in ("log.jsonl", ".lock")}


# --- an engine in which everything that may matter does

def guess(prompt, rng, skill): return f"Final Answer: {7 if (skill + rng.randrange(99)) % 5 < 2 else rng.randrange(7)}"


class Sensitive(ScriptedEngine):
    "Its answers depend on the model it started from, on each example in its order, on the seed and on the learning rate."
    def __init__(self, cfg=None): super().__init__(guess)

    def train(self, examples, start, out, cfg, seed):
        self.use(start)
        key = repr((self.skill, [(e.prompt_ids, e.completion_ids) for e in examples], seed, cfg.learning_rate, cfg.lora_r)).encode()
        (out / "skill.txt").write_text(str(int(hashlib.sha256(key).hexdigest()[:8], 16)))
        return dict(steps=len(examples), tokens=0, first_loss=0.0, last_loss=0.0, seconds=0.0)


def ask(n, s): return tuple(Question(f"{s}{i}", f"{s} number {i}?", ("7",)) for i in range(n))


QUESTIONS = Data(ask(5, "train"), ask(3, "test"))
BASE = Config(iterations=2, n_init=2, n_corr=2, n_train=5, n_test=3, part_size=2, data="own", variant="EIE")


def swept(grid, out, base=BASE, engine=Sensitive, **kw): return sweep(grid, out, base, data=QUESTIONS, engine=engine, **dict(shown=None) | kw)


def alone(cfg, out): return STaSC(cfg, out, data=QUESTIONS, engine=Sensitive(), callbacks=[]).run()


# --- names

values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=60), st.sampled_from(["EIE", "a/b", "..", "con", "A", "a", "é" * 300, "a,b=c"]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["data", "model", "prompts", "seed", "reward"]), values, min_size=1), min_size=2, max_size=2))
def test_names_are_safe_and_distinct(options):
    names = [trial_name(o) for o in options]
    for n in names: assert re.fullmatch(r"[A-Za-z0-9.+_=,-]{1,150}", n) and not n.endswith(".")
    told = [{k: "none" if v is None else str(v) for k, v in o.items()} for o in options]
    assert (names[0].lower() == names[1].lower()) == (told[0] == told[1])


def test_a_name_does_not_depend_on_the_rest_of_the_grid():
    small, large = trials_of(dict(variant="EIE", seed=[1])), trials_of([dict(seed=[0, 1], variant=VARIANTS), dict(seed=0, filter="all")])
    assert set(small) <= set(large) and len(large) == 17 and len({n.lower() for n in large}) == 17
    assert trials_of(dict(learning_rate="1e-4")).keys() == trials_of(dict(learning_rate=0.0001)).keys()


@pytest.mark.parametrize("grid, said", [([], "no trials"), (dict(seed=[]), "seed has no values"), (dict(sead=0), "did you mean 'seed'"), ("seed=0", "expected a mapping"),
                                        ([["seed"]], "expected a mapping"), (dict(seed=[0, "x"]), "seed = 'x'"), (dict(n_init=[1, 0]), "n_init = 0")])
def test_a_wrong_grid_is_refused_before_anything_is_written(tmp_path, grid, said):
    with pytest.raises(ConfigError, match=re.escape(said)): swept(grid, tmp_path / "s")
    assert not (tmp_path / "s").exists()


# --- what is shared

options = st.fixed_dictionaries(dict(variant=st.sampled_from(VARIANTS)), optional=dict(
    filter=st.sampled_from([None, "all", "improving", "stable"]), n_init=st.sampled_from([1, 2]), n_corr=st.sampled_from([1, 2]), seed=st.sampled_from([0, 1]),
    threshold=st.sampled_from([0.5, 1.0]), pairing=st.sampled_from(["sampled", "crossed"]), learning_rate=st.sampled_from([1e-4, 1e-3]), n_test_corr=st.sampled_from([1, 2]),
    lora_r=st.sampled_from([8, 16]), iterations=st.sampled_from([1, 2]), part_size=st.sampled_from([2, 3]), non_decreasing=st.sampled_from(["union", "stable"]),
    temperature=st.sampled_from([0.6, 0.7]), train_prompt=st.sampled_from(["same", "no_examples"])))


@settings(max_examples=4, deadline=None)
@given(st.lists(options, min_size=2, max_size=3))
def test_a_trial_that_shares_is_byte_for_byte_the_run_by_itself(tmp_path_factory, grid):
    tmp = tmp_path_factory.mktemp("shared")
    s = swept(grid, tmp / "s")
    for name, cfg in s.trials.items():
        alone(cfg, tmp / "alone" / name)
        assert tree(tmp / "s" / name) == tree(tmp / "alone" / name), name
    shutil.rmtree(tmp)


def test_equal_recipes_have_equal_files_and_share_as_much_as_there_is(tmp_path):
    cfgs = list(trials_of([dict(variant=VARIANTS), dict(variant="EIE", filter="all")], BASE).values())
    for i, c in enumerate(cfgs): alone(c, tmp_path / str(i))
    same = dict.fromkeys(("kept", "train", "initial.train", "corrections.train", "corrections.test"), 0)
    for i, a in enumerate(cfgs):
        for j, b in enumerate(cfgs[:i]):
            for n in range(3):
                for phase in same:
                    if n == 0 and phase in ("kept", "train") or recipe(a, n, phase) != recipe(b, n, phase): continue
                    name = f"iter_{n:02d}/" + dict(kept="kept.parquet", train="adapter").get(phase, f"{phase}/part-00000.parquet")
                    if phase == "initial.train" and "F" in (a.variant[0], b.variant[0]) and n: continue     # not drawn
                    read = tree if (tmp_path / str(i) / name).is_dir() else (lambda p: p.read_bytes())
                    assert read(tmp_path / str(i) / name) == read(tmp_path / str(j) / name), (a, b, name)
                    same[phase] += n > 0
    pairs = lambda k: k * (k - 1) // 2
    # M_1: four of each filter and the control. What M_1 corrects splits those in two. M_2 and what it learns from: EI*, FI*, EN*, FN* keep the same, and train from other models
    assert same["train"] == 2 * pairs(4) and same["kept"] == 2 * pairs(4) + 4 * pairs(2) and same["corrections.train"] == 4 * pairs(2)


def test_only_what_is_new_is_drawn(tmp_path):
    drawn = []

    class Counting(Sensitive):
        def sample(self, prompts, n, *args): drawn.append(n * len(prompts)); return super().sample(prompts, n, *args)
    counts = []
    for k in range(1, 4):
        swept(dict(n_corr=[1, 2, 3][:k]), tmp_path / "s", BASE.replace(iterations=1), engine=Counting)
        counts.append(sum(drawn)); drawn.clear()
    whole = [2 * (10 + 10 * k + 3 + 3) for k in (1, 2, 3)]
    assert counts == [whole[0]] + [w - 10 - 3 - 3 for w in whole[1:]]            # all of M_0's but the corrections of training questions
    swept(None, tmp_path / "s", engine=Counting)
    assert not drawn                                                            # nothing is left to do, no model is asked


@pytest.mark.parametrize("harm", ["bytes", "gone", "manifest", "config", "versions"])
def test_what_is_damaged_or_other_is_not_taken_over(tmp_path, harm):
    s = swept(dict(variant="EIE"), tmp_path / "s")
    donor = tmp_path / "s" / "variant=EIE"
    part = donor / "iter_00/initial.train/part-00001.parquet"
    if harm == "bytes": data = bytearray(part.read_bytes()); data[50] ^= 255; part.write_bytes(bytes(data))
    if harm == "gone": part.unlink()
    if harm == "manifest": (donor / "manifest.jsonl").write_bytes(b"garbage\n" * 3)
    if harm == "config": (donor / "config.json").write_text("[]")
    if harm == "versions":
        there = json.loads((donor / "config.json").read_text())
        (donor / "config.json").write_text(json.dumps(there | dict(versions=dict(torch="0"))))
    cfg = s.trials["variant=EIE"].replace(variant="FNF")
    run = Trial(cfg, tmp_path / "new", data=QUESTIONS, engine=Sensitive(), callbacks=[])
    run.donors = [(donor, BASE)]
    run.run()
    alone(cfg, tmp_path / "alone")
    assert tree(tmp_path / "new") == tree(tmp_path / "alone")


def test_run_directories_stand_alone(tmp_path):
    s = swept(dict(variant=["EIE", "EIF", "FIE"]), tmp_path / "s")
    before = tree(tmp_path / "s" / "variant=EIF")
    shutil.rmtree(tmp_path / "s" / "variant=EIE")
    assert tree(tmp_path / "s" / "variant=EIF") == before and STaSC.open(tmp_path / "s" / "variant=EIF", callbacks=[]).n_done == 3
    assert s.state("variant=EIE") == ("open", "")
    swept(None, tmp_path / "s")
    assert tree(tmp_path / "s" / "variant=EIE") == tree(alone(BASE, tmp_path / "alone").dir.path)


# --- killed

GRID = [dict(variant=["EIE", "FIF"], seed=[0, 1]), dict(variant="EIE", filter="correct", seed=0)]


def killed(out, k):
    "Run the sweep in a forked child that is killed at the k-th rename or sync of a file: True if it was."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            seen, real = [0], (os.replace, os.fsync, os.link)

            def counted(f):
                def g(*a, **kw):
                    seen[0] += 1
                    if seen[0] == k: os.kill(os.getpid(), signal.SIGKILL)
                    return f(*a, **kw)
                return g
            os.replace, os.fsync, os.link = map(counted, real)
            swept(GRID, out, BASE.replace(iterations=1))
            code = 0
        finally: os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


@posix
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)                     # fork beside threads that do nothing
        swept(GRID, tmp_path / "whole", BASE.replace(iterations=1))
        expected = tree(tmp_path / "whole")
        assert {"table.csv", "summary.csv"} <= set(expected)
        rng, kills = random.Random(0), 0
        while killed(tmp_path / "run", rng.randrange(1, 120)): kills += 1
        assert kills > 5
    assert tree(tmp_path / "run") == expected


@posix
def test_killed_within_the_table_leaves_the_old_table_whole(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for k in (3, 200, 330): killed(tmp_path / "run", k)
    f = tmp_path / "run/table.csv"
    if f.exists(): assert len(pd.read_csv(f)) >= 5
    assert "Sweep of 5 trials" in repr(Sweep.open(tmp_path / "run"))


# --- local processes

class Fatal(Sensitive):
    "The process ends without a word where the learning rate is high."
    def train(self, examples, start, out, cfg, seed):
        if cfg.learning_rate > 1e-2: os._exit(9)
        return super().train(examples, start, out, cfg, seed)


def test_two_processes_give_the_same_and_outlive_a_killed_one(tmp_path):
    grid = [dict(variant=["EIE", "FNF"], seed=[0, 1]), dict(learning_rate=0.1)]
    lines = []
    s = swept(grid, tmp_path / "two", BASE.replace(iterations=1), engine=Fatal, workers=2, shown=lines.append)
    one = swept(grid[0], tmp_path / "one", BASE.replace(iterations=1))
    assert all(tree(tmp_path / "two" / n) == tree(tmp_path / "one" / n) for n in one.trials)
    state = {n: s.state(n) for n in s.trials}
    assert [v[0] for v in state.values()] == ["complete"] * 4 + ["failed"] and "killed, twice" in state["learning_rate=0.1"][1]
    assert len(lines) == 5 and "learning_rate=0.1: failed" in " ".join(lines)


# --- what fails

class Moody(Sensitive):
    def train(self, examples, start, out, cfg, seed):
        if cfg.seed == 1: raise RuntimeError(f"the loss is not a number\nin {out}")
        return super().train(examples, start, out, cfg, seed)


def test_a_failed_trial_stops_no_other_and_is_tried_again(tmp_path):
    lines = []
    s = swept(dict(seed=[0, 1, 2]), tmp_path / "s", engine=Moody, shown=lines.append)
    assert [s.state(n)[0] for n in s.trials] == ["complete", "failed", "complete"]
    table = pd.read_csv(tmp_path / "s/table.csv")
    assert table[table.seed == 1].said.unique().tolist() == ["RuntimeError: the loss is not a number"]
    assert [line.split()[0] for line in lines] == ["[1/3]", "[2/3]", "[3/3]"] and "failed, RuntimeError" in lines[1]
    assert s.summary().n_seeds.tolist() == [2]
    swept(None, tmp_path / "s")
    assert [s.state(n)[0] for n in s.trials] == ["complete"] * 3 and not list((tmp_path / "s/errors").iterdir())
    assert tree(tmp_path / "s/seed=1") == tree(alone(BASE.replace(seed=1), tmp_path / "alone").dir.path)


def test_nothing_kept_and_no_model_are_said_in_the_table(tmp_path):
    class Stubborn(ScriptedEngine):
        def __init__(self, cfg):
            if cfg.lora_r == 8: raise OSError("no such model")
            super().__init__(lambda prompt, rng, skill: "Final Answer: no idea")
    s = swept(dict(lora_r=[8, 16]), tmp_path / "s", engine=Stubborn)
    first, second = s.table.to_dict("records")
    assert first["status"] == "failed" and first["said"] == "OSError: no such model" and pd.isna(first["iteration"])
    assert second["status"] == "ended" and "n_corr" in second["said"] and second["iteration"] == 0 and second["test_acc_t1"] == 0
    assert len(s.brief()) == 1
    assert "1 ended, 1 failed" in repr(s)


def test_an_interruption_stops_the_sweep(tmp_path):
    class Tired(Sensitive):
        def train(self, *args): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): swept(dict(seed=[0, 1]), tmp_path / "s", engine=Tired)
    assert [Sweep.open(tmp_path / "s").state(f"seed={k}")[0] for k in (0, 1)] == ["open", "open"]


def test_what_does_not_belong_together_is_refused(tmp_path):
    swept(dict(seed=0), tmp_path / "s")
    with pytest.raises(StoreError, match="seed=0 has another n_corr"): swept(dict(seed=[0, 1]), tmp_path / "s", BASE.replace(n_corr=3))
    with pytest.raises(StoreError, match="other questions"): sweep(None, tmp_path / "s", data=Data(ask(4, "x"), ask(2, "y")), engine=Sensitive)
    with pytest.raises(StoreError, match="no sweep to go on with"): swept(None, tmp_path / "empty")
    with pytest.raises(ConfigError, match="workers = 0"): swept(dict(seed=0), tmp_path / "s", workers=0)
    more = swept(dict(seed=0), tmp_path / "s", BASE.replace(iterations=3))       # this may change
    assert more.table.iteration.tolist() == [0, 1, 2, 3]


def test_one_sweep_at_a_time(tmp_path):
    said = []

    class Nosy(Sensitive):
        def train(self, *args):
            try: swept(dict(seed=0), tmp_path / "s")
            except StoreError as e: said.append(str(e))
            return super().train(*args)
    swept(dict(seed=0), tmp_path / "s", BASE.replace(iterations=1), engine=Nosy)
    assert said and "under way in another process" in said[0]


# --- the table in a notebook

@pytest.fixture
def tables(monkeypatch):
    "What a notebook would show of sweeps, kept in a list."
    seen = []
    monkeypatch.setattr("stasc.sweep._in_notebook", lambda: True)
    monkeypatch.setattr(LiveTable, "every", .01)
    monkeypatch.setattr(LiveTable, "_show", lambda self, bundle: seen.append(bundle))
    return seen


def rows_of(bundle):
    "The cells of a table as a notebook shows it; nothing in it but what a table is made of."
    class Cells(HTMLParser):
        rows, tags = [], set()
        def handle_starttag(self, tag, attrs):
            self.tags.add((tag, *(k for k, _ in attrs)))
            if tag == "tr": self.rows.append([])
            if tag in ("th", "td"): self.rows[-1].append("")
        def handle_data(self, text):
            if self.rows and self.rows[-1]: self.rows[-1][-1] += text.replace("\xa0", " ")
    cells = Cells()
    cells.rows, cells.tags = [], set()
    cells.feed(re.split("</table>", bundle["text/html"])[0])
    assert {t[0] for t in cells.tags} <= {"div", "progress", "table", "tr", "th", "td"} and {a for t in cells.tags for a in t[1:]} <= {"style", "aria-label", "max", "value"}
    return cells.rows[1:]


def until(found, seconds=60):
    "Wait for something; another process, or another thread, is at it."
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end: time.sleep(.005)
    assert found()


def test_the_table_says_what_runs_here(tmp_path, tables, capsys):
    halfway = [["0", "complete", "M_1 of 1", ""], ["1", "running", "M_0 of 1", "M_1 train"], ["2", "waiting", "", ""]]

    class Waits(Sensitive):
        def train(self, examples, start, out, cfg, seed):
            if cfg.seed == 1: until(lambda: [[*r[:3], r[-1].partition(" 0/")[0]] for r in rows_of(tables[-1])] == halfway)
            return super().train(examples, start, out, cfg, seed)
    s = sweep(dict(seed=[0, 1, 2]), tmp_path / "s", BASE.replace(iterations=1), data=QUESTIONS, engine=Waits)
    assert capsys.readouterr().out == ""
    assert [r[1:] for r in rows_of(tables[0])] == [["waiting", "", "", ""]] * 3
    assert rows_of(tables[-1]) == [[str(k), "complete", "M_1 of 1", *(f"{s.metrics_of(f'seed={k}')[c].iloc[-1]:.3f}" for c in ("test_acc_t1", "test_acc_t2"))] for k in range(3)]
    assert "<progress" not in tables[-1]["text/html"] and " left" not in tables[-1]["text/plain"] and str(tmp_path) not in str(tables)
    assert tables[-1]["text/plain"].splitlines()[0] == "Sweep of 3 trials: 3 complete"
    n = len(tables)
    swept(None, tmp_path / "s", shown=print)                                    # nothing is left to do: the same table
    assert tables[n:] and all(rows_of(b) == rows_of(tables[n - 1]) for b in tables[n:]) and tables[-1] == tables[n - 1]


class Gated(Sensitive):
    "Trains when it may: once there is a file."
    def train(self, examples, start, out, cfg, seed):
        until(Path(os.environ["GATE"]).exists)
        return super().train(examples, start, out, cfg, seed)


def test_the_table_says_what_runs_in_other_processes(tmp_path, tables, monkeypatch):
    monkeypatch.setenv("GATE", str(gate := tmp_path / "gate"))

    def show(self, bundle):
        tables.append(bundle)
        state = [r[1:3] + r[-1:] for r in rows_of(bundle)]
        if state == [["running", "M_0 of 1", "M_1 train"]] * 2 + [["waiting", "", ""]]: gate.touch()
    monkeypatch.setattr(LiveTable, "_show", show)
    s = swept(dict(seed=[0, 1, 2]), tmp_path / "s", BASE.replace(iterations=1), engine=Gated, workers=2, shown=print)
    assert [s.state(n)[0] for n in s.trials] == ["complete"] * 3 and [r[1] for r in rows_of(tables[-1])] == ["complete"] * 3
    assert any([r[1] for r in rows_of(b)][:2] == ["running"] * 2 for b in tables)


HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)> &lt;b&gt; \x1b[31m\u202e$x$"


def test_hostile_sentences_and_options_stay_words(tmp_path, tables):
    class Rude(Sensitive):
        def train(self, *args): raise RuntimeError(HOSTILE)
    swept(dict(model=["<script>alert(3)</script>", "b"]), tmp_path / "s", engine=Rude, shown=print)
    for b in tables: rows_of(b)
    table = rows_of(tables[-1])
    assert [r[0] for r in table] == ["<script>alert(3)</script>", "b"] and [r[1] for r in table] == ["failed"] * 2
    for r in table: assert "<script>alert(1)</script><img src=x onerror=alert(2)> &lt;b&gt;" in r[-1] and "\x1b" not in r[-1] and "\u202e" not in r[-1]
    for f in (tmp_path / "s/errors").iterdir(): f.write_text(f"one\n{HOSTILE}", encoding="utf-8")
    table = LiveTable(s := Sweep.open(tmp_path / "s"), [])
    assert len(rows_of(table._bundle())) == 2 and len(table._bundle()["text/plain"].splitlines()) == 2 + len(s.trials)
    assert "\x1b" not in table._bundle()["text/plain"]


def test_what_failed_before_waits_and_runs_again(tmp_path, tables):
    swept(dict(seed=[0, 1]), tmp_path / "s", engine=Moody, shown=None)
    assert tables == []                                                         # None shows nothing

    class Waits(Sensitive):
        def train(self, examples, start, out, cfg, seed): until(lambda: [r[1] for r in rows_of(tables[-1])] == ["complete", "running"]); return super().train(examples, start, out, cfg, seed)
    swept(None, tmp_path / "s", engine=Waits, shown=print)
    assert [r[1] for r in rows_of(tables[0])] == ["complete", "waiting"] and rows_of(tables[0])[1][2] == "M_0 of 2"
    assert not any("failed" in str(b) for b in tables)


def test_an_interruption_keeps_the_table(tmp_path, tables):
    class Tired(Sensitive):
        def train(self, examples, start, out, cfg, seed):
            if cfg.seed == 1: raise KeyboardInterrupt
            return super().train(examples, start, out, cfg, seed)
    with pytest.raises(KeyboardInterrupt): swept(dict(seed=[0, 1, 2]), tmp_path / "s", engine=Tired, shown=print)
    last = tables[-1]
    assert [r[1:3] for r in rows_of(last)] == [["complete", "M_2 of 2"], ["interrupted", "M_0 of 2"], ["waiting", ""]] and "progress" not in last["text/html"]
    time.sleep(.05)
    assert tables[-1] is last                                                   # nothing follows the end


def test_who_gets_lines_and_who_a_table(tmp_path, tables, capsys, monkeypatch):
    lines = []
    def one(name, **kw): return swept(dict(seed=0), tmp_path / name, BASE.replace(iterations=1), **kw)
    one("a", shown=lines.append)                     # whoever wants lines gets them
    one("b", shown=print, live=False)
    assert tables == [] and capsys.readouterr().out == lines[0] + "\n"
    one("c", shown=None, live=True)
    assert tables == []
    one("d", shown=lines.append, live=True)
    assert tables and len(lines) == 2
    n = len(tables)
    monkeypatch.setattr("stasc.sweep._in_notebook", lambda: False)              # a terminal
    one("e", shown=print)
    assert capsys.readouterr().out == lines[0] + "\n" and len(tables) == n
    one("f", shown=print, live=True)
    assert capsys.readouterr().out == tables[-1]["text/plain"] + "\n" and len(tables) == n


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["complete", "failed", "running", "waiting"]), min_size=1, max_size=120), st.randoms(use_true_random=False))
def test_a_large_table_shows_what_one_looks_for_and_counts_the_rest(states, rng):
    s = Sweep("nowhere", trials_of(dict(seed=range(len(states))), BASE))
    names = list(s.trials)
    ends = [n for n, state in zip(names, states) if state in ("complete", "failed")]
    orders, bundles = [ends, rng.sample(ends, len(ends))], []
    for done in (False, True):
        for order in orders:
            table = LiveTable(s, names)
            for n in order: table.add(f"{n}: it is over")
            table._row = lambda n: dict(state=states[names.index(n)], model="", acc_t1="", acc_t2="", note="")
            table.done = done
            shown = rows_of(bundle := table._bundle())
            bundles.append(bundle)
            told = {state: sum(int(k) for k in re.findall(rf"(\d+) {state}", bundle["text/plain"].splitlines()[0])) for state in ("complete", "failed", "running", "interrupted", "waiting")}
            now = ["interrupted" if done and x == "running" else x for x in states]
            assert told == {state: now.count(state) for state in told}
            if len(states) <= 40: assert [r[1] for r in shown] == now and "more:" not in bundle["text/plain"]
            if len(states) > 1: assert [int(r[0]) for r in shown] == sorted(int(r[0]) for r in shown)
            if len(states) > 40:
                assert len(shown) == 40 and f"and {len(states) - 40} more: " in bundle["text/html"].split("</table>")[1]
                seen = {names[int(r[0])] for r in shown}
                look_for = [n for n, x in zip(names, now) if x in ("failed", "running", "interrupted")]
                if len(look_for) <= 40 and now.count("failed") <= 20: assert set(look_for) <= seen
                if not done and len(look_for) < 20: assert set([n for n in order if states[names.index(n)] == "complete"][-(40 - len(look_for)):]) <= seen
    assert bundles[2] == bundles[3]                                             # the end does not depend on who ended first


def test_a_table_that_cannot_be_shown_stops_no_sweep(tmp_path, tables, monkeypatch):
    def broken(self, bundle): raise RuntimeError("the connection is lost")
    monkeypatch.setattr(LiveTable, "_show", broken)
    assert swept(dict(seed=[0, 1]), tmp_path / "s", shown=print).summary().n_seeds.tolist() == [2]


# --- over the seeds

def test_summary_against_the_metrics_of_the_runs(tmp_path):
    from scipy import stats
    s = swept([dict(variant=["EIE", "FIE"], seed=[0, 1, 2]), dict(variant="EIE", filter="all", seed=0)], tmp_path / "s")
    table = s.summary()
    assert table.n_seeds.tolist() == [3, 3, 1] and list(table.columns[:3]) == ["variant", "filter", "n_seeds"]
    for _, row in table.iterrows():
        runs = [r for r in s.runs.values() if r.cfg.variant == row.variant and (r.cfg.filter or None) == (None if pd.isna(row["filter"]) else row["filter"])]
        gain = [r.metrics.test_acc_t2.iloc[-1] - r.metrics.test_acc_t2[0] for r in runs]
        assert row.correction_gain == pytest.approx(sum(gain) / len(gain))
        if len(runs) > 1:
            lo, hi = stats.t.interval(0.95, len(gain) - 1, sum(gain) / len(gain), stats.sem(gain))
            assert (row.correction_gain_lo, row.correction_gain_hi) == pytest.approx((lo, hi), nan_ok=True)
        else: assert pd.isna(row.correction_gain_lo)
    means = s.means
    assert list(means) == ["EIE", "FIE", "EIE, filter all"] and len(means["EIE"].metrics) == 3
    assert means["EIE"].metrics.test_acc_t2[2] == pytest.approx(table.correction[0])
    s.side_by_side(), s.heatmap()


# --- the command

@pytest.mark.parametrize("argv, said", [(["--grid", "seed"], "expected OPTION=VALUES"), (["--grid", "sead=1"], "did you mean 'seed'"), (["--grid", "seed=0", "seed=1"], "twice"),
                                        (["--grid", "seed=a"], "seed = 'a'"), (["--grid", "seed=3..1"], "no values"), ([], "no sweep to go on with"),
                                        (["--preset", "demo"], "give --grid")])
def test_a_wrong_command_is_one_sentence(tmp_path, argv, said):
    done = run_command("sweep", "--out", str(tmp_path / "s"), *argv)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done.err
