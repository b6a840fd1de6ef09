"Sampling: one random stream per sample, whatever the batch, the order and the neighbours."
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasc.arithmetic import arithmetic_questions
from stasc.core import Config, SampleError, SamplingParams, derive_seed
from stasc.prompt import Prompter
from stasc.prefix import common_prefix, merge, part
from stasc.sample import HFSampler, _threshold, draw, uniforms
from stasc.train import Engine

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def prompts(embedded):
    embedded.use(None)
    prompter = Prompter(embedded.tokenizer, Config.demo())
    return [prompter.initial(q) for q in arithmetic_questions("dev", 110, seed=0)]


def seeds_of(n_prompts, n): return [[derive_seed(0, i, j) for j in range(n)] for i in range(n_prompts)]


def drawn(engine, batch, prompts, n, params, seeds=None):
    return HFSampler(engine.lm, batch).sample(prompts, n, params, seeds or seeds_of(len(prompts), n))


def agreement(a, b):
    pairs = [(x, y) for p, q in zip(a, b) for x, y in zip(p, q)]
    return sum(x.token_ids == y.token_ids for x, y in pairs) / len(pairs), len(pairs)


# --- the batch

def test_batch_of_1_and_of_64_give_the_same_texts(embedded, prompts, record_property):
    "2,000 samples; what may differ are near ties, as sums in float32 depend on the shape of the batch."
    params, n = SamplingParams(1.5, 1.0, 0, 8), 20
    one, many = (drawn(embedded, batch, prompts[:100], n, params) for batch in (1, 64))
    share, count = agreement(one, many)
    assert sum(len({s.text for s in row}) for row in one) > 500       # the texts do differ from each other
    record_property("agreeing_share", share)
    print(f"\nbatch 1 against 64: {share:.5f} of {count} samples agree")
    assert count >= 2000 and share >= 0.999


def test_long_texts_and_other_batches_agree_too(embedded, prompts):
    params = SamplingParams(0.7, 1.0, 0, 48)
    whole = drawn(embedded, 512, prompts[:40], 4, params)
    for batch in (7, 64): assert agreement(whole, drawn(embedded, batch, prompts[:40], 4, params))[0] >= 0.99
    assert {s.finish_reason for row in whole for s in row} == {"stop"} and all(s.token_ids[-1] in embedded.lm.stop_ids for row in whole for s in row)


def test_nucleus_and_top_k_agree_across_batches(families):
    engine = Engine(Config(model=str(families["qwen2"]), device="cpu"))
    prompts = [engine.tokenizer("word " * k)["input_ids"] for k in (1, 5, 2, 9)]
    for params in (SamplingParams(1.0, 0.9, 0, 6), SamplingParams(1.0, 1.0, 5, 6), SamplingParams(1.5, 0.5, 7, 6)):
        assert agreement(drawn(engine, 64, prompts, 8, params), drawn(engine, 3, prompts, 8, params))[0] >= 0.96


def test_order_of_prompts_does_not_matter(embedded, prompts):
    params, seeds, order = SamplingParams(0.7, 1.0, 0, 20), seeds_of(30, 3), list(range(30))
    random.Random(0).shuffle(order)
    a = drawn(embedded, 16, prompts[:30], 3, params, seeds)
    b = drawn(embedded, 16, [prompts[i] for i in order], 3, params, [seeds[i] for i in order])
    assert agreement([a[i] for i in order], b)[0] >= 0.98


def test_more_samples_than_fit_a_batch(embedded, prompts):
    params = SamplingParams(0.7, 1.0, 0, 10)
    a, b = drawn(embedded, 4, prompts[:3], 11, params), drawn(embedded, 64, prompts[:3], 11, params)
    assert [len(row) for row in a] == [11] * 3 and a[0][0].seed == seeds_of(3, 11)[0][0]
    assert [[s.seed for s in row] for row in a] == seeds_of(3, 11)
    assert agreement(a, b)[0] >= 0.96


def test_a_sample_does_not_depend_on_how_many_others_there_are(embedded, prompts):
    params = SamplingParams(0.7, 1.0, 0, 20)
    many = drawn(embedded, 64, prompts[:10], 6, params)
    few = drawn(embedded, 64, prompts[:10], 2, params, [row[:2] for row in seeds_of(10, 6)])
    assert agreement([row[:2] for row in many], few)[0] == 1


