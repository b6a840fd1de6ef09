"Write README.md from nbs/index.ipynb."
import json
import posixpath
import re
from pathlib import Path

root = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r"^#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.S | re.M)
LINK = re.compile(r"""(\]\(|\b(?:src|href)=["'])([^)"'\s]+)""")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def split_directives(source):
    "The `#| name: value` lines of a cell as a dictionary, and the rest of it."
    found, rest = {}, []
    for line in source.splitlines():
        match = DIRECTIVE.match(line)
        if match:
            found[match[1]] = match[2].lower()
        else:
            rest.append(line)
    return found, "\n".join(rest).strip()


def relink(text, folder):
    "Links that count from nbs/ made to count from the top; each must lead to a file."
    def move(match):
        start, target = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|#|/", target, re.I):
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join("nbs", path))
        if not (folder / path).exists():
            raise SystemExit(f"nbs/index.ipynb links to {target}, which does not exist: mend the link.")
        return start + path + hash_ + anchor

    parts = CODE.split(text)  # every second part is code, where nothing is a link
    return "".join(o if i % 2 else LINK.sub(move, o) for i, o in enumerate(parts))


def show_output(output):
    "One saved output as Markdown: Markdown itself where there is some, plain text otherwise."
    if output["output_type"] == "error":
        text = f"{output['ename']}: {output['evalue']}"
    elif output["output_type"] == "stream":
        text = "".join(output["text"])
    else:
        data = output["data"]
        if "text/markdown" in data:
            return "".join(data["text/markdown"]).strip()
        if any(o.startswith("image/") for o in data):
            raise SystemExit("nbs/index.ipynb has a picture as an output: save it under nbs/images "
                             "and show it in a markdown cell, so that README.md can show it too.")
        text = "".join(data.get("text/plain", ""))
    text = ANSI.sub("", text).strip("\n").rstrip()
    return f"```text\n{text}\n```" if text else ""


def render(folder=root):
    "The README that nbs/index.ipynb in `folder` gives."
    nb = json.loads((folder / "nbs/index.ipynb").read_text(encoding="utf-8"))
    blocks = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(relink(source.strip(), folder))
        elif cell["cell_type"] == "code":
            options, source = split_directives(source)
            if "hide" in options or options.get("include") == "false":
                continue
            if source and options.get("echo") != "false":
                blocks.append(f"```python\n{source}\n```")
            if options.get("output") != "false":
                blocks += [show_output(o) for o in cell["outputs"]]
    note = "<!-- Made from nbs/index.ipynb by `make readme`: edit it there. -->"
    return "\n\n".join([note, *filter(None, blocks)]) + "\n"


if __name__ == "__main__":
    (root / "README.md").write_text(render(), encoding="utf-8", newline="\n")
