"Sharing: card, adapter folder, the Hub's API in small, rows that TRL trains on, loss curves elsewhere."
import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
import warnings
from importlib import metadata
from importlib.resources import files
from itertools import islice
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl
from markdown_it import MarkdownIt

import stasc.share
import stasc.train
from stasc.core import Config, ConfigError, DataError, Question, StascError
from stasc.data import Data
from stasc.loop import STaSC
from stasc.model import embedded_path
from stasc.share import (ShareError, choose, dpo_rows, figures, load_shared, model_card, push_to_hub, rows, save_adapter, seed_figures,
                         sft_rows, write_rows)
from stasc.train import Engine, ScriptedEngine, reports

warnings.filterwarnings("ignore", category=FutureWarning)
small = dict(device="cpu", train_batch=4, n_train=20, n_test=6, n_init=2, n_corr=4, part_size=10, max_new_tokens=48, sample_batch=256)


def teach(folder, engine, **changes):
    cfg = Config.demo(**(small | dict(iterations=2) | changes))
    run = STaSC(cfg, folder, engine=engine, callbacks=[]).run()
    engine.use(None)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory, embedded):
    return teach(tmp_path_factory.mktemp("runs") / "additions", embedded)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory, embedded):
    return teach(tmp_path_factory.mktemp("runs") / "fixed", embedded, variant="FIE", iterations=1, n_train=12, n_test=4)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    engine = Engine(Config.demo(finetune="full", device="cpu"))
    return teach(tmp_path_factory.mktemp("runs") / "full", engine, finetune="full", variant="EIF", iterations=1, n_train=12, n_test=4)


def numbers(prompt, rng, skill):
    return f"Final Answer: {7 if rng.random() < 0.3 + 0.2 * skill else rng.randrange(7)}"


def scripted(folder, text="{} number {}?", **options):
    def ask(n, s): return tuple(Question(f"{s}{i}", text.format(s, i), ("7",)) for i in range(n))
    cfg = Config(**dict(iterations=2, n_init=2, n_corr=3, n_train=6, n_test=4, part_size=3, data="own") | options)
    return STaSC(cfg, folder, data=Data(ask(6, "train"), ask(4, "test")), engine=ScriptedEngine(numbers), callbacks=[]).run()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return scripted(tmp_path_factory.mktemp("runs") / "plain")


# --- which model

def test_choice_never_looks_at_the_held_out_figures(plain, tmp_path):
    shutil.copytree(plain.dir.path, tmp_path / "run")
    run = STaSC.open(tmp_path / "run", engine=plain.engine, callbacks=[])
    assert choose(run)[0] == 2 and choose(run, -2)[0] == 1 and choose(run, 1)[0] == 1
    train = run.metrics.train_acc_t2[1:]
    n, why = choose(run, "best")
    assert n == train.idxmax() and "training questions" in why and f"{train.max():.3f}" in why
    for f in run.dir.path.glob("iter_*/metrics.json"):
        m = json.loads(f.read_text())
        del m["check"]
        m["test"]["acc_t2"] = 1 - m["test"]["acc_t2"]
        f.write_text(json.dumps(m))
    assert choose(run, "best") == (n, why)
    n, why = choose(run, "best", run.data.test[:2])
    assert "2 of these are held-out questions" in why
    other = [Question("d", "Another?", ("7",))]
    assert "played no part" in choose(run, "best", other)[1]


@pytest.mark.parametrize("iteration", [0, 3, -3, True, 1.0, "last", [1]])
def test_an_iteration_that_is_not_there_is_refused(plain, iteration):
    with pytest.raises(ShareError, match="iteration"): choose(plain, iteration)


def test_nothing_to_share_yet(plain, tmp_path):
    run = STaSC(Config(data="own"), tmp_path / "run", data=Data([Question("1", "a", ("b",))], [Question("2", "c", ("d",))]), engine=ScriptedEngine(numbers))
    for f in (choose, model_card, sft_rows):
        with pytest.raises(ShareError, match="no fine-tuned model yet"): f(run)
    with pytest.raises(ShareError, match="adapter_config.json"): save_adapter(plain, tmp_path / "x")
    shutil.copytree(plain.dir.path, tmp_path / "other")
    other = STaSC.open(tmp_path / "other", callbacks=[])
    (other.dir / "star.json").write_text("{}")
    with pytest.raises(ShareError, match="STaR"): model_card(other)


