"Nothing that came from elsewhere is run: weights, code beside a model, adapters, run directories, reports; and no name leaves its directory."
import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from catalogue import TRAP, Booby, Place, rewrite, said, trapped
from conftest import family_model, family_tokenizer, root
from hostile import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stasc.core import Config, ConfigError, ModelError, Question, StascError, visible, whole_characters
from stasc.data import Data
from stasc.loop import Iteration, STaSC, default_out
from stasc.train import ScriptedEngine

OTHERS = [f"{i}: {t[:200]}" for i, t in enumerate(HOSTILE.values())]
NAMES = ["../../x", "/etc/passwd", "..", ".", "CON", "NUL.txt", "x" * 300, "🙂" * 80, "a\0b", "a\\..\\b", "C:\\x", "\u202egnp.exe", " ", "-rf", "a\nb", "~", "$HOME", "`touch PWNED`", "; touch PWNED", "%s%n", "a "]


def numbers(prompt, rng, skill): return f"Final Answer: {rng.randrange(3)}"


def small_run(folder, ids=("a", "b", "c"), script=numbers, **options):
    "A run by a script, one question held out."
    qs = tuple(Question(i, f"Question {n} of the list?", ("1",)) for n, i in enumerate(ids))
    cfg = Config(iterations=1, n_init=2, n_corr=2, n_train=len(qs) - 1, n_test=1, reward="exact_match", prompts="default", data="own", part_size=8, **options)
    return STaSC(cfg, folder, data=Data(qs[:-1], qs[-1:]), engine=ScriptedEngine(script), callbacks=[]).run()


def files(folder): return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


# --- weights and code that come with a model

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A very small Qwen2."
    folder, tokenizer = tmp_path_factory.mktemp("models") / "model", family_tokenizer("qwen2")
    family_model("qwen2", tokenizer, hidden_size=32, intermediate_size=64, num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, None, model, None)


def pwned(place): return (place.path / "PWNED").exists()


def load(folder, **options):
    from stasc.model import LM
    return LM(Config(model=str(folder), device="cpu", lora_r=2, **options))


def test_the_traps_work(place):
    "What the tests below rely on: the pickle and the code would leave their mark."
    pickle.loads(pickle.dumps(Booby(place.path)))
    assert pwned(place)
    (place.path / "PWNED").unlink()
    exec(TRAP.format(str(place.path / "PWNED")), {})
    assert pwned(place)


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin", "weights.ckpt", "model.pkl"])
def test_pickled_weights_alone_are_refused(place, name, finetune):
    folder = place.folder(model__safetensors=None)
    (folder / name).write_bytes(pickle.dumps(Booby(place.path)))
    with pytest.raises(ModelError, match=rf"holds pickled weights \({re.escape(name)}\) and no safetensors.*may run code"): load(folder, finetune=finetune)
    assert not pwned(place)


def test_pickled_weights_beside_safe_ones_are_not_looked_at(place):
    assert load(place.folder(pytorch_model__bin=pickle.dumps(Booby(place.path)))).describe().startswith("Qwen2ForCausalLM")
    assert not pwned(place)


@pytest.mark.parametrize("options", [{}, dict(finetune="full")])
def test_code_of_a_model_is_not_run_without_leave(place, options):
    folder = trapped(place)
    with pytest.raises(ModelError, match="needs Python code that comes with it, which is not run.*trust_remote_code = True"): load(folder, **options)
    assert not pwned(place)


def test_code_of_a_model_is_run_with_leave_alone(place):
    load(trapped(place), trust_remote_code=True)
    assert pwned(place)


