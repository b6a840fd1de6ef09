"The store of reasoning paths: the sketch's failure, confidence against the plain model, what comes from outside, the best path."
import math
import re
import shutil

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from stasc.core import Config, ModelError, Question, RewardError, StoreError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.paths import PathStore, answer_logprobs, answer_place, answer_tokens, heuristic
from stasc.reward import final_answer
from stasc.star import STaR
from stasc.train import ScriptedEngine

BYTES = ScriptedEngine(None).tokenizer


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def star(embedded, tmp_path_factory):
    "Ten questions, three rounds."
    cfg = Config.demo(device="cpu", n_train=10, n_test=6, n_init=3, iterations=3)
    yield STaR(cfg, tmp_path_factory.mktemp("star") / "run", engine=embedded, callbacks=[]).run()
    embedded.use(None)


def numbers(prompt, rng, skill): return rng.choice(["", "I think so.\n"]) + f"Final Answer: {7 if rng.random() < 0.3 + 0.2 * skill else rng.randrange(7)}" * (rng.random() < .9)


def scripted(out, **options):
    ask = lambda s, n: [Question(f"{s}{i}", f"{s} number {i}?", ("7",)) for i in range(n)]
    cfg = Config(**dict(iterations=2, n_init=2, n_corr=2, part_size=2, shots=0, prompts="default") | options)
    return STaSC(cfg, out, data=Data(ask("train", 5), ask("test", 3)), engine=ScriptedEngine(numbers), callbacks=[]).run()


@pytest.fixture(scope="module")
def short(tmp_path_factory): return scripted(tmp_path_factory.mktemp("short") / "run", iterations=1)


# --- the sketch's failure

def test_ten_questions_and_three_rounds_stay_under_50_mb_and_the_store_is_there_for_another(star):
    store = PathStore(star)
    store.paths
    folder = star.dir.path
    total = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert total == store.disk_use["total"] < 50e6 and total < 3 * 4 * sum(p.numel() for n, p in star.engine.lm.base.named_parameters() if "lora_" not in n)
    assert store.disk_use["models"] + store.disk_use["tables"] + store.disk_use["rest"] == total
    assert star.n_done == 4 and not list(folder.rglob("model.safetensors"))
    best = store.best()
    assert set(best.question_id) == {q.id for q in star.data.train} and len(best) == 10
    again = PathStore(folder)                                           # a fresh object, no model
    pd.testing.assert_frame_equal(again.paths, store.paths)
    pd.testing.assert_frame_equal(again.best(), best)
    pd.testing.assert_frame_equal(again.log, store.log)
    assert again.run._engine is None and again.run.rationalise and again.latest == folder / "iter_03/adapter" and (again.latest / "adapter_model.safetensors").exists()
    assert store.log.kept.tolist() == star.metrics.n_kept[1:].tolist() and (store.log.steps > 0).all() and (store.log.bytes > 1e5).all()


def test_every_text_of_the_run_is_a_path_and_nothing_is_stored_twice(star):
    store = PathStore(star)
    t, n = store.paths, 0
    for p in star.dir.path.glob("iter_*/*.train/part-*.parquet"): n += len(pd.read_parquet(p))
    assert len(t) == n and set(t.kind) == {"initial", "hinted"} and not t.duplicated(["iteration", "kind", "question_id", "init_index"]).any()
    own = pd.read_parquet(star.dir / "answer_logprobs.parquet")
    assert set(own) == {"iteration", "split", "kind", "question_id", "init_index", "corr_index", "answer_logprob", "answer_tokens"} and len(own) == n
    before = contents(star.dir.path)
    PathStore(star, "mean_logprob").paths, PathStore(star, "text").paths, PathStore(star, "heuristic").paths
    assert contents(star.dir.path) == before


# --- confidence of the model

def plain(lm, prompt, ids, a, b):
    "The log-probability of tokens a to b: one text, one pass."
    import torch
    with torch.no_grad(): logp = lm.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + i, ids[i]]) for i in range(a, b))


def test_confidence_is_the_models_own_of_the_answers_digits(star):
    lm, asked = star.engine.lm, {q.id: q for q in star.data.train}
    prob, mean = PathStore(star).paths, PathStore(star, "mean_logprob").paths
    for n in (0, 2):
        lm.use(star._model_folder(n))
        rows = pd.concat([star.dir.table(n, "initial.train").assign(kind="initial"), star._hinted(n, True).assign(kind="hinted")])
        for r in rows[::5].itertuples():
            ids, prompt = list(r.init_token_ids), star.prompter.initial(asked[r.question_id])
            at = prob[(prob.iteration == n) & (prob.kind == r.kind) & (prob.question_id == r.question_id) & (prob.init_index == r.init_index)].index[0]
            if not r.init_answer: assert prob.confidence[at] == 0 and mean.confidence[at] == -math.inf; continue
            pieces = [lm.tokenizer.decode([i]) for i in ids]            # the digits behind the last colon, found without the code under test
            colon = max(i for i, p in enumerate(pieces) if ":" in p)
            digits = [i for i in range(colon, len(ids)) if re.search(r"\d", pieces[i])]
            assert "".join(pieces[i] for i in digits).strip() == r.init_answer
            expected = plain(lm, prompt, ids, digits[0], digits[-1] + 1)
            assert prob.confidence[at] == pytest.approx(math.exp(expected), abs=1e-5) and mean.confidence[at] == pytest.approx(expected / len(digits), abs=1e-5)
    lm.use(None)


