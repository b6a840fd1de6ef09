"Attacks on `stasc.data`: malformed files, leaks, order, presets through the real `datasets`."
import csv, json, random, subprocess, sys, time, warnings
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from stasc.core import Config, DataError, Question
from stasc.data import PRESETS, Data, DataWarning, Preset, check_leak, load_questions, question_key, read_questions, split_questions

NQ = Path(__file__).resolve().parents[2]/"shared/data/nq_open"
needs_nq = pytest.mark.skipif(not NQ.exists(), reason="no ../shared/data/nq_open beside this checkout: real questions are not in the repository")
GOOD = dict(id=1, question="Who wrote Emma?", answer=["Jane Austen"])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def put(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return name

def jsonl(name, rows): return put(name, "".join(json.dumps(r) + "\n" for r in rows))
def sums(n, start=0): return [dict(id=f"s{i}", question=f"What is {i} + {i}?", answer=[str(2 * i)]) for i in range(start, start + n)]
def many(n): return [Question(f"q{i}", f"Question number {i}?", (str(i),)) for i in range(n)]

def error(*args, **kwargs):
    "The message of the `DataError` that reading gives: one line, and a sentence."
    with pytest.raises(DataError) as e: read_questions(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


# --- formats

def test_every_format_gives_the_same_questions():
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    rows = [GOOD, dict(id=2, question="Où est-ce ?", answer=["京", "a \u2028 b"])]
    jsonl("a.jsonl", rows)
    put("a.json", json.dumps(rows)); put("b.json", json.dumps(dict(version=1, data=rows), ensure_ascii=False))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    for name, d in (("a.csv", ","), ("a.tsv", "\t")):
        with open(name, "w", newline="", encoding="utf-8-sig") as f:
            w = csv.DictWriter(f, rows[0], delimiter=d); w.writeheader()
            w.writerows({**r, "answer": json.dumps(r["answer"])} for r in rows)
    want = [Question("1", "Who wrote Emma?", ("Jane Austen",)), Question("2", "Où est-ce ?", ("京", "a \u2028 b"))]
    for name in ("a.jsonl", "a.json", "b.json", "a.parquet", "a.csv", "a.tsv"): assert read_questions(name) == want, name

def test_what_pandas_writes_is_read():
    pd = pytest.importorskip("pandas")
    t = pd.DataFrame([dict(question="Who?", answer=["O'Neil", 'a "b"']), dict(question="When?", answer=["1815"])])
    t.to_csv("p.csv", index=False); t.to_parquet("p.parquet"); t.to_json("p.jsonl", orient="records", lines=True); t.to_json("p.json", orient="records")
    for name in ("p.csv", "p.parquet", "p.jsonl", "p.json"):
        assert [(q.text, q.references) for q in read_questions(name)] == [("Who?", ("O'Neil", 'a "b"')), ("When?", ("1815",))], name
    t["answer"] = [1815.0, None]
    t.to_parquet("n.parquet")
    assert error("n.parquet").startswith("n.parquet, row 2, column 'answer': null")

def test_line_ends_marks_and_blank_lines():
    assert len(read_questions(put("a.jsonl", b"\xef\xbb\xbf" + (json.dumps(GOOD) + "\r\n\r\n").encode()))) == 1
    assert read_questions(put("a.jsonl", '{"question": "a\u2028b\u0085c?", "answer": "x"}'))[0].text == "a\u2028b\u0085c?"
    assert read_questions(put("a.csv", 'question,answer\r\n"two\nlines?",x\r\n'))[0].text == "two\nlines?"

def test_references_in_many_shapes():
    values = ["x", ["x", "y", "x"], 1889, 1889.0, 1.5, True, False, {"text": ["x"]}, {"value": "x", "aliases": ["y", "x"]}, {"value": "x"}, {"value": "x", "aliases": None}]
    want = [("x",), ("x", "y"), ("1889",), ("1889",), ("1.5",), ("yes",), ("no",), ("x",), ("x", "y"), ("x",), ("x",)]
    assert [q.references for q in read_questions(jsonl("a.jsonl", [dict(question=f"q{i}", answer=v) for i, v in enumerate(values)]))] == want


# --- malformed input

@pytest.mark.parametrize("value, says", [(None, "null"), (float("nan"), "null"), ([], "an empty list"), (["x", None], "null"), ([["x"]], "no text"), ({"gold": 1}, "neither"),
                                         ({"text": []}, "an empty list"), ({"value": None}, "null"), ("\ud800", "surrogate"), (float("inf"), "no text")])
def test_bad_references(value, says):
    message = error(jsonl("a.jsonl", [GOOD] + [dict(id=2, question="When?", answer=value)]))
    assert message.startswith("a.jsonl, line 2, column 'answer': ") and says in message

@pytest.mark.parametrize("value, says", [(None, "null"), (3, "3 is no text"), (["q"], "no text"), ("", "is empty"), (" \n", "is empty"), ("\udc00", "surrogate")])
def test_bad_questions(value, says):
    message = error(jsonl("a.jsonl", [GOOD] + [dict(id=2, question=value, answer="x")]))
    assert message.startswith("a.jsonl, line 2, column 'question': ") and says in message

def test_bad_files():
    line = json.dumps(GOOD) + "\n"
    assert error("none.jsonl") == "none.jsonl: no such file"
    Path("folder.jsonl").mkdir()
    assert error("folder.jsonl") == "folder.jsonl: is a folder, expected a file"
    assert "unknown file type '.jsonk', did you mean '.json" in error(put("a.jsonk", line))
    for content in ("", "\n \n", "\ufeff"): assert error(put("a.jsonl", content)) == "a.jsonl: the file is empty"
    assert error(put("a.json", "[]")) == "a.json: holds no questions" == error(put("a.json", '{"data": []}'))
    assert error(put("a.csv", "question,answer\n")) == "a.csv: holds no questions"
    assert error(put("a.jsonl", line * 16 + line[:-3])).startswith("a.jsonl, line 17: not JSON (")
    assert error(put("a.jsonl", "\n\n[1]\n")) == "a.jsonl, line 3: expected an object with columns, found [1]"
    assert error(put("a.jsonl", line + "[" * 100_000)).startswith("a.jsonl, line 2: ")
    assert error(put("a.jsonl", line + '{"id": ' + "9" * 5000 + "}")).startswith("a.jsonl, line 2: JSON that cannot be read (Exceeds the limit")
    assert "with one object per line the file is called .jsonl" in error(put("a.json", line * 2))
    assert "expected a list of objects" in error(put("a.json", '{"question": "q"}')) and "expected a list" in error(put("a.json", "3"))
    assert error(put("a.jsonl", (line + line.replace("Emma", "É")).encode("latin-1"))) == "a.jsonl, line 2: not UTF-8 (byte 0xc9): save the file as UTF-8"
    assert "line 1: not UTF-8 (byte 0xff)" in error(put("a.csv", "question,answer\n".encode("utf-16")))
    for content in (b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", line.encode()): assert "a.parquet: not a Parquet file (" in error(put("a.parquet", content))

def test_bad_columns():
    assert error(put("a.csv", "q,gold\nx,y\n")) == "a.csv: no question column (question, question_text, query, problem): it has q, gold; name one with question_column"
    assert "no column 'anwser': it has id, question, answer; name one with reference_column" in error(jsonl("a.jsonl", [GOOD]), reference_column="anwser")
    assert error(jsonl("a.jsonl", [GOOD, dict(question="q", answer="x")])) == "a.jsonl, line 2: no column 'id', it has question, answer"
    assert "a.csv, line 3: 1 values for 2 columns" in error(put("a.csv", "question,answer\nx,y\nx\n"))
    assert "a.csv, line 3, column 'answer': null" in error(put("a.csv", "question,answer\nx,y\nz,\n"))
    assert "two columns have the same name" in error(put("a.csv", "question,answer,answer\nx,y,z\n"))
    assert "not CSV (" in error(put("a.csv", 'question,answer\n"x"y,z\n')) and "not CSV (" in error(put("a.csv", f'question,answer\n"{"x" * 200_000}",z\n'))
    assert "looks like a list" in error(put("a.csv", "question,answer\nx,\"['a' 'b']\"\n")) and "looks like a list" in error(put("a.csv", "question,answer\nx,\"[\"\"a\"\"\"\n"))

def test_ids():
    assert [q.id for q in read_questions(jsonl("few.jsonl", [dict(question="a", answer="x"), dict(question="b", answer="x")]))] == ["few-1", "few-2"]
    assert [q.id for q in read_questions(jsonl("few.jsonl", [dict(GOOD, id=7.0)]))] == ["7"]
    assert error(jsonl("a.jsonl", [dict(GOOD, id=i) for i in (1, 2, "1", 2, 3, 3, 4, 4)])).startswith("a.jsonl: ids that are used more than once: 4 (1, 2, 3, …)")
    assert "column 'id': null" in error(jsonl("a.jsonl", [dict(GOOD, id=None)]))

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda c: st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(["text", "value", "aliases", "x"]), c), max_leaves=5)

@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["id", "question", "answer", "context"]), json_values) | json_values, max_size=3), st.sampled_from(["fuzz.jsonl", "fuzz.json"]))
def test_any_json_gives_questions_or_a_data_error(rows, name):
    put(name, "".join(json.dumps(r) + "\n" for r in rows) if name.endswith("l") else json.dumps(rows))
    try: questions = read_questions(name)
    except DataError as e: assert str(e).startswith(name)
    else: assert all(q.text.strip() and q.references and all(isinstance(r, str) for r in (q.id, *q.references)) for q in questions)

