"Tasks: prompts and rewards that go with the data; graded rewards through filter, metrics and plots; attacks on the rewards."
import json, random, re
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from stasc.core import Config, ConfigError, Question, RewardError
from stasc.data import PRESETS, Data, load_questions
from stasc.loop import STaSC
from stasc.maths import math_answer, math_equal, number
from stasc.prompt import correction_messages, initial_messages, prompt_set, prompts_of
from stasc.reward import exact_match, get_reward, judge, multiple_choice, rouge_l, token_f1, tokens, yes_no
from stasc.task import TASKS, configure, reward_of, task_of
from stasc.train import ScriptedEngine


# --- what auto picks

WANT = dict(nq=("default", "in_accuracy"), nq_open=("default", "in_accuracy"), trivia_qa=("default", "in_accuracy"), squad=("default", "in_accuracy"), hotpot_qa=("multi_hop", "in_accuracy"),
            hotpot_qa_context=("multi_hop", "in_accuracy"), boolq=("yes_no", "yes_no"), xsum=("summary", "rouge_l"), gsm8k=("math", "math_equal"), math500=("math", "math_equal"), mbpp=("code", "run_tests"),
            humaneval=("code", "run_tests"), arithmetic=("arithmetic", "in_accuracy"))

@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_its_prompts_and_its_reward(name):
    if name not in WANT: pytest.skip("a preset of another notebook")
    for data in (name, f"{name}:train[:5]", f"{name}@abc"):
        cfg = Config(data=data, run_code=True)
        assert (prompts_of(cfg).name, reward_of(cfg).__name__) == WANT[name]

def test_what_is_said_wins_over_auto():
    cfg = Config(data="boolq", reward="token_f1", prompts="default")
    assert reward_of(cfg) is token_f1 and prompts_of(cfg).name == "default"
    assert prompts_of(Config(data="boolq", task="math")).name == "math" and reward_of(Config(data="x.jsonl", task="multiple_choice")) is multiple_choice
    assert prompts_of(Config(data="boolq.jsonl")).name == "default" == prompts_of(Config()).name.replace("arithmetic", "default")
    with pytest.raises(ConfigError, match="unknown task 'yesno', did you mean 'yes_no'"): prompts_of(Config(task="yesno"))

def test_programs_run_only_where_it_was_asked_for(tmp_path):
    for cfg in (Config(data="mbpp"), Config(reward="run_tests"), Config(task="code")):
        with pytest.raises(RewardError, match="run_code = True"): reward_of(cfg)
        with pytest.raises(RewardError, match="run_code = True"): STaSC(cfg, tmp_path/"run", data=DATA, engine=ScriptedEngine(str), callbacks=[]).run()
        assert not (tmp_path/"run").exists()
    with pytest.raises(RewardError, match="unknown reward 'run_tests'"): get_reward("run_tests")

def test_math_verify():
    if pytest.importorskip("math_verify", reason="the extra math is not installed"):
        reward = reward_of(Config(task="math", reward="math_verify"))
        assert judge(r"So $\boxed{\frac{2}{4}}$", ["0.5"], reward)[1] == 1.0 and judge("Final Answer: 3", ["4"], reward)[1] == 0.0

def test_math_verify_says_what_is_missing():
    import importlib.util
    if importlib.util.find_spec("math_verify"): pytest.skip("math-verify is installed")
    with pytest.raises(RewardError, match=r"pip install 'stasc\[math\]'"): reward_of(Config(reward="math_verify"))


# --- prompt sets

@pytest.mark.parametrize("name", sorted({t.prompts for t in TASKS.values()} - {"arithmetic", "facts"}))      # these two need no examples
def test_examples_earn_what_they_should(name):
    ps, task = prompt_set(name), next(t for t in TASKS.values() if t.prompts == name)
    assert len(ps.examples) == 2 and all("Final Answer:" in p["system"] for p in (ps.initial, ps.correction))
    reward = reward_of(Config(task=task.name, run_code=True))
    finals = [[getattr(reward, "extract", None) or (lambda t: judge(t, [], "exact_match")[0]), e] for e in ps.examples]
    first, second = ([f(e[k]) for k in ("initial_answer", "correction")] for f, e in finals)
    assert all(first) and all(second)
    kept, mended = sorted([first, second], key=lambda p: p[0] != p[1])
    assert kept[0] == kept[1] and mended[0] != mended[1], "one example mends its answer, the other keeps it"

@pytest.mark.parametrize("name", sorted({t.prompts for t in TASKS.values()}))
def test_prompts_hold_the_question_the_passage_and_the_answer(name):
    ps, q = prompt_set(name), Question("q", "THE {context} QUESTION", ("r",), "THE PASSAGE")
    texts = ["\n".join(m["content"] for m in ms) for ms in (initial_messages(ps, q), correction_messages(ps, q, "THE ANSWER"))]
    assert all("THE {context} QUESTION" in t and ("THE PASSAGE" in t or name in ("summary", "arithmetic", "facts")) for t in texts) and "THE ANSWER" in texts[1]
    assert not re.search(r"\{(examples|context|question|initial_answer)\}", "".join(texts).replace("THE {context}", ""))
    assert texts[1].count("Correction:") == len(ps.examples) and correction_messages(ps, q, "A", shots=0)[-1]["content"].count("Correction:") == 0


