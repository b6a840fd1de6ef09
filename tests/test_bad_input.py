"A user's mistake gives one sentence on stderr and exit code 2, and leaves nothing half-written."
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys

import conftest
import filelock
import pytest
from catalogue import CASES, SMALL, Place, counts, said
from conftest import root, run_command, write_questions

from stasc.core import StascError


def leftovers(out):
    "What a failed command may not leave: half-written files, or results that no manifest knows."
    if not out.exists() or out.is_file(): return []
    known = set()
    if (out / "manifest.jsonl").exists():
        known = {json.loads(line)["name"] for line in (out / "manifest.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")}
    files = [p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name not in ("config.json", "questions.json", "log.jsonl", ".lock", "manifest.jsonl")]
    return [f for f in files if ".tmp-" in f or not any(f == k or f.startswith(k + "/") for k in known) and not f.endswith("metrics.json")]


def refused(*argv, says=(), out=None, code=2):
    "Run a command that must fail; its one sentence."
    done = run_command(*argv)
    assert done.code == code, done
    shown = done.err.replace("\r", "\n").strip("\n")
    assert "Traceback" not in done.err and shown.count("\n") == 0 and shown.startswith("stasc: "), done.err
    for word in says: assert re.search(word, shown), (word, shown)
    if out is not None: assert leftovers(out) == []
    return shown


@pytest.fixture
def out(tmp_path): return tmp_path / "run"


@pytest.fixture
def quiet(monkeypatch): monkeypatch.setenv("TQDM_DISABLE", "1")


# --- the catalogue