# --- the card

def body_of(card): return card.split("\n---\n", 1)[1]


def html_of(card): return MarkdownIt("commonmark", {"html": True}).enable("table").render(body_of(card))


def test_card_is_what_the_hub_reads(run):
    text = model_card(run, license="apache-2.0")
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", None, None) and data.to_dict()["library_name"] == "peft"
    values = {r.metric_name: (r.metric_value, r.metric_args["interval_95"]) for r in data.eval_results}
    f = figures(run, 2).loc[2]
    assert values == {f"Accuracy@t{i}, {w}": (round(f[f"acc_t{i}"], 4), [round(f[f"acc_t{i}_lo"], 4), round(f[f"acc_t{i}_hi"], 4)])
                      for i, w in ((1, "first answers"), (2, "corrections"))}
    assert f.acc_t2 == run.metrics.test_acc_t2[2] and f.c_to_i == run.metrics.test_c_to_i[2]
    assert "license" not in model_card(run).split("---")[1]
    for said in ("Evolving Initialization", "improving", "exact\\_match", "6 from arithmetic", "seed 0", "Noise in pre-training", "learning_rate", "the last one", "torch "): assert said in text


def test_card_of_a_hub_data_set_and_model(tmp_path):
    run = scripted(tmp_path / "run", data="nq_open:train[:6]", model="Qwen/Qwen2.5-1.5B-Instruct")
    data = ModelCard(model_card(run)).data
    assert data.base_model == "Qwen/Qwen2.5-1.5B-Instruct" and data.datasets == ["google-research-datasets/nq_open"]
    assert data.eval_results[0].dataset_revision == "5dd9790a83002ad084ddeb7c420dc716852c6f28"
    assert "test number 0?" in model_card(run)


HOSTILE = "<script>alert(1)</script>|`*_[x](javascript:1)\n---\nlicense: mit\n```\n<img src=x onerror=alert(1)>\u202e{}{}"


def test_hostile_text_stays_text(tmp_path):
    prompts = dict(name=HOSTILE, initial=dict(system=HOSTILE, user="{question}\n````\n<script>"), correction=dict(user="{question} {initial_answer}\n---\n</code><script>"))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(prompts))
    run = scripted(tmp_path / "run", HOSTILE, data=HOSTILE.replace("/", "") + ".jsonl", prompts=str(tmp_path / "own.yaml"), reward="exact_match", model="../<script>\n---\nx: y")
    text = model_card(run, license="x\n---\n<script>", base_model=None)
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags", "license", "model-index"}
    assert data["license"] == "x --- <script>" and "\n" not in data["model-index"][0]["name"]
    shown = html_of(text)
    assert "<script" not in shown and "<img" not in shown and "javascript:1\"" not in shown and "\u202e" not in text
    assert shown.count("<h2>") == 7 and shown.count("<table>") == 3


def test_names_of_local_files_lose_their_path(tmp_path):
    run = scripted(tmp_path / "run", data=str(tmp_path / "secret/own.jsonl"), model=str(tmp_path / "models/qwen"), prompts=shutil.copy(files("stasc") / "prompts/default.yaml", tmp_path / "p.yaml"), reward="exact_match")
    text = model_card(run)
    assert str(tmp_path) not in text and "own.jsonl" in text and "qwen" in text and "number 0?" not in text
    held = scripted(tmp_path / "held", data="arithmetic", test_data=str(tmp_path / "secret/held.jsonl"), iterations=1)
    text = model_card(held)
    assert "held.jsonl, a local file" in text and "number 0?" not in text and str(tmp_path) not in text