def test_code_of_a_known_architecture_or_tokenizer_is_not_needed(place):
    "As with Phi-3 on the Hub: the folder brings code, transformers has its own."
    c = json.loads((place.model / "tokenizer_config.json").read_text()) | dict(auto_map=dict(AutoTokenizer=["trap.XT", "trap.XT"]))
    assert load(trapped(place, "qwen2", tokenizer_config__json=json.dumps(c))).describe().startswith("Qwen2ForCausalLM")
    assert not pwned(place)


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation"])
def test_kernels_named_by_a_model_are_not_fetched(place, where):
    c = json.loads((place.model / "config.json").read_text()) | {where: "someone/kernel"}
    with pytest.raises(ModelError, match="code from the Hub, which is not run"): load(place.folder(config__json=json.dumps(c)))


@pytest.mark.parametrize("name,content", [("adapter_model.bin", None), ("adapter_model.safetensors", None), ("adapter_model.safetensors", b""), ("adapter_model.safetensors", b"\xff" * 200)])
def test_adapters_are_read_as_safetensors_alone(place, name, content):
    lm, folder = load(place.model), place.path / "adapter"
    folder.mkdir()
    lm.start(None, 0)
    lm.save(folder)
    lm.use(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Booby(place.path)) if content is None else content)
    with pytest.raises(ModelError, match="adapter .* (holds pickled weights|cannot be read into this model)"): lm.use(folder)
    assert not pwned(place)


# --- run directories from strangers

def strangers_run(place, **permissions):
    "A finished run whose config.json names a model with code of its own, and allows it."
    run = small_run(place.path / "run")
    f = run.dir / "config.json"
    there = json.loads(f.read_text())
    there["config"] |= dict(model=str(trapped(place))) | permissions
    f.write_text(json.dumps(there))
    rewrite(run.dir / "manifest.jsonl")
    return run.dir.path


def test_looking_at_a_strangers_run_runs_nothing(place):
    import stasc.view
    from stasc.widgets import PromptInspector
    path = strangers_run(place, trust_remote_code=True, run_code=True)
    assert said("show", path).code == 0 and said("report", path).code == 0
    run = STaSC.open(path, callbacks=[])
    assert not run.cfg.trust_remote_code and not run.cfg.run_code
    run._repr_html_(), run[0]._repr_html_(), run.browse()._repr_html_(), run.trajectories, run.kept, run.metrics, run.timing(), run.curves()
    assert PromptInspector(run).tokenizer.chat_template
    assert not pwned(place)


@pytest.mark.parametrize("permission", ["trust_remote_code", "run_code"])
def test_going_on_with_a_strangers_run_asks_again(place, permission):
    path, flag = strangers_run(place, **{permission: True}), f"--{permission.replace('_', '-')}"
    data = place.file("new.jsonl", '{"question": "New?", "answer": "1"}\n')
    for argv in (["resume", path, "--iterations", 2], ["resume", path, "--iterations", 2, "--sample-batch", 1]):
        done = said(*argv)
        assert done.code == 2 and done.error is ConfigError and f"say so again with {flag}" in done.err, done.err
    if permission == "trust_remote_code":
        done = said("eval", path, "--data", data)
        assert done.code == 2 and f"say so again with {flag}" in done.err
        with pytest.raises(ConfigError, match=flag): STaSC.open(path).engine
    assert not pwned(place)
    no = said("resume", path, "--iterations", 2, flag.replace("--", "--no-"))                                        # said so: without
    assert no.error is ModelError and not pwned(place)
    if permission == "trust_remote_code":
        said("resume", path, "--iterations", 2, flag)                                                                  # said so: with
        assert pwned(place)


def test_a_permission_may_change_when_a_run_is_resumed(tmp_path):
    run = small_run(tmp_path / "run")
    again = STaSC(run.cfg.replace(trust_remote_code=True, run_code=True), run.dir.path, data=run.data, engine=run.engine, callbacks=[])
    assert again.n_done == run.n_done and default_out(again.cfg) == default_out(run.cfg)