@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["fuzz.jsonl", "fuzz.json", "fuzz.csv", "fuzz.tsv", "fuzz.parquet"]))
def test_any_bytes_give_questions_or_a_data_error(content, name):
    put(name, (b"question,answer\n" if name == "fuzz.csv" else b"question\tanswer\n" if name == "fuzz.tsv" else b"") + content)
    try: read_questions(name)
    except DataError as e: assert str(e).startswith(name)


# --- splits and leaks

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5), st.randoms())
def test_a_split_depends_on_the_questions_alone(n_train, n_test, seed, rng):
    questions = many(80)
    train, test = split_questions(questions, n_train, n_test, seed)
    assert (len(train), len(test)) == (n_train, n_test) and not {q.id for q in train} & {q.id for q in test}
    rng.shuffle(questions)
    assert split_questions(questions, n_train, n_test, seed) == (train, test)
    more, same = split_questions(questions, 40, n_test, seed)
    assert (more[:n_train], same) == (train, test)
    check_leak(train, test)

def test_another_seed_is_another_split():
    splits = [{q.id for q in split_questions(many(1000), 500, 500, s)[0]} for s in range(4)]
    assert all(200 < len(a & b) < 300 for i, a in enumerate(splits) for b in splits[:i])

REPEATS = ["Who wrote Emma?", "who wrote emma", " WHO  wrote the 'Emma' ?", "Who, wrote Emma."]
DIFFERENT = ["3 + 4", "3 - 4", "3 * 4", "34", "3.4", "3/4", "What is 1.5?", "What is 15?", "x+y", "x-y", "thé?", "María", "Marí", "the?", "C#", "C++", "C", "5€", "5$", "Who?", "?", "??!", "…"]

