"A run killed with SIGKILL anywhere and resumed ends with the same bytes as one that was never killed."
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import filelock
import pytest
from conftest import root, run_command

from stasc.core import Config, Question, StoreError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.store import RunDir, part_name
from stasc.train import ScriptedEngine

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL and no fork")


def tree(folder):
    "Every file of a run but the times and the lock."
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file() and p.name not in ("log.jsonl", ".lock")}


# --- the scripted engine: a kill at every single event, in forked children

def numbers(prompt, rng, skill): return f"Final Answer: {7 if rng.random() < 0.3 + 0.2 * skill else rng.randrange(7)}"


def ask(n, s): return tuple(Question(f"{s}{i}", f"{s} number {i}?", ("7",)) for i in range(n))


def scripted(out, variant="EIE", engine=None, callbacks=(), **options):
    cfg = Config(**dict(variant=variant, iterations=2, n_init=2, n_corr=2, n_train=5, n_test=3, part_size=2, data="own") | options)
    return STaSC(cfg, out, data=Data(ask(5, "train"), ask(3, "test")), engine=engine or ScriptedEngine(numbers), callbacks=callbacks)


class Killer:
    "Counts what happens to the run, and ends the process without a word at the k-th."
    def __init__(self, k): self.k, self.seen = k, []

    def __call__(self, event):
        self.seen.append(event)
        if len(self.seen) - 1 == self.k: os.kill(os.getpid(), signal.SIGKILL)

    def on_phase(self, run, iteration, phase, done, total): self(f"{phase} at {done}")
    def on_iteration(self, run, it): self(f"M_{it.n} complete")

    def watch(self, engine):
        "Be asked before and after each step that touches the disk, inside sampling and inside training."
        import stasc.store as store
        real = dict(replace=os.replace, fsync=os.fsync, remove=store._remove, record=store._record)
        dir_of = lambda path: os.path.basename(os.path.dirname(path)) + "/" + os.path.basename(path)

        def replace(a, b): self(f"before rename of {dir_of(b)}"); real["replace"](a, b); self(f"after rename of {dir_of(b)}")
        def record(run_dir, name, **facts): self(f"before record of {name}"); real["record"](run_dir, name, **facts); self(f"after record of {name}")
        def fsync(fd): real["fsync"](fd); self("fsync")
        os.replace, os.fsync, RunDir._record = replace, fsync, record
        sample, train = engine.sample, engine.train

        def sampled(*a): out = sample(*a); self("inside sampling"); return out
        def trained(*a): out = train(*a); self("inside train"); return out
        engine.sample, engine.train = sampled, trained


def in_child(work):
    "Run a function in a forked child; how the child ended."
    pid = os.fork()
    if pid == 0:
        code = 1
        try: work(); code = 0
        finally: os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed_at(k, out, variant):
    "Run in a child that is killed at event k: True if it was."
    def work():
        killer, engine = Killer(k), ScriptedEngine(numbers)
        killer.watch(engine)
        scripted(out, variant, engine, [killer], iterations=1).run()
    status = in_child(work)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def events_of(out, variant):
    "What happens in a run that is not killed."
    def work():
        killer, engine = Killer(-1), ScriptedEngine(numbers)
        killer.watch(engine)
        scripted(out, variant, engine, [killer], iterations=1).run()
        (out.parent / "events.json").write_text(json.dumps(killer.seen))
    assert in_child(work) == 0
    return json.loads((out.parent / "events.json").read_text())


def kinds(events):
    "The last event of each kind: the numbers of parts, iterations and questions left out."
    return {re.sub(r"\d+", "", e): k for k, e in enumerate(events)}


@posix
@pytest.mark.parametrize("variant", ["EIE", "FNF"])
def test_killed_at_any_event_and_resumed_gives_the_same_bytes(tmp_path, variant):
    events = events_of(tmp_path / "whole", variant)
    points = kinds(events)
    phases = {"initial.train", "corrections.train", "initial.test", "corrections.test", "train"} | ({"transfer.test"} if variant[0] == "F" else set())
    assert phases <= {e.split()[0] for e in points} and {"inside sampling", "inside train", "before rename of iter_/metrics.json"} <= set(points)
    if variant == "FNF": points = {e: k for e, k in points.items() if "transfer" in e or e.startswith(("train", "inside", "M_"))}
    assert len(points) >= (35 if variant == "EIE" else 8)
    expected = tree(tmp_path / "whole")
    for event, k in points.items():
        out = tmp_path / f"killed-{k}"
        assert killed_at(k, out, variant), event
        run = scripted(out, variant, iterations=1).run()
        assert tree(out) == expected, f"killed at event {k}, {events[k]}"
        assert run.n_done == 2
        shutil.rmtree(out)


@posix
def test_killed_again_and_again_still_ends_with_the_same_bytes(tmp_path):
    scripted(tmp_path / "whole", iterations=1).run()
    kills = 0
    while killed_at(25, tmp_path / "run", "EIE"): kills += 1
    assert kills > 5 and tree(tmp_path / "run") == tree(tmp_path / "whole")


