"STaR against its description, killed and resumed; SC written out without the loop against `FIE`."
import json

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from stasc.core import Config, PromptError, Question, StoreError, derive_seed
from stasc.data import Data
from stasc.loop import STaSC
from stasc.prompt import Prompter, PromptSet, prompt_set
from stasc.reward import final_answer, judge
from stasc.star import HINTS, STaR, _mended, hinted_messages, sc
from stasc.train import Example, ScriptedEngine

TIMES = {".lock", "log.jsonl"}


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in TIMES}


def reasoner(prompt, rng, skill):
    if "Hint" in prompt and rng.random() < 0.5: return "So it must be.\nFinal Answer: right"
    return f"Let me see.\nFinal Answer: {'right' if rng.random() < 0.25 + 0.1 * skill else 'wrong'}"


def ask(split, n): return [Question(f"{split}{i}", f"{split} question {i}?", ("right",)) for i in range(n)]


class Watched(ScriptedEngine):
    "Notes what it is trained on, and stops at the k-th call."
    def __init__(self, k=None): super().__init__(reasoner); self.k, self.calls, self.trained = k, 0, []
    def _call(self):
        if self.calls == self.k: raise KeyboardInterrupt
        self.calls += 1
    def sample(self, *a): self._call(); return super().sample(*a)
    def train(self, examples, start, out, cfg, seed): self._call(); self.trained.append((examples, start)); return super().train(examples, start, out, cfg, seed)


def made(out, engine=None, **options):
    cfg = Config(iterations=2, n_init=2, shots=0, prompts="default", part_size=4)
    return STaR(cfg, out, data=Data(ask("train", 10), ask("test", 6)), engine=engine or Watched(), callbacks=[], **options)


# --- STaR

def read(run, n, phase): return pd.concat([pd.read_parquet(run.dir / p) for p in run.dir.part_names(n, phase)])


@pytest.mark.parametrize("rationalise", [True, False])
def test_what_is_learned_is_every_right_rationale_and_the_hint_is_not_in_it(tmp_path, rationalise):
    run = made(tmp_path / "run", rationalise=rationalise).run()
    asked = {q.id: q for q in run.data.train}
    for n in (0, 1):
        own = read(run, n, "initial.train")
        right = own[own.init_reward >= 1]
        expected = [(q, tuple(i)) for q, i in zip(right.question_id, right.init_token_ids)]
        failed = set(asked) - set(right.question_id)
        assert 0 < len(failed) < len(asked)
        if rationalise:
            hinted = read(run, n, "hinted.train")
            assert set(hinted.question_id) == failed and len(hinted) == 2 * len(failed)
            mended = hinted[hinted.init_reward >= 1]
            assert len(mended)
            expected += [(q, tuple(i)) for q, i in zip(mended.question_id, mended.init_token_ids)]
        else: assert not run.dir.part_names(n, "hinted.train")
        examples, start = run.engine.trained[n]
        assert start is None                                            # from M_0 in each round
        assert sorted((tuple(run.prompter.initial(asked[q])), i) for q, i in expected) == sorted((tuple(e.prompt_ids), tuple(e.completion_ids)) for e in examples)
        assert not any(b"Hint" in bytes(e.prompt_ids) for e in examples)
        m = run.metrics.loc[n + 1]
        assert (m.n_kept, m.n_hinted) == (len(expected), len(expected) - len(right))
        assert run.metrics.train_acc_t1[n] == pytest.approx(own.init_reward.mean()) and run.metrics.failed[n] == len(failed)


def test_held_out_questions_get_no_hint(tmp_path):
    seen = []
    class Listens(Watched):
        def sample(self, prompts, *a): seen.extend(bytes(p).decode() for p in prompts); return super().sample(prompts, *a)
    run = made(tmp_path / "run", Listens()).run()
    assert any("Hint" in p for p in seen) and not any("Hint" in p and "test question" in p for p in seen)
    t = run.trajectories.query("split == 'test'")
    assert (t.init_text == t.corr_text).all() and not t.kept.any() and (t.corr_index == 0).all()


