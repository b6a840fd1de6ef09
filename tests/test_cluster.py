"Sweeps and runs on a Ray cluster of two nodes: the same bytes as on one process, whoever dies."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'stasc[ray]'")
import ray
from ray.cluster_utils import Cluster
from test_sweep import BASE, QUESTIONS, Sensitive, ask, swept, tree

from stasc.cluster import Ray, Sharded
from stasc.core import Config, ConfigError, RewardError, SampleError, TrainError, all_variants
from stasc.data import Data
from stasc.loop import STaSC
from stasc.store import part_name
from stasc.sweep import Sweep

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the tests kill processes by signals")


@pytest.fixture(scope="module")
def cluster():
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
    ray.init(address=c.address, log_to_driver=False, logging_level="error")
    yield c
    ray.shutdown()
    c.shutdown()


@pytest.fixture
def second(cluster):
    "A second node, which a test may kill."
    node = cluster.add_node(num_cpus=2, resources={"second": 2})
    cluster.wait_for_nodes()
    yield node
    if node in cluster.list_all_nodes(): cluster.remove_node(node)


class Slow(Sensitive):
    "Takes its time, and notes who is at work."
    def __init__(self, cfg=None): super().__init__(cfg); Path(os.environ.get("AT_WORK", "/dev/null")).open("a").write(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}\n")
    def sample(self, *args): time.sleep(.05); return super().sample(*args)


def at_work(tmp_path): return [line.split() for line in (tmp_path / "at_work").read_text().splitlines()] if (tmp_path / "at_work").exists() else []


def waited(found, seconds=60):
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end: time.sleep(.02)
    assert found()
    return found()


def slow(tmp_path):
    "Engines that write down where they are, in a process that knows no environment of ours."
    path = str(tmp_path / "at_work")
    def make(cfg): os.environ["AT_WORK"] = path; return Slow(cfg)
    return make


GRID = dict(variant=list(map(str, all_variants())), seed=[0])


# --- sweeps

def test_sweep_over_two_nodes_is_the_local_one_though_a_worker_and_a_node_are_killed(second, tmp_path):
    made = {}
    thread = threading.Thread(target=lambda: made.update(s=swept(GRID, tmp_path / "there", BASE.replace(iterations=4), engine=slow(tmp_path), workers=Ray(workers=4))))
    thread.start()
    waited(lambda: len({n for _, n in at_work(tmp_path)}) == 2)             # both nodes are at it
    os.kill(int(at_work(tmp_path)[0][0]), signal.SIGKILL)
    waited(lambda: len(at_work(tmp_path)) > 4)                              # a new process has begun
    second.kill_all_processes(check_alive=False, allow_graceful=False)
    thread.join(150)
    assert not thread.is_alive() and len(at_work(tmp_path)) > 5
    local = swept(GRID, tmp_path / "here", BASE.replace(iterations=4))
    assert (tmp_path / "there/table.csv").read_bytes() == (tmp_path / "here/table.csv").read_bytes()
    assert {k: v for k, v in tree(tmp_path / "there").items() if "manifest" not in k} == {k: v for k, v in tree(tmp_path / "here").items() if "manifest" not in k}
    assert list(made["s"].table.status.unique()) == ["complete"] and local.trials == made["s"].trials


@pytest.mark.parametrize("wrong", [dict(workers=0), dict(gpus=-1), dict(cpus=0), dict(retries=-1)])
def test_what_ray_is_asked_for_is_checked(wrong):
    with pytest.raises(ConfigError, match=f"Ray: {next(iter(wrong))} = "): Ray(**wrong)


def test_more_than_the_cluster_has_is_refused(cluster, tmp_path):
    with pytest.raises(ConfigError, match="no machine of the cluster has 1 CPUs and 3 GPUs"): Ray(gpus=3).room()
    with pytest.warns(UserWarning, match="^Ray: 3 processes with 1 CPUs and 0 GPUs each are asked for, and the cluster has room for 2; unless it grows"): assert Ray(workers=3).room() == 3
    assert Ray().room() == Ray(cpus=.5).room(4) // 2 == 2


