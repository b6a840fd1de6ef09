"Faults at any moment and in any file: a sentence that names the place and the way to repair it, which is then gone, and the same bytes in the end. The full counts: bench/faults.py."
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import root
from test_resume import ask, damage, in_child, numbers, posix, scripted, tree, without_manifest

import stasc.store as store
from stasc.core import Config, RewardError, SampleError, StascError, StoreError, TrainError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.store import RunDir, part_name
from stasc.train import ScriptedEngine

sys.path.insert(0, str(root / "bench"))
import faults  # noqa: E402



# --- kills and interruptions, by the machinery of the bench

@posix
def test_kills_in_all_phases_of_a_run_of_the_embedded_model(tmp_path):
    code = f"import sys; sys.path[:0] = [{str(root / 'bench')!r}]; import faults; faults.main()"
    p = subprocess.run([sys.executable, "-c", code, "kills", "--n", "4", "--seed", "1", "--out", str(tmp_path)], capture_output=True, text=True, timeout=280, env=os.environ | dict(PYTHONPATH=str(root)))
    assert p.returncode == 0, p.stderr
    found = json.loads((tmp_path / "faults_kills.json").read_text())["rows"][0]
    assert (found["kills"], found["not the same"]) == (4, 0)


@posix
@pytest.mark.parametrize("mean", [.003, .03])
def test_interruptions_at_any_moment_leave_a_run_that_goes_on(tmp_path, mean):
    def work():
        found = faults.interrupts(60, tmp_path, lambda out, callbacks=(), engine=None: scripted(out, engine=engine, callbacks=callbacks, iterations=3), mean=mean)
        (tmp_path / "found.json").write_text(json.dumps(found))
    assert in_child(work) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == [] and found["interrupts"] >= 60


@posix
def test_lock_of_a_dead_process_holds_nobody_up(tmp_path):
    class Die:
        def on_phase(self, *_): os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(in_child(lambda: scripted(tmp_path / "run", callbacks=[Die()]).run()))
    assert (tmp_path / "run/.lock").exists()
    assert scripted(tmp_path / "run").run().n_done == 3


def test_interruption_between_opening_and_drawing_lets_the_lock_go(tmp_path, monkeypatch):
    real = RunDir.open
    def opened(self, *args): real(self, *args); raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(RunDir, "open", opened)
        run = scripted(tmp_path / "run")
        with pytest.raises(KeyboardInterrupt): run.run()
    assert scripted(tmp_path / "run").run().n_done == 3             # while the first object is still there


def test_interruption_while_an_iteration_is_shown_stops_the_callbacks(tmp_path):
    stopped = []
    class Shows:
        def on_iteration(self, run, it): raise KeyboardInterrupt
        def on_stop(self, run): stopped.append(run.n_done)
    with pytest.raises(KeyboardInterrupt): scripted(tmp_path / "run", callbacks=[Shows()]).run()
    assert stopped == [1] and scripted(tmp_path / "run").run().n_done == 3


def test_clock_set_back(tmp_path, monkeypatch):
    scripted(tmp_path / "whole").run()
    class Stop:
        def on_phase(self, run, n, phase, done, total):
            if (n, phase, done) == (1, "corrections.train", 4): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): scripted(tmp_path / "run", callbacks=[Stop()]).run()
    for i, p in enumerate(sorted((tmp_path / "run").rglob("*"))): os.utime(p, (4e9 - i, 4e9 - i) if i % 2 else (i, i))      # in the year 2096, in 1970
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert scripted(tmp_path / "run").run().n_done == 3 and tree(tmp_path / "run") == tree(tmp_path / "whole")


# --- the disk

