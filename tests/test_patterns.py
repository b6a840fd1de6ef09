"Labels of corrections: each rule at its edges, the counts against the measures, edit distance against the textbook, hostile text."
import random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasc.arithmetic import arithmetic_questions, error_kind, scratchpad, summands
from stasc.core import Config, DataError, Question, StascError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.metrics import measure
from stasc.patterns import (PATTERNS, TAGS, Correction, add_pattern, edit_distance, examples, label, pattern_counts, pattern_of, slip_kind, tags_of)
from stasc.reward import judge
from stasc.train import ScriptedEngine

question = Question("q1", "Which actress played in both movies?", ("Ellen Page", "Elliot Page"))


def correction(first, second, references=question.references, scope="final", finish="stop", reward="in_accuracy", t=1.0):
    (a, r1), (b, r2) = (judge(x, references, reward, scope) for x in (first, second))
    return Correction(first, second, a, b, r1, r2, "stop", finish, "q1", question.text, tuple(references), t)


def answer(reasoning, final): return f"Step-by-step reasoning: {reasoning}\nFinal Answer: {final}"


def rows_of(pairs, references=question.references, **columns):
    rows = []
    for i, (first, second) in enumerate(pairs):
        c = correction(first, second, references)
        rows.append(dict(iteration=0, split="train", question_id=f"q{i}", init_index=0, corr_index=0, init_text=first, corr_text=second, init_answer=c.init_answer,
                         corr_answer=c.corr_answer, init_reward=c.init_reward, corr_reward=c.corr_reward) | columns)
    return pd.DataFrame(rows)


@pytest.fixture(autouse=True)
def rules_as_they_were():
    before = [(d, dict(d)) for d in (PATTERNS, TAGS)]
    yield
    for d, kept in before: d.clear(); d.update(kept)


# --- labels

wrong, right = answer("Reese Witherspoon comes to mind.", "Reese Witherspoon"), answer("Juno starred Ellen Page.", "Ellen Page")

LABELS = [
    ("to right", wrong, right),
    ("to right", "", right),
    ("to right", "It was Ellen Page.", "It was Ellen Page.\nFinal Answer: Ellen Page"),                # only the label of the answer came: the reward crosses all the same
    ("away from right", right, wrong),
    ("away from right", right, "Juno starred Ellen Page."),                                            # the answer was there, but not as the final one
    ("away from right", right, ""),
    ("repeated", wrong, wrong),
    ("repeated", right, f"  {right}\n\n"),
    ("repeated", "", ""),
    ("repeated", "no idea", "no idea"),
    ("no answer", wrong, ""),
    ("no answer", wrong, "Reese Witherspoon comes to mind."),
    ("no answer", wrong, "Step-by-step reasoning: first of all\nFinal Answer:"),
    ("no answer", "", "It is hard to say"),
    ("no answer", wrong, "Final Answer: ..."),
    ("format only", wrong, wrong.upper()),
    ("format only", wrong, wrong.replace("Final Answer: Reese Witherspoon", "**Final Answer:** *Reese Witherspoon*.")),
    ("format only", wrong, wrong.replace("Step-by-step reasoning: ", "")),
    ("format only", right, right.replace("Juno", "“Juno”").replace(" starred", " — starred")),
    ("format only", answer("1. She was in Juno.\n2. She was in Legally Blonde.", "X"), answer("- She was in Juno\n- She was in Legally Blonde", "X")),
    ("format only", answer("They   met\nin 1914-1918", "X"), answer("They met in 1914–1918.", "X.")),
    ("reasoning only", wrong, answer("She is well known.", "Reese Witherspoon")),
    ("reasoning only", wrong, "Final Answer: Reese Witherspoon"),
    ("reasoning only", right, answer("Juno starred Ellen Page, and so did Tracey Fragments.", "ELLEN PAGE")),
    ("reasoning only", answer("5 - 3 is 8", "8"), answer("5 + 3 is 8", "8")),
    ("reasoning only", answer("7 + 1 = 9", "9"), answer("7 + 1 < 9", "9")),
    ("reasoning only", answer("it costs 5 €", "X"), answer("it costs 5 £", "X")),
    ("reasoning only", answer("Tim met Tom", "X"), answer("Tom met Tim", "X")),
    ("to another right", right, answer("She changed her name.", "Elliot Page")),
    ("to another right", right, answer("Juno starred Ellen Page.", "Ellen Page (now Elliot Page)")),
    ("to another wrong", wrong, answer("Reese Witherspoon comes to mind.", "Jodie Foster")),
    ("to another wrong", "", wrong),
    ("to another wrong", wrong, answer("Reese Witherspoon comes to mind.", "Reese Witherspoon, I think")),
]


