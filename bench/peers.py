"""What one would train the same Llama with instead: plain torch, and Hugging Face's own, as their users write it.

Both keep fp32 weights and compute in bfloat16 under autocast, as is usual; neither knows our kernels. The plain one has its
residual stream in bfloat16 too, as ours has; Hugging Face's keeps it in fp32, as it does under autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanostack.errors import UserError
from nanostack.model import LlamaConfig, rope_angles


class PlainNorm(nn.RMSNorm):
    """torch's fused RMSNorm, which takes a weight of x's dtype only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class PlainBlock(nn.Module):
    """RMSNorm, rotate-half rotary, SDPA, SwiGLU from torch.nn.functional."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, D, K = config, config.d_model, config.head_dim
        self.attn_norm = PlainNorm(D, config.norm_eps)
        self.qkv = nn.Linear(D, (config.n_head + 2 * config.n_kv_head) * K, bias=False)
        self.out = nn.Linear(config.n_head * K, D, bias=False)
        self.mlp_norm = PlainNorm(D, config.norm_eps)
        self.gate_up = nn.Linear(D, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, D, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.config
        heads = self.qkv(self.attn_norm(x_BTD)).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        q, k, v = heads.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.n_head != c.n_kv_head)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(F.silu(gate) * up)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class PlainLlama(nn.Module):
    """`model(tokens_BT, targets_BT)` gives the mean loss."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        if config.tie_embeddings:
            raise UserError("plain torch beside us has its head apart from its embedding: --model.tie_embeddings False")
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.norm = PlainNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        angles = rope_angles(config, torch.get_default_device())
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        T = tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT)
        if torch.is_autocast_enabled(x_BTD.device.type):
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos[:T], self.sin[:T])
        logits = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets_BT.flatten())


class HuggingFaceLlama(nn.Module):
    """transformers' Llama with its SDPA attention; its own loss, on targets that are shifted already."""

    def __init__(self, config: LlamaConfig, liger: bool):
        super().__init__()
        try:
            from transformers import LlamaConfig as Theirs
            from transformers import LlamaForCausalLM
        except ImportError as error:
            raise UserError("--against hf needs transformers: pip install 'nanostack[peers]'") from error
        if config.rope_scaling is not None:
            raise UserError("--against hf compares models without rope scaling")
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        theirs = Theirs(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
        self.model = LlamaForCausalLM(theirs)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.model(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss
