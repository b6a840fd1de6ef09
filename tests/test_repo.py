"The repository itself: notebooks, modules, README and packaging agree, and the package stays light and safe."
import ast
import configparser
import importlib.metadata
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools.command.build_py import build_py

import stasc

root = Path(__file__).resolve().parents[1]
modules = sorted(o for o in (root / "stasc").rglob("*.py") if o.name != "_modidx.py")
ids = [o.relative_to(root).as_posix() for o in modules]


@pytest.fixture(scope="module")
def settings():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(root / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


@pytest.fixture
def packaging(monkeypatch):
    "What setup.py hands to setuptools."
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(root)
    runpy.run_path("setup.py")
    return given


@pytest.fixture
def ci(monkeypatch):
    "The scripts of .ci, by name."
    monkeypatch.syspath_prepend(str(root / ".ci"))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"ci_{name}", root / f".ci/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


# --- notebooks, modules, README

def test_everything_is_in_step():
    done = subprocess.run([sys.executable, root / ".ci/check.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def notebook(output=None, **metadata):
    cell = dict(cell_type="code", id="c1", source=["1"], outputs=[output] if output else [])
    return dict(metadata=metadata, cells=[cell])


def shown(text, mime="text/plain"):
    return dict(output_type="display_data", data={mime: [text]}, metadata={})


@pytest.mark.parametrize("nb, said", [
    (notebook(widgets={}), "widget state"),
    (notebook(shown("{}", "application/vnd.jupyter.widget-view+json")), "shows a widget"),
    (notebook(shown("PosixPath('/home/ann/runs')")), "/home/ann/runs"),
    (notebook(shown("<td>/tmp/x.html</td>", "text/html")), "/tmp/x.html"),
    (notebook(shown("C:\\Users\\ann")), "Users"),
    (notebook(dict(output_type="stream", name="stdout", text=["saved in ", "/tmp/tmpa1/x"])), "/tmp/tmpa1/x"),
    (notebook(dict(output_type="error", ename="E", evalue="", traceback=["File /usr/lib/python3/x.py"])), "/usr/lib"),
    (notebook(shown("started 2026-08-01 12:30:01")), "2026-08-01 12:30"),
    (notebook(shown("<dc:date>2026-08-01T12:30:01</dc:date>", "image/svg+xml")), "time stamp"),
])
def test_faulty_output_is_named(ci, nb, said):
    faults = list(ci("check").faults_in_notebook(nb))
    assert len(faults) == 1 and said in faults[0]


@pytest.mark.parametrize("text", ["runs/demo/tmp/x", "https://example.org/home/x", "3/4 of 12:30", "</tmp>", "2026-08-01",
                                  "What is 347 + 285?", "and/or"])
def test_harmless_output_passes(ci, text):
    assert not list(ci("check").faults_in_notebook(notebook(shown(text))))


def write_index(folder, *cells):
    (folder / "nbs/images").mkdir(parents=True)
    (folder / "nbs/images/a.png").touch()
    (folder / "nbs/00_core.ipynb").touch()
    (folder / "LICENSE").touch()
    (folder / "nbs/index.ipynb").write_text(json.dumps(dict(cells=cells)))


def markdown(text):
    return dict(cell_type="markdown", source=text.splitlines(True))


def code(text, *outputs):
    return dict(cell_type="code", source=text.splitlines(True), outputs=outputs)


def test_readme_from_index(ci, tmp_path):
    write_index(tmp_path,
                markdown("# stasc\n\n> A quote"),
                markdown('![a](images/a.png) <img src="images/a.png"> [core](00_core.ipynb#x) [l](../LICENSE) '
                         '[web](https://example.org) [here](#there) `d[0](k)`'),
                code("#| hide\nimport nbdev"),
                code("#| eval: false\nf(1)", shown("\x1b[31m2\x1b[0m")),
                code("#| echo: false\ng()", shown("| a |\n|---|", "text/markdown")))
    _, *blocks = ci("readme").render(tmp_path).split("\n\n")
    assert blocks == [
        "# stasc", "> A quote",
        '![a](nbs/images/a.png) <img src="nbs/images/a.png"> [core](nbs/00_core.ipynb#x) [l](LICENSE) '
        '[web](https://example.org) [here](#there) `d[0](k)`',
        "```python\nf(1)\n```", "```text\n2\n```", "| a |\n|---|\n"]


@pytest.mark.parametrize("cell, said", [(markdown("[x](gone.ipynb)"), "gone.ipynb"),
                                        (code("plot()", shown("iVBOR", "image/png")), "nbs/images")])
def test_readme_says_what_to_mend(ci, tmp_path, cell, said):
    write_index(tmp_path, cell)
    with pytest.raises(SystemExit, match=said):
        ci("readme").render(tmp_path)


# --- packaging

def test_setup_is_settings(settings, packaging):
    def lines(key): return settings[key].split("\n")[1:]
    assert packaging["name"] == settings["lib_name"]
    assert packaging["version"] == settings["version"] == stasc.__version__
    assert packaging["python_requires"] == ">=" + settings["min_python"]
    assert packaging["install_requires"] == lines("requirements")
    assert packaging["extras_require"]["dev"] == lines("dev_requirements")
    assert packaging["entry_points"]["console_scripts"] == ["stasc=stasc.cli:main"]


def test_requirements_are_floors(packaging):
    "A cap or a pin would let an install replace the torch or numpy that a user's machine came with."
    for line in packaging["install_requires"]:
        assert [o.operator for o in Requirement(line).specifier] == [">="], line


def test_constraints_meet_requirements(packaging):
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = dict(o.split("==") for o in lines if not o.startswith("#"))
    pins = {re.sub("[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    for line in packaging["install_requires"] + packaging["extras_require"]["dev"]:
        req = Requirement(line)
        assert req.specifier.contains(pins[req.name.lower()]), line


def test_the_floors_that_are_tested_are_those_that_are_promised(packaging):
    lines = (root / "constraints-floors.txt").read_text().splitlines()
    pins = {canonicalize_name(name): Version(version) for name, version in (o.split("==") for o in lines if not o.startswith("#"))}
    for line in packaging["install_requires"] + packaging["extras_require"]["qlora"]:
        req = Requirement(line)
        assert pins[canonicalize_name(req.name)] == Version(next(iter(req.specifier)).version), line


def test_requirements_cover_imports(packaging):
    "What stasc imports is required, stands in an extra, or comes with what is required."
    extras = [o for name, reqs in packaging["extras_require"].items() if name != "dev" for o in reqs]
    declared = {Requirement(o).name.lower() for o in packaging["install_requires"] + extras}
    declared |= {"tokenizers", "huggingface-hub", "regex", "ipython", "pillow", "fsspec"}      # of transformers, ipywidgets, matplotlib and datasets
    imported = {}
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [o.name for o in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.split(".")[0]: path.name for name in names}
    known = importlib.metadata.packages_distributions()
    for name, where in imported.items():
        if name not in sys.stdlib_module_names | {"stasc"}:
            owners = {o.lower().replace("_", "-") for o in known.get(name, [name])}
            assert owners & declared, f"{where} imports {name}: name it in the requirements of settings.ini"


@pytest.fixture
def data_files(packaging, monkeypatch):
    "The data files that a wheel built from a folder holds."
    def find(folder):
        monkeypatch.chdir(folder)
        given = {k: packaging[k] for k in ("package_data", "include_package_data")}
        command = build_py(setuptools.Distribution(dict(packages=["stasc"], **given)))
        command.ensure_finalized()
        return {(Path(source) / name).as_posix() for _, source, _, names in command.data_files for name in names}
    return find


def test_wheel_holds_dummy_data(data_files, tmp_path):
    files = {"stasc/checkpoints/arithmetic/model.safetensors", "stasc/checkpoints/arithmetic/tok/vocab.json",
             "stasc/prompts/paper.yaml", "stasc/data/words.txt"}
    for name in [*files, "stasc/notes.tmp"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert data_files(tmp_path) == files


def test_wheel_holds_all_data(data_files):
    files = {o.relative_to(root).as_posix() for o in (root / "stasc").rglob("*")
             if o.is_file() and o.suffix not in (".py", ".pyc") and "__pycache__" not in o.parts}
    assert files <= data_files(root), "a data file is missing from package_data in setup.py"


# --- a light and safe import

@pytest.mark.parametrize("name", ["stasc", "stasc.core", "stasc.reward", "stasc.data", "stasc.prompt", "stasc.cli"])
def test_import_is_light(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not written yet")
    heavy = ["torch", "transformers", "peft", "datasets", "pandas", "matplotlib", "ipywidgets", "fastcore"]
    line = f"import sys, {name}; print([o for o in {heavy} if o in sys.modules])"
    done = subprocess.run([sys.executable, "-c", line], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", f"import {name}: {done.stdout or done.stderr}"


@pytest.mark.parametrize("path", modules, ids=ids)
def test_loads_no_foreign_code(path):
    "No pickles, and no code from a model's repository: weights are safetensors, tables parquet."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [o.name for o in getattr(node, "names", []) if isinstance(o, ast.alias)] + [getattr(node, "module", "")]
        assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & set(names), f"line {node.lineno}"
        if isinstance(node, ast.Call):
            given = {o.arg: o.value.value for o in node.keywords if isinstance(o.value, ast.Constant)}
            assert given.get("trust_remote_code", False) is False, f"line {node.lineno}: trust_remote_code"
            assert not given.get("allow_pickle"), f"line {node.lineno}: allow_pickle"
            called = ast.unparse(node.func)
            assert called != "torch.load" or given.get("weights_only") is True, f"line {node.lineno}: {called}"
            assert called not in ("pd.read_pickle", "pandas.read_pickle"), f"line {node.lineno}: {called}"
