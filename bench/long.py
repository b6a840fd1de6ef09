"""Long runs: is memory constant over many iterations, and bounded over many trajectories?

    python bench/long.py memory --iterations 30         # a run of the embedded model; memory at the end of each iteration
    python bench/long.py million --n 1000000            # trajectories through store, filter, metrics and report

Each step of `million` is a process of its own: its memory is read at the end, beside that of the same step on a tenth of the trajectories.
"""
import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]

import common


def held():
    "Bytes of memory that this process holds."
    return 1024 * int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1])


class Watch:
    "Notes memory at the end of each iteration."
    def __init__(self): self.rows = []
    def on_iteration(self, run, it):
        self.rows.append(dict(iteration=it.n, kept=it.metrics["n_kept"], held=held(), peak=common.peak_memory()))
        print(f"  M_{it.n}: {self.rows[-1]['held'] / 1e6:.0f} MB, peak {self.rows[-1]['peak'] / 1e6:.0f} MB, {it.metrics['n_kept']} kept", file=sys.stderr, flush=True)


def memory(args):
    from stasc.core import Config
    from stasc.loop import STaSC
    options = dict(device="cpu", iterations=args.iterations) | (dict(n_train=args.n_train, n_test=args.n_train // 2) if args.n_train else {})
    watch, began = Watch(), time.monotonic()
    with tempfile.TemporaryDirectory() as tmp: STaSC(Config.demo(**options), Path(tmp) / "run", callbacks=[watch]).run()
    base, after = watch.rows[3], watch.rows[4:]
    row = {"iterations": args.iterations, "questions": Config.demo(**options).n_train, "held after M_3, MB": f"{base['held'] / 1e6:.0f}", "most held after a later one, MB": f"{max(r['held'] for r in after) / 1e6:.0f}",
           "held at the end, MB": f"{after[-1]['held'] / 1e6:.0f}", "growth": f"{max(r['held'] for r in after) / base['held'] - 1:.1%}", "peak up to M_3, MB": f"{base['peak'] / 1e6:.0f}",
           "peak, MB": f"{after[-1]['peak'] / 1e6:.0f}", "kept at most": max(r["kept"] for r in watch.rows), "minutes": f"{(time.monotonic() - began) / 60:.1f}"}
    common.write("long_memory", "Memory over many iterations", [row], "A demo run of the embedded model in one process; resident memory at the end of each iteration.", args.out, by_iteration=watch.rows, **options)


# --- many trajectories

N_INIT = N_CORR = 5


def script(prompt, rng, skill):
    place = prompt.rpartition("stands at place ")[2].partition("?")[0]
    return f"Step-by-step reasoning: it is the number of the place itself, counted from zero.\nFinal Answer: {place if rng.random() < .4 + .1 * skill else rng.randrange(10)}"


class Untaught:
    "What makes a scripted sampler: its fine-tuning only counts the corrections."
    def __new__(cls):
        from stasc.train import ScriptedEngine
        return ScriptedEngine(script)


def the_run(folder, n, iterations=1, callbacks=(), engine=None):
    "A run of which two models make n trajectories on training and held-out questions."
    from stasc.core import Config, Question
    from stasc.data import Data
    from stasc.loop import STaSC
    train, test = round(n / 2 / (N_INIT * N_CORR) * .95), round(n / 2 / (N_INIT * N_CORR) * .05)
    ask = lambda a, b: tuple(Question(f"q{i}", f"Which number stands at place {i}?", (str(i),)) for i in range(a, b))
    cfg = Config(iterations=iterations, n_init=N_INIT, n_corr=N_CORR, n_test_init=N_INIT, n_test_corr=N_CORR, n_train=train, n_test=test, shots=0, prompts="default", reward="exact_match", data="own")
    return STaSC(cfg, folder, data=Data(ask(0, train), ask(train, train + test)), engine=engine or Untaught(), callbacks=callbacks)


def write(folder, n):
    "Store the trajectories: one part of each phase is drawn, the others are copies of it under the ids of other questions, written and recorded as every part is."
    import pyarrow as pa, pyarrow.parquet as pq
    from stasc.store import part_name, whole
    few, run = the_run(f"{folder}-few", 2 * 128 * N_INIT * N_CORR / .05), the_run(folder, n)
    size = few.cfg.part_size
    few._data = type(few.data)(few.data.train[:size], few.data.test[:size])
    few.run()
    with run._writing():
        for m in (0, 1):
            for split in ("train", "test"):
                ids = [q.id for q in getattr(run.data, split)]
                for phase in (f"initial.{split}", f"corrections.{split}"):
                    t = pq.ParquetFile(few.dir / part_name(m, phase, 0)).read()
                    each, place = len(t) // size, t.column_names.index("question_id")
                    for part, a in enumerate(range(0, len(ids), size)):
                        some = ids[a:a + size]
                        rows = t.slice(0, each * len(some)).set_column(place, "question_id", pa.array([i for i in some for _ in range(each)]))
                        with whole(run.dir / part_name(m, phase, part)) as tmp: pq.write_table(rows, tmp, compression="zstd")
                        run.dir._record(part_name(m, phase, part), rows=len(rows))


def finish(run):
    "Filter, write what is kept, make the examples to train on, measure."
    run.run()


def metrics(run): return run._measure(1)


def kept(run):
    "The filter over all trajectories of M_0, one part after the other."
    return sum(int(t.kept.sum()) for t in run.stream("train", [0]))


def intervals(run):
    from stasc.metrics import by_iteration
    return by_iteration(run, "train")


def report(run):
    import stasc.view                       # noqa: F401
    return run.report()


def everything(run): return run.trajectories


STEPS = dict(finish=finish, metrics=metrics, filter=kept, intervals=intervals, report=report, **{"run.trajectories": everything})


NAMES = dict(finish="filter, kept corrections, examples, measures", filter="filter alone, part by part", metrics="metrics.json", intervals="bootstrap intervals", report="report.html")


def one(step, folder, n):
    run = the_run(folder, n)
    gc.collect()
    base, start = held(), time.monotonic()
    STEPS[step](run)
    return dict(seconds=time.monotonic() - start, above=common.peak_memory() - base, peak=common.peak_memory(), trajectories=int(run.metrics[["train_n", "test_n"]].sum().sum()), disk=run.dir.disk_use(), kept=int(run.metrics.n_kept.iloc[-1]))


def million(args):
    rows, sizes = [], [args.n // 10, args.n]
    with tempfile.TemporaryDirectory() as tmp:
        for n in sizes: write(f"{tmp}/{n}", n)
        for step in STEPS:
            few, many = (json.loads(subprocess.run([sys.executable, __file__, "one", "--step", step, "--folder", f"{tmp}/{n}", "--n", str(n)], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]) for n in sizes)
            rows.append({"step": NAMES.get(step, step), "trajectories": f"{many['trajectories']:,}", "seconds": f"{many['seconds']:.0f}", "peak memory, MB": f"{many['peak'] / 1e6:.0f}", "above the start, MB": f"{many['above'] / 1e6:.0f}",
                         f"above the start with {few['trajectories']:,}, MB": f"{few['above'] / 1e6:.0f}", "bytes per trajectory": f"{(many['above'] - few['above']) / (many['trajectories'] - few['trajectories']):.0f}"})
            print(rows[-1], file=sys.stderr, flush=True)
            common.write("long_million", "A million trajectories", rows, f"{N_INIT} initial answers and {N_CORR} corrections of each for every question, M_0 and M_1, parts of 128 questions, {many['disk'] / 1e6:.0f} MB on disk, {many['kept']:,} kept. One part of each phase is "
                         "drawn with a scripted sampler, the others are copies under other ids. `run.trajectories` is what a user asks for who wants the whole table in memory.", args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("memory", "million", "one"))
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--n-train", type=int, help="training questions [the demo's]")
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="folder of the tables [bench/results]")
    args = parser.parse_args()
    if args.command == "one": print(json.dumps(one(args.step, args.folder, args.n)))
    else: dict(memory=memory, million=million)[args.command](args)


if __name__ == "__main__":
    main()
