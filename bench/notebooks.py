"""How long each notebook runs, in a process of its own and as `nbdev_test` runs it: without the cells marked slow, gpu or notest.

    python bench/notebooks.py [NAME...]     # e.g. 09_loop tutorials/quickstart; all without one
"""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import time

import common

root = common.here.parent
RUN = """
import sys; from pathlib import Path; from nbdev.config import get_config; from nbdev.test import test_nb
sys.exit(not test_nb(Path(sys.argv[1]).absolute(), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)[0])"""


def measured(path):
    "A notebook run once: wall clock, processor time and most memory of its process."
    env = os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MPLBACKEND="agg", PYTHONPATH=str(root))
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", RUN, str(path)], cwd=root, env=env, stdout=subprocess.DEVNULL)
    try: _, status, used = os.wait4(process.pid, 0)
    except BaseException: process.kill(); raise
    seconds = time.perf_counter() - start
    head, *_ = every = json.loads(path.read_text(encoding="utf-8"))["cells"]
    cells = [o for o in every if o["cell_type"] == "code"]
    kept = len(cells) if "skip_exec: true" in "".join(head["source"]) else sum("".join(o["source"]).startswith(("#| slow", "#| gpu", "#| notest")) for o in cells)
    return {"page": path.relative_to(root / "nbs").with_suffix("").as_posix(), "seconds": f"{seconds:.1f}" if not status else "fails", "processor seconds": f"{used.ru_utime + used.ru_stime:.1f}",
            "memory, GB": f"{used.ru_maxrss / 2**20:.2f}", "code cells": len(cells), "slow cells, not run": kept}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks under nbs/ [all]")
    parser.add_argument("--out", help="folder of the table [bench/results]")
    args = parser.parse_args()
    paths = [root / f"nbs/{o}.ipynb" for o in args.names] or [o for o in sorted((root / "nbs").rglob("*.ipynb")) if not any(p.startswith((".", "_")) for p in o.relative_to(root).parts)]
    rows, load = [], []
    with contextlib.suppress(KeyboardInterrupt):        # what was measured until then is written
        for path in paths:
            rows.append(measured(path))
            load.append(os.getloadavg()[0])
            print(rows[-1], file=sys.stderr, flush=True)
    ran = [o for o in rows if o["seconds"] != "fails"]
    total = {"page": f"all {len(ran)}" if len(ran) == len(paths) else f"{len(ran)} of {len(paths)}", "code cells": sum(o["code cells"] for o in ran), "slow cells, not run": sum(o["slow cells, not run"] for o in ran), "memory, GB": max(o["memory, GB"] for o in ran)}
    total |= {k: f"{sum(float(o[k]) for o in ran):.0f}" for k in ("seconds", "processor seconds")}
    busy = sum(load) / len(load)
    notes = (f"One process for each notebook, one after the other, each with what it loads; {busy:.1f} processes wanted the {os.cpu_count()} cores on average"
             + (", so the machine was busy with other work and the seconds are too many: processor seconds tell more." if busy > 1.5 else "."))
    common.write("notebooks", "How long each notebook runs", [*sorted(rows, key=lambda o: -float(o["processor seconds"])), total], notes, args.out)


if __name__ == "__main__":
    main()