def test_repeated_questions_never_cross():
    assert len({question_key(Question("", t, ())) for t in REPEATS}) == 1
    keys = [question_key(Question("", t, ())) for t in DIFFERENT]
    assert len(set(keys)) >= len(keys) - 2                       # "the?", "?" and "??!" are nothing but articles and punctuation
    rows = many(10) + [Question(f"r{i}", t, (str(i),)) for i, t in enumerate(REPEATS)]
    for order in range(5):
        random.Random(order).shuffle(rows)
        with pytest.warns(DataWarning, match=r"rows left out because they repeat a question: 3 \(r"): train, test = split_questions(rows, 6, 5)
        keys = [question_key(q) for q in train + test]
        assert len(keys) == len(set(keys)) == 11
        assert order == 0 or (train, test) == first
        first = train, test
    with pytest.warns(DataWarning), pytest.raises(DataError, match="11 distinct questions, but n_train = 6 and n_test = 6 need 12"): split_questions(rows, 6, 6)

def test_the_same_question_about_another_passage_is_another_question():
    a, b = (Question(i, "Who won?", ("x",), context=c) for i, c in (("1", "passage one"), ("2", "passage two")))
    check_leak([a], [b])
    assert len(split_questions([a, b], 1, 1)) == 2

def test_leaks_are_named():
    with pytest.raises(DataError, match=r"in the training data as well: 5 of 6 \('question NUMBER 0' \(q0 and t0\), .* …\)"):
        check_leak(many(10), [Question(f"t{i}", f"question NUMBER {i}", ("x",)) for i in range(5)] + [Question("t", "new", ("x",))])


