"Fail, and say what to mend, where notebooks, modules, README.md, _quarto.yml, links or alt texts are out of step."
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pages
import readme

root = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|Users|tmp|private|var|work|mnt|content|opt|usr)/\w[\w./-]*"
                          r"|\b[A-Z]:\\{1,2}Users\\")
TIME_STAMP = re.compile(r"\b20\d\d-[01]\d-[0-3]\d[ T][0-2]\d:[0-5]\d")


def notebooks(folder):
    "The notebooks that nbdev reads, by their path from `folder`."
    found = sorted(o.relative_to(folder) for o in (folder / "nbs").rglob("*.ipynb"))
    return [o for o in found if not any(part.startswith((".", "_")) for part in o.parts)]


def output_texts(output):
    "Every text of a saved output; pictures, which are base64, are none."
    yield "".join(output.get("text", ""))
    yield "\n".join(output.get("traceback", []))
    for mime, data in output.get("data", {}).items():
        if mime not in ("image/png", "image/jpeg", "image/gif"):
            yield "".join(data) if isinstance(data, (str, list)) else json.dumps(data)


def faults_in_notebook(nb):
    "What a saved notebook holds that it should not: widgets, machine paths, time stamps."
    if "widgets" in nb["metadata"]:
        yield "keeps widget state in its metadata: delete metadata.widgets"
    for cell in nb["cells"]:
        where = f"cell {cell.get('id', '?')}"
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                yield f"{where} shows a widget, which GitHub cannot draw: display HTML instead"
            for text in output_texts(output):
                if match := MACHINE_PATH.search(text):
                    yield f"{where} shows a path of this computer, {match[0]}: print a relative path and run it again"
                if match := TIME_STAMP.search(text):
                    yield f"{where} shows a time stamp, {match[0]}: leave it out and run it again"


def check_outputs():
    for path in notebooks(root):
        try:
            nb = json.loads((root / path).read_text(encoding="utf-8"))
        except ValueError as e:
            raise SystemExit(f"{path.as_posix()} is not JSON ({e}): restore it from git.")
        yield from (f"{path.as_posix()} {o}." for o in faults_in_notebook(nb))


def check_clean(copy):
    from nbdev.clean import nbdev_clean
    nbdev_clean(str(copy / "nbs"))
    for path in notebooks(root):
        if (root / path).read_text(encoding="utf-8") != (copy / path).read_text(encoding="utf-8"):
            yield f"{path.as_posix()} is not clean: run `make export`."


def check_modules(copy):
    from nbdev.doclinks import nbdev_export
    nbdev_export()
    names = {o.relative_to(top).as_posix() for top in (root, copy) for o in (top / "stasc").rglob("*.py")}
    for name in sorted(names):
        ours, fresh = root / name, copy / name
        if not fresh.exists():
            yield f"{name} comes from no notebook: write it as one, or delete it."
        elif not ours.exists() or ours.read_text(encoding="utf-8") != fresh.read_text(encoding="utf-8"):
            yield f"{name} is not what its notebook exports: run `make export`."


def check_readme():
    path = root / "README.md"
    if not path.exists() or path.read_text(encoding="utf-8") != readme.render(root):
        yield "README.md is not what nbs/index.ipynb gives: run `make readme`."


def check_quarto():
    if (root / "_quarto.yml").read_bytes() != (root / "nbs/_quarto.yml").read_bytes():
        yield "nbs/_quarto.yml is not the copy of _quarto.yml: run `make export`."


def main():
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp).resolve()
        for name in ("settings.ini", "stasc/__init__.py"):
            (copy / name).parent.mkdir(exist_ok=True)
            shutil.copy(root / name, copy / name)
        shutil.copytree(root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*"))
        with contextlib.chdir(copy):  # nbdev finds its settings from the working directory
            faults = [*check_outputs(), *check_clean(copy), *check_modules(copy), *check_readme(), *check_quarto(), *pages.faults(root)]
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{len(notebooks(root))} notebooks, the modules, README.md and _quarto.yml are in step.")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
