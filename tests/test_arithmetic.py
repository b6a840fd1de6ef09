"The arithmetic task: right without noise, careless with it, and partitions that hold the same kind of question."
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasc.arithmetic import (PARTITIONS, addition, arithmetic_questions, draw_pair, error_kind, n_carries, parse_scratchpad,
                              partition_of, scratchpad, summands)
from stasc.core import DataError

numbers = st.integers(100, 999)
ALL_PAIRS = [(a, b) for a in range(100, 1000) for b in range(a, 1000)]


@pytest.fixture(scope="module")
def by_partition():
    found = {name: [] for name in PARTITIONS}
    for pair in ALL_PAIRS: found[partition_of(*pair)].append(pair)
    return found


# --- answers

@given(numbers, numbers)
def test_scratchpad_is_right_without_noise(a, b):
    text = scratchpad(a, b)
    assert text.endswith(f"\nFinal Answer: {a + b}")
    assert error_kind(f"{a}+{b}", text) == "right"
    carry = 0
    for i, (x, y, carry_in, total, carry_out) in enumerate(parse_scratchpad(text)):
        assert (x, y, carry_in) == (a // 10**i % 10, b // 10**i % 10, bool(carry))
        assert total == x + y + carry
        carry = int(total > 9)
        assert carry_out == (carry == 1 and i < 2)


@given(numbers, numbers, st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_noisy_scratchpad_keeps_the_form(a, b, seed, p_forget, p_slip):
    text = scratchpad(a, b, random.Random(seed), p_forget, p_slip)
    columns = parse_scratchpad(text)
    assert columns is not None and [c[:2] for c in columns] == [(a // 10**i % 10, b // 10**i % 10) for i in range(3)]
    digits = f"{columns[2][3]}{columns[1][3] % 10}{columns[0][3] % 10}"
    assert text.endswith(f"Final Answer: {digits}")
    assert (error_kind(f"{a}+{b}", text) == "right") == (digits == str(a + b))


@given(numbers, numbers, st.integers(0, 2**32))
def test_forgotten_carries_are_named(a, b, seed):
    kind = error_kind(f"{a}+{b}", scratchpad(a, b, random.Random(seed), p_forget=1))
    assert kind == ("forgotten carry" if n_carries(a, b) else "right")


@given(numbers, numbers, st.integers(0, 2**32))
def test_slips_are_named(a, b, seed):
    assert error_kind(f"{a}+{b}", scratchpad(a, b, random.Random(seed), p_slip=1)) in ("wrong column sum", "right")


def test_noise_has_the_stated_size():
    rng, due, forgotten, slipped = random.Random(0), 0, 0, 0
    for _ in range(5000):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        for i, (x, y, carry_in, total, carry_out) in enumerate(parse_scratchpad(scratchpad(a, b, rng, .7, .08))):
            slipped += total != x + y + carry_in
            due += i < 2 and total > 9
            forgotten += i < 2 and total > 9 and not carry_out
    assert forgotten / due == pytest.approx(.7, abs=.02)
    assert slipped / 15000 == pytest.approx(.08, abs=.01)


@given(numbers, numbers, st.text())
def test_any_text_has_a_kind(a, b, text):
    assert error_kind(f"{a}+{b}", text) in ("right", "forgotten carry", "wrong column sum", "other")
    assert error_kind(f"{a}+{b}", f"{text}\nFinal Answer: {a + b}") == "right"


@pytest.mark.parametrize("last, kind", [("Final Answer: 632", "right"), ("Final Answer:632 ", "right"), ("Final Answer: 6320", "other"),
                                        ("Final Answer: 632\nFinal Answer: 1", "other"), ("632", "other"), ("", "other")])
def test_the_last_final_answer_counts(last, kind):
    assert error_kind("347+285", last) == kind


@pytest.mark.parametrize("bad", ["", "347", "347-285", "47+285", "0347+285", "347+285+1", "a+b", "347 + 285"])
def test_other_ids_are_refused(bad):
    with pytest.raises(DataError, match="347\\+285"): summands(bad)


# --- partitions

def test_partitions_are_disjoint_and_complete(by_partition):
    assert sum(map(len, by_partition.values())) == len(ALL_PAIRS)
    for a, b in random.Random(0).sample(ALL_PAIRS, 2000): assert partition_of(a, b) == partition_of(b, a)
    drawn = {name: {frozenset(summands(q.id)) for q in arithmetic_questions(name, 5000)} for name in PARTITIONS}
    for one in PARTITIONS:
        for other in PARTITIONS: assert one == other or not drawn[one] & drawn[other]


def test_partition_sizes(by_partition):
    shares = {name: len(pairs) / len(ALL_PAIRS) for name, pairs in by_partition.items()}
    assert shares == pytest.approx(dict(train=.1, dev=.1, test=.1, pretrain=.7), abs=.005)


@pytest.mark.parametrize("name", PARTITIONS)
def test_carries_and_digits_are_spread_evenly(by_partition, name):
    def share(pairs, has): return sum(has(a, b) for a, b in pairs) / len(pairs)
    carries = [lambda a, b: a % 10 + b % 10 > 9, lambda a, b: a % 100 + b % 100 > 99, lambda a, b: a + b > 999]
    for has in [*carries, *(lambda a, b, n=n: n_carries(a, b) == n for n in range(3))]:
        assert share(by_partition[name], has) == pytest.approx(share(ALL_PAIRS, has), abs=.01)
    for i in range(3):
        for number in (0, 1):
            here, overall = (Counter(p[number] // 10**i % 10 for p in pairs) for pairs in (by_partition[name], ALL_PAIRS))
            for d in range(10): assert here[d] / len(by_partition[name]) == pytest.approx(overall[d] / len(ALL_PAIRS), abs=.01)


# --- questions

@given(st.sampled_from(PARTITIONS), st.integers(0, 60), st.integers(0, 2**31))
def test_questions_are_deterministic_and_distinct(partition, n, seed):
    questions = arithmetic_questions(partition, n, seed)
    assert questions == arithmetic_questions(partition, n + 5, seed)[:n]
    assert len({frozenset(summands(q.id)) for q in questions}) == n
    for q in questions:
        a, b = summands(q.id)
        assert q == addition(a, b) and partition_of(a, b) == partition
        assert re.fullmatch(r"What is \d{3} \+ \d{3}\?", q.text) and q.references == (str(a + b),)


def test_questions_do_not_depend_on_the_process():
    code = "from stasc.arithmetic import arithmetic_questions as f; print([q.id for q in f('test', 20, 3)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == str([q.id for q in arithmetic_questions("test", 20, 3)]), done.stderr


def test_both_orders_of_a_pair_are_asked():
    assert {a < b for a, b in (summands(q.id) for q in arithmetic_questions("train", 50))} == {True, False}


@pytest.mark.parametrize("partition, n", [("tset", 1), ("", 1), ("test", -1), ("test", 10**6)])
def test_impossible_draws_are_refused(partition, n):
    with pytest.raises(DataError): arithmetic_questions(partition, n)


def test_unknown_partition_names_the_nearest():
    with pytest.raises(DataError, match="did you mean 'test'"): draw_pair("tset", random.Random(0))


def test_no_torch_is_imported():
    code = "import sys, stasc.arithmetic; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