def test_same_seed_same_text_other_seed_other_text(embedded, prompts):
    params = SamplingParams(1.0, 1.0, 0, 40)
    rows = drawn(embedded, 64, prompts[:10], 4, params, [[derive_seed(x) for x in (1, 1, 2, 3)]] * 10)
    assert all(r[0] == r[1] for r in rows) and len({s.token_ids for r in rows for s in r}) > 15


def test_global_random_state_neither_matters_nor_changes(embedded, prompts):
    params = SamplingParams(0.7, 1.0, 0, 8)
    torch.manual_seed(1); np.random.seed(1)
    a, state = drawn(embedded, 8, prompts[:4], 2, params), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert drawn(embedded, 8, prompts[:4], 2, params) == a


# --- nothing is read twice, and no more rows at once than allowed

def long_prompts(count, prefix=50, seed=0):
    rng = np.random.default_rng(seed)
    head = rng.integers(10, 300, prefix).tolist()
    return [head + rng.integers(10, 300, rng.integers(1, 30)).tolist() for _ in range(count)]


def tokens_read(engine, monkeypatch):
    "How many tokens each forward pass is given."
    read, forward = [], engine.lm.model.forward
    monkeypatch.setattr(engine.lm.model, "forward", lambda *a, **kw: (read.append(kw["input_ids"].numel()), forward(*a, **kw))[1])
    return read


@pytest.mark.parametrize("batch", [3, 16, 64])
def test_prefix_and_equal_prompts_are_read_once_and_ended_rows_leave(embedded, monkeypatch, batch):
    params, different = SamplingParams(1.0, 1.0, 0, 25), long_prompts(12)
    given, seeds = different + different[:5], seeds_of(17, 3)
    expected = drawn(embedded, 64, given, 3, params, seeds)
    read = tokens_read(embedded, monkeypatch)
    rows = drawn(embedded, batch, given, 3, params, seeds)
    assert agreement(rows, expected)[0] >= 0.98
    p = common_prefix(given)
    times = np.unique([given.index(g) for g in given], return_counts=True)[1] * 3     # texts of each different prompt
    prompts_read = sum((len(d) - p) * -(-t // batch) for d, t in zip(different, times))
    assert sum(read) == p + prompts_read + sum(s.n_tokens - 1 for row in rows for s in row)
    assert len({s.n_tokens for row in rows for s in row}) > 3


@pytest.mark.parametrize("shared", [True, False])
def test_never_more_rows_than_the_batch_or_the_memory_allows(embedded, monkeypatch, shared):
    import stasc.sample
    seen = []
    monkeypatch.setattr(stasc.sample, "draw", lambda logits, *a: (seen.append(len(logits)), draw(logits, *a))[1])
    given, params, seeds = long_prompts(9), SamplingParams(1.0, 1.0, 0, 12), seeds_of(9, 4)
    wide = HFSampler(embedded.lm, 16, shared=shared).sample(given, 4, params, seeds)
    assert max(seen) == 16
    seen.clear()
    tight = HFSampler(embedded.lm, 16, memory=400_000, shared=shared).sample(given, 4, params, seeds)
    assert 1 <= max(seen) < 10 and agreement(wide, tight)[0] >= 0.97
    seen.clear()
    HFSampler(embedded.lm, 16, memory=1, shared=shared).sample(given[:2], 2, params, seeds)
    assert set(seen) == {1}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")])
def test_out_of_memory_halves_the_batch_and_the_texts_stay(embedded, monkeypatch, shared, error):
    import stasc.sample
    given, params, seeds, calls = long_prompts(9), SamplingParams(1.0, 1.0, 0, 12), seeds_of(9, 4), []
    expected = HFSampler(embedded.lm, 16, shared=shared).sample(given, 4, params, seeds)

    def fails(logits, *a):
        calls.append(len(logits))
        if len(calls) > 3 and len(logits) > 5: raise error
        return draw(logits, *a)
    monkeypatch.setattr(stasc.sample, "draw", fails)
    sampler = HFSampler(embedded.lm, 16, shared=shared)
    assert agreement(sampler.sample(given, 4, params, seeds), expected)[0] >= 0.97
    assert sampler.batch == 4 and max(calls) == 16 and embedded.lm.base.config._attn_implementation == "sdpa"


def test_a_single_text_that_does_not_fit_and_other_errors_end_it(embedded, monkeypatch):
    import stasc.sample

    def fails(error):
        def f(*a): raise error
        monkeypatch.setattr(stasc.sample, "draw", f)
    fails(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(SampleError, match="single text"): drawn(embedded, 8, long_prompts(2), 1, SamplingParams())
    fails(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="do not fit"): drawn(embedded, 8, long_prompts(2), 1, SamplingParams())


# --- attention in parts

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 30.0]))
def test_attention_in_parts_is_attention(lengths, queries, seed, scale):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, n, 8, generator=g) for n in (queries, sum(lengths), sum(lengths)))
    q = q * scale
    whole = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
    parts = [part(q, a, b) for a, b in zip(k.split(lengths, 1), v.split(lengths, 1))]
    assert torch.allclose(merge(parts), whole, atol=1e-5)


