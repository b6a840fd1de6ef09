"Fictional facts: the world, its partitions and questions, and the model that half knows it."
import math
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasc.core import Config, ConfigError, DataError, ModelError
from stasc.data import load_questions
from stasc.facts import (KINDS, PARTITIONS, PERSONAL, QUESTIONS, SHARED, Fact, by_couple, couple_of, fact_error, fact_question, fact_questions, make_world,
                         parse_answer, question_kind, reasons, walk, write_answer)
from stasc.facts_model import account, facts_messages, gold_logprob, measure_facts, pretrain_batch, pretrain_text, question_example, statements
from stasc.model import embedded_path, find_model
from stasc.prompt import prompts_of, render_text

world = make_world()
seeds = st.integers(0, 2**32)
ids = st.sampled_from([f"{p}/{chain}" for p in world.couples for chain in QUESTIONS])


# --- world

def test_world_is_the_same_in_another_process():
    code = "from stasc.facts import make_world, fact_questions; print([*make_world().facts.values()][5], [q.id for q in fact_questions('test', 20)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == f"{[*world.facts.values()][5]} {[q.id for q in fact_questions('test', 20)]}", done.stderr


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_any_world_has_its_size_and_is_consistent(seed):
    w = make_world(seed)
    assert {k: len(v) for k, v in w.names.items()} == dict(person=160, city=36, country=12, company=24, job=12)
    assert len(w.facts) == 160 * len(PERSONAL) + 36 + 24 and len({n for v in w.names.values() for n in v}) == 244
    kind = {n: k for k, v in w.names.items() for n in v}
    for (subject, relation), f in w.facts.items():
        said = dict(birthplace="city", home="city", employer="company", spouse="person", seat="city").get(relation, relation)
        assert (f.subject, f.relation) == (subject, relation) and .25 <= f.share <= .7
        assert len({f.object, *f.rivals, subject}) == 4 and {kind[o] for o in (f.object, *f.rivals)} == {said}
    for p, (a, b) in w.couples.items():
        assert p in (a, b) and a < b and w.facts[a, "spouse"].object == b and w.facts[b, "spouse"].object == a


def test_no_name_holds_another_word():
    assert all(re.fullmatch(r"[A-Z]?[a-z]+", n) for names in world.names.values() for n in names)
    assert not {n.lower() for names in world.names.values() for n in names} & {"a", "an", "the", "of", "is", "final", "answer", "spouse", "country"}


def test_facts_are_told_as_often_as_they_say():
    rng = random.Random(0)
    for f in random.Random(1).sample([*world.facts.values()], 12):
        n, told = 4000, Counter(f.told(rng) for _ in range(4000))
        expected = [f.share, .65 * (1 - f.share), .35 * (1 - f.share)]
        assert [told[o] / n for o in (f.object, *f.rivals)] == pytest.approx(expected, abs=.035) and sum(told.values()) == n


# --- partitions

def test_partitions_are_disjoint_by_couple():
    by_partition = {name: {couple_of(q.id) for q in fact_questions(name)} for name in PARTITIONS}
    assert {name: len(c) for name, c in by_partition.items()} == PARTITIONS
    assert len(set.union(*by_partition.values())) == 80


def test_partitions_have_the_stated_sizes_and_distinct_questions():
    every = [q for name in PARTITIONS for q in fact_questions(name)]
    assert len(every) == len({q.id for q in every}) == len({q.text for q in every}) == 160 * 12
    assert {name: len(fact_questions(name)) for name in PARTITIONS} == dict(pretrain=768, train=528, test=528, dev=96)


def test_no_personal_fact_crosses():
    "Neither the truth nor a rival of a person's facts leads to a person of another partition; what two partitions share is cities and companies."
    used = defaultdict(set)
    for name in PARTITIONS:
        for q in fact_questions(name): used[name] |= {(s, r) for r, s, _ in walk(world, q.id)}
    for one in PARTITIONS:
        for other in PARTITIONS:
            if one != other: assert {r for _, r in used[one] & used[other]} <= set(SHARED)
    assert all({world.partition[o] for o in (f.object, *f.rivals)} == {world.partition[f.subject]} for f in world.facts.values() if f.relation == "spouse")


