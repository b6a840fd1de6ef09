"What a stranger meets first: the bare command, `?`, tab completion, what a cell shows, an error in a notebook, progress in a saved one."
import html
import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest
from conftest import root, run_command

import stasc
from stasc.core import Config, ConfigError, DataError, Question, RewardError, StascError, with_comments
from stasc.data import Data, DataWarning, load_questions
from stasc.loop import Iteration, STaSC
from stasc.reward import _REWARDS, judge
from stasc.train import ScriptedEngine

HOSTILE = "<img src=x onerror=alert(1)>&\u202e\x1b[31m"
COMMANDS = "run", "demo", "plan", "resume", "sweep", "show", "report", "share", "rows", "eval"


def scripted(folder, text="a", **options):
    "A short run, its texts drawn by a function."
    asked = lambda *ids: [Question(i, f"What is {i}? {text}", (i,)) for i in ids]
    engine = ScriptedEngine(lambda prompt, rng, skill: f"{text} Final Answer: {rng.choice('abcd')}")
    options = dict(iterations=1, shots=0, n_init=2, n_corr=2) | options
    return STaSC(Config(**options), folder, data=Data(asked("a", "b", "c"), asked("d")), engine=engine, callbacks=[]).run()


@pytest.fixture(scope="module")
def shell():
    "IPython as in a terminal."
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config as Settings
    settings = Settings()
    settings.HistoryManager.enabled = False
    hook, display = sys.excepthook, sys.displayhook
    made = InteractiveShell.instance(config=settings, colors="nocolor")
    made.Completer.use_jedi = False
    exec("from stasc.all import *", made.user_ns)
    yield made
    made.reset(new_session=False)
    InteractiveShell.clear_instance()
    sys.excepthook, sys.displayhook = hook, display


# --- the command

@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_the_bare_command_says_what_there_is_and_how_to_begin(argv):
    code = "import sys; from stasc.cli import main\ntry: c = main(sys.argv[1:])\nexcept SystemExit as e: c = e.code\nprint('HEAVY', [m for m in ('torch', 'pandas', 'transformers') if m in sys.modules]); sys.exit(c)"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=root, env=os.environ | dict(COLUMNS="100"), timeout=60)
    assert done.returncode == 0 and not done.stderr and "HEAVY []" in done.stdout
    for name in COMMANDS: assert f"\n    {name} " in done.stdout, name
    assert "begin with:\n  stasc demo" in done.stdout and "stasc COMMAND --help" in done.stdout


def test_version():
    with pytest.raises(SystemExit) as e: run_command("--version")
    assert e.value.code == 0


@pytest.fixture
def own_reward(tmp_path):
    f = tmp_path / "mine.py"
    f.write_text("from stasc.reward import register\n@register\ndef first_letter(prediction, references): return float(prediction[:1] == references[0][:1])\n")
    yield f
    _REWARDS.pop("first_letter", None)


def test_a_reward_comes_from_a_file_that_the_command_line_names(own_reward, tmp_path, questions_file):
    assert run_command("plan", "--gpu", "T4", "--import", own_reward).code == 0
    assert judge("Final Answer: apple", ["avocado"], "first_letter") == ("apple", 1.0)
    assert run_command("plan", "--gpu", "T4", "--import", own_reward).code == 0                     # again, in the same process
    _REWARDS.pop("first_letter")
    said = run_command("run", "--data", questions_file, "--n-train", 4, "--n-test", 2, "--reward", "first_letter", "--out", tmp_path / "run")
    assert said.code == 2 and "unknown reward 'first_letter'" in said.err and "--import FILE.py" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("name, text, says", [
    ("none.py", None, "no such file"), ("mine.txt", "1", "expected a .py file"), ("mine.py", "def f(:", "SyntaxError"), ("mine.py", "import nowhere_at_all", "ModuleNotFoundError"),
    ("mine.py", "1/0", "ZeroDivisionError"), ("mine.py", "from stasc.reward import register\nregister(7)", "no function"),
    ("mine.py", "from stasc.reward import register\n@register\ndef exact_match(p, r): return 1.0", "registered already")])
def test_a_file_that_cannot_be_imported_is_one_sentence(tmp_path, name, text, says):
    if text is not None: (tmp_path / name).write_text(text)
    said = run_command("plan", "--gpu", "T4", "--import", tmp_path / name)
    assert said.code == 2 and says in said.err and "--import" in said.err and said.err.count("\n") == 1 and "Traceback" not in said.err


def test_several_workers_and_a_file_of_ones_own_are_refused(own_reward, tmp_path):
    said = run_command("sweep", "--grid", "seed=0,1", "--workers", 2, "--import", own_reward, "--out", tmp_path / "sweep")
    assert said.code == 2 and "--workers 1" in said.err and not (tmp_path / "sweep").exists()


def test_no_configuration_can_name_a_file_to_import(tmp_path):
    f = tmp_path / "cfg.json"
    for key in ("import", "files"):
        f.write_text(json.dumps({key: "mine.py"}))
        with pytest.raises(ConfigError, match="unknown option"): Config.from_file(f)


