"Attacks on `stasc.reward`: independent oracles, random strings, real references."
import json, random, re, string, sys, time, unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from stasc.core import RewardError
from stasc.reward import _REWARDS, exact_match, final_answer, get_reward, in_accuracy, judge, normalise, register, token_f1, tokens

NQ = Path(__file__).resolve().parents[2]/"shared/data/nq_open"
needs_nq = pytest.mark.skipif(not NQ.exists(), reason="no ../shared/data/nq_open beside this checkout: real questions are not in the repository")
LNM = lambda c: unicodedata.category(c)[0] in "LNM"


# --- an oracle that follows the definition to the letter, step by step

def literal(text):
    "NFD, lower case, punctuation to a space, whole words a/an/the to a space, white space folded, tokens by the `regex` package."
    regex = pytest.importorskip("regex", reason="the regex package (it comes with transformers) is the oracle here")
    text = unicodedata.normalize("NFD", text).lower()
    text = re.sub(f"[{re.escape(string.punctuation)}]", " ", text)
    text = regex.sub(r"(?<![\p{L}\p{N}\p{M}])(a|an|the)(?![\p{L}\p{N}\p{M}])", " ", text)
    return regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", " ".join(text.split()))

def literal_in(prediction, references):
    p = literal(prediction)
    return any(r and any(p[i:i+len(r)] == r for i in range(len(p))) for r in map(literal, references))

def known_to_both():
    "Code points of all planes whose category Python and the regex package agree on (their Unicode versions differ)."
    regex = pytest.importorskip("regex", reason="the regex package (it comes with transformers) is the oracle here")
    every = [chr(c) for c in range(sys.maxunicode + 1)]
    joined = "".join(every)
    word, visible = set(regex.findall(r"[\p{L}\p{N}\p{M}]", joined)), set(regex.findall(r"[^\p{Z}\p{C}]", joined))
    mine = lambda c: (LNM(c), unicodedata.category(c)[0] not in "ZC")
    agree = [c for c in every if mine(c) == (c in word, c in visible)]
    assert not [c for c in set(every) - set(agree) if unicodedata.category(c) != "Cn"], "categories differ for characters that Python knows"
    return agree

def test_every_code_point_and_random_strings_against_regex():
    agree = known_to_both()
    assert len(agree) > 1_050_000
    for c in agree[::31] + [c for c in agree if ord(c) < 0x3000]: assert tokens(f"x{c}y {c}") == literal(f"x{c}y {c}"), hex(ord(c))
    rng, common = random.Random(0), "aAnNthHeE TH'-.,é\u0301\u0300İßΣς€“”\u200b\u00a0\n0١²京👍🏽\u200d"
    planes = [[c for c in agree if lo <= ord(c) < hi and unicodedata.category(c) not in ("Cn", "Co")] for lo, hi in
              ((0, 0x80), (0x80, 0x250), (0x250, 0x3000), (0x3000, 0x10000), (0x10000, 0x20000), (0x20000, 0x40000), (0xe0000, 0xf0000))]
    for _ in range(20_000):
        pool = rng.choice([common, *planes])
        text = "".join(rng.choice(pool if rng.random() < .7 else common) for _ in range(rng.randint(0, 14)))
        assert tokens(text) == literal(text), ascii(text)

@settings(max_examples=500, deadline=None)
@given(st.text(), st.lists(st.text(max_size=6), max_size=3))
def test_in_accuracy_is_the_literal_definition(prediction, references):
    agree = lambda t: all(unicodedata.category(c) != "Cn" for c in t)
    if agree(prediction) and all(map(agree, references)): assert in_accuracy(prediction, references) == literal_in(prediction, references)

def test_in_accuracy_is_the_literal_definition_where_matches_are_common():
    rng, words = random.Random(1), ["the", "a", "An", "york", "York.", "duke", "of", "O'Neil", "x-ray", "à", "thé", "€", "1,000", "19", "\u0301"]
    for _ in range(20_000):
        p, r = (" ".join(rng.choices(words, k=k)) for k in (rng.randint(0, 7), rng.randint(0, 2)))
        assert in_accuracy(p, [r]) == literal_in(p, [r]), (p, r)


# --- cases by hand

RIGHT = [("The answer is Beyoncé", "Beyonce\u0301"), ("BEYONCE\u0301", "beyoncé"), ("spiderman or spider-man", "Spider Man"), ("O’Neil said", "O’Neil"),
         ("rock 'n' roll", "Rock n Roll"), ("it's the U.S.A.", "U S A"), ("首都は、東京。", "東京"), ("win 👍 now", "👍"), ("1,000 men", "1,000"),
         ("in 1 000 days", "1,000"), ("price: 5€", "5 €"), ("\tNew\u00a0York\u2003City\n", "new york city"), ("Vitamin A deficiency", "vitamin deficiency"),
         ("À la carte", "a\u0300 la carte"), ("The Beatles", "Beatles"), ("Ångström", "A\u030angstro\u0308m"),
         ("İstanbul", "I\u0307stanbul"), ("Ⅳ", "ⅳ"), ("non\u00adbreaking", "non breaking"), ("Duke of the York", "duke of york"), ("٣ apples", "٣")]
