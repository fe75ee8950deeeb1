"""Muon: a matrix moves by its momentum, orthogonalised, and as far as AdamW would move it.

Keller Jordan's Muon (kellerjordan.github.io/posts/muon), its step scaled by 0.2·√max(rows, columns), so that its root mean
square is AdamW's (arXiv 2502.16982): rates and weight decay found for AdamW serve both. Embeddings, head and gains stay with
AdamW.

q, k and v are matrices of their own, and so are gate and up, though they lie in one parameter. Matrices of one shape are
orthogonalised in one batch, whichever layers they are in. Under FSDP2 a parameter has an owner: the rank that gets the whole
of its momentum, orthogonalises it, and sends every rank its rows of the update. Large models go piece by piece: what is sent
for one piece travels while another is orthogonalised.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from nanostack.flops import NEWTON_SCHULZ_STEPS, orthogonalising_flops

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: steepest at 0, where small singular values are
EPS = 1e-7
PIECE = 2**25  # numbers that a rank orthogonalises at a time: enough to fill a GPU, and little beside the model


def orthogonalise(x: Tensor) -> Tensor:
    """U·S'·Vᵀ of each matrix U·S·Vᵀ of x (n, rows, columns), S' between about 0.7 and 1.2, by Newton–Schulz in x's dtype."""
    a, b, c = COEFFICIENTS
    x = x / x.flatten(1).norm(dim=1).clamp(min=EPS)[:, None, None]
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Fused(NamedTuple):
    """A parameter, and the rows of each matrix that lies in it."""

    parameter: Tensor
    rows: tuple[int, ...]

    @property
    def flops(self) -> int:
        """What it takes to orthogonalise them."""
        return sum(orthogonalising_flops(n, self.parameter.shape[1]) for n in self.rows)


