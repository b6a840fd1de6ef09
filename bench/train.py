"""Fine-tuning at a vocabulary of 151,936 against transformers' `Trainer` with `DataCollatorForSeq2Seq(padding="longest")` and full logits.

    python bench/train.py [--out FOLDER] [--repeats 5] [--hidden 256] [--layers 4] [--finetune lora]

A small Qwen2 with random weights, prompts of about 600 tokens, completions of about 60. Each measurement is a process of its own; the ways
alternate. Time is that of the whole fine-tuning (building the Trainer included, loading the model not); memory is how far the process's
peak resident set rises over what it was before the fine-tuning. Both start from the same weights and see the same batches, so their
losses can be compared.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

WAYS = {"Trainer, full logits": {}, "stasc": {}, "stasc, gradient checkpointing": dict(gradient_checkpointing="on")}


def make_model(folder, hidden, layers, vocabulary=151_936):
    "A Qwen2 with random weights and tied embeddings; the embedded model's tokenizer, of which only the pad token is used."
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from stasc.model import embedded_path
    torch.manual_seed(0)
    shape = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
                 num_key_value_heads=hidden // 64, max_position_embeddings=2048, tie_word_embeddings=True)
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path()).save_pretrained(folder)


def make_examples(n, prompt, completion, vocabulary=151_936, seed=0):
    "Random ids; lengths spread by a tenth around the means for prompts, by a third for completions."
    from stasc.train import Example
    rng = random.Random(seed)
    def ids(mean, spread): return tuple(rng.randrange(vocabulary) for _ in range(round(mean * rng.uniform(1 - spread, 1 + spread))))
    return [Example(ids(prompt, .1), ids(completion, .33)) for _ in range(n)]


def plain_trainer(lm, examples, cfg, seed):
    "What is usually written: transformers' Trainer, its own loss, full logits."
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer

    from stasc.train import training_arguments
    rows = [dict(input_ids=[*e.prompt_ids, *e.completion_ids], attention_mask=[1] * (len(e.prompt_ids) + len(e.completion_ids)),
                 labels=[-100] * len(e.prompt_ids) + [*e.completion_ids]) for e in examples]
    lm.tokenizer.padding_side = "right"
    with tempfile.TemporaryDirectory() as tmp:
        trainer = Trainer(model=lm.model, args=training_arguments(cfg, lm.device, lm.dtype, seed, tmp), train_dataset=rows,
                          data_collator=DataCollatorForSeq2Seq(lm.tokenizer, padding="longest"))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


def child(way, folder, given):
    "One measurement: seconds, rise of the peak, losses."
    from stasc.core import Config
    from stasc.model import LM
    from stasc.train import fine_tune
    cfg = Config(model=folder, device="cpu", finetune=given["finetune"], train_batch=given["batch"], learning_rate=1e-3, **WAYS[way])
    examples = make_examples(given["n"], given["prompt"], given["completion"])
    lm = LM(cfg)
    lm.start(None, seed=0)
    before, began = common.peak_memory(), time.perf_counter()
    if way.startswith("Trainer"): losses = plain_trainer(lm, examples, cfg, 0)
    else: losses = [(report := fine_tune(lm, examples, cfg, 0))["first_loss"], report["last_loss"]]
    seconds = time.perf_counter() - began
    tokens = sum(len(e.prompt_ids) + len(e.completion_ids) for e in examples)
    print(json.dumps(dict(way=way, seconds=seconds, peak=common.peak_memory() - before, before=before, tokens=tokens, losses=[losses[0], losses[-1]])))


def summary(rows):
    "Medians by way, and ratios to the first."
    ways = list(dict.fromkeys(r["way"] for r in rows))
    of = {w: [r for r in rows if r["way"] == w] for w in ways}
    med = {w: dict(tokens_per_s=statistics.median(r["tokens"] / r["seconds"] for r in of[w]), peak_gb=statistics.median(r["peak"] for r in of[w]) / 1e9,
                   losses=of[w][0]["losses"]) for w in ways}
    base = med[ways[0]]
    for w in ways:
        med[w] |= dict(faster=med[w]["tokens_per_s"] / base["tokens_per_s"], memory=med[w]["peak_gb"] / base["peak_gb"],
                       loss_apart=max(abs(a - b) for a, b in zip(med[w]["losses"], base["losses"])))
    return med


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("repeats", 5), ("hidden", 256), ("layers", 4), ("n", 8), ("batch", 4), ("prompt", 600), ("completion", 60)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--finetune", default="lora", choices=("lora", "full"))
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    p.add_argument("--out", help="folder of the table [bench/results]")
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = vars(p.parse_args())
    one, out, ways = given.pop("child"), given.pop("out"), given.pop("ways")
    if one: return child(*one, given)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, given["hidden"], given["layers"])
        for _ in range(given["repeats"]):
            for way in ways:
                argv = [sys.executable, __file__, "--child", way, folder, *(str(x) for k, v in given.items() for x in (f"--{k}", v))]
                done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error"))
                if done.returncode: sys.exit(done.stderr)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{way}: {rows[-1]['seconds']:.1f} s, {rows[-1]['peak'] / 1e9:.2f} GB", file=sys.stderr)
    table = [{"way": w, "tokens/s": f"{m['tokens_per_s']:,.0f}", "times as fast": f"{m['faster']:.2f}", "peak memory": f"{m['peak_gb']:.2f} GB", "share of the peak": f"{m['memory']:.2f}",
              "difference of the loss, first or last step": f"{m['loss_apart']:.1e}"} for w, m in summary(rows).items()]
    common.write("train", f"Fine-tuning at a vocabulary of 151,936 ({given['finetune']})", table, out=out, settings=given, runs=rows, notes=
                 f"{given['n']} examples of about {given['prompt']} + {given['completion']} tokens, batch {given['batch']}, hidden size {given['hidden']}, {given['layers']} layers, random weights; median of {given['repeats']}.")


if __name__ == "__main__":
    main()
