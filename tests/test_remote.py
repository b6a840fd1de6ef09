"A run directory at a URL: the bytes of one on disk, published line by line, by one writer."
import json
import os
import signal
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from test_resume import ask, in_child, numbers, posix, scripted
from test_sweep import tree

from stasc.core import Config, ConfigError, StoreError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.remote import LEASE, RemoteDir, run_dir
from stasc.star import STaR
from stasc.sweep import sweep
from stasc.train import ScriptedEngine


class Bucket(LocalFileSystem):
    "What an object store can: put whole objects, get, list, delete; no rename, no append, no folders."
    protocol = "bucket"
    cachable = False
    calls, fails = [], None

    @classmethod
    def _strip_protocol(cls, path): return LocalFileSystem._strip_protocol(str(path).removeprefix("bucket://"))
    def _note(self, what, path):
        Bucket.calls.append((what, path))
        if Bucket.fails and Bucket.fails(what, path): raise ConnectionError("the network is down")
    def mv(self, *a, **k): raise NotImplementedError("no rename here")
    mv_file = rename = move = mv
    def _open(self, path, mode="rb", **kw):
        assert "a" not in mode and "+" not in mode, "no append here"
        return super()._open(path, mode, **kw)
    def put_file(self, lpath, rpath, **kw):
        self._note("put", rpath)
        super().put_file(lpath, rpath, **kw)
    def pipe_file(self, path, value, **kw):
        self._note("put", path)
        super().pipe_file(path, value, **kw)
    def get_file(self, rpath, lpath, **kw):
        self._note("get", rpath)
        super().get_file(rpath, lpath, **kw)


fsspec.register_implementation("bucket", Bucket, clobber=True)


@pytest.fixture(autouse=True)
def quiet():
    Bucket.calls, Bucket.fails = [], None
    yield
    Bucket.fails = None


def at(path): return f"bucket://{path}"


def there(path): return {k: v for k, v in tree(path).items() if not k.startswith("manifest/")}


@pytest.fixture
def plain(tmp_path): return scripted(tmp_path / "plain").run()


def test_run_in_a_bucket_is_the_run_on_disk(tmp_path, plain):
    run = scripted(at(tmp_path / "run")).run()
    assert there(tmp_path / "run") == there(plain.dir.path)                 # its manifest too: a copy of it all is a plain run directory
    assert f"bucket://{tmp_path / 'run'}" in repr(run) and str(run.dir.path) not in repr(run)
    again = STaSC.open(at(tmp_path / "run"), callbacks=[])
    assert again.table().equals(plain.table()) and again.trajectories.equals(plain.trajectories) and again.metrics.equals(plain.metrics)
    assert run.dir.disk_use() > 0 and not (tmp_path / "run/lease.json").exists()
    assert STaSC.open(tmp_path / "run", callbacks=[]).run().n_done == plain.n_done


def test_line_is_put_after_what_it_tells_of(tmp_path):
    scripted(at(tmp_path / "run")).run()
    seen = set()
    for what, path in Bucket.calls:
        name = path.removeprefix(f"{tmp_path / 'run'}/")
        if what == "put" and name.startswith("manifest/"):
            told = json.loads((tmp_path / "run" / name).read_text())["name"]
            assert any(o == told or o.startswith(f"{told}/") for o in seen), told
        elif what == "put": seen.add(name)


def test_only_what_is_asked_for_is_fetched(tmp_path):
    scripted(at(tmp_path / "run")).run()
    Bucket.calls.clear()
    run = STaSC.open(at(tmp_path / "run"), callbacks=[])
    run.metrics                                                             # noqa: B018
    assert {os.path.basename(p) for what, p in Bucket.calls if what == "get"} <= {"config.json", "questions.json", "metrics.json"}
    run.dir.table(0, "initial.train", 0)
    assert [os.path.basename(p) for what, p in Bucket.calls if what == "get" and p.endswith(".parquet")] == ["part-00000.parquet"]


def test_engine_elsewhere_is_told_what_it_reads_and_lists_nothing(tmp_path, monkeypatch):
    from stasc.cluster import _known, _part_run
    run = scripted(at(tmp_path / "run"))
    with run._writing():
        one, two = (_part_run(run.dir.url, run.cfg, None, lambda cfg: scripted(at(tmp_path / "run")).engine) for _ in range(2))
        run.dir._publish(one.draw(0, "initial.train", 0, [])[0])
        monkeypatch.setattr(RemoteDir, "_look", lambda *_: pytest.fail("an engine read the whole manifest"))
        entry, _ = two.draw(0, "corrections.train", 0, _known(run, 0, "corrections.train", 0))
    assert entry["name"] == "iter_00/corrections.train/part-00000.parquet" and (tmp_path / "run" / entry["name"]).exists()
    assert [Path(p).name for what, p in Bucket.calls if what == "get" and "initial.train" in p] == ["part-00000.parquet"]      # and what it read is what the other made


