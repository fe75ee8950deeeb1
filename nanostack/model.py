"""The Llama, in one file: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

It is the Llama of Hugging Face with q, k, v fused into one weight and gate, up into another. It knows nothing of growth,
parallelism or training: those are applied to it from outside.

Shape suffixes: B batch, T time, D d_model, H query heads, G key/value heads, K d_head, F d_ff, V vocabulary.
Linear weights are (out, in). Rows of qkv: [all q heads; all k heads; all v heads]. Rows of gate_up: [gate; up].
"""

import hashlib
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanostack import kernels
from nanostack.errors import UserError
from nanostack.kernels import Documents
from nanostack.shards import local_shard

RESIDUAL_OUTPUTS = ("attn.out.weight", "mlp.down.weight")  # the weights that write to the residual stream


if TYPE_CHECKING:
    VocabularySize: TypeAlias = int  # of every model that is built
else:
    VocabularySize = int | None  # a run's config may leave it to the data


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's longer context: slow rotary frequencies are divided by `factor`, fast ones stay, those between are mixed."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_seq_len: int


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of the model. In a run's config a `vocab_size` of None stands for the data's, rounded up to 128."""

    n_layer: int
    n_head: int
    n_kv_head: int
    d_model: int
    d_ff: int
    vocab_size: VocabularySize
    seq_len: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    rope_scaling: RopeScaling | None = None
    loops: int = 1
    """Times that the layers are run in turn: 2 layers and 2 loops make a depth of 4, 0 1 0 1."""
    residual_scale: float | None = None
    """Residual branches are multiplied by residual_scale / depth, so that rates travel with depth (CompleteP, arXiv
    2505.01618); None: they are added as they are."""

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):  # from a checkpoint
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        sizes = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "seq_len", "rope_theta", "norm_eps")
        for name in sizes + (("vocab_size",) if self.vocab_size is not None else ()):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name} must be positive, not {getattr(self, name)}")
        if not isinstance(self.loops, int) or self.loops < 1:
            raise UserError(f"model.loops must be a whole number of 1 or more, not {self.loops}")
        if self.residual_scale is not None and not 0 < self.residual_scale < math.inf:
            raise UserError(f"model.residual_scale must be positive, not {self.residual_scale}")
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"model.n_head {self.n_head} is not divisible by model.n_kv_head {self.n_kv_head}: every key/value head "
                "serves the same number of query heads"
            )
        if self.d_model % (2 * self.n_head):
            raise UserError(f"model.d_model {self.d_model} does not give {self.n_head} heads of an even size")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head

    @property
    def depth(self) -> int:
        """How many layers a token goes through."""
        return self.n_layer * self.loops

    @property
    def branch_scale(self) -> float:
        """What residual branches are multiplied by."""
        return 1.0 if self.residual_scale is None else self.residual_scale / self.depth

    def outline(self) -> str:
        """The size in a few words: 24 layers × 2048, or 2 layers run 4 times × 2048."""
        return f"{self.n_layer} layers{f' run {self.loops} times' if self.loops > 1 else ''} × {self.d_model}"

    def unrolled(self) -> "LlamaConfig":
        """The shape of the model that computes the same without loops."""
        return replace(self, n_layer=self.depth, loops=1)


class Linear(nn.Module):
    """x @ weightᵀ in x's dtype: the weight is an fp32 master with a copy in that dtype beside it (or FSDP2's copy itself)."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.compute_weight: Tensor | None = None  # neither parameter nor buffer: it follows the weight
        self._made_from: tuple | None = None  # the weight that `compute_weight` is a copy of, its version, and the copy's dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_weight is None or self.weight.dtype == x.dtype:
            return F.linear(x, self.weight.to(x.dtype))
        return kernels.linear(x, self.weight, self.compute_weight)

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Make the low-precision copy what the weight is now, if it has changed."""
        now = (weakref.ref(self.weight), self.weight._version, dtype)
        if self._made_from == now:
            return
        if self.compute_weight is None or self.compute_weight.shape != self.weight.shape or self.compute_weight.dtype != dtype:
            self.compute_weight = torch.empty_like(self.weight, dtype=dtype, requires_grad=False)
        self.compute_weight.copy_(self.weight)
        self._made_from = now


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)


class KVCache:
    """Keys and values of one layer so far, rotated to their positions: `length` tokens of each row."""

    def __init__(self, capacity: int):
        """`capacity`: tokens of a row at most; memory is taken with the first."""
        self.capacity, self.length = capacity, 0

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, these included. ValueError for what attention's causal mask, which is square, cannot serve."""
        B, T, G, K = k_BTGK.shape
        if self.length and T != 1:
            raise ValueError(f"a cache that holds {self.length} tokens takes one more at a time, not {T}")
        if not self.length:
            self.k, self.v = (x.new_empty(B, self.capacity, G, K) for x in (k_BTGK, v_BTGK))
        new = slice(self.length, self.length + T)
        self.k[:, new], self.v[:, new] = k_BTGK, v_BTGK
        self.length += T
        return self.k[:, : self.length], self.v[:, : self.length]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.d_head = config.d_head
        self.qkv = Linear(config.d_model, sum(self.heads) * config.d_head)
        self.out = Linear(config.n_head * config.d_head, config.d_model)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        B, T = x_BTD.shape[:2]
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.d_head))
        if cache is None:
            out = kernels.rotary_attention(qkv, self.heads[1], cos, sin, documents)
        else:
            q_BTHK, k_BTGK, v_BTGK = qkv.split(self.heads, dim=2)
            q_BTHK, k_BTGK = kernels.rotary(q_BTHK, k_BTGK, cos, sin)
            k_BTGK, v_BTGK = cache.append(k_BTGK, v_BTGK)
            causal = cache.length == T  # one token behind others sees them all
            out = kernels.flash_attention(q_BTHK, k_BTGK, v_BTGK, causal=causal)
        return self.out(out.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(kernels.swiglu(self.gate_up(x_BTD)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)
        self.scale = config.branch_scale

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        attended = self.attn(self.attn_norm(x_BTD), cos, sin, documents, cache)
        normed, x_BTD = self.mlp_norm.add(attended if self.scale == 1 else attended * self.scale, x_BTD)
        return torch.add(x_BTD, self.mlp(normed), alpha=self.scale)


class Llama(nn.Module):
    """`model(tokens_BT)` gives logits_BTV; `model(tokens_BT, targets_BT)` gives the mean loss in nats per target.

    With a `cache`, one KVCache for each layer of its depth, the tokens go on behind those that it holds: any number of them the
    first time, then one at a time. It is for documents by themselves: ValueError with end_of_text set.

    Parameters are fp32 masters. `compute_dtype` is what the embedding's output is cast to, and everything after follows
    it. With `end_of_text` set to a token id, attention stays within the documents that this token ends. Built under
    `torch.device("meta")`, the model is left without values: `to_empty`, then `init_weights`.
    """

    config: LlamaConfig
    blocks: Any  # a ModuleList of Block
    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: whatever the embedding's weight is
        self.keeps_compute_weights = False  # whether linear layers keep a copy of their weight in compute_dtype
        self.end_of_text: int | None = None  # None: attention sees the whole row
        self.embed = nn.Embedding(config.vocab_size, config.d_model, _weight=torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight  # type: ignore[assignment]
        half = (config.seq_len, config.d_head // 2)
        self.register_buffer("cos", torch.empty(half), persistent=False)
        self.register_buffer("sin", torch.empty(half), persistent=False)
        if not self.embed.weight.is_meta:
            self.init_weights(seed)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: list[KVCache] | None = None) -> Tensor:
        start = cache[0].length if cache else 0
        end = start + tokens_BT.shape[1]
        if self.config.seq_len < end:
            raise ValueError(f"{end} tokens are longer than seq_len {self.config.seq_len}")
        if cache and self.end_of_text is not None:
            raise ValueError("a cache does not keep documents apart: leave it out, or set end_of_text to None")
        if self.keeps_compute_weights:
            self.refresh()
        x_BTD = self.embed(tokens_BT)
        if self.compute_dtype is not None:
            x_BTD = x_BTD.to(self.compute_dtype)
        documents = None
        if self.end_of_text is not None:  # translated here once for all blocks
            cu_seqlens = document_starts(tokens_BT, self.end_of_text)
            documents = kernels.documents(cu_seqlens, tokens_BT.numel(), x_BTD, self.config.d_head)
        caches: list[KVCache] | list[None] = cache or [None] * self.config.depth
        for block, kept in zip([*self.blocks] * self.config.loops, caches, strict=True):
            x_BTD = block(x_BTD, self.cos[start:end], self.sin[start:end], documents, kept)
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return self.head(x_BTD)
        return kernels.linear_cross_entropy(x_BTD, self.head.weight, targets_BT)

    def refresh(self) -> None:
        """Bring the low-precision copies of the blocks' weights up to date; a copy whose weight has not changed stays."""
        for module in self.blocks.modules():
            if isinstance(module, Linear):
                module.refresh(self.compute_dtype or module.weight.dtype)

    def matrices(self) -> dict[Tensor, tuple[int, ...]]:
        """The parameters of the blocks in which matrices lie, and the rows of each: (q, k, v), (out,), (gate, up), (down,)."""
        found: dict[Tensor, tuple[int, ...]] = {}
        for block in self.blocks:
            found[block.attn.qkv.weight] = tuple(heads * self.config.d_head for heads in block.attn.heads)
            found[block.attn.out.weight] = (self.config.d_model,)
            found[block.mlp.gate_up.weight] = (self.config.d_ff, self.config.d_ff)
            found[block.mlp.down.weight] = (self.config.d_model,)
        return found

    def init_rope(self) -> None:
        angles = rope_angles(self.config, self.cos.device)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    @torch.no_grad()
    def init_weights(self, seed: int, write: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Give every parameter and buffer its first value and check that none was left out.

        `write(parameter, value)` puts a whole value into a parameter; a sharded model passes its own.
        """
        self.init_rope()
        for name, parameter in self.named_parameters():
            parameter.fill_(math.nan)  # what is not written below is found below
            write(parameter, initial_value(name, parameter.shape, self.config, seed, parameter.device))
        for name, parameter in self.named_parameters():
            if not local_shard(parameter).isfinite().all():
                raise RuntimeError(f"parameter {name} was not initialised")


def document_starts(tokens_BT: Tensor, end_of_text: int) -> Tensor:
    """(B·T + 1,) int32 for flash_attention's cu_seqlens: where a document or row starts, in order, then B·T to the end.

    It is always this long, so that no size depends on the text: the GPU is not waited for and nothing is compiled anew.
    """
    B, T = tokens_BT.shape
    starts_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    starts_BT[:, 1:] = tokens_BT[:, :-1] == end_of_text
    places = torch.where(starts_BT.flatten(), torch.arange(B * T, device=tokens_BT.device), B * T)
    return F.pad(places.sort().values, (0, 1), value=B * T).to(torch.int32)


def rope_angles(config: LlamaConfig, device: torch.device) -> Tensor:
    """(seq_len, d_head/2) fp32: position times θ^(−2i/d_head). RoFormer, arXiv 2104.09864."""
    exponents = torch.arange(0, config.d_head, 2, dtype=torch.float32, device=device) / config.d_head
    frequencies = config.rope_theta**-exponents
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_seq_len * frequencies / (2 * math.pi)  # within the original context
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        frequencies = torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0, 1))
    positions = torch.arange(config.seq_len, dtype=torch.float32, device=device)
    return torch.outer(positions, frequencies)


def initial_value(name: str, shape: torch.Size, config: LlamaConfig, seed: int, device: torch.device) -> Tensor:
    """The fp32 value of one whole parameter before training, a function of (name, shape, config, seed) alone.

    Norm gains are 1. Matrices are N(0, 2/(5·fan_in)), the two that write to the residual stream N(0, 1/(fan_in·depth²))
    ("Stacking Your Transformers", arXiv 2405.15319, released code). An embedding's fan-in is d_model. With a residual_scale,
    which divides what is written by the depth itself, those two are N(0, 1/fan_in), and an embedding that is not the head too
    is N(0, 1): beside a smaller one the branches would still count for less in a deeper model (study/coordinates.py).
    A generator per name makes the values independent of the order of creation and of the number of devices.
    """
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    fan_in, scaled = shape[1], config.residual_scale is not None
    if name.endswith(RESIDUAL_OUTPUTS):
        std = 1 / (math.sqrt(fan_in) * (1 if scaled else config.depth))
    else:
        std = 1.0 if scaled and name == "embed.weight" and not config.tie_embeddings else math.sqrt(2 / (5 * fan_in))
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device=device).normal_(0, std, generator=generator)
