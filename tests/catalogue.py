"""Malformed input, and the sentence that it has to give: configuration, data, prompts, models, run directories, the command line.

`python tests/catalogue.py` counts the cases by area; tests/test_bad_input.py runs them."""
import contextlib
import hashlib
import io
import json
import pickle
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from stasc.core import Config, ConfigError, DataError, ModelError, PromptError, Question, RewardError, StoreError

SMALL = ["--n-train", 4, "--n-test", 2, "--iterations", 1, "--n-init", 1, "--n-corr", 1, "--max-new-tokens", 4, "--part-size", 2, "--device", "cpu"]


@dataclass(frozen=True)
class Case:
    "One malformed input."
    area: str
    name: str
    error: type         # class of the error; SystemExit where the command line cannot be parsed
    says: tuple         # regular expressions, each of which the one sentence matches
    action: object      # function of a Place: gives the words of a command, or raises by itself
    out: str = "none"   # what the command leaves where it would have written: nothing at all, or nothing but an empty run


@dataclass
class Place:
    "Where an action is tried."
    path: Path                                      # an empty folder
    questions: Path                                 # 40 good questions
    model: Path                                     # a good model's folder
    finished: Path                                  # a finished run
    out: Path = field(init=False)

    def __post_init__(self): self.out = self.path / "run"

    def file(self, name, content):
        f = self.path / name
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f

    def run(self, *flags): return ["run", *SMALL, "--data", self.questions, *flags, "--out", self.out]

    def data(self, name, content): return ["run", *SMALL, "--data", self.file(name, content), "--out", self.out]

    def config(self, name, content): return ["run", "--config", self.file(name, content), "--out", self.out]

    def prompts(self, content): return self.run("--prompts", self.file("p.yaml", content))

    def folder(self, **changes):
        "A copy of the model; files are rewritten, or left out where None is given."
        to = self.path / "model"
        shutil.copytree(self.model, to)
        for name, content in changes.items():
            f = to / name.replace("__", ".")
            f.unlink(missing_ok=True)
            if content is not None: self.file(f.relative_to(self.path).as_posix(), content)
        return to

    def with_model(self, **changes): return self.run("--model", self.folder(**changes), "--shots", 0)

    def copy(self):
        "A copy of the finished run."
        shutil.copytree(self.finished, self.out)
        return self.out

    def damaged(self, name, content):
        "A run in which a file holds something else."
        self.copy()
        self.file(f"run/{name}", content)
        return self.out

    def changed(self, name, change):
        "A run in which the JSON of a file was changed."
        f = self.copy() / name
        value = json.loads(f.read_text())
        f.write_text(json.dumps(change(value) or value))
        return self.out

    def table(self, name, change):
        "A run in which a table was changed, and the manifest with it."
        import pyarrow.parquet as pq
        f = self.copy() / name
        pq.write_table(change(pq.ParquetFile(f).read()), f)
        return self.entry(name, sha256=hashlib.sha256(f.read_bytes()).hexdigest())

    def entry(self, which, **changes):
        "A run in whose manifest an entry was changed."
        if not self.out.exists(): self.copy()
        f = self.out / "manifest.jsonl"
        rewrite(f, lambda e: e | changes if e["name"] == which else e)
        return self.out


def rewrite(manifest, change=lambda entry: entry):
    "Write a manifest as somebody would who knows what it is: lines need no checks of their own."
    lines = [change({k: v for k, v in json.loads(line).items() if k not in ("check", "settings")}) for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(e) + "\n" for e in lines))


def said(*argv):
    "What a command gives: exit code, output, errors, and the class of the error behind them."
    import stasc.cli
    out, err, seen, sentence = io.StringIO(), io.StringIO(), [], stasc.cli._sentence
    def note(message):
        if isinstance(message, Exception): seen.append(type(message))
        return sentence(message)
    stasc.cli._sentence = note
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            for kind in (DeprecationWarning, PendingDeprecationWarning): warnings.simplefilter("ignore", kind)
            try: code = stasc.cli.main([str(a) for a in argv])
            except SystemExit as e: code = e.code; seen.append(SystemExit)
    finally: stasc.cli._sentence = sentence
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), error=seen[-1] if seen else None)


CASES = []


def case(area, name, error, *says, out="none"):
    "Enter an action into the catalogue."
    def enter(action): CASES.append(Case(area, name, error, says, action, out)); return action
    return enter


# --- configuration: flags

for flags, says in {
    ("--variant", "XYZ"): ("unknown variant 'XYZ'", "EIE"), ("--n-init", 0): ("n_init = 0: expected a number from 1",), ("--n-init", "many"): ("n_init = 'many': expected a whole number",),
    ("--n-init", 1.5): ("n_init = '1.5': expected a whole number",), ("--n-init", "9" * 5000): (r"n_init = '9{20,}\.\.\.9+': expected a whole number",),
    ("--n-init", "9" * 4000): (r"n_init = .*: expected a number from 1 to 10000",),
    ("--temperature", -0.5): ("temperature = -0.5: expected a number from 0",), ("--temperature", "nan"): ("temperature = nan",), ("--temperature", "inf"): ("temperature = inf",),
    ("--grad-clip", "inf"): ("grad_clip = inf: expected a number of at least 0",), ("--top-p", 0): ("top_p = 0",), ("--top-p", 1.1): ("top_p = 1.1: expected a number from",), ("--top-k", -1): ("top_k = -1",),
    ("--learning-rate", "nan"): ("learning_rate = nan",), ("--learning-rate", "1e-4x"): ("learning_rate = '1e-4x': expected a number",), ("--threshold", 0): ("threshold = 0",),
    ("--filter", "improve"): ("unknown filter 'improve', did you mean 'improving'",), ("--finetune", "lora2"): ("unknown finetune 'lora2', did you mean 'lora'",),
    ("--device", "tpu"): ("unknown device 'tpu'", "cuda"), ("--iterations", 0): ("iterations = 0",), ("--seed", -1): ("seed = -1",), ("--seed", 2**31): ("seed = 2147483648: expected a number from 0 to",),
    ("--pairing", "cross"): ("unknown pairing 'cross', did you mean 'crossed'",), ("--scope", "all"): ("unknown scope 'all'", "final, full"), ("--part-size", 0): ("part_size = 0: expected a number of at least 1",),
    ("--shots", 101): ("shots = 101: expected a number from 0 to 100",), ("--variant", "E" * 100_000): (r"unknown variant 'E+\.\.\.E+'",), ("--task", "maths"): ("unknown task 'maths', did you mean 'math'",),
}.items():
    def action(p, flags=flags): return p.run(*flags)
    case("configuration", flags[0] + " " + (str(flags[1]) if len(str(flags[1])) < 40 else f"{len(flags[1])} characters"), ConfigError, *says)(action)

