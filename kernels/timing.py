"""Timing that can be compared: calls interleaved, on a GPU with cold caches, every sample kept."""

import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU
SLEEP_CYCLES = 2_000_000


def interleaved(functions: dict[str, Callable[[], object]], samples: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `samples` calls of each function, after two calls to warm up.

    A round calls every function once and each round starts with another, so that a slow moment hits them all alike. On CUDA
    the time is the GPU's own, between two events. Before each call the L2 cache is overwritten and the GPU sleeps for about a
    millisecond, so that the CPU has queued all of the call before it begins and no launch is waited for.
    """
    for function in functions.values():
        function()
        function()
    one = _on_cuda if device.type == "cuda" else _on_cpu
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(samples):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name, seconds in zip(order, one([functions[name] for name in order], device), strict=True):
            times[name].append(seconds)
    return times


def _on_cuda(functions: list[Callable[[], object]], device: torch.device) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in functions]
    for function, (start, end) in zip(functions, marks, strict=True):
        flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def _on_cpu(functions: list[Callable[[], object]], device: torch.device) -> list[float]:
    seconds = []
    for function in functions:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds
