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
    "Stands in for the Hub: an id (and a revision) leads to a local folder of Parquet files with a card that names its configurations."
    datasets = pytest.importorskip("datasets")
    real, folders, asked = datasets.load_dataset, {}, []
    def load(path, name=None, revision=None, **kwargs):
        asked.append(dict(path=path, name=name, revision=revision, **kwargs))
        folder = folders.get((path, "refs/convert/parquet" if revision == "refs/convert/parquet" else None))
        if folder is None: raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        return real(str(folder), name, cache_dir=str(tmp_path/"cache"), **kwargs)
    monkeypatch.setattr(datasets, "load_dataset", load)
    def publish(hub_id, config=None, features=None, script=False, **splits):
        folder = folders[hub_id, None] = tmp_path/hub_id.replace("/", "--")
        where = folder/(config or "data")
        where.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            datasets.Dataset.from_list(rows, features=features).to_parquet(str(where/f"{split}-00000-of-00001.parquet"))
        files = "".join(f"  - split: {s}\n    path: {where.name}/{s}-*\n" for s in splits)
        (folder/"README.md").write_text(f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n{files}---\n")
        if script:                              # as it is for data sets with a script: Parquet stands at another revision, CONFIG/SPLIT/0000.parquet
            copy = folders[hub_id, "refs/convert/parquet"] = tmp_path/(folder.name + "-parquet")
            for split in splits:
                (copy/(config or "default")/split).mkdir(parents=True)
                (where/f"{split}-00000-of-00001.parquet").rename(copy/(config or "default")/split/"0000.parquet")
            (folder/"README.md").unlink()
            (folder/f"{folder.name}.py").write_text("raise SystemExit('this must not run')")
    publish.asked, publish.features = asked, datasets
    return publish

def load(data, n_train, n_test, **kw): return load_questions(Config(data=data, n_train=n_train, n_test=n_test, **kw))
def ask(i): return f"who is number {i}"

def test_preset_nq(hub):
    row = lambda i: dict(question_id=f"id{i}", question_text=ask(i), reference=[f"n{i}", f"number {i}"], context="")
    hub("VityaVitalich/adaptive_rag_natural_questions", train=[row(i) for i in range(30)], test=[row(i) for i in range(28, 40)])
    with pytest.warns(DataWarning, match="training questions left out because they stand in the test split: 2"): data = load("nq", 28, 12)
    assert {q.id for q in data.test} == {f"id{i}" for i in range(28, 40)} and {q.id for q in data.train} == {f"id{i}" for i in range(28)}
    assert data.train[0].references == (f"n{data.train[0].id[2:]}", f"number {data.train[0].id[2:]}")
    with pytest.raises(DataError, match="nq: 28 distinct questions, but n_train = 29"): load("nq", 29, 12)

def test_preset_nq_open(hub):
    hub("google-research-datasets/nq_open", "nq_open", train=[dict(question=ask(i), answer=[f"n{i}"]) for i in range(9)],
        validation=[dict(question=f"where is number {i}", answer=[f"n{i}", "x"]) for i in range(5)])
    data = load("nq_open", 9, 5)
    assert sorted(q.id for q in data.test) == [f"validation-{i}" for i in range(1, 6)] and {len(q.references) for q in data.test} == {2}
    assert {a["revision"] for a in hub.asked} == {PRESETS["nq_open"].revision}
    jsonl("test.jsonl", [dict(question="Who is number 3?", answer="x")])
    with pytest.raises(DataError, match=r"'Who is number 3\?' \(train-4 and test-1\)"): load("nq_open", 5, 1, test_data="test.jsonl")

def test_preset_trivia_qa(hub):
    answer = lambda i: dict(aliases=[f"N{i}", f"the {i}th", f"N{i}"], normalized_aliases=[f"n{i}"], matched_wiki_entity_name="", normalized_matched_wiki_entity_name="", normalized_value=f"n{i}", type="WikipediaEntity", value=f"N{i}")
    row = lambda i: dict(question=ask(i), question_id=f"tc_{i}", question_source="http://x", entity_pages=dict(title=[f"T{i}"]), search_results=dict(title=["t"]), answer=answer(i))
    hub("mandarjoshi/trivia_qa", "rc.nocontext", train=[row(i) for i in range(6)] + [row(3)], validation=[row(i) for i in range(10, 13)])
    with pytest.warns(DataWarning, match=r"left out because they repeat a question: 1 \(row 7\)"): data = load("trivia_qa", 6, 3)
    assert {q.references for q in data.test} == {(f"N{i}", f"the {i}th") for i in (10, 11, 12)} and {q.id for q in data.train} == {f"tc_{i}" for i in range(6)}

def test_preset_squad(hub):
    row = lambda i: dict(id=f"s{i}", title="T", context=f"Passage {i}.", question="Who won?", answers=dict(text=["Ann", "Ann", f"Ann {i}"], answer_start=[1, 1, 1]))
    hub("rajpurkar/squad", "plain_text", train=[row(i) for i in range(5)] + [dict(row(9), question=" "), dict(row(10), answers=dict(text=[], answer_start=[]))], validation=[row(i) for i in range(20, 24)])
    with pytest.warns(DataWarning, match=r"have no question or no reference: 2 \(row 6, row 7\)"): data = load("squad", 5, 4)
    assert data.test[0].context.startswith("Passage 2") and data.test[0].references[0] == "Ann" and len(data.test[0].references) == 2

@pytest.mark.parametrize("script", [False, True])
def test_preset_hotpot_qa_with_and_without_context(hub, script):
    row = lambda i: dict(id=f"h{i}", question=ask(i), answer="yes" if i % 2 else f"n{i}", type="bridge", level="hard", supporting_facts=dict(title=["A"], sent_id=[0]),
                         context=dict(title=["A", "B"], sentences=[["One. ", f"Two {i}."], ["Three."]]))
    hub("hotpotqa/hotpot_qa", "distractor", script=script, train=[row(i) for i in range(6)], validation=[row(i) for i in range(10, 13)])
    assert all(q.context is None for q in load("hotpot_qa", 6, 3).train)
    assert {q.context for q in load("hotpot_qa_context", 6, 3).test} == {f"A: One. Two {i}.\n\nB: Three." for i in (10, 11, 12)}
    assert any(a["revision"] == "refs/convert/parquet" and a["data_dir"] == "distractor" for a in hub.asked) == script
    assert len(load("hotpot_qa:train[:4]", 4, 3).train) == 4

def test_preset_boolq(hub):
    row = lambda i: dict(question=f"is {i} even", answer=i % 2 == 0, passage=f"About {i}.")
    hub("google/boolq", train=[row(i) for i in range(6)], validation=[row(i) for i in range(10, 13)])
    data = load("boolq", 6, 3)
    assert {(q.text, q.references, q.context) for q in data.test} == {(f"is {i} even", ("yes" if i % 2 == 0 else "no",), f"About {i}.") for i in (10, 11, 12)}

def test_preset_xsum_from_the_parquet_copy_of_a_script(hub):
    row = lambda i: dict(document=f"Long text {i}\nwith lines." if i else "", summary=f"Text {i}.", id=str(i))
    hub("EdinburghNLP/xsum", script=True, train=[row(i) for i in range(6)], validation=[row(50)], test=[row(i) for i in range(10, 13)])
    with pytest.warns(DataWarning) as caught: data = load("xsum", 5, 3)
    notes = " / ".join(str(w.message) for w in caught)
    assert "no question or no reference: 1 (row 1)" in notes and "is graded" in notes and "such as 0.3" in notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("xsum:train[1:]", 5, 3, threshold=0.3).test == data.test

def test_preset_gsm8k(hub):
    row = lambda i: dict(question=f"Ann has {i} eggs. How many?", answer=f"She has <<{i}={i}>>{i}.\n#### {i:,}")
    hub("openai/gsm8k", "main", train=[row(i) for i in (1, 2, 3)], test=[row(i) for i in (1000, 5)])
    data = load("gsm8k", 3, 2)
    assert {q.references for q in data.test} == {("1,000", "1000"), ("5",)}
    with pytest.raises(DataError, match=r"bad.jsonl, line 1: the row has not the form that the preset knows"): load("gsm8k:" + jsonl("bad.jsonl", [dict(row(1), answer="no mark")]), 1, 1)

def test_preset_math500_is_for_tests_alone(hub):
    row = lambda i: dict(problem=f"What is ${i}$?", solution="...", answer=rf"\frac{{{i}}}{{2}}", subject="Algebra", level=1, unique_id=f"test/algebra/{i}.json")
    hub("HuggingFaceH4/MATH-500", test=[row(i) for i in range(4)])
    for name in ("math500", "math500:test", "math500:test[:2]", "math500:2", "math500@abc", "humaneval"):
        with pytest.raises(DataError, match="is for tests alone and nothing is trained on it: give it as test_data"): load(name, 2, 2)
    data = load(jsonl("sums.jsonl", sums(5)), 5, 4, test_data="math500")
    assert {q.id for q in data.test} == {f"test/algebra/{i}.json" for i in range(4)} and data.test[0].references[0].startswith(r"\frac")
    with pytest.raises(DataError, match="stand in the training data as well: 1 of 4"): load(jsonl("leak.jsonl", [dict(question="what is 3 ?", answer="x"), dict(question="What is $3$?", answer="x")]), 1, 4, test_data="math500")

def test_preset_mbpp_and_humaneval(hub):
    from stasc.runner import run_code
    row = lambda i: dict(task_id=i, text=f"Write a function to add {i}.", code="x", test_list=[f"assert add(1) == {1 + i}", f"assert add(2) == {2 + i}"], test_setup_code="import math" if i % 2 else "", challenge_test_list=[])
    hub("google-research-datasets/mbpp", "full", train=[row(i) for i in range(3)], test=[row(i) for i in range(10, 12)], validation=[row(30)], prompt=[row(40)])
    data = load("mbpp", 3, 2)
    q = next(q for q in data.train if q.id == "mbpp-1")
    assert "assert add(1) == 2" in q.text and "add(2)" not in q.text
    assert run_code("def add(n): return n + 1", q.references[0], seconds=60).passed and not run_code("def add(n): return 2", q.references[0], seconds=60).passed
    prompt = 'from typing import List\n\n\ndef helper(x):\n    return x + 1\n\ndef last(xs: List[int]) -> int:\n    """ The last one plus one.\n    """\n'
    hub("openai/openai_humaneval", "openai_humaneval", test=[dict(task_id="HumanEval/0", prompt=prompt, canonical_solution="    return 1", test="METADATA = {}\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n", entry_point="last")])
    h = load(jsonl("sums.jsonl", sums(5)), 5, 1, test_data="humaneval").test[0]
    assert h.id == "HumanEval/0" and "def last" in h.text
    for program, passed in (("def last(xs: List[int]) -> int:\n    return helper(xs[-1])", True), ("def last(xs): return xs[-1]", False), ("", False), ("import sys; sys.exit(0)", False)):
        assert run_code(program, h.references[0], seconds=60).passed == passed

def test_a_preset_without_a_test_split_is_split(hub, monkeypatch):
    hub("me/mine", train=[dict(problem=f"what is {i}", solution=i) for i in range(10)])
    monkeypatch.setitem(PRESETS, "mine", Preset("me/mine", question="problem", reference="solution", test=None))
    data = load("mine", 6, 4)
    assert len({q.id for q in data.train + data.test}) == 10 and data.train[0].references[0].isdigit()
    with pytest.raises(DataError, match=r"me/mine \(split train\): no column 'nope': it has problem, solution"): load("mine", 6, 4, reference_column="nope")


# --- parts of a preset, local files in its columns, other commits

@pytest.fixture
def nq_open(hub):
    hub("google-research-datasets/nq_open", "nq_open", train=[dict(question=ask(i), answer=[f"n{i}"]) for i in range(20)],
        validation=[dict(question=f"where is number {i}", answer=[f"n{i}"]) for i in range(10)])
    return hub

@pytest.mark.parametrize("data, train, test", [("nq_open:train[:5]", range(5), 10), ("nq_open:5", range(5), 10), ("nq_open:train[50%:75%]", range(10, 15), 10), ("nq_open@abc:train[:2]+train[4:6]", (0, 1, 4, 5), 10)])
def test_parts(nq_open, data, train, test):
    d = load(data, len(train), test)
    assert {q.text for q in d.train} == {ask(i) for i in train} and all(q.id.startswith("validation-") for q in d.test)
    if "@" in data: assert {a["revision"] for a in nq_open.asked} == {"abc"}

def test_a_held_out_split_that_is_asked_for_is_split(nq_open):
    d = load("nq_open:validation", 6, 4)
    assert len({q.id for q in d.train + d.test}) == 10
    assert len(load("nq_open:train[:6]", 6, 2, test_data="nq_open:validation[:2]").test) == 2
    with pytest.raises(DataError, match="stand in the training data as well"): load("nq_open:train[:6]", 6, 2, test_data="nq_open:train[4:6]")

@pytest.mark.parametrize("data, says", [("nq_open:tset", "cannot be loaded .*Unknown split"), ("nq_open:train[:x]", "cannot be loaded"), ("nqopen:train[:5]", "unknown data set 'nqopen', did you mean 'nq_open'"),
                                        ("arithmetic:5", "made on the spot"), ("nq_open:none.jsonl", "none.jsonl: no such file"), ("none.jsonl[:5]", "none.jsonl: no such file"), ("arithmetic:a.jsonl", "made on the spot")])
def test_bad_parts(nq_open, data, says):
    with pytest.raises(DataError, match=says): load(data, 2, 2)

def test_a_part_of_a_file():
    jsonl("a.jsonl", sums(20))
    assert {q.id for q in load("a.jsonl[:5]", 3, 2).train + load("a.jsonl[:5]", 3, 2).test} == {f"s{i}" for i in range(5)}
    assert {q.id for q in load("a.jsonl[:50%]", 5, 5, test_data="a.jsonl[50%:]").test} <= {f"s{i}" for i in range(10, 20)}
    jsonl("b[1].jsonl", sums(4))
    assert len(load("b[1].jsonl", 2, 2).train) == 2
    for bad in ("a.jsonl[5]", "a.jsonl[a:]", "a.jsonl[1:2:3]", "a.jsonl[]"):
        with pytest.raises(DataError, match="is no slice of rows"): load(bad, 1, 1)

def test_a_local_file_with_the_columns_of_a_preset():
    jsonl("g.jsonl", [dict(question=f"Ann has {i} eggs?", answer=f"So\n#### {i}") for i in range(5)])
    assert {q.references for q in load("gsm8k:g.jsonl", 3, 2).train} <= {(str(i),) for i in range(5)}
    jsonl("m.jsonl", [dict(problem="p", answer="1", unique_id="u")])
    with pytest.raises(DataError, match="for tests alone"): load("math500:m.jsonl", 1, 1)
    jsonl("x.jsonl", [dict(question="q", gold="1")])
    with pytest.raises(DataError, match="x.jsonl: no column 'answer': it has question, gold"): load("gsm8k:x.jsonl", 1, 1)
    put("y.jsonl", "[1]\n")
    with pytest.raises(DataError, match="y.jsonl, line 1: expected an object"): load("gsm8k:y.jsonl", 1, 1)

CHANGED = [(k, r) for k, p in PRESETS.items() if p.hub for r in (dict(q="x", a="y"), {p.question: "x"}, {c: {"deep": 1} for c in p.columns} | {p.question: "x"}, {c: ["x"] for c in p.columns} | {p.question: ["x"], p.reference: {"gold": "x"}})]

@pytest.mark.parametrize("name, row", CHANGED)
def test_a_changed_schema_is_one_sentence(name, row):
    jsonl("changed.jsonl", [row])
    with pytest.raises(DataError) as e: load(jsonl("a.jsonl", sums(3)), 1, 1, test_data=f"{name}:changed.jsonl")
    assert "\n" not in str(e.value) and str(e.value).startswith("changed.jsonl")


# --- multiple choice

@pytest.mark.parametrize("row", [dict(choices=["x", "y", "z"], answer=1), dict(choices=dict(text=["x", "y", "z"], label=["A", "B", "C"]), answerKey="B"), dict(options=["x", "y", "z"], answer="y"), dict(choices=["x", "y", "z"], answer="B")])
def test_choices_are_listed_and_the_right_one_is_known(row):
    q = read_questions(jsonl("c.jsonl", [dict(question="Which?") | row]))[0]
    assert q.text == "Which?\nA) x\nB) y\nC) z" and q.references == ("B", "y")

@pytest.mark.parametrize("row, says", [(dict(choices=["x"], answer="B"), "none of the choices"), (dict(choices=["x"], answer=3), "none of the choices"), (dict(choices=["x"], answer=-1), "none of the choices"), (dict(choices="x", answer=0), "no list of choices"),
                                       (dict(choices=dict(text=["x", "y"], label=["A"]), answer="A"), "1 labels for 2 choices"), (dict(choices=["x", None], answer=0), "null"), (dict(choices=["x"], answer=None), "none of the choices")])
def test_bad_choices(row, says):
    message = error(jsonl("c.jsonl", [dict(question="Which?") | row]))
    assert message.startswith("c.jsonl, line 1, column 'choices': ") and says in message


@pytest.mark.parametrize("name", [k for k, p in PRESETS.items() if p.hub and p.train])
def test_unreachable_data_set(hub, name):
    with pytest.raises(DataError) as e: load_questions(Config(data=name))
    for part in (PRESETS[name].hub, "can neither be reached nor found in the cache", "Couldn't reach", "puts it into", "--data FILE", f"--data {name}:FILE"): assert part in str(e.value)
    assert "\n" not in str(e.value)


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

GSM8K = Path(__file__).resolve().parents[2]/"shared/data/gsm8k/test.jsonl"

@pytest.mark.skipif(not GSM8K.exists(), reason="no ../shared/data/gsm8k beside this checkout: real questions are not in the repository")
def test_gsm8k_for_real():
    from stasc.maths import math_equal, number
    data = load(f"gsm8k:{GSM8K}", 900, 400)
    check_leak(data.train, data.test)
    questions = data.train + data.test
    assert all(number(q.references[0]) is not None and math_equal(f"It is ${q.references[-1]}.", q.references) for q in questions)
    assert sum(math_equal(a.references[0], b.references) for a, b in zip(questions, questions[1:])) < 60