case("configuration", "unknown reward", RewardError, "unknown reward 'acuracy', did you mean 'in_accuracy'", "register your own")(lambda p: p.run("--reward", "acuracy"))
case("configuration", "programs without leave", RewardError, "reward run_tests runs programs that the model wrote", r"allow it with run_code = True \(--run-code\)")(lambda p: p.run("--reward", "run_tests"))


# --- configuration: files

laughs = "a: &a [x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
for name, file, content, says in (
    ("unknown option", "c.yaml", "n_inti: 3\n", ("c.yaml", "unknown option 'n_inti', did you mean 'n_init'")),
    ("YAML that is not closed", "c.yaml", "n_init: [1\n", ("c.yaml: not valid YAML",)),
    ("JSON that is not closed", "c.json", "{", ("c.json: not valid JSON",)),
    ("YAML list", "c.yaml", "- 1\n", ("c.yaml: expected a mapping",)),
    ("JSON list", "c.json", "[]", ("c.json: expected a mapping",)),
    ("YAML false", "c.yaml", "false\n", ("c.yaml: expected a mapping",)),
    ("null for a number", "c.yaml", "n_init: null\n", ("n_init = None: expected a whole number",)),
    ("true for a number", "c.yaml", "n_init: true\n", ("n_init = True: expected a whole number",)),
    ("text for true or false", "c.yaml", "trust_remote_code: 'yes'\n", ("trust_remote_code = 'yes': expected true or false",)),
    ("a date", "c.yaml", "seed: 2025-01-01\n", ("seed = datetime.date.*: expected a whole number",)),
    ("number as a key", "c.yaml", "1: 2\n", ("unknown option '?1",)),
    ("list as a key", "c.yaml", "? [a]\n: 1\n", ("c.yaml: not valid YAML", "unhashable")),
    ("an option twice", "c.yaml", "seed: 1\nn_init: 2\nseed: 3\n", ("c.yaml: 'seed' stands there twice; keep one",)),
    ("an option twice in JSON", "c.json", '{"seed": 1, "seed": 2}', ("c.json: 'seed' stands there twice; keep one",)),
    ("two documents", "c.yaml", "seed: 1\n---\nseed: 2\n", ("c.yaml: not valid YAML", "single document")),
    ("a tag that would run code", "c.yaml", "model: !!python/object/apply:os.system ['touch PWNED']\n", ("c.yaml: not valid YAML", "could not determine a constructor for the tag")),
    ("a tag that would make an object", "c.yaml", "seed: !!python/name:os.system\n", ("c.yaml: not valid YAML", "could not determine a constructor")),
    ("a control character", "c.yaml", b"seed: 1\n\x01\n", ("c.yaml: not valid YAML", "special characters are not allowed")),
    ("not UTF-8", "c.yaml", b"model: caf\xe9\n", ("c.yaml: cannot be read as text",)),
    ("brackets without end", "c.yaml", "a: " + "[" * 2_000, ("c.yaml: nested too deeply",)),
    ("brackets without end in JSON", "c.json", '{"a": ' + "[" * 200_000, ("c.json: nested too deeply",)),
    ("lists that grow without bound", "c.yaml", laughs + "n_init: *i\n", ("c.yaml: unknown option 'a'",)),
    ("lists that grow without bound as a value", "c.yaml", "n_init: &a [[[[1]]], *a, *a]\n", (r"n_init = \[.*\]: expected a whole number",)),
    ("a value of 100,000 characters", "c.yaml", "variant: " + "x" * 100_000, (r"unknown variant 'x+\.\.\.x+'",)),
):
    def action(p, file=file, content=content): return p.config(file, content)
    case("configuration", name, ConfigError, *says)(action)

case("configuration", "no such file", ConfigError, "none.yaml: cannot be read as text")(lambda p: ["run", "--config", p.path / "none.yaml"])
case("configuration", "a folder", ConfigError, "cannot be read as text")(lambda p: ["run", "--config", p.path])
case("configuration", "bytes", ConfigError, "model = b'x': expected text")(lambda p: Config(model=b"x"))
case("configuration", "a name with NUL", ConfigError, "no name of a file")(lambda p: Config.from_file("a\0b"))


# --- data: files

ROWS = [dict(id=f"q{i}", question=f"Question number {i}?", answer=[str(i)]) for i in range(20)]


def lines(*changes):
    rows = [json.dumps(r) for r in ROWS]
    for n, text in changes: rows[n - 1] = text
    return "\n".join(rows) + "\n"


def parquet(**columns):
    "A Parquet file with these columns."
    import pyarrow as pa
    import pyarrow.parquet as pq
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def arrow(values, kind):
    import pyarrow as pa
    return pa.array(values, getattr(pa, kind)())


def no_utf8(): return arrow([b"caf\xe9"], "binary").view("string")