WRONG = [("19881", "1988"), ("Romanian", "Roman"), ("東京都", "東京"), ("人口は東京 です", "東京"), ("Beyoncé", "Beyonce"), ("1,000", "1000"), ("thé", "the"), ("the", "thé"),
         ("York Duke", "Duke York"), ("New, shiny York", "New York"), ("O’Neil", "O'Neil"), ("café", "caf"), ("e\u0301", "e"), ("straße", "strasse"),
         ("a", "a"), ("anything", "The"), ("anything", ""), ("", ""), ("...", "?"), ("don't", "dont"), ("x²", "x2"), ("two", "2"), ("Marí", "María"), ("á", "thé")]

@pytest.mark.parametrize("prediction, reference", RIGHT)
def test_right(prediction, reference): assert in_accuracy(prediction, [reference]) == 1.0

@pytest.mark.parametrize("prediction, reference", WRONG)
def test_wrong(prediction, reference): assert in_accuracy(prediction, [reference]) == 0.0


# --- properties

names = st.sampled_from(["in_accuracy", "exact_match", "token_f1"])

@settings(deadline=None)
@given(names, st.text(), st.lists(st.text(max_size=8), max_size=4))
def test_rewards_stay_in_range_and_are_pure(name, prediction, references):
    reward = get_reward(name)
    value = reward(prediction, references)
    assert isinstance(value, float) and 0 <= value <= 1 and value == reward(prediction, tuple(references))
    assert value == max((reward(prediction, [r]) for r in references), default=0.0)

@settings(deadline=None)
@given(st.text(), st.text())
def test_rewards_are_ordered(prediction, reference):
    exact, contains, f1 = (r(prediction, [reference]) for r in (exact_match, in_accuracy, token_f1))
    assert exact <= contains and exact <= f1 and not (contains and not f1)
    assert exact_match(reference, [reference]) == bool(normalise(reference))

@given(st.text())
def test_normalise_is_stable(text):
    once = normalise(text)
    assert once == " ".join(tokens(text)) and once == once.strip() and "  " not in once
    if "Σ".lower() not in once and "ς" not in once: assert normalise(once) == once     # final sigma depends on what follows it

def test_lone_surrogates_are_no_crash(): assert tokens("a\ud800b") == ["b"] and final_answer("Final Answer: \udfff") == "\udfff"


# --- the final answer

@settings(max_examples=1000, deadline=None)
@given(st.text())
def test_final_answer_never_raises(text):
    answer = final_answer(text)
    if answer is not None: assert answer == answer.strip() and len(answer.splitlines()) <= 1
    if "final" not in text.casefold(): assert answer is None

pieces = st.lists(st.sampled_from(["Final Answer", "final answer:", "**", "*", "_", "`", "```", "\n", "\r\n", " ", "\t", ":", "：", "-", " - ", "is ",
                                   "#", "> ", "632", "Jane Austen", "\u2028", "\x0b", "Final", "Answer", "\ud800", "é"]), max_size=20).map("".join)

@settings(max_examples=1000, deadline=None)
@given(pieces)
def test_final_answer_of_broken_markup(text):
    answer = final_answer(text)
    assert (answer is None) == (re.search(r"(?<![^\W_])final\s+answer(?![^\W_])", text, re.I) is None)
    if answer: assert answer == answer.strip(" \t*_`") and answer in text

@settings(deadline=None)
@given(pieces, st.sampled_from(["\nFinal Answer: {}", "\n**Final Answer:** {}", "\n**Final Answer**: **{}**", "\nFINAL ANSWER - {}  ", "\nFinal Answer:\n\n{}\nand so on",
                                " Final answer: {}\n"]))
def test_the_last_marker_wins(before, form): assert final_answer(before.replace("\ud800", "") + form.format("Jane Austen")) == "Jane Austen"

HOSTILE = ["*", "final ", "Final Answer:", "Final Answer: ", "final answer ", "Final Answer** ", "\n** **", "> ", "# ", "\n", " ", "\t", "```\n", "   ```\n", "`", "\\boxed{", "A ", "A! ", "1,000 ", "yes no ", "\ud800", "\u2028"]

def readers():
    "All that reads a whole text of a model."
    from stasc.core import Question, visible, whole_characters
    from stasc.data import question_key
    from stasc.maths import math_answer, math_equal
    from stasc.runner import code_block
    rewards = [lambda t, r=r: get_reward(r)(t, ["A", "yes"]) for r in ("in_accuracy", "exact_match", "token_f1", "yes_no", "multiple_choice")]
    return [final_answer, code_block, math_answer, whole_characters, lambda t: math_equal(t, ["5"]), lambda t: visible(t, 10**9), lambda t: question_key(Question("q", t, ("x",))), *rewards]

def taken(f, text):
    start = time.process_time()
    f(text)
    return time.process_time() - start

