"Gold corrections in place of a model's own, and what changed between M_0 and a later model."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stasc.arithmetic import scratchpad
from stasc.core import Config, ConfigError, DataError, Question, StoreError
from stasc.data import Data
from stasc.facts import by_couple, couple_of, fact_questions, make_world, parse_answer, reasons
from stasc.facts_model import fact_logprob, gold_logprob
from stasc.knowledge import KNOWLEDGE, GoldControl, _jackknife, brief, knowledge, knowledge_picture, written_answer
from stasc.loop import STaSC
from stasc.prompt import prompts_of
from stasc.task import configure, reward_of, task_of
from stasc.train import Engine, ScriptedEngine

ADD = dict(n_train=6, n_test=4, iterations=2, n_init=1, n_corr=3)


def _script(prompt, rng, skill):
    "Adds rightly more often the more it was trained."
    a, b = [int(w) for w in prompt.replace("?", " ").split() if w.isdigit()][:2]
    return f"Final Answer: {a + b + (rng.random() > .4 + .1 * skill)}"


def _sum(question): return scratchpad(*map(int, question.id.split("+")))


def _gold_add(path, **kw): return GoldControl(Config.demo(**ADD | kw.pop("options", {})), path, **dict(gold=_sum, engine=ScriptedEngine(_script), callbacks=[]) | kw)


def _files(path): return {f.relative_to(path).as_posix(): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file() and f.name not in ("log.jsonl", ".lock")}


# --- gold texts

def test_every_written_answer_is_right_and_reasons():
    for partition in ("train", "test", "dev"):
        for q in fact_questions(partition):
            text = written_answer(q)
            steps, final = parse_answer(text)
            assert final == q.references[0] == steps[-1][2] and reasons(text)


def test_gold_takes_the_place_of_the_correction_and_nothing_else(tmp_path):
    run, own = _gold_add(tmp_path/"gold").run(), STaSC(Config.demo(**ADD), tmp_path/"own", engine=ScriptedEngine(_script), callbacks=[]).run()
    kept = pd.concat([t[t.kept] for t in run._by_part(0, "train", token_ids=True)])
    examples = run._examples(kept)
    questions = {q.id: q for q in run.data.train}
    assert len(examples) == len(kept) == run.metrics.n_kept[1] > 0
    assert [bytes(e.completion_ids[:-1]).decode() for e in examples] == [_sum(questions[i]) for i in kept.question_id]
    assert {e.completion_ids[-1] for e in examples} == {256}
    assert [e.prompt_ids for e in examples] == [e.prompt_ids for e in STaSC._examples(own, kept)]
    assert run.metrics.loc[0].equals(own.metrics.loc[0]) and run.metrics.n_kept[1] == own.metrics.n_kept[1]     # M_0, and the pairs it gives, are the same
    assert json.loads((tmp_path/"gold"/"gold.json").read_text()) == {q.id: _sum(q) for q in run.data.train}


def test_with_filter_all_and_one_correction_each_initial_answer_is_learned_once(tmp_path):
    run = _gold_add(tmp_path, options=dict(filter="all", n_corr=1, n_init=2)).run()
    for _, k in run.kept.groupby("iteration"):
        assert sorted(zip(k.question_id, k.init_index)) == sorted((q.id, j) for q in run.data.train for j in range(2))


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    class Stop:
        def on_phase(self, run, iteration, phase, done, total):
            if (iteration, phase) == (1, "corrections.test"): raise KeyboardInterrupt
    _gold_add(tmp_path/"whole").run()
    with pytest.raises(KeyboardInterrupt): _gold_add(tmp_path/"killed", callbacks=[Stop()]).run()
    GoldControl.open(tmp_path/"killed", engine=ScriptedEngine(_script), callbacks=[]).run()
    assert _files(tmp_path/"whole") == _files(tmp_path/"killed")


