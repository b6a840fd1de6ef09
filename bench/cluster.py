"""A run over several engines by Ray: does it go as many times faster, and what does the process hold that asks them?

    python bench/cluster.py speed                   # 1, 2, 4, 8 engines; the time of a model is slept, so that few cores do not hide what distributing costs
    python bench/cluster.py memory                  # the process that holds the run, with 10,000, 100,000 and 1,000,000 trajectories

Baseline of `speed`: `STaSC` itself, one engine in one process, on the same questions.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

import common
from long import N_CORR, N_INIT, held, script

CORES = 32          # that Ray is told of: the engines sleep, or share the cores there are


def questions(n):
    from stasc.core import Question
    from stasc.data import Data
    ask = lambda a, b: tuple(Question(f"q{i}", f"Which number stands at place {i}?", (str(i),)) for i in range(a, b))
    return Data(ask(0, n), ask(n, n + n // 20))


def settings(n, **more):
    from stasc.core import Config
    return Config(**more, iterations=1, n_init=N_INIT, n_corr=N_CORR, n_train=n, n_test=n // 20, shots=0, prompts="default", reward="exact_match", data="own")


def engine(latency):
    "What makes scripted engines that take some seconds for each part."
    def make(cfg):
        from stasc.train import ScriptedEngine
        class Slow(ScriptedEngine):
            def sample(self, *args):
                time.sleep(latency)
                return super().sample(*args)
        return Slow(script)
    return make


def drawing(run):
    "Seconds in which texts were drawn, and parts that were."
    log = [json.loads(line) for line in (run.dir / "log.jsonl").read_text().splitlines()]
    return sum(r["seconds"] for r in log if "." in r["phase"]), sum("part-" in n for n in run.dir.manifest)


def speed(args):
    import ray
    from stasc.cluster import Ray, Sharded
    from stasc.loop import STaSC
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
    n, rows, cfg = args.n or 2560, [], settings(args.n or 2560, part_size=16)
    with tempfile.TemporaryDirectory() as tmp:
        run = STaSC(cfg, f"{tmp}/alone", data=questions(n), engine=engine(args.latency)(None), callbacks=[]).run()
        alone, parts = drawing(run)
        rows.append({"engines": "1, in the process itself", "parts": parts, "seconds": f"{alone:.1f}", "parts per second": f"{parts / alone:.2f}"})
        first = None
        for k in (1, 2, 4, 8):
            run = Sharded(cfg, f"{tmp}/{k}", data=questions(n), on=Ray(workers=k), engine=engine(args.latency), callbacks=[]).run()
            seconds, parts = drawing(run)
            first = first or seconds
            rows.append({"engines": str(k), "parts": parts, "seconds": f"{seconds:.1f}", "parts per second": f"{parts / seconds:.2f}", "times one engine": f"{first / seconds:.2f}",
                         "of linear": f"{first / seconds / k:.2f}", "times the process itself": f"{alone / seconds:.2f}"})
            print(rows[-1], file=sys.stderr, flush=True)
    rows[0] |= {k: "" for k in rows[-1] if k not in rows[0]}
    common.write("cluster_speed", "A run over several engines", rows, f"{n:,} training questions, parts of {cfg.part_size} questions, each {args.latency:g} s of a model's time; what is counted is the time of drawing, all phases of M_0 and M_1.", args.out, latency=args.latency, n=n)


def one(args):
    import ray
    from stasc.cluster import Ray, Sharded
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as tmp:
        run = Sharded(settings(args.n), f"{tmp}/run", data=questions(args.n), on=Ray(workers=2), engine=engine(0.), callbacks=[])
        before = held()
        run.run()
        print(json.dumps(dict(before=before, peak=common.peak_memory(), trajectories=int(run.metrics[["train_n", "test_n"]].sum().sum()), seconds=drawing(run)[0])))


def memory(args):
    rows = []
    for trajectories in (10_000, 100_000, 1_000_000):
        n = round(trajectories / 2 / (N_INIT * N_CORR + 1 / 20))               # M_0 and M_1; of each held-out question one
        r = json.loads(subprocess.run([sys.executable, __file__, "one", "--n", str(n)], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        rows.append({"trajectories": f"{r['trajectories']:,}", "questions": f"{n + n // 20:,}", "at the start, MB": f"{r['before'] / 1e6:.0f}", "at most, MB": f"{r['peak'] / 1e6:.0f}", "drawn in, s": f"{r['seconds']:.0f}"})
        print(rows[-1], file=sys.stderr, flush=True)
    common.write("cluster_memory", "The process that asks the engines", rows, "A scripted engine in each of two actors, without a model's time; resident memory of the process that holds the run, all phases of M_0 and M_1 with fine-tuning and measures.", args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("speed", "memory", "one"))
    parser.add_argument("--n", type=int, help="training questions of `speed` [2,560]")
    parser.add_argument("--latency", type=float, default=.5, help="seconds of a part")
    parser.add_argument("--out", help="folder of the tables [bench/results]")
    args = parser.parse_args()
    dict(speed=speed, memory=memory, one=one)[args.command](args)


if __name__ == "__main__":
    main()
