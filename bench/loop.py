"""What the loop itself costs: an iteration of the demo by phase, time and memory against the number of questions, import time.

    python bench/loop.py                # all three; about three minutes
    python bench/loop.py --sizes 100 1000 10000 100000

The number of questions is varied with a scripted sampler: what it takes to draw is counted apart, so that what is left is prompts, rewards,
filter, tables and metrics. Each size runs in a process of its own, whose peak memory is read at the end.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common


def scripted(n):
    "One run over n questions, one initial answer and one correction each; figures as a dictionary."
    from stasc.core import Config, Question
    from stasc.data import Data
    from stasc.loop import STaSC
    from stasc.prompt import Prompter
    from stasc.train import ScriptedEngine
    base = common.peak_memory()
    held_out = max(1, n // 10)
    questions = [Question(f"q{i}", f"Which number stands at place {i}?", (str(i),)) for i in range(n + held_out)]

    def script(prompt, rng, skill):
        place = prompt.rpartition("stands at place ")[2].partition("?")[0]
        return f"Step-by-step reasoning: it is the number of the place itself, counted from zero.\nFinal Answer: {place if rng.random() < .4 else 'none'}"

    cfg = Config(iterations=1, n_init=1, n_corr=1, n_train=n, n_test=held_out, shots=0, prompts="default", reward="exact_match")
    prompts, render = [], Prompter._render

    def timed(*args):
        start = time.perf_counter()
        try: return render(*args)
        finally: prompts.append(time.perf_counter() - start)

    Prompter._render = timed
    with tempfile.TemporaryDirectory() as tmp:
        start = time.perf_counter()
        run = STaSC(cfg, Path(tmp) / "run", data=Data(questions[:n], questions[n:]), engine=ScriptedEngine(script), callbacks=[]).run()
        seconds, model = time.perf_counter() - start, run.timing().model_seconds.sum()
        size = run.dir.disk_use()
        trajectories = int(run.metrics[["train_n", "test_n"]].sum().sum())
    peak = common.peak_memory()
    return dict(questions=n, trajectories=trajectories, rest=seconds - model, prompts=sum(prompts), peak_mb=peak / 1e6, grown_mb=(peak - base) / 1e6, disk_mb=size / 1e6)


def sizes(args):
    rows = []
    for n in args.sizes:
        out = subprocess.run([sys.executable, __file__, "--one", str(n)], capture_output=True, text=True, check=True).stdout
        r = json.loads(out.splitlines()[-1])
        rows.append({"questions": f"{n:,}", "trajectories": f"{r['trajectories']:,}", "outside drawing, s": f"{r['rest']:.1f}", "of it prompts, s": f"{r['prompts']:.1f}", "ms per trajectory": f"{1000 * r['rest'] / r['trajectories']:.2f}",
                     "peak memory, MB": f"{r['peak_mb']:.0f}", "above the start, MB": f"{r['grown_mb']:.0f}", "run directory, MB": f"{r['disk_mb']:.1f}"})
        print(rows[-1], file=sys.stderr)
    common.write("questions", "Cost against the number of questions", rows,
                 "Two models (M_0, M_1), one initial answer and one correction for each question, a tenth as many held out; scripted sampler, whose own time is left out.", args.out)


def phases(args):
    "An iteration of the demo by phase."
    from stasc.core import Config
    from stasc.loop import STaSC
    from stasc.train import Engine
    engine = Engine(Config.demo())
    with tempfile.TemporaryDirectory() as tmp:
        run = STaSC(Config.demo(iterations=args.iterations), Path(tmp) / "run", engine=engine, callbacks=[]).run()
        t = run.timing().drop(index=0, level="iteration").groupby("phase", sort=False).sum()
    total = t.sum()
    rows = [{"phase": k, "seconds": f"{r.seconds / args.iterations:.2f}", "sampling or training": f"{r.model_seconds / args.iterations:.2f}", "around it": f"{r.other_seconds / args.iterations:.2f}",
             "share of the iteration": f"{r.seconds / total.seconds:.1%}"} for k, r in [*t.iterrows(), ("all", total)]]
    common.write("iteration", "A demo iteration by phase", rows,
                 f"Means over iterations 1 to {args.iterations}. Outside sampling and training: {total.other_seconds / total.seconds:.1%} of an iteration.", args.out)


def imports(args):
    "Seconds of whole processes, medians."
    commands = {"python -c pass": ["-c", "pass"], "import stasc": ["-c", "import stasc"], "stasc --help": ["-m", "stasc.cli"], "from stasc.all import *": ["-c", "from stasc.all import *"],
                "import torch, transformers": ["-c", "import torch, transformers"]}
    commands["stasc --help"] = ["-c", "import sys; from stasc.cli import main; main(['--help'])"]
    seconds = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, argv in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *argv], capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    bare = statistics.median(seconds["python -c pass"])
    rows = [{"command": name, "seconds": f"{statistics.median(s):.2f}", "above python itself": f"{statistics.median(s) - bare:.2f}"} for name, s in seconds.items()]
    common.write("imports", "Import time", rows, f"Whole processes, medians of {args.rounds} rounds.", args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("sizes", "phases", "imports"), nargs="+", default=["phases", "sizes", "imports"])
    parser.add_argument("--out", help="folder of the tables [bench/results]")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(scripted(args.one)))
    for name in args.only: dict(sizes=sizes, phases=phases, imports=imports)[name](args)


if __name__ == "__main__":
    main()