def test_card_over_seeds(tmp_path):
    runs = [scripted(tmp_path / f"run{s}", seed=s) for s in range(3)]
    t = seed_figures(runs, 2)
    x = pd.Series([r.metrics.test_acc_t2[2] for r in runs])
    half = 4.302652729911275 * x.std() / 3**.5
    assert math.isclose(t.acc_t2[2], x.mean()) and math.isclose(t.acc_t2_hi[2], x.mean() + half)
    text = model_card(runs)
    assert "mean of seeds 0, 1, 2" in text and "| M_2, seed 0 |" in text and "over trainings" in text
    with pytest.raises(ShareError, match="more than the seed"): model_card([runs[0], scripted(tmp_path / "x", seed=9, n_corr=2)])
    with pytest.raises(DataError, match="count twice"): model_card([runs[0], runs[0]])


def test_facts_are_clustered_by_couple(tmp_path):
    from stasc.facts import fact_questions
    data = Data(fact_questions("train", 12), fact_questions("test", 48))
    run = STaSC(Config(data="facts", model="embedded-facts", iterations=1, n_init=2, n_corr=3, n_test_init=2), tmp_path / "run", data=data, engine=ScriptedEngine(lambda p, rng, s: f"Final Answer: {rng.choice(['baker', 'Belan', data.train[0].references[0]])}"), callbacks=[], filter="all").run()
    assert stasc.share._clustered(run) and "couples" in model_card(run)
    assert math.isclose(figures(run, 1).acc_t2[1], run.metrics.test_acc_t2[1])


# --- the folder

@pytest.fixture(scope="module", params=["run", "fixed", "full"])
def shared(request, tmp_path_factory):
    run = request.getfixturevalue(request.param)
    return run, save_adapter(run, tmp_path_factory.mktemp("shared") / "model", license="mit")


def test_a_shared_model_gives_the_same_texts(shared):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    run, folder = shared
    n = run.n_done - 1
    engine, prompter = load_shared(folder, device="cpu")
    prompts = [run.prompter.initial(q) for q in run.data.test[:3]]
    assert [prompter.initial(q) for q in run.data.test[:3]] == prompts and prompter.set == run.prompts
    run.engine.use(run._model_folder(n))
    seeds = [[i] for i in range(3)]
    assert engine.sample(prompts, 1, run.cfg.params, seeds) == run.engine.sample(prompts, 1, run.cfg.params, seeds)
    greedy = [s[0].text for s in run.engine.sample(prompts, 1, run.cfg.replace(temperature=0).params, seeds)]
    run.engine.use(None)
    import torch
    plain = AutoModelForCausalLM.from_pretrained(folder if run._kind == "model" else embedded_path(), dtype=torch.float32)
    if run._kind == "adapter": plain = PeftModel.from_pretrained(plain, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for ids, text in zip(prompts, greedy):
        ids = torch.tensor([ids])
        out = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48)
        assert tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True) == text


def test_only_listed_files_and_no_path_of_this_machine(shared, tmp_path_factory):
    run, folder = shared
    names = {f.name for f in folder.iterdir()}
    assert {"README.md", "prompts.yaml", "stasc.json", "tokenizer.json", "tokenizer_config.json"} <= names
    weights = {"adapter_config.json", "adapter_model.safetensors"} if run._kind == "adapter" else {"config.json", "generation_config.json", "model.safetensors"}
    assert weights <= names and all(map(stasc.share._shared_file, names))
    base = str(tmp_path_factory.getbasetemp())
    for f in folder.iterdir():
        if f.suffix != ".safetensors":
            text = f.read_text(encoding="utf-8")
            assert base not in text and str(embedded_path().parent) not in text and os.path.expanduser("~") + "/" not in text, f.name


@pytest.mark.parametrize("repo_id", [None, "ann/additions"])
def test_code_of_the_card_runs(shared, repo_id, monkeypatch):
    import huggingface_hub
    run, folder = shared
    text = (folder / "README.md").read_text(encoding="utf-8") if repo_id is None else model_card(run, repo_id=repo_id)
    first, second = [b.split("\n```", 1)[0] for b in text.split("```python\n")[1:]]
    monkeypatch.chdir(folder if repo_id is None else "/")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", {repo_id: str(folder)}.get)
    space = {}
    with contextlib.redirect_stdout(None): exec(first, space)
    assert "Final Answer" in space["first"] + space["second"]
    exec(second, space)
    assert space["second"].text