class Limit:
    "Files that hold a word in their names cannot grow beyond a few bytes, as on a full disk."
    def __init__(self, word, room, at=0): self.word, self.room, self.left = word, room, at

    def __enter__(self):
        import resource
        self.m, self.real = pytest.MonkeyPatch(), (store._remove, RunDir._record, RunDir.log)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        self.set = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
        begun = set()

        def remove(path):                                           # called before and after each file that is made whole
            if path.name.startswith(".tmp-") and self.word in path.as_posix() and path not in begun:
                begun.add(path)
                if self.left == 0: self.set(self.room)
                self.left -= 1
            else: self.set(None)
            self.real[0](path)

        def limited(method, file):
            def limited(run, *args, **facts):
                self.left -= 1
                if self.left == -1: self.set((run / file).stat().st_size + self.room if (run / file).exists() else self.room)
                try: return method(run, *args, **facts)
                finally: self.set(None)
            return limited
        self.m.setattr(store, "_remove", remove)
        if self.word == "manifest.jsonl": self.m.setattr(RunDir, "_record", limited(self.real[1], "manifest.jsonl"))
        if self.word == "log.jsonl": self.m.setattr(RunDir, "log", limited(self.real[2], "log.jsonl"))

    def __exit__(self, *_): self.m.undo(); self.set(None)


def leftovers(folder): return [p.name for p in folder.rglob(".tmp-*")]


WRITERS = ["config.json", "questions.json", "initial.train/", "corrections.train/", "initial.test/", "corrections.test/", "kept.parquet", "adapter", "metrics.json", "manifest.jsonl", "log.jsonl"]


@posix
@pytest.mark.parametrize("room", [0, 7])
@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_in_each_writer(tmp_path, writer, room):
    pytest.importorskip("resource")
    if (writer, room) == ("adapter", 7): pytest.skip("the scripted adapter is one byte")
    run, rooms = scripted(tmp_path / "run"), 0
    for at in (0, 1):
        with Limit(writer, room, at), pytest.raises(StoreError, match=writer.strip("/").replace(".", r"\.")) as e: run.run()
        assert "cannot be written" in str(e.value) and "File too large" in str(e.value) and leftovers(tmp_path) == []
        if writer in ("config.json", "questions.json"): break      # these are written once
    if room: run = scripted(tmp_path / "run")                       # else the same object goes on, as in a notebook
    run.run()
    expected = tree(scripted(tmp_path / "whole").run().dir.path)
    assert tree(tmp_path / "run") == expected
    assert run.timing().seconds.notna().all()
    for line in (run.dir / "log.jsonl").read_text().splitlines()[-3:]: json.loads(line)


@posix
@pytest.mark.parametrize("file", ["report.html", "table.csv", "summary.csv", "sweep.json"])
def test_full_disk_in_reports_and_sweeps(tmp_path, file):
    pytest.importorskip("resource")
    import stasc.view                                               # noqa: F401
    from stasc.sweep import sweep
    if file == "report.html":
        run = scripted(tmp_path / "run").run()
        write = lambda: run.report()
    else:
        data = Data(ask(3, "train"), ask(2, "test"))
        write = lambda: sweep(dict(seed=[0]), tmp_path / "sweep", Config(iterations=1, n_init=1, n_corr=1, filter="all", data="own"), data=data, engine=lambda cfg: ScriptedEngine(numbers), shown=None)
    with Limit(file, 7), pytest.raises(StoreError, match=f"{file} cannot be written"): write()
    assert leftovers(tmp_path) == []
    write()
    assert any(p.name == file for p in tmp_path.rglob("*"))


def read_only(folder, work):
    "Do something in a child for which nothing below a folder can be written; what it returned."
    def child():
        os.chdir(folder)
        try:
            if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
            out = work()
        except BaseException as e: out = f"{type(e).__name__}: {e}"
        os.write(write, json.dumps(out).encode())
    folders = [p for p in [folder, *folder.rglob("*")] if p.is_dir()]
    read, write = os.pipe()
    for p in folders: p.chmod(0o555)
    try: assert in_child(child) == 0
    finally:
        for p in folders: p.chmod(0o755)
        os.close(write)
    with os.fdopen(read) as f: return json.load(f)


