"""Muon against torch's own, matrix by matrix; what it does with fused matrices, skipped steps and foreign checkpoints."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import train
from nanostack import checkpoint, muon
from nanostack.config import Optim, load
from nanostack.flops import n_matrices, newton_schulz_flops, orthogonalising_flops
from nanostack.model import Llama, LlamaConfig
from nanostack.optimizer import guarded_step, make_optimizer, name_of, state_numbers
from nanostack.parallel import Placement
from nanostack.state import State

CONFIG = LlamaConfig(n_layer=3, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=64, seq_len=16)
MUON = Optim("muon", momentum=0.9)
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def backward(model: Llama) -> torch.Tensor:
    loss = model(TOKENS, TOKENS.roll(-1, 1))
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("piece", [1, muon.PIECE], ids=["one by one", "at once"])
def test_three_steps_are_those_of_torchs_muon_on_matrices_that_are_not_fused(piece, monkeypatch):
    """q, k, v, gate and up apart, for which torch has parameters of their own; it orthogonalises in fp32 here, as we do."""
    monkeypatch.setattr(muon, "PIECE", piece)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    model = Llama(CONFIG, seed=1)
    optimizer = make_optimizer(model, MUON)
    rows = {p: sizes for p, sizes in model.matrices().items()}
    theirs = {p: [torch.nn.Parameter(part.clone()) for part in p.detach().split(rows[p])] for p in rows}
    rest = {p: torch.nn.Parameter(p.detach().clone()) for p in model.parameters() if p not in rows}
    options = {"lr": 1e-2, "weight_decay": MUON.weight_decay, "momentum": MUON.momentum}
    reference = torch.optim.Muon([one for parts in theirs.values() for one in parts], adjust_lr_fn="match_rms_adamw", **options)
    groups = [{"params": [p for p in rest.values() if p.ndim == n], "weight_decay": 0.1 * (n == 2)} for n in (1, 2)]
    beside = torch.optim.AdamW(groups, lr=1e-2, betas=MUON.betas, eps=MUON.eps)
    for _ in range(3):
        loss = backward(model)
        scale = torch.clamp(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]), min=1.0)
        for p in model.parameters():
            copies, sizes = (theirs[p], rows[p]) if p in rows else ([rest[p]], len(p))
            for copy, gradient in zip(copies, (p.grad / scale).split(sizes), strict=True):
                copy.grad = gradient.clone()
        guarded_step(optimizer, loss, 1e-2, 1.0)
        reference.step()
        beside.step()
        for p in model.parameters():
            expected = torch.cat(list(theirs[p])) if p in rows else rest[p]
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-5)
    assert len(rows) == 4 * CONFIG.n_layer and sum(map(len, rows.values())) == 7 * CONFIG.n_layer


def test_update_has_the_size_of_adamws_and_orthogonal_directions():
    momentum = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    (update,) = muon.updates_of([momentum], [(48,)])
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)
    singular = torch.linalg.svdvals(update) / (0.2 * 48**0.5)
    assert singular.min() > 0.5 and singular.max() < 1.3
    ours, exact = update.flatten(), torch.linalg.svd(momentum, full_matrices=False)
    assert torch.cosine_similarity(ours, (exact.U @ exact.Vh).flatten(), dim=0) > 0.97


class NoWait(TorchDispatchMode):
    """Fails where a value is asked for, which on a GPU makes the host wait."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op is not torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["loss", "gradient", "first step"])
def test_step_that_is_not_finite_changes_nothing_and_nobody_waits(where):
    model = Llama(CONFIG, seed=1)
    optimizer = make_optimizer(model, MUON)
    if where != "first step":
        guarded_step(optimizer, backward(model), 1e-2, 1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    kept = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters()]
    loss = backward(model)
    if where == "loss":
        loss = loss * torch.inf
    else:
        model.blocks[1].mlp.down.weight.grad[0, 0] = torch.nan
    with NoWait():
        _, skipped = guarded_step(optimizer, loss, 1e-2, 1.0)
    assert skipped == 1
    for p, weight, state in zip(model.parameters(), weights, kept, strict=True):
        assert torch.equal(p, weight)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, state[key]) if state else not value.any()