for name, file, content, says in (
    ("missing question column", "f.jsonl", lines().replace('"question"', '"ask"'), ("f.jsonl: no question column", "it has id, ask, answer; name one with question_column")),
    ("missing answer column", "f.csv", "id,question,solution\n1,a?,b\n", ("f.csv: no reference column", "solution; name one with reference_column")),
    ("empty file", "f.jsonl", "", ("f.jsonl: the file is empty",)),
    ("blank file", "f.csv", "\n \n", ("f.csv: the file is empty",)),
    ("header alone", "f.csv", "id,question,answer\n", ("f.csv: holds no questions",)),
    ("empty list", "f.json", "[]", ("f.json: holds no questions",)),
    ("not JSON", "f.jsonl", lines((17, '{"question": "a?", "answer": ')), ("f.jsonl, line 17: not JSON",)),
    ("not an object", "f.jsonl", lines((17, "[1, 2]")), ("f.jsonl, line 17: expected an object",)),
    ("brackets without end", "f.jsonl", lines((17, "[" * 100_000)), ("f.jsonl, line 17: JSON that cannot be read",)),
    ("lines in a .json", "f.json", lines(), ("f.json, line 2: not JSON", "with one object per line the file is called .jsonl")),
    ("null among references", "f.jsonl", lines((5, '{"id": "q4", "question": "a?", "answer": ["x", null]}')), ("line 5, column 'answer': null",)),
    ("null question", "f.jsonl", lines((5, '{"id": "q4", "question": null, "answer": ["x"]}')), ("line 5, column 'question': null",)),
    ("empty question", "f.jsonl", lines((5, '{"id": "q4", "question": " ", "answer": ["x"]}')), ("line 5, column 'question': the question is empty: fill it in or remove the row",)),
    ("number for a question", "f.jsonl", lines((5, '{"id": "q4", "question": 5, "answer": ["x"]}')), ("line 5, column 'question': 5 is no text",)),
    ("no references", "f.jsonl", lines((5, '{"id": "q4", "question": "a?", "answer": []}')), ("line 5, column 'answer': an empty list: give at least one reference",)),
    ("half a surrogate pair", "f.jsonl", lines((5, '{"id": "q4", "question": "a?", "answer": "\\ud800"}')), ("line 5, column 'answer': .* holds half a surrogate pair, which is no character: repair",)),
    ("row without the column", "f.jsonl", lines((5, '{"id": "q4", "question": "a?"}')), ("line 5: no column 'answer'",)),
    ("duplicate ids", "f.jsonl", lines((5, json.dumps(ROWS[0] | dict(question="Another?")))), (r"used more than once: 1 \(q0\): make them unique",)),
    ("an id that moves the cursor", "f.jsonl", lines(*((n, json.dumps(ROWS[n] | dict(id="\x1b[2Jx\r\n"))) for n in (5, 6))), ("used more than once: 1 .*␛\\[2Jx",)),
    ("not UTF-8", "f.jsonl", b'{"question": "caf\xe9?", "answer": "x"}\n', (r"f.jsonl, line 1: not UTF-8 \(byte 0xe9\): save the file as UTF-8",)),
    ("a comma too many", "f.csv", "question,answer\na?,b\nc?,d,e\n", ("f.csv, line 3: 3 values for 2 columns: a comma inside a text needs quotes",)),
    ("a column twice", "f.csv", "question,answer,answer\na?,b,c\n", ("f.csv: two columns have the same name",)),
    ("a choice that is not there", "f.jsonl", '{"question": "a?", "choices": ["x", "y"], "answer": "z"}\n', ("line 1, column 'choices': the answer 'z' is none of the choices",)),
    ("not Parquet", "f.parquet", "no", ("f.parquet: not a Parquet file",)),
    ("Parquet cut short", "f.parquet", b"PAR1" + bytes(100) + b"PAR1", ("f.parquet: not a Parquet file",)),
    ("Parquet with bytes", "f.parquet", lambda: parquet(question=[b"a?"], answer=["b"]), ("f.parquet, row 1, column 'question': b'a\\?' is no text",)),
    ("Parquet with bytes for answers", "f.parquet", lambda: parquet(question=["a?"], answer=[b"b"]), ("row 1, column 'answer': b'b' is no text",)),
    ("Parquet with text that is no UTF-8", "f.parquet", lambda: parquet(question=no_utf8(), answer=["b"]), ("f.parquet: a column holds what cannot be read .*: keep the columns of text alone",)),
    ("Parquet with a date beyond dates", "f.parquet", lambda: parquet(question=["a?"], answer=["b"], asked=arrow([2**60], "int64").view("timestamp[ms]")), ("f.parquet: a column holds what cannot be read",)),
    ("Parquet with lists of lists", "f.parquet", lambda: parquet(question=["a?"], answer=[[["b"]]]), (r"row 1, column 'answer': \['b'\] is no text",)),
    ("Parquet with nulls", "f.parquet", lambda: parquet(question=["a?"], answer=arrow([None], "string")), ("row 1, column 'answer': null",)),
    ("Parquet without rows", "f.parquet", lambda: parquet(question=arrow([], "string"), answer=arrow([], "string")), ("f.parquet: holds no questions",)),
    ("unknown type", "f.txt", "no", ("unknown file type '.txt'",)),
    ("an archive", "f.jsonl.gz", b"\x1f\x8b", ("unknown file type '.gz'",)),
    ("too few questions", "f.jsonl", "".join(json.dumps(r) + "\n" for r in ROWS[:5]), ("5 distinct questions", "n_train = 4 and n_test = 2 need 6: lower them, or give more questions")),
):
    def action(p, file=file, content=content): return p.data(file, content() if callable(content) else content)
    case("data", name, DataError, *says)(action)

