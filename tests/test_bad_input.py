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
from conftest import root, run_command, write_questions

SMALL = ["--n-train", 4, "--n-test", 2, "--iterations", 1, "--n-init", 1, "--n-corr", 1, "--max-new-tokens", 4, "--part-size", 2, "--device", "cpu"]


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


# --- questions

ROWS = [dict(id=f"q{i}", question=f"Question number {i}?", answer=[str(i)]) for i in range(20)]


def lines(*changes):
    rows = [json.dumps(r) for r in ROWS]
    for n, text in changes: rows[n - 1] = text
    return "\n".join(rows) + "\n"


DATA = {
    "missing question column": ("f.jsonl", lines().replace('"question"', '"ask"'), ["f.jsonl", "question column", "ask, answer"]),
    "missing answer column": ("f.csv", "id,question,solution\n1,a?,b\n", ["f.csv", "reference column", "solution"]),
    "empty file": ("f.jsonl", "", ["f.jsonl: the file is empty"]),
    "blank file": ("f.csv", "\n \n", ["f.csv: the file is empty"]),
    "header alone": ("f.csv", "id,question,answer\n", ["f.csv: holds no questions"]),
    "empty list": ("f.json", "[]", ["f.json: holds no questions"]),
    "not JSON": ("f.jsonl", lines((17, '{"question": "a?", "answer": ')), ["f.jsonl, line 17: not JSON"]),
    "not an object": ("f.jsonl", lines((17, "[1, 2]")), ["f.jsonl, line 17: expected an object"]),
    "null among references": ("f.jsonl", lines((5, '{"id": "q4", "question": "a?", "answer": ["x", null]}')), ["line 5, column 'answer': null"]),
    "null question": ("f.jsonl", lines((5, '{"id": "q4", "question": null, "answer": ["x"]}')), ["line 5, column 'question': null"]),
    "no references": ("f.jsonl", lines((5, '{"id": "q4", "question": "a?", "answer": []}')), ["line 5, column 'answer': an empty list"]),
    "row without the column": ("f.jsonl", lines((5, '{"id": "q4", "question": "a?"}')), ["line 5: no column 'answer'"]),
    "duplicate ids": ("f.jsonl", lines((5, json.dumps(ROWS[0] | dict(question="Another?")))), ["used more than once: 1 \\(q0\\)"]),
    "not UTF-8": ("f.jsonl", b'{"question": "caf\xe9?", "answer": "x"}\n', ["line 1: not UTF-8"]),
    "not Parquet": ("f.parquet", "no", ["f.parquet: not a Parquet file"]),
    "unknown type": ("f.txt", "no", ["unknown file type '.txt'"]),
    "too few questions": ("f.jsonl", "".join(json.dumps(r) + "\n" for r in ROWS[:5]), ["5 distinct questions", "n_train = 4 and n_test = 2 need 6"]),
}


@pytest.mark.parametrize("case", DATA)
def test_questions(tmp_path, out, case):
    name, text, says = DATA[case]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused("run", *SMALL, "--data", tmp_path / name, "--out", out, says=says)
    assert not out.exists()


def test_missing_file_folder_and_unknown_preset(tmp_path, out):
    refused("run", *SMALL, "--data", tmp_path / "none.jsonl", "--out", out, says=["none.jsonl: no such file"])
    refused("run", *SMALL, "--data", tmp_path, "--out", out, says=["folder"])
    refused("run", *SMALL, "--data", "nq_opne", "--out", out, says=["did you mean 'nq_open'"])
    assert not out.exists()


def test_column_that_is_not_there(tmp_path, out, questions_file):
    refused("run", *SMALL, "--data", questions_file, "--question-column", "Q", "--out", out, says=["no column 'Q'"])


def test_question_in_train_and_test(tmp_path, out):
    a, b = write_questions(tmp_path / "a.jsonl", 6), tmp_path / "b.jsonl"
    b.write_text(json.dumps(dict(id="x", question="which NUMBER stands at place 3 of the list", answer="3")) + "\n" + json.dumps(dict(id="y", question="Another?", answer="3")) + "\n")
    refused("run", *SMALL, "--data", a, "--test-data", b, "--out", out, says=["stand in the training data as well: 1 of 2", "q3 and x"])
    assert not out.exists()


# --- settings

@pytest.mark.parametrize("flags,says", [
    (["--variant", "XYZ"], ["unknown variant 'XYZ'", "EIE"]), (["--n-init", 0], ["n_init = 0: expected a number from 1"]),
    (["--n-init", "many"], ["n_init = 'many': expected a whole number"]), (["--n-init", 1.5], ["n_init"]), (["--temperature", -0.5], ["temperature = -0.5"]),
    (["--temperature", "nan"], ["temperature = nan"]), (["--temperature", "inf"], ["temperature = inf"]), (["--top-p", 0], ["top_p = 0"]),
    (["--learning-rate", "nan"], ["learning_rate = nan"]), (["--reward", "acuracy"], ["unknown reward 'acuracy'", "did you mean"]),
    (["--filter", "improve"], ["unknown filter 'improve'", "did you mean 'improving'"]), (["--finetune", "lora2"], ["unknown finetune"]),
    (["--device", "tpu"], ["unknown device 'tpu'"]), (["--iterations", 0], ["iterations = 0"]), (["--seed", -1], ["seed = -1"]),
])
def test_settings(out, questions_file, flags, says):
    refused("run", *SMALL, "--data", questions_file, *flags, "--out", out, says=says)
    assert not out.exists()