@posix
def test_a_kill_loses_at_most_one_part(tmp_path):
    events = events_of(tmp_path / "whole", "EIE")
    recorded = [k for k, e in enumerate(events) if e.startswith("after record of iter_01/corrections.train")]
    assert len(recorded) == 3
    for done, k in enumerate(recorded, 1):
        out = tmp_path / f"killed-{k}"
        killed_at(k, out, "EIE")
        engine, asked = ScriptedEngine(numbers), []
        sample = engine.sample
        engine.sample = lambda prompts, *a: (asked.append(len(prompts)), sample(prompts, *a))[1]
        run = scripted(out, engine=engine, iterations=1)
        run.step()
        assert run.n_done == 2
        left = [4, 4, 2][done:]                             # 5 questions, 2 to a part, 2 initial answers each
        assert asked[:len(left)] == left


# --- one writer

def test_second_process_is_refused(tmp_path):
    out, go = tmp_path / "run", tmp_path / "go"
    child = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]
        from test_resume import scripted
        class Wait:
            def on_phase(self, *a):
                print("holding", flush=True)
                while not Path({str(go)!r}).exists(): time.sleep(0.02)
        scripted({str(out)!r}, callbacks=[Wait()]).run()
    """)
    with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True) as p:
        try:
            assert p.stdout.readline() == "holding\n"
            before = tree(out)
            with pytest.raises(StoreError, match="in use by another process"): scripted(out).run()
            assert tree(out) == before
        finally: go.touch()
        p.communicate(timeout=60)
        assert p.returncode == 0
    assert scripted(out).n_done == 3


def test_lock_is_free_after_a_failure(tmp_path):
    class Fail:
        def on_phase(self, run, n, phase, done, total):
            if (n, phase) == (1, "train"): raise RuntimeError("stop")
    with pytest.raises(RuntimeError): scripted(tmp_path / "run", callbacks=[Fail()]).run()
    with filelock.FileLock(tmp_path / "run/.lock").acquire(timeout=0): pass
    scripted(tmp_path / "whole").run()
    scripted(tmp_path / "run").run()
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


def test_two_threads_on_one_run_end_with_one_run(tmp_path):
    scripted(tmp_path / "whole").run()
    refused = []

    def work():
        while True:
            try: scripted(tmp_path / "run").run(); return
            except StoreError as e: refused.append(str(e))
    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert all("in use" in r for r in refused)
    assert {k: v for k, v in tree(tmp_path / "run").items() if k != "manifest.jsonl"} == \
        {k: v for k, v in tree(tmp_path / "whole").items() if k != "manifest.jsonl"}


# --- damage

@pytest.fixture
def stopped(tmp_path):
    "A run that stopped within iteration 1, and the tree of the whole run."
    class Stop:
        def on_phase(self, run, n, phase, done, total):
            if (n, phase, done) == (1, "corrections.train", 4): raise RuntimeError
    scripted(tmp_path / "whole").run()
    with pytest.raises(RuntimeError): scripted(tmp_path / "run", callbacks=[Stop()]).run()
    return tmp_path / "run", tree(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 2, 30, 100])
def test_torn_manifest_is_mended(stopped, cut):
    out, expected = stopped
    file = out / "manifest.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    scripted(out).run()
    assert tree(out) == expected


@pytest.mark.parametrize("tail", [b"\0" * 40, b'{"name": "iter_01', b"{}", b"\xff\xfe"])
def test_garbage_behind_the_manifest_is_cut_off(stopped, tail):
    out, expected = stopped
    with (out / "manifest.jsonl").open("ab") as f: f.write(tail)
    scripted(out).run()
    assert tree(out) == expected


def test_damage_inside_the_manifest_names_the_line(stopped):
    out, _ = stopped
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    with pytest.raises(StoreError, match="manifest.jsonl, line 4 is damaged"): scripted(out).run()
    (out / "manifest.jsonl").write_text("\n".join([*lines[:3], *lines[4:]]) + "\n")
    scripted(out).run()                                     # as the message says


def test_lost_manifest_draws_everything_again(stopped):
    out, expected = stopped
    (out / "manifest.jsonl").unlink()
    for metrics in out.rglob("metrics.json"): metrics.unlink()
    scripted(out).run()
    assert tree(out) == expected


def without_manifest(t): return {k: v for k, v in t.items() if k != "manifest.jsonl"}


@pytest.mark.parametrize("name", [part_name(0, "initial.train", 1), part_name(0, "corrections.test", 0), part_name(1, "initial.train", 0),
                                  "iter_01/kept.parquet", "iter_01/adapter", "iter_00/metrics.json"])
def test_deleted_file_is_made_again(stopped, name):
    out, expected = stopped
    shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    scripted(out).run()
    assert without_manifest(tree(out)) == without_manifest(expected)


@pytest.mark.parametrize("name", [part_name(0, "initial.train", 1), part_name(1, "initial.test", 0), part_name(2, "corrections.train", 0), "iter_02/kept.parquet"])
def test_deleted_file_of_a_complete_run_is_made_again(tmp_path, name):
    run = scripted(tmp_path / "run").run()
    expected = tree(run.dir.path)
    (tmp_path / "run" / name).unlink()
    scripted(tmp_path / "run").run()
    assert without_manifest(tree(tmp_path / "run")) == without_manifest(expected)


def damage(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [part_name(0, "initial.train", 1), part_name(0, "corrections.train", 0), part_name(1, "initial.train", 0)])
def test_damaged_part_is_refused_and_what_the_message_says_mends_it(stopped, name):
    out, expected = stopped
    damage(out / name)
    with pytest.raises(StoreError, match="is damaged.*delete it and resume the run"): scripted(out).run().trajectories      # noqa: B018
    (out / name).unlink()
    scripted(out).run()
    assert without_manifest(tree(out)) == without_manifest(expected)


def test_damaged_adapter_is_refused(stopped):
    out, _ = stopped
    (out / "iter_01/adapter/skill.txt").write_text("5")
    with pytest.raises(StoreError, match="adapter is damaged"): scripted(out).run()


def test_leftovers_of_a_killed_writer_vanish(stopped):
    out, expected = stopped
    (out / "iter_01/.tmp-part-00000.parquet").write_bytes(b"half")
    (out / "iter_01/.tmp-adapter").mkdir()
    (out / "iter_01/.tmp-adapter/adapter_model.safetensors").write_bytes(b"half")
    scripted(out).run()
    assert tree(out) == expected


def test_more_iterations_continue_a_complete_run(tmp_path):
    scripted(tmp_path / "whole", iterations=4).run()
    scripted(tmp_path / "run", iterations=2).run()
    scripted(tmp_path / "run", iterations=4).run()
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")


# --- the embedded model: the command in processes of its own, one killed in each phase

REAL = ["--n-train", "12", "--n-test", "6", "--part-size", "4", "--iterations", "1", "--n-init", "1", "--n-corr", "2", "--max-new-tokens", "16",
        "--filter", "all", "--device", "cpu"]
POINTS = ["initial.train", "corrections.train", "initial.test", "corrections.test", "transfer.test", "inside train", "after train", "metrics.json"]
variant_of = lambda at: "FIE" if at == "transfer.test" else "EIE"

# The libraries are imported once; each run is a fork of this process, which itself never computes anything.
PARENT = """
import json, os, signal, sys
import torch, peft, transformers
from transformers import Trainer
import stasc.loop, stasc.model
from stasc.cli import main

