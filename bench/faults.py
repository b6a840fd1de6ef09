"""Faults, many of them, on runs of the embedded model: kills, interruptions, a full disk, damaged files. Each run is taken up again, and its files are compared with those of a run that met no fault.

    python bench/faults.py kills --n 50             # SIGKILL, half of them at any time, half within a phase drawn from all phases
    python bench/faults.py interrupts --n 50        # KeyboardInterrupt in a process that goes on, as in a notebook
    python bench/faults.py disk                     # a tmpfs that fills up, larger by a step each time (needs to be root, on Linux)
    python bench/faults.py damage --n 200           # a bit flipped, or the end cut off, in any file of a run
    python bench/faults.py soak --minutes 20        # kills, one after the other, for so long

The libraries are imported once; each life of a run is a fork of this process, which itself never computes anything.
"""
import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]

OPTIONS = dict(iterations=2, n_train=24, n_test=8, part_size=8, n_init=1, n_corr=2, filter="all", lora_r=4, max_new_tokens=40, device="cpu")
UNEQUAL = ("log.jsonl", ".lock")        # times, and an empty file: no two runs share them


def tree(folder):
    "Every file of a run that two runs share, and its checksum."
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name not in UNEQUAL}


def same(a, b):
    "Are two trees equal, but for the order of the manifest's lines?"
    return {k: v for k, v in a.items() if k != "manifest.jsonl"} == {k: v for k, v in b.items() if k != "manifest.jsonl"}


def demo(out, callbacks=(), engine=None, **options):
    "A small run of the embedded model."
    from stasc.core import Config
    from stasc.loop import STaSC
    return STaSC(Config.demo(**OPTIONS | options), out, callbacks=list(callbacks), engine=engine)


def fork(work):
    "Process id of a child that does something and ends."
    sys.stdout.flush(); sys.stderr.flush()
    if pid := os.fork(): return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Tells:
    "A callback that writes into a pipe where the run is."
    def __init__(self, pipe): self.pipe = pipe
    def tell(self, *words): os.write(self.pipe, (json.dumps(words) + "\n").encode())
    def on_phase(self, run, iteration, phase, done, total): self.tell(f"M_{iteration}", phase)
    def on_iteration(self, run, it): self.tell(f"M_{it.n}", "between")


# --- SIGKILL

def life(make, out, aim=None, within=0.0):
    "One life of a run: killed `within` seconds of the moment at which it tells `aim` (None: its start). Where it was when it died; None where it was complete before."
    read, write = os.pipe()
    def work():
        os.close(read)
        tells = Tells(write)
        tells.tell("", "loading")
        make(out, [tells]).run()
    pid = fork(work)
    os.close(write)
    at, deadline, rest, began = ["", "forked"], time.monotonic() + within if aim is None else None, b"", time.monotonic()
    seen = [(*at, 0.0)]
    while True:
        left = None if deadline is None else max(0, deadline - time.monotonic())
        ready, _, _ = select.select([read], [], [], left)
        if not ready: os.kill(pid, signal.SIGKILL)
        data = os.read(read, 65536)             # what it had told before it died
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            at = json.loads(line)
            seen.append((*at, time.monotonic() - began))
            if deadline is None and at == aim: deadline = time.monotonic() + within
        if not data: break
    os.close(read)
    code = ended(pid)
    if code not in (0, -signal.SIGKILL): raise SystemExit(f"a run that was not killed ended with code {code}, after {at}")
    return (at if code else None), seen


def phases_of(seen):
    "Seconds that each phase of a life took: {(model, phase): seconds}."
    out = collections.defaultdict(float)
    for (m, p, a), (*_, b) in zip(seen, seen[1:]): out[m, p] += b - a
    return dict(out)