for name, flags, says in (
    ("no such file", lambda p: ["--data", p.path / "none.jsonl"], ("none.jsonl: no such file",)),
    ("a folder", lambda p: ["--data", p.path], ("folder",)),
    ("unknown preset", lambda p: ["--data", "nq_opne"], ("unknown data set 'nq_opne', did you mean 'nq_open'",)),
    ("a name that is too long", lambda p: ["--data", p.path / ("x" * 300)], ("x{50}: File name too long",)),
    ("a part of what has none", lambda p: ["--data", "arithmetic:train[:5]"], ("have no parts: leave out what follows its name",)),
    ("a slice that is none", lambda p: ["--data", f"{p.questions}[5]"], (r"\[5\] is no slice of rows: write \[:500\]",)),
    ("tests to train on", lambda p: ["--data", "math500"], ("math500 is for tests alone", "give it as test_data")),
    ("a column that is not there", lambda p: ["--data", p.questions, "--question-column", "Q"], ("no column 'Q': it has id, question, answer; name one with question_column",)),
    ("a question in train and test", lambda p: ["--data", p.questions, "--test-data", p.file("b.jsonl", '{"id": "x", "question": "which NUMBER stands at place 3 of the list", "answer": "3"}\n'
                                                                                                       '{"id": "y", "question": "Another?", "answer": "3"}\n')], ("stand in the training data as well: 1 of 2", "q3 and x", "take them out")),
):
    def action(p, flags=flags): return ["run", *SMALL, *flags(p), "--out", p.out]
    case("data", name, DataError, *says)(action)


# --- data: handed over by a program

def handed_over(p, train, test=(Question("t", "A test?", ("x",)),)):
    from stasc.data import Data
    from stasc.loop import STaSC
    from stasc.train import ScriptedEngine
    STaSC(Config(data="own"), p.out, data=Data(train, test) if isinstance(train, tuple) else train, engine=ScriptedEngine(lambda prompt, rng, skill: "x"), callbacks=[]).run()


good = Question("a", "What?", ("x",))
for name, train, says in (
    ("a number for an id", (good, Question(5, "Who?", ("x",))), ("question '5': id, text, each of the references .* have to be texts",)),
    ("null for a question", (good, Question("b", None, ("x",))), ("question 'b': id, text",)),
    ("one text for the references", (good, Question("b", "Who?", "xyz")), ("question 'b': .* references \\(a tuple\\)",)),
    ("no references", (good, Question("b", "Who?", ())), ("training questions without references: 1 .'b'.: give each at least one",)),
    ("null among the references", (good, Question("b", "Who?", ("x", None))), ("question 'b': id, text, each of the references",)),
    ("an empty question", (good, Question("b", " \n", ("x",))), ("question 'b': its text is empty",)),
    ("half a surrogate pair", (good, Question("b", "Who \ud800?", ("x",))), ("question 'b' holds half a surrogate pair",)),
    ("half a surrogate pair in an id", (Question("\udfff", "Who?", ("x",)),), ("holds half a surrogate pair",)),
    ("a dict", (dict(id="a", question="Who?"),), ("expected questions .*, got dict",)),
    ("a list", [good], ("expected stasc.data.Data.*, got list",)),
    ("no training questions", (), ("no training questions",)),
    ("an id twice", (good, Question("a", "Who?", ("x",))), ("1 ids stand for more than one question \\('a'\\); give each question its own",)),
    ("a question in train and test", (good, Question("b", "a test", ("x",))), ("stand in the training data as well: 1 of 1",)),
):
    def action(p, train=train): return handed_over(p, train)
    case("data", f"handed over: {name}", DataError, *says)(action)


# --- prompts

GOOD = "initial: {user: 'Q {question}'}\ncorrection: {user: '{examples} Q {question} A {initial_answer}'}\n"
for name, content, error, says in (
    ("a number for a part", "initial: 5\n", PromptError, ("p.yaml: initial needs a text under user",)),
    ("a list for a part", GOOD.replace("{user: 'Q {question}'}", "[1]"), PromptError, ("p.yaml: initial needs a text under user",)),
    ("no place for the question", "initial: {user: hello}\ncorrection: {user: b}\n", PromptError, ("p.yaml: initial.user must hold {question}",)),
    ("no place for the initial answer", GOOD.replace("{initial_answer}", ""), PromptError, ("p.yaml: correction.user must hold {initial_answer}",)),
    ("a list", "- 1\n", PromptError, ("p.yaml: expected a mapping with initial and correction",)),
    ("empty", "", PromptError, ("p.yaml: initial needs a text",)),
    ("no correction", "initial: {user: '{question}'}\n", PromptError, ("p.yaml: correction needs a text under user",)),
    ("a slip in the name of a part", GOOD + "exampels: []\n", PromptError, ("p.yaml: unknown part 'exampels', did you mean 'examples'",)),
    ("a slip in the name of a role", GOOD.replace("{user: 'Q {question}'}", "{user: '{question}', sistem: x}"), PromptError, ("p.yaml: initial: unknown part 'sistem', did you mean 'system'",)),
    ("examples that are no list", GOOD + "example: x\nexamples: {a: b}\n", PromptError, ("p.yaml: examples needs a list",)),
    ("a number for the examples", GOOD + "example: x\nexamples: 5\n", PromptError, ("p.yaml: examples needs a list",)),
    ("a number for the example", GOOD + "example: 5\nexamples: [{question: a, initial_answer: b, correction: c}]\n", PromptError, ("p.yaml: example needs a text",)),
    ("examples without a text for them", GOOD + "examples: [{question: a, initial_answer: b, correction: c}]\n", PromptError, ("p.yaml has examples, so it needs a text under example",)),
    ("an example without its correction", GOOD + "example: x\nexamples: [{question: a, initial_answer: b}]\n", PromptError, ("p.yaml: example 1 needs a text under correction",)),
    ("a list for a name", GOOD + "name: [1]\n", PromptError, ("p.yaml: name needs a text",)),
    ("half a surrogate pair", GOOD.replace("'Q {question}'", '"Q {question} \\ud800"'), PromptError, ("p.yaml holds half a surrogate pair",)),
    ("not UTF-8", GOOD.encode() + b"# caf\xe9\n", ConfigError, ("p.yaml: cannot be read as text",)),
    ("a tag that would run code", GOOD + "name: !!python/object/apply:os.system ['touch PWNED']\n", ConfigError, ("p.yaml: not valid YAML", "could not determine a constructor")),
    ("a part twice", GOOD + "initial: {user: 'Which? {question}'}\n", ConfigError, ("p.yaml: 'initial' stands there twice",)),
):
    def action(p, content=content): return p.prompts(content)
    case("prompts", name, error, *says, out="empty")(action)

