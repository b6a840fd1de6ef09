"A run over Ray actors that each have a vLLM process: the texts of one process, whoever is killed, and nobody is left behind."
import os
import signal
import tempfile
from pathlib import Path

import pytest
from test_sample_vllm import alive, gone          # skips where vLLM is not installed

if os.environ.get("STASC_VLLM") != "required":
    pytest.importorskip("ray", reason="Ray is not installed beside vLLM: `make test-vllm` installs it and runs these tests")
import ray

from stasc.cluster import Ray, Sharded
from stasc.core import Config, ConfigError, SampleError
from stasc.loop import STaSC
from stasc.sample_vllm import Killed
from stasc.train import Engine

CONFIG = Config.demo(device="cpu", sampler="vllm", iterations=1, n_train=8, n_test=4, n_init=2, n_corr=2, part_size=4, threshold=1.0, train_batch=2)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as m, tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as tmp:      # a short path: Ray has sockets there
        m.setenv("TMPDIR", tmp)
        m.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]))
        m.setenv("RAY_raylet_start_wait_time_s", "120")
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield Path(tmp)
        ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The run of one process."
    run = STaSC(CONFIG, tmp_path_factory.mktemp("alone") / "run", callbacks=[]).run()
    assert run.n_done == 2 and len(run.kept) > 0
    run.engine.sampler.close()
    return run


class See:
    "Notes the processes of the actors and of their vLLM, and does something at a point of the run."
    def __init__(self, at=None, do=None): self.seen, self.at, self.do = set(), at, do

    def on_phase(self, run, n, phase, done, total):
        def pids(actor):
            child = actor.run._engine.sampler.child
            return os.getpid(), child and child.process.pid
        if phase != "train" and done in (0, total):                         # nobody is at work
            self.now = ray.get([a.__ray_call__.remote(pids) for a in run.actors])
            self.seen |= {i for pair in self.now for i in pair if i}
        if self.at == (n, phase, done): self.do(run, *self.now[0])


def sharded(folder, workers, see): return Sharded(CONFIG, folder, on=Ray(workers=workers), engine=Engine, callbacks=[see])


def files(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name not in ("log.jsonl", "manifest.jsonl", ".lock")}


@pytest.mark.parametrize("workers", [1, 2])
def test_run_over_actors_is_the_run_of_one_process(cluster, alone, tmp_path, workers):
    see = See()
    run = sharded(tmp_path / "run", workers, see).run()
    assert run.n_done == 2 and run.trajectories.equals(alone.trajectories) and files(tmp_path / "run") == files(alone.dir.path)
    assert len(see.seen) == 2 * workers and all(gone(i) for i in see.seen)
    assert any(cluster.glob("vllm_dist_*")) and not any(cluster.glob("stasc-vllm-*"))     # temporary files are written there, and no copy of a model stays


def test_run_goes_on_where_vllm_or_its_actor_is_killed(cluster, alone, tmp_path):
    killed = []
    def both(run, actor, child):
        if run.n_done == 0: os.kill(child, signal.SIGKILL)                  # the actor stays, and starts vLLM again
        else: os.kill(actor, signal.SIGKILL)                                # vLLM ends with it, and Ray makes both anew
        killed.append((actor, child))
        assert gone(child)
    class Twice(See):
        def on_phase(self, *args):
            self.at = {0: (0, "corrections.train", 0), 1: (1, "corrections.train", 4)}[args[1]]
            super().on_phase(*args)
    see = Twice(do=both)
    run = sharded(tmp_path / "run", 1, see).run()
    assert len(killed) == 2 and killed[0][0] == killed[1][0] and len(see.seen) == 5       # two actors; three processes of vLLM
    assert run.trajectories.equals(alone.trajectories) and files(tmp_path / "run") == files(alone.dir.path)
    assert all(gone(i) for i in see.seen)


def test_ended_actor_takes_vllm_with_it(cluster, tmp_path):
    see = See((0, "corrections.train", 4), lambda run, *_: ray.kill(run.actors[0]))
    with pytest.raises(SampleError, match="an engine's process or machine died"): sharded(tmp_path / "run", 1, see).run()
    assert len(see.seen) == 2 and all(gone(i) for i in see.seen)


def test_vllm_that_is_killed_each_time_stops_the_run_with_a_sentence(cluster, tmp_path):
    def make(cfg):
        from stasc.sample_vllm import Child
        Child.script = tmp_path / "script.py"
        return Engine(cfg)
    (tmp_path / "script.py").write_text(f"import os\nprint(os.getpid(), file=open({str(tmp_path / 'pids')!r}, 'a'))\ninput()\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(Killed, match=r"^the process of vLLM ended while it was started \(signal 9\).*memory did not suffice"):
        Sharded(CONFIG, tmp_path / "run", on=Ray(workers=1), engine=make, callbacks=[]).run()
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and not any(map(alive, pids))


def test_several_engines_on_a_gpu_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="gpus = 0.5 with sampler = 'vllm': vLLM fills a GPU"): Sharded(CONFIG, tmp_path / "run", on=Ray(gpus=.5), callbacks=[])