@pytest.mark.parametrize("n", range(0, 60, 7))
def test_network_that_goes_down_at_any_put(tmp_path, plain, n):
    left = [n]
    def fails(what, path):
        left[0] -= what == "put"
        return what == "put" and left[0] < 0
    Bucket.fails = fails
    run = scripted(at(tmp_path / "run"))
    with pytest.raises(StoreError, match=r"^bucket://.* cannot be written: ConnectionError: the network is down$"): run.run()
    Bucket.fails = None
    if (tmp_path / "run/lease.json").exists(): (tmp_path / "run/lease.json").unlink()       # the network was down for that too
    scripted(at(tmp_path / "run")).run()
    assert there(tmp_path / "run") == there(plain.dir.path)


@posix
@pytest.mark.parametrize("n", [1, 5, 11, 23, 40])
def test_killed_between_any_two_puts(tmp_path, plain, n):
    def work():
        def fails(what, path):
            if sum(w == "put" for w, _ in Bucket.calls) == n: os.kill(os.getpid(), signal.SIGKILL)
        Bucket.fails = fails
        scripted(at(tmp_path / "run")).run()
    assert os.WIFSIGNALED(in_child(work))
    if n > 1:
        with pytest.raises(StoreError, match="is in use by process .* if it is dead, delete lease.json there"): scripted(at(tmp_path / "run")).run()
        (tmp_path / "run/lease.json").unlink()
    scripted(at(tmp_path / "run")).run()
    assert there(tmp_path / "run") == there(plain.dir.path)


def test_lease_of_a_writer_that_said_nothing_for_long_is_taken_over(tmp_path, monkeypatch):
    run = scripted(at(tmp_path / "run"))
    with run._writing():
        with pytest.raises(StoreError, match="is in use by process"): scripted(at(tmp_path / "run")).run()
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + LEASE + 60)
        other = scripted(at(tmp_path / "run")).run()
        with other._writing(), pytest.raises(StoreError, match="has been taken over by a process on"): run.dir._renew()
    assert other.n_done == 3 and not (tmp_path / "run/lease.json").exists()


def test_damage_is_named_where_it_is(tmp_path):
    scripted(at(tmp_path / "run")).run()
    part = tmp_path / "run/iter_00/initial.train/part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=rf"^bucket://{tmp_path}/run/iter_00/initial.train/part-00000.parquet is damaged"): STaSC.open(at(tmp_path / "run"), callbacks=[]).trajectories     # noqa: B018
    part.unlink()
    run = STaSC.open(at(tmp_path / "run"), callbacks=[])
    assert run.n_done == 0                                                  # as where somebody deletes a file on a disk: it is drawn again
    with pytest.raises(StoreError, match="part-00000.parquet is missing; resume the run"): run.dir.table(0, "initial.train", 0)
    scripted(at(tmp_path / "run")).run()
    scripted(tmp_path / "plain").run()
    assert {k: v for k, v in there(tmp_path / "run").items() if k != "manifest.jsonl"} == {k: v for k, v in there(tmp_path / "plain").items() if k != "manifest.jsonl"}


@pytest.mark.parametrize("url, says", [("s3x://bucket/run", "s3x://bucket/run cannot be reached: ValueError: Protocol not known: s3x"), ("abfs://b/run", r"cannot be reached: .*[Ii]nstall")])
def test_urls_that_nobody_knows(url, says):
    with pytest.raises(StoreError, match=says): STaSC(Config.demo(), url)


def test_what_needs_a_disk_says_so(tmp_path):
    for make in (lambda out: STaR(Config.demo(), out), lambda out: sweep(dict(seed=[0]), out, Config.demo())):
        with pytest.raises(ConfigError, match="needs a directory that this computer sees as its own"): make(at(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_other_settings_and_other_files_are_refused_there_too(tmp_path):
    scripted(at(tmp_path / "run")).run()
    with pytest.raises(StoreError, match="holds a run with other settings"): STaSC(Config(iterations=1, seed=9, data="own"), at(tmp_path / "run"), data=Data(ask(3, "train"), ask(2, "test")), engine=ScriptedEngine(numbers), callbacks=[])
    assert isinstance(run_dir(at(tmp_path / "run")), RemoteDir) and not isinstance(run_dir(Path("a/b")), RemoteDir)


def test_memory_file_system_of_fsspec_itself(plain):
    run = scripted("memory://runs/one").run()
    assert run.metrics.equals(plain.metrics)
    assert STaSC.open("memory://runs/one", callbacks=[]).trajectories.equals(plain.trajectories)
    fsspec.filesystem("memory").rm("/runs", recursive=True)