def test_a_folder_with_other_files_is_never_written_over(run, tmp_path):
    def digest(d): return {f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()}
    own, base, here = tmp_path / "own", tmp_path / "base", tmp_path / "file"
    own.mkdir(); (own / "diary.txt").write_text("x"); here.write_text("x")
    shutil.copytree(embedded_path(), base)                          # a model of the user's: names that are on the list, but not shared by us
    for d in (own, base, here, run.dir.path, run.dir / "iter_01/adapter"):
        before = digest(d)
        with pytest.raises(ShareError, match="choose a new or an empty folder"): save_adapter(run, d)
        assert digest(d) == before
    made = save_adapter(run, tmp_path / "made", 1)
    assert save_adapter(run, made, 2) == made and json.loads((made / "stasc.json").read_text())["iteration"] == 2


def test_whole_or_not_at_all(run, tmp_path, monkeypatch):
    def full_disk(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(stasc.share.shutil, "copyfile", full_disk)
    with pytest.raises(StascError, match="No space left"): save_adapter(run, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_pruned_model_is_not_shared(full, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(full.dir.path, copy)
    with (copy / "iter_01/model/config.json").open("a") as f: f.write(" ")
    with pytest.raises(StascError, match="damaged"): save_adapter(STaSC.open(copy, callbacks=[]), tmp_path / "x")
    shutil.rmtree(copy / "iter_01/model")
    with pytest.raises(ShareError, match="was not kept"): save_adapter(STaSC.open(copy, callbacks=[]), tmp_path / "x")


def test_a_shared_folder_cannot_ask_for_code_to_be_run(shared, tmp_path):
    _, folder = shared
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    d = json.loads((copy / "stasc.json").read_text())
    assert not d["config"]["trust_remote_code"]
    d["config"] |= dict(trust_remote_code=True, run_code=True, report_to="wandb")
    (copy / "stasc.json").write_text(json.dumps(d))
    cfg = load_shared(copy)[1].cfg
    assert not cfg.trust_remote_code and not cfg.run_code and cfg.report_to == "none"
    (copy / "stasc.json").write_text("[]")
    with pytest.raises(ShareError, match="save_adapter"): load_shared(copy)
    with pytest.raises(StascError, match="save_adapter"): load_shared(tmp_path)


# --- the Hub

class Hub:
    "HfApi in small, in a folder: each call is checked against the signature of the real one."
    def __init__(self, folder, public=(), error=None): self.folder, self.private, self.error, self.calls = folder, dict.fromkeys(public, False), error, []

    def __getattr__(self, name):
        def call(*args, **kw):
            bound = inspect.signature(getattr(HfApi, name)).bind(self, *args, **kw).arguments
            self.calls.append(name)
            if self.error: raise self.error
            return getattr(Hub, f"on_{name}")(self, SimpleNamespace(**bound))
        return call

    def on_create_repo(self, a):
        assert a.exist_ok and a.repo_type == "model"
        self.private.setdefault(a.repo_id, a.private)
        return RepoUrl(f"https://huggingface.co/{a.repo_id}")

    def on_repo_info(self, a): return SimpleNamespace(private=self.private[a.repo_id])

    def on_upload_folder(self, a):
        from huggingface_hub.utils import filter_repo_objects
        for name in filter_repo_objects([f.relative_to(a.folder_path).as_posix() for f in a.folder_path.rglob("*") if f.is_file()], allow_patterns=a.allow_patterns):
            to = self.folder / a.repo_id / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(a.folder_path / name, to)


def test_what_is_sent(run, tmp_path):
    hub = Hub(tmp_path)
    assert push_to_hub(run, "ann/additions", api=hub) == "https://huggingface.co/ann/additions"
    assert hub.calls == ["create_repo", "repo_info", "upload_folder"] and hub.private == {"ann/additions": True}
    there, local = tmp_path / "ann/additions", save_adapter(run, tmp_path / "local", repo_id="ann/additions")
    assert {f.name: f.read_bytes() for f in there.iterdir()} == {f.name: f.read_bytes() for f in local.iterdir()}
    assert 'snapshot_download("ann/additions")' in (there / "README.md").read_text()
    load_shared(there)


def test_a_public_repository_is_not_written_by_accident(run, tmp_path):
    hub = Hub(tmp_path, public=["ann/additions"])
    with pytest.raises(ShareError, match="private=False"): push_to_hub(run, "ann/additions", api=hub)
    assert not list(tmp_path.iterdir())
    push_to_hub(run, "ann/additions", private=False, api=hub)
    assert (tmp_path / "ann/additions/README.md").exists()


@pytest.mark.parametrize("repo_id", ["additions", "a/b/c", "ann/", "/x", "ann/a b", "ann/..", "ann/x.git", "", None, 3, "ann/" + "x" * 100])
def test_a_malformed_name_is_refused_first(run, repo_id, tmp_path):
    hub = Hub(tmp_path)
    with pytest.raises(ShareError, match="expected USER/NAME"): push_to_hub(run, repo_id, api=hub)
    assert not hub.calls


def http_errors():
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    Base = HfHubHTTPError.__bases__[0]
    yield LocalTokenNotFoundError("no token"), "hf auth login"
    for code, said in ((401, "hf auth login"), (403, "no right to write"), (500, "went wrong")):
        e = HfHubHTTPError.__new__(HfHubHTTPError)
        Exception.__init__(e, "It went wrong\nthere"); e.response = SimpleNamespace(status_code=code)
        yield e, said
    yield Base("connection refused"), "connection refused"
    yield ConnectionError("no route to host"), "without a network"


@pytest.mark.parametrize("error, said", list(http_errors()))
def test_what_the_hub_refuses_is_one_sentence(run, tmp_path, error, said):
    with pytest.raises(ShareError, match=said) as e: push_to_hub(run, "ann/additions", api=Hub(tmp_path, error=error))
    assert "\n" not in str(e.value)


# --- rows

def kept_examples(run):
    kept = [t[t.kept] for n in range(run.n_done - 1) for t in run._by_part(n, "train", run.cfg.pairing, token_ids=True)]
    return list(dict.fromkeys((e.prompt_ids, e.completion_ids) for t in kept for e in run._examples(t)))


def quiet(trainer):
    from transformers import PrinterCallback
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    assert math.isfinite(loss) and loss > 0


def base():
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(embedded_path())


def trl():
    "Skip where TRL stands beside a release of `datasets` that it does not go with, as among the oldest that we allow."
    pytest.importorskip("trl")
    from packaging.requirements import Requirement
    for r in map(Requirement, metadata.requires("trl")):
        if r.name == "datasets" and not r.specifier.contains(there := metadata.version("datasets")): pytest.skip(f"trl asks for {r}, here is {there}")


PLAIN = dict(max_steps=2, per_device_train_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, save_strategy="no")


@pytest.mark.parametrize("form", ["text", "tokens", "messages"])
def test_trl_learns_exactly_our_completions(run, tmp_path, form):
    trl()
    from trl import SFTConfig, SFTTrainer
    data = sft_rows(run, cache_dir=str(tmp_path / "cache"), **{form: True} if form != "text" else {})
    ours = kept_examples(run)
    assert len(data) == len(ours) > 5
    tokenizer = run.engine.tokenizer
    stop = tokenizer.eos_token_id
    trainer = SFTTrainer(base(), SFTConfig(str(tmp_path), **PLAIN), train_dataset=data, processing_class=tokenizer)
    learned = []
    for r in trainer.train_dataset:
        n = sum(x == -100 for x in r["labels"])
        assert r["labels"] == [-100] * n + r["input_ids"][n:]
        learned.append((tuple(r["input_ids"][:n]), tuple(r["input_ids"][n:])))
    if form != "tokens": ours = [(p, c if c[-1] == stop else (*c, stop)) for p, c in ours]    # TRL ends a text that was cut off
    if form == "messages":                                          # the template may end a message with a line break
        learned = [(p, c[:c.index(stop) + 1]) for p, c in learned]
    assert learned == ours
    if form != "messages": quiet(trainer)


def test_dpo_pairs_are_those_of_one_prompt(run, tmp_path):
    trl()
    from trl import DPOConfig, DPOTrainer
    expected, sft = [], {r["prompt"] for r in rows(run, "sft")}
    for n in (1, 2):
        t = pd.concat(list(run._by_part(n - 1, "train")))
        for (q, j), g in t.groupby(["question_id", "init_index"], sort=False):
            for a in g.itertuples():
                for b in g.itertuples():
                    if a.kept and not b.kept and a.corr_reward > b.corr_reward: expected.append((q, n, a.corr_text, b.corr_text))
    data = dpo_rows(run, cache_dir=str(tmp_path / "cache"))
    got = [(r["question_id"], r["iteration"], r["chosen"], r["rejected"]) for r in data]
    assert len(got) > 3 and set(got) <= set(expected) and {(q, a, b) for q, _, a, b in got} == {(q, a, b) for q, _, a, b in expected}
    assert len({(r["prompt"], r["chosen"], r["rejected"]) for r in data}) == len(data) and {r["prompt"] for r in data} <= sft
    trainer = DPOTrainer(base(), None, DPOConfig(str(tmp_path), **PLAIN), train_dataset=data, processing_class=run.engine.tokenizer)
    quiet(trainer)
    talk = next(iter(rows(run, "dpo", messages=True)))
    assert talk["chosen"] == [dict(role="assistant", content=got[0][2])] and talk["prompt"][-1]["role"] == "user"


@pytest.mark.parametrize("options", [dict(variant="ENE"), dict(pairing="crossed"), dict(filter="stable"), dict(train_prompt="no_examples"), dict(variant="FIF")])
def test_rows_are_what_was_trained_on(tmp_path, options):
    run = scripted(tmp_path / "run", **options)
    ours = kept_examples(run)
    tokenizer = run.engine.tokenizer
    made = list(rows(run, "sft", tokens=True))
    assert [(r["input_ids"], r["labels"]) for r in made] == [([*p, *c], [-100] * len(p) + [*c]) for p, c in ours]
    text = list(rows(run, "sft"))
    assert text == list(rows(STaSC.open(run.dir.path, engine=run.engine, callbacks=[]), "sft"))     # the same each time
    assert len({(r["prompt"], r["completion"]) for r in text}) == len(text)
    assert {tuple(tokenizer(r["prompt"])["input_ids"]) for r in text} == {p for p, _ in ours}
    assert [r for r in text if r["iteration"] == 1] == list(rows(run, "sft", 1)) == list(rows(run, "sft", [1]))
    reward = {(r["prompt"], r["completion"]) for r in text}
    for r in rows(run, "dpo"): assert (r["prompt"], r["chosen"]) in reward and r["chosen"] != r["rejected"]


def test_rows_are_made_part_by_part(tmp_path):
    run, read = scripted(tmp_path / "run", filter="all", n_init=1, n_corr=1), []
    table = run.dir.table
    run.dir.table = lambda n, phase, part=None, *a, **k: read.append((n, phase, part)) or table(n, phase, part, *a, **k)
    list(islice(rows(run, "sft"), 2))
    assert {p for _, _, p in read} == {0}
    list(rows(run, "sft"))
    assert all(p is not None for _, _, p in read)


def test_rows_in_a_file(run, tmp_path):
    for kind in ("sft", "dpo"):
        n = write_rows(run, tmp_path / f"{kind}.jsonl", kind)
        assert [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()] == list(rows(run, kind)) and n > 0
    with pytest.raises(ShareError, match="sft"): write_rows(run, tmp_path / "x", "ppo")
    with pytest.raises(ShareError, match="tokens"): rows(run, "dpo", tokens=True)
    kept_all = scripted(tmp_path / "all", filter="all")
    with pytest.raises(ShareError, match="no kept and dropped"): write_rows(kept_all, tmp_path / "y", "dpo")
    with pytest.raises(ShareError, match="no kept and dropped"): dpo_rows(kept_all, cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "y").exists()


# --- report_to

def test_the_run_is_the_same_watched_or_not(run, tmp_path, embedded):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    env = dict(os.environ)
    watched = teach(tmp_path / "watched", embedded, report_to="tensorboard")
    assert dict(os.environ) == env
    def files(r): return {p.relative_to(r.dir.path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in r.dir.path.rglob("*")
                          if p.is_file() and p.name not in ("config.json", "log.jsonl", ".lock")}
    made, plain = files(watched), files(run)
    assert {k: v for k, v in made.items() if not k.startswith("logs/")} == plain
    assert not any(n.startswith("logs") for n in watched.dir.manifest)
    for n in (1, 2):
        events = EventAccumulator(str(watched.dir / f"logs/iter_{n:02d}")).Reload()
        losses = [e.value for e in events.Scalars("train/loss")]
        log = next(r for r in map(json.loads, (watched.dir / "log.jsonl").read_text().splitlines()) if r.get("steps") and r["iteration"] == n)
        assert len(losses) == log["steps"] and math.isclose(losses[0], log["first_loss"], rel_tol=1e-5) and math.isclose(losses[-1], log["last_loss"], rel_tol=1e-5)
        args = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
        assert args["run_name"] == f"watched/iter_{n:02d}" and args["project"] == "stasc"
    assert len(list(watched.dir.path.glob("logs/*/*"))) == 2
    assert STaSC.open(watched.dir.path, report_to="none", callbacks=[]).n_done == 3


def test_where_nobody_can_be_told_nothing_is_sampled(tmp_path, monkeypatch):
    import stasc.model
    import transformers.integrations.integration_utils as integrations
    monkeypatch.setattr(stasc.model, "LM", None)                    # a model is not even looked for
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"): Engine(Config(report_to="none,tensorbord"))
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["wandb"])
    run = STaSC(Config.demo(report_to="wandb, tensorboard"), tmp_path / "run", callbacks=[])
    with pytest.raises(ConfigError, match=r"pip install 'stasc\[report\]'"): run.run()
    assert not run.dir.manifest and reports(Config(report_to=" wandb")) == ["wandb"] and reports(Config(report_to="none")) == reports(Config(report_to="")) == []
    with pytest.raises(ConfigError, match="pip install mlflow"): reports(Config(report_to="mlflow"))


def test_report_to_may_differ_when_resumed():
    assert Config.__dataclass_fields__["report_to"].metadata["free"]


# --- the command

def test_command(run, command, tmp_path):
    done = command("share", run.dir.path)
    assert done.code == 0 and done.out == model_card(run) + "\n"
    done = command("share", run.dir.path, "--to", tmp_path / "model", "--iteration", "best", "--license", "mit")
    assert done.code == 0 and "license: mit" in (tmp_path / "model/README.md").read_text()
    done = command("rows", run.dir.path, "--kind", "dpo", "--out", tmp_path / "dpo.jsonl", "--iteration", 1)
    assert done.code == 0 and len((tmp_path / "dpo.jsonl").read_text().splitlines()) == len(list(rows(run, "dpo", 1)))


@pytest.mark.parametrize("words, said", [
    (["share", "{run}", "--iteration", "first"], "a number, or best"), (["share", "{run}", "--iteration", "7"], "M_1 to M_2"), (["share", "{run}", "--to", "{run}"], "empty folder"),
    (["share", "{run}", "--hub", "additions"], "USER/NAME"), (["share", "{run}", "--hub", "ann/additions"], "HF_HUB_OFFLINE"), (["share", "{run}", "--public"], "--hub"),
    (["share", "{tmp}"], "not a run directory"), (["share", "{run}", "{run}"], "count twice"), (["rows", "{run}", "--out", "{tmp}/x", "--iteration", "0"], "M_1 to M_2"),
    (["rows", "{tmp}", "--out", "x"], "not a run directory"), (["rows", "{run}", "--out", "{tmp}"], "{tmp}")])
def test_mistakes_are_one_line(run, command, tmp_path, words, said):
    fill = dict(run=run.dir.path, tmp=tmp_path)
    done = command(*(w.format(**fill) for w in words))
    assert done.code == 2 and done.err.startswith("stasc: ") and said.format(**fill) in done.err and len(done.err.splitlines()) == 1