def test_a_strangers_sweep_asks_again(place):
    from stasc.sweep import Sweep, sweep
    data = Data((Question("a", "One?", ("1",)), Question("b", "Two?", ("1",))), (Question("c", "Three?", ("1",)),))
    base = Config(iterations=1, n_init=1, n_corr=1, n_train=2, n_test=1, data="own", prompts="default", reward="exact_match")
    make = lambda cfg: ScriptedEngine(numbers)
    sweep(dict(seed=[0, 1]), place.path / "sweep", base, data=data, engine=make, shown=None)
    f = place.path / "sweep/sweep.json"
    there = json.loads(f.read_text())
    for c in there["trials"].values(): c["trust_remote_code"] = True
    f.write_text(json.dumps(there))
    assert not any(c.trust_remote_code for c in Sweep.open(place.path / "sweep").trials.values())
    with pytest.raises(ConfigError, match="cannot allow that.*--trust-remote-code"): sweep(None, place.path / "sweep", data=data, engine=make, shown=None)
    with pytest.raises(ConfigError, match="cannot allow that"): sweep(dict(seed=0), place.path / "sweep", base.replace(trust_remote_code=True), data=data, engine=make, shown=None)
    sweep(dict(seed=[0, 1]), place.path / "sweep", base.replace(trust_remote_code=True), data=data, engine=make, shown=None)


def test_a_link_is_not_written_through(place):
    run = small_run(place.path / "run")
    for name in ("log.jsonl", "manifest.jsonl", "config.json", "questions.json"):
        mine = place.file(f"mine/{name}", (run.dir / name).read_bytes())
        (run.dir / name).rename(place.path / "kept")
        (run.dir / name).symlink_to(mine)
        before = mine.read_bytes()
        with pytest.raises(StascError, match=f"{name} is a link"): STaSC.open(run.dir.path, engine=run.engine, callbacks=[], iterations=2).run()
        assert mine.read_bytes() == before
        (run.dir / name).unlink()
        (place.path / "kept").rename(run.dir / name)
    elsewhere = place.file("folder/mine.txt", "mine").parent
    (run.dir / "iter_00/.tmp-x").symlink_to(elsewhere)
    STaSC.open(run.dir.path, engine=run.engine, callbacks=[], iterations=2).run()
    assert (elsewhere / "mine.txt").exists()


# --- every change of a run directory gives a run or a sentence

@pytest.fixture(scope="module")
def original(tmp_path_factory): return small_run(tmp_path_factory.mktemp("original") / "run").dir.path


odd = st.one_of(st.none(), st.booleans(), st.integers(-10, 2**70), st.floats(), st.sampled_from(["", "x", "../../x", "<b>", "\ud800", "\0"]), st.just([]), st.just({}), st.just([1]), st.just({"a": 1}))


def places_in(value, at=()):
    "Every place in some JSON."
    yield at
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else (): yield from places_in(v, (*at, k))


def put(value, at, new):
    if not at: return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is DROP and len(at) == 1: del copy[at[0]]
    else: copy[at[0]] = put(copy[at[0]], at[1:], new)
    return copy


DROP = object()


