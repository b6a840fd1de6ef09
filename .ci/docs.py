"Make the site in _docs: nbdev prepares the notebooks in _proc, the figures get their alt texts, Quarto renders."
import shutil
import subprocess
import sys
from pathlib import Path

import pages
from nbdev import processors
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs


def prepare(folder=pages.root):
    "What Quarto renders, in _proc."
    # The signatures that nbdev shows need the exported cells alone. By itself it would also run every cell that has an import in it.
    processors._do_eval = lambda cell: bool(cell.cell_type == "code" and cell.source and cell.directives_.keys() & {"export", "exports", "exporti"})
    shutil.rmtree(folder / "_proc", ignore_errors=True)
    refresh_quarto_yml()
    made = proc_nbs(str(folder / "nbs"), n_workers=0)
    pages.tell_figures(made)
    return made


def main():
    quarto = shutil.which("quarto")
    if not quarto and "--prepare" not in sys.argv:
        raise SystemExit("The site is rendered by Quarto, which is not on the PATH: see https://quarto.org/docs/download, or give --prepare to do all but that.")
    made = prepare()
    print(f"{len(pages.notebooks(pages.root))} pages are prepared in {made.name}.")
    if "--prepare" not in sys.argv:
        subprocess.run([quarto, "render", "--no-execute"], cwd=made, check=True)
        shutil.rmtree(pages.root / "_docs", ignore_errors=True)
        shutil.move(made / "_docs", pages.root / "_docs")


if __name__ == "__main__":
    main()