@pytest.mark.parametrize("needs, fit", [(dict(), 16), (dict(cpus=3), 5), (dict(gpus=1), 4), (dict(gpus=.1), 16), (dict(gpus=.3), 12), (dict(gpus=.6), 4), (dict(gpus=2), 2), (dict(gpus=3), 1), (dict(gpus=5), 0), (dict(cpus=.1), 160)])
def test_how_many_a_machine_has_room_for(needs, fit): assert Ray(**needs)._fit(dict(CPU=16., GPU=4.)) == fit


def test_trial_that_kills_its_process_each_time_fails_and_the_others_do_not(cluster, tmp_path):
    def make(cfg):
        if cfg.seed == 1: os.kill(os.getpid(), signal.SIGKILL)
        return Sensitive(cfg)
    s = swept(dict(seed=[0, 1, 2]), tmp_path / "s", engine=make, workers=Ray(retries=1))
    assert [s.state(n)[0] for n in s.trials] == ["complete", "failed", "complete"]
    assert "died 2 times" in s.state("seed=1")[1]
    again = swept(None, tmp_path / "s", workers=Ray())                      # the rest is done later, elsewhere or not
    assert [again.state(n)[0] for n in again.trials] == ["complete"] * 3


# --- one run over several engines

QS = Data(ask(11, "train"), ask(7, "test"))


def sharded(out, workers=2, engine=Sensitive, variant="EIE", callbacks=(), **options):
    return Sharded(BASE.replace(variant=variant, n_train=11, n_test=7, **options), out, data=QS, on=Ray(workers=workers, cpus=.25), engine=engine, callbacks=list(callbacks))


def unsorted(folder): return {k: v for k, v in tree(folder).items() if k != "manifest.jsonl"}


def manifest(folder): return sorted((folder / "manifest.jsonl").read_text().splitlines())


@pytest.mark.parametrize("variant", ["EIE", "FNF"])
def test_run_over_one_two_and_four_engines_is_the_run_of_one_process(cluster, tmp_path, variant):
    STaSC(BASE.replace(variant=variant, n_train=11, n_test=7), tmp_path / "alone", data=QS, engine=Sensitive(), callbacks=[]).run()
    for workers in (1, 2, 4):
        run = sharded(tmp_path / str(workers), workers, variant=variant).run()
        assert unsorted(tmp_path / str(workers)) == unsorted(tmp_path / "alone") and manifest(tmp_path / str(workers)) == manifest(tmp_path / "alone")
        assert run.actors == []
    again = STaSC.open(tmp_path / "4", engine=Sensitive(), callbacks=[])
    assert again.run().n_done == 3 and unsorted(tmp_path / "4") == unsorted(tmp_path / "alone")


def test_run_goes_on_where_an_engine_is_killed(cluster, tmp_path):
    seen = []
    class Kill:
        def on_phase(self, run, n, phase, done, total):
            if not seen and (n, phase) == (1, "corrections.train") and 0 < done < total:
                seen.append(done)
                os.kill(int(at_work(tmp_path)[-1][0]), signal.SIGKILL)
    sharded(tmp_path / "run", 2, slow(tmp_path), callbacks=[Kill()]).run()
    assert seen and len(at_work(tmp_path)) == 3                             # one was made anew
    sharded(tmp_path / "plain").run()
    assert unsorted(tmp_path / "run") == unsorted(tmp_path / "plain")


def test_interrupted_run_goes_on_anywhere(cluster, tmp_path):
    class Stop:
        def on_phase(self, run, n, phase, done, total):
            if (n, phase) == (1, "initial.train") and done > 4: raise KeyboardInterrupt
    run = sharded(tmp_path / "run", 3, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt): run.run()
    assert run.actors == [] and run.n_done == 1
    run.callbacks = []
    STaSC.open(tmp_path / "run", engine=Sensitive(), callbacks=[]).run()
    sharded(tmp_path / "plain").run()
    assert unsorted(tmp_path / "run") == unsorted(tmp_path / "plain")


def test_manifest_counts_and_the_driver_holds_no_table(cluster, tmp_path, monkeypatch):
    import stasc.store
    written = []
    monkeypatch.setattr(stasc.store, "write_table", lambda *a: written.append(a))       # in this process alone
    sharded(tmp_path / "run").run()
    assert written == []
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[0]["phase"] == "load" and log[0]["engines"] == 2 and {"initial.train", "corrections.test", "train", "metrics"} <= {r["phase"] for r in log}


def test_mistakes_elsewhere_are_one_sentence_here(cluster, tmp_path):
    def bad(answer, references): return 7. if answer and len(answer) else 0.
    bad.__name__ = "bad"
    with pytest.raises(RewardError, match=r"^M_0, initial\.train, question 'train\d+', initial answer \d: reward bad gave 7\.0") as e:
        Sharded(BASE.replace(n_train=11, n_test=7), tmp_path / "run", data=QS, on=Ray(workers=2, cpus=.25), engine=Sensitive, reward=bad, callbacks=[]).run()
    assert str(e.value).endswith("and resume the run")
    class Broken(Sensitive):
        def sample(self, *args): raise SampleError("out of order")
    with pytest.raises(SampleError, match="^out of order$"): sharded(tmp_path / "other", engine=Broken).run()
    assert not list((tmp_path / "other").rglob(".tmp-*"))


def test_run_that_keeps_nothing_ends_in_good_order(cluster, tmp_path):
    class Wrong(Sensitive):
        def sample(self, prompts, n, params, seeds): return [[s.__class__(**vars(s) | dict(text="Final Answer: 0")) for s in row] for row in super().sample(prompts, n, params, seeds)]
    run = sharded(tmp_path / "run", engine=Wrong).run()
    assert run.n_done == 1 and "none of its corrections passed" in run.ended


def test_engines_put_their_parts_into_a_bucket(cluster, tmp_path):
    run = sharded(f"file://{tmp_path}/there").run()
    sharded(tmp_path / "here").run()
    assert run.n_done == 3 and {k: v for k, v in unsorted(tmp_path / "there").items() if not k.startswith("manifest/")} == unsorted(tmp_path / "here")


def test_engine_that_kills_its_process_each_time_stops_the_run_with_a_sentence(cluster, tmp_path):
    class Deadly(Sensitive):
        def sample(self, *args): os.kill(os.getpid(), signal.SIGKILL)
    run = Sharded(BASE.replace(n_train=11, n_test=7), tmp_path / "run", data=QS, on=Ray(workers=1, cpus=.25, retries=1), engine=Deadly, callbacks=[])
    with pytest.raises(SampleError, match="died more than 1 times"): run.run()
    assert run.actors == [] and sharded(tmp_path / "run").run().n_done == 3


# --- fine-tuning by several, which Ray Train starts

REAL = Config.demo(n_train=16, n_test=4, part_size=8, train_batch=4, device="cpu")


def trained(run): return [e for e in map(json.loads, (run.dir / "log.jsonl").read_text().splitlines()) if e["phase"] == "train"]


@pytest.mark.parametrize("options, fsdp, where", [(dict(), False, "file://{}"), (dict(finetune="full"), True, "{}")], ids=["copies", "pieces"])
def test_learners_learn_what_one_process_does(cluster, tmp_path, options, fsdp, where):
    from safetensors.torch import load_file
    one = STaSC(REAL.replace(iterations=2, **options), tmp_path / "one", callbacks=[]).run()
    two = Sharded(one.cfg, where.format(tmp_path / "two"), on=Ray(workers=2, cpus=.25, learners=2, fsdp=fsdp), callbacks=[]).run()
    assert two.n_done == 3 and [e["processes"] for e in trained(two)] == [2, 2]
    for a, b in zip(trained(one), trained(two)):
        assert (a["steps"], a["tokens"]) == (b["steps"], b["tokens"]) and [b["first_loss"], b["last_loss"]] == pytest.approx([a["first_loss"], a["last_loss"]], abs=1e-4)
    for n in (1, 2):
        a, b = (load_file(next((tmp_path / o / f"iter_{n:02d}" / one._kind).glob("*.safetensors"))) for o in ("one", "two"))
        assert a.keys() == b.keys() and max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4
    assert two.trajectories.corr_text.tolist() == one.trajectories.corr_text.tolist()