# --- ROUGE-L against a table filled by hand

def longest(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b): last, row[j + 1] = row[j + 1], last + 1 if x == y else max(row[j], row[j + 1])
    return row[-1]

words = st.lists(st.sampled_from("a the cat sat on mat dog ran é".split()), max_size=12)

@settings(max_examples=400, deadline=None)
@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence(p, r):
    want = 2 * longest(p, r) / (len(p) + len(r)) if r else 0.0
    assert rouge_l(" ".join(p), [" ".join(r)]) == want == rouge_l(" ".join(p).upper() + " .", ["", " ".join(r) + "!"])

@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(max_size=10), max_size=3))
def test_graded_rewards_stay_in_range(p, rs):
    for f in (rouge_l, token_f1, yes_no, multiple_choice, math_equal):
        v = f(p, rs)
        assert isinstance(v, float) and 0 <= v <= 1 and v == max((f(p, [r]) for r in rs), default=0.0) or f is multiple_choice
    assert rouge_l(p, [p]) == float(bool(tokens(p)) or rouge_l(p, [p]))

def test_rouge_l_of_long_texts():
    rng = random.Random(0)
    a, b = (" ".join(rng.choices("abcdefgh", k=20_000)) for _ in range(2))
    assert 0.5 < rouge_l(a, [b]) < 1


# --- yes or no, choices, numbers

@given(st.sampled_from(["yes", "no"]), st.sampled_from(["{}", "{}.", "**{}**", "{}, as the passage says", "{} - it is"]), st.sampled_from([str.upper, str.title, str]))
def test_yes_no(side, form, case):
    other = {"yes": "no", "no": "yes"}[side]
    assert yes_no(form.format(case(side)), [side]) == 1.0 and yes_no(form.format(case(other)), [side]) == 0.0
    assert yes_no(f"{side} or {other}", [side]) == yes_no(f"{other}/{side}", [side]) == yes_no("", [side]) == yes_no(f"Perhaps {side}", [side]) == 0.0

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["{}", "({})", "{}.", "{})", "{}) {text}", "{}: {text}", "**{}**", "{}. It is {text}"]))
def test_multiple_choice(right, chosen, form):
    texts = ["a cat", "two dogs", "vitamin D", "none"]
    said = form.format("ABCD"[chosen], text=texts[chosen])
    assert multiple_choice(said, ["ABCD"[right], texts[right]]) == float(right == chosen), said
    assert multiple_choice(texts[chosen], ["ABCD"[right], texts[right]]) == float(right == chosen)
    assert not multiple_choice("A, B, C or D", ["ABCD"[right], texts[right]]) and not multiple_choice("A B C D", ["ABCD"[right], texts[right]])

WAYS = [lambda n: str(n), lambda n: f"{n:,}", lambda n: f"${n:,}.00", lambda n: f"{n} apples", lambda n: f"It is {n}.", lambda n: rf"\boxed{{{n}}}", lambda n: f"{n}.0", lambda n: f"x = {n}", lambda n: rf"\frac{{{2 * n}}}{{2}}", lambda n: f"{3 * n}/3", lambda n: f"**{n}**".strip("*"), lambda n: f"{n}%"]