@pytest.mark.parametrize("name,text,says", [
    ("c.yaml", "n_inti: 3\n", ["c.yaml", "unknown option 'n_inti', did you mean 'n_init'"]), ("c.yaml", "n_init: [1\n", ["c.yaml: not valid YAML"]),
    ("c.json", "{", ["c.json: not valid JSON"]), ("c.yaml", "- 1\n", ["c.yaml: expected a mapping"]), ("c.json", "[]", ["c.json: expected a mapping"]),
    ("c.yaml", "n_init: null\n", ["n_init = None"]), ("c.yaml", "n_init: true\n", ["n_init = True"]), ("c.yaml", "1: 2\n", ["unknown option '?1"]),
])
def test_configuration_file(tmp_path, out, name, text, says):
    (tmp_path / name).write_text(text)
    refused("run", "--config", tmp_path / name, "--out", out, says=says)
    refused("run", "--config", tmp_path / "none.yaml", "--out", out, says=["none.yaml: cannot be read"])
    assert not out.exists()


@pytest.mark.parametrize("text", ["model: 5\n", "1: 2\n", "n_inti: 3\n"])
def test_configuration_file_over_a_preset(tmp_path, out, text):
    (tmp_path / "c.yaml").write_text(text)
    refused("run", "--preset", "paper", "--config", tmp_path / "c.yaml", "--out", out)


def test_unknown_flag_and_command_end_with_code_2(capsys):
    for argv in (["run", "--n-inti", "3"], ["rnu"], ["eval", "x"], ["resume"]):
        with pytest.raises(SystemExit) as e: run_command(*argv)
        assert e.value.code == 2


# --- the model; what was refused leaves the place free for the mended command

def again(out, questions_file, *flags):
    "The same command with another model in the same place."
    done = run_command("run", *SMALL, "--data", questions_file, "--shots", 0, *flags, "--out", out)
    assert done.code == 0, done.err