case("prompts", "unknown name", PromptError, "unknown prompt set 'defualt', did you mean 'default'", "a file with this name does not exist either", out="empty")(lambda p: p.run("--prompts", "defualt"))
case("prompts", "a folder", ConfigError, "cannot be read as text", out="empty")(lambda p: p.run("--prompts", p.path))


@case("prompts", "a question that is too long", PromptError, r"question 'q3': its prompt has \d+ tokens", "exceeds the model's 1024; shorten the question", out="empty")
def _(p): return p.data("f.jsonl", "".join(p.questions.read_text().splitlines(True)[:6]).replace("place 3 of", "place " + "3 of " * 600))


for name, template, says in (
    ("a template with a fault", "{% if %}", ("the chat template of .* cannot be rendered: Expected an expression",)),
    ("a template that refuses in two lines", "{{ raise_exception('a\nb') }}", ("cannot be rendered: a b$",)),
    ("a template that reaches for the system", "{{ ''.__class__.__mro__[1].__subclasses__() }}", ("cannot be rendered: access to attribute '__class__' of 'str' object is unsafe",)),
    ("a template without end", "{% for i in range(10**9) %}a{% endfor %}", ("cannot be rendered: Range too big",)),
):
    def action(p, template=template): return p.with_model(chat_template__jinja=template)
    case("prompts", name, PromptError, *says, out="empty")(action)


# --- models

class Booby:
    "Makes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self):
        import os
        return os.system, (f"touch '{self.path}/PWNED'",)


TRAP = """open({!r}, 'w')
from transformers import Qwen2Config, Qwen2ForCausalLM, PreTrainedTokenizerFast
class XConfig(Qwen2Config): pass
class X(Qwen2ForCausalLM): config_class = XConfig
class XT(PreTrainedTokenizerFast): pass
"""     # classes of its own: transformers marks what it loads so, and would mark its own



def trapped(p, model_type="xyz", **changes):
    "A model with Python code of its own, which makes a file when it is run."
    c = json.loads((p.model / "config.json").read_text()) | dict(model_type=model_type, auto_map=dict(AutoConfig="trap.XConfig", AutoModelForCausalLM="trap.X"))
    return p.folder(trap__py=TRAP.format(str(p.path / "PWNED")), config__json=json.dumps(c), **changes)


def setting(**changes):
    "A model whose configuration says something else."
    return lambda p: p.with_model(config__json=json.dumps(json.loads((p.model / "config.json").read_text()) | changes))


def without_tokenizer(p):
    folder = p.folder()
    for f in folder.glob("tokenizer*"): f.unlink()
    return p.run("--model", folder)


def incomplete(p):
    from safetensors.torch import load_file, save_file
    folder = p.folder()
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1." not in k}, folder / "model.safetensors", metadata=dict(format="pt"))
    return p.run("--model", folder)


LOADED = "cannot be loaded"
for name, action, says in (
    ("no tokenizer", without_tokenizer, ("holds no tokenizer", "save one there with tokenizer.save_pretrained")),
    ("no config.json", lambda p: p.with_model(config__json=None), ("config.json is missing",)),
    ("no weights", lambda p: p.with_model(model__safetensors=None), ("the model of .* cannot be loaded",)),
    ("config.json cut short", lambda p: p.with_model(config__json="{"), (LOADED,)),
    ("config.json is a list", lambda p: p.with_model(config__json="[]"), (LOADED,)),
    ("config.json is a number", lambda p: p.with_model(config__json="5"), (LOADED,)),
    ("unknown architecture", lambda p: p.with_model(config__json='{"model_type": "nonsuch"}'), (LOADED,)),
    ("tokenizer cut short", lambda p: p.with_model(tokenizer__json="{"), ("the tokenizer of .* cannot be loaded",)),
    ("tokenizer is a list", lambda p: p.with_model(tokenizer__json="[]"), ("the tokenizer of .* cannot be loaded",)),
    ("tokenizer_config.json is a list", lambda p: p.with_model(tokenizer_config__json="[]"), ("the tokenizer of .* cannot be loaded",)),
    ("weights that are none", lambda p: p.with_model(model__safetensors="x" * 50), (LOADED,)),
    ("weights that are incomplete", incomplete, ("is not complete: \\d+ weights are missing",)),
    ("a text for a size", setting(hidden_size="x"), (LOADED, "hidden_size")),
    ("no heads", setting(num_attention_heads=0), (LOADED,)),
    ("a negative vocabulary", setting(vocab_size=-1), (LOADED,)),
    ("an unknown number format", setting(dtype="nonsense"), (LOADED, "nonsense")),
    ("a number for the quantisation", setting(quantization_config=5), (LOADED,)),
    ("a list for the generation", lambda p: p.with_model(generation_config__json="[]"), (LOADED,)),
    ("a text for the end token", lambda p: p.with_model(generation_config__json='{"eos_token_id": ["x"]}'), ("generation_config.json of .* names 'x' as a token that ends a text",)),
    ("pickled weights alone", lambda p: p.with_model(model__safetensors=None, pytorch_model__bin=pickle.dumps(Booby(p.path))),
     (r"holds pickled weights \(pytorch_model.bin\) and no safetensors", "reading a pickle may run code", r"if you trust it.*save_pretrained\(new_folder\)")),
    ("pickled weights under the name of safe ones", lambda p: p.with_model(model__safetensors=pickle.dumps(Booby(p.path))), (LOADED,)),
    ("code of its own", lambda p: p.run("--model", trapped(p)), ("needs Python code that comes with it, which is not run", r"allow it with trust_remote_code = True \(--trust-remote-code\)")),
    ("an attention kernel from the Hub", setting(attn_implementation="someone/kernel"), ("asks for attn_implementation = 'someone/kernel', code from the Hub, which is not run", "--trust-remote-code")),
    ("an adapter in place of a model", lambda p: p.with_model(adapter_config__json='{"base_model_name_or_path": "x/y", "peft_type": "LORA"}', adapter_model__bin=pickle.dumps(Booby(p.path))),
     (r"holds an adapter \(adapter_config.json\), where a whole model is needed: merge it",)),
    ("a file", lambda p: p.run("--model", p.file("file", "")), ("no such folder, and not a Hub id such as",)),
    ("no such folder", lambda p: p.run("--model", p.path / "none"), ("no such folder, and not a Hub id",)),
    ("no such folder below", lambda p: p.run("--model", "./none"), ("no such folder, and not a Hub id",)),
    ("three names in a row", lambda p: p.run("--model", "a/b/c"), ("no such folder, and not a Hub id",)),
    ("a Hub id that cannot be one", lambda p: p.run("--model", "a/b\x1b[2J"), (LOADED, "␛")),
    ("NUL in the name", lambda p: p.config("c.yaml", 'model: "a\\0b"\nn_train: 4\nn_test: 2\n'), ("no such folder, and not a Hub id",)),
    ("half a surrogate pair in the name", lambda p: p.config("c.yaml", 'model: "\\ud800"\nn_train: 4\nn_test: 2\n'), ("no such folder, and not a Hub id",)),
    ("an embedded model that is none", lambda p: p.run("--model", "embedded-fact"), ("unknown embedded model 'fact', did you mean 'facts'",)),
):
    case("models", name, ModelError, *says, out="empty")(action)

