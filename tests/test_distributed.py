"Fine-tuning by two processes (gloo, on the CPU) against one: the same losses, the same weights; what happens when one of them dies."
import json
import math
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

import stasc.train as train
from stasc.core import Config, ConfigError
from stasc.train import Example, passes, rank, share, world

torch = pytest.importorskip("torch")
tried = pytest.mark.skipif(Version(version("accelerate")) < Version("1.15"), reason="tried with accelerate 1.15; with 1.3 and torch 2.6 two processes do not come to their end")
root = Path(__file__).resolve().parents[1]
tiny = dict(device="cpu", train_batch=4, epochs=2)
PLAIN = {"adapter": dict(), "accumulated": dict(grad_accumulation=3), "own loss": dict(lora_alpha=33), "own means": dict(lora_alpha=34)}
if find_spec("bitsandbytes"): PLAIN["quantised"] = dict(finetune="qlora")
SHARDED = {"full": dict(finetune="full")}
RUN = ["--device", "cpu", "--n-train", "16", "--n-test", "4", "--iterations", "1", "--epochs", "2"]


# --- what the processes run: this file, started by accelerate

def examples(tokenizer, n=9):                       # of batches of 4 the last has one row, which two processes cannot share
    from stasc.arithmetic import arithmetic_questions, scratchpad
    for i, q in enumerate(arithmetic_questions("train", n, seed=0)):
        a, b = map(int, q.id.split("+"))
        yield Example(tuple(tokenizer(f"What is {a} + {b}?" + " now" * (i % 4))["input_ids"]), tuple(tokenizer(scratchpad(a, b))["input_ids"] + [tokenizer.eos_token_id]))


def losses():
    "A list that every step's loss is added to."
    from transformers import Trainer
    seen, log = [], Trainer.log

    def noted(self, logs, *more, **kw):
        if "loss" in logs: seen.append(logs["loss"])
        return log(self, logs, *more, **kw)
    Trainer.log = noted
    return seen, lambda: setattr(Trainer, "log", log)


def with_own_loss():
    "Models with a loss of their own, recognised by an odd setting."
    made = train._trainer

    def trainer(lm, *more):
        odd, same = lm.cfg.lora_alpha, train.same_loss
        lm.base.accepts_loss_kwargs = odd != 34
        if odd in (33, 34): train.same_loss = lambda *_: False
        try: return made(lm, *more)
        finally: train.same_loss = same
    train._trainer = trainer
    return lambda: setattr(train, "_trainer", made)


def fine_tuned(out, cases):
    "Two fine-tunings of each case, the second from the first; every step's loss is written down."
    from stasc.distributed import Engine
    seen, stop = losses()
    undo, report = with_own_loss(), {}
    try:
        for name, options in cases.items():
            cfg = Config.demo(**tiny | options)
            engine, first, second = Engine(cfg), out / name / "1", out / name / "2"
            seen.clear()
            for start, folder in ((None, first), (first, second)):
                folder.mkdir(parents=True)
                engine.train(list(examples(engine.tokenizer)), start, folder, cfg, seed=7)
            report[name] = list(seen)
            engine.use(second)
            report[name + ", said"] = engine.sample([engine.tokenizer("What is 1 + 2?")["input_ids"]], 1, cfg.params, [[3]])[0][0].text
    finally: stop(); undo()
    (out / "losses.json").write_text(json.dumps(report))


def worker(what, out):
    import torch.distributed as dist
    from stasc.cli import main
    from stasc.distributed import team
    dist.init_process_group()
    undo = with_own_loss()
    with team() as leads:
        if leads: undo(); fine_tuned(out, PLAIN if what == "plain" else SHARDED)
    if what == "plain":                             # and then a run whose loss is no number
        loss, same = train.completion_loss, train.same_loss
        train.completion_loss, train.same_loss = lambda *a: loss(*a) * math.nan, lambda *a: True
        sys.exit(main(["demo", *RUN, "--out", str(out / "nan")]))
    if rank() == 1:                                 # and then a run whose second process is killed in the middle of a fine-tuning
        from transformers import Trainer
        Trainer.log = lambda self, *a: os.kill(os.getpid(), signal.SIGKILL) if self.state.global_step == 2 else None
    sys.exit(main(["demo", *RUN, "--finetune", "full", "--out", str(out / "run")]))


if __name__ == "__main__": worker(sys.argv[1], Path(sys.argv[2]))


# --- what is asserted of them

def launched(*command, fsdp=False):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    wrap = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_reshard_after_forward", "true"] if fsdp else ["--multi_gpu"]
    given = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *given, *wrap, *map(str, command)], env=env, capture_output=True, text=True, timeout=600)


