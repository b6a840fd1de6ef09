"What is stored comes back: any text, any settings, any questions; what a verdict was given on is what is stored."
import json

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stasc.core import Config, ConfigError, Question, StascError, whole_characters
from stasc.data import Data
from stasc.loop import STaSC
from stasc.reward import judge
from stasc.store import RunDir, _digest, columns, part_name, read_tables, write_table
from stasc.train import ScriptedEngine

HALVES = ["\ud800", "\udfff", "\ud83d", "\ude00", "\ud83d\ude00"]
texts = st.one_of(st.text(), st.text(st.characters()), st.lists(st.sampled_from([*HALVES, "\0", "\n", "\r\n", "\u2028", "🙂", "👩‍👩‍👧", "שלום", "\u202e", "e\u0301", "\ufeff", "\x1b[2J", "", "nan", "None", "Final Answer: ", "7"]), max_size=9).map("".join))
whole = texts.map(whole_characters)
LONG = ["x" * 1_000_000, "\0" * 1_000_000, "🙂" * 250_000, "\ud800" * 300_000, "שלום " * 200_000, "\n" * 1_000_000]


def is_whole(text):
    try: text.encode(); return True
    except UnicodeEncodeError: return False


# --- characters

@given(texts)
def test_whole_characters(text):
    made = whole_characters(text)
    assert is_whole(made) and whole_characters(made) == made
    if is_whole(text): assert made == text
    assert made.replace("\ufffd", "") == "".join(c for c in text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore") if c != "\ufffd")


@pytest.mark.parametrize("before,after", [("a\ud800b", "a\ufffdb"), ("\ud83d\ude00", "😀"), ("\ude00\ud83d", "\ufffd\ufffd"), ("😀\ud83d", "😀\ufffd"), ("\0é", "\0é"), ("", "")])
def test_halves_are_seen_and_pairs_joined(before, after): assert whole_characters(before) == after


# --- tables

def row(id, text, answer, j=0, seed=0, reward=0.0, ids=(), logprob=-1.0):
    return dict(iteration=0, split="train", question_id=id, init_index=j, init_text=text, init_answer=answer, init_reward=reward, init_token_ids=list(ids), init_n_tokens=len(ids),
                init_finish_reason="stop", init_seed=seed, init_logprob=logprob)


rows = st.lists(st.builds(row, texts, texts, st.none() | texts, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1), st.floats(0, 1), st.lists(st.integers(0, 2**31 - 1), max_size=5), st.floats(-1e9, 0)), max_size=6)


def same(a, b): return a == b or a is None and pd.isna(b)


def as_stored(r): return {k: whole_characters(v) if isinstance(v, str) else v for k, v in r.items()}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows)
def test_a_table_comes_back(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("t")
    write_table(folder / "a.parquet", written, "initial")
    read = read_tables([folder / "a.parquet"], "initial")
    assert list(read.columns) == columns("initial") and len(read) == len(written)
    for want, (_, got) in zip(map(as_stored, written), read.iterrows()):
        for k, v in want.items(): assert list(got[k]) == v if k.endswith("token_ids") else same(v, got[k]), k
    write_table(folder / "b.parquet", written, "initial")
    assert (folder / "a.parquet").read_bytes() == (folder / "b.parquet").read_bytes()
    assert read_tables([folder / "a.parquet"], "initial", token_ids=False).equals(read.drop(columns="init_token_ids"))
    both = read_tables([folder / "a.parquet", folder / "b.parquet"], "initial")
    assert len(both) == 2 * len(written)


@pytest.mark.parametrize("text", LONG, ids=lambda t: ascii(t[:2]))
def test_a_megabyte_comes_back(tmp_path, text):
    write_table(tmp_path / "a.parquet", [row("q", text, text)], "initial")
    read = read_tables([tmp_path / "a.parquet"], "initial", token_ids=False).iloc[0]
    assert read.init_text == read.init_answer == whole_characters(text)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows, min_size=1, max_size=4))
def test_parts_come_back_in_order_and_only_as_written(tmp_path_factory, parts):
    run = RunDir(tmp_path_factory.mktemp("r") / "run").open(Config.demo(), "abc")
    for i, part in enumerate(parts): run.write(part_name(0, "initial.train", i), part, "initial")
    run.close()
    again = RunDir(run.path)
    want = [as_stored(r)["init_text"] for part in parts for r in part]
    assert again.table(0, "initial.train").init_text.tolist() == want
    assert [e["rows"] for e in again.manifest.values()] == list(map(len, parts)) and all(_digest(run / n) == e["sha256"] for n, e in again.manifest.items())


# --- settings and questions

joined = texts.filter(lambda t: json.loads(json.dumps(t)) == t)      # JSON joins two halves
options = st.fixed_dictionaries({}, optional=dict(model=joined, data=joined, reward=joined, prompts=joined, task=joined, test_data=st.none() | joined, seed=st.integers(0, 2**31 - 1), learning_rate=st.floats(0, 1),
                                                  top_p=st.floats(1e-6, 1), n_init=st.integers(1, 10_000), variant=st.sampled_from(["EIE", "fnf"]), trust_remote_code=st.booleans()))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options)
def test_settings_come_back(tmp_path_factory, given_options):
    cfg = Config(**given_options)
    f = tmp_path_factory.mktemp("c") / "c.json"
    f.write_text(cfg.to_json(), encoding="utf-8")
    assert Config.from_file(f) == cfg == Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg.replace()


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.one_of(st.sampled_from(list(Config.__dataclass_fields__)), st.text(max_size=8)), st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=4), max_size=3))
def test_any_mapping_is_a_configuration_or_a_sentence(d):
    try: cfg = Config.from_dict(d)
    except StascError as e: assert isinstance(e, ConfigError) and "\n" not in str(e) and len(str(e)) < 3000
    else: assert Config.from_dict(cfg.to_dict()) == cfg


questions = st.lists(st.builds(Question, whole, whole.filter(str.strip), st.lists(whole, min_size=1, max_size=3).map(tuple), st.none() | whole), min_size=2, max_size=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(questions, st.lists(texts, min_size=1, max_size=4))
def test_a_run_comes_back_and_its_verdicts_are_on_what_is_stored(tmp_path_factory, asked, outputs):
    "Questions, answers and rewards of a run, opened anew; a reward is that of the stored text, halves of characters or not."
    def script(prompt, rng, skill): return rng.choice(outputs)
    data = Data(tuple(asked[1:]), tuple(asked[:1]))
    cfg = Config(iterations=1, n_init=1, n_corr=2, n_train=len(asked) - 1, n_test=1, reward="exact_match", prompts="default", data="own", filter="all")
    try: run = STaSC(cfg, tmp_path_factory.mktemp("r") / "run", data=data, engine=ScriptedEngine(script), callbacks=[])
    except StascError: return                                       # ids or questions that stand there twice
    run.run()
    again = STaSC.open(run.dir.path, callbacks=[])
    assert (*again.data.train, *again.data.test) == (*data.train, *data.test) and again.data.fingerprint == data.fingerprint
    references = {(split, q.id): q.references for split in ("train", "test") for q in getattr(data, split)}
    said = set(map(whole_characters, outputs))
    for t in again.trajectories.itertuples():
        for text, answer, reward in ((t.init_text, t.init_answer, t.init_reward), (t.corr_text, t.corr_answer, t.corr_reward)):
            found = judge(text, references[t.split, t.question_id], "exact_match")
            assert text in said and same(found[0], answer) and found[1] == reward
    assert again.metrics.equals(run.metrics) and len(again.trajectories) == 2 * (2 * (len(asked) - 1) + 1)