@pytest.mark.parametrize("name,first,second", LABELS)
def test_label(name, first, second): assert pattern_of(correction(first, second)) == name


def test_every_label_has_a_case(): assert {name for name, *_ in LABELS} == set(PATTERNS) and all(f.__doc__ for f in [*PATTERNS.values(), *TAGS.values()])


def test_labels_where_the_whole_text_is_judged():
    "Without a final answer a text can be right there."
    full = lambda a, b: pattern_of(correction(a, b, scope="full"))
    assert full("It was Ellen Page", "I say it was Ellen Page") == "reasoning only"
    assert full("It was Ellen Page", "IT WAS ELLEN PAGE!") == "format only"
    assert full("It was Jodie", "It was Ellen Page") == "to right" and full("It was Jodie", "It was Reese") == "no answer"


def test_threshold_of_a_graded_reward():
    c = lambda t: pattern_of(correction("Final Answer: Ellen Jones", "Final Answer: Ellen Page Jones", ("Ellen Page",), reward="token_f1", t=t))
    assert [c(t) for t in (.4, .6, .9)] == ["to another right", "to right", "to another wrong"]


texts = st.one_of(st.sampled_from([wrong, right, "", "Ellen Page", "Final Answer:", "Final Answer: Ellen Page or Reese", "**Final Answer:** ellen page", wrong.lower()]),
                  st.builds(answer, st.text(max_size=12), st.sampled_from(["Ellen Page", "Jodie", "", "*", "ELLEN page."])))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_shares_are_the_measures_and_rows_stay(pairs):
    rows = rows_of(pairs).set_index(pd.Index(range(100, 100 + len(pairs))))
    out, m = label(rows), measure(rows)
    pd.testing.assert_frame_equal(out[list(rows)], rows)
    share = pattern_counts(out, share=True).iloc[0]
    assert share["to right"] == pytest.approx(m["i_to_c"]) and share["away from right"] == pytest.approx(m["c_to_i"]) and share.sum() == pytest.approx(1)
    assert set(out.pattern) <= set(PATTERNS)
    for o in out.itertuples():                                                  # each row as if it were the only one
        c = correction(o.init_text, o.corr_text)._replace(question_id=o.question_id, question="", references=())
        assert (o.pattern, o.tags) == (pattern_of(c), tags_of(c))
        assert o.edit_distance == edit_distance(o.init_text.split(), o.corr_text.split()) and 0 <= o.edit_share <= 1
        assert (o.edit_distance == 0) == (o.init_text.split() == o.corr_text.split())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["Juno", "is", "Ellen", "film", "7", "naïve", "x"]), min_size=1, max_size=8), st.data())
def test_dress_is_never_taken_for_content(words, data):
    dress = st.sampled_from(["{}", "**{}**", "{},", "_{}_", "“{}”", "{}!", "({})", "`{}`", "✓ {}"])
    dressed = " ".join(data.draw(dress).format(data.draw(st.sampled_from([w, w.upper()]))) for w in words)
    c = correction(answer(" ".join(words), "Reese"), answer(dressed, "reese"))
    assert pattern_of(c) in ("format only", "repeated")
    assert pattern_of(correction(answer(" ".join(words), "Reese"), answer(dressed + " indeed", "reese"))) == "reasoning only"


# --- tags

@pytest.mark.parametrize("holds,first,second", [
    (True, answer("Either Ellen Page or Reese Witherspoon.", "Reese Witherspoon"), right),
    (True, answer("Either ELLEN PAGE or Reese Witherspoon.", "Reese Witherspoon"), answer("", "Ellen Page, now Elliot Page")),       # the reference that it contains
    (True, "Ellen Page it was", right),                                                            # no answer, and the answer in the text
    (True, answer("Jodie Foster or Reese?", "Reese"), answer("", "Jodie Foster")),                 # a wrong one
    (False, right, right),                                                                         # nothing moved
    (False, wrong, right),                                                                         # a new one
    (False, answer("Ellen Pageant", "Reese"), right),                                              # token by token, not letter by letter
    (False, answer("Ellen and Page", "Reese"), right),
    (False, answer("Who?", "Ellen Page Jones of Reese"), answer("", "Ellen Page")),                # in the first answer, not in its reasoning
    (False, answer("There is no doubt.", "Yes"), answer("", "No")),
    (False, answer("7+8=15, carry 1", "565"), answer("7+8=15", "1")),                              # a digit stands anywhere
    (False, answer("Who?", "Reese"), "no more"),
])
def test_answer_stood_in_the_first_reasoning(holds, first, second): assert ("in first reasoning" in tags_of(correction(first, second))) == holds