def kills(n, folder, make=demo, seed=0, seconds=None, shown=lambda line: None):
    "Kill runs at `n` random moments (or for so many seconds), each run taken up until it is complete; how often in each phase, and whether all files were the same."
    rng, folder = random.Random(seed), Path(folder)
    _, seen = life(make, folder / "whole", within=1e9)
    expected, took, whole = tree(folder / "whole"), phases_of(seen), seen[-1][-1]
    where, runs, wrong, again, began = collections.Counter(), 0, [], 0, time.monotonic()
    more = lambda: sum(where.values()) < n if seconds is None else time.monotonic() - began < seconds
    while more():
        out, lives = folder / f"run-{runs}", 0
        while True:
            if not more(): aim, within = None, 1e9
            elif rng.random() < .5: aim, within = None, rng.uniform(0, whole)
            else:
                aim = rng.choice(sorted(took))
                within, aim = rng.uniform(0, took[aim]), list(aim) if aim[1] != "forked" else None
            at, _ = life(make, out, aim, within)
            if at is None: break
            lives += 1
            where[at[1]] += 1
        again, runs = again + lives, runs + 1
        if not lives: shutil.rmtree(out); runs -= 1; continue           # it was complete before it was to be killed
        if tree(out) != expected: wrong.append(str(out))
        else: shutil.rmtree(out)
        shown(f"{sum(where.values())} kills, {runs} runs, {len(wrong)} not the same")
    return dict(kills=sum(where.values()), runs=runs, wrong=wrong, where=dict(sorted(where.items())), seconds=time.monotonic() - began)


# --- KeyboardInterrupt

def interrupts(n, folder, make=demo, seed=0, engine=None, mean=None):
    "In a process that lives on, interrupt a run at `n` random moments; after each the lock is free and the bar closed."
    import filelock
    from stasc.loop import Progress, STaSC
    from tqdm import tqdm
    rng, folder, where, runs, wrong = random.Random(seed), Path(folder), collections.Counter(), 0, []
    def stop(*_):
        frame = sys._getframe(1)
        names = []
        while frame: names.append(frame.f_code.co_name); frame = frame.f_back
        where["writing" if {"write", "_record", "whole", "write_json", "log", "_log"} & set(names) else "training" if {"_train", "train", "fine_tune"} & set(names) else
              "sampling" if {"sample", "_draw", "_one"} & set(names) else "the rest"] += 1
        raise KeyboardInterrupt
    old = signal.signal(signal.SIGPROF, stop)
    try:
        run = make(folder / "whole", engine=engine)
        run.engine
        began = time.process_time()         # the clock of the timer: it stands still while others have the processor
        run.run()
        expected, whole, engine = tree(folder / "whole"), time.process_time() - began, run.engine
        while sum(where.values()) < n:
            out, tries = folder / f"run-{runs}", 0
            run = make(out, [bar := Progress()], engine=engine)
            while True:
                before = sum(where.values())
                try:
                    signal.setitimer(signal.ITIMER_PROF, rng.uniform(0, mean or whole / 2) * 1.2**(tries / 4) + 1e-6)
                    run.run()
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    break
                except KeyboardInterrupt: tries += 1
                finally: signal.setitimer(signal.ITIMER_PROF, 0)
                # the exception is gone by now, and with it a bar that tqdm had only half made
                if bar.bar is not None or tqdm._instances: wrong.append(f"{out}: a bar is open")
                try: filelock.FileLock(out / ".lock").acquire(timeout=0).lock.release() if out.exists() else None
                except filelock.Timeout: wrong.append(f"{out}: the lock is held")
                if rng.random() < .3: run = make(out, [bar := Progress()], engine=engine)
            runs += 1
            if tree(out) != expected: wrong.append(f"{out}: not the same")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    return dict(interrupts=sum(where.values()), runs=runs, wrong=wrong, where=dict(sorted(where.items())))


# --- a full disk

def said_by(work):
    "The sentence that a piece of work in a child ends with, None where it says nothing; anything but a `StascError` is an error of ours."
    from stasc.core import StascError
    read, write = os.pipe()
    def child():
        try: work(); said = None
        except StascError as e: said = str(e)
        os.write(write, json.dumps(said).encode())
    code = ended(fork(child))
    os.close(write)
    with os.fdopen(read) as f: text = f.read()
    return json.loads(text) if code == 0 else f"TRACEBACK (code {code})"


@contextlib.contextmanager
def small_disk(folder, size):
    "A tmpfs of some bytes; gives a function that changes its size."
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try: yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    finally: subprocess.run(["umount", str(folder)], check=True)


