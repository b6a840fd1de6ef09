"The vLLM sampler where there is no vLLM: said in one sentence, before anything is loaded."
import importlib.util
import subprocess
import sys

import pytest

from stasc.core import Config, SampleError
from stasc.sample_vllm import check_vllm
from stasc.train import Engine


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.delenv("STASC_VLLM_PYTHON", raising=False)
    found = importlib.util.find_spec("vllm")        # tests/vllm is found too, but is no package
    if found and found.origin: pytest.skip("this Python has vLLM")


@pytest.mark.parametrize("python", [None, ""])
def test_the_command_says_what_is_missing(without_vllm, monkeypatch, tmp_path, command, python):
    if python is not None: monkeypatch.setenv("STASC_VLLM_PYTHON", python)
    done = command("run", "--sampler", "vllm", "--out", tmp_path / "run")
    assert done.code == 2 and done.err.startswith("stasc: sampler = 'vllm' needs vLLM") and done.err.count("\n") == 1
    assert "pip install 'stasc[vllm]'" in done.err and "Traceback" not in done.out


@pytest.mark.parametrize("python", ["nowhere/python", "."])
def test_a_python_that_is_none_is_refused(monkeypatch, python):
    monkeypatch.setenv("STASC_VLLM_PYTHON", python)
    with pytest.raises(SampleError, match="STASC_VLLM_PYTHON = .* is no program"): check_vllm(Config(sampler="vllm"))


def test_it_is_said_before_a_model_is_loaded(without_vllm):
    with pytest.raises(SampleError, match="needs vLLM"): Engine(Config(model="no/such-model", sampler="vllm"))


@pytest.mark.parametrize("options, what", [(dict(finetune="qlora"), "cannot serve finetune = 'qlora'"), (dict(lora_r=513), "rank 512 at most")])
def test_what_vllm_cannot_serve_is_refused(monkeypatch, options, what):
    monkeypatch.setenv("STASC_VLLM_PYTHON", sys.executable)
    with pytest.raises(SampleError, match=what): check_vllm(Config(sampler="vllm", **options))


def test_importing_it_loads_neither_torch_nor_vllm():
    code = "import sys, stasc.sample_vllm, stasc.vllm_child; print(*{'torch', 'transformers', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