def test_state_is_one_number_for_each_of_a_matrix_and_two_for_the_rest():
    state = State.create(CONFIG, MUON, Placement(torch.device("cpu")), 0)
    guarded_step(state.optimizer, backward(state.model), 1e-2, 1.0)
    kept = [value for values in state.optimizer.state.values() for key, value in values.items() if key != "step"]
    assert sum(value.numel() for value in kept) == state_numbers(CONFIG, "muon")
    assert state_numbers(CONFIG, "muon") == state_numbers(CONFIG, "adamw") - n_matrices(CONFIG)
    assert name_of(state.optimizer.state) == "muon" and name_of({}) is None
    matrices = state.model.matrices()
    assert n_matrices(CONFIG) == sum(p.numel() for p in matrices)
    assert newton_schulz_flops(CONFIG) == sum(muon.Fused(p, rows).flops for p, rows in matrices.items())


def test_owners_bear_equal_shares_and_pieces_are_whole():
    """24 layers of two shapes on 8 ranks: nobody bears more than a tenth above the mean."""
    shapes = [(6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632)] * 24
    costs = [orthogonalising_flops(*shape) for shape in shapes]
    borne = [0] * 8
    for cost, owner in zip(costs, muon.balanced(costs, 8), strict=True):
        borne[owner] += cost
    assert max(borne) < 1.1 * sum(costs) / 8
    fused = [muon.Fused(torch.empty(shape, device="meta"), (shape[0],)) for shape in shapes]
    found = muon.pieces(fused, 2**26)
    assert [n for piece in found for n in piece] == list(range(96)) and len(found) > 10
    assert all(len(piece) == 1 or sum(shapes[n][0] * shapes[n][1] for n in piece) <= 2**26 for piece in found)
    assert muon.chunks(10, 4) == [3, 3, 3, 1] == [len(part) for part in torch.empty(10).chunk(4)]
    assert muon.chunks(5, 4) == [2, 2, 1, 0]


def test_checkpoint_of_one_optimizer_does_not_resume_with_the_other_and_begins_anew_from_it(corpus, tmp_path, capsys):
    short = [
        "--data.path",
        str(corpus),
        "--stages.0.tokens",
        "512",
        "--stages.1.tokens",
        "512",
        "--stages.1.warmup_tokens",
        "0",
    ]
    for name, other in (("muon", "adamw"), ("adamw", "muon")):
        run = [*short, "--out", str(tmp_path / name)]
        train.Run(load(TINY, [*run, "--optim.name", name])).train()
        with pytest.raises(
            ValueError, match=f"has the optimizer state of {name}, which {other} cannot go on from: resume with"
        ) as error:
            train.Run(load(TINY, [*run, "--optim.name", other, "--resume"]))
        assert "\n" not in str(error.value)
    capsys.readouterr()
    source = str(tmp_path / "adamw/ckpt.pt")
    config = load(TINY, [*short, "--out", str(tmp_path / "on"), "--optim.name", "muon"])
    config = replace(config, model=replace(config.model, n_layer=4), stages=config.stages[:1], init_from=source)
    on = train.Run(config)
    assert f"note: {source} has the state of adamw; muon begins anew" in capsys.readouterr().err
    assert not on.state.optimizer.state and on.state.cursor.tokens == 1024
    on.train()
    assert name_of(checkpoint.load(tmp_path / "on/ckpt.pt")["optimizer"]) == "muon"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "moun"}, "there is no optimizer 'moun'; perhaps you meant muon"),
        ({"name": "sgd"}, "there is no optimizer 'sgd'; there are adamw and muon"),
        ({"name": "muon", "momentum": 0.995, "moments": "bfloat16"}, "bfloat16 needs momentum ≤ 0.99, not 0.995"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\)"),
    ],
)
def test_optimizer_that_cannot_be_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Optim(**wrong)