def others():
    "Processes that take part in a fine-tuning of Ray Train, but for this one."
    names = {p: (p / "cmdline").read_bytes() for p in Path("/proc").iterdir() if p.name.isdigit() and (p / "cmdline").exists()}
    return [int(p.name) for p, name in names.items() if b"RayTrainWorker" in name and int(p.name) != os.getpid()]


def deadly(tmp_path):
    "Engines whose first fine-tuning loses a follower, and whose second its leader."
    noted = str(tmp_path / "fits")
    def make(cfg):
        from stasc.train import Engine
        class Deadly(Engine):
            def train(self, *args):
                with open(noted, "a") as f: f.write("x")
                met = os.path.getsize(noted)
                if met == 1: [os.kill(pid, signal.SIGKILL) for pid in others()]
                if met == 2: os.kill(os.getpid(), signal.SIGKILL)
                return super().train(*args)
        return Deadly(cfg)
    return make


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found in /proc")
def test_fine_tuning_begins_again_where_a_learner_dies(cluster, tmp_path):
    cfg = REAL.replace(iterations=1)
    run = Sharded(cfg, tmp_path / "run", on=Ray(workers=1, cpus=.25, learners=2, retries=2), engine=deadly(tmp_path), callbacks=[]).run()
    assert run.n_done == 2 and (tmp_path / "fits").read_text() == "xxx" and len(trained(run)) == 1
    waited(lambda: not others())
    (tmp_path / "fits").unlink()
    run = Sharded(cfg, tmp_path / "other", on=Ray(workers=1, cpus=.25, learners=2, retries=0), engine=deadly(tmp_path), callbacks=[])
    with pytest.raises(TrainError, match="takes part in fine-tuning died 1 times"): run.run()
    assert run.n_done == 1 and run.actors == []


def test_mistake_of_the_user_is_not_tried_again(cluster, tmp_path):
    noted = str(tmp_path / "made")
    def make(cfg):
        from stasc.train import Engine
        with open(noted, "a") as f: f.write("x")
        class Wrong(Engine):
            def train(self, *args): raise TrainError("lower the rate")              # its follower waits to be told what to learn
        return Wrong(cfg)
    run = Sharded(REAL.replace(iterations=1), tmp_path / "run", on=Ray(workers=1, cpus=.25, learners=2), engine=make, callbacks=[])
    with pytest.raises(TrainError, match="^lower the rate$"): run.run()
    assert (tmp_path / "made").read_text() == "xx" and run.n_done == 1              # an engine to draw, and one that was to learn


