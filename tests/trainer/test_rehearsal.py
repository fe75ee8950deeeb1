"""A sharded run without its machines: what is foreseen is what ranks take and send, and the paper's largest runs fit."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, python, ranks
from fsdp_options import MEASURED, MEASURED_WITH, OPTIONS, SHAPE

from nanostack import rehearsal
from nanostack.config import Optim, Parallel, load
from nanostack.errors import UserError
from nanostack.flops import n_matrices, n_params
from nanostack.memory import estimate, scratch_of
from nanostack.old_fields import former_config
from nanostack.parallel import check_gathering, fake_ranks, place
from nanostack.rehearsal import growth_of, rehearse, step_of


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> dict:
    """What four gloo ranks did with each option."""
    out = tmp_path_factory.mktemp("ranks") / "answer.json"
    done = ranks(ROOT / "tests/fsdp_options.py", out, number=4, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.distributed
@pytest.mark.slow
def test_options_of_gathering_change_no_loss_and_reach_new_blocks(four_ranks):
    """Also, inside the worker: growth runs no collective, one root, all is sharded after a step."""
    default = four_ranks["default"]
    for name, options in OPTIONS.items():
        found = four_ranks[name]
        assert found["losses"] == default["losses"], name
        # The embedding, the head and the last norm are gathered once; four blocks twice, unless they stay gathered.
        assert found["gathers"] == (5 if name == "kept" else 9), name
        n = options.prefetch
        assert found["ahead"] == [list(range(i + 1, min(4, i + 1 + n))) for i in range(4)]
        assert found["behind"] == [list(range(max(0, i - n), i))[::-1] for i in range(4)]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", [*MEASURED_WITH, "hybrid"])
def test_rehearsed_step_takes_and_sends_what_four_ranks_do(four_ranks, name):
    """The bytes of every collective exactly; the peak within 0.2 % of the allocations that the profiler saw, but for copies of
    whole blocks: gloo makes one of what it gathers or reduces, and two threads of each group let go of them when they run."""
    parallel = OPTIONS.get(name, Parallel(dp_replicate=2))
    found = rehearse(replace(MEASURED, parallel=parallel), torch.float32, False, 4)
    real = four_ranks[name]
    assert [[*key, size] for key, size in sorted(found.sent.items()) if size] == real["sent"]
    scratch = scratch_of(SHAPE, torch.float32, False)(MEASURED.micro_batch)
    peak = found.memory.peak(MEASURED.micro_batch, scratch)
    block = 4 * (n_matrices(SHAPE) // SHAPE.n_layer + 2 * SHAPE.d_model)
    copies = round((real["peak"] - peak) / block)
    assert 0 <= copies <= 8 and real["peak"] == pytest.approx(peak + copies * block, rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "optim"),
    [
        (Parallel(), Optim()),
        (Parallel(activation_checkpointing="full", prefetch=2), Optim()),
        (Parallel(activation_checkpointing="selective", reshard_after_forward=2), Optim(moments="bfloat16")),
        (Parallel(dp_replicate=2, reshard_after_forward=False), Optim()),
    ],
)
def test_step_of_a_deep_model_lies_on_the_line_through_two_shallow_ones(parallel, optim):
    config = replace(MEASURED, parallel=parallel, optim=optim)
    shape = rehearsal.mesh_shape(parallel, 8)
    with fake_ranks(shape) as mesh:
        placement = place(parallel, torch.device("cpu"), torch.bfloat16, mesh)
        first = parallel.prefetch + rehearsal.DEPTHS[0]
        few, more, deep = (
            step_of(config, replace(SHAPE, n_layer=n), placement, True, 1) for n in (first, first + 2, first + 7)
        )
    assert few.drawn_on(more, 3.5) == deep


PAPER = {"7b": 8, "70b": 64}  # ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_paper_run_is_built_sharded_grown_and_trained_without_its_machines(name):
    """Every byte of weights, gradients, moments and collectives is accounted for; a rank has room on an H100."""
    n, config = PAPER[name], load(f"config/{name}.py", ["--model.vocab_size", "128256"])
    found, base, model = rehearse(config, torch.bfloat16, True, n), config.model, config.shapes()[-1]
    assert model.n_layer == 4 * base.n_layer and found.shape == (1, n)
    whole = n_params(model)
    tables = 4 * model.seq_len * model.head_dim  # cos and sin of rotary, on every rank
    counts = 4 * (3 + 6 * model.n_layer)  # a step count for each parameter
    fixed = {"weights, fp32": 4 * whole // n + tables, "gradients, fp32": 4 * whole // n}
    fixed |= {"moments, float32": 8 * whole // n + counts}
    assert found.memory.fixed == {key: pytest.approx(size, abs=1024) for key, size in fixed.items()}  # a mesh has its ranks
    # Growth: the moments go first, then each rank fills its shards of the new layers, and nothing else is allocated.
    assert found.grown is not None and found.grown.after == pytest.approx(4 * whole // n + tables, abs=1024)
    assert found.grown.peak == max(found.grown.before, found.grown.after)
    assert found.grown.before == pytest.approx(12 * n_params(base) // n + tables + 4 * (3 + 6 * base.n_layer), abs=1024)
    # A micro-batch gathers everything once in bf16, and the blocks again for the backward pass; gradients go in fp32.
    blocks = n_matrices(model) + 2 * model.n_layer * model.d_model
    once = found.micro_steps * (n - 1) / n
    sent = {("forward", "all-gather"): 2 * whole, ("backward", "all-gather"): 2 * blocks}
    sent |= {("backward", "reduce-scatter"): 4 * whole}
    for key, size in sent.items():
        assert found.sent[key] == pytest.approx(once * size, rel=1e-6), key
    assert found.sent["update", "all-reduce"] < 10_000  # the norm of the gradients
    peak = found.memory.peak(config.micro_batch, scratch_of(model, torch.bfloat16, True)(config.micro_batch))
    assert sum(found.memory.fixed.values()) + found.gathered < peak < 76 * 2**30


@pytest.mark.slow
def test_estimate_by_formula_that_a_run_checks_is_above_the_rehearsed_peak_by_less_than_a_quarter():
    """What preflight can afford, where a process group is there already."""
    config = load("config/7b.py", ["--model.vocab_size", "32000", "--model.n_layer", "2", "--stages.1.growth.g", "3"])
    model = config.shapes()[-1]
    for how in (Parallel(), full := Parallel(activation_checkpointing="full"), replace(full, reshard_after_forward=False)):
        one = replace(config, parallel=how)
        scratch = scratch_of(model, torch.bfloat16, True)(config.micro_batch)
        formula = estimate(one, model, torch.bfloat16, True, 8).peak(config.micro_batch, scratch)
        traced = rehearse(one, torch.bfloat16, True, 8, with_growth=False).memory.peak(config.micro_batch, scratch)
        assert traced <= formula <= 1.25 * traced, how


@pytest.mark.slow
def test_muon_is_rehearsed_to_its_update_and_sends_its_momenta():
    shape = (1, 4)
    config = load(TINY, ["--optim.name", "muon", "--model.vocab_size", "256"])
    with fake_ranks(shape) as mesh:
        placement = place(config.parallel, torch.device("cpu"), torch.bfloat16, mesh)
        grown = growth_of(config, config.model, [config.stages[1].growth], placement, True)
    found = rehearse(config, torch.bfloat16, True, 4)
    assert grown == found.grown and found.sent["update", "all-to-all"] > 0


@pytest.mark.slow
def test_fit_tells_what_several_gpus_send_and_refuses_what_does_not_fit():
    command = ["-m", "nanostack", "fit", TINY, "--model.vocab_size", 256, "--gpu", 8, "--json"]
    done = python(*command, "--count", 4, "--parallel.dp_replicate", 2)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (
        answer["mesh"] == [2, 2] and len(answer["options"]) == 6 and answer["growth"]["peak"] > answer["growth"]["before"] / 3
    )
    kinds = {(one["phase"], one["collective"]) for one in answer["sent"] if one["bytes"]}
    assert {("forward", "all-gather"), ("backward", "reduce-scatter"), ("backward", "all-reduce")} <= kinds
    for words, said in (
        (("--count", 4, "--parallel.dp_shard", 3), "does not make the number of processes, 4"),
        (("--count", 6, "--parallel.reshard_after_forward", 4), "legal numbers: [2, 3]"),
        (("--parallel.prefetch", 1), "leave them out, or shard over several"),
    ):
        refused = python(*command, *words)
        assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


def test_options_of_gathering_are_refused_where_they_mean_nothing():
    check_gathering(Parallel(), 1)
    for options in (Parallel(reshard_after_forward=False), Parallel(reshard_after_forward=True), Parallel(prefetch=1)):
        with pytest.raises(UserError, match="every process has them whole"):
            check_gathering(options, 1)
    check_gathering(Parallel(reshard_after_forward=4), 8)
    for number, shards in ((8, 8), (3, 8), (2, 2)):
        with pytest.raises(UserError, match=f"reshard_after_forward {number} does not divide {shards} shards"):
            check_gathering(Parallel(reshard_after_forward=number), shards)
    for wrong in (0, 1, -2):
        with pytest.raises(UserError, match="True, False or a number of 2 or more"):
            Parallel(reshard_after_forward=wrong)
    with pytest.raises(UserError, match="prefetch must be 0 or more"):
        Parallel(prefetch=-1)
    done = python("train.py", TINY, "--parallel.prefetch", 2)
    assert done.returncode == 2 and done.stderr.startswith("error: parallel.reshard_after_forward and parallel.prefetch")


def test_options_of_gathering_are_read_from_a_command_line_and_leave_old_hashes_alone():
    for word, value in (("True", True), ("False", False), ("8", 8), ("None", None)):
        after = load(TINY, ["--parallel.reshard_after_forward", word]).parallel.reshard_after_forward
        assert after is value if value != 8 else after == 8
    now = load(TINY, []).shaping()
    assert now["parallel"].keys() == {"dp_replicate", "dp_shard", "activation_checkpointing"}
    assert former_config(now)["parallel"] == {"replicate": None, "shard": None, "activation_checkpointing": "none"}
    ahead = load(TINY, ["--parallel.prefetch", "1"])
    assert ahead.shaping()["parallel"]["prefetch"] == 1 and ahead.sha256() != load(TINY, []).sha256()