def looked_at(path):
    "All that shows a run."
    import stasc.view
    run = STaSC.open(path, callbacks=[])
    repr(run), run._repr_html_(), run.ended, run.timing(), run.kept
    for n in range(run.n_done): repr(run[n]), run[n]._repr_html_()
    if run.n_done: run.table().to_string(), run.browse().save(path / "browse.html")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_the_json_gives_a_run_or_a_sentence(original, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(original, path)
    rewrite(path / "manifest.jsonl")
    f = path / data.draw(st.sampled_from(["config.json", "questions.json", "manifest.jsonl", "log.jsonl", "iter_00/metrics.json", "iter_01/metrics.json"]))
    lines = f.suffix == ".jsonl"
    value = [json.loads(line) for line in f.read_text().splitlines()] if lines else json.loads(f.read_text())
    at = data.draw(st.sampled_from(list(places_in(value))[1 if lines else 0:]))
    value = put(value, at, data.draw(st.one_of(odd, st.just(DROP)) if at else odd))
    f.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else json.dumps(value))
    try: looked_at(path)
    except StascError as e: assert "\n" not in str(e)
    finally: shutil.rmtree(path.parent)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_a_table_gives_a_run_or_a_sentence(original, tmp_path_factory, data):
    import pyarrow as pa
    place = Place(tmp_path_factory.mktemp("changed"), None, None, original)
    name = data.draw(st.sampled_from(sorted(p.relative_to(original).as_posix() for p in original.rglob("*.parquet"))))
    def change(t):
        if not t.num_columns: return t
        i = data.draw(st.integers(0, t.num_columns - 1))
        column, n = t.column_names[i], len(t)
        how = data.draw(st.sampled_from(["drop", "null", "text", "binary", "lists", "rows", "twice", "nan", "other ids"]))
        if how == "drop": return t.drop_columns([column])
        if how == "rows": return pa.concat_tables([t, t])
        if how == "twice": return t.append_column(column, t[column])
        if how == "nan" and pa.types.is_floating(t.schema.field(i).type): return t.set_column(i, column, pa.array([float("nan")] * n))
        if how == "other ids" and "question_id" in t.column_names: return t.set_column(t.column_names.index("question_id"), "question_id", pa.array([f"z{k}" for k in range(n)]))
        new = dict(null=pa.nulls(n), text=pa.array(["x"] * n), binary=pa.array([b"\xff"] * n), lists=pa.array([[1]] * n)).get(how)
        return t if new is None else t.set_column(i, column, new)
    try: looked_at(place.table(name, change))
    except StascError as e: assert "\n" not in str(e)
    finally: shutil.rmtree(place.path)


# --- names that are paths

def test_ids_of_questions_name_no_file(tmp_path):
    place, (a, b) = tmp_path / "there", (small_run(tmp_path / "there" / n, ids) for n, ids in (("hostile", NAMES), ("plain", [f"q{i}" for i in range(len(NAMES))])))
    assert files(a.dir.path) == files(b.dir.path) and {p.name for p in place.iterdir()} == {"hostile", "plain"} and [p.name for p in tmp_path.iterdir()] == ["there"]
    assert [q.id for q in STaSC.open(a.dir.path).data.train] == NAMES[:-1] and set(a.trajectories.question_id) == set(NAMES)
    import stasc.view
    before = files(tmp_path)
    assert a.browse().save(a.dir / "browse.html") is None and files(tmp_path) == before | {"there/hostile/browse.html"}


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.sampled_from(NAMES), st.lists(st.sampled_from(["..", "/", "\\", ".", "a", "\0", ":", "🙂", "京"])).map("".join)))
def test_default_place_lies_in_runs(model):
    out = default_out(Config(model=model))
    assert out.parent == Path("runs") and len(out.name.encode("utf-8", "surrogatepass")) < 255 and not set(out.name) & set('/\\:*?"<>|\0') and out.name.isprintable()
    assert out.name.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL"} and out.name[0] not in ".-~" and out.name[-1] not in ". "


@pytest.mark.parametrize("name", NAMES)
def test_names_of_presets_prompt_sets_and_models_find_no_other_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for option in ("data", "prompts", "model", "task", "reward", "filter", "variant"):
        done = said("run", "--config", (tmp_path / "c.json").write_text(json.dumps({"n_train": 2, "n_test": 1, "iterations": 1, "n_init": 1, "n_corr": 1, "max_new_tokens": 2, option: name})) and tmp_path / "c.json", "--out", tmp_path / "run")
        assert done.code == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err, (option, done)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


# --- the modules themselves