def test_one_kind_of_run_is_not_resumed_as_the_other(tmp_path):
    _gold_add(tmp_path/"gold").run()
    STaSC(Config.demo(**ADD), tmp_path/"own", engine=ScriptedEngine(_script), callbacks=[]).run()
    before = _files(tmp_path)
    with pytest.raises(StoreError, match="choose another directory"): STaSC.open(tmp_path/"gold", iterations=3, engine=ScriptedEngine(_script), callbacks=[]).run()
    with pytest.raises(StoreError, match="holds no run of GoldControl"): GoldControl.open(tmp_path/"own")
    with pytest.raises(StoreError, match="holds no run of GoldControl"): _gold_add(tmp_path/"own", options=dict(iterations=3)).run()
    with pytest.raises(StoreError, match="other gold texts"): _gold_add(tmp_path/"gold", gold=lambda q: f"Final Answer: {q.references[0]}", options=dict(iterations=3)).run()
    assert _files(tmp_path) == before
    assert len(STaSC.open(tmp_path/"gold", callbacks=[]).trajectories) == len(_gold_add(tmp_path/"gold").trajectories)        # reading is free


@pytest.mark.parametrize("gold, said", [
    (lambda q: "Final Answer: 7", "earns 0, below the threshold 1"), (lambda q: None, "there is no text for question"), (lambda q: " ", "there is no text"),
    ({}, "there is no text"), (lambda q: {}["no"], "there is no text"), (lambda q: 5, "there is no text")])
def test_gold_that_is_none_is_refused_before_anything_is_written(tmp_path, gold, said):
    with pytest.raises(DataError, match=said): _gold_add(tmp_path/"run", gold=gold).run()
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"1+2": 3}'])
def test_damaged_gold_texts_are_one_sentence(tmp_path, text):
    _gold_add(tmp_path/"gold").run()
    (tmp_path/"gold"/"gold.json").write_text(text)
    with pytest.raises(StoreError, match="gold.json"): GoldControl.open(tmp_path/"gold")


# --- intervals

_ratio = lambda s, o: s.b / s.a


@given(st.lists(st.integers(0, 12), min_size=2, max_size=9))
def test_with_clusters_of_one_size_it_is_the_interval_of_their_means(rights):
    s = pd.DataFrame(dict(a=[12.] * len(rights), b=[float(r) for r in rights]))
    mean, lo, hi = _jackknife(_ratio, s, s, .95)
    half = stats.t.ppf(.975, len(rights) - 1) * np.std(np.array(rights) / 12, ddof=1) / len(rights)**.5
    assert (mean, hi - mean, mean - lo) == pytest.approx((sum(rights) / 12 / len(rights), half, half), abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda x: (float(max(x)), float(min(x)))), min_size=2, max_size=8), st.floats(.5, .99))
def test_leaving_out_one_by_one_against_a_plain_loop(rows, level):
    s, k = pd.DataFrame(rows, columns=["a", "b"]), len(rows)
    left = [sum(r[1] for j, r in enumerate(rows) if j != i) / sum(r[0] for j, r in enumerate(rows) if j != i) for i in range(k)]
    se = ((k - 1) / k * sum((x - sum(left) / k)**2 for x in left))**.5
    mean, lo, hi = _jackknife(_ratio, s, s, level)
    assert mean == pytest.approx(sum(r[1] for r in rows) / sum(r[0] for r in rows)) and (hi - lo) / 2 == pytest.approx(stats.t.ppf((1 + level) / 2, k - 1) * se, abs=1e-9)


def test_error_is_that_of_by_couple_where_couples_are_equal():
    rng, ids = np.random.default_rng(0), [q.id for q in fact_questions("test")]
    right = rng.random(len(ids)) < .4
    s = pd.DataFrame(dict(c=[couple_of(i) for i in ids], a=1., b=right.astype(float))).groupby("c").sum()
    mean, lo, hi = _jackknife(_ratio, s, s, .95)
    m, se = by_couple(ids, right)
    assert (mean, hi - lo) == pytest.approx((m, 2 * stats.t.ppf(.975, 21) * se))


def test_reasoning_alone_explains_all_where_both_kinds_stay_as_right_as_they_were():
    f = KNOWLEDGE["by_reasoning"][2]
    o = pd.Series(dict(answers=100., reasoned=50., direct=50., right_reasoned=30., right=35.))         # .6 and .1
    s = pd.Series(dict(answers=100., reasoned=90., direct=10., right_reasoned=54., right=55.))
    assert f(o, o) == pytest.approx(.35) and f(s, o) == pytest.approx(.55) == KNOWLEDGE["initial"][2](s, o)
    better = s + pd.Series(dict(answers=0., reasoned=0., direct=0., right_reasoned=20., right=20.))
    assert f(better, o) == pytest.approx(.55) and KNOWLEDGE["initial"][2](better, o) == pytest.approx(.75)