# --- ? and tab

def test_question_mark_shows_the_parameters_with_their_comments(shell):
    said = shell.object_inspect_text("STaSC")
    for name, p in inspect.signature(STaSC.__init__).parameters.items():
        if name != "self": assert f"\n{name}\n    " in said, name
    assert "A run of Self-Taught Self-Correction" in said and "run directory; default: runs/" in said
    said = shell.object_inspect_text("Config")
    for f in Config.__dataclass_fields__.values(): assert f"\n{f.name} = {f.default!r}\n    {f.metadata['help']}" in said, f.name


def test_comments_are_found_wherever_a_parameter_stands():
    def f(a,             # the first
          b: str = "#",  # the second
          *, key=1,      # the third
          **rest):       # all others
        "What f does."
    assert with_comments(f).__doc__ == "What f does.\n\na\n    the first\nb\n    the second\nkey\n    the third\nrest\n    all others"
    assert with_comments(print) is print


def test_public_names_have_docstrings(tmp_path):
    import stasc.all
    for cls in (STaSC, Config, Data, Question, stasc.all.Sample, stasc.all.Variant):
        for name in dir(cls):
            o = inspect.getattr_static(cls, name)
            o = getattr(o, "__func__", o)
            if not name.startswith("_") and (callable(o) or isinstance(o, property)): assert inspect.getdoc(o), f"{cls.__name__}.{name}"
    for name in stasc.all.__all__: assert not callable(o := getattr(stasc.all, name)) or o.__doc__, name


def test_completion_offers_public_names(shell, tmp_path):
    shell.user_ns["run"] = scripted(tmp_path / "run")
    for text, wanted in (("run.", {"browse", "curves", "evaluate", "kept", "metrics", "report", "run", "step", "table", "trajectories"}),
                         ("Config.", {"demo", "paper", "from_file", "variant", "n_init", "changed"}), ("run.cfg.", {"replace", "to_json", "threshold"})):
        found = {m.rpartition(".")[2] for m in shell.complete(text, text)[1]}
        assert wanted <= found and not [n for n in found if n.startswith("_")], text


# --- what a cell shows

def test_html_of_a_configuration_explains_what_is_not_default_and_escapes():
    shown = Config(model=HOSTILE, prompts="</code><script>", n_init=3)._repr_html_()
    for name in ("model", "prompts", "n_init"): assert f">{name}</td>" in shown
    assert html.escape(Config.__dataclass_fields__["n_init"].metadata["help"]) in shown and ">n_corr<" not in shown
    assert "<img" not in shown and "<script" not in shown and "&lt;img" in shown and "\x1b" not in shown and "\u202e" not in shown
    assert "<table" not in Config()._repr_html_() and len(Config(model="x" * 10**6)._repr_html_()) < 5000


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_html_of_a_run_an_iteration_and_data_escapes_names_and_texts(tmp_path):
    run = scripted(tmp_path / "<b>&run", HOSTILE, model="<u>m</u>")
    for shown in (run._repr_html_(), *(it._repr_html_() for it in run), run.data._repr_html_()):
        assert not [t for t in ("<img", "<b>&", "<u>", "\x1b", "\u202e") if t in shown]
    assert "&lt;b&gt;&amp;run" in run._repr_html_() and "&lt;img" in run.data._repr_html_()
    assert repr(run).count("\n") == 0 and all(isinstance(it, Iteration) and repr(it).count("\n") == 0 for it in run)


