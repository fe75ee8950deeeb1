"""The Llama, in one file: RMSNorm, rotary positions, grouped-query attention, SwiGLU; optional is what Mistral and Qwen add.

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
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanostack import kernels
from nanostack.cache import KVCache
from nanostack.errors import UserError
from nanostack.kernels import Documents
from nanostack.shards import local_shard

# What writes to the residual stream.
RESIDUAL_OUTPUTS = ("attn.out.weight", "attn.out.bias", "mlp.down.weight", "mlp.down.bias")


if TYPE_CHECKING:
    VocabularySize: TypeAlias = int  # of every model that is built
else:
    VocabularySize = int | None  # a run's config may leave it to the data


@dataclass(frozen=True)
class RopeScaling:
    """A longer context than rotary positions were first trained with: frequencies are divided by `factor`.

    linear: all of them. llama3 (Llama 3.1): slow ones, fast ones stay, those between are mixed. yarn (arXiv 2309.00071): the
    same with another mixture, and cos and sin are multiplied by attention_factor, 0.1 · ln(factor) + 1 unless given.
    """

    factor: float
    low_freq_factor: float = 1.0  # llama3: turns within the original context up to which a frequency is slow
    high_freq_factor: float = 4.0  # llama3: from which on it is fast
    original_seq_len: int | None = None  # llama3, yarn
    kind: Literal["llama3", "linear", "yarn"] = "llama3"
    beta_fast: float = 32.0  # yarn: turns from which on a frequency is fast
    beta_slow: float = 1.0  # yarn: up to which it is slow
    attention_factor: float | None = None
    truncate: bool = True  # yarn: the mixture begins and ends at whole channels

    def __post_init__(self):
        positive = all(0 < value < math.inf for value in (self.factor, self.beta_fast, self.beta_slow))
        if not positive or (self.kind != "linear" and not self.original_seq_len):
            raise UserError(f"model.rope_scaling takes positive numbers, and original_seq_len unless it is linear, not {self}")


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
    d_head: int | None = None
    """Channels of a head; None: d_model / n_head, which is what `head_dim` says then."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on each head of q and k before rotary, with one gain for all heads of q and one for those of k."""
    residual_scale: float | None = None
    """Residual branches are multiplied by residual_scale / depth, so that rates travel with depth (CompleteP, arXiv
    2505.01618); None: they are added as they are."""

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):  # from a checkpoint
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        sizes = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "seq_len", "rope_theta", "norm_eps")
        for name in (*sizes, "vocab_size", "d_head", "residual_scale"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"model.{name} must be positive, not {value}")
        if not isinstance(self.loops, int) or self.loops < 1:
            raise UserError(f"model.loops must be a whole number of 1 or more, not {self.loops}")
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"model.n_head {self.n_head} is not divisible by model.n_kv_head {self.n_kv_head}: every key/value head "
                "serves the same number of query heads"
            )
        if self.d_head is None and self.d_model % (2 * self.n_head):
            raise UserError(f"model.d_model {self.d_model} does not give {self.n_head} heads of an even size")
        if self.head_dim % 2:
            raise UserError(f"model.d_head {self.d_head} is not even: rotary turns pairs of channels")
        if self.head_dim * self.n_head == self.d_model:
            object.__setattr__(self, "d_head", None)  # one shape is one config

    @property
    def head_dim(self) -> int:
        """Channels of a head: K."""
        return self.d_model // self.n_head if self.d_head is None else self.d_head

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
    """x @ weightᵀ + bias in x's dtype: the weight is an fp32 master with a copy in that dtype beside it, or FSDP2's copy."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.compute_weight: Tensor | None = None  # neither parameter nor buffer: it follows the weight
        self._made_from: tuple | None = None  # the weight that `compute_weight` is a copy of, its version, and the copy's dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_weight is None or self.weight.dtype == x.dtype:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return kernels.linear(x, self.weight, self.compute_weight, self.bias)

    def refresh(self, dtype: torch.dtype) -> None:
        """Make the low-precision copy what the weight is now, if it has changed. For use under torch.no_grad."""
        weight, *about = self._made_from or (lambda: None,)
        if weight() is self.weight and about == [self.weight._version, dtype]:
            return
        if self.compute_weight is None or self.compute_weight.shape != self.weight.shape or self.compute_weight.dtype != dtype:
            self.compute_weight = torch.empty_like(self.weight, dtype=dtype, requires_grad=False)
        self.compute_weight.copy_(self.weight)
        self._made_from = weakref.ref(self.weight), self.weight._version, dtype


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


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.head_dim = config.head_dim
        self.qkv = Linear(config.d_model, sum(self.heads) * config.head_dim, config.qkv_bias)
        self.out = Linear(config.n_head * config.head_dim, config.d_model, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    @property
    def norms(self) -> kernels.HeadNorms | None:
        """What is done to q and k before rotary."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return kernels.HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        B, T = x_BTD.shape[:2]
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        if cache is None:
            out = kernels.rotary_attention(qkv, self.heads[1], cos, sin, documents, self.norms)
        else:
            q_BTHK, k_BTGK, v_BTGK = qkv.split(self.heads, dim=2)
            q_BTHK, k_BTGK = kernels.turned(q_BTHK, k_BTGK, cos, sin, self.norms)
            k_BTGK, v_BTGK = cache.append(k_BTGK, v_BTGK)
            causal = cache.length == T  # one token behind others sees them all
            out = kernels.flash_attention(q_BTHK, k_BTGK, v_BTGK, causal=causal)
        return self.out(out.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff, config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, config.mlp_bias)

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
        half = (config.seq_len, config.head_dim // 2)
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
            documents = kernels.documents(cu_seqlens, tokens_BT.numel(), x_BTD, self.config.head_dim)
        caches: list[KVCache] | list[None] = cache or [None] * self.config.depth
        for block, kept in zip([*self.blocks] * self.config.loops, caches, strict=True):
            x_BTD = block(x_BTD, self.cos[start:end], self.sin[start:end], documents, kept)
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return self.head(x_BTD)
        return kernels.linear_cross_entropy(x_BTD, self.head.weight, targets_BT)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the low-precision copies of the blocks' weights up to date; a copy whose weight has not changed stays."""
        for module in self.blocks.modules():
            if isinstance(module, Linear):
                module.refresh(self.compute_dtype or module.weight.dtype)

    def matrices(self) -> dict[Tensor, tuple[int, ...]]:
        """The parameters of the blocks in which matrices lie, and the rows of each: (q, k, v), (out,), (gate, up), (down,)."""
        found: dict[Tensor, tuple[int, ...]] = {}
        for block in self.blocks:
            found[block.attn.qkv.weight] = tuple(heads * self.config.head_dim for heads in block.attn.heads)
            found[block.attn.out.weight] = (self.config.d_model,)
            found[block.mlp.gate_up.weight] = (self.config.d_ff, self.config.d_ff)
            found[block.mlp.down.weight] = (self.config.d_model,)
        return found

    def init_rope(self) -> None:
        angles, factor = rope_angles(self.config, self.cos.device), attention_factor(self.config.rope_scaling)
        self.cos.copy_(angles.cos() * factor)
        self.sin.copy_(angles.sin() * factor)

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
    """(seq_len, K/2) fp32: position times θ^(−2i/K), or what rope_scaling makes of it. RoFormer, arXiv 2104.09864."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if (scaling := config.rope_scaling) is not None:
        kept = _kept(frequencies, config.rope_theta, scaling)
        frequencies = torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0, 1))
    positions = torch.arange(config.seq_len, dtype=torch.float32, device=device)
    return torch.outer(positions, frequencies)


def _kept(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """(K/2,) how far each frequency stays as it is: 1 or more for a fast one, 0 or less for a slow one."""
    half, original = len(frequencies), scaling.original_seq_len
    if scaling.kind == "linear" or original is None:
        return torch.zeros_like(frequencies)
    if scaling.kind == "llama3":
        turns = original * frequencies / (2 * math.pi)  # within the original context
        if scaling.high_freq_factor <= scaling.low_freq_factor:  # none is between them
            return (turns >= scaling.low_freq_factor).float()
        return (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    # The channels that make so many turns: the mixture goes from one to the other.
    places = [half * math.log(original / (n * 2 * math.pi)) / math.log(theta) for n in (scaling.beta_fast, scaling.beta_slow)]
    first, last = (math.floor(places[0]), math.ceil(places[1])) if scaling.truncate else places
    first, last = max(first, 0), min(last, 2 * half - 1)
    return 1 - (torch.arange(half, dtype=torch.float32, device=frequencies.device) - first) / (last - first or 0.001)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return max(1.0, 0.1 * math.log(scaling.factor) + 1) if scaling.attention_factor is None else scaling.attention_factor


def initial_value(name: str, shape: torch.Size, config: LlamaConfig, seed: int, device: torch.device) -> Tensor:
    """The fp32 value of one whole parameter before training, a function of (name, shape, config, seed) alone.

    Gains are 1, biases 0. Matrices are N(0, 2/(5·fan_in)), the two that write to the residual stream N(0, 1/(fan_in·depth²))
    ("Stacking Your Transformers", arXiv 2405.15319, released code). An embedding's fan-in is d_model. With a residual_scale,
    which divides what is written by the depth itself, those two are N(0, 1/fan_in), and an embedding that is not the head too
    is N(0, 1): beside a smaller one the branches would still count for less in a deeper model (study/coordinates.py).
    A generator per name makes the values independent of the order of creation and of the number of devices.
    """
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)
    fan_in, scaled = shape[1], config.residual_scale is not None
    if name.endswith(RESIDUAL_OUTPUTS):
        std = 1 / (math.sqrt(fan_in) * (1 if scaled else config.depth))
    else:
        std = 1.0 if scaled and name == "embed.weight" and not config.tie_embeddings else math.sqrt(2 / (5 * fan_in))
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device=device).normal_(0, std, generator=generator)