@pytest.mark.parametrize("text", ["I am not sure.", "I'm not entirely sure", "not certain", "It might be Ellen", "may have been", "It could possibly be", "It could refer to Tracy", "unclear",
                                  "I DON'T KNOW", "we don’t know", "I cannot determine it", "can't confirm that", "Perhaps so", "is likely 'Tracy'", "I think it is Jodie", "I believe so", "not enough information"])
def test_hedges(text):
    assert "hedged" in tags_of(correction(wrong, answer(text, "Jodie"))) and "hedged" not in tags_of(correction(answer(text, "Jodie"), answer("Surely.", "Jodie")))


@pytest.mark.parametrize("text", ["In May 1945", "It is unlikely", "surely", "a certain Mr. X", "It could not be Jodie", "I cannot think of anyone", "Let me think step by step", "the maybelline brand",
                                  "I think step by step", "a probable cause", "for or against"])
def test_no_hedges(text): assert "hedged" not in tags_of(correction(wrong, answer(text, "Jodie")))


@pytest.mark.parametrize("final,references,hedged", [
    ("Ellen Page or Jodie Foster", ("Ellen Page",), True), ("Jodie or Ellen Page", ("Ellen Page",), True), ("Trick or Treat", ("Trick or Treat",), False),
    ("The film Trick or Treat", ("Trick or Treat",), False), ("Trick or Treat or Juno", ("Trick or Treat",), True), ("Portland, OR", ("Portland",), False),
    ("Oregon", ("Oregon",), False), ("Trick or Treat", (), True)])
def test_one_thing_or_another(final, references, hedged): assert ("hedged" in tags_of(correction(wrong, answer("", final), references))) == hedged


def test_cut_off_and_no_first_answer():
    assert tags_of(correction("hm", "and then", finish="length")) == ("cut off", "no first answer")
    rows = rows_of([(wrong, "and then")])
    assert label(rows).tags[0] == () and label(rows.assign(corr_finish_reason="length")).tags[0] == ("cut off",)


# --- edit distance

def textbook(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1): row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


words = st.lists(st.sampled_from(["a", "b", "c", "é", "", "ab"]), max_size=70)


@settings(max_examples=200, deadline=None)
@given(words, words)
def test_distance_is_the_textbooks(a, b): assert edit_distance(a, b) == textbook(a, b) == edit_distance(b, a)


@settings(max_examples=60, deadline=None)
@given(words, words, words)
def test_distance_is_a_distance(a, b, c):
    assert edit_distance(a, a) == 0 and abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 700])
def test_distance_across_machine_words(n):
    rng = random.Random(n)
    a, b = ([rng.choice("ab") for _ in range(n + rng.randrange(5))] for _ in range(2))
    given = (a.copy(), b.copy())
    assert edit_distance(a, b) == textbook(a, b) and (a, b) == given


# --- slips

@settings(max_examples=150, deadline=None)
@given(st.integers(100, 999), st.integers(100, 999), st.integers(0, 10**6), st.sampled_from([0, .5]), st.sampled_from([0, .3]))
def test_slips_refine_the_kinds_of_error(a, b, seed, forget, slip):
    text = scratchpad(a, b, random.Random(seed), forget, slip)
    kind, coarse = slip_kind(f"{a}+{b}", text), error_kind(f"{a}+{b}", text)
    assert kind == coarse if coarse in ("right", "forgotten carry") else kind == "off by one"
    final = text.rpartition(": ")[2]
    noted = slip_kind(f"{a}+{b}", text.replace(f"Answer: {final}", f"Answer: {int(final) + 1}"))
    if text == scratchpad(a, b, random.Random(0), 0, 0): assert noted == "wrong final answer"
    elif kind == "right": assert noted in ("forgotten carry", "off by one", "wrong carry")          # two slips had made up for each other
    else: assert noted == (kind if int(final) + 1 != a + b else "right")