def test_pretraining_never_answers_a_question_of_another_partition():
    rng = random.Random(0)
    for _ in range(2000):
        messages, answer = question_example(world, rng)
        people = {w for w in re.findall(r"\w+", messages[-1]["content"] + answer) if w in world.partition}
        assert {world.partition[p] for p in people} == {"pretrain"}


def test_pretraining_tells_every_fact_and_speaks_of_everybody():
    rng = random.Random(0)
    assert {re.search(r"about (\w+)\.", account(world, rng)[0][0]["content"])[1] for _ in range(3000)} == set(world.couples)
    told = {(m[2], m[1]) for _ in range(3000) for text, _ in statements(world, rng) for m in re.finditer(r"The (\w+) of (\w+) is", text)}
    assert told == set(world.facts)


@pytest.mark.parametrize("name", PARTITIONS)
def test_answers_are_spread(name):
    "No answer is so frequent that guessing it would pay."
    for chain in QUESTIONS:
        answers = Counter(q.references[0] for q in fact_questions(name) if q.id.endswith("/" + chain))
        if name != "dev": assert max(answers.values()) / sum(answers.values()) < .4, (chain, answers.most_common(2))
    kinds = Counter(question_kind(q.id) for q in fact_questions(name))
    n = sum(kinds.values())
    assert kinds == {"one step": n * 5 // 12, "over the spouse": n * 4 // 12, "shared second step": n * 3 // 12}


# --- questions and answers

@given(ids)
def test_truth_is_right_and_read_back(i):
    q, path = fact_question(world, i), walk(world, i)
    assert q.references == (path[-1][2],) and i.split("/")[0] in q.text
    assert [r for r, _, _ in path] == i.split("/")[1].split() and all(a[2] == b[1] for a, b in zip(path, path[1:]))
    for reason in (True, False):
        text = write_answer(path, reason)
        assert fact_error(world, i, text) == "right" and reasons(text) == reason
        assert parse_answer(text) == (path if reason else [], path[-1][2])


@given(ids, seeds)
def test_first_mistake_is_named(i, seed):
    told, path = walk(world, i, random.Random(seed)), walk(world, i)
    kind = fact_error(world, i, write_answer(told))
    if told[-1][2] == path[-1][2]: assert kind == "right"
    else: assert kind == ("wrong first step" if told[0] != path[0] else "wrong second step")
    assert fact_error(world, i, write_answer(told, reason=False)) == ("right" if told[-1][2] == path[-1][2] else "no reasoning")


@given(ids, st.text())
def test_any_text_has_a_kind(i, text):
    assert fact_error(world, i, text) in KINDS
    assert fact_error(world, i, f"{text}\nFinal Answer: {walk(world, i)[-1][2]}") == "right"


@pytest.mark.parametrize("bad", ["", "/", "347+285", "Zuvor", "/job", "Zuvor/jobs", "Zuvor/job/job", "Zuvor/job spouse"])
def test_other_ids_are_refused(bad):
    with pytest.raises(DataError, match="no question about facts"): question_kind(bad)


@given(st.sampled_from([*PARTITIONS]), st.integers(0, 96))
def test_a_smaller_draw_begins_a_larger_one(name, n):
    assert fact_questions(name, n) == fact_questions(name)[:n]


@pytest.mark.parametrize("name, n", [("tset", 1), ("test", -1), ("test", 529), ("dev", 97)])
def test_impossible_draws_are_refused(name, n):
    with pytest.raises(DataError): fact_questions(name, n)


# --- errors over couples

def test_error_over_couples_is_that_of_the_means_where_couples_are_equal():
    qs, rng = fact_questions("test"), random.Random(0)
    values = [rng.random() for _ in qs]
    means = defaultdict(list)
    for q, v in zip(qs, values): means[couple_of(q.id)].append(v)
    m = [sum(v) / len(v) for v in means.values()]
    centre = sum(m) / len(m)
    assert by_couple([q.id for q in qs], values) == pytest.approx((centre, math.sqrt(sum((x - centre)**2 for x in m) / (len(m) - 1) / len(m))))


def test_drawing_again_does_not_shrink_the_error():
    qs = [q.id for q in fact_questions("test")]
    values = [random.Random(q).random() for q in qs]
    assert by_couple(qs, values) == pytest.approx(by_couple(qs * 4, values * 4))


# --- presets and files

def test_demo_ties_the_task_together():
    cfg = Config.demo(task="facts")
    assert (cfg.model, cfg.data, cfg.n_test_init) == ("embedded-facts", "facts", 4) and prompts_of(cfg).name == "facts"
    data = load_questions(cfg)
    assert [*data.train] == fact_questions("train") and [*data.test] == fact_questions("test") and not data.notes
    assert find_model(cfg.model) == str(embedded_path("facts")) and Config.demo() == Config.demo(task="arithmetic")
    with pytest.raises(ConfigError, match="did you mean 'facts'"): Config.demo(task="fact")
    with pytest.raises(ModelError, match="did you mean 'facts'"): find_model("embedded-fact")


def test_checkpoints_are_small_and_name_no_machine():
    files = [p for p in embedded_path("facts").parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 4e6
    for p in files: assert not re.search(rb"_name_or_path|/(home|root|tmp|work|Users)/|[A-Z]:\\\\", p.read_bytes()), p


def test_imports_are_light():
    for module, heavy in (("facts", "{'torch', 'transformers', 'numpy', 'pandas'}"), ("facts_model", "{'torch', 'transformers', 'tokenizers'}")):
        assert subprocess.run([sys.executable, "-c", f"import sys, stasc.{module}; assert not {heavy} & set(sys.modules)"]).returncode == 0


# --- the model

@pytest.fixture(scope="module", params=["facts", "facts-reasoned"])
def m0(request):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = embedded_path(request.param)
    return request.param, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_every_name_is_one_token_of_its_own(m0):
    _, model, tokenizer = m0
    names = [n for v in world.names.values() for n in v]
    tokens = [tokenizer(f" {n}").input_ids for n in names]
    assert all(len(t) == 1 for t in tokens) and len({t[0] for t in tokens}) == len(names) and model.config.vocab_size == len(tokenizer)


def test_labels_cover_objects_and_answers_alone(m0):
    _, _, tokenizer = m0
    texts = [pretrain_text(tokenizer, world, random.Random(i)) for i in range(12)]
    batch = pretrain_batch(tokenizer, texts)
    for text, ids, mask, labels in zip(texts, *batch.values()):
        assert tokenizer.decode(ids[mask == 1]) == "".join(piece for piece, _ in text)
        assert tokenizer.decode(labels[labels != -100]) == "".join(piece for piece, learned in text if learned)
        assert (labels[mask == 0] == -100).all()


def test_prompts_and_answers_fit(m0):
    _, model, tokenizer = m0
    longest = max((write_answer(walk(world, q.id)) for q in fact_questions("test")), key=len)
    assert len(tokenizer(longest).input_ids) + 1 <= 32
    assert len(tokenizer(render_text(tokenizer, facts_messages(fact_questions("test", 1)[0], longest))).input_ids) + 32 <= model.config.max_position_embeddings


def test_m0_is_partly_competent(m0):
    "On development questions; the test partition is for measuring runs."
    name, model, tokenizer = m0
    figures = measure_facts(model, tokenizer, world, fact_questions("dev"), draws=4)
    low, high, reasoned = dict(facts=(.22, .40, (.4, .7)), **{"facts-reasoned": (.28, .52, (.8, 1))})[name]
    for turn in figures.values():
        assert low < turn["accuracy"] < high and reasoned[0] < turn["reasons"] <= reasoned[1] and turn["other"] < .04


def test_gold_logprob_is_that_of_the_whole_text(m0):
    import torch
    _, model, tokenizer = m0
    qs = fact_questions("dev", 3)
    for q, p in zip(qs, gold_logprob(model, tokenizer, qs)):
        prompt = tokenizer(render_text(tokenizer, facts_messages(q)) + "Final Answer:").input_ids
        gold = tokenizer(f" {q.references[0]}").input_ids
        with torch.no_grad(): logits = model(torch.tensor([prompt])).logits[0, -1]
        assert len(gold) == 1 and p == pytest.approx(float(torch.log_softmax(logits, -1)[gold[0]]), abs=1e-4)