@posix
def test_read_only_directory_is_looked_at_and_refused_for_writing(tmp_path):
    import stasc.view                                               # noqa: F401
    run = scripted(tmp_path / "run", iterations=1).run()
    before, table, rows = tree(tmp_path), run.table().to_json(), len(run.trajectories)
    opened = lambda: STaSC.open("run", callbacks=[], engine=ScriptedEngine(numbers))
    assert read_only(tmp_path, lambda: opened().table().to_json()) == table
    assert read_only(tmp_path, lambda: [len(opened().trajectories), len(list(opened()))]) == [rows, 2]
    for do, name in ((lambda: opened().run(), "run"), (lambda: STaSC.open("run", callbacks=[], engine=ScriptedEngine(numbers), iterations=2).run(), "run"),
                     (lambda: scripted("new").run(), "new"), (lambda: opened().report(), "report.html")):
        said = read_only(tmp_path, do)
        assert said.startswith("StoreError: ") and name in said and "Permission denied" in said and "cannot be" in said, said
    assert tree(tmp_path) == before


# --- damage

def broken(run_of, *, look=True):
    "What a run says when it is opened, looked at and run; None where it says nothing."
    try:
        run = run_of()
        if look: run.table(); run.trajectories; run.kept           # noqa: B018
        run.run()
        for n in range(1, run.n_done): run._model_folder(n)
    except StascError as e: return str(e)