# --- a real run

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = Data(tuple(fact_questions("train", 30)), tuple(fact_questions("dev", 40)))
    cfg = Config.demo(task="facts", iterations=1, n_init=1, n_test_init=2, n_corr=3, train_batch=2)
    return GoldControl(cfg, tmp_path_factory.mktemp("facts")/"gold", gold=written_answer, data=data, engine=Engine(cfg), callbacks=[]).run()


@pytest.fixture(scope="module")
def table(run): return knowledge(run)


def test_training_texts_are_the_written_answers_and_lose_nothing(run):
    kept = pd.concat([t[t.kept] for t in run._by_part(0, "train", token_ids=True)])
    questions = {q.id: q for q in run.data.train}
    for i, e in zip(kept.question_id, run._examples(kept)):
        assert run.engine.tokenizer.decode(e.completion_ids) == written_answer(questions[i]) + "<|im_end|>"
        assert e.completion_ids[-1] in run.engine.lm.stop_ids and len(e.completion_ids) <= run.cfg.max_new_tokens


def test_figures_against_plain_loops(run, table):
    at, world = table.set_index(["iteration", "measure"]).value, make_world()
    for n in (0, 1):
        t, first = run.trajectories.query("split == 'test' and iteration == @n"), {}
        for r in t.itertuples(): first[r.question_id, r.init_index] = (r.init_reward, reasons(r.init_text))
        of = lambda kind: [a for a, said in first.values() if said == kind]
        plain = dict(initial=[a for a, _ in first.values()], correction=t.corr_reward, reasons=[s for _, s in first.values()], if_reasoned=of(True), if_direct=of(False),
                     spoiled=[a == 1 and b == 0 for a, b in zip(t.init_reward, t.corr_reward)], mended=[a == 0 and b == 1 for a, b in zip(t.init_reward, t.corr_reward)])
        run.engine.use(run._model_folder(n))
        lm = run.engine.lm.model
        plain["gold"] = gold_logprob(lm, run.engine.tokenizer, list(run.data.test))
        facts, people = fact_logprob(lm, run.engine.tokenizer, world), {q.id.split("/")[0] for q in run.data.test}
        plain["personal"] = [p for (s, r), p in facts.items() if s in people]
        plain["shared"] = [p for (s, r), p in facts.items() if r in ("country", "seat")]
        for k, values in plain.items(): assert at[n, k] == pytest.approx(np.mean(list(values)), abs=1e-6), (n, k)
    assert at[0, "by_reasoning"] == pytest.approx(at[0, "initial"]) and at[1, "gold"] != at[0, "gold"]


def test_changes_are_differences_and_the_same_model_has_none(run, table):
    w = table.pivot(index="measure", columns="iteration")
    pd.testing.assert_series_equal(w["change"][1], w["value"][1] - w["value"][0], check_names=False)
    again = knowledge(run, (1, 1))
    assert len(again) == len(KNOWLEDGE) and again.change.isna().all()
    assert table[table.iteration == 0].change.isna().all() and (table.lo <= table.value).all() and (table.value <= table.hi).all()


def test_pooling_a_run_with_itself_changes_neither_figures_nor_intervals(run, table):
    twice = knowledge([run, run])
    pd.testing.assert_frame_equal(twice.drop(columns="n"), table.drop(columns="n"))
    assert (twice.n == 2 * table.n).all()
    other = STaSC.open(run.dir.path, callbacks=[])
    knowledge([run, other])
    assert other._engine is run.engine                      # one model for all seeds


def test_table_and_picture_for_the_eye(table):
    b, fig = brief(table), knowledge_picture(table)
    assert list(b) == ["M_0", "M_1", "change"] and len(b) == len(KNOWLEDGE) and b.notna().all().all()
    assert all(words in fig.alt for words, *_ in KNOWLEDGE.values())
    few = table.assign(n=table.n.where(~((table.measure == "if_direct") & (table.iteration == 1)), 3))
    row = brief(few).loc["right, of direct answers"]
    assert row.M_1 == "(3 answers)" and row.change == "" and "[" in row.M_0         # no figure rests on three answers