def sentences(done): return [l for l in done.stderr.splitlines() if l.startswith("stasc: ") and not l.startswith("stasc: note: ")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    fine_tuned(out, PLAIN | SHARDED)
    return out


def weights(folder):
    from safetensors.torch import load_file
    return load_file(next(folder.glob("*.safetensors")))


def check_same(alone, out, cases):
    one, two = (json.loads((o / "losses.json").read_text()) for o in (alone, out))
    for name in cases:
        assert len(one[name]) == len(two[name]) and one[name][0] != one[name][-1]
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
        for k in "12":
            a, b = weights(alone / name / k), weights(out / name / k)
            assert a.keys() == b.keys()
            for key in a: torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=1e-5)
        assert two[name + ", said"] == one[name + ", said"]


@tried
def test_two_processes_with_a_copy_each_learn_what_one_does_and_stop_together(alone, tmp_path):
    done = launched(__file__, "plain", tmp_path)
    assert (tmp_path / "losses.json").exists(), done.stderr[-3000:]
    check_same(alone, tmp_path, PLAIN)
    assert done.returncode and len(sentences(done)) == 1, done.stderr[-3000:]
    assert "the loss is not a number from step 1 on; lower learning_rate" in sentences(done)[0]
    assert "exitcode  : 2" in done.stderr and not list((tmp_path / "nan/iter_01").glob("adapter*"))


@tried
def test_two_processes_with_half_of_the_model_each_learn_what_one_does_and_resume_when_one_was_killed(alone, tmp_path):
    from stasc.loop import STaSC
    done = launched(__file__, "sharded", tmp_path, fsdp=True)
    assert (tmp_path / "losses.json").exists(), done.stderr[-3000:]
    check_same(alone, tmp_path, SHARDED)
    assert done.returncode and "SIGKILL" in done.stderr and len(sentences(done)) <= 1, done.stderr[-3000:]
    run = tmp_path / "run"
    assert (run / "iter_01/kept.parquet").exists() and not (run / "iter_01/model").exists()

    done = launched("-m", "stasc", "resume", run, fsdp=True)
    assert done.returncode == 0 and not sentences(done), done.stderr[-3000:]
    assert done.stdout.count("M_1 ") == 1 and done.stdout.count("reward curves") == 1       # said once
    one = STaSC(STaSC.open(run).cfg, tmp_path / "one", callbacks=[]).run()
    for key, w in weights(one.dir / "iter_01/model").items(): torch.testing.assert_close(weights(run / "iter_01/model")[key], w, rtol=1e-4, atol=1e-5)
    a, b = ([json.loads(l) for l in (d / "log.jsonl").read_text().splitlines() if '"train"' in l and "first_loss" in l][-1] for d in (one.dir.path, run))
    assert (b["processes"], b["steps"], b["tokens"]) == (2, a["steps"], a["tokens"]) and "processes" not in a
    assert [b["first_loss"], b["last_loss"]] == pytest.approx([a["first_loss"], a["last_loss"]], abs=1e-4)


# --- in one process

@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 8))
def test_every_row_of_a_step_is_taken_once(n, batch, processes):
    rows = [Example((1,) * (i * 7 % 11), (2, i)) for i in range(n)]
    parts = passes(rows, batch)
    shares = [[share(p, i, processes) for p in parts] for i in range(processes)]
    assert all(len(s) == len(parts) and all(mine for mine, _ in s) for s in shares)         # all take part in every pass
    taken = [e for s in shares for mine, counts in s if counts for e in mine]
    assert sorted(taken, key=hash) == sorted(rows, key=hash)
    for p, each in zip(parts, zip(*shares)): assert max(len(mine) for mine, _ in each) == math.ceil(len(p) / processes)


def test_one_process_is_no_team(monkeypatch):
    from stasc.distributed import speaks, team
    with team() as leads: assert leads and (world(), rank()) == (1, 0) and speaks()


def test_an_adapter_is_not_sharded(monkeypatch):
    monkeypatch.setattr(train, "world", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP is for full fine-tuning"): train.Engine(Config.demo(device="cpu"))


@pytest.mark.parametrize("place", ["0", "1"])
def test_commands_that_share_nothing_are_refused_once(place, monkeypatch, capsys):
    from stasc.cli import main
    monkeypatch.setenv("WORLD_SIZE", "2"); monkeypatch.setenv("RANK", place)
    code = main(["show", "nowhere"])
    said = capsys.readouterr()
    assert (code, said.err.count("leave accelerate launch away")) == ((2, 1) if place == "0" else (0, 0)) and not said.out
    with pytest.raises(SystemExit) as e: main(["run", "--nonsense"])
    assert e.value.code == 2 and capsys.readouterr().err.count("unrecognized") == (place == "0")