def test_hidden_tokens_do_not_count():
    q, k, v = (torch.randn(2, n, 4) for n in (3, 7, 7))
    bias = torch.tensor([[0., 0, 0, 0, -torch.inf, -torch.inf, -torch.inf]])
    (a, lse), (b, short) = part(q, k, v, bias), part(q, k[:, :4], v[:, :4])
    assert torch.allclose(a, b, atol=1e-6) and torch.allclose(lse, short, atol=1e-6)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
def test_common_prefix_by_hand(prompts):
    n = 0
    while n < min(map(len, prompts)) - 1 and len({p[n] for p in prompts}) == 1: n += 1
    assert common_prefix(prompts) == n


# --- ends

def test_one_new_token(embedded, prompts):
    rows = drawn(embedded, 8, prompts[:4], 2, SamplingParams(0.7, 1.0, 0, 1))
    assert all(s.n_tokens == 1 and s.finish_reason == "length" for row in rows for s in row)


@pytest.mark.parametrize("t", range(3))
def test_text_ends_at_any_stop_token_and_keeps_it(embedded, prompts, monkeypatch, t):
    params = SamplingParams(0, max_new_tokens=10)
    free = drawn(embedded, 8, prompts[:6], 1, params)
    token = free[0][0].token_ids[t]
    monkeypatch.setattr(type(embedded.lm), "stop_ids", property(lambda self: [token, 1]))
    for row, cut in zip(free, drawn(embedded, 8, prompts[:6], 1, params)):
        ids = row[0].token_ids
        ends = next((i + 1 for i, x in enumerate(ids) if x in (token, 1)), None)
        assert cut[0].token_ids == ids[:ends] and cut[0].finish_reason == ("stop" if ends else "length")


def test_stop_at_the_very_last_token_counts_as_stop(embedded, prompts):
    whole = drawn(embedded, 8, prompts[:1], 1, SamplingParams(0, max_new_tokens=64))[0][0]
    assert whole.finish_reason == "stop"
    for cut, reason in ((whole.n_tokens, "stop"), (whole.n_tokens - 1, "length")):
        s = drawn(embedded, 8, prompts[:1], 1, SamplingParams(0, max_new_tokens=cut))[0][0]
        assert (s.finish_reason, s.token_ids) == (reason, whole.token_ids[:cut])


def test_stop_ids_are_the_model_s_and_the_tokenizer_s(families):
    for family, ends in (("qwen2", {"<|im_end|>", "<|endoftext|>"}), ("phi3", {"<|endoftext|>", "<|end|>"})):
        engine = Engine(Config(model=str(families[family]), device="cpu"))
        assert set(engine.tokenizer.convert_ids_to_tokens(engine.lm.stop_ids)) == ends


def test_text_and_log_probability_are_those_of_the_ids(embedded, prompts):
    for prompt, row in zip(prompts, drawn(embedded, 64, prompts[:6], 2, SamplingParams(0.7, 0.8, 0, 30))):
        for s in row:
            assert s.text == embedded.tokenizer.decode(s.token_ids, skip_special_tokens=True)
            with torch.no_grad(): logp = torch.log_softmax(embedded.lm.model(torch.tensor([[*prompt, *s.token_ids]])).logits[0].float(), -1)
            of = [logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(s.token_ids)]
            assert s.logprob == pytest.approx(math.fsum(of) / len(of), abs=1e-4)


def test_no_prompts_give_no_samples(embedded):
    assert drawn(embedded, 8, [], 2, SamplingParams()) == []


def test_logits_that_are_no_numbers_are_an_error(embedded, prompts, monkeypatch):
    import stasc.sample
    monkeypatch.setattr(stasc.sample, "draw", lambda logits, params, u: draw(logits * float("nan"), params, u))
    with pytest.raises(SampleError, match="not numbers"): drawn(embedded, 8, prompts[:2], 1, SamplingParams())


# --- one draw

