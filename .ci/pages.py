"Check the pages: each notebook stands in _quarto.yml, every link leads somewhere, every picture is told in words."
import ast
import json
import posixpath
import re
import sys
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from markdown_it import MarkdownIt

root = Path(__file__).resolve().parents[1]
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/svg+xml")
FENCE = re.compile(r"(^```.*?^```)", re.S | re.M)
LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\(([^)\s]+)\)")
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


class Found(HTMLParser):
    "What a text holds: links, pictures as (source, alt text), headings as (level, text), and the names given to places in it."

    def __init__(self, html):
        super().__init__()
        self.links, self.pictures, self.headings, self.names, self._open = [], [], [], set(), None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[o] for o in ("id", "name") if given.get(o)}
        if tag == "a" and given.get("href") is not None:
            self.links.append(given["href"])
        elif tag == "img":
            self.pictures.append((given.get("src") or "", given.get("alt") or ""))
        elif tag == "svg" and "aria-hidden" not in given:
            self.pictures.append(("", given.get("aria-label") or given.get("aria-labelledby") or ""))
        elif tag in HEADINGS:
            self._open = [int(tag[1]), ""]

    def handle_endtag(self, tag):
        if tag in HEADINGS and self._open:
            self.headings.append(tuple(self._open))
            self._open = None

    def handle_data(self, text):
        if self._open:
            self._open[1] += text


def github_slug(text):
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def quarto_slug(text):
    return re.sub(r"^[\W\d_]+", "", "-".join(re.sub(r"[^\w\-.\s]", "", text.lower()).split())) or "section"


def anchors(found, notebook):
    "The places that a link may name: by Quarto's rule in a notebook, by GitHub's in a Markdown file."
    names = set(found.names)
    for level, text in found.headings:
        given = re.search(r"\s*\{#([\w.:-]+)[^}]*\}\s*$", text) if notebook else None
        slug = given[1] if given else quarto_slug(text) if notebook else github_slug(text)
        if not (notebook and level == 1):   # the title of a page: Quarto gives it no name
            names.add(next(o for o in [slug, *(f"{slug}-{i}" for i in range(1, 999))] if o not in names))
    return names


def source(cell):
    return "".join(cell["source"])


def notebooks(folder):
    "Every notebook under nbs/, by its path from there; nbdev and Quarto pass over names with a dot or an underscore in front."
    found = sorted(o.relative_to(folder / "nbs") for o in (folder / "nbs").rglob("*.ipynb"))
    return [o.as_posix() for o in found if not any(part.startswith((".", "_")) for part in o.parts)]


def texts(path):
    "The texts of a file as HTML, with the place where each stands; saved outputs of a notebook are among them."
    if path.suffix == ".md":
        yield "", MARKDOWN.render(path.read_text(encoding="utf-8"))
    elif path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield f", docstring of {getattr(node, 'name', 'the module')}", MARKDOWN.render(text)
    else:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            where = f", cell {cell.get('id', '?')}"
            if cell["cell_type"] == "markdown":
                yield where, MARKDOWN.render(source(cell))
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                yield where, MARKDOWN.render("".join(data.get("text/markdown", "")))
                yield where, "".join(data.get("text/html", ""))


def figure_alt(output):
    "What a saved output says in words of the picture it holds; None where it holds none."
    kinds = [o for o in IMAGES if o in output.get("data", {})]
    if not kinds:
        return None
    told = next((o["alt"] for o in map(output.get("metadata", {}).get, kinds) if o and o.get("alt")), None)
    told = told or "".join(output["data"].get("text/plain", ""))
    return "" if told.startswith("<") else told.strip()


def check_sidebar(folder):
    "Each notebook once, and nothing else."
    def entries(node):
        for item in node:
            if isinstance(item, str):
                yield item
            else:
                yield from filter(None, [item.get("href"), item.get("file")])
                inner = item.get("contents", [])
                yield from [inner] if isinstance(inner, str) else entries(inner)

    site = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
    listed, there = list(entries(site["website"]["sidebar"]["contents"])), notebooks(folder)
    for name in dict.fromkeys(listed):
        if re.search(r"[*?\[]", name) or name == "auto":
            yield f"_quarto.yml lists pages by a pattern, {name}: name each notebook, in the order of reading."
        elif name not in there:
            yield f"_quarto.yml lists {name}, which is no notebook under nbs/: mend or delete the entry."
        elif listed.count(name) > 1:
            yield f"_quarto.yml lists {name} {listed.count(name)} times: keep one."
    for name in there:
        if name not in listed:
            yield f"nbs/{name} stands nowhere in _quarto.yml: list it there."