def test_batches_and_order_do_not_matter(star):
    lm, t = star.engine.lm, star.dir.table(0, "initial.train")
    lm.use(None)
    asked = {q.id: q for q in star.data.train}
    prompts, texts = [star.prompter.initial(asked[q]) for q in t.question_id], [list(i) for i in t.init_token_ids]
    texts[3] = texts[3][:4]                                             # cut off: no answer
    one = answer_logprobs(lm, prompts, texts, batch=1)
    assert one[3] == (-math.inf, 0) and answer_logprobs(lm, [], []) == []
    for some in (answer_logprobs(lm, prompts, texts), answer_logprobs(lm, prompts[::-1], texts[::-1], batch=7)[::-1]):
        assert [n for _, n in some] == [n for _, n in one] and [x for x, _ in some] == pytest.approx([x for x, _ in one], abs=1e-4)


def test_corrections_are_judged_behind_the_answer_they_correct(embedded, tmp_path):
    run = STaSC(Config.demo(device="cpu", variant="FIE", n_train=6, n_test=4, iterations=1, n_corr=2), tmp_path / "run", engine=embedded, callbacks=[]).run()
    t, asked, lm = PathStore(run).paths, {q.id: q for q in run.data.train}, embedded.lm
    assert t.groupby(["iteration", "kind"]).size().to_dict() == {(0, "initial"): 12, (0, "correction"): 24, (1, "correction"): 24}
    lm.use(run._model_folder(1))
    pairs = run._pairs(1, "train").iloc[::4]
    for r in pairs.itertuples():
        ids = list(r.corr_token_ids)
        a, b = answer_tokens(lm.tokenizer, ids)
        row = t[(t.iteration == 1) & (t.question_id == r.question_id) & (t.init_index == r.init_index) & (t.corr_index == r.corr_index)]
        assert row.confidence.item() == pytest.approx(math.exp(plain(lm, run.prompter.correction(asked[r.question_id], r.init_text), ids, a, b)), abs=1e-5)
    lm.use(None)


def test_a_run_that_goes_on_asks_for_the_new_paths_alone(embedded, tmp_path, monkeypatch):
    run = STaSC(Config.demo(device="cpu", n_train=4, n_test=4, iterations=1, n_corr=1, filter="all"), tmp_path / "run", engine=embedded, callbacks=[]).run()
    first = PathStore(run).paths
    run = STaSC.open(run.dir.path, engine=embedded, callbacks=[], iterations=2).run()
    seen, real = [], PathStore._logprobs
    monkeypatch.setattr(PathStore, "_logprobs", lambda self, rows: seen.append(set(rows.iteration)) or real(self, rows))
    t = PathStore(run).paths
    assert seen == [{2}] and len(t) == len(first) * 3 // 2
    pd.testing.assert_frame_equal(t.iloc[:len(first)], first)
    embedded.use(None)


# --- where the answer stands

@given(st.text("ab é Łódź日本\n*:", max_size=20), st.text("ab12 éŁ日", min_size=1, max_size=8).filter(lambda s: s.strip()), st.sampled_from(["", "\n", "**", "\nand more"]))
def test_the_tokens_of_an_answer_say_the_answer(before, answer, after):
    text = f"{before}\nFinal Answer: {answer}{after}"
    found = final_answer(text)
    a, b = answer_place(text)
    assert text[a:b] == found
    ids = BYTES(text)["input_ids"] + [256]
    first, end = answer_tokens(BYTES, ids)
    assert bytes(ids[first:end]).decode() == found


@given(st.text(max_size=60))
def test_any_text_has_a_place_exactly_where_it_has_an_answer(text):
    place = answer_place(text)
    assert (place is not None) == bool(final_answer(text)) and (place is None or text[slice(*place)] == final_answer(text))
    assert 0 <= heuristic("?", text, final_answer(text)) <= 1


# --- confidence from outside, and by looking

def test_an_external_function_is_asked_once_for_each_path(tmp_path):
    run, asked = scripted(tmp_path / "run"), []
    def outside(question, text, answer): asked.append((question, text, answer)); return 0.25 if answer is None else 0.5 + 0.5 * (answer == "7")
    t = PathStore(run, outside).paths
    assert asked == [(q, x, a if isinstance(a, str) else None) for q, x, a in zip(t.question, t.text, t.answer)] and t.answer.isna().any()
    assert t.confidence.tolist() == [0.25 if a is None else 0.5 + 0.5 * (a == "7") for _, _, a in asked]
    n = len(asked)
    pd.testing.assert_frame_equal(PathStore(tmp_path / "run", outside).paths, t)
    assert len(asked) == n and (run.dir / "confidence-outside.parquet").exists()
    before = contents(run.dir.path)
    assert (PathStore(run, lambda q, x, a: 1).paths.confidence == 1).all() and contents(run.dir.path) == before    # a function without a name is kept nowhere


