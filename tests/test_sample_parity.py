"Greedy texts are those of `generate`, token for token, whichever way the sampler takes."
import numpy as np
import pytest
from conftest import family_tokenizer

from stasc.core import Config, SamplingParams
from stasc.model import LM
from stasc.prefix import look
from stasc.sample import HFSampler

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

SMALL = dict(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             initializer_range=0.3, bos_token_id=None, pad_token_id=0)
GEMMA = SMALL | dict(head_dim=16, tie_word_embeddings=False)       # tied and random, it repeats its last token
KINDS = {                   # family: class, its configuration, is the shared way taken
    "qwen2": ("Qwen2", SMALL, True),
    "llama": ("Llama", SMALL, True),
    "phi3": ("Phi3", SMALL | dict(sliding_window=400), True),
    "phi3 with a short window": ("Phi3", SMALL | dict(sliding_window=32), False),
    "mistral": ("Mistral", SMALL | dict(sliding_window=48), False),
    "gemma": ("Gemma", GEMMA, True),
    "gemma 2, capped scores": ("Gemma2", GEMMA | dict(sliding_window=32, query_pre_attn_scalar=16), False),
    "gemma 3": ("Gemma3", GEMMA | dict(sliding_window=400, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]), True),
    "gemma 3 with a short window": ("Gemma3", GEMMA | dict(sliding_window=32, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]), False),
    "qwen3": ("Qwen3", SMALL | dict(head_dim=16), True),
    "gpt-neox": ("GPTNeoX", SMALL | dict(rotary_pct=0.25, tie_word_embeddings=False), True),
    "gpt-oss, attention sinks": ("GptOss", SMALL | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=400), False),
}
STOP = list(range(100, 350))
NEW = 12


def folder_of(tmp, kind):
    name, config, _ = KINDS[kind]
    plain = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, plain)(**config, eos_token_id=STOP[0]))
        for n, p in model.named_parameters():
            if n.endswith("sinks"): torch.nn.init.normal_(p)
    model.generation_config.eos_token_id = STOP
    model.save_pretrained(tmp)
    family_tokenizer("qwen2").save_pretrained(tmp)
    return tmp


@pytest.fixture(scope="module")
def lm_of(tmp_path_factory):
    made = {}

    def lm(kind, finetune="lora"):
        if (kind, finetune) not in made:
            made[kind, finetune] = LM(Config(model=str(folder_of(tmp_path_factory.mktemp("model"), kind)), finetune=finetune, device="cpu"))
        return made[kind, finetune]
    return lm


def ragged(count, prefix=40, longest=30, seed=0):
    "Prompts of many lengths behind a common prefix; some occur twice."
    rng = np.random.default_rng(seed)
    head = rng.integers(400, 4000, prefix).tolist()
    prompts = [head + rng.integers(400, 4000, rng.integers(1, longest + 1)).tolist() for _ in range(count)]
    for i in range(0, count, 17): prompts[i] = prompts[-1 - i]
    return prompts


def generated(lm, prompts, batch=25):
    "Greedy texts of `generate`, prompts padded on the left."
    out = []
    for a in range(0, len(prompts), batch):
        part = prompts[a:a + batch]
        width = max(map(len, part))
        ids, mask = (torch.tensor([[0] * (width - len(p)) + o for p, o in zip(part, what)]) for what in (part, [[1] * len(p) for p in part]))
        with torch.inference_mode():
            new = lm.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=lm.stop_ids, pad_token_id=0)[:, width:]
        for row in new.tolist(): out.append(row[:next((i + 1 for i, t in enumerate(row) if t in lm.stop_ids), len(row))])
    return out