MODULES = sorted(p for p in (root / "stasc").glob("*.py") if p.name != "_modidx.py")
ALLOWED = {("runner.py", "exec"), ("runner.py", "compile"),                    # runs programs, in a child with limits, where the user allows it
           ("runner.py", "subprocess.Popen"), ("runner.py", "subprocess.run"), # that child
           ("sample_vllm.py", "subprocess.Popen"),                             # vLLM's own process
           ("distributed.py", "subprocess.Popen")}                             # accelerate launch
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execl", "os.spawnl", "os.startfile", "subprocess.run", "subprocess.Popen", "subprocess.call",
             "subprocess.check_call", "subprocess.check_output", "subprocess.getoutput", "torch.load", "torch.jit.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "np.load", "numpy.load",
             "pd.read_pickle", "pandas.read_pickle", "importlib.import_module", "runpy.run_path", "runpy.run_module", "joblib.load", "pd.eval", "shelve.open", "webbrowser.open"}


@pytest.mark.parametrize("path", MODULES, ids=[p.name for p in MODULES])
def test_no_module_runs_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {a.name.split(".")[0] for a in getattr(node, "names", []) if isinstance(a, ast.alias)} | {str(getattr(node, "module", "")).split(".")[0]}
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "pty"}, (path.name, node.lineno)
        if not isinstance(node, ast.Call): continue
        called, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        assert called not in FORBIDDEN or (path.name, called) in ALLOWED, (path.name, node.lineno, called)
        assert "shell" not in given and not ast.unparse(given.get("use_safetensors", ast.Constant(True))) == "False", (path.name, node.lineno)
        assert not called.startswith("subprocess.") or isinstance(node.args[0], ast.List), (path.name, node.lineno, "a command is a list of words")
        if called.endswith("from_pretrained") and called.startswith("AutoModel"): assert ast.unparse(given["use_safetensors"]) == "True", (path.name, node.lineno)
        trust = ast.unparse(given.get("trust_remote_code", ast.Constant(False)))
        assert trust in ("False", "cfg.trust_remote_code", "self.lm.cfg.trust_remote_code", "trust_remote_code"), (path.name, node.lineno, trust)


def test_exceptions_are_still_needed():
    called = {(p.name, ast.unparse(n.func)) for p in MODULES for n in ast.walk(ast.parse(p.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)}
    assert ALLOWED <= called


# --- what a model writes is never markup

class Skeleton(HTMLParser):
    "The tags of a page, without what stands between them."
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs): self.tags.append((tag, *((k, None if k in ("content", "title") else v) for k, v in attrs)))
    def handle_endtag(self, tag): self.tags.append(f"/{tag}")
    def handle_data(self, data): self.texts.append(data)
    def handle_comment(self, data): self.tags.append("comment")
    def handle_decl(self, decl): self.tags.append(decl)
    def handle_pi(self, data): self.tags.append("pi")


def structure(page): return [t for t in Skeleton(page).tags if t not in (("ins",), "/ins", ("del",), "/del")]


texts = st.one_of(st.text(), st.lists(st.sampled_from(["<script>", "</script>", "<img src=x onerror=alert(1)>", "'", '"', "&", "&lt;", "&#60;", "-->", "<!--", "]]>", "</iframe>", "</details>", "\\n", "`", "${x}", "\u202e", "\ud800", "\0", "\n", " ",
                                                       "Final Answer:", "<?php", "<!doctype", "javascript:", "</title>", "</style>", "a"]), max_size=8).map("".join))


def page_of(question, id, reference, context, first, second):
    import pandas as pd

    from stasc.view import html_page, page_data
    id, first, second = map(whole_characters, (id, first, second))       # as they are stored
    row = dict(iteration=0, split="train", question_id=id, init_index=0, corr_index=0, init_text=first, corr_text=second, init_answer=first[:50], corr_answer=second[:50], init_reward=0.0, corr_reward=0.0,
               init_seed=1, corr_seed=2, init_n_tokens=3, corr_n_tokens=3, init_finish_reason="stop", corr_finish_reason="length", kept=False, why="as wrong as the initial answer", outcome="unchanged")
    d = page_data(pd.DataFrame([row]), [Question(id, question, (reference,), context)])
    d["questions"][0]["iterations"][0]["initials"][0]["corrections"][0].update(pattern="p", tags=[])
    return html_page(question, d)