@pytest.fixture(scope="module")
def finished(tmp_path_factory, questions_file):
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run_command("run", *SMALL, "--data", questions_file, "--shots", 0, "--filter", "all", "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture
def place(tmp_path, questions_file, families, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return Place(tmp_path, questions_file, families["qwen2"], finished)


@pytest.mark.parametrize("c", CASES, ids=[ascii(f"{c.area}: {c.name}")[1:-1] for c in CASES])
def test_malformed_input(place, c):
    "One sentence, of the right class, that says what, where and what to do; nothing is run, and nothing half-written is left."
    try: words = c.action(place)
    except StascError as e: error, sentence = type(e), str(e)
    else:
        done = said(*words)
        error, sentence = done.error, done.err.removesuffix("\n")
        assert done.code == 2 and sentence.startswith("stasc: ") and "Traceback" not in sentence, done
    assert error is c.error, (error, sentence)
    assert len(sentence.splitlines()) == 1 and len(sentence) < 2100 and not re.search("[\x00-\x1f\x7f]", sentence), sentence
    for words in c.says: assert re.search(words, sentence), (words, sentence)
    assert not list(place.path.rglob("PWNED")), "code was run"
    if c.out == "none": assert not place.out.exists()
    if c.out == "empty": assert leftovers(place.out) == []
    assert not [f for f in place.path.rglob(".tmp-*")]


def test_catalogue_counts():
    assert sum(counts().values()) == len(CASES) >= 60 and len({(c.area, c.name) for c in CASES}) == len(CASES)
    assert set(counts()) == {"configuration", "data", "prompts", "models", "run directories", "command line"}


# --- what a sentence cannot tell

def again(out, questions_file, *flags):
    "The same command with another model in the same place."
    done = run_command("run", *SMALL, "--data", questions_file, "--shots", 0, *flags, "--out", out)
    assert done.code == 0, done.err


def test_qlora_without_bitsandbytes(questions_file, families, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused("run", *SMALL, "--data", questions_file, "--model", families["qwen2"], "--finetune", "qlora", "--out", out, says=["needs bitsandbytes: pip install"], out=out)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_is_not_there(questions_file, out, device, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused("run", *SMALL, "--data", questions_file, "--device", device, "--out", out, says=[f"device = '{device}'", "no such device"], out=out)


def test_progress_bar_does_not_stand_in_the_sentence(tmp_path, out, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    write_questions(tmp_path / "f.jsonl", 6)
    (tmp_path / "f.jsonl").write_text((tmp_path / "f.jsonl").read_text().replace("place 3 of", "place " + "3 of " * 600))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(conftest, "errors", Terminal)
    done = run_command("run", *SMALL, "--data", tmp_path / "f.jsonl", "--out", out)
    said = done.err[done.err.index("stasc: "):]
    assert "q/s" not in said and said.count("\n") == 1 and done.err[:-len(said)].rstrip(" ").endswith(("\r", "\n")), done.err


def test_place_of_a_refused_run_is_free_for_the_mended_one(questions_file, out, tmp_path, quiet):
    refused("run", *SMALL, "--data", questions_file, "--shots", 0, "--prompts", "defualt", "--out", out)
    again(out, questions_file)


# --- the run directory

@pytest.fixture
def copy(finished, out):
    shutil.copytree(finished, out)
    return out


def snapshot(folder): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_run_directory_in_use(copy):
    (copy / "iter_01/metrics.json").unlink()
    before = snapshot(copy)
    with filelock.FileLock(copy / ".lock"): refused("resume", copy, says=["in use by another process", str(copy)])
    assert snapshot(copy) == before


def test_other_settings_in_the_place_of_a_complete_run(copy, questions_file):
    before = snapshot(copy)
    refused("run", *SMALL, "--data", questions_file, "--shots", 0, "--filter", "all", "--seed", 4, "--out", copy, says=["seed: 0 there, 4 here"])
    assert snapshot(copy) == before


# --- the disk

def test_place_below_a_file(tmp_path, questions_file):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        refused("run", *SMALL, "--data", questions_file, "--out", out, says=[str(tmp_path / "file"), "cannot be written|is not a directory|Not a directory|File exists"])
    assert (tmp_path / "file").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs a file system in which no one may make a folder")
def test_place_where_no_folder_can_be_made(questions_file):
    refused("run", *SMALL, "--data", questions_file, "--out", "/proc/none/run", says=["/proc/none/run cannot be written"])


def test_picture_that_cannot_be_written(copy):
    (copy / "curves.png").unlink()
    (copy / "curves.png").mkdir()
    refused("resume", copy, says=["curves.png"])


# The libraries are imported once; each command is a fork with a limit on the size of files.
PARENT = """
import json, os, sys
import matplotlib.pyplot, torch, peft, transformers, stasc.model, stasc.loop
from stasc.cli import main

for limit, err, argv in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        import resource
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: code = main(argv)
        except BaseException:
            import traceback
            traceback.print_exc(); code = 1
        sys.stderr.flush()
        os._exit(code)
    print("ENDED", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
LIMITS = {"config.json": 1_000, "initial.train/part-": 3_700, "adapter": 20_000}


@pytest.fixture(scope="module")
def full_disks(tmp_path_factory, questions_file):
    "Commands that met a full disk: code, what they said, where they ran."
    if importlib.util.find_spec("resource") is None: pytest.skip("this system has no limit on the size of files")
    folder = tmp_path_factory.mktemp("full")
    argv = lambda out: [str(a) for a in ("run", *SMALL, "--data", questions_file, "--shots", 0, "--filter", "all", "--out", out)]
    work = [(limit, str(folder / f"{limit}.err"), argv(folder / str(limit))) for limit in LIMITS.values()]
    p = subprocess.run([sys.executable, "-c", PARENT, json.dumps(work)], capture_output=True, text=True, timeout=100,
                       env=os.environ | dict(PYTHONPATH=str(root), TQDM_DISABLE="1"))
    codes = [int(line.split()[1]) for line in p.stdout.splitlines() if line.startswith("ENDED")]
    assert len(codes) == len(work), p.stderr
    return {limit: (code, open(err).read(), folder / str(limit), argv) for code, (limit, err, argv) in zip(codes, work)}


@pytest.mark.parametrize("at", LIMITS)
def test_full_disk(full_disks, at):
    "A file that grows beyond the limit fails as on a full disk."
    code, err, out, argv = full_disks[LIMITS[at]]
    assert code == 2 and "Traceback" not in err, err
    assert err.startswith("stasc: ") and at in err and err.count("\n") == 1
    assert leftovers(out) == []
    done = run_command(*argv)                               # once there is room again
    assert done.code == 0, done.err


# --- Ctrl-C

def test_interrupt_gives_130_and_says_how_to_go_on(out, questions_file, monkeypatch, quiet):
    import stasc.train
    with monkeypatch.context() as m:
        def sample(self, *a): raise KeyboardInterrupt
        m.setattr(stasc.train.HFSampler, "sample", sample)
        refused("run", *SMALL, "--data", questions_file, "--shots", 0, "--out", out, says=["stopped; go on with: stasc resume", str(out)], out=out, code=130)
    assert run_command("resume", out).code == 0


def test_interrupt_without_a_place_names_the_place_it_chose(tmp_path, questions_file, monkeypatch, quiet):
    import stasc.train
    def sample(self, *a): raise KeyboardInterrupt
    monkeypatch.setattr(stasc.train.HFSampler, "sample", sample)
    monkeypatch.chdir(tmp_path)
    refused("run", *SMALL, "--data", questions_file, "--shots", 0, says=["stasc resume runs/embedded-EIE-seed0-"], code=130)