@pytest.mark.parametrize("text,kind", [
    ("", "another form"), ("632", "another form"), ("Final Answer: 632", "right"), ("7+5=12, carry 1\nFinal Answer: 1", "another form"),
    ("7+5=17, carry 1\n4+8+1=13, carry 1\n3+2+1=6\nFinal Answer: 637", "wrong column sum"), ("7+5=12, carry 1\n4+8=12, carry 1\n3+2+1=6\nFinal Answer: 622", "forgotten carry"),
    ("7+6=13, carry 1\n4+8+1=13, carry 1\n3+2+1=6\nFinal Answer: 633", "wrong digits"), ("7+5+1=13, carry 1\n4+8+1=13, carry 1\n3+2+1=6\nFinal Answer: 633", "wrong carry")])
def test_slip(text, kind): assert slip_kind("347+285", text) == kind


def test_slips_only_where_it_is_an_addition():
    rows = rows_of([("Final Answer: 632", "Final Answer: 622")] * 2, ("632",)).assign(question_id=["347+285", "who"])
    out = label(rows)
    assert out.init_slip.tolist()[0] == "right" and out.corr_slip.tolist()[0] == "another form" and out.init_slip.isna().tolist() == [False, True]
    assert "init_slip" not in label(rows.assign(question_id=["who", "where"]))


# --- tables

def test_a_run_is_labelled_with_its_questions_and_threshold(tmp_path):
    def answers(prompt, rng, skill): return rng.choice([answer("Trick or Treat", "Trick or Treat"), answer("It is Juno", "Juno"), "nothing"])
    ask = lambda s: tuple(Question(f"{s}{i}", f"{s} {i}?", ("Trick or Treat",)) for i in range(6))
    cfg = Config(variant="EIE", iterations=1, n_init=2, n_corr=2, n_train=6, n_test=6, data="own")
    run = STaSC(cfg, tmp_path / "run", data=Data(ask("train"), ask("test")), engine=ScriptedEngine(answers), callbacks=[]).run()
    out = label(run)
    assert len(out) == len(run.trajectories) and not out.tags.map(lambda t: "hedged" in t).any()
    assert label(run.trajectories).tags.map(lambda t: "hedged" in t).any()                                      # nobody told which titles are references
    for questions in (run.data, [*run.data.train, *run.data.test], {q.id: q for q in (*run.data.train, *run.data.test)}):
        pd.testing.assert_frame_equal(label(run.trajectories, questions), out)
    for split in ("train", "test"):
        counts = pattern_counts(out, split)
        assert counts.index.tolist() == [0, 1] and list(counts) == list(PATTERNS)
        assert np_equal(counts["to right"] / counts.sum(axis=1), run.metrics[f"{split}_i_to_c"]) and np_equal(counts["away from right"] / counts.sum(axis=1), run.metrics[f"{split}_c_to_i"])
    order = random.Random(0).sample(range(len(out)), len(out))
    pd.testing.assert_frame_equal(label(run.trajectories.iloc[order], run.data), out.iloc[order])


def np_equal(a, b): return (abs(a - b) < 1e-12).all()


def test_counts_of_tags_and_of_a_table_without_iterations():
    out = label(rows_of([(wrong, right), (wrong, wrong), ("", answer("I am not sure", "X"))]))
    assert pattern_counts(out, tags=True).iloc[0].to_dict() == {"in first reasoning": 0, "hedged": 1, "cut off": 0, "no first answer": 1}
    assert pattern_counts(out.drop(columns=["iteration", "split"])).loc[0, "repeated"] == 1
    empty = label(rows_of([(wrong, right)]).iloc[:0])
    assert len(empty) == 0 and {"pattern", "tags", "edit_distance"} <= set(empty) and len(examples(empty, "to right")) == 0 and len(pattern_counts(empty)) == 0


def test_examples_are_spread_over_questions():
    rows = rows_of([(wrong, right)] * 30)
    out = label(pd.concat([rows, rows.assign(corr_index=1)], ignore_index=True))
    assert examples(out, "to right", 3).question_id.tolist() == ["q0", "q14", "q29"] and len(examples(out, "to right", 99)) == 30
    assert len(examples(out, "to right", 0)) == len(examples(out, "repeated")) == len(examples(out, "to right", iteration=4)) == 0
    assert examples(out, "to right", 1).question_id.tolist() == ["q0"]


# --- one's own rules

