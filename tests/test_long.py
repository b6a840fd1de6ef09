"Runs that are larger than memory: the library's own steps read a run part by part, and find what they would find in the whole table."
import pytest
from test_resume import ask, numbers, scripted

import stasc.view                                                   # noqa: F401
from stasc.core import Config, DataError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.metrics import by_iteration, measure
from stasc.plot import alarm_rates, pattern_shares, transitions
from stasc.star import STaR
from stasc.train import ScriptedEngine
from stasc.view import _of_run, page_data


@pytest.fixture(scope="module", params=["EIE", "FNF", "STaR"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    if request.param != "STaR": return scripted(folder, request.param, n_test_init=2, n_test_corr=2).run()
    cfg = Config(iterations=2, n_init=2, n_train=5, n_test=3, part_size=2, data="own")
    return STaR(cfg, folder, data=Data(ask(5, "train"), ask(3, "test")), engine=ScriptedEngine(numbers), callbacks=[]).run()


@pytest.mark.parametrize("split", ["train", "test"])
def test_intervals_alarms_and_patterns_by_part_are_those_of_the_whole_table(run, split):
    t = run.trajectories
    by_part, whole = by_iteration(run, split, n_boot=50), by_iteration(t, split, n_boot=50)
    assert by_part.equals(whole) and by_part.index.equals(whole.index)
    assert alarm_rates(run, split).equals(alarm_rates(t, split)) and list(alarm_rates(run, split)) == list(alarm_rates(t, split))
    for n in range(3):
        some = t[(t["iteration"] == n) & (t["split"] == split)]
        assert by_part.acc_t2[n] == measure(some)["acc_t2"] == run.metrics[f"{split}_acc_t2"][n]
    with pytest.raises(DataError, match="unknown split"): by_iteration(run, "dev")


@pytest.mark.parametrize("limit", [1, 7, 30, 10_000])
def test_page_by_part_is_that_of_the_whole_table(run, limit):
    asked = [*run.data.train, *run.data.test]
    assert _of_run(run, limit) == page_data(run.trajectories, asked, 1.0, limit)
    t = run.trajectories
    chosen = t[(t["split"] == "train") & t["iteration"].isin([0, 2]) & t.question_id.isin(["train1", "train4"])]
    assert run.browse("train", [0, 2], ["train1", "train4"], limit).data == page_data(chosen, asked, 1.0, limit)


def test_stream_is_the_table_in_parts(run):
    t, n = run.trajectories, 0
    for part in run.stream():
        assert len(part) and part.question_id.nunique() <= run.cfg.part_size
        assert part.reset_index(drop=True).equals(t.iloc[n:n + len(part)].reset_index(drop=True)) and list(part) == list(t)
        n += len(part)
    assert n == len(t)
    assert sum(map(len, run.stream("test", [1]))) == len(t[(t["iteration"] == 1) & (t["split"] == "test")])


def test_report_pictures_and_measures_never_hold_the_whole_table(run, tmp_path, monkeypatch):
    def whole(*_, **__): raise AssertionError("the whole table")
    folder = run.dir.path
    with monkeypatch.context() as m:
        m.setattr(type(run), "trajectories", property(whole)); m.setattr(STaSC, "trajectories", property(whole)); m.setattr(STaSC, "_pairs", whole)
        assert run.report(tmp_path / "report.html").stat().st_size > 10_000
        for picture in (transitions, pattern_shares): picture(run)
        run._measure(1), run.browse(limit=5)
    assert (folder / "report.html").exists() is False


def test_texts_are_read_one_part_at_a_time(run, tmp_path, monkeypatch):
    if isinstance(run, STaR): pytest.skip("STaR reads its rationales with a hint at once: there is one for each question that failed")
    import stasc.store as store
    real, reads = store.read_tables, []
    def read(paths, kind, token_ids=True, only=None):
        reads.append((len(paths), only is None))
        return real(paths, kind, token_ids, only)
    monkeypatch.setattr(store, "read_tables", read)
    run._measure(1), run.report(tmp_path / "report.html"), run.browse(limit=5), list(run.stream())
    assert max(n for n, texts in reads if texts) == 1 and len(reads) > 20


def test_a_run_without_a_complete_iteration_has_an_empty_table(tmp_path):
    t = scripted(tmp_path / "run").trajectories
    assert t.empty and {"iteration", "split", "question_id", "init_index", "corr_index"} == set(t)