def cut(file): file.write_bytes(file.read_bytes()[:-max(1, file.stat().st_size // 3)])
def empty(file): file.write_bytes(b"")
def garbage(file): file.write_bytes(bytes(random.Random(0).randrange(256) for _ in range(file.stat().st_size or 5)))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    "A complete run and its tree."
    folder = tmp_path_factory.mktemp("complete") / "run"
    scripted(folder).run()
    return folder, tree(folder)


HURT = [part_name(0, "initial.train", 1), part_name(1, "corrections.train", 2), part_name(2, "initial.test", 0), part_name(0, "corrections.test", 1), "iter_01/kept.parquet", "iter_02/kept.parquet",
        "iter_01/adapter/skill.txt", "iter_02/adapter/skill.txt", "iter_01/metrics.json", "config.json", "questions.json"]


@pytest.mark.parametrize("harm", [damage, cut, empty, garbage])
@pytest.mark.parametrize("name", HURT)
def test_damaged_file_is_named_and_what_the_sentence_says_repairs_it(tmp_path, complete, name, harm):
    folder, expected = complete
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    harm(out / name)
    opened = lambda: STaSC.open(out, callbacks=[], engine=ScriptedEngine(numbers))
    sentence = broken(opened)
    assert sentence and ("adapter" if "adapter" in name else name.split("/")[-1]) in sentence, sentence
    faults.repaired(out, sentence)
    again = lambda: scripted(out)                                   # with the settings and the questions, as config.json or questions.json may be what was lost
    assert broken(again) is None
    assert without_manifest(tree(out)) == without_manifest(expected)
    assert broken(opened) is None


def test_any_flipped_bit_of_the_manifest_is_named_or_does_no_harm(tmp_path, complete):
    folder, expected = complete
    rng, out = random.Random(0), tmp_path / "run"
    good = (folder / "manifest.jsonl").read_bytes()
    line_of = lambda at: good[:at].count(b"\n") + 1
    for trial in range(24):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out)
        data, at = bytearray(good), rng.randrange(len(good))
        data[at] ^= 1 << rng.randrange(8)
        (out / "manifest.jsonl").write_bytes(bytes(data))
        sentence = broken(lambda: scripted(out))
        if sentence is not None:
            assert f"manifest.jsonl, line {line_of(at)} is damaged" in sentence, (at, sentence)
            faults.repaired(out, sentence)
            assert broken(lambda: scripted(out)) is None
        assert without_manifest(tree(out)) == without_manifest(expected), at
        assert len(scripted(out).trajectories) == 3 * (5 * 4 + 3)


def test_line_taken_out_of_the_manifest_of_a_complete_run_is_missed(tmp_path, complete):
    folder, expected = complete
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    for i, line in enumerate(lines):
        out = tmp_path / str(i)
        shutil.copytree(folder, out)
        (out / "manifest.jsonl").write_text("".join(lines[:i] + lines[i + 1:]))
        scripted(out).run()
        assert without_manifest(tree(out)) == without_manifest(expected)
        assert set((out / "manifest.jsonl").read_text().splitlines(keepends=True)) == set(lines), line


def test_a_digit_of_the_metrics_that_changed_is_noticed(tmp_path, complete):
    out = tmp_path / "run"
    shutil.copytree(complete[0], out)
    f = out / "iter_01/metrics.json"
    f.write_text(re.sub(r'"n_kept": (\d+)', lambda m: f'"n_kept": {int(m[1]) + 1}', f.read_text()))
    sentence = broken(lambda: scripted(out))
    assert "metrics.json is damaged" in sentence
    faults.repaired(out, sentence)
    assert broken(lambda: scripted(out)) is None and without_manifest(tree(out)) == without_manifest(complete[1])


def test_config_that_somebody_edited_is_refused(tmp_path, complete):
    out = tmp_path / "run"
    shutil.copytree(complete[0], out)
    there = json.loads((out / "config.json").read_text())
    there["config"]["temperature"] = 1.5
    (out / "config.json").write_text(json.dumps(there))
    with pytest.raises(StoreError, match=r"config\.json.*other settings"): STaSC.open(out, callbacks=[], iterations=3, engine=ScriptedEngine(numbers)).run()


def test_lost_config_is_written_again_for_the_same_settings_alone(tmp_path, complete):
    out = tmp_path / "run"
    shutil.copytree(complete[0], out)
    (out / "config.json").unlink()
    with pytest.raises(StoreError, match="other settings"): scripted(out, temperature=1.5).run()
    with pytest.raises(StoreError, match="other settings"):
        STaSC(scripted(out).cfg, out, data=Data(ask(6, "train"), ask(3, "test")), engine=ScriptedEngine(numbers), callbacks=[]).run()
    assert not (out / "config.json").exists()
    scripted(out, iterations=2).run()
    assert tree(out) == complete[1]


@pytest.mark.parametrize("keep", [0, 1])
def test_lost_full_model_is_trained_again_from_those_before(tmp_path, keep):
    options = dict(finetune="full", keep_models=keep)
    scripted(tmp_path / "whole", iterations=4, **options).run()
    run = scripted(tmp_path / "run", iterations=3, **options).run()
    damage(run.dir / "iter_03/model/skill.txt")
    go_on = lambda: scripted(tmp_path / "run", iterations=4, **options).run()
    with pytest.raises(StoreError, match="iter_03.model is damaged.*delete it and resume") as e: go_on()
    faults.repaired(tmp_path / "run", str(e.value))
    go_on()
    assert without_manifest(tree(tmp_path / "run")) == without_manifest(tree(tmp_path / "whole"))


def test_run_that_another_process_continued_shows_what_it_knew(tmp_path):
    run = scripted(tmp_path / "run", iterations=1).run()
    scripted(tmp_path / "run", iterations=2).run()
    rows = len(run.trajectories)
    assert rows == run.n_done * (5 * 4 + 3)


# --- memory

def short_of_memory(monkeypatch, lm, limit, says, training):
    "In sampling or in training, memory does not suffice for more rows than `limit`."
    import torch
    import stasc.sample
    met, at = [], (lm.base.get_decoder(), "forward") if training else (stasc.sample, "draw")
    real = getattr(*at)
    def short(*args, **kw):
        x = args[0] if args else kw["input_ids"]
        if torch.is_grad_enabled() == training and len(x) > limit:
            met.append(len(x))
            raise torch.OutOfMemoryError(f"CUDA {says}") if "CPU" not in says else RuntimeError(f"[enforce fail at alloc_cpu.cpp:117] err == 0. {says}")
        return real(*args, **kw)
    monkeypatch.setattr(*at, short)
    return met


@pytest.mark.parametrize("says", ["out of memory", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"])
def test_out_of_memory_in_training_is_one_sentence_and_leaves_a_run_that_goes_on(embedded, tmp_path, monkeypatch, says):
    make = lambda: faults.demo(tmp_path / "run", engine=embedded, iterations=1, lora_r=16, max_new_tokens=12)
    embedded.short_of_memory = False
    try:
        with monkeypatch.context() as m:
            met = short_of_memory(m, embedded.lm, 2, says, training=True)
            with pytest.raises(TrainError, match="memory.*train_batch"): make().run()
            assert len(met) == 2                                    # once with gradient checkpointing
        assert (tmp_path / "run/iter_01/kept.parquet").exists() and not (tmp_path / "run/iter_01/adapter").exists() and leftovers(tmp_path) == []
        assert make().run().n_done == 2
        with monkeypatch.context() as m:                            # sampling: fewer texts at once, the same texts
            met = short_of_memory(m, embedded.lm, 3, says, training=False)
            batch, embedded.sampler.batch = embedded.sampler.batch, 512
            again = faults.demo(tmp_path / "again", engine=embedded, iterations=1, lora_r=16, max_new_tokens=12).run()
            assert met and max(met) > 3
            texts = ["iteration", "split", "question_id", "init_text", "corr_text"]
            alike = (again.trajectories[texts] == make().trajectories[texts]).all(axis=1)
            assert alike.mean() >= .97                              # other batches may round the last bit in another way
            embedded.sampler.batch = 8
            short_of_memory(m, embedded.lm, 0, says, training=False)
            with pytest.raises(SampleError, match="memory does not suffice to decode a single text"): faults.demo(tmp_path / "none", engine=embedded, lora_r=16).run()
        assert (tmp_path / "none/questions.json").exists() and leftovers(tmp_path) == []
    finally: embedded.sampler.batch, embedded.short_of_memory = batch, False; embedded.use(None)


# --- a loss that is not a number

def test_loss_that_is_not_a_number_stops_at_once_and_keeps_the_last_good_adapter(embedded, tmp_path, monkeypatch):
    import torch
    import stasc.train as train
    options = dict(engine=embedded, lora_r=16, max_new_tokens=12, train_batch=4, n_train=16)
    run = faults.demo(tmp_path / "run", iterations=1, **options).run()
    good, steps = tree(tmp_path / "run"), []
    with monkeypatch.context() as m:
        def loss(lm, batch, n=None):
            steps.append(1)
            return real(lm, batch, n) * (float("nan") if len(steps) == 3 else 1)
        real = train.completion_loss
        m.setattr(train, "same_loss", lambda *a: True)
        m.setattr(train, "completion_loss", loss)
        with pytest.raises(TrainError, match="not a number from step 3 on.*learning_rate.*another run directory"): faults.demo(tmp_path / "run", iterations=2, **options).run()
    assert len(steps) == 3, "it went on after the third step"
    now = tree(tmp_path / "run")
    assert {k: v for k, v in now.items() if k in good and k not in ("config.json", "manifest.jsonl")} == {k: v for k, v in good.items() if k not in ("config.json", "manifest.jsonl")}
    assert not (tmp_path / "run/iter_02/adapter").exists() and leftovers(tmp_path) == []
    assert all(p.isfinite().all() for p in (embedded.use(run._model_folder(1)), *embedded.lm.model.parameters())[1:] if torch.is_tensor(p))
    again = faults.demo(tmp_path / "run", iterations=2, **options).run()
    assert again.n_done == 3 and tree(tmp_path / "run") == tree(faults.demo(tmp_path / "whole", iterations=2, **options).run().dir.path)
    embedded.use(None)


# --- rewards

def picky(bad, what):
    "A reward that fails on a prediction."
    def picky(prediction, references):
        if prediction == bad: return 1 / 0 if what == "raises" else what
        return float(prediction == references[0])
    return picky


def judged(out, what, **options):
    cfg = Config(**dict(iterations=2, n_init=2, n_corr=2, n_train=5, n_test=3, part_size=2, data="own") | options)
    return STaSC(cfg, out, data=Data(ask(5, "train"), ask(3, "test")), engine=ScriptedEngine(numbers), reward=picky("3", what), callbacks=[])


@pytest.mark.parametrize("what", ["raises", float("nan"), None, "high", 7])
def test_reward_that_fails_names_the_answer_and_can_be_skipped(tmp_path, what):
    with pytest.raises(RewardError) as e: judged(tmp_path / "run", what).run()
    m = re.match(r"M_(\d), (initial|corrections)\.(train|test), question '(\w+)', (initial answer (\d)|correction (\d) of initial answer (\d)): reward picky", str(e.value))
    assert m and "bad_reward = 'skip'" in str(e.value), str(e.value)
    drawn = scripted(tmp_path / "drawn", iterations=2).dir           # the first answer "3" that is drawn is the one it names
    with pytest.warns(UserWarning, match="count as 0"): run = judged(tmp_path / "run", what, bad_reward="skip").run()       # taken up with the new setting
    t = run.trajectories
    n, kind, split, question = int(m[1]), m[2], m[3], m[4]
    rows = t[(t["iteration"] == n) & (t["split"] == split) & (t.question_id == question)]
    rows = rows[rows.init_index == int(m[6])] if m[6] else rows[(rows.corr_index == int(m[7])) & (rows.init_index == int(m[8]))]
    assert (rows["init_answer" if kind == "initial" else "corr_answer"] == "3").all() and len(rows)
    assert (t.init_reward[t.init_answer == "3"] == 0).all() and (t.corr_reward[t.corr_answer == "3"] == 0).all()
    for n in range(3):
        for split in ("train", "test"):
            some = t[(t["iteration"] == n) & (t["split"] == split)]
            first = some.drop_duplicates(["question_id", "init_index"])
            assert run.metrics[f"bad_rewards_{split}"][n] == (first.init_answer == "3").sum() + (some.corr_answer == "3").sum()
    with pytest.warns(UserWarning): whole = judged(tmp_path / "whole", what, bad_reward="skip").run()
    assert tree(whole.dir.path) == tree(tmp_path / "run")
    assert drawn.path.name == "drawn"


def test_extraction_that_fails_counts_as_a_reward_that_fails(tmp_path):
    def strict(prediction, references): return 0.0
    def extract(text): raise LookupError("no answer")
    strict.extract = extract
    run = lambda **o: STaSC(Config(iterations=1, n_init=1, n_corr=1, n_train=2, n_test=1, data="own", **o), tmp_path / "run", data=Data(ask(2, "train"), ask(1, "test")),
                            engine=ScriptedEngine(numbers), reward=strict, callbacks=[])
    with pytest.raises(RewardError, match="M_0, initial.train, question 'train0', initial answer 0: reward strict.*LookupError: no answer"): run().run()
    with pytest.warns(UserWarning): done = run(bad_reward="skip").run()
    assert done.metrics.bad_rewards_train[0] == 4 and done.trajectories.init_answer.isna().all()


def test_runs_without_bad_rewards_say_nothing_of_them(tmp_path):
    run = scripted(tmp_path / "run", bad_reward="skip").run()
    assert not [c for c in run.metrics if "bad" in c]
    assert '"bad' not in (run.dir / "manifest.jsonl").read_text()
    with contextlib.suppress(KeyError): assert run.metrics["bad_rewards_train"] is None