def test_own_rules_take_and_leave():
    c = correction(wrong, right)
    @add_pattern("mine")
    def mine(c): return "Juno" in c.corr_text
    assert pattern_of(c) == "mine" and list(PATTERNS)[0] == "mine"
    add_pattern("mine", mine, before="to another wrong")
    assert pattern_of(c) == "to right" and list(PATTERNS)[-2:] == ["mine", "to another wrong"] and len(PATTERNS) == 9
    add_pattern("short", lambda c: len(c.corr_text) < 200, tag=True)
    assert tags_of(c) == ("short",)
    out = label(rows_of([(wrong, answer("Juno", "X"))]))
    assert out.pattern[0] == "mine" and pattern_counts(out)["mine"].tolist() == [1]
    del PATTERNS["mine"]
    assert pattern_counts(out)["mine"].tolist() == [1] and len(examples(out, "mine")) == 1                      # labelled while the rule was there


def test_no_rule_holds():
    del PATTERNS["to another wrong"]
    out = label(rows_of([(wrong, answer("", "X"))]))
    assert out.pattern[0] == "other" and pattern_counts(out).sum(axis=1).tolist() == [1]


broken = {
    "a pattern 'repeated' is there already": lambda: add_pattern("repeated", lambda c: True),
    "a pattern 'hedged' is there already": lambda: add_pattern("hedged", lambda c: True),
    "did you mean 'to right'": lambda: add_pattern("x", lambda c: True, before="to rigth"),
    "is no function but 'rule'": lambda: add_pattern("x", "rule"),
    "lacks the columns init_text, corr_answer": lambda: label(rows_of([(wrong, right)]).drop(columns=["init_text", "corr_answer"])),
    "has no text or no reward": lambda: label(rows_of([(wrong, right)]).assign(corr_text=[None])),
    "got Question": lambda: label(question),
    "pass them through label first": lambda: examples(rows_of([(wrong, right)]), "to right"),
    "unknown pattern 'improved'": lambda: examples(label(rows_of([(wrong, right)])), "improved"),
    "unknown split 'valid'": lambda: pattern_counts(label(rows_of([(wrong, right)])), "valid"),
}


@pytest.mark.parametrize("said", broken)
def test_one_sentence_says_what_is_wrong(said):
    with pytest.raises(StascError) as e: broken[said]()
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_rule_that_fails_is_named():
    add_pattern("mine", lambda c: c.init_answer.strip() == "")
    with pytest.raises(DataError, match="pattern 'mine' failed on a trajectory of question 'q0': AttributeError"): label(rows_of([("no label", right)]))


# --- hostile text

HOSTILE = ["<script>alert(1)</script>", "\x00\x1b[31m", "\u202eevil\u202c", "$$\\frac{1}{0}$$", "\u0301" * 200, "٣+٤=٧ ½", "final answer" * 500, "not " * 5000, "1" + " " * 50_000 + "=",
           "Step" + "-" * 50_000, "maybe\n" * 1000, "word " * 20_000, "x" * 1_000_000, "Final Answer: " + "or " * 3000, "\r\n\r\n", "🏳️‍🌈" * 50]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_labelled(text):
    out = label(rows_of([(text, text), (wrong, text), (text, right), (text, answer(text, text)), (answer(text, text), text + text)]), [question])
    assert set(out.pattern) <= set(PATTERNS) and out.pattern[0] == "repeated" and out.edit_share.between(0, 1).all()


def test_half_a_character_is_labelled():
    "Arrow's text columns refuse a lone surrogate; one's own tables may hold it."
    assert pattern_of(correction(wrong, "Final Answer: \ud800")) == "no answer" and tags_of(correction("\ud800", "\ud800")) == ("no first answer",)


def test_additions_of_the_task_itself():
    "On answers of a careless calculator each mended carry is a move to right."
    rng, rows = random.Random(0), []
    for q in arithmetic_questions("train", 100):
        a, b = summands(q.id)
        rows.append(rows_of([(scratchpad(a, b, rng, 1), scratchpad(a, b))], q.references, question_id=q.id))
    out = label(pd.concat(rows, ignore_index=True))
    assert set(out.corr_slip) == {"right"} and set(out.init_slip) == {"right", "forgotten carry"}
    assert ((out.init_slip == "forgotten carry") == (out.pattern == "to right")).all() and ((out.init_slip == "right") == (out.pattern == "repeated")).all()
