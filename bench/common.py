"What the benchmarks share: paired runs, the machine, a table as JSON and Markdown."
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

here = Path(__file__).resolve().parent


def machine():
    "Processor, memory and versions."
    import torch
    import transformers
    cpu = next((l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    found = dict(date=date.today().isoformat(), cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(),
                 torch=torch.__version__, transformers=transformers.__version__, system=platform.system())
    if torch.cuda.is_available(): found |= dict(gpu=torch.cuda.get_device_name(), gpu_gb=round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1))
    return found


def peak_memory():
    "Most bytes that this process has held in memory."
    status = Path("/proc/self/status")
    if status.exists(): return 1024 * int(next(l for l in status.read_text().splitlines() if l.startswith("VmHWM")).split()[1])     # getrusage's figure is inherited from the process that started this one
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alternate(runs,             # name to a function without arguments; it returns how much it did (tokens, rows, ...)
              times=5,          # rounds; in each round every function runs once
              warm_up=True,     # one round that is not counted
              cpu_time=False):  # processor time, where others use the machine as well
    "Rates of each function, in rounds that alternate so that a slow minute of the machine meets all of them."
    rates = {name: [] for name in runs}
    clock = time.process_time if cpu_time else time.perf_counter
    for k in range(times + warm_up):
        for name, run in runs.items():
            start = clock()
            amount = run()
            rate = amount / (clock() - start)
            if k >= warm_up: rates[name].append(rate)
            print(f"  {'warm-up' if k < warm_up else f'round {k + 1 - warm_up}'}  {name:32s} {rate:12,.1f}/s", file=sys.stderr, flush=True)
    return rates


def ratios(rates, ours):
    "Median of the ratios within each round."
    return {name: statistics.median(a / b for a, b in zip(rates[ours], rates[name])) for name in rates}


def table(rows):
    "A list of dictionaries as a Markdown table."
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    return "\n".join(lines + ["| " + " | ".join(str(r[k]) for k in keys) + " |" for r in rows])


def write(name, title, rows, notes="", out=None, **settings):
    "Print the table and store it as NAME.json and NAME.md."
    folder = Path(out) if out else here / "results"
    folder.mkdir(parents=True, exist_ok=True)
    command = "python " + " ".join([f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    found = machine()
    text = f"# {title}\n\n{table(rows)}\n\n{notes}\n\n`{command}` on " + ", ".join(f"{k} {v}" for k, v in found.items()) + ".\n"
    (folder / f"{name}.json").write_text(json.dumps(dict(title=title, command=command, machine=found, settings=settings, rows=rows), indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