def drawn(lm, prompts, n=1, **kw):
    rows = HFSampler(lm, **{"batch": 24, **kw}).sample(prompts, n, SamplingParams(0, max_new_tokens=NEW), [[0] * n for _ in prompts])
    assert all(s.token_ids == row[0].token_ids for row in rows for s in row)
    return [list(row[0].token_ids) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_of_200_prompts_are_those_of_generate(lm_of, kind):
    lm, prompts = lm_of(kind), ragged(200)
    layout = look(lm)
    longest = max(map(len, prompts)) + NEW
    assert (layout is not None and longest <= (layout.longest or longest)) == KINDS[kind][2]
    expected = generated(lm, prompts)
    assert drawn(lm, prompts) == expected
    ends = {len(e) for e in expected}
    assert len(ends) > 3 and NEW in ends                    # some end by themselves, at many places; some are cut off


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "llama", "gemma", "gemma 2, capped scores"])
def test_prompts_that_share_nothing_and_several_texts_of_each(lm_of, kind):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(400, 4000, k).tolist() for k in (1, 2, 70, 33, 5, 1, 19)]
    expected = generated(lm_of(kind), prompts)
    for batch in (1, 4, 64): assert drawn(lm_of(kind), prompts, 3, batch=batch) == expected


def with_adapter(lm, folder):
    "An adapter that changes what the model says."
    lm.start(None, 0)
    with torch.no_grad():
        for name, p in lm.model.named_parameters():
            if "lora_B" in name: p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    folder.mkdir()
    lm.save(folder)
    return folder


@pytest.mark.parametrize("kind,finetune", [("qwen2", "lora"), ("phi3", "lora"), ("llama", "lora"), ("gemma", "lora"), ("gemma 3 with a short window", "lora"),
                                           ("qwen2", "qlora"), ("phi3", "qlora"), ("llama", "qlora"), ("gemma", "qlora")])
def test_adapter_on_and_off(lm_of, tmp_path, kind, finetune):
    if finetune == "qlora": pytest.importorskip("bitsandbytes", reason="4-bit needs bitsandbytes")
    lm, prompts, said = lm_of(kind, finetune), ragged(200 if finetune == "qlora" else 60), {}
    assert look(lm) is not None
    adapter = with_adapter(lm, tmp_path / "adapter")
    for folder in (None, adapter, None):
        lm.use(folder)
        said[folder] = drawn(lm, prompts)
        assert said[folder] == generated(lm, prompts)
    assert said[None] != said[adapter]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_takes_the_shared_way_and_stays_close(lm_of, tmp_path, dtype):
    "Half the digits: a text may leave the other way's at a near tie, but its log-probability may not."
    lm = LM(Config(model=str(folder_of(tmp_path, "llama")), device="cpu", dtype=dtype))
    assert look(lm) is not None
    prompts = ragged(30)
    a, b = (HFSampler(lm, 32, shared=way).sample(prompts, 1, SamplingParams(0, max_new_tokens=1), [[0]] * 30) for way in (True, False))
    assert np.mean([x[0].token_ids == y[0].token_ids for x, y in zip(a, b)]) >= 0.7
    assert np.mean([abs(x[0].logprob - y[0].logprob) for x, y in zip(a, b)]) < 0.15


def test_the_model_s_own_attention_is_put_back(lm_of):
    from stasc.core import SampleError
    lm = lm_of("qwen2")
    drawn(lm, ragged(3))
    assert lm.base.config._attn_implementation == "sdpa"
    weight = lm.base.lm_head.weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(SampleError, match="not numbers"): drawn(lm, ragged(3))
    weight.data.copy_(kept)
    assert lm.base.config._attn_implementation == "sdpa"


def test_rotation_that_depends_on_the_longest_text_limits_the_shared_way(lm_of, tmp_path):
    KINDS["dynamic"] = ("Llama", SMALL | dict(max_position_embeddings=64, rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=10_000.0)), False)
    lm = LM(Config(model=str(folder_of(tmp_path, "dynamic")), device="cpu"))
    assert look(lm).longest == 64


def test_models_without_attention_layers_of_their_own_are_left_alone(tmp_path):
    KINDS["mamba"] = ("Mamba", dict(vocab_size=4096, hidden_size=64, num_hidden_layers=2, state_size=8, pad_token_id=0), False)
    assert look(LM(Config(model=str(folder_of(tmp_path, "mamba")), finetune="full", device="cpu"))) is None