def test_interrupted_fine_tuning_leaves_nobody_at_work(cluster, tmp_path):
    begun = str(tmp_path / "begun")
    def make(cfg):
        from stasc.train import Engine
        class Waits(Engine):
            def train(self, *args): Path(begun).touch(); time.sleep(600)
        return Waits(cfg)
    run = Sharded(REAL.replace(iterations=1), tmp_path / "run", on=Ray(workers=1, cpus=.25, learners=2), engine=make, callbacks=[])
    threading.Thread(target=lambda: (waited(Path(begun).exists, 240), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    with pytest.raises(KeyboardInterrupt): run.run()
    waited(lambda: not others())
    assert run.n_done == 1 and run.fitting is None
    assert STaSC.open(tmp_path / "run", callbacks=[]).run().n_done == 2


@pytest.mark.parametrize("wrong, said", [(dict(learners=0), "learners = 0 is out of range"), (dict(fsdp=True), "needs at least 2 learners"), (dict(learners=2, gpus=.5), "need whole GPUs")])
def test_what_is_asked_of_learners_is_checked(wrong, said):
    with pytest.raises(ConfigError, match=said): Ray(**wrong)


def test_adapter_is_not_cut_into_pieces(tmp_path):
    with pytest.raises(ConfigError, match="FSDP is for full fine-tuning"): Sharded(REAL, tmp_path / "run", on=Ray(learners=2, fsdp=True))
    assert not (tmp_path / "run").exists()


# --- the table, and the death of the driver

def test_the_table_says_what_runs_on_the_cluster(cluster, tmp_path, monkeypatch):
    from test_sweep import rows_of, until

    from stasc.sweep import LiveTable
    gate, seen = tmp_path / "gate", []
    def make(cfg):
        class Gated(Sensitive):
            def train(self, *args): until(gate.exists); return super().train(*args)
        return Gated(cfg)
    def show(self, bundle):
        seen.append(rows_of(bundle))
        if [r[1:3] + r[-1:] for r in seen[-1]] == [["running", "M_0 of 1", "M_1 train"]] * 2 + [["waiting", "", ""]]: gate.touch()
    monkeypatch.setattr("stasc.sweep._in_notebook", lambda: True)
    monkeypatch.setattr(LiveTable, "every", .01)
    monkeypatch.setattr(LiveTable, "_show", show)
    s = swept(dict(seed=[0, 1, 2]), tmp_path / "s", BASE.replace(iterations=1), engine=make, workers=Ray(workers=2, cpus=.5), shown=print)
    assert gate.exists() and [r[1:3] for r in seen[-1]] == [["complete", "M_1 of 1"]] * 3
    assert [s.state(n)[0] for n in s.trials] == ["complete"] * 3


def driver(cluster, tmp_path, work):
    "A program that has the cluster do something."
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    (tmp_path / "driver.py").write_text(f"import sys; sys.path[:0] = {paths!r}\nfrom pathlib import Path\nfrom test_cluster import *\n"
                                        f"ray.init(address={cluster.address!r}, log_to_driver=False, logging_level='error')\ntmp_path = Path({str(tmp_path)!r})\n{work}\n")
    return subprocess.Popen([sys.executable, tmp_path / "driver.py"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed_when(process, found):
    try: waited(lambda: found() or process.poll() is not None)
    finally: process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def test_sweep_whose_driver_is_killed_ends_as_the_local_one(cluster, tmp_path):
    out, small = tmp_path / "there", BASE.replace(iterations=2)
    dead = driver(cluster, tmp_path, "swept(dict(seed=range(4)), tmp_path / 'there', BASE.replace(iterations=2), engine=slow(tmp_path), workers=Ray(workers=2))")
    drawn = lambda: [len(list(out.glob(f"seed={k}/iter_01/initial.train/*.parquet"))) for k in range(4)]
    killed_when(dead, lambda: sum(map(bool, drawn())) >= 2)
    assert "open" in [Sweep.open(out).state(f"seed={k}")[0] for k in range(4)]   # the driver died in the middle
    swept(dict(seed=range(4)), out, small, engine=slow(tmp_path), workers=Ray(workers=2))
    swept(dict(seed=range(4)), tmp_path / "here", small)
    assert (out / "table.csv").read_bytes() == (tmp_path / "here/table.csv").read_bytes()
    assert {k: v for k, v in tree(out).items() if "manifest" not in k} == {k: v for k, v in tree(tmp_path / "here").items() if "manifest" not in k}


def test_run_whose_driver_is_killed_ends_as_the_run_of_one_process(cluster, tmp_path):
    dead = driver(cluster, tmp_path, "sharded(tmp_path / 'run', 2, slow(tmp_path)).run()")
    drawn = lambda: (tmp_path / "run/manifest.jsonl").exists() and (tmp_path / "run/manifest.jsonl").read_text().count("iter_01/corrections.train")
    killed_when(dead, lambda: drawn() and 1 <= drawn())
    assert 1 <= drawn() < 6 and STaSC.open(tmp_path / "run", callbacks=[]).n_done == 1      # in the middle of a phase of six parts
    run = sharded(tmp_path / "run", 2, slow(tmp_path)).run()
    STaSC(BASE.replace(n_train=11, n_test=7), tmp_path / "alone", data=QS, engine=Sensitive(), callbacks=[]).run()
    assert run.n_done == 3 and unsorted(tmp_path / "run") == unsorted(tmp_path / "alone") and manifest(tmp_path / "run") == manifest(tmp_path / "alone")
