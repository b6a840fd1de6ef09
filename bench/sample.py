"""Sampling corrections against transformers' `generate`, in batches and one question at a time, and against vLLM.

    python bench/sample.py                              a small Qwen2 with random weights, on the CPU, a few minutes
    python bench/sample.py --vllm .venv-vllm/bin/python  against vLLM as well, which that Python has (`make test-vllm` sets it up)
    python bench/sample.py --shape qwen2.5-1.5b --device cuda --dtype bfloat16 --batch 256 --prompts 512 --limit 256
"""
import argparse
import os
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np

import common

SHAPES = {
    "12m": dict(vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2),
    "24m": dict(vocab_size=8192, hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2),
    "qwen2.5-0.5b": dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "qwen2.5-1.5b": dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
}


def random_model(shape, device, dtype, seed=0):
    "A Qwen2 with random weights whose next token is about as uncertain as a language model's."
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    with torch.device(device): model = Qwen2ForCausalLM(config).to(getattr(torch, dtype)).eval()
    with torch.no_grad(): model.lm_head.weight.normal_(0, 3 / config.hidden_size**0.5)
    return model


def engine(model, device, dtype, stop):
    "What `HFSampler` asks of a model."
    import contextlib
    return SimpleNamespace(base=model, model=model, device=device, dtype=dtype, stop_ids=stop, pad_id=0, use=lambda folder: None, autocast=contextlib.nullcontext,
                           tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens=True: " ".join(map(str, ids))))


def make_prompts(count, prefix, suffix, vocabulary, seed=0):
    "Random tokens: a common prefix and a rest of its own, of half to one and a half times the given length."
    rng = np.random.default_rng(seed)
    head = rng.integers(1, vocabulary, prefix).tolist()
    return [head + rng.integers(1, vocabulary, rng.integers(suffix * 2 // 3, suffix * 4 // 3 + 1)).tolist() for _ in range(count)]


def choose_stops(model, device, dtype, prompts, params, rate):
    "Tokens that share `rate` of what the model writes: texts that stop at any of them end by themselves."
    from stasc.sample import HFSampler
    texts = HFSampler(engine(model, device, dtype, [-1]), 256).sample(prompts, 8, params, [[8 * i + j for j in range(8)] for i in range(len(prompts))])
    share = np.bincount([t for row in texts for s in row for t in s.token_ids], minlength=model.config.vocab_size).astype(float)
    share /= share.sum()
    stops, total = [], 0.0
    for token in np.random.default_rng(0).permutation(np.flatnonzero((share > 0) & (share < rate / 8))):
        if total >= rate: break
        stops.append(int(token)); total += share[token]
    return sorted(stops)


def generate(model, prompts, n, stop, params, rows, device):
    "Tokens that `generate` draws, up to the end of each text; prompts are padded on the left."
    import torch
    lengths = []
    for a in range(0, len(prompts), rows):
        part = prompts[a:a + rows]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
        with torch.inference_mode():
            new = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=params.temperature, top_p=params.top_p, top_k=0,
                                 num_return_sequences=n, max_new_tokens=params.max_new_tokens, eos_token_id=stop, pad_token_id=stop[0])[:, width:]
        ends = torch.isin(new, torch.tensor(stop, device=device))
        lengths += torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1]).tolist()
    return lengths