@pytest.mark.parametrize("bad", [float("nan"), 1.0001, -0.1, math.inf, "0.5", None, [0.5], "raise"], ids=str)
def test_what_is_no_confidence_is_refused_and_the_path_is_named(short, bad):
    run, calls = short, []
    def outside(question, text, answer):
        calls.append(1)
        if len(calls) < 4: return 0.5
        if bad == "raise": raise ValueError("no connection")
        return bad
    fourth = PathStore(run, "text").paths.iloc[3]
    with pytest.raises(RewardError, match=f"question '{fourth.question_id}', iteration 0, initial {fourth.init_index}/0: outside"): PathStore(run, outside).paths
    assert not list(run.dir.path.rglob("confidence*"))


def test_best_is_the_most_sure_and_the_first_among_equals(tmp_path):
    run = scripted(tmp_path / "run")
    for confidence in ("text", "heuristic", lambda q, x, a: hash(x) % 7 / 7):
        store = PathStore(run, confidence)
        t = store.paths
        for rows, best in ((t, store.best()), (t[t.right], store.best(right=True)), (t[t.iteration == 2], store.best(iteration=-1))):
            expected = {}
            for r in rows.itertuples():
                if r.question_id not in expected or r.confidence > expected[r.question_id].confidence: expected[r.question_id] = r
            assert {r.question_id: (r.iteration, r.kind, r.init_index, r.corr_index) for r in best.itertuples()} == {q: (r.iteration, r.kind, r.init_index, r.corr_index) for q, r in expected.items()}
    assert store.best(right=True).right.all() and len(store.best()) == 5 and len(PathStore(run, "text", split="test").best()) == 3
    with pytest.raises(IndexError): store.best(iteration=9)


# --- what is there and what is not

def test_log_without_the_file_of_times_has_the_rest(tmp_path):
    run = scripted(tmp_path / "run")
    with (run.dir / "log.jsonl").open("a") as f: f.write('{"iteration": 2, "phase": "tra')
    assert PathStore(run, "text").log.steps.tolist() == run.metrics.n_kept[1:].tolist()
    (run.dir / "log.jsonl").unlink()
    log = PathStore(run, "text").log
    assert log.kept.tolist() == run.metrics.n_kept[1:].tolist() and log.steps.isna().all() and (log.bytes > 0).all()


def test_a_run_with_m_0_alone_and_one_that_was_not_begun(tmp_path):
    run = STaSC(Config(shots=0, prompts="default"), tmp_path / "run", data=Data([Question("a", "Who?", ("x",))], [Question("b", "When?", ("x",))]), engine=ScriptedEngine(lambda *_: "Final Answer: y"), callbacks=[])
    store = PathStore(run, "text")
    assert store.latest is None
    with pytest.raises(StoreError, match="no complete iteration"): store.paths
    run.run()
    assert run.n_done == 1 and store.latest is None and len(store.log) == 0 and len(store.best()) == 1 and len(store.best(right=True)) == 0
    with pytest.raises(ModelError, match="engine has none; take 'text'"): PathStore(run).paths
    with pytest.raises(StoreError, match="not a run directory"): PathStore(tmp_path / "nowhere", "text")
    with pytest.raises(RewardError, match="did you mean 'heuristic'"): PathStore(run, "heuristics")


def test_a_damaged_table_of_confidences_is_an_error_that_says_what_to_do(tmp_path):
    run = scripted(tmp_path / "run")
    def outside(question, text, answer): return 1
    PathStore(run, outside).paths
    file = run.dir / "confidence-outside.parquet"
    for bad in (b"", b"PAR1", (run.dir / "iter_00/initial.train/part-00000.parquet").read_bytes()):
        file.write_bytes(bad)
        with pytest.raises(StoreError, match="delete it, and it is made again"): PathStore(run, outside).paths
    file.unlink()
    assert (PathStore(run, outside).paths.confidence == 1).all() and file.exists()
    run.run()                                                           # nothing of the store is in the run's way
    part = next(run.dir.path.glob("iter_01/corrections.train/*.parquet"))
    shutil.copy(run.dir / "iter_00/kept.parquet", part) if (run.dir / "iter_00/kept.parquet").exists() else part.write_bytes(b"")
    with pytest.raises(StoreError, match="damaged"): PathStore(run, "text").paths


def test_what_a_model_wrote_is_text_in_the_tables_page(tmp_path):
    evil = "<script>alert(1)</script>\nFinal Answer: <b>7</b>"
    run = STaSC(Config(shots=0, prompts="default"), tmp_path / "run", data=Data([Question("<i>a</i>", "<u>Who?</u>", ("x",))], [Question("b", "When?", ("x",))]),
                engine=ScriptedEngine(lambda *_: evil), callbacks=[]).run()
    page = PathStore(run, "text").best().to_html()
    assert "<script>" not in page and "<b>7" not in page and "<u>" not in page and "&lt;script&gt;" in page