def test_stopped_at_any_call_and_resumed_gives_the_same_bytes(tmp_path):
    whole = made(tmp_path / "whole").run()
    expected, total = contents(tmp_path / "whole"), whole.engine.calls
    assert total > 20
    for k in range(0, total, 3):
        out = tmp_path / f"stopped{k}"
        with pytest.raises(KeyboardInterrupt): made(out, Watched(k)).run()
        run = STaR.open(out, engine=Watched(), callbacks=[]) if k % 2 and (out / "star.json").exists() else made(out)
        run.run()
        assert contents(out) == expected, k
    assert run.engine.calls < total


def test_more_rounds_later_are_the_same_as_at_once(tmp_path):
    made(tmp_path / "a").run()
    STaR.open(tmp_path / "a", engine=Watched(), callbacks=[], iterations=3).run()
    b = STaR(made(tmp_path / "x").cfg.replace(iterations=3), tmp_path / "b", data=Data(ask("train", 10), ask("test", 6)), engine=Watched(), callbacks=[]).run()
    a, b = contents(tmp_path / "a"), contents(b.dir.path)
    assert a == b


def test_a_round_without_a_right_rationale_ends_the_run_with_a_reason(tmp_path, capsys):
    run = STaR(Config(shots=0), tmp_path / "run", data=Data(ask("train", 3), ask("test", 2)), engine=ScriptedEngine(lambda *_: "Final Answer: wrong"), callbacks=[]).run()
    assert run.n_done == 1 and "none of its rationales had a right answer" in run.ended and "with M_0" in capsys.readouterr().out


def test_runs_of_star_and_stasc_do_not_mix(tmp_path):
    star = made(tmp_path / "star").run()
    plain = STaSC(star.cfg, tmp_path / "plain", data=star.data, engine=Watched(), callbacks=[]).run()
    with pytest.raises(StoreError, match="no run of STaR"): STaR(star.cfg, tmp_path / "plain", data=star.data, engine=Watched(), iterations=3, callbacks=[]).run()
    with pytest.raises(StoreError, match="no run of STaR"): STaR.open(plain.dir.path)
    before = contents(star.dir.path)
    with pytest.raises(StoreError): STaSC(star.cfg, tmp_path / "star", data=star.data, engine=Watched(), iterations=3, callbacks=[]).run()
    with pytest.raises(StoreError, match="another hint"): made(tmp_path / "star", hint="{user} It is {reference}.").run()
    assert contents(star.dir.path) == before
    (tmp_path / "star/star.json").write_text(json.dumps(["x"]))
    with pytest.raises(StoreError, match="settings of STaR"): STaR.open(tmp_path / "star")


@pytest.mark.parametrize("hint", ["", "{user}", "{reference}", "It is so."])
def test_a_hint_that_lacks_the_question_or_the_answer_is_refused(tmp_path, hint):
    with pytest.raises(PromptError, match="must hold"): made(tmp_path / "run", hint=hint)


def test_the_table_has_the_runs_figures_and_intervals_around_them(tmp_path):
    run = made(tmp_path / "run").run()
    t, m = run.table(), run.metrics
    assert t.test.tolist() == m.test_acc_t1.round(3).tolist() and t.kept.tolist() == m.n_kept.tolist()
    assert (t.lo <= t.test).all() and (t.test <= t.hi).all() and t.index.tolist() == [0, 1, 2]


# --- the hint

reference = st.text("abc123 ", min_size=1).map(str.strip).filter(bool)


@given(st.text(), reference)
def test_a_mended_rationale_gives_the_reference_as_its_answer(text, ref):
    assert final_answer(_mended(text, ref)) == ref
    assert final_answer(_mended(f"{text}\nFinal Answer: 7\nThat is all.", ref)) == ref


@given(st.text("{}userfnca ", max_size=30), st.text("{}rtionale ", max_size=30))
def test_fields_in_texts_are_not_filled_again(text, rationale):
    q = Question("x", f"{text} {{reference}}?", ("{rationale}",))
    said = hinted_messages(prompt_set("arithmetic"), q, rationale, "{user}|{reference}|{rationale}")[-1]["content"]
    user = said.split("|")[0]
    assert user == f"{text} {{reference}}?".strip() and said[len(user):].startswith("|{rationale}|")