def start_vllm(model, lm, rows, folder):
    "vLLM with the same model, as `sampler = 'vllm'` runs it, and the seconds it took to start."
    import torch
    from stasc.core import Config
    from stasc.sample_vllm import VLLMSampler
    model.save_pretrained(folder)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    sampler = VLLMSampler(SimpleNamespace(**vars(lm) | dict(cfg=Config(sampler="vllm", finetune="full"), source=folder, context_length=None)), rows)
    began = time.perf_counter()
    sampler.use(None)
    return sampler, time.perf_counter() - began


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="24m")
    p.add_argument("--device", default="cpu"); p.add_argument("--dtype", default="float32")
    p.add_argument("--prompts", type=int, default=64, help="prompts of one call of the sampler")
    p.add_argument("--prefix", type=int, default=450, help="tokens that all prompts begin with"); p.add_argument("--suffix", type=int, default=150, help="tokens of their own, on average")
    p.add_argument("-n", type=int, default=5, help="texts of each prompt"); p.add_argument("--limit", type=int, default=128, help="most new tokens")
    p.add_argument("--batch", type=int, default=256, help="most texts that the sampler decodes together")
    p.add_argument("--generate-batch", type=int, default=8, help="prompts of one call of generate")
    p.add_argument("--generate-prompts", type=int, default=8, help="prompts of a round of generate in batches"); p.add_argument("--single-prompts", type=int, default=3, help="prompts of a round of generate, one at a time")
    p.add_argument("--times", type=int, default=5); p.add_argument("--out"); p.add_argument("--seed", type=int, default=0)
    p.add_argument("--cpu-time", action="store_true", help="count processor time, on a machine that others use as well")
    p.add_argument("--vllm", metavar="PYTHON", default=os.environ.get("STASC_VLLM_PYTHON"), help="a Python that has vLLM; CPU alone (default: STASC_VLLM_PYTHON)")
    a = p.parse_args(argv)
    if a.vllm and (a.cpu_time or a.device != "cpu"): p.error("vLLM is a process of its own: it shares no GPU with this one, and --cpu-time does not see it; --vllm '' leaves it out")

    import torch
    from stasc.core import SamplingParams, derive_seed
    from stasc.sample import HFSampler
    params = SamplingParams(0.6, 0.9, 0, a.limit)
    model = random_model(a.shape, a.device, a.dtype, a.seed)
    prompts = make_prompts(a.prompts, a.prefix, a.suffix, model.config.vocab_size, a.seed)
    stop = choose_stops(model, a.device, a.dtype, prompts[:8], params, 1.6 / a.limit)
    lm, seeds, seen = engine(model, a.device, a.dtype, stop), [[derive_seed(a.seed, i, j) for j in range(a.n)] for i in range(a.prompts)], {}
    turn = {}
    if a.vllm:
        os.environ["STASC_VLLM_PYTHON"] = a.vllm
        with tempfile.TemporaryDirectory() as folder: vllm, start = start_vllm(model, lm, a.batch, folder)

    def some(name, count):      # other prompts in each round, which begin with another token, so that nothing cached in the last is of use
        k = turn[name] = turn.get(name, 0) + 1
        return [[k] + prompts[(k * count + i) % len(prompts)][1:] for i in range(count)]

    def drawn(name, sampler):
        return counted(name, [s.n_tokens for row in sampler.sample(some(name, a.prompts), a.n, params, seeds) for s in row])

    def counted(name, lengths):
        if a.device == "cuda": torch.cuda.synchronize()
        seen.setdefault(name, []).extend(lengths)
        return sum(lengths)

    torch.manual_seed(a.seed)
    runs = {
        "generate, one question at a time": lambda: counted("one", generate(model, some("one", a.single_prompts), a.n, stop, params, 1, a.device)),
        "generate, in batches": lambda: counted("many", generate(model, some("many", a.generate_prompts), a.n, stop, params, a.generate_batch, a.device)),
        "stasc": lambda: drawn("stasc", HFSampler(lm, a.batch)),
    }
    if a.vllm: runs |= {f"vLLM {vllm.child.about['vllm']}": lambda: drawn("vllm", vllm)}
    rates = common.alternate(runs, a.times, cpu_time=a.cpu_time)
    gains = common.ratios(rates, "stasc")
    rows = [{"sampler": name, "tokens/s (median)": f"{np.median(rates[name]):,.0f}", "stasc is faster by": f"{gains[name]:.1f}", "mean length": f"{np.mean(seen[k]):.0f}"}
            for name, k in zip(runs, seen)]
    size = sum(o.numel() for o in model.parameters()) / 1e6
    common.write(f"sample_{a.shape}", "Sampling corrections", rows, out=a.out, settings=vars(a), rates=rates, vllm_start_seconds=start if a.vllm else None, notes=
                 f"Qwen2 of {size:.1f} million parameters, random weights, {a.dtype}; {a.prompts} prompts of about {a.prefix + a.suffix} tokens that share {a.prefix}, n = {a.n}, at most {a.limit} new tokens, "
                 f"temperature 0.6, top-p 0.9; {a.generate_batch} prompts in a call of `generate` in batches; median of {a.times} alternating rounds{', processor time' if a.cpu_time else ''}."
                 + (f" vLLM, as `sampler = 'vllm'` runs it (eager, a seed for each text), took {start:.0f} s to start, which is not counted." if a.vllm else ""))


if __name__ == "__main__": main()