@pytest.mark.parametrize("piece", HOSTILE)
def test_eight_times_the_text_takes_about_eight_times_as_long(piece):
    "A step for each pair of characters would take 64 times as long; short times are noise and are not compared."
    for f in readers():
        short, long = (min(taken(f, piece * n) for _ in range(2)) for n in (4_000, 32_000))
        assert long < 0.05 or long < 30 * short, (f, short, long)

def test_a_million_markers():
    assert final_answer("Final Answer:" * 1_000_000) == "" and final_answer("Final Answer:" * 1_000_000 + "7") == "7"

# --- judge and the registry

def test_judge_reports_what_a_reward_did():
    class Odd:
        def __call__(self, prediction, references): raise KeyError("nope")
    with pytest.raises(RewardError, match=r"reward Odd failed for the prediction 'Paris': KeyError: 'nope'"): judge("Final Answer: Paris", ["x"], Odd())
    for bad in (float("nan"), float("inf"), -0.001, 1.001, None, "1", b"1", [1], 1j, object()):
        with pytest.raises(RewardError, match=r"expected a number in \[0, 1\]"): judge("Final Answer: Paris", ["x"], lambda p, r: bad)
    numpy = pytest.importorskip("numpy")
    for good in (True, 0, 1, 0.5, numpy.float32(0.5), numpy.bool_(True), numpy.int64(1)):
        value = judge("Final Answer: Paris", ["x"], lambda p, r: good)[1]
        assert type(value) is float and value == float(good)

def test_judge_lets_an_interrupt_through():
    def stop(prediction, references): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): judge("Final Answer: Paris", ["x"], stop)

@pytest.mark.parametrize("name", [None, 3, "", "In_Accuracy", ["in_accuracy"]])
def test_unknown_rewards(name):
    with pytest.raises(RewardError, match="unknown reward"): get_reward(name)

def test_register_again_replaces_only_ones_own(monkeypatch):
    monkeypatch.setattr("stasc.reward._REWARDS", dict(_REWARDS))
    def mine(prediction, references): return 0.0
    def make():
        @register("a_test_reward")
        def reward(prediction, references): return 1.0
        return reward
    first, second = make(), make()
    assert first is not second and get_reward("a_test_reward") is second
    with pytest.raises(RewardError, match="registered already, by test_reward"): register("a_test_reward")(mine)


# --- speed, and what the naive verdict gets wrong

def test_speed():
    rng = random.Random(0)
    words = "the quick brown fox Beyoncé New-York 1,000 O'Neil of and Duke thé".split()
    cases = [(" ".join(rng.choices(words, k=8)), [" ".join(rng.choices(words, k=2)) for _ in range(3)]) for _ in range(100_000)]
    start = time.perf_counter()
    for p, r in cases: in_accuracy(p, r)
    took = time.perf_counter() - start
    print(f"\n100,000 short cases: {took:.2f} s")
    assert took < 10

def substring(prediction, references): return float(any(r.lower() in prediction.lower() for r in references))

RESPELLED = {"as it stands": lambda r: f"It is {r}.",
             "without punctuation": lambda r: r.translate(str.maketrans(string.punctuation, " " * len(string.punctuation))),
             "without articles": lambda r: re.sub(r"\b(the|an|a) ", "", r, flags=re.I),
             "accents apart (NFD)": lambda r: unicodedata.normalize("NFD", r),
             "in a longer word": lambda r: r + ("0" if r[-1:].isdigit() else "s")}

@needs_nq
def test_naive_substring_is_wrong_in_one_case_of_six():
    rows = [json.loads(line) for f in sorted(NQ.glob("*.jsonl")) for line in f.read_text(encoding="utf-8").split("\n") if line]
    references = [row["answer"][0] for row in rows]
    wrong = {k: sum(substring(f(r), [r]) != in_accuracy(f(r), [r]) for r in references) / len(references) for k, f in RESPELLED.items()}
    real = [(p, row["answer"]) for row in rows for k in ("def_correct_predictions", "poss_correct_predictions", "def_incorrect_predictions") for p in row.get(k, [])]
    verdicts = [(substring(p, r), in_accuracy(p, r)) for p, r in real]
    decided = [v for v in verdicts if any(v)]
    wrong["real predictions, either says right"] = sum(a != b for a, b in decided) / len(decided)
    print(f"\n{len(references)} references, {len(real)} real predictions; substring and in_accuracy disagree on")
    for kind, share in wrong.items(): print(f"  {kind:36} {share:6.1%}")
    assert wrong["as it stands"] < 0.005 and 1/8 < wrong["without punctuation"] < 1/4 and wrong["in a longer word"] > 0.9
    assert 1/8 < wrong["real predictions, either says right"] < 1/4

@needs_nq
def test_real_references_agree_with_the_literal_definition():
    rows = [json.loads(line) for line in (NQ/"NQ-open.dev.jsonl").read_text(encoding="utf-8").split("\n") if line]
    rng = random.Random(2)
    for row in rows:
        for p in (row["question"], f"It is {rng.choice(row['answer'])}!", rng.choice(rows)["answer"][0]): assert in_accuracy(p, row["answer"]) == literal_in(p, row["answer"])