case("models", "a plan without sizes", ModelError, "hidden_size, .* missing or not a number")(lambda p: ["plan", "--model", p.folder(config__json="{}")])
case("models", "a plan with a text for a size", ModelError, "head_dim missing or not a number")(
    lambda p: ["plan", "--model", p.folder(config__json=json.dumps(json.loads((p.model / "config.json").read_text()) | dict(head_dim="x")))])
case("models", "a plan of brackets", ModelError, "config.json cannot be read")(lambda p: ["plan", "--model", p.folder(config__json="[" * 200_000)])


# --- run directories

for text in ("", "{", "[]", "null", "{}", '{"config": 5}', '{"config": {"n_inti": 3}}', "\0\0", "[" * 100_000, '{"config": {}, "versions": 5}'):
    error = ConfigError if "inti" in text else StoreError
    def action(p, text=text): return ["show", p.damaged("config.json", text)]
    case("run directories", f"config.json: {text[:30]!r}", error, "config.json", out="kept")(action)

for file, text in (("questions.json", "{"), ("questions.json", "[1]"), ("questions.json", '[{"split": "train"}]'), ("questions.json", '{"train": []}'),
                   ("questions.json", '[{"split": "test", "id": 5, "text": "a", "references": ["b"], "context": null}]'), ("questions.json", '[{"split": "test", "id": "5", "text": "a", "references": "b", "context": null}]'),
                   ("iter_00/metrics.json", "{"), ("iter_00/metrics.json", "[" * 100_000), ("iter_01/metrics.json", "[]"), ("iter_01/metrics.json", '{"n_kept": 1, "train": {}, "test": {}}'),
                   ("iter_01/metrics.json", '{"iteration": 1, "n_kept": "many", "train": {}, "test": {}}')):
    def action(p, file=file, text=text): return ["show", p.damaged(file, text)]
    case("run directories", f"{file}: {text[:60]!r}", StoreError, file.split("/")[-1], "put the questions' file back|delete it and (resume the run|give the run its questions)", out="kept")(action)

PART = "iter_01/corrections.test/part-00000.parquet"


def cast(name, kind):
    def change(t):
        import pyarrow as pa
        i = t.schema.get_field_index(name)
        return t.set_column(i, name, pa.array([None] * len(t), t.schema.field(name).type) if kind is None else pa.array(["x"] * len(t)) if kind == "text" else t[name].cast(kind))
    return change


def rows(p, name):
    from stasc.loop import STaSC
    return STaSC.open(name, callbacks=[]).trajectories


for name, make, says in (
    ("a table cut short", lambda p: p.damaged(PART, b"PAR1"), ("part-00000.parquet is damaged .*; delete it and resume",)),
    ("a table that is none", lambda p: p.entry(PART, sha256=hashlib.sha256(p.damaged(PART, b"PAR1").joinpath(PART).read_bytes()).hexdigest()), ("part-00000.parquet is no readable Parquet file", "delete it and resume")),
    ("a column of text for rewards", lambda p: p.table(PART, cast("corr_reward", "text")), ("no table of this kind .column corr_reward is string, not double.; delete it and resume",)),
    ("a column of other numbers", lambda p: p.table(PART, cast("corr_reward", "float32")), ("column corr_reward is float, not double",)),
    ("a column with empty cells", lambda p: p.table(PART, cast("corr_text", None)), ("column corr_text has empty cells",)),
    ("a column that is missing", lambda p: p.table(PART, lambda t: t.drop_columns(["corr_reward"])), ("column corr_reward stands there 0 times",)),
    ("a column twice", lambda p: p.table(PART, lambda t: t.append_column("corr_reward", t["corr_reward"])), ("column corr_reward stands there 2 times|no readable Parquet file",)),
    ("the manifest's checksum is a number", lambda p: p.entry("iter_00/initial.test/part-00000.parquet", sha256=5), ("manifest.jsonl, line \\d+ is damaged; delete that line and resume",)),
    ("the manifest names nothing", lambda p: p.damaged("manifest.jsonl", '{"sha256": "x"}\n' * 2), ("manifest.jsonl, line 1 is damaged",)),
    ("the manifest holds a list", lambda p: p.damaged("manifest.jsonl", "[]\n" * 2), ("manifest.jsonl, line 1 is damaged",)),
    ("the manifest names another folder", lambda p: p.entry(PART, name="../../elsewhere.parquet"), ("manifest.jsonl names '../../elsewhere.parquet', which is no file of a run directory",)),
    ("the manifest names a place on the disk", lambda p: p.entry(PART, name="/etc/passwd"), ("names '/etc/passwd', which is no file of a run directory",)),
    ("the manifest names a drive", lambda p: p.entry(PART, name="C:\\x"), ("which is no file of a run directory",)),
    ("the manifest leaves an iteration's folder", lambda p: p.entry(PART, name="iter_01/corrections.test/../../../x.parquet"), ("which is no file of a run directory",)),
    ("prompts that are none", lambda p: p.changed("config.json", lambda d: d | dict(prompts=dict(name="x"))), ("config.json: unknown part|config.json: initial needs a text",)),
    ("prompts that are a list", lambda p: p.changed("config.json", lambda d: d | dict(prompts=[1])), ("config.json: expected a mapping",)),
):
    def action(p, make=make): return rows(p, make(p))
    case("run directories", name, PromptError if "prompts" in name else StoreError, *says, out="kept")(action)

