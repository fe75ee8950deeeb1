"""Checks before a run touches anything: a mistake is found in seconds, and not after days of training."""

import dataclasses
import os
import sys
from typing import NamedTuple

import torch

from nanostack import kernels, track
from nanostack.config import Train
from nanostack.device import check_room, free_bytes
from nanostack.errors import UserError
from nanostack.flops import n_params
from nanostack.memory import check_batch
from nanostack.optimizer import state_numbers
from nanostack.parallel import Placement, is_main_rank, micro_steps, on_rank_0, world_size
from nanostack.text.dataset import verify
from nanostack.text.manifest import load_manifest, manifest_sha256


class Checked(NamedTuple):
    config: Train  # with the data's vocabulary
    kernels: str  # the backend that will run: triton, c or torch
    micro_steps: int  # micro-batches of every rank that make one step
    manifest_sha256: str


def check(config: Train, placement: Placement) -> Checked:
    """Raise `UserError` for the first mistake; every rank must call it. Sets the backend of all kernels."""
    if placement.mesh is not None and any(stage.growth and stage.growth.width for stage in config.stages):
        raise UserError("width grows on one device only: grow the checkpoint with grow.py, or run one process")
    backend = choose_kernels(config.kernels, placement)
    attention = backend_of_attention(config, placement, backend)
    on_rank_0(track.check, config.track)
    on_rank_0(verify, config.data.path)
    config = with_vocabulary(config)
    check_memory(config, placement, attention)
    if config.cuda_graph and config.data.document_mask and attention == "torch":
        raise UserError(
            "--cuda_graph: --data.document_mask with torch's attention waits for the device, so it cannot be captured"
        )
    steps = micro_steps(config.batch_tokens, config.micro_batch, config.model.seq_len)
    return Checked(config, backend, steps, manifest_sha256(config.data.path))


def choose_kernels(name: str, placement: Placement) -> str:
    """Set the backend of all kernels. Returns the one that will run: triton, c or torch. Says why where "auto" is torch."""
    on_gpu = placement.device.type == "cuda"
    reason = kernels.unavailable_reason(placement.device)
    if reason is None and on_gpu and not kernels.dispatch.launcher_compiler():
        reason = "Triton needs a C compiler (gcc or clang, or the one that CC names)."
    if reason is None and not on_gpu and placement.dtype != torch.float32:
        reason = "Triton's interpreter is right in float32 only; add --dtype float32"
    if name == "triton" and reason:
        raise UserError(f"--kernels triton: {reason}")
    if name == "c":
        reason = "the C kernels run on the CPU only." if on_gpu else kernels.cpu.unavailable_reason()
        if reason:
            raise UserError(f"--kernels c: {reason}")
    kernels.set_backend("torch" if name == "auto" and on_gpu and reason else name)
    if name != "auto":
        return name
    reason = reason if on_gpu else kernels.cpu.unavailable_reason()
    best = "triton" if on_gpu else "c"
    said = [f"torch computes in place of the {best} kernels: {reason}"] if reason else []
    if not on_gpu and torch.backends.mps.is_available():
        said.append("The GPU of this Mac (MPS) is not used: training runs on the CPU.")
    if said and is_main_rank():
        print("note:", *said, file=sys.stderr)
    return "torch" if reason else best


def backend_of_attention(config: Train, placement: Placement, backend: str) -> str:
    """That of all kernels, or torch where registers do not hold a head, which is said. Asked for by name, Triton is refused."""
    widest, d_head = kernels.widest_head(placement.device, placement.dtype), max(m.head_dim for m in config.shapes())
    if backend != "triton" or d_head <= widest:
        return backend
    reason = f"here the kernel takes a d_head of at most {widest}, not {d_head}"
    if config.kernels == "triton":
        raise UserError(f"--kernels triton: {reason}")
    if is_main_rank():
        print(f"note: torch computes attention in place of the triton kernel: {reason}", file=sys.stderr)
    return "torch"


def with_vocabulary(config: Train) -> Train:
    """The config with the data's vocabulary, rounded up to 128, where it leaves it open."""
    n_vocab = load_manifest(config.data.path)["tokenizer"]["n_vocab"]
    wanted = config.model.vocab_size
    if wanted is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=-(-n_vocab // 128) * 128))
    if wanted < n_vocab:
        raise UserError(f"model.vocab_size {wanted} is too small: {config.data.path} holds token ids up to {n_vocab - 1}")
    return config


def moment_bytes(config: Train) -> int:
    """Bytes of the moments of the largest stage."""
    return state_numbers(config.shapes()[-1], config.optim.name) * getattr(torch, config.optim.moments).itemsize


def copy_bytes(config: Train, ranks: int, shards: int, here: int) -> float:
    """Bytes that the copies of weights and moments take in a host with `here` of the ranks, from which a checkpoint is written:
    one of all for a single file, or one of its own for each rank."""
    whole = 4 * n_params(config.shapes()[-1]) + moment_bytes(config)
    return whole / shards * here if config.saves_shards(ranks) else whole


def check_memory(config: Train, placement: Placement, backend: str) -> None:
    """Raise `UserError` where the largest stage, a checkpoint or a micro-batch does not fit."""
    largest = config.shapes()[-1]
    state_bytes = (8 * n_params(largest) + moment_bytes(config)) / placement.shards
    check_room(placement.device, state_bytes, "the largest stage, weights, gradients and moments,")
    if placement.device.type == "cuda":
        what, ranks = "the copy of weights and moments that becomes a checkpoint", world_size()
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or min(ranks, torch.cuda.device_count()))
        saved = copy_bytes(config, ranks, placement.shards, here)
        if config.saves_shards(ranks):
            check_room(torch.device("cpu"), saved, what)
        else:
            on_rank_0(check_room, torch.device("cpu"), saved, what)
    # The C kernels take less memory than what is traced. For several devices there is an estimate only.
    slack = 1.5 if backend == "c" or placement.mesh is not None else 1.0
    free = free_bytes(placement.device)
    on_rank_0(check_batch, config, largest, placement.dtype, backend == "triton", free, slack, placement.shards)
