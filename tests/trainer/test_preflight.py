"""The checks before a run: the kernels that can serve, and options that exclude each other."""

import dataclasses

import pytest
import torch
from conftest import TINY

import kernels
from nanostack import preflight
from nanostack.config import load
from nanostack.parallel import Placement

CPU, CUDA = Placement(torch.device("cpu")), Placement(torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture(autouse=True)
def backend():
    yield
    kernels.set_backend("auto")


@pytest.mark.parametrize("name", ["auto", "c", "torch"])
def test_kernels_that_were_chosen_are_those_that_run(name, monkeypatch):
    best = "torch" if kernels.cpu.unavailable_reason() else "c"
    assert preflight.choose_kernels(name, CPU) == (best if name == "auto" else name)
    assert kernels.dispatch._backend == name, "operations follow it"
    monkeypatch.setattr(kernels.cpu, "unavailable_reason", lambda: "no C compiler was found.")
    if name == "c":
        with pytest.raises(ValueError, match=r"--kernels c: no C compiler was found\."):
            preflight.choose_kernels(name, CPU)
    else:
        assert preflight.choose_kernels(name, CPU) == "torch"


def test_each_host_needs_room_for_the_shards_of_its_own_ranks():
    """docs/scale.md: 847 GB for the 70B in one file, 13.2 GB for each of 64 ranks that write shards."""
    config = load("70b", ["--data.path", "data/none", "--model.vocab_size", "128256"])
    assert preflight.copy_bytes(config, 64, 64, here=8) == pytest.approx(8 * 13.2e9, rel=0.01)
    one_file = dataclasses.replace(config, checkpoint="file")
    assert preflight.copy_bytes(one_file, 64, 64, here=8) == pytest.approx(847e9, rel=0.01)


def test_interpreter_refuses_bfloat16_in_which_it_is_silently_wrong(monkeypatch):
    monkeypatch.setattr(kernels.dispatch, "INTERPRETED", True)
    assert preflight.choose_kernels("triton", CPU) == "triton"
    with pytest.raises(
        ValueError, match="--kernels triton: Triton's interpreter is right in float32 only; add --dtype float32"
    ):
        preflight.choose_kernels("triton", dataclasses.replace(CPU, dtype=torch.bfloat16))


def test_gpu_that_triton_does_not_serve_runs_torch_or_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda device: "the kernels need compute capability 8.0 or newer.")
    assert preflight.choose_kernels("auto", CUDA) == kernels.dispatch._backend == "torch"
    with pytest.raises(ValueError, match=r"--kernels triton: the kernels need compute capability 8\.0"):
        preflight.choose_kernels("triton", CUDA)
    with pytest.raises(ValueError, match="--kernels c: the C kernels run on the CPU only"):
        preflight.choose_kernels("c", CUDA)


def test_gpu_without_a_c_compiler_runs_torch(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda device: None)
    assert preflight.choose_kernels("auto", CUDA) == preflight.choose_kernels("triton", CUDA) == "triton"
    assert kernels.dispatch._backend == "triton"
    monkeypatch.setattr(kernels.dispatch, "launcher_compiler", lambda: None)
    with pytest.raises(ValueError, match="--kernels triton: Triton needs a C compiler"):
        preflight.choose_kernels("triton", CUDA)
    assert preflight.choose_kernels("auto", CUDA) == "torch"


def test_attention_that_waits_for_the_device_is_not_captured(corpus):
    config = load(TINY, ["--data.path", str(corpus), "--kernels", "torch", "--cuda_graph", "--data.document_mask"])
    with pytest.raises(ValueError, match=r"--cuda_graph: --data\.document_mask with torch's attention waits for the device"):
        preflight.check(config, CPU)
    preflight.check(dataclasses.replace(config, cuda_graph=False), CPU)


@pytest.mark.parametrize(
    ("mps", "c_lacks", "said"),
    [
        (False, None, ""),
        (
            False,
            "there is no C compiler (cc).",
            "note: torch computes in place of the c kernels: there is no C compiler (cc).\n",
        ),
        (True, None, "note: The GPU of this Mac (MPS) is not used: training runs on the CPU.\n"),
        (
            True,
            "they find torch's OpenMP on Linux only.",
            "note: torch computes in place of the c kernels: they find torch's OpenMP on Linux only. "
            "The GPU of this Mac (MPS) is not used: training runs on the CPU.\n",
        ),
    ],
)
def test_fallback_is_told_in_one_line(mps, c_lacks, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(kernels.cpu, "unavailable_reason", lambda: c_lacks)
    assert preflight.choose_kernels("auto", CPU) == ("torch" if c_lacks else "c")
    assert capsys.readouterr().err == said
    assert preflight.choose_kernels("torch", CPU) == "torch" and not capsys.readouterr().err, "who asks for it knows"


def test_fallback_of_a_gpu_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda device: "the kernels need more.")
    assert preflight.choose_kernels("auto", CUDA) == "torch"
    assert capsys.readouterr().err == "note: torch computes in place of the triton kernels: the kernels need more.\n"


def test_machine_without_a_c_compiler_trains_in_torch_and_says_so(trainer):
    done = trainer("out", env={"PATH": "/nowhere"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("note: torch computes in place of the c kernels: there is no C compiler (cc).") == 1
    assert ", torch kernels, " in done.stdout
