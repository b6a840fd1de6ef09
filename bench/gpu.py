"""Sampling, fine-tuning and a whole iteration at true shapes with random weights, against `generate` and the plain Trainer and against what the card could do.

    python bench/gpu.py                                                     Qwen2.5-1.5B and Phi-3-mini on the GPU, about 20 minutes
    python bench/gpu.py --shapes tiny --device cpu --prompts 8 --limit 32   the same on a processor, to see that it runs

The floor is reckoned as `stasc plan` reckons time, with nothing lost: every matrix product at the rate of a large one, every byte of weights and
cache at the rate of a large copy, both measured here first; a prefix that prompts share costs nothing. The projection is the paper's run: 500 + 500 questions, five initial answers with
five corrections each, ten iterations.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import sample
import train

SHAPES = {
    "qwen2.5-1.5b": ("qwen2", dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)),
    "phi-3-mini": ("phi3", dict(vocab_size=32_064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False)),
    "tiny": ("qwen2", dict(vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)),
}


def make_folder(folder, name, dtype):
    "A model with random weights whose next token is about as uncertain as a language model's, and the embedded model's tokenizer."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CONFIG_MAPPING
    from stasc.model import embedded_path
    kind, shape = SHAPES[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**shape, max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad(): model.get_output_embeddings().weight.normal_(0, 3 / config.hidden_size**0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path()).save_pretrained(folder)


def rates_of(device, dtype, gpu):
    "The card as `stasc.plan` describes one, its rates measured: the best of five large matrix products and copies."
    import torch
    from stasc.plan import GPU
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def best(f):
        times = []
        for _ in range(6): wait(); start = time.perf_counter(); f(); wait(); times.append(time.perf_counter() - start)
        return min(times[1:])
    matrix = 2 * n**3 / best(lambda: a @ b)
    big = torch.empty((2**30 if device == "cuda" else 2**26) // 4, device=device)
    bandwidth = 2 * big.nbytes / best(big.clone)
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if device == "cuda" else 0
    return GPU(gpu, memory, torch.cuda.get_device_capability() if device == "cuda" else (8, 0), matrix / 1e12, bandwidth / 1e9)


class Clock:
    "Seconds and peak memory of a block."
    def __init__(self, device): self.device = device
    def __enter__(self):
        import torch
        if self.device == "cuda": torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        return self
    def __exit__(self, *_):
        import torch
        if self.device == "cuda": torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.peak = torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else None


def measure(name, a, card):
    "Rows of the table for one shape, and seconds of the paper's run."
    import torch
    from stasc.core import Config, SamplingParams, derive_seed
    from stasc.prefix import common_prefix
    from stasc.plan import Assumed, _sampling_seconds, _training_seconds, choose, shape_of, texts_of
    from stasc.train import Engine
    params, ideal = SamplingParams(0.6, 0.9, 0, a.limit), Assumed(matrix=1, bandwidth=1, layer_ms=0)
    with tempfile.TemporaryDirectory() as tmp:
        folder, out = Path(tmp) / "model", Path(tmp) / "adapter"
        make_folder(folder, name, a.dtype)
        out.mkdir()
        cfg = Config(model=str(folder), device=a.device, dtype=a.dtype, finetune="lora", sample_batch=a.batch, max_new_tokens=a.limit, train_batch=a.train_batch, grad_accumulation=1)
        engine = Engine(cfg)
        lm, shape, vocabulary = engine.lm, shape_of(str(folder)), engine.lm.base.config.vocab_size
        first = sample.make_prompts(a.prompts, 60, 40, vocabulary, 1)
        second = sample.make_prompts(a.prompts * a.n, 450, 150, vocabulary, 2)
        stop = sample.choose_stops(lm.base, a.device, a.dtype, second[:8], params, 1.6 / a.limit)
        lm.base.generation_config.eos_token_id = stop
        lm.base.generation_config.pad_token_id = stop[0]
        choice = choose(shape, card, "lora", cfg, 600)
        rows, scale, whole = [], texts_of(Config.paper(model=name, n_init=5)), 0.

        def floor(phase, prompts, drawn, length, new):
            return _sampling_seconds(shape, card, "lora", choice, {phase: (prompts, drawn, 1)}, ideal, length, length, new)

        def peak(gigabytes): return "" if gigabytes is None else f"{gigabytes:.1f}"

        def line(what, clock, tokens, baseline, floor_seconds, baseline_peak):
            rate = tokens / clock.seconds
            rows.append({"shape": name, "phase": what, "tokens/s": f"{rate:,.0f}", "baseline, tokens/s": f"{baseline:,.0f}", "times as fast": f"{rate / baseline:.1f}",
                         "share of the floor": f"{floor_seconds / clock.seconds:.0%}", "peak, GB": peak(clock.peak), "baseline's peak, GB": peak(baseline_peak)})
            print(rows[-1], file=sys.stderr, flush=True)
            return clock.seconds

        engine.sample(second[:4], 2, SamplingParams(0.6, 0.9, 0, 4), [[1, 2]] * 4)                   # kernels are chosen and compiled
        drawn = {}
        for phase, prompts in (("initial answers", first), ("corrections", second)):
            seeds = [[derive_seed(0, phase, i, j) for j in range(a.n)] for i in range(len(prompts))]
            with Clock(a.device) as clock: drawn[phase] = engine.sample(prompts, a.n, params, seeds)
            lengths, some = [s.n_tokens for r in drawn[phase] for s in r], prompts[:a.generate_batch]
            with Clock(a.device) as other: written = sum(sample.generate(lm.model, some, a.n, stop, params, len(some), a.device))
            mean = statistics.mean(lengths)
            seconds = line(phase, clock, sum(lengths), written / other.seconds, floor("corr", len(prompts), len(lengths), statistics.mean(map(len, prompts)) - common_prefix(prompts), mean), other.peak)
            kinds = ("initial.train", "initial.test") if phase == "initial answers" else ("corrections.train", "corrections.test")
            whole += sum(scale[k][1] * scale[k][2] for k in kinds) * seconds / len(lengths)

        examples = train.make_examples(a.examples, 600, max(8, round(a.limit / 2)), vocabulary)
        tokens = sum(len(e.prompt_ids) + len(e.completion_ids) for e in examples)
        lm.start(None, 0)
        few = examples[:max(a.train_batch, len(examples) // 8)]
        try:
            with Clock(a.device) as other: train.plain_trainer(lm, few, cfg, 0)
            baseline = sum(len(e.prompt_ids) + len(e.completion_ids) for e in few) / other.seconds
        except torch.OutOfMemoryError: baseline = float("nan")                                      # the row says so
        engine.train(few, None, out, cfg, 0)                                                        # warm-up
        for f in out.iterdir(): f.unlink()
        with Clock(a.device) as clock: engine.train(examples, None, out, cfg, 0)
        seconds = line("fine-tuning (LoRA)", clock, tokens, baseline, _training_seconds(shape, card, "lora", choice, len(examples), ideal, 600, a.limit / 2), other.peak)
        kept = 10 * .1 * scale["corrections.train"][1]
        whole += kept * seconds / len(examples)
    return rows, whole


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2.5-1.5b", "phi-3-mini"])
    p.add_argument("--device", default="cuda"); p.add_argument("--dtype", help="[bfloat16 on a GPU, else float32]")
    p.add_argument("--prompts", type=int, default=100, help="questions; each has n initial answers, each of them n corrections"); p.add_argument("-n", type=int, default=5)
    p.add_argument("--limit", type=int, default=256, help="most new tokens; texts end at about half of it"); p.add_argument("--batch", type=int, default=512)
    p.add_argument("--generate-batch", type=int, default=16, help="prompts of a call of generate"); p.add_argument("--examples", type=int, default=256)
    p.add_argument("--train-batch", type=int, default=8); p.add_argument("--out")
    a = p.parse_args(argv)
    a.dtype = a.dtype or ("bfloat16" if a.device == "cuda" else "float32")
    import torch
    if a.device == "cuda" and not torch.cuda.is_available(): sys.exit("bench/gpu.py: no CUDA device is there; with --device cpu and --shapes tiny it runs on a processor")
    card = rates_of(a.device, a.dtype, torch.cuda.get_device_name() if a.device == "cuda" else "CPU")
    rows, runs = [], {}
    for name in a.shapes:
        new, runs[name] = measure(name, a, card)
        rows += new
    hours = "; ".join(f"{name} {seconds / 3600:.1f} hours" for name, seconds in runs.items())
    common.write("gpu", "True shapes", rows, out=a.out, settings=vars(a), notes=
                 f"Random weights, {a.dtype}, LoRA r=16. {a.prompts} questions, n = {a.n}, texts of at most {a.limit} tokens that end by themselves; corrections' prompts have about 600 tokens and share 450. "
                 f"Baselines: `generate` with {a.generate_batch} prompts a call and `num_return_sequences={a.n}`; the Trainer with full logits. Measured rates: {card.matrix:.3g} Tflop/s, {card.bandwidth:,.0f} GB/s. "
                 f"The paper's run of ten iterations (5 x 5 texts of 500 questions, 500 held out; a tenth of the corrections kept), projected from these figures: {hours}.")


if __name__ == "__main__": main()