def end(): os.kill(os.getpid(), signal.SIGKILL)

def prepare(at):
    iteration = int(at not in ("initial.train", "corrections.test"))
    class Killer:
        def on_phase(self, run, n, phase, done, total):
            if phase == at and n == iteration and done > 0: end()
    stasc.loop.Progress = Killer
    step, replace, seen = Trainer.training_step, os.replace, []
    def training_step(self, *a, **kw):
        seen.append(1)
        if at == "inside train" and len(seen) == 2: end()
        return step(self, *a, **kw)
    def kill_around(a, b):
        if at == "metrics.json" and str(b).endswith("iter_01/metrics.json"): end()
        replace(a, b)
        if at == "after train" and str(b).endswith("iter_01/adapter"): end()
    Trainer.training_step, os.replace = training_step, kill_around

for at, argv in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        prepare(at)
        os._exit(main(argv))
    status = os.waitpid(pid, 0)[1]
    print("ENDED", at, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), sep="|", flush=True)
"""


@pytest.fixture(scope="session")
def ends(tmp_path_factory):
    "Directory of each run, and the signal that ended it."
    if os.name == "nt": pytest.skip("Windows has no SIGKILL and no fork")
    folder = tmp_path_factory.mktemp("ends")
    work = [(at, ["demo", "--variant", variant_of(at), "--out", str(folder / at), *REAL]) for at in POINTS]
    work += [(f"whole {v}", ["demo", "--variant", v, "--out", str(folder / f"whole {v}"), *REAL]) for v in ("EIE", "FIE")]
    p = subprocess.run([sys.executable, "-c", PARENT, json.dumps(work)], capture_output=True, text=True, timeout=300,
                       env=os.environ | dict(PYTHONPATH=str(root)))
    codes = dict(line.split("|")[1:] for line in p.stdout.splitlines() if line.startswith("ENDED"))
    assert set(codes) == {at for at, _ in work}, p.stderr
    return {at: (folder / at, int(code)) for at, code in codes.items()}


@pytest.mark.parametrize("at", POINTS)
def test_embedded_model_killed_and_resumed_gives_the_same_bytes(ends, at):
    (out, code), (whole, good) = ends[at], ends[f"whole {variant_of(at)}"]
    assert (code, good) == (9, 0)
    assert not (out / "iter_01/metrics.json").exists()
    done = run_command("resume", out)
    assert done.code == 0, done.err
    assert tree(out) == tree(whole)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in out.rglob("*")}
