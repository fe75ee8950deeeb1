"""What fits is what is really allocated."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from conftest import peak_bytes, python

from kernels import dispatch
from kernels.linear_cross_entropy import scratch_bytes
from nanostack import memory
from nanostack.config import Data, Optim, Parallel, Stage, Train, load
from nanostack.errors import UserError
from nanostack.flops import n_params
from nanostack.memory import capacity, check_batch, scratch_of
from nanostack.model import LlamaConfig
from nanostack.optimizer import guarded_step
from nanostack.parallel import Placement
from nanostack.state import State

SHAPE = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=192, d_ff=512, vocab_size=1024, seq_len=256)
estimate = functools.cache(memory.estimate)  # each takes two traces, and several tests ask for the same
CONFIG = Train(Data(), SHAPE, (Stage(1024, 1e-3),), batch_tokens=4096, micro_batch=8, out="out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "how", "optim", "shape"),
    [
        (torch.float32, "none", Optim(), {}),
        (torch.float32, "selective", Optim("muon"), {}),
        (torch.float32, "full", Optim(moments="bfloat16"), {}),
        (torch.bfloat16, "none", Optim("muon", moments="bfloat16"), {"residual_scale": 1.0}),
        (torch.bfloat16, "full", Optim(), {"loops": 2}),
    ],
)
def test_predicted_peak_is_what_two_steps_allocate_within_five_per_cent(dtype, how, optim, shape, monkeypatch):
    """Every allocation of two steps of two micro-batches, by the profiler; the second step has moments.

    On the torch kernels, which are what is traced without Triton; those in C leave out temporaries.
    """
    monkeypatch.setattr(dispatch, "_backend", "torch")
    model = replace(SHAPE, **shape)
    config = replace(CONFIG, parallel=Parallel(activation_checkpointing=how), optim=optim)
    tokens = torch.randint(SHAPE.vocab_size, (config.micro_batch, SHAPE.seq_len + 1))

    def steps():
        placement = Placement(torch.device("cpu"), dtype, None, how)
        state = State.create(model, config.optim, placement, 0)
        for _ in range(2):
            for _ in range(2):
                loss = state.model(tokens[:, :-1], tokens[:, 1:]) / 2
                loss.backward()
            guarded_step(state.optimizer, loss.detach(), 1e-3, 1.0)

    found = memory.estimate(config, model, dtype, on_triton=False)
    rows = config.micro_batch * SHAPE.seq_len
    scratch = scratch_bytes(rows, SHAPE.d_model, SHAPE.vocab_size, dtype.itemsize, on_triton=False)
    assert found.peak(config.micro_batch, scratch) == pytest.approx(peak_bytes(steps), rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_predicted_peak_is_what_a_gpu_allocates_within_five_per_cent(how):
    """Two steps of two micro-batches in bf16 with Triton's kernels; cuBLAS's workspace, which is in RESERVED, left out."""
    shape = replace(SHAPE, n_layer=8, n_head=16, n_kv_head=16, d_model=1024, d_ff=2816, vocab_size=32000, seq_len=1024)
    config = replace(CONFIG, parallel=Parallel(activation_checkpointing=how))
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.zeros(64, 64, device=device, dtype=dtype) @ torch.zeros(64, 64, device=device, dtype=dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    state = State.create(shape, config.optim, Placement(device, dtype, None, how), 0)
    tokens = torch.randint(shape.vocab_size, (config.micro_batch, shape.seq_len + 1), device=device)
    for _ in range(2):
        for _ in range(2):
            loss = state.model(tokens[:, :-1], tokens[:, 1:]) / 2
            loss.backward()
        guarded_step(state.optimizer, loss.detach(), 1e-3, 1.0)
    scratch = scratch_of(shape, dtype, on_triton=True)(config.micro_batch)
    predicted = estimate(config, shape, dtype, on_triton=True).peak(config.micro_batch, scratch)
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.05)


def test_states_of_a_config_are_counted_to_the_byte():
    found = estimate(CONFIG, SHAPE, torch.bfloat16, on_triton=True)
    n, steps = n_params(SHAPE), 4 * (3 + 6 * SHAPE.n_layer)  # a count for each parameter
    assert found.fixed["moments, float32"] == 8 * n + steps and found.fixed["gradients, fp32"] == 4 * n
    assert found.fixed["weights, fp32"] == 4 * (n + SHAPE.seq_len * SHAPE.head_dim)  # and the tables of rotary
    muon = replace(CONFIG, optim=Optim("muon"))
    matrices = SHAPE.n_layer * SHAPE.d_model * (2 * SHAPE.d_model + 2 * 96 + 3 * SHAPE.d_ff)
    steps = 4 * (3 + 2 * SHAPE.n_layer)
    assert estimate(muon, SHAPE, torch.bfloat16, on_triton=True).fixed["moments, float32"] == 8 * n - 4 * matrices + steps


def test_the_most_sequences_are_the_most_that_fit():
    found = estimate(CONFIG, SHAPE, torch.bfloat16, on_triton=True)
    assert found.sequences(found.peak(37, 0), lambda sequences: 0) == 37
    assert found.sequences(found.peak(37, 0) - 1, lambda sequences: 0) == 36
    assert found.sequences(sum(found.fixed.values()), lambda sequences: 0) == 0


def test_command_tells_every_option_and_refuses_what_there_is_not():
    command = ["-m", "nanostack", "fit", "config/quickstart.py", "--model.n_layer", "1", "--stages.1.growth.g", "2", "--json"]
    done = python(*command, "--gpu", 8)
    assert done.returncode == 0, done.stderr
    options = json.loads(done.stdout)["options"]
    assert len(options) == 6 and all(option["micro_batch"] > 16 for option in options)
    by = {(option["activation_checkpointing"], option["moments"]): option["micro_batch"] for option in options}
    assert by["none", "float32"] < by["selective", "float32"] < by["full", "float32"] <= by["full", "bfloat16"]
    gpus = [(["--gpu", gpu], "gpu is one of h200") for gpu in ("abacus", "nan", "inf", "0")]
    for wrong, said in (*gpus, (["--count", "0"], "count must be at least 1")):
        refused = python(*command, *wrong)
        assert refused.returncode == 2 and said in refused.stderr and refused.stdout == ""
    assert capacity("12.5") == 12.5 * 2**30 and capacity("H200") == capacity("h200")
    assert [capacity(name) / 2**30 for name in ("a100", "a100-40", "rtx4090", "RTX 4090", "B200")] == [78, 39, 23, 23, 177]
    with pytest.raises(UserError, match=r"gpu is one of h200.* or a number of GiB, not 'h100-pcie'"):
        capacity("h100-pcie")  # nobody has looked what torch can have of it
    with pytest.raises(ValueError, match="there is no config file"):
        load("config/none.py", [])


@pytest.fixture
def traced_once(monkeypatch):
    monkeypatch.setattr(memory, "estimate", estimate)


def test_states_are_divided_by_the_devices_of_a_mesh_and_a_batch_too_large_for_it_is_refused(traced_once):
    alone, four = (estimate(CONFIG, SHAPE, torch.bfloat16, True, count) for count in (1, 4))
    for name in ("weights, fp32", "moments, float32", "gradients, fp32"):
        assert four.fixed[name] == -(-alone.fixed[name] // 4)
    peak = four.peak(8, scratch_of(SHAPE, torch.bfloat16, True)(8))
    check_batch(CONFIG, SHAPE, torch.bfloat16, True, peak, count=4)
    with pytest.raises(UserError, match="micro_batch 8 needs about"):
        check_batch(CONFIG, SHAPE, torch.bfloat16, True, peak - 1, count=4)


@pytest.mark.parametrize("how", ["none", "full"])
def test_micro_batch_that_cannot_fit_is_refused_with_what_would(how, traced_once):
    config = replace(CONFIG, parallel=Parallel(activation_checkpointing=how))
    found = estimate(config, SHAPE, torch.float32, on_triton=False)
    peak = found.peak(8, scratch_of(SHAPE, torch.float32, False)(8))
    check_batch(config, SHAPE, torch.float32, False, peak)
    check_batch(config, SHAPE, torch.float32, False, peak / 1.5, slack=1.5)
    with pytest.raises(UserError, match=r"micro_batch 8 needs about 0\.\d GiB, 0\.\d GiB are free; what fits: ") as told:
        check_batch(config, SHAPE, torch.float32, False, peak - 1)
    assert f"7 with --parallel.activation_checkpointing {how}" in str(told.value)
    with pytest.raises(UserError, match="not even one sequence fits"):
        check_batch(config, SHAPE, torch.float32, False, 1e6)