def test_a_note_on_data_is_shown_whole_and_names_no_path(tmp_path):
    rows = [dict(question=f"What is {i}?", answer=str(i)) for i in range(8)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_questions(Config(data=str(tmp_path / "q.jsonl"), n_train=4, n_test=2, reward="token_f1"))
    notes = [w for w in caught if w.category is DataWarning]
    assert len(notes) == 1 == len(data.notes) and notes[0].filename == __file__
    assert html.escape(data.notes[0]) in data._repr_html_() and data.notes[0].endswith("0.5")


def test_a_warning_names_the_cell_not_a_file(shell):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shell.run_cell("import contextlib\nfrom stasc.core import warn\nwith contextlib.ExitStack() as s: s.callback(warn, 'mind the gap')")    # a library's frame in between
    assert [(str(w.message), w.lineno, w.category) for w in caught] == [("mind the gap", 3, UserWarning)]
    assert caught[0].filename.startswith("Cell In[") and os.sep not in caught[0].filename


# --- errors

@pytest.mark.parametrize("make, says", [(lambda: Config(varient="EIE"), "did you mean 'variant'"), (lambda: Config("EIE"), "by name"), (lambda: STaSC(Config(), modle="x"), "did you mean 'model'"),
                                        (lambda: Config(n_inti=3, seed=1), "'n_init'")])
def test_a_slip_in_an_option_names_the_nearest_one(make, says):
    with pytest.raises(ConfigError, match=says): make()


def test_config_is_still_a_dataclass():
    import dataclasses, pickle
    cfg = Config(seed=3)
    assert dataclasses.replace(cfg, seed=4).seed == 4 and pickle.loads(pickle.dumps(cfg)) == cfg and list(inspect.signature(Config).parameters) == [f.name for f in dataclasses.fields(Config)]


def test_data_may_be_a_name(questions_file, tmp_path):
    run = STaSC(data=str(questions_file), n_train=4, n_test=2, out=tmp_path / "run")
    assert run.cfg.data == str(questions_file) and len(run.data.train) == 4
    with pytest.raises(DataError, match="no such file"): STaSC(data="nowhere.csv", out=tmp_path / "other").data


def cell(shell, code, capsys):
    "What a cell prints, its result."
    capsys.readouterr()
    result = shell.run_cell(code)
    return capsys.readouterr().out.strip().splitlines(), result.error_in_exec


def test_an_error_is_the_users_line_and_the_sentence(shell, capsys):
    lines, e = cell(shell, "x = 3\nload_questions(Config(data='nowhere.csv'))", capsys)
    assert isinstance(e, DataError) and len(lines) == 3
    assert lines[0].startswith("Cell In[") and lines[0].endswith("line 2") and lines[1] == "----> 2 load_questions(Config(data='nowhere.csv'))"
    assert lines[2] == f"DataError: {e}"


def test_the_line_of_a_users_own_function_is_shown(shell, capsys):
    lines, e = cell(shell, "def broken(prediction, references):\n    return 1/0\n\njudge('Final Answer: 4', ['4'], broken)", capsys)
    assert isinstance(e, RewardError) and [l for l in lines if l.startswith("---->")] == ["----> 4 judge('Final Answer: 4', ['4'], broken)", "----> 2 return 1/0"]
    assert lines[-1].startswith("RewardError: reward broken failed") and "ZeroDivisionError" in lines[-1]


def test_every_frame_can_still_be_seen(shell, capsys, monkeypatch):
    cell(shell, "load_questions(Config(data='nowhere.csv'))", capsys)
    whole, _ = cell(shell, "%tb", capsys)
    assert any("data.py" in l for l in whole) and any("no such file" in l for l in whole) and len(whole) > 10
    monkeypatch.setenv("STASC_TRACEBACK", "full")
    again, _ = cell(shell, "load_questions(Config(data='nowhere.csv'))", capsys)
    assert any("data.py" in l for l in again)


def test_other_errors_and_interruptions_are_left_alone(shell, capsys):
    for code, kind in (("1/0", ZeroDivisionError), ("raise KeyboardInterrupt", KeyboardInterrupt)):
        lines, e = cell(shell, code, capsys)
        assert type(e) is kind and "Traceback" in "\n".join(lines) and not hasattr(e, "_render_traceback_")


def test_a_sentence_with_control_characters_is_shown_not_obeyed():
    said = StascError("a \x1b[2Jb\u202e")._render_traceback_()
    assert "\x1b" not in said[-1] and "\u202e" not in said[-1]


def test_causes_that_go_round_end():
    a, b = StascError("a"), ValueError("b")
    a.__cause__, b.__cause__ = b, a
    assert a._render_traceback_() == ["StascError: a"]


# --- a saved notebook

NOTEBOOK = '''
import tempfile
from stasc.core import Config, Question
from stasc.data import Data
from stasc.loop import STaSC
from stasc.train import ScriptedEngine
asked = lambda *ids: [Question(i, f"What is {i}?", (i,)) for i in ids]
engine = ScriptedEngine(lambda prompt, rng, skill: f"Final Answer: {rng.choice('abcd')}")
make = lambda n: STaSC(Config(iterations=n, shots=0, n_init=4, part_size=1), tempfile.mkdtemp(), data=Data(asked("a", "b", "c"), asked("d")), engine=engine)
'''


def test_progress_leaves_nothing_in_a_saved_notebook(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(root))
    sources = [NOTEBOOK, "for it in make(2): print(it)", "run = make(2)\nrun.step()", "run.step()",
               "def bad(p, r): return 7\nrun = make(1); run._reward = bad\nrun.run()"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbclient.NotebookClient(nb, allow_errors=True, timeout=120, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    outputs = [o for c in nb.cells for o in c.outputs]
    assert "\\r" not in json.dumps(nb.cells) and not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert not [o for o in outputs if "widget" in json.dumps(o.get("data", {}))]
    for c in nb.cells[1:]:
        lines = [o for o in c.outputs if o.output_type == "display_data"]
        assert [dict(o.data) for o in lines] == [{"text/plain": ""}], c.source
    assert "M_2" in nb.cells[1].outputs[-1].text and len(nb.cells[2].outputs) == 2
    error = nb.cells[4].outputs[-1]
    assert error.output_type == "error" and error.traceback[0].endswith("----> 3 run.run()") and "expected a number in [0, 1]" in error.traceback[-1] and len(error.traceback) == 2


def test_the_tutorial_on_ones_own_task_is_twenty_cells():
    nb = json.loads((root / "nbs/tutorials/your_own_task.ipynb").read_text(encoding="utf-8"))
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert len(code) <= 20 and any("display(it)" in "".join(c["source"]) for c in code[:5])
