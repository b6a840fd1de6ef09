"The Colab notebook, run to its end with random weights in place of the download: installed, checked, copied, lost, resumed, shared, asked."
import ast
import configparser
import importlib.util
import json
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import root
from test_resume import scripted, tree

from stasc.core import Config, ConfigError, Question, SamplingParams, StoreError
from stasc.plan import GPUS, fitted, plan, preflight, shape_of

sys.path.insert(0, str(root / "bench"))
import colab  # noqa: E402

RAW = json.loads((root / colab.NOTEBOOK).read_text(encoding="utf-8"))
PROSE = "\n".join("".join(c["source"]) for c in RAW["cells"] if c["cell_type"] == "markdown")
CODE = ["".join(c["source"]) for c in RAW["cells"] if c["cell_type"] == "code"]


def cell(*words):
    "The one code cell that holds these words."
    found = [c for c in CODE if all(w in c for w in words)]
    assert len(found) == 1, (words, len(found))
    return found[0]


# --- all cells, end to end: a session that is lost after M_1, and one that takes the run up from 'Drive'

REPORT = """
import json
Path("facts.json").write_text(json.dumps(dict(trained=[list(s.token_ids) for s in trained], loaded=[list(s.token_ids) for s in loaded], checks=[list(c) for c in looked.checks], asked=own.text)))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    "The folder after the second session, and what was there after the first."
    pytest.importorskip("nbclient", reason="nbclient executes the notebook")
    pytest.importorskip("bitsandbytes", reason="the notebook is about QLoRA")
    folder = tmp_path_factory.mktemp("colab") / "session"
    values = colab.prepare(folder)
    first = colab.read_notebook()
    colab.set_parameters(first, **values | dict(changes=values["changes"] | dict(iterations=1)))
    end = next(i for i, c in enumerate(first.cells) if c.cell_type == "code" and "for it in run" in c.source)
    del first.cells[end + 1:]
    colab.execute(first, folder)
    saved, = (folder / "drive").iterdir()
    early = dict(tree=tree(saved), manifest=(saved / "manifest.jsonl").read_bytes(), log=(saved / "log.jsonl").read_bytes())
    shutil.rmtree(folder / "runs")                                  # the session is lost
    nb = colab.read_notebook()
    colab.set_parameters(nb, **values)
    for c in colab.code_cells(nb): c.source = c.source.replace("preflight(cfg, gpu=gpu)", "looked = preflight(cfg, gpu=gpu); looked")
    colab.code_cells(nb)[-1].source += REPORT
    colab.execute(nb, folder)
    return SimpleNamespace(folder=folder, nb=nb, first=first, early=early, saved=saved, cfg_model=folder / values["model"], values=values,
                           facts=json.loads((folder / "facts.json").read_text()), local=folder / "runs" / saved.name)


def output(nb, words):
    c, = [c for c in colab.code_cells(nb) if words in c.source]
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in c.outputs)


def test_every_cell_runs_and_says_something(session):
    cells = colab.code_cells(session.nb)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)) and len(cells) == len(CODE)
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    silent = [c.source[:40] for c in cells if not c.outputs]
    assert [s.split("\n")[0] for s in silent] == ["#@title Settings", "import gc"]
    assert "QLoRA NF4" in output(session.nb, "for it in run") or "QLoRA NF4" in output(session.first, "for it in run")
    assert not (session.folder / "keep.txt").exists() and "as they were" in output(session.nb, "#@title Install")


def test_preflight_multiplied_in_four_bits(session):
    looked = {what: (found, verdict) for what, found, verdict in session.facts["checks"]}
    assert looked["4-bit product"][1] == "ok" and "gradient there" in looked["4-bit product"][0]
    assert looked["disk"][1] == "ok" and "not measured" in looked["time"][0]


def test_drive_holds_the_run_and_nothing_half_copied(session):
    assert tree(session.saved) == tree(session.local) and (session.saved / "log.jsonl").exists()
    assert not [f for f in session.saved.rglob("*") if f.name.startswith(".")]
    assert {f.parts[0] for f in (p.relative_to(session.saved) for p in session.saved.rglob("adapter_model.safetensors"))} == {"iter_01", "iter_02"}


def test_second_session_went_on_where_the_copy_ended(session):
    final = session.local
    assert any(n.startswith("iter_01/adapter") for n in session.early["tree"]) and not any(n.startswith("iter_02") for n in session.early["tree"])
    assert (final / "manifest.jsonl").read_bytes().startswith(session.early["manifest"])
    assert (final / "log.jsonl").read_bytes().startswith(session.early["log"])
    now = tree(final)
    assert all(now[n] == sha for n, sha in session.early["tree"].items() if n.startswith("iter_"))
    log = [json.loads(line) for line in (final / "log.jsonl").read_text().splitlines()]
    done = [(e["iteration"], e["phase"]) for e in log if e["phase"] != "load"]
    assert len(done) == len(set(done)) and {n for n, _ in done} == {0, 1, 2}       # nothing was drawn twice
    assert "complete" in output(session.nb, "STaSC.open(saved")


def test_lost_and_resumed_is_the_run_that_was_never_lost(session, tmp_path, monkeypatch):
    from stasc.loop import STaSC
    monkeypatch.chdir(session.folder)
    there = STaSC.open(session.local, callbacks=[])
    whole = STaSC(there.cfg, tmp_path / "whole", callbacks=[]).run()
    a, b = tree(whole.dir.path), tree(session.local)
    assert {n: s for n, s in a.items() if n.startswith("iter_")} == {n: s for n, s in b.items() if n.startswith("iter_")}
    assert (whole.metrics.n_kept[1:] > 0).all()                     # by chance alone, and enough to train on


def test_adapter_loaded_again_says_the_same_here_too(session, monkeypatch):
    from stasc.share import load_shared
    facts = session.facts
    assert facts["trained"] == facts["loaded"] and all(facts["trained"]) and "the same tokens: True" in output(session.nb, "the same tokens")
    monkeypatch.chdir(session.folder)
    engine, prompter = load_shared("adapter", model=session.values["model"])
    own, greedy = Question("own", facts["asked"], ("",)), SamplingParams(temperature=0, max_new_tokens=64)
    first = engine.sample([prompter.initial(own)], 1, greedy, [[0]])[0][0]
    second = engine.sample([prompter.correction(own, first.text)], 1, greedy, [[0]])[0][0]
    assert [list(s.token_ids) for s in (first, second)] == facts["loaded"]
    engine.use(None)
    assert list(engine.sample([prompter.initial(own)], 1, greedy, [[0]])[0][0].token_ids) != facts["loaded"][0]     # the adapter has its say


def test_nothing_of_this_machine_is_in_what_it_shows(session):
    texts = json.dumps([c.outputs for c in colab.code_cells(session.nb)])
    assert str(session.folder) not in texts and str(Path.home()) + "/" not in texts


# --- the copy, cut off at every file

@pytest.fixture(scope="module")
def copying():
    "What the cell defines, without running the rest of it."
    parsed = ast.parse(cell("def copy_run"))
    names = {}
    parsed.body = [n for n in parsed.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))]
    exec("from pathlib import Path\nfrom stasc.core import StascError", names)
    exec(compile(parsed, "cell", "exec"), names)
    return names


@pytest.mark.parametrize("how", ["refused", "killed"])
def test_a_copy_that_is_cut_off_anywhere_is_a_run_to_go_on_with(copying, tmp_path, monkeypatch, how):
    from stasc.loop import STaSC
    from stasc.train import ScriptedEngine
    from test_resume import numbers
    kept = tmp_path / "after M_1"

    class Keep:
        def on_iteration(self, run, it): it.n == 1 and shutil.copytree(run.dir.path, kept, ignore=shutil.ignore_patterns(".*"))
    done = scripted(tmp_path / "run", callbacks=[Keep()]).run().dir.path
    monkeypatch.setattr("os.fsync", lambda fd: None)                # what is asked here is the order of things, not the disk
    real, left = shutil.copy2, [0]
    class Cut(BaseException): "As a lost session: no handler runs."

    def copy(a, b):
        left[0] -= 1
        if left[0] == 0:
            Path(b).write_bytes(Path(a).read_bytes()[:7])           # half of it is there
            raise Cut if how == "killed" else OSError("Drive is full")
        return real(a, b)

    if how == "killed": monkeypatch.setitem(copying, "whole", no_handler(copying["whole"], Cut))
    monkeypatch.setattr(shutil, "copy2", copy)
    for k in range(1, 100):
        drive, back = tmp_path / f"drive{k}", tmp_path / f"back{k}"
        shutil.copytree(kept, drive, copy_function=real)            # as after the iteration before
        left[0] = k
        try: copying["copy_run"](done, drive)
        except (StoreError, Cut): pass
        else: break
        for line in (drive / "manifest.jsonl").read_text().splitlines(): assert (drive / json.loads(line)["name"]).exists()
        copying["copy_run"](drive, back)
        assert not [f for f in back.rglob("*") if f.name.startswith(".")]
        run = STaSC.open(back, engine=ScriptedEngine(numbers), callbacks=[])
        assert run.n_done == 2
        if k % 4 == (1 if how == "killed" else 3): assert tree(run.run().dir.path) == tree(done)
        copying["copy_run"](done, drive)                            # and the next copy is whole
        assert tree(drive) == tree(done)
    assert k >= 8


def no_handler(whole, cut):
    "`whole` as a kill leaves it: what was half written stays under its other name."
    import contextlib

    @contextlib.contextmanager
    def killed(path):
        path = Path(path)
        try:
            with whole(path) as tmp:
                try: yield tmp
                except cut: half = tmp.read_bytes(); raise
        except cut: path.with_name(f".tmp-{path.name}").write_bytes(half); raise
    return killed


def test_a_copy_that_fails_is_said_and_does_not_stop_the_run(copying, tmp_path, capsys):
    (tmp_path / "drive").write_text("a file where the folder would be")
    run = scripted(tmp_path / "run", callbacks=[copying["ToDrive"](tmp_path / "drive/run")]).run()
    assert run.n_done == 3 and capsys.readouterr().out.count("not copied") == 4


def test_what_is_there_already_is_not_copied_again(copying, tmp_path, monkeypatch):
    run = scripted(tmp_path / "run").run()
    copying["copy_run"](run.dir.path, tmp_path / "drive")
    monkeypatch.setattr(shutil, "copy2", lambda *a: pytest.fail(f"{a[0]} was copied again"))
    copying["ToDrive"](tmp_path / "drive").on_run_end(run)


# --- the install cell

@pytest.mark.parametrize("install,wanted", [("stasc", "stasc[qlora]"), ("stasc-0.1.0-py3-none-any.whl", "stasc-0.1.0-py3-none-any.whl[qlora]"),
                                            ("git+https://example.org/stasc", "stasc[qlora] @ git+https://example.org/stasc")])
@pytest.mark.parametrize("lacking", ["stasc", "bitsandbytes"])
def test_install_holds_what_is_there(install, wanted, lacking, tmp_path, monkeypatch, capsys):
    from IPython.core.inputtransformer2 import TransformerManager
    monkeypatch.chdir(tmp_path)
    asked, real = [], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == lacking else real(name, *a))
    shell = SimpleNamespace(run_line_magic=lambda magic, line: asked.append((magic, line.format(**names))))
    names = dict(install=install, get_ipython=lambda: shell)
    exec(TransformerManager().transform_cell(cell("#@title Install")), names)
    assert asked == [("pip", f'install -q -c keep.txt "{wanted}"')]
    assert (tmp_path / "keep.txt").read_text().split() == [f"{p}=={metadata.version(p)}" for p in colab.KEEP]
    from packaging.requirements import Requirement
    for line in (tmp_path / "keep.txt").read_text().split(): Requirement(line)
    assert "as they were" in capsys.readouterr().out


def test_a_changed_version_stops_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: None)
    def pip(magic, line): monkeypatch.setattr(metadata, "version", lambda p: "0" if p == "numpy" else real(p))
    names = dict(install="stasc", get_ipython=lambda: SimpleNamespace(run_line_magic=pip))
    from IPython.core.inputtransformer2 import TransformerManager
    with pytest.raises(AssertionError, match="restart the runtime"): exec(TransformerManager().transform_cell(cell("#@title Install")), names)


# --- what the notebook says of itself

def settings_of(model, gpu, changes=()):
    "The configuration that the notebook makes."
    lines = [l for l in cell("fitted(Config.paper").splitlines() if not l.startswith(("from ", "preflight"))]
    names = dict(model=model, gpu=gpu, data="nq", changes=dict(changes), Config=Config, fitted=fitted)
    exec("\n".join(lines), names)
    return names["cfg"]


def minutes(model, gpu):
    cfg = settings_of(model, gpu)
    return cfg, round(60 * next(r["hours"] for r in plan(cfg, gpu).rows if r["finetune"] == cfg.finetune))


def test_settings_are_a_form_whose_choices_are_known():
    source = cell("#@title Settings")
    options = {m[1]: (ast.literal_eval(m[2]) if m[2] != "dict()" else {}, m[3]) for m in re.finditer(r"^(\w+) = (.+?)\s+#@param (.+)$", source, re.M)}
    assert list(options) == ["model", "gpu", "data", "drive", "install", "changes"] and len(source.splitlines()) == 7
    choices = {k: json.loads(re.match(r"\[.*?\]", rest)[0]) for k, (_, rest) in options.items() if rest.startswith("[")}
    assert all(options[k][0] in c for k, c in choices.items()) and set(choices["gpu"]) <= set(GPUS)
    for k in options: assert f"| `{k}` |" in PROSE
    for m in choices["model"]:
        shape_of(m)
        for g in choices["gpu"]:
            cfg = settings_of(m, g)
            row = next(r for r in plan(cfg, g).rows if r["finetune"] == cfg.finetune)
            assert row["fits"] and cfg.train_batch * cfg.grad_accumulation == 8 and row["choice"].sample_batch == cfg.sample_batch
            assert cfg.finetune == ("lora" if g.startswith("A100") else "qlora")
    paper = Config.paper(choices["model"][0], finetune="lora")
    assert settings_of(choices["model"][0], "A100 40GB") == paper.replace(sample_batch=512)
    assert settings_of(choices["model"][0], "T4", dict(data="trivia_qa", n_train=7)).n_train == 7


def test_times_in_the_text_are_those_of_the_plan():
    qwen, phi = "Qwen/Qwen2.5-1.5B-Instruct", "microsoft/Phi-3-mini-4k-instruct"
    said = [int(m) for m in re.findall(r"\b(\d+)\b(?= minutes|\b \(ten)", PROSE.split("Planned times")[1].split("\n")[0])]
    found = [minutes(*k) for k in ((qwen, "T4"), (phi, "T4"), (qwen, "A100 40GB"), (phi, "A100 40GB"))]
    assert said == [m for _, m in found] and max(said[:2]) <= 20
    words = {1: "one", 2: "two", 3: "three", 4: "four", 10: "ten"}
    line = PROSE.split("Planned times")[1].split("\n")[0]
    for cfg, _ in found: assert f"{words[cfg.iterations]} iterations" in line and str(cfg.n_train) in line and str(cfg.n_test) in line
    assert repr(plan(found[0][0], "T4")) in PROSE


def test_the_reader_is_told_at_the_top_what_the_outputs_are():
    top = "".join("".join(c["source"]) for c in RAW["cells"][:3])
    for words in ("stand-in", "random", "no learning", "never had a GPU", "planned", "not measured"): assert words in top
    assert re.findall(r"(?:none of this was )?measured on a\b", PROSE) == ["none of this was measured on a"]


def test_first_result_by_the_fifth_code_cell():
    cells = [c for c in RAW["cells"] if c["cell_type"] == "code"]
    assert [bool(c["outputs"]) for c in cells[:5]] == [False, True, True, True, True]
    assert "preflight(" in CODE[2] and "display(it)" in CODE[4]
    for before, c in zip(RAW["cells"], RAW["cells"][1:]): assert c["cell_type"] != "code" or before["cell_type"] == "markdown" or "run.table()" in "".join(c["source"])


def test_badge_leads_to_the_published_notebook_once_there_is_an_address():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    s = ini["DEFAULT"]
    file = f"{s['user']}/{s['repo']}/blob/{s['branch']}/{colab.NOTEBOOK}" if s["user"] else ""
    assert f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{file})" in PROSE


# --- preflight where the machine is not as wished

def verdicts(p): return {what: (found, verdict) for what, found, verdict in p.checks}


def test_preflight_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    p = preflight(Config.demo(finetune="qlora", device="cpu"))
    assert verdicts(p)["4-bit product"] == ("bitsandbytes is not installed: pip install 'stasc[qlora]'", "problem") and not p.ok
    assert "4-bit product" not in verdicts(preflight(Config.demo(device="cpu"))) and preflight(Config.demo(device="cpu")).ok


def test_preflight_counts_the_download_and_the_disk(monkeypatch, tmp_path):
    import stasc.plan
    monkeypatch.setattr(stasc.plan, "_cached", lambda hub_id: None)
    cfg = fitted(Config.paper(finetune="lora", device="cpu"), "T4")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=4e9))
    found, verdict = verdicts(preflight(cfg, tmp_path / "not" / "there" / "yet"))["disk"]
    assert (found, verdict) == ("4.0 GB free, 3.9 GB needed for the run and the model", "ok")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=3e9))
    p = preflight(cfg)
    assert verdicts(p)["disk"][1] == "problem" and "make room" in repr(p) and "make room" in p._repr_html_() and not (tmp_path / "not").exists()


@pytest.fixture
def cuda(monkeypatch):
    "What a driver would say of a card."
    import torch
    def card(name, capability, memory, free):
        for k, v in dict(is_available=True, get_device_name=name, get_device_capability=capability, get_device_properties=SimpleNamespace(total_memory=memory * 1e9),
                         mem_get_info=(free * 1e9, memory * 1e9), memory_reserved=0, memory_allocated=0).items(): monkeypatch.setattr(torch.cuda, k, lambda *a, v=v: v)
    return card


def test_preflight_on_a_t4(cuda):
    cuda("Tesla T4", (7, 5), 15.8, 15.2)
    cfg = fitted(Config.paper(finetune="lora"), "T4")
    v = verdicts(preflight(cfg, gpu="T4"))
    assert v["GPU"] == ("Tesla T4, 15.8 GB", "ok") and v["number format"] == ("float16; compute capability 7.5 has no bfloat16", "ok")
    assert v["GPU memory"] == ("15.2 GB free, 11.0 GB needed at the peak", "ok") and v["time"] == ("about 3.0 hours on a T4: planned, not measured", "ok")
    v = verdicts(preflight(cfg.replace(dtype="bfloat16")))
    assert v["number format"] == ("bfloat16; compute capability 7.5 has no bfloat16; set dtype = 'auto'", "problem")
    cuda("Tesla T4", (7, 5), 15.8, 6.)
    p = preflight(cfg)
    assert verdicts(p)["GPU memory"][1] == "problem" and "finetune = 'qlora'" in repr(p)


def test_preflight_on_another_card_than_was_chosen_and_on_an_unknown_one(cuda):
    cuda("NVIDIA A100-SXM4-40GB", (8, 0), 42.3, 41.9)
    p = preflight(fitted(Config.paper(finetune="lora"), "T4"), gpu="T4")
    assert verdicts(p)["settings"] == ("made for the T4, and this is the A100 40GB", "note") and {r["gpu"] for r in p.plan.rows} == {"A100 40GB"}
    assert "bfloat16" in verdicts(p)["number format"][0]
    cuda("<b>Card", (9, 0), 80, 79)
    p = preflight(Config.paper(finetune="lora"))
    assert verdicts(p)["GPU"][1] == verdicts(p)["time"][1] == "note" and len({r["gpu"] for r in p.plan.rows}) == len(GPUS)
    assert "<b>Card" not in p._repr_html_() and "&lt;b&gt;Card" in p._repr_html_()


def test_a_card_that_cannot_hold_it_is_refused():
    with pytest.raises(ConfigError, match="does not fit on the T4: 28.2 GB"): fitted(Config.paper(), "T4")


# --- Colab's versions

def test_the_check_with_colabs_versions_found_nothing_changed():
    found = json.loads((root / "bench/results/colab.json").read_text(encoding="utf-8"))
    assert set(found["kept as they were"]) == set(colab.KEEP)
    assert all(v["before"] == v["after"] for v in found["kept as they were"].values()) and not set(colab.KEEP) & set(found["changed"])
    assert {"stasc", "bitsandbytes"} <= set(found["added"]) and found["code_cells_executed"] == len(CODE) and found["same_greedy_answers"]
    assert found["adapters_on_drive"] == ["iter_01", "iter_02"] and len(found["widgets"]) == 4
    held = dict(re.findall(r"^([\w.-]+)==(\S+)$", (root / "constraints-colab.txt").read_text(encoding="utf-8"), re.M))
    for p, v in dict(torch="2.11.0", transformers="5.15.0", peft="0.20.0", datasets="4.0.0", ipywidgets="7.7.1", ipython="7.34.0").items(): assert held[p] == v
    there = found["packages"] | {p: v["before"] for p, v in found["kept as they were"].items()}
    assert {p: v.split("+")[0] for p, v in there.items() if p in held} == {p: held[p] for p in there if p in held}
    assert found["python"].startswith("3.13.") and not {"stasc", "bitsandbytes"} & set(held)
    assert not re.search(r"/(?:tmp|home|root|work)/", json.dumps(found))