@settings(max_examples=400, deadline=None)
@given(st.integers(-10**9, 10**9), st.sampled_from(WAYS), st.sampled_from(WAYS))
def test_a_number_is_the_same_in_every_spelling(n, a, b):
    assert number(a(n)) == n and math_equal(a(n), [b(n)]) == 1.0
    assert math_equal(a(n), [b(n + 1 + abs(n) // 1000)]) == 0.0 and math_equal(f"{a(n)} or {a(n + 1)}", [b(n)]) == 0.0

@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789.,/-+eE ()\\{}$%frac boxedx^_", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_number_or_none(text):
    value = number(text)
    assert value is None or isinstance(value, Fraction)
    answer = math_answer(text)
    assert answer is None or isinstance(answer, str)

def test_hostile_numbers_take_no_time():
    for text in ("9" * 100_000, "1e99", "1e-99", "1e999999999", "1/" * 50_000, "\\frac{" * 20_000, "\\boxed{" * 20_000, "1," * 100_000, "{" * 100_000): number(text), math_answer(text), math_equal(text, ["1"])


# --- graded rewards through filter, metrics and plots

REFERENCE = "the town pool has opened again after two years"
DATA = Data(tuple(Question(f"q{i}", f"Text {i}", (f"{REFERENCE} in place {i}",)) for i in range(12)), tuple(Question(f"t{i}", f"Text {100 + i}", (f"{REFERENCE} in place {100 + i}",)) for i in range(6)))

def summarise(prompt, rng, skill):
    "Keeps each word with a chance that grows with skill, and more so in a correction."
    chance = 0.3 + 0.15 * skill + (0.2 if "Initial answer" in prompt else 0)
    return "Final Answer: " + " ".join(w for w in REFERENCE.split() if rng.random() < chance)

@pytest.fixture(scope="module", params=["rouge_l", "token_f1"])
def run(request, tmp_path_factory):
    cfg = configure("xsum", reward=request.param, variant="ENE", iterations=2, n_train=12, n_test=6, n_init=3, n_corr=3, threshold=0.6)
    return STaSC(cfg, tmp_path_factory.mktemp("graded")/"run", data=DATA, engine=ScriptedEngine(summarise), callbacks=[]).run()

def test_the_filter_keeps_what_earns_more_or_is_right(run):
    t = run.trajectories
    reward = get_reward(run.cfg.reward)
    references = {q.id: q.references for q in DATA.train + DATA.test}
    assert t.corr_reward.nunique() > 5 and ((t.corr_reward > 0) & (t.corr_reward < 1)).any()
    sample = t.sample(40, random_state=0)
    assert all(reward(a or "", references[q]) == r for a, q, r in zip(sample.corr_answer, sample.question_id, sample.corr_reward))
    train = t[t.split == "train"]
    want = (train.corr_reward > train.init_reward) | (train.corr_reward == train.init_reward) & (train.init_reward >= run.cfg.threshold)
    assert (train.kept == want).all() and (train.kept & (train.corr_reward < run.cfg.threshold)).any()
    assert run.metrics.n_kept.tolist()[1:] == [int(train.kept[train.iteration == n].sum()) for n in range(2)]

def test_metrics_are_means_and_shares_from_the_threshold_on(run):
    from stasc.metrics import by_iteration, compare, measure
    t = run.trajectories
    for n, row in run.metrics.iterrows():
        rows = t[(t.iteration == n) & (t.split == "test")]
        r1, r2 = rows.init_reward >= 0.6, rows.corr_reward >= 0.6
        assert row.test_acc_t1 == pytest.approx(rows.init_reward.mean()) and row.test_acc_t2 == pytest.approx(rows.corr_reward.mean())
        assert row.test_i_to_c == pytest.approx((~r1 & r2).mean()) and row.test_c_to_i == pytest.approx((r1 & ~r2).mean())
        assert measure(rows, t=0.6)["acc_t2"] == pytest.approx(row.test_acc_t2)
    curves = by_iteration(run, n_boot=200)
    assert ((curves.acc_t2_lo <= curves.acc_t2) & (curves.acc_t2 <= curves.acc_t2_hi)).all() and 0 <= compare(run, run, n_boot=200)["p"] <= 1
    assert run.metrics.train_acc_t2.iloc[-1] > run.metrics.train_acc_t2.iloc[0]

def test_plots_show_means(run):
    import matplotlib
    matplotlib.use("Agg")
    from stasc import plot
    lines = {l.get_label(): l.get_ydata() for l in run.curves().axes[0].lines}
    assert list(lines["corrections, test"]) == pytest.approx(run.metrics.test_acc_t2.tolist())
    for figure in (plot.reward_curves(run), plot.transitions(run), plot.kept_counts(run)): figure.canvas.draw()

def test_a_code_run(tmp_path):
    tests = "assert double(2) == 4\nassert double(5) == 10"
    data = Data(tuple(Question(f"q{i}", f"Write double, number {i}.", (tests,)) for i in range(3)), (Question("t", "Write double.", (tests,)),))
    def write(prompt, rng, skill): return f"Final Answer:\n```python\ndef double(n):\n    return {rng.choice(['2 * n', 'n * n', 'exit(0)'])}\n```"
    run = STaSC(configure("mbpp", run_code=True, iterations=1, n_init=2, n_corr=2), tmp_path/"run", data=data, engine=ScriptedEngine(write), callbacks=[]).run()
    t = run.trajectories
    assert ((t.corr_reward == 1) == t.corr_answer.str.contains("2 * n", regex=False)).all() and t.corr_reward.nunique() == 2
    assert not STaSC.open(tmp_path/"run", callbacks=[]).cfg.run_code           # a directory cannot allow it
    assert STaSC.open(tmp_path/"run", callbacks=[], run_code=True, iterations=2, engine=run.engine).run().n_done == 3


# --- real questions

GSM8K = Path(__file__).resolve().parents[2]/"shared/data/gsm8k/test.jsonl"

@pytest.mark.skipif(not GSM8K.exists(), reason="no ../shared/data/gsm8k beside this checkout: real questions are not in the repository")
def test_real_solutions_of_gsm8k_are_judged_right():
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        solution, gold = row["answer"].rsplit("####", 1)
        assert judge(f"{solution}\nFinal Answer: ${gold.strip()}", [gold.strip()], "math_equal")[1] == 1.0
