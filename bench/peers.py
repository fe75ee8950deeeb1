"""What one would train with instead: the same Llama in plain torch, by Hugging Face and by litgpt, and nanoGPT.

The Llamas keep fp32 weights and compute in bfloat16 under autocast, as is usual; none knows our kernels. The plain one has its
residual stream in bfloat16 too, as ours has; Hugging Face's keeps it in fp32, as it does under autocast.
"""

import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanostack.config import Train
from nanostack.device import choose_device, compute_dtype
from nanostack.errors import UserError
from nanostack.model import LlamaConfig, rope_angles
from nanostack.text.dataset import Tokens


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


class LitLlama(nn.Module):
    """litgpt's GPT in the shape of a Llama, with its cross entropy, as its `pretrain` calls them."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        try:
            from litgpt import GPT, Config
            from litgpt.utils import chunked_cross_entropy
        except ImportError as error:
            raise UserError("--against litgpt needs litgpt: pip install litgpt, after torch") from error
        if config.rope_scaling is not None or config.tie_embeddings:
            raise UserError("--against litgpt compares models without rope scaling, with a head of their own")
        self.loss = chunked_cross_entropy
        self.model = GPT(
            Config(
                name="ours",
                hf_config={},
                block_size=config.seq_len,
                padded_vocab_size=config.vocab_size,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_query_groups=config.n_kv_head,
                n_embd=config.d_model,
                head_size=config.head_dim,
                intermediate_size=config.d_ff,
                rotary_percentage=1.0,
                rope_base=int(config.rope_theta),
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                norm_eps=config.norm_eps,
                mlp_class_name="LLaMAMLP",
            )
        )

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.loss(self.model(tokens_BT), targets_BT, chunk_size=0)


def nanogpt(clone: Path, config: Train, steps: int, began: float) -> dict:
    """Run nanoGPT's own train.py: seconds of each step, those from `began` to the end of the first, peak of memory in bytes.

    Its model is a GPT-2 of the config's layers, heads, width and vocabulary, on its ids and with its batch; without
    torch.compile, as its README trains on a CPU. It draws batches in its own order, and first evaluates, on one batch.
    """
    scripts = [clone / name for name in ("train.py", "model.py", "configurator.py")]
    if missing := [path.name for path in scripts if not path.is_file()]:
        raise UserError(f"--nanogpt {clone} is no clone of github.com/karpathy/nanoGPT: it has no {missing[0]}")
    model, device = config.model, choose_device("auto")
    if device.type != "cpu" or compute_dtype(device, config.dtype) != torch.float32:
        raise UserError("--against nanogpt times what its README does on a CPU, in float32: add --dtype float32")
    if (model.vocab_size or 0) > 1 << 16:
        raise UserError(f"nanoGPT keeps ids in 16 bits, and the vocabulary has {model.vocab_size}")
    options = {
        **dict.fromkeys(("eval_interval", "lr_decay_iters"), 2**31),
        **{"dataset": "bench", "device": "cpu", "compile": False, "dtype": "float32", "eval_iters": 1, "log_interval": 1},
        **{"n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.d_model, "block_size": model.seq_len},
        **{"batch_size": config.micro_batch, "always_save_checkpoint": False, "max_iters": steps - 1},
        **{"gradient_accumulation_steps": config.batch_tokens // (config.micro_batch * model.seq_len)},
    }
    with TemporaryDirectory() as folder:
        data = Path(folder, "data/bench")
        data.mkdir(parents=True)
        for path in scripts:
            shutil.copy(path, folder)
        for split in ("train", "val"):
            tokens = Tokens(config.data.path, split, model.seq_len)
            tokens.blocks(0, min(tokens.n_blocks, 10_000))[:, :-1].astype(np.uint16).tofile(data / f"{split}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": model.vocab_size}))
        command = [sys.executable, "-u", "train.py", *(f"--{name}={value}" for name, value in options.items())]
        process = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seconds, said, first = [], [], 0.0
        for line in process.stdout or ():
            said.append(line)
            if found := re.match(r"iter \d+: .* time ([\d.]+)ms", line):
                seconds.append(float(found[1]) / 1e3)
                first = first or time.time() - began
        if process.wait() or len(seconds) != steps:
            raise UserError(f"nanoGPT ended with exit code {process.returncode}: {said[-1].strip() if said else ''}")
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": seconds, "first_step": first, "peak_bytes": peak, "kernels": "torch"}