def check_heads(folder):
    "A title and a line that says what the page is for; one title only."
    for name in notebooks(folder):
        cells = json.loads((folder / "nbs" / name).read_text(encoding="utf-8"))["cells"]
        cells = [o for o in cells if not source(o).startswith("---")]   # front matter may stand before the title
        head = source(cells[0]) if cells and cells[0]["cell_type"] == "markdown" else ""
        if not re.match(r"# \S.*\n\s*> \S", head):
            yield f"nbs/{name} does not begin with a title and a quote: its first cell reads `# Title`, an empty line, `> what it is for`."
        written = "\n\n".join(source(o) for o in cells if o["cell_type"] == "markdown")
        titles = [text for level, text in Found(MARKDOWN.render(written)).headings if level == 1]
        if len(titles) > 1:
            yield f"nbs/{name} has {len(titles)} titles, the last `{titles[-1]}`: make all but the first level-2 headings."


def check_pictures(folder):
    "Every saved figure has words."
    for name in notebooks(folder):
        for cell in json.loads((folder / "nbs" / name).read_text(encoding="utf-8"))["cells"]:
            if "" in [figure_alt(o) for o in cell.get("outputs", [])]:
                yield (f"nbs/{name}, cell {cell.get('id', '?')} shows a figure without alt text: "
                       "display it with metadata={'image/png': {'alt': '...'}}, or draw it with stasc.plot.")


def check_links(folder):
    "Links and pictures of a text lead somewhere, and pictures have words."
    pages = [*sorted(folder.glob("*.md")), *(folder / "nbs" / o for o in notebooks(folder)), *sorted((folder / "stasc").rglob("*.py"))]
    found = {page: [(where, Found(html)) for where, html in texts(page)] for page in pages}

    def places(page):
        if page not in found:
            found[page] = [(where, Found(html)) for where, html in texts(page)]
        whole = Found("")
        for _, part in found[page]:
            whole.names |= part.names
            whole.headings += part.headings
        return anchors(whole, page.suffix == ".ipynb")

    for page in pages:
        name = page.relative_to(folder).as_posix()
        for where, part in found[page]:
            for target in [*part.links, *filter(None, (src for src, _ in part.pictures))]:
                if wrong := fault_of(target, page, folder, places):
                    yield f"{name}{where} links to {target}, {wrong}: mend the link."
            for src, alt in part.pictures:
                if not alt.strip():
                    yield f"{name}{where} shows a picture without alt text, {src[:60] or 'an svg'}: say in words what it shows."


def fault_of(target, page, folder, places):
    "What is wrong with a link of a page, or None."
    try:
        url = urlsplit(target)
        url.port
    except ValueError:
        return "which is no address"
    if url.scheme or url.netloc or target.startswith("/"):
        if url.scheme in ("data", "mailto"):
            return None
        sane = url.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+|localhost", url.hostname or "") and not re.search(r"\s|%20$", target)
        return None if sane else "which is no address on the web"
    path = (page.parent if page.suffix != ".py" else folder / "nbs") / unquote(url.path) if url.path else page
    if not path.resolve().is_relative_to(folder.resolve()) or not path.exists():
        return "which does not exist"
    if url.fragment and path.suffix in (".ipynb", ".md") and unquote(url.fragment) not in places(path.resolve()):
        return "where no heading has that name"


def faults(folder=root):
    folder = Path(folder).resolve()
    for check in (check_sidebar, check_heads, check_pictures, check_links):
        yield from check(folder)


def dead_links(folder=root):
    "The addresses on the web that do not answer; asks each of them."
    pages = [*folder.glob("*.md"), *(folder / "nbs" / o for o in notebooks(folder))]
    for link in sorted({o for page in pages for _, html in texts(page) for o in Found(html).links if o.startswith("http")}):
        try:
            urllib.request.urlopen(urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0"}), timeout=20).close()
        except OSError as e:
            yield f"{link} does not answer: {e}."


def for_quarto(folder,       # notebooks that Quarto is about to render
               elsewhere="",  # where the files of the repository are to be seen on the web, without a slash at the end
              ):
    "Figures get the option `fig-alt`, where Quarto reads alt text; links to files that are no part of the site lead to the repository, or are plain text."
    for path in folder.rglob("*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf-8"))

        def lead(match):
            place = posixpath.normpath(posixpath.join("nbs", path.parent.relative_to(folder).as_posix(), match[2]))
            if urlsplit(match[2]).scheme or match[2].startswith(("#", "/")) or place.startswith("nbs/"):
                return match[0]
            return f"[{match[1]}]({elsewhere}/{place})" if elsewhere else match[1]

        for cell in nb["cells"]:
            alts = list(filter(None, map(figure_alt, cell.get("outputs", []))))
            if cell["cell_type"] == "markdown":
                cell["source"] = "".join(o if o.startswith("```") else LINK.sub(lead, o) for o in FENCE.split(source(cell)))
            elif alts and "fig-alt:" not in source(cell):
                cell["source"] = f"#| fig-alt: {json.dumps(alts[0] if len(alts) == 1 else alts, ensure_ascii=False)}\n{source(cell)}"
        path.write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding="utf-8")


def main():
    wrong = [*faults(), *(dead_links() if "--online" in sys.argv else [])]
    print("\n".join(wrong) or f"{len(notebooks(root))} pages: all listed, every link leads somewhere, every picture has words.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