# --- load_questions

def test_a_file_is_split_and_two_files_are_kept_apart():
    one = load_questions(Config(data=jsonl("all.jsonl", sums(30)), n_train=10, n_test=20))
    assert (len(one.train), len(one.test), one.notes) == (10, 20, ())
    two = load_questions(Config(data="all.jsonl", test_data=jsonl("test.jsonl", sums(5, 100)), n_train=30, n_test=5))
    assert {q.id for q in two.test} == {f"s{i}" for i in range(100, 105)} and len(two.train) == 30
    for changes, says in ((dict(n_train=31), "all.jsonl: 30 distinct questions, but n_train = 31"), (dict(n_test=6), "test.jsonl: 5 distinct questions, but n_test = 6"),
                          (dict(test_data=jsonl("leak.jsonl", sums(3, 29))), "1 of 3"), (dict(test_data="none.csv"), "none.csv: no such file"), (dict(data="nqq"), "did you mean 'nq'?")):
        with pytest.raises(DataError, match=says.replace("?", r"\?")): load_questions(Config(**{**dict(data="all.jsonl", test_data="test.jsonl", n_train=30, n_test=5), **changes}))

def test_questions_are_the_same_for_every_seed_and_every_order():
    rows = sums(40)
    cfg = Config(data=jsonl("a.jsonl", rows), n_train=20, n_test=20)
    prints = {load_questions(cfg.replace(seed=s)).fingerprint for s in range(3)}
    random.Random(0).shuffle(rows)
    jsonl("a.jsonl", rows)
    assert prints == {load_questions(cfg).fingerprint}
    rows[0]["answer"] = ["another"]
    jsonl("a.jsonl", rows)
    assert prints != {load_questions(cfg).fingerprint}

def test_unmatchable_references_are_reported():
    jsonl("a.jsonl", [dict(id="ok", question="d", answer="x"), dict(id="some", question="b", answer=["x", "?"]), dict(id="none", question="c", answer=["The", ""])])
    with pytest.warns(DataWarning) as caught: data = load_questions(Config(data="a.jsonl", n_train=2, n_test=1))
    assert [str(w.message) for w in caught] == list(data.notes) and caught[0].filename == __file__
    assert "alone: 2 (" in data.notes[0] and "some" in data.notes[0] and data.notes[1].endswith("can never be answered right: 1 (none)")

def test_data_is_shown_small_and_escaped():
    evil = Question("<id>", "<script>alert(1)</script>" + "x" * 5000, ("<b>",), "<i>")
    data = Data((evil,), (), ("<note>",))
    page = data._repr_html_()
    assert "<script>" not in page and "<b>" not in page and "<note>" not in page and "&lt;script&gt;" in page and len(page) < 1000 and len(repr(data)) < 100
    assert list(data.frame().columns) == ["split", "question_id", "question", "references", "context"] and len(data.frame()) == 1
    assert Data((), ())._repr_html_() and len(Data((), ()).frame()) == 0 and len(data.fingerprint) == 64

def test_arithmetic():
    pytest.importorskip("stasc.arithmetic")
    cfg = Config(data="arithmetic", n_train=50, n_test=40)
    data = load_questions(cfg)
    check_leak(data.train, data.test)
    assert (len(data.train), len(data.test)) == (50, 40) and load_questions(cfg.replace(seed=9)).fingerprint == data.fingerprint
    assert load_questions(cfg.replace(n_train=20)).train == data.train[:20]