def splitmix(seed, t):
    m = 2**64 - 1
    z = (seed + (t + 1) * 0x9E3779B97F4A7C15) & m
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & m
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & m
    return ((z ^ z >> 31) >> 11) * 2.0**-53


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.integers(0, 100_000))
def test_uniforms_are_splitmix64(seeds, t):
    u = uniforms(np.array(seeds, dtype=np.uint64), t)
    assert u.tolist() == [splitmix(s, t) for s in seeds] and (0 <= u).all() and (u < 1).all()


def test_uniforms_are_even_and_streams_are_independent():
    seeds = np.array([derive_seed(0, i) for i in range(4000)], dtype=np.uint64)
    u = np.stack([uniforms(seeds, t) for t in range(10)])
    assert abs(u.mean() - 0.5) < 0.005 and np.histogram(u, 10, (0, 1))[0].std() < 0.05 * u.size / 10
    assert np.abs(np.corrcoef(u) - np.eye(10)).max() < 0.07


def kept_by_hand(p, top_k, top_p):
    "Ids that may be drawn: the k likeliest, of these the smallest set with probability top_p."
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k or len(p)]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        kept.append(i); mass += p[i]
        if mass >= top_p * total: break
    return set(kept)


@settings(max_examples=100, deadline=None)
@given(st.permutations([2.0**-i for i in range(1, 9)]), st.integers(0, 9), st.sampled_from([0.3, 0.6, 0.8, 0.95, 1.0]))
def test_only_the_nucleus_is_drawn(p, top_k, top_p):
    logits = torch.tensor([p]).log().repeat(200, 1)
    ids, _ = draw(logits, SamplingParams(1.0, top_p, top_k, 1), (np.arange(200) + 0.5) / 200)
    may = kept_by_hand(p, top_k, top_p)
    assert set(ids.tolist()) <= may and max(may, key=lambda i: p[i]) in ids


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([3, 40, 3000]), st.sampled_from([0.0, 0.01, 0.5, 3.0]), st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6]))
def test_bisection_finds_the_nucleus(seed, vocabulary, spread, top_p):
    p = torch.softmax(torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread, -1)
    least, exact = _threshold(p, top_p, block=2 * vocabulary), p.double()
    slack = 1e-6
    for row, l in zip(exact, least.double()[:, 0]):
        assert row[row >= l].sum() >= top_p - slack             # enough stays,
        assert row[row > row[row >= l].min()].sum() < top_p + slack     # and without the least likely of it there is too little


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_k,top_p", [(0, 0.9), (0, 0.3), (50, 1.0), (50, 0.8), (2999, 0.9)])
def test_a_large_vocabulary_is_drawn_from_as_a_sorted_one(spread, top_k, top_p):
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1)) * spread
    u = (np.arange(4000) + 0.5) / 4000
    p = torch.softmax(logits[0], -1)
    may = sorted(kept_by_hand(p.double().tolist(), top_k, top_p))
    total = p[may].double().cumsum(-1)
    expected = torch.tensor(may)[torch.searchsorted(total, torch.tensor(u) * total[-1], right=True)]
    ids, _ = draw(logits.expand(4000, -1), SamplingParams(1.0, top_p, top_k, 1), u)
    assert (ids != expected).float().mean() < 0.01              # one token more or less in the nucleus moves every boundary a little


def test_frequencies_are_the_probabilities_at_the_temperature():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    u = (np.arange(20_000) + 0.5) / 20_000
    for temperature in (0.5, 1.0, 2.0):
        ids, logp = draw(logits.repeat(len(u), 1), SamplingParams(temperature, 1.0, 0, 1), u)
        share = torch.bincount(ids, minlength=4) / len(u)
        assert torch.allclose(share, torch.softmax(logits[0] / temperature, -1), atol=1e-3)
        assert torch.allclose(logp, torch.log_softmax(logits[0], -1)[ids])


@pytest.mark.parametrize("temperature", [0, 1e-3, 1e-20, 1e-38, 1e-45, 1e-300])
def test_low_temperature_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[0.3, 0.1, 0.9, 0.2]])
    assert draw(logits, SamplingParams(temperature, 1.0, 0, 1), np.array([0.999]))[0].tolist() == [2]


def test_extreme_uniforms_draw_a_token_with_probability():
    logits = torch.tensor([[-1e30, 0.0, 1.0, -1e30]])
    for u, expected in ((0.0, 1), (1 - 2.0**-53, 2)):
        assert draw(logits, SamplingParams(1.0, 1.0, 0, 1), np.array([u]))[0].tolist() == [expected]