@pytest.fixture
def folder(families, tmp_path):
    shutil.copytree(families["qwen2"], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("lost,says", [("tokenizer", ["holds no tokenizer", "save_pretrained"]), ("config.json", ["config.json is missing"]), ("model.safetensors", ["model", "cannot be loaded"])])
def test_model_folder_that_lacks_a_file(folder, questions_file, out, lost, says):
    for f in folder.glob(f"{lost}*"): f.unlink()
    refused("run", *SMALL, "--data", questions_file, "--model", folder, "--out", out, says=[*says, "model"], out=out)


@pytest.mark.parametrize("file,text", [("config.json", "{"), ("config.json", '{"model_type": "nonsuch"}'), ("tokenizer.json", "{"), ("model.safetensors", "x" * 50)])
def test_model_folder_with_a_damaged_file(folder, questions_file, out, file, text):
    (folder / file).write_text(text)
    refused("run", *SMALL, "--data", questions_file, "--model", folder, "--out", out, says=["cannot be loaded"], out=out)


def test_model_folder_whose_weights_are_incomplete(folder, questions_file, out):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1." not in k}, folder / "model.safetensors", metadata=dict(format="pt"))
    refused("run", *SMALL, "--data", questions_file, "--model", folder, "--out", out, says=["weights"], out=out)


def test_model_that_is_no_folder(tmp_path, questions_file, out):
    (tmp_path / "file").write_text("")
    for i, model in enumerate((tmp_path / "file", tmp_path / "none", "./none", "a/b/c")):
        refused("run", *SMALL, "--data", questions_file, "--model", model, "--out", tmp_path / f"run-{i}", says=["no such folder, and not a Hub id"], out=tmp_path / f"run-{i}")


def test_qlora_without_bitsandbytes(questions_file, families, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused("run", *SMALL, "--data", questions_file, "--model", families["qwen2"], "--finetune", "qlora", "--out", out, says=["needs bitsandbytes: pip install"], out=out)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_is_not_there(questions_file, out, device, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused("run", *SMALL, "--data", questions_file, "--device", device, "--out", out, says=[f"device = '{device}'", "no such device"], out=out)


def test_unknown_prompt_set(questions_file, out):
    refused("run", *SMALL, "--data", questions_file, "--prompts", "defualt", "--out", out, says=["unknown prompt set 'defualt', did you mean 'default'"], out=out)


@pytest.mark.parametrize("text,says", [("initial: 5\n", "initial needs a text"), ("initial: {user: hello}\ncorrection: {user: b}\n", "must hold {question}"), ("- 1\n", "mapping")])
def test_prompt_set_that_is_no_prompt_set(tmp_path, questions_file, out, text, says):
    (tmp_path / "p.yaml").write_text(text)
    refused("run", *SMALL, "--data", questions_file, "--prompts", tmp_path / "p.yaml", "--out", out, says=["p.yaml", says], out=out)


def test_prompt_that_is_too_long_names_its_question(tmp_path, out, quiet):
    write_questions(tmp_path / "f.jsonl", 6)
    long = (tmp_path / "f.jsonl").read_text().replace("place 3 of", "place " + "3 of " * 600)
    (tmp_path / "f.jsonl").write_text(long)
    refused("run", *SMALL, "--data", tmp_path / "f.jsonl", "--out", out, says=["question 'q3': its prompt has \\d+ tokens", "exceeds the model's 1024"], out=out)


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

@pytest.fixture(scope="module")
def finished(tmp_path_factory, questions_file):
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run_command("run", *SMALL, "--data", questions_file, "--shots", 0, "--filter", "all", "--out", out)
    assert done.code == 0, done.err
    return out


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


def test_other_settings_in_the_same_place(copy, questions_file):
    (copy / "iter_01/metrics.json").unlink()
    before = snapshot(copy)
    refused("run", *SMALL, "--data", questions_file, "--shots", 0, "--filter", "all", "--seed", 4, "--out", copy, says=["seed: 0 there, 4 here"])
    refused("run", *SMALL, "--data", questions_file, "--shots", 0, "--filter", "all", "--n-train", 5, "--out", copy, says=["n_train: 4 there, 5 here"])
    assert snapshot(copy) == before


def test_other_settings_in_the_place_of_a_complete_run(copy, questions_file):
    before = snapshot(copy)
    refused("run", *SMALL, "--data", questions_file, "--shots", 0, "--filter", "all", "--seed", 4, "--out", copy, says=["seed: 0 there, 4 here"])
    assert snapshot(copy) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"config": 5}', '{"config": {"n_inti": 3}}', "\0\0"])
def test_damaged_config(copy, text):
    (copy / "config.json").write_text(text)
    for argv in (["show", copy], ["resume", copy, "--iterations", 3]): refused(*argv, says=["config.json"])


@pytest.mark.parametrize("file,text", [("questions.json", "{"), ("questions.json", "[1]"), ("questions.json", '[{"split": "train"}]'), ("iter_00/metrics.json", "{"),
                                       ("iter_01/metrics.json", "[]")])
def test_damaged_json(copy, file, text):
    (copy / file).write_text(text)
    refused("show", copy, says=[file])


def test_damaged_table(copy):
    (copy / "iter_01/corrections.test/part-00000.parquet").write_bytes(b"PAR1")
    refused("resume", copy, says=["part-00000.parquet is damaged"])


def test_damaged_adapter(copy, questions_file):
    (copy / "iter_01/adapter/adapter_model.safetensors").write_bytes(b"x" * 100)
    refused("resume", copy, "--iterations", 2, says=["adapter"])


@pytest.mark.parametrize("command", ["resume", "show"])
def test_missing_run(tmp_path, command):
    refused(command, tmp_path / "none", says=["none is not a run directory"])
    assert not (tmp_path / "none").exists()
    refused(command, tmp_path, says=["is not a run directory"])


def test_eval(copy, tmp_path, questions_file):
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "z", "question": "New?", "answer": "1"}\n')
    for n in (2, -3, 99): refused("eval", copy, "--data", other, "--iteration", n, says=[f"iteration {n} is not there: 2 are complete"])
    refused("eval", copy, "--data", tmp_path / "none.jsonl", says=["none.jsonl: no such file"])
    refused("eval", copy, "--data", questions_file, says=["stand in the training data"])
    refused("eval", tmp_path / "none", "--data", questions_file, says=["not a run directory"])


@pytest.mark.parametrize("n", [0, -1])
def test_eval_of_no_questions(copy, tmp_path, n):
    data = tmp_path / "f.jsonl"
    data.write_text('{"id": "z", "question": "New?", "answer": "1"}\n{"id": "y", "question": "Newer?", "answer": "1"}\n')
    refused("eval", copy, "--data", data, "--n", n, says=["n"])


# --- the disk

def test_place_below_a_file(tmp_path, questions_file):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        refused("run", *SMALL, "--data", questions_file, "--out", out, says=[str(tmp_path / "file"), "cannot be written|is not a directory|Not a directory|File exists"])
    assert (tmp_path / "file").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs a file system in which no one may make a folder")
def test_place_where_no_folder_can_be_made(questions_file):
    refused("run", *SMALL, "--data", questions_file, "--out", "/proc/none/run", says=["/proc/none/run cannot be written"])


def test_name_that_is_too_long(tmp_path, questions_file):
    refused("run", *SMALL, "--data", questions_file, "--out", tmp_path / ("x" * 300), says=["name too long"])
    refused("run", *SMALL, "--data", tmp_path / ("x" * 300), "--out", tmp_path / "run", says=["x"])


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
LIMITS = {"config.json": 1_000, "initial.train/part-": 3_500, "adapter": 20_000}


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
