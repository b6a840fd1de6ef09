"""How close the memory that `stasc.plan` says comes to the memory that a process takes, for small models on a CPU.

    python bench/plan.py [--out FOLDER] [--repeats 3]

Each measurement is a process of its own: a short training loads what libraries load, then the rise of the peak resident set over what the
process holds is compared with gradients, optimiser, activations and logits as planned in float32. glibc is told to give freed blocks back:
left to itself it keeps so many holes between them that the process takes up to twice what is in use. No GPU is measured.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from train import make_examples, make_model

# hidden, layers, vocabulary, fine-tuning, rows, prompt, completion, checkpointing
SETTINGS = [(256, 4, 151_936, "lora", 4, 600, 60, False), (256, 12, 2_000, "lora", 4, 600, 60, False), (256, 12, 2_000, "lora", 4, 600, 60, True),
            (512, 6, 2_000, "full", 2, 400, 60, False), (128, 2, 151_936, "lora", 8, 100, 100, False)]


def resident():
    "Bytes in memory now (Linux)."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(setting, folder):
    "Rise of the peak, and what was said."
    from stasc.core import Config
    from stasc.model import LM
    from stasc.plan import shape_of, training_bytes
    from stasc.train import fine_tune
    hidden, layers, vocabulary, finetune, rows, prompt, completion, checkpointing = setting
    cfg = Config(model=folder, device="cpu", finetune=finetune, train_batch=rows, epochs=2)       # the second step finds the optimiser in memory
    lm = LM(cfg)
    lm.start(None, seed=0)
    fine_tune(lm, make_examples(1, 4, 4, vocabulary), cfg, 0, checkpointing)
    lm.start(None, seed=0)
    before, first = resident(), common.peak_memory()
    examples = [e for e in make_examples(8 * rows, prompt, completion, vocabulary) if len(e.prompt_ids) <= prompt and len(e.completion_ids) <= completion][:rows]
    length, learned = max(len(e.prompt_ids) + len(e.completion_ids) for e in examples), max(len(e.completion_ids) for e in examples)
    fine_tune(lm, examples, cfg, 0, checkpointing)
    parts = training_bytes(shape_of(folder), finetune, cfg.lora_r, rows, length - learned, learned, half=False, checkpointing=checkpointing)
    said = sum(v for k, v in parts.items() if k in ("gradients", "optimiser", "activations", "logits"))
    print(json.dumps(dict(setting=setting, rose=common.peak_memory() - before, said=said, parts=parts, reached=common.peak_memory() > first)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out", help="folder of the table [bench/results]")
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = p.parse_args()
    if given.child: return child(json.loads(given.child[0]), given.child[1])
    rows = []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, setting[0], setting[1], setting[2])
            for _ in range(given.repeats):
                done = subprocess.run([sys.executable, __file__, "--child", json.dumps(setting), folder], capture_output=True, text=True,
                                      env=os.environ | dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536"))
                if done.returncode: sys.exit(done.stderr)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = []
    for setting in SETTINGS:
        of = [r for r in rows if tuple(r["setting"]) == setting]
        said, rose = of[0]["said"], statistics.median(r["rose"] for r in of)
        h, layers, v, f, b, prompt, completion, c = setting
        table.append({"hidden": h, "layers": layers, "vocabulary": f"{v:,}", "fine-tuning": f, "rows": b, "tokens in a row": f"{prompt} + {completion}", "checkpointing": "on" if c else "off",
                      "said": f"{said / 1e6:,.0f} MB", "rose by": f"{rose / 1e6:,.0f} MB", "said / rose": f"{said / rose:.2f}"})
    common.write("plan", "Peak memory of a fine-tuning in float32 on a CPU, said and measured", table, f"Median of {given.repeats}.", given.out, runs=rows)


if __name__ == "__main__":
    main()
