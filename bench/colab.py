"""The Colab notebook, executed to its end with a small Qwen2 of random weights in place of the download.

    make test-colab                     in an environment with Colab's versions: the notebook installs stasc itself; what was installed before is compared with what is installed after
    python bench/colab.py --renew       with the versions at hand: writes the outputs that are saved in the notebook

The stand-in answers word salad, so its questions are such that word salad earns something: nothing is learned, every step is taken.
Colab itself is not here: no GPU, no google.colab (Google Drive is a folder), and of its several hundred packages those that stasc meets.
"""
import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
NOTEBOOK = "nbs/tutorials/colab_qlora.ipynb"
KEEP = ("torch", "numpy", "pandas", "ipython", "ipywidgets")
SMALL = dict(scope="full", n_train=16, n_test=12, iterations=2, max_new_tokens=24, temperature=1.0, top_p=1.0, learning_rate=1e-3, device="cpu")
WORDS = "answer question final step correct initial reasoning your".split()


def make_stand_in(folder):
    "A Qwen2 with random weights, about 200,000 of them, and a tokenizer of a few hundred pieces with Qwen's chat template."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    texts = [f.read_text(encoding="utf-8") for f in sorted((root / "stasc/prompts").glob("*.yaml"))] + [" ".join(WORDS)] * 50
    texts = [t.encode("ascii", "ignore").decode() for t in texts]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"], padding_side="left")
    tokenizer.chat_template = ("{%- for m in messages -%}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor -%}"
                               "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                                             max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_words(path, n=28):
    "Questions whose answers are words that the stand-in may say by chance."
    rows = [dict(id=f"w{i}", question=f"Name a word of list {i + 1}: {', '.join(chosen)}.", answer=chosen)
            for i in range(n) for chosen in [[WORDS[(i * k + j) % len(WORDS)] for j, k in enumerate((1, 3, 5, 7))]]]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


WIDGETS = """
import ipywidgets
panels = [CurveExplorer(run), FilterExplorer(run), RewardDebugger(run), PromptInspector(run)]
assert all(isinstance(p.widget, ipywidgets.Widget) and "role=alert" not in p._html.value for p in panels)
print("widgets:", ", ".join(type(p).__name__ for p in panels), "with ipywidgets", ipywidgets.__version__)
"""


def code_cells(nb): return [c for c in nb.cells if c.cell_type == "code"]


def settings_cell(nb):
    "The one cell that a user, or a test, changes."
    found = [c for c in code_cells(nb) if c.source.startswith("#@title Settings")]
    assert len(found) == 1, "the notebook has one cell that begins with #@title Settings"
    return found[0]


def set_parameters(nb, **values):
    "Give the settings cell other values; each name stands there already."
    cell = settings_cell(nb)
    names = re.findall(r"^(\w+) = ", cell.source, re.M)
    assert set(values) == set(names), (sorted(values), names)
    cell.source = "#@title Settings\n" + "".join(f"{k} = {v!r}\n" for k, v in values.items())


def prepare(folder, **changes):
    "A folder as the notebook finds it: model, questions, a 'Drive'. Returns the parameters."
    folder.mkdir(parents=True, exist_ok=True)
    make_stand_in(folder / "random-qwen2")
    write_words(folder / "words.jsonl")
    return dict(model="random-qwen2", gpu="T4", data="words.jsonl", drive="drive", install="stasc", changes=SMALL | changes)


def read_notebook(path=root / NOTEBOOK):
    import nbformat
    return nbformat.read(path, 4)


def execute(nb, folder, python_path=True):
    "Run the notebook in a kernel of its own."
    from nbclient import NotebookClient
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    before = os.environ.get("PYTHONPATH")
    if python_path: os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *([before] if before else [])])
    try: NotebookClient(nb, timeout=540, kernel_name="python3", resources=dict(metadata=dict(path=str(folder)))).execute()
    finally:
        if python_path: os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return nb


def renew():
    "Write the outputs of such an execution into the notebook; sources stay as they are."
    import nbformat
    nb = read_notebook()
    own = settings_cell(nb).source
    with tempfile.TemporaryDirectory() as tmp:
        set_parameters(nb, **prepare(Path(tmp)))
        execute(nb, tmp)
    settings_cell(nb).source = own
    nb.metadata.pop("widgets", None)
    nbformat.write(nb, root / NOTEBOOK)
    subprocess.run([sys.executable, "-c", "import sys; from nbdev.clean import nbdev_clean; nbdev_clean(sys.argv[1])", str(root / NOTEBOOK)], check=True, cwd=root)


def freeze():
    "Versions of everything that is installed."
    out = subprocess.run([sys.executable, "-c", "import json; from importlib import metadata; print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in metadata.distributions()}))"],
                         capture_output=True, text=True, check=True).stdout
    return json.loads(out)


def remove(names):
    if names: subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *names], check=True)


def compare():
    "Install and run as on Colab; what changed of what was there."
    import nbformat
    assert sys.prefix != sys.base_prefix, "packages come and go: run this in a virtual environment of its own (make test-colab)"
    remove([p for p in ("stasc", "bitsandbytes") if p in freeze()])
    assert importlib.util.find_spec("stasc") is None, "stasc can be imported from elsewhere: run this from another folder, without PYTHONPATH"
    before = freeze()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        subprocess.run(["git", "clone", "-q", str(root), str(tmp / "stasc-clone")], check=True)
        nb = read_notebook(tmp / "stasc-clone" / NOTEBOOK)
        set_parameters(nb, **prepare(tmp / "session") | dict(install=str(tmp / "stasc-clone")))
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tmp / "stasc-clone", capture_output=True, text=True, check=True).stdout.strip()
        browse = next(i for i, c in enumerate(nb.cells) if c.cell_type == "code" and c.source.startswith("run.browse"))
        nb.cells.insert(browse + 1, nbformat.v4.new_code_cell(WIDGETS))
        execute(nb, tmp / "session", python_path=False)
        executed = [c for c in code_cells(nb) if c.execution_count and c.source != WIDGETS]
        texts = "".join(o.get("text", "") for c in code_cells(nb) for o in c.outputs)
        adapters = sorted(f.parent.relative_to(tmp / "session/drive").parts[1] for f in (tmp / "session/drive").rglob("adapter_model.safetensors"))
    after = freeze()
    added = {p: v for p, v in after.items() if p not in before}
    changed = {p: [v, after.get(p)] for p, v in before.items() if after.get(p) != v}
    remove(list(added))
    result = dict(command="make test-colab", python=platform.python_version(), system=platform.system(), commit=commit, notebook=NOTEBOOK, code_cells_executed=len(executed),
                  adapters_on_drive=adapters, same_greedy_answers="the same tokens: True" in texts, widgets=re.search("widgets: (.*) with", texts)[1].split(", "), **{"kept as they were": {p: dict(before=before[p], after=after[p]) for p in KEEP}}, changed=changed, added=added,
                  packages={p: before[p] for p in ("transformers", "peft", "accelerate", "datasets", "pyarrow", "safetensors", "scipy", "matplotlib", "ipykernel")},
                  not_had_here=["a GPU", "google.colab: Google Drive was a local folder", "Colab's other preinstalled packages", "the download of a model and a data set"])
    (root / "bench/results/colab.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    if wrong := [p for p in KEEP if p in changed]: sys.exit(f"the install cell changed {', '.join(wrong)}")
    if changed: print("changed besides:", changed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="execute with the versions at hand and save the outputs in the notebook")
    renew() if parser.parse_args().renew else compare()