case("run directories", "a damaged adapter", StoreError, "adapter is damaged .*; delete it and resume", out="kept")(
    lambda p: ["resume", p.damaged("iter_01/adapter/adapter_model.safetensors", b"x" * 100), "--iterations", 2])


@case("run directories", "a pickle in place of an adapter", ModelError, r"adapter .* holds pickled weights \(adapter_model.bin\) and no adapter_model.safetensors", "resume the run to make", out="kept")
def _(p):
    from stasc.store import _digest
    folder = p.damaged("iter_01/adapter/adapter_model.bin", pickle.dumps(Booby(p.path))) / "iter_01/adapter"
    (folder / "adapter_model.safetensors").unlink()
    return ["resume", p.entry("iter_01/adapter", sha256=_digest(folder)), "--iterations", 2]


@case("run directories", "a link in place of the manifest", StoreError, "manifest.jsonl is a link, and the run would write to where it points", out="kept")
def _(p):
    other = p.file("other", (p.copy() / "manifest.jsonl").read_bytes())
    (p.out / "manifest.jsonl").unlink()
    (p.out / "manifest.jsonl").symlink_to(other)
    return ["resume", p.out, "--iterations", 2]


for permission in ("trust_remote_code", "run_code"):
    def action(p, permission=permission): return ["resume", p.changed("config.json", lambda d: d | dict(config=d["config"] | {permission: True})), "--iterations", 2]
    case("run directories", f"{permission} in a stranger's run", ConfigError, f"was run with {permission} = True", "a directory, which may come from anywhere, cannot allow that", f"say so again with --{permission.replace('_', '-')}", out="kept")(action)

for name, argv, error, says in (
    ("no run to resume", lambda p: ["resume", p.path / "none"], StoreError, "none is not a run directory: it has no config.json"),
    ("no run to show", lambda p: ["show", p.path], StoreError, "is not a run directory"),
    ("no run to report", lambda p: ["report", p.path / "none"], StoreError, "none is not a run directory"),
    ("no run to evaluate", lambda p: ["eval", p.path / "none", "--data", p.questions], StoreError, "none is not a run directory"),
    ("other settings there", lambda p: ["run", *SMALL, "--data", p.questions, "--shots", 0, "--filter", "all", "--seed", 4, "--out", p.copy()], StoreError, "seed: 0 there, 4 here.; choose another directory"),
    ("another number of questions there", lambda p: ["run", *SMALL, "--data", p.questions, "--shots", 0, "--filter", "all", "--n-train", 5, "--out", p.copy()], StoreError, "n_train: 4 there, 5 here"),
    ("other files there", lambda p: (p.file("run/thesis.tex", "mine"), p.run("--shots", 0))[1], StoreError, "holds other files .thesis.tex. and no run; choose a new or an empty directory"),
    ("an iteration that is not there", lambda p: ["eval", p.copy(), "--data", p.file("n.jsonl", '{"id": "z", "question": "New?", "answer": "1"}\n'), "--iteration", 99], ConfigError, "iteration 99 is not there: 2 are complete"),
    ("an iteration before the first", lambda p: ["eval", p.copy(), "--data", p.file("n.jsonl", '{"id": "z", "question": "New?", "answer": "1"}\n'), "--iteration", -3], ConfigError, "iteration -3 is not there"),
    ("questions that were trained on", lambda p: ["eval", p.copy(), "--data", p.questions], DataError, "stand in the training data"),
    ("a place below a file", lambda p: ["run", *SMALL, "--data", p.questions, "--out", p.file("file", "mine") / "run"], StoreError, "cannot be written|is not a directory|Not a directory|File exists"),
    ("a place that is a file", lambda p: ["run", *SMALL, "--data", p.questions, "--out", p.file("file", "mine")], StoreError, "file cannot be written|File exists|Not a directory"),
    ("a name that is too long", lambda p: ["run", *SMALL, "--data", p.questions, "--out", p.path / ("x" * 300)], StoreError, "name too long"),
):
    case("run directories", name, error, says, out="kept")(argv)


@case("run directories", "NUL in the name", StoreError, "'a.x00b' is no name of a directory; choose another")
def _(p):
    from stasc.loop import STaSC
    STaSC(Config(), "a\0b")


@case("run directories", "half a surrogate pair in the name", StoreError, "is no name of a directory; choose another")
def _(p):
    from stasc.loop import STaSC
    STaSC.open("a\ud800b")


def sweep_of(trials): return lambda p: ["sweep", "--out", p.file("run/sweep.json", json.dumps(dict(data_fingerprint=None, trials=trials))).parent]