def test_data_is_light_to_import():
    code = "import sys, stasc.data; print([m for m in ('datasets', 'pandas', 'pyarrow', 'torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout.strip() == "[]"


# --- presets: the real `datasets` loads small local data in the true schema

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "Stands in for the Hub: an id leads to a local folder of Parquet files."
    datasets = pytest.importorskip("datasets")
    real, folders = datasets.load_dataset, {}
    def load(path, name=None, **kwargs):
        if path not in folders: raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        return real(str(folders[path]), name, cache_dir=str(tmp_path/"cache"), **kwargs)
    monkeypatch.setattr(datasets, "load_dataset", load)
    def publish(hub_id, **splits):
        folders[hub_id] = tmp_path/hub_id.replace("/", "--")
        for split, rows in splits.items():
            (folders[hub_id]/"data").mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(str(folders[hub_id]/"data"/f"{split}-00000-of-00001.parquet"))
    return publish

def test_preset_nq(hub):
    row = lambda i: dict(question_id=f"id{i}", question_text=f"who is number {i}", reference=[f"n{i}", f"number {i}"], context="")
    hub("VityaVitalich/adaptive_rag_natural_questions", train=[row(i) for i in range(30)], test=[row(i) for i in range(28, 40)])
    with pytest.warns(DataWarning, match="training questions left out because they stand in the test split: 2"):
        data = load_questions(Config(data="nq", n_train=28, n_test=12))
    assert {q.id for q in data.test} == {f"id{i}" for i in range(28, 40)} and {q.id for q in data.train} == {f"id{i}" for i in range(28)}
    assert data.train[0].references == (f"n{data.train[0].id[2:]}", f"number {data.train[0].id[2:]}")
    with pytest.raises(DataError, match="nq: 28 distinct questions, but n_train = 29"): load_questions(Config(data="nq", n_train=29, n_test=12))

def test_preset_nq_open(hub):
    hub("google-research-datasets/nq_open", train=[dict(question=f"who is number {i}", answer=[f"n{i}"]) for i in range(9)],
        validation=[dict(question=f"where is number {i}", answer=[f"n{i}", "x"]) for i in range(5)])
    data = load_questions(Config(data="nq_open", n_train=9, n_test=5))
    assert sorted(q.id for q in data.test) == [f"validation-{i}" for i in range(1, 6)] and {len(q.references) for q in data.test} == {2}
    jsonl("test.jsonl", [dict(question="Who is number 3?", answer="x")])
    with pytest.raises(DataError, match=r"'Who is number 3\?' \(train-4 and test-1\)"): load_questions(Config(data="nq_open", test_data="test.jsonl", n_train=5, n_test=1))

def test_a_preset_without_a_test_split_is_split(hub, monkeypatch):
    hub("me/mine", train=[dict(problem=f"what is {i}", solution=i) for i in range(10)])
    monkeypatch.setitem(PRESETS, "mine", Preset("me/mine", question="problem", reference="solution", test=None))
    data = load_questions(Config(data="mine", n_train=6, n_test=4))
    assert len({q.id for q in data.train + data.test}) == 10 and data.train[0].references[0].isdigit()
    with pytest.raises(DataError, match=r"me/mine \(split train\): no column 'nope': it has problem, solution"): load_questions(Config(data="mine", reference_column="nope"))

@pytest.mark.parametrize("name", ["nq", "nq_open"])
def test_unreachable_data_set(hub, name):
    with pytest.raises(DataError) as e: load_questions(Config(data=name))
    for part in (PRESETS[name].hub, "can neither be reached nor found in the cache", "Couldn't reach", "--data FILE"): assert part in str(e.value)


# --- real questions

@needs_nq
def test_natural_questions_open():
    data = load_questions(Config(data=str(NQ/"NQ-open.dev.jsonl")))
    check_leak(data.train, data.test)
    assert (len(data.train), len(data.test)) == (500, 500)
    start, questions = time.perf_counter(), read_questions(NQ/"NQ-open.dev.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split_questions(questions, 500, 500)
    print(f"\n{len(questions)} questions read and split in {time.perf_counter() - start:.2f} s; notes: {data.notes}")
    assert len(questions) == 3610