def updates_of(momenta: Sequence[Tensor], rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The update for each momentum, in which matrices of so many rows lie; at a rate of 1 it has the size of AdamW's.

    Matrices of one shape, lying or standing, are one batch.
    """
    matrices = [matrix for momentum, sizes in zip(momenta, rows, strict=True) for matrix in momentum.split(sizes)]
    batches: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        batches.setdefault(tuple(sorted(matrix.shape)), []).append(number)
    for shape, numbers in batches.items():
        updates = orthogonalise(torch.stack([_lying(matrices[i]) for i in numbers])) * (0.2 * shape[-1] ** 0.5)
        for i, update in zip(numbers, updates, strict=True):
            matrices[i] = update if update.shape == matrices[i].shape else update.mT
    left = iter(matrices)
    return [torch.cat([next(left) for _ in sizes]) for sizes in rows]


def _lying(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def each_update(fused: Sequence[Fused], momentum_of: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of a parameter, its update), this rank's rows of both where they are sharded.

    `momentum_of(number)` gives what is to be orthogonalised. Every rank must take all that comes.
    """
    if isinstance(fused[0].parameter, DTensor):
        yield from _each_sharded(fused, momentum_of)
        return
    for piece in pieces(fused, PIECE):
        updates = updates_of([momentum_of(number) for number in piece], [fused[number].rows for number in piece])
        yield from zip(piece, updates, strict=True)


def pieces(fused: Sequence[Fused], size: int) -> list[list[int]]:
    """The numbers of the parameters in order, as many at a time as have at most `size` numbers together, but at least one."""
    found: list[list[int]] = []
    room = 0
    for number, one in enumerate(fused):
        if not found or one.parameter.numel() > room:
            found.append([])
            room = size
        found[-1].append(number)
        room -= one.parameter.numel()
    return found


def _each_sharded(fused: Sequence[Fused], momentum_of: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    exchange = Exchange(fused)
    parts = pieces(fused, PIECE * len(exchange.ranks))
    coming, returning = exchange.to_owners(parts[0], momentum_of), None
    for number, part in enumerate(parts):
        arrived = coming
        if number + 1 < len(parts):
            coming = exchange.to_owners(parts[number + 1], momentum_of)
        mine = exchange.owned(part)
        updates = updates_of(exchange.wholes(mine, arrived), [fused[n].rows for n in mine])
        earlier, returning = returning, (part, exchange.from_owners(part, mine, updates, arrived.received))
        if earlier is not None:
            yield from exchange.own_rows(*earlier)
    if returning is not None:
        yield from exchange.own_rows(*returning)


class Sent(NamedTuple):
    """A message under way: what has come from each rank when `work` is done."""

    work: dist.Work
    outgoing: Tensor
    received: Tensor
    sizes: list[int]

    def wait(self) -> list[Tensor]:
        self.work.wait()
        return list(self.received.split(self.sizes))


class Exchange:
    """Who owns which parameter, and what goes from rank to rank.

    The parameters are DTensors on one (replicate, shard) mesh of all ranks, sharded by rows. Rank r is shard r % shards of
    replica r // shards. Momenta go to an owner from the shards of its own replica, as all replicas have the same; updates go to
    the shards of every replica.
    """

    def __init__(self, fused: Sequence[Fused]):
        mesh = None
        for p in (one.parameter for one in fused):
            assert isinstance(p, DTensor) and p.placements == (Replicate(), Shard(0)), "FSDP2 shards by rows"
            mesh = p.device_mesh
        assert mesh is not None
        self.replicas, self.shards = mesh.shape
        self.ranks, self.rank = range(mesh.size()), dist.get_rank()
        self.shapes = [one.parameter.shape for one in fused]
        self.owners = balanced([one.flops for one in fused], mesh.size())

    def owned(self, part: Sequence[int], rank: int | None = None) -> list[int]:
        """The parameters among these that a rank owns, by default this one."""
        return [number for number in part if self.owners[number] == (self.rank if rank is None else rank)]

    def size(self, number: int, rank: int) -> int:
        """How many elements of a parameter a rank holds."""
        rows, columns = self.shapes[number]
        return chunks(rows, self.shards)[rank % self.shards] * columns

    def to_owners(self, part: Sequence[int], momentum_of: Callable[[int], Tensor]) -> Sent:
        """Send this rank's rows of momenta to the owners in its replica."""
        momenta = {number: momentum_of(number) for number in part}
        replica = range(first := self.rank // self.shards * self.shards, first + self.shards)
        sent = [[momenta[n] for n in self.owned(part, rank)] if rank in replica else [] for rank in self.ranks]
        mine = self.owned(part)
        sizes = [sum(self.size(n, rank) for n in mine) if rank in replica else 0 for rank in self.ranks]
        return _send(sent, sizes, momenta[part[0]])

    def wholes(self, mine: Sequence[int], sent: Sent) -> list[Tensor]:
        """The whole momentum of each parameter that this rank owns."""
        rows: list[list[Tensor]] = [[] for _ in mine]
        for rank, got in enumerate(sent.wait()):
            if got.numel():  # of another replica comes nothing
                for whole, part in zip(rows, got.split([self.size(n, rank) for n in mine]), strict=True):
                    whole.append(part)
        return [torch.cat(parts).view(self.shapes[n]) for n, parts in zip(mine, rows, strict=True)]

    def from_owners(self, part: Sequence[int], mine: Sequence[int], updates: Sequence[Tensor], like: Tensor) -> Sent:
        """Send every rank its rows of the updates that this rank has made."""
        rows = [update.split(chunks(len(update), self.shards)) for update in updates]
        sent = [[by_shard[rank % self.shards] for by_shard in rows] for rank in self.ranks]
        sizes = [sum(self.size(n, self.rank) for n in self.owned(part, rank)) for rank in self.ranks]
        return _send(sent, sizes, like)

    def own_rows(self, part: Sequence[int], sent: Sent) -> Iterator[tuple[int, Tensor]]:
        """(number of a parameter, this rank's rows of its update), for every parameter of the part."""
        for rank, got in enumerate(sent.wait()):
            numbers = self.owned(part, rank)
            for n, rows in zip(numbers, got.split([self.size(n, self.rank) for n in numbers]), strict=True):
                yield n, rows.view(-1, self.shapes[n][1])


def _send(sent: list[list[Tensor]], sizes: list[int], like: Tensor) -> Sent:
    """Send these tensors to each rank; so many elements come back from each."""
    parts = [torch.cat([x.flatten() for x in one]) if one else like.new_empty(0) for one in sent]
    outgoing, received = torch.cat(parts), like.new_empty(sum(sizes))
    work = dist.all_to_all_single(received, outgoing, sizes, [len(part) for part in parts], async_op=True)
    return Sent(work, outgoing, received, sizes)


def chunks(rows: int, shards: int) -> list[int]:
    """How many rows each shard has, as torch.chunk deals them."""
    most = -(-rows // shards)
    return [max(0, min(most, rows - most * shard)) for shard in range(shards)]


def balanced(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank that bears each cost: the dearest first, each to the rank that bears least so far."""
    borne, chosen = [0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        chosen[number] = borne.index(min(borne))
        borne[chosen[number]] += costs[number]
    return chosen