@pytest.mark.parametrize("name", sorted(HINTS))
def test_every_packaged_prompt_set_has_a_hint_that_tells_the_answer(name):
    said = hinted_messages(prompt_set(name), Question("x", "What is it?", ("forty",)), "Final Answer: seventeen", HINTS[name])
    assert "forty" in said[-1]["content"] and "What is it?" in said[-1]["content"] and "seventeen" not in said[-1]["content"]


def test_a_prompt_set_of_ones_own_gets_the_general_hint(tmp_path):
    run = made(tmp_path / "run")
    run._prompts = PromptSet("mine", dict(user="{question}"), dict(user="{question} {initial_answer}"))
    assert run.hint == HINTS["default"]


# --- SC

def rounds_of_sc(engine, cfg, data, folder):
    "SC from its description: a generator that stays, a corrector that goes on from itself. Kept sets and adapters by round."
    generator = corrector = None
    prompter, reward = Prompter(engine.tokenizer, cfg, engine.context_length), lambda s, q: judge(s.text, q.references, cfg.reward, cfg.scope)[1]
    engine.use(generator)
    answers = engine.sample([prompter.initial(q) for q in data.train], cfg.n_init, cfg.params,
                            [[derive_seed(cfg.seed, 0, "initial.train", q.id, j, 0) for j in range(cfg.n_init)] for q in data.train])
    asked = [(q, j, a) for q, row in zip(data.train, answers) for j, a in enumerate(row)]
    for n in range(1, cfg.iterations + 1):
        engine.use(corrector)
        corrections = engine.sample([prompter.correction(q, a.text) for q, _, a in asked], cfg.n_corr, cfg.params,
                                    [[derive_seed(cfg.seed, n - 1, "corrections.train", q.id, j, k) for k in range(cfg.n_corr)] for q, j, _ in asked])
        better = [(q, j, k, a, c) for (q, j, a), row in zip(asked, corrections) for k, c in enumerate(row) if reward(c, q) > reward(a, q)]
        out = folder / f"corrector{n}"
        out.mkdir()
        engine.train([Example(tuple(prompter.correction(q, a.text)), tuple(c.token_ids)) for q, _, _, a, c in better], corrector, out, cfg, derive_seed(cfg.seed, n, "train") % 2**31)
        corrector = out
        yield [(q.id, j, k) for q, j, k, *_ in better], (out / "adapter_model.safetensors").read_bytes()


def test_sc_is_fie_in_kept_sets_and_adapters_byte_for_byte(embedded, tmp_path):
    cfg = sc(Config.demo(device="cpu"), iterations=2, n_train=32, n_test=8, part_size=10)
    assert cfg.variant == "FIE"
    run = STaSC(cfg, tmp_path / "sc", engine=embedded, callbacks=[]).run()
    other = STaSC(cfg.replace(variant="EIE"), tmp_path / "eie", engine=embedded, callbacks=[]).run()
    ours = lambda r, n: list(r.kept[r.kept.iteration == n][["question_id", "init_index", "corr_index"]].itertuples(index=False, name=None))
    adapter = lambda r, n: (r.dir / f"iter_{n:02d}/adapter/adapter_model.safetensors").read_bytes()
    for n, (kept, weights) in enumerate(rounds_of_sc(embedded, cfg, run.data, tmp_path), 1):
        assert len(kept) > 3 and kept == ours(run, n) and weights == adapter(run, n)
    assert kept != ours(other, 2) and weights != adapter(other, 2)
    embedded.use(None)


def test_star_on_the_embedded_model_trains_on_the_plain_question(embedded, tmp_path):
    run = STaR(Config.demo(device="cpu"), tmp_path / "star", engine=embedded, callbacks=[], iterations=1, n_train=32, n_test=8).run()
    pairs = run._pairs(0, "train").query("kept")
    plain = {tuple(run.prompter.initial(q)) for q in run.data.train}
    assert len(pairs) and {e.prompt_ids for e in run._examples(pairs)} <= plain
    assert run.n_done == 2 and run.metrics.failed[0] > 0
    embedded.use(None)