def test_clusters_that_only_one_model_has_count_in_the_change_alone():
    from stasc.knowledge import _rows
    zero = dict.fromkeys("answers right reasoned direct right_reasoned pairs corrected mended spoiled asked gold personal_facts personal shared_facts shared".split(), 1.)
    o = pd.DataFrame([zero | dict(answers=4., right=2., direct=2., reasoned=2.)] * 3, index=list("abc"))
    s = o.assign(direct=[0., 0., 1.], reasoned=[4., 4., 3.], right=[1., 1., 2.])
    rows = {r["measure"]: r for r in _rows(5, s, o, .95)}
    assert rows["if_direct"]["n"] == 1 and rows["if_direct"]["clusters"] == 1 and np.isnan(rows["if_direct"]["lo"])
    assert rows["if_direct"]["change"] == pytest.approx(1 / 1 - 1 / 2) and rows["reasons"]["change"] == pytest.approx(11 / 12 - 1 / 2)


def test_runs_of_another_task_are_refused(run, tmp_path):
    cfg = Config.demo(n_train=4, n_test=4, iterations=1)
    add = STaSC(cfg, tmp_path/"add", engine=ScriptedEngine(_script), callbacks=[])
    with pytest.raises(DataError, match="none about the fictional facts"): knowledge(add)
    with pytest.raises(DataError, match="no runs"): knowledge([])
    with pytest.raises(DataError, match="expected a run"): knowledge("run")
    with pytest.raises(DataError, match="split = 'dev'"): knowledge(run, split="dev")
    with pytest.raises(IndexError, match="iteration 7 is not there"): knowledge(run, (0, 7))
    facts = Data(tuple(fact_questions("train", 4)), tuple(fact_questions("dev", 4)))
    scripted = STaSC(Config.demo(task="facts", iterations=1), tmp_path/"facts", data=facts, engine=ScriptedEngine(lambda *_: "Final Answer: Rome"), callbacks=[])
    with pytest.raises(DataError, match="no complete iteration"): knowledge(scripted)
    scripted.step()
    with pytest.raises(DataError, match="scripted engine"): knowledge(scripted)
    q = facts.test[0]
    for other in (Question(q.id, "Who?", q.references), Question(q.id, q.text, ("Rome",)), Question("Rome/job", q.text, q.references)):
        with pytest.raises(DataError, match="none about the fictional facts"): knowledge(STaSC(Config.demo(task="facts"), tmp_path/"x", data=Data(facts.train, (other,)), callbacks=[]))


def test_another_model_has_no_token_for_each_name(tmp_path):
    facts = Data(tuple(fact_questions("train", 2)), tuple(fact_questions("dev", 2)))
    run = STaSC(Config.demo(iterations=1, n_init=1, n_corr=1, max_new_tokens=2), tmp_path/"run", data=facts, callbacks=[])
    run.step()
    with pytest.raises(DataError, match="take model = 'embedded-facts'"): knowledge(run)


# --- the task and its model

@pytest.mark.parametrize("options", [dict(data="facts"), dict(task="facts"), dict(data="facts:train")])
def test_facts_are_not_asked_of_the_adding_model(tmp_path, options):
    for ask in (task_of, reward_of, prompts_of):
        with pytest.raises(ConfigError, match="model = 'embedded-facts'"): ask(Config(**options))
    with pytest.raises(ConfigError, match="--model embedded-facts"): STaSC(Config(**options), tmp_path/"run", callbacks=[]).run()
    assert not (tmp_path/"run").exists() and task_of(Config(**options, model="embedded-facts")).name == "facts"


def test_configure_takes_the_model_that_knows_them():
    assert configure("facts").model == "embedded-facts" and configure("facts", model="embedded-facts-reasoned").model == "embedded-facts-reasoned"
    assert Config.demo(task="facts").model == "embedded-facts" and task_of(Config.demo(task="facts")).name == "facts"