@settings(max_examples=60, deadline=None)
@given(*[texts] * 6)
def test_any_text_leaves_the_tags_of_the_page_as_they_are(question, id, reference, context, first, second):
    page = page_of(question, id, reference, context or "c", first, second)
    assert structure(page) == structure(page_of("q", "i", "r", "c", "one", "two"))
    shown = "".join(Skeleton(page).texts)
    for text in (question, reference, whole_characters(first)): assert len(text) > 300 or visible(text) in shown


@settings(max_examples=60, deadline=None)
@given(texts, texts)
def test_differences_are_the_text_with_marks(before, after):
    from stasc.view import diff_html
    page = diff_html(before, after)
    assert {t if isinstance(t, str) else t[0] for t in Skeleton(page).tags} <= {"ins", "/ins", "del", "/del"}
    assert "".join(Skeleton(re.sub("<del>.*?</del>", "", page, flags=re.S)).texts) == after


def test_differences_of_long_texts_take_few_steps(monkeypatch):
    "Two thousand words that differ are 2,000 equal spaces: compared one by one they would take minutes."
    import difflib

    from stasc.view import diff_html
    steps, real = [], difflib.SequenceMatcher.find_longest_match
    def counted(self, *a): steps.append(sum(len(self.b2j.get(w, ())) for w in self.a[a[0]:a[1]])); return real(self, *a)
    monkeypatch.setattr(difflib.SequenceMatcher, "find_longest_match", counted)
    for a, b in (([f"a{i}" for i in range(2000)], [f"b{i}" for i in range(2000)]), (["x", "y"] * 1000, ["y", "x", "x"] * 700), (["same"] * 2000, ["same"] * 2000), ([f"w{i % 50}" for i in range(900)], [f"w{i % 47}" for i in range(900)])):
        diff_html(" ".join(a), " ".join(b))
    assert sum(steps) < 12_000_000


@settings(max_examples=60, deadline=None)
@given(texts, texts)
def test_iterations_runs_and_data_show_text_as_text(text, other):
    metrics = dict(iteration=1, n_kept=1, **{s: dict(n=1, acc_t1=0.0, acc_t2=1.0, delta=1.0, i_to_c=1.0, c_to_i=0.0) for s in ("train", "test")})
    of = lambda a, b: Iteration(1, metrics, dict(question=a, init_text=b, corr_text=a, reference=b), None)._repr_html_()
    assert structure(of(text, other)) == structure(of("a", "b"))
    data = lambda a, b: Data((Question(a, a, (b,)),), (Question(b + "x", b, (a,), a),), (b,))._repr_html_()
    assert structure(data(text, other)) == structure(data("a", "b"))


def test_a_hostile_name_is_shown_not_obeyed(tmp_path, monkeypatch):
    "In the terminal too: escape sequences from a stranger's configuration have no effect."
    run = small_run(tmp_path / "run", model="x\x1b]0;title\x07\x1b[2J<b>\nstasc: all is well")
    done = said("show", run.dir.path)
    assert done.code == 0 and "\x1b" not in done.out and "\x07" not in done.out and "␛[2J" in done.out
    assert "<b>" not in STaSC.open(run.dir.path)._repr_html_().split("</p>")[0]


def test_a_terminal_without_the_letters_is_no_error(tmp_path):
    path = small_run(tmp_path / "r\u00e9sum\u00e9").dir.path
    code = "import sys; from stasc.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "show", path], capture_output=True, text=True, env=os.environ | dict(PYTHONIOENCODING="ascii", PYTHONPATH=str(root)), cwd=root)
    assert done.returncode == 0 and "test r(Y1)" in done.stdout and "sum" in done.stdout, done.stderr
