"Make the site in _docs: nbdev prepares the notebooks in _proc, figures get their alt texts, Quarto renders."
import os
import shutil
import subprocess
import sys

import pages
from nbdev import processors
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs


def prepare():
    "What Quarto renders, in _proc."
    os.chdir(pages.root)    # nbdev finds its settings from the working directory
    # The signatures that nbdev shows need the exported cells alone. By itself it would also run every cell that has an import in it.
    processors._do_eval = lambda cell: bool(cell.cell_type == "code" and cell.source and cell.directives_.keys() & {"export", "exports", "exporti"})
    shutil.rmtree(pages.root / "_proc", ignore_errors=True)
    refresh_quarto_yml()
    made = proc_nbs(str(pages.root / "nbs"), n_workers=0)
    config = get_config()
    pages.for_quarto(made, f"{config.git_url.rstrip('/')}/blob/{config.branch}" if config.git_url else "")
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