def full_disks(n, folder, make=demo, shown=lambda line: None):
    "Runs on disks of `n` sizes, each too small; then there is room, and the run goes on."
    folder, where, wrong = Path(folder), collections.Counter(), []
    ended(fork(lambda: make(folder / "whole").run()))
    expected, used = tree(folder / "whole"), sum(-(-p.stat().st_size // 4096) * 4096 for p in (folder / "whole").rglob("*") if p.is_file())
    for i in range(n):
        size = (1 + round(i / n * used / 4096)) * 4096
        with small_disk(folder / f"disk-{i}", size) as resize:
            out = folder / f"disk-{i}/run"
            said = said_by(lambda: make(out).run())
            m = re.search(r"disk-\d+(?:/run(?:/(?:iter_\d+/)?([\w.-]+)\S*)?)? cannot be (?:written|locked): .*No space left", said or "")
            if said is None and tree(out) == expected: where["enough after all"] += 1; continue
            if not m: wrong.append(f"{size}: {said}")
            elif list(out.rglob(".tmp-*")): wrong.append(f"{size}: {[p.name for p in out.rglob('.tmp-*')]} was left behind")
            else: where[m[1] or "the folder itself"] += 1
            resize("size=200m")
            if (again := said_by(lambda: make(out).run())) or tree(out) != expected: wrong.append(f"{size}: not the same afterwards ({again})")
        shown(f"{sum(where.values())} full disks, {len(wrong)} wrong")
    out = folder / "read-only"
    with small_disk(out, "200m") as resize:
        shutil.copytree(folder / "whole", out / "run")
        resize("ro")
        from stasc.loop import STaSC
        for do in (lambda: STaSC.open(out / "run", callbacks=[]).run(), lambda: make(out / "new").run()):
            if "Read-only file system" not in (said := str(said_by(do))): wrong.append(f"read-only: {said}")
        if (said := said_by(lambda: (STaSC.open(out / "run").table(), STaSC.open(out / "run").trajectories))): wrong.append(f"read-only: {said}")
    return dict(disks=sum(where.values()), wrong=wrong, where=dict(sorted(where.items())))


# --- damage

def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


def cut_short(file, rng): file.write_bytes(file.read_bytes()[:rng.randrange(file.stat().st_size)])


def repaired(out, sentence):
    "Do what a sentence says."
    if m := re.search(r"manifest\.jsonl, line (\d+) is damaged; delete that line", sentence):
        lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
        (out / "manifest.jsonl").write_bytes(b"".join(l for i, l in enumerate(lines, 1) if i != int(m[1])))
    elif m := re.search(rf"({re.escape(str(out))}/\S*?):?[ ,;].*[;,] delete it", sentence):
        shutil.rmtree(m[1]) if os.path.isdir(m[1]) else os.unlink(m[1])
    else: raise AssertionError(sentence)


def looked_at(run):
    "Read all that a run holds, and bring it to its end."
    run.table(); run.trajectories; run.kept     # noqa: B018
    for n in range(1, run.n_done): run._model_folder(n)
    run.run()
    for n in range(1, run.n_done): run._model_folder(n)


def damages(n, folder, make=demo, seed=0, shown=lambda line: None):
    "Hurt a file of a complete run, `n` times: is it named, and does what the sentence says repair it?"
    from stasc.loop import STaSC
    rng, folder, where, wrong = random.Random(seed), Path(folder), collections.Counter(), []
    ended(fork(lambda: make(folder / "whole").run()))
    expected = tree(folder / "whole")
    kinds = collections.defaultdict(list)
    for name in expected: kinds[re.sub(r"\d+", "", name.replace("test", "train"))].append(name)
    for i in range(n):
        out = folder / f"run-{i}"
        shutil.copytree(folder / "whole", out)
        name, harm = rng.choice(kinds[rng.choice(sorted(kinds))]), rng.choice((flip, flip, cut_short))
        harm(out / name, rng)
        key, sentence = f"{harm.__name__} {name.split('/')[-1] if 'part' not in name else 'part'}", said_by(lambda: looked_at(STaSC.open(out, callbacks=[])))
        if sentence is not None:
            try: repaired(out, sentence)
            except AssertionError: wrong.append(f"{name}, {harm.__name__}: {sentence}"); continue
            if "adapter" in name and "adapter" not in sentence or "adapter" not in name and name.split("/")[-1] not in sentence: wrong.append(f"{name}, {harm.__name__}: names another file: {sentence}")
            if again := said_by(lambda: looked_at(make(out))): wrong.append(f"{name}, {harm.__name__}, repaired: {again}")
        if same(tree(out), expected): where["named and repaired" if sentence else "did no harm"] += 1
        else: wrong.append(f"{name}, {harm.__name__}: {'not the same after the repair' if sentence else 'not noticed'}")
        shutil.rmtree(out)
        shown(f"{i + 1} damages, {len(wrong)} wrong; {key}")
    return dict(damages=n, wrong=wrong, where=dict(sorted(where.items())))


# --- the command line

def write_kills(name, title, found, out):
    import common
    row = {"kills": found["kills"], "runs": found["runs"], "not the same": len(found["wrong"]), "minutes": round(found["seconds"] / 60, 1)}
    row |= {f"in {k}": v for k, v in found["where"].items()}
    o = OPTIONS
    common.write(name, title, [row], f"The embedded model, {o['iterations'] + 1} models, {o['n_train']} and {o['n_test']} questions in parts of {o['part_size']}; half of the kills at any moment, half within a phase drawn from all phases.", out, wrong=found["wrong"], **o)


def show(line): print(f"  {line}", file=sys.stderr, flush=True)


def do_kills(args, folder):
    soak = args.command == "soak"
    found = kills(args.n, folder, seed=args.seed, seconds=60 * args.minutes if soak else None, shown=show)
    write_kills("faults_soak" if soak else "faults_kills", "Kills for a while" if soak else "Kills at random moments", found, args.out)
    return found["wrong"]


def do_interrupts(args, folder):
    from long import the_run
    def both():
        rows = []
        for kind, n, *how in (("embedded", args.n), ("scripted", 25 * args.n, lambda out, callbacks=(), engine=None: the_run(out, 2000, 3, callbacks, engine), .003)):
            found = interrupts(n, folder / kind, *how[:1] or [demo], seed=args.seed, mean=how[1] if how else None)
            rows.append({"model": kind, "interrupts": found["interrupts"], "runs": found["runs"], "wrong": len(found["wrong"])} | {k: found["where"].get(k, 0) for k in ("sampling", "training", "writing", "the rest")})
            wrong.extend(found["wrong"])
        import common
        common.write("faults_interrupts", "Interruptions at random moments", rows, "KeyboardInterrupt in a process that goes on, as in a notebook; after each, the lock is free and no bar is open. "
                     "A scripted sampler takes no time, so there the interruptions, one in 3 ms, fall into all that surrounds a model.", args.out, wrong=wrong, **OPTIONS)
        sys.stdout.flush()
        os.write(write, json.dumps(wrong).encode())
    wrong, (read, write) = [], os.pipe()
    code = ended(fork(both))
    os.close(write)
    with os.fdopen(read) as f: return [f"ended with code {code}"] if code else json.load(f)


def do_disk(args, folder):
    found = full_disks(args.n, folder, shown=show)
    return written("faults_disk", "Full disks", {"full disks": found["disks"]}, found, "A tmpfs that is too small, larger by a step each time: which file was refused. Then there is room, and the run goes on. Also a file system that is read-only.", args.out)


def do_damage(args, folder):
    found = damages(args.n, folder, seed=args.seed, shown=show)
    return written("faults_damage", "Damaged files", dict(damages=found["damages"]), found, "A bit flipped (two of three) or the end cut off, in a file of a kind drawn from all kinds; what the sentence says is then done.", args.out)


def written(name, title, counts, found, notes, out):
    import common
    common.write(name, title, [counts | {"wrong": len(found["wrong"])} | found["where"]], notes, out, wrong=found["wrong"], **OPTIONS)
    return found["wrong"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("kills", "interrupts", "disk", "damage", "soak"))
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder of the tables [bench/results]")
    args = parser.parse_args()
    import accelerate, peft, pyarrow.parquet, torch, transformers, filelock, stasc.all, stasc.model        # noqa: E401, F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer                                  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        wrong = dict(kills=do_kills, soak=do_kills, interrupts=do_interrupts, disk=do_disk, damage=do_damage)[args.command](args, folder)
    for line in wrong: print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
