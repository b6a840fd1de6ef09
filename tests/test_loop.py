"What Algorithm 1 says about the variants, on the embedded model; what a run is given is checked."
import pytest

from stasc.core import Config, ConfigError, DataError, Question
from stasc.data import Data
from stasc.loop import STaSC
from stasc.train import ScriptedEngine

TIMES = {".lock", "log.jsonl"}


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in TIMES}


@pytest.fixture(scope="module")
def runs(embedded, tmp_path_factory):
    "Runs of several variants with one seed and one engine."
    made = {}
    def run(variant):
        if variant not in made:
            cfg = Config.demo(device="cpu", variant=variant, iterations=2, n_train=48, n_test=16)
            made[variant] = STaSC(cfg, tmp_path_factory.mktemp("runs") / variant, engine=embedded, callbacks=[]).run()
            assert made[variant].n_done == 3 and (made[variant].metrics.n_kept[1:] > 0).all()
        return made[variant]
    return run


def test_evolving_and_fixed_fine_tuning_agree_in_iteration_1_and_part_in_2(runs):
    eie, eif = (contents(runs(v).dir.path) for v in ("EIE", "EIF"))
    first = [name for name in eie if name.startswith(("iter_00", "iter_01"))]
    assert "iter_01/adapter/adapter_model.safetensors" in first and {n: eie[n] for n in first} == {n: eif[n] for n in first}
    assert eie["iter_02/kept.parquet"] == eif["iter_02/kept.parquet"]
    assert eie["iter_02/adapter/adapter_model.safetensors"] != eif["iter_02/adapter/adapter_model.safetensors"]


def test_fixed_initialization_draws_once_and_reports_transfer_beside_it(runs):
    fie = runs("FIE")
    folders = {p.name for n in (1, 2) for p in (fie.dir / f"iter_{n:02d}").iterdir()}
    assert not {"initial.train", "initial.test"} & folders and "transfer.test" in folders
    assert fie.metrics.test_acc_t1.nunique() == 1 and fie.metrics.transfer_acc_t1.notna().sum() == 2
    t = fie.trajectories.drop_duplicates(["iteration", "split", "question_id", "init_index"])
    assert (t.groupby(["split", "question_id", "init_index"]).init_text.nunique() == 1).all()


def test_one_engine_serves_runs_with_other_training_settings(embedded, runs, tmp_path):
    slow = STaSC(runs("EIE").cfg.replace(learning_rate=1e-5, iterations=1), tmp_path / "slow", engine=embedded, callbacks=[]).run()
    name = "iter_01/adapter/adapter_model.safetensors"
    assert (slow.dir / name).read_bytes() != (runs("EIE").dir / name).read_bytes()


def test_an_engine_with_another_adapter_is_refused(embedded, tmp_path):
    with pytest.raises(ConfigError, match="another lora_r"): STaSC(Config.demo(device="cpu", lora_r=4), tmp_path / "run", engine=embedded)


def questions(*ids): return [Question(i, f"What is {i}?", (i,)) for i in ids]


@pytest.mark.parametrize("train, test, sentence", [(questions("a", "b"), questions("b"), "b"), (questions("a", "a"), questions("b"), "'a'")])
def test_questions_that_leak_or_share_an_id_are_refused(tmp_path, train, test, sentence):
    engine = ScriptedEngine(lambda prompt, rng, skill: "Final Answer: a")
    with pytest.raises(DataError, match=sentence): STaSC(Config(), tmp_path / "run", data=Data(train, test), engine=engine)
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_reward_of_its_own_is_shown_and_says_what_it_lacks_to_go_on(tmp_path):
    def starts_right(prediction, references): return float(prediction.startswith(references[0]))
    engine = ScriptedEngine(lambda prompt, rng, skill: f"Final Answer: {rng.choice('ab')}")
    data = Data(questions("a", "b"), questions("c"))
    run = STaSC(Config(iterations=1, shots=0, n_init=4), tmp_path / "run", data=data, engine=engine, reward=starts_right, callbacks=[]).run()
    assert STaSC.open(tmp_path / "run").table().equals(run.table())
    with pytest.raises(Exception, match="unknown reward 'starts_right'"): STaSC.open(tmp_path / "run", iterations=2, engine=engine).run()
    assert STaSC.open(tmp_path / "run", iterations=2, engine=engine, reward=starts_right, callbacks=[]).run().n_done == 3


def test_asking_a_model_in_a_callback_changes_nothing(tmp_path):
    def script(prompt, rng, skill): return f"Final Answer: {'a' if rng.random() < 0.3 + 0.2 * skill else 'z'}"
    class Asks:
        def on_phase(self, run, *_):
            if run.n_done: run.evaluate(questions("a"), iteration=0)
    made = []
    for name, callbacks in (("asked", [Asks()]), ("left alone", [])):
        run = STaSC(Config(iterations=2, shots=0, part_size=1), tmp_path / name, data=Data(questions("a", "b"), questions("c")), engine=ScriptedEngine(script), callbacks=callbacks)
        made.append(contents(run.run().dir.path))
    assert made[0] == made[1]