small = Config.demo(n_train=4, n_test=2, iterations=1).to_dict()
for name, action, error, says in (
    ("a sweep that is none", lambda p: ["sweep", "--out", p.file("run/sweep.json", "{").parent], StoreError, "sweep.json cannot be read"),
    ("a sweep without trials", lambda p: ["sweep", "--out", p.file("run/sweep.json", "[]").parent], StoreError, "sweep.json holds no trials; give the grid again"),
    ("a sweep with a number for trials", sweep_of(5), StoreError, "sweep.json holds no trials; give the grid again"),
    ("a trial in another folder", sweep_of({"../../x": small}), StoreError, "names a trial '../../x', which is no name of a directory in it"),
    ("a trial on the disk", sweep_of({"/tmp/x": small}), StoreError, "which is no name of a directory in it"),
    ("a trial with NUL", sweep_of({"a\0b": small}), StoreError, "which is no name of a directory in it"),
    ("a trial of 300 characters", sweep_of({"x" * 300: small}), StoreError, "which is no name of a directory in it"),
    ("a trial with an emoji", sweep_of({"🙂": small}), StoreError, "which is no name of a directory in it"),
    ("a trial that is two dots", sweep_of({"..": small}), StoreError, "which is no name of a directory in it"),
    ("a trial with an unknown option", sweep_of({"a": small | dict(n_inti=3)}), ConfigError, "unknown option 'n_inti'"),
    ("a stranger's trial that allows code", sweep_of({"a": small | dict(trust_remote_code=True)}), ConfigError, "holds trials with trust_remote_code = True .a., and a directory.* cannot allow that: .* --trust-remote-code"),
    ("no sweep", lambda p: ["sweep", "--out", p.path / "none"], StoreError, "holds no sweep to go on with; give a grid"),
):
    case("run directories", name, error, says, out="kept")(action)


# --- the command line

for name, argv, error, says in (
    ("a slip in a flag", lambda p: ["run", "--n-inti", 3], SystemExit, "unrecognized arguments: --n-inti 3, did you mean --n-init; see stasc --help"),
    ("a slip in a command", lambda p: ["rnu"], SystemExit, "invalid choice: 'rnu'"),
    ("a flag of another command", lambda p: ["show", "x", "--seed", 3], SystemExit, "unrecognized arguments: --seed 3"),
    ("a flag without its value", lambda p: ["run", "--seed"], SystemExit, "argument --seed: expected one argument; see stasc run --help"),
    ("no run directory", lambda p: ["resume"], SystemExit, "the following arguments are required: DIR"),
    ("no questions", lambda p: ["eval", "x"], SystemExit, "the following arguments are required: --data"),
    ("a word for an iteration", lambda p: ["eval", "x", "--data", "y", "--iteration", "last"], SystemExit, "argument --iteration: invalid int value: 'last'"),
    ("unknown preset of settings", lambda p: ["run", "--preset", "papre"], SystemExit, "argument --preset: invalid choice: 'papre'"),
    ("a limit of nothing", lambda p: ["report", "x", "--limit", 0], SystemExit, "argument --limit: '0': expected a whole number of at least 1"),
    ("a limit below nothing", lambda p: ["report", "x", "--limit", -3], SystemExit, "argument --limit"),
    ("no workers", lambda p: ["sweep", "--workers", 0], SystemExit, "argument --workers: '0': expected a whole number of at least 1"),
    ("workers in words", lambda p: ["sweep", "--workers", "two"], SystemExit, "argument --workers: 'two': expected a whole number"),
    ("no tokens", lambda p: ["plan", "--prompt-tokens", 0], SystemExit, "argument --prompt-tokens: '0': expected a whole number"),
    ("a line break in a flag", lambda p: ["run", "--see\nd", 3], SystemExit, "unrecognized arguments: --see d 3"),
    ("a control character in a flag", lambda p: ["run", "--\x1b[2Jseed", 3], SystemExit, "unrecognized arguments: --␛"),
    ("unknown card", lambda p: ["plan", "--gpu", "T5"], ConfigError, "unknown gpu 'T5' .known: T4, "),
    ("no questions to evaluate", lambda p: ["eval", p.copy(), "--data", p.questions, "--n", 0], ConfigError, "n = 0: expected a number of at least 1"),
    ("a grid without values", lambda p: ["sweep", "--grid", "seed", "--out", p.out], ConfigError, "--grid seed: expected OPTION=VALUES, such as"),
    ("a slip in a grid", lambda p: ["sweep", "--grid", "sead=0,1", "--out", p.out], ConfigError, "--grid: unknown option 'sead', did you mean 'seed'"),
    ("a word in a grid", lambda p: ["sweep", "--grid", "seed=0,one", "--out", p.out], ConfigError, "seed = 'one': expected a whole number"),
    ("an empty span in a grid", lambda p: ["sweep", "--grid", "n_init=3..1", "--out", p.out], ConfigError, "n_init"),
    ("an option twice in a grid", lambda p: ["sweep", "--grid", "seed=0", "seed=1", "--out", p.out], ConfigError, "seed stands there twice; give all its values at once"),
    ("options without a grid", lambda p: ["sweep", "--seed", 3, "--out", p.out], ConfigError, "sweep: options are for a grid; give --grid"),
    ("a demo of what there is not", lambda p: ["demo", "--finetune", "lorra"], ConfigError, "unknown finetune 'lorra', did you mean 'lora'"),
    ("a wrong file over a preset", lambda p: ["run", "--preset", "paper", "--config", p.file("c.yaml", "n_inti: 3\n")], ConfigError, "c.yaml: unknown option 'n_inti'"),
    ("a preset with a wrong model", lambda p: ["run", "--preset", "paper", "--config", p.file("c.yaml", "model: 5\n")], ConfigError, "model = 5: expected text"),
    ("a report into a folder", lambda p: ["report", p.copy(), "--out", p.file("there/x", "").parent], StoreError, "there cannot be written: Is a directory"),
    ("a file name that is no text", lambda p: ["show", p.path / "x\udcff"], StoreError, "x� is not a run directory"),
):
    case("command line", name, error, says, out="kept")(argv)


# --- the count

def counts():       # area -> number of cases
    "How many malformed inputs are tried."
    return dict(Counter(c.area for c in CASES))


if __name__ == "__main__":
    for area, n in counts().items(): print(f"{area:18}{n:4}")
    print(f"{'all':18}{len(CASES):4}")
