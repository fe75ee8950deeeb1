"""One batch forward and backward: micro-batch after micro-batch, each as it is or captured in a CUDA graph and replayed.

A graph spares the CPU the launching of some thousand kernels, which is what a small model on a fast GPU waits for. It is
captured at the first micro-batch of a run, and anew whenever what it would run has changed: growth, freezing, a ramp's end.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanostack import parallel
from nanostack.growth.ramp import is_ramping
from nanostack.model import Llama

WARM_UP = 3  # runs before a capture, as torch asks for


class Captured(NamedTuple):
    """A micro-step in a graph: what it reads and writes stays where it is."""

    about: tuple  # what it depends on: captured anew where it differs
    graph: torch.cuda.CUDAGraph
    tokens_BT: Tensor
    targets_BT: Tensor
    loss: Tensor


class MicroStep:
    """A call adds the gradients of the mean loss of tokens_BT and targets_BT, divided by `micro_steps`, to the model's.

    It returns that share of the loss, which the next call may overwrite.
    """

    def __init__(self, micro_steps: int, graphed: bool):
        self.micro_steps, self.graphed = micro_steps, graphed
        self._captured: Captured | None = None

    def __call__(self, model: Llama, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        if not self.graphed:
            return self._run(model, tokens_BT, targets_BT)
        about = (tuple((id(p), p.requires_grad) for p in model.parameters()), is_ramping(model), tokens_BT.shape)
        if self._captured is None or self._captured.about != about:
            self.forget()
            self._captured = self._capture(about, model, tokens_BT, targets_BT)
        if model.keeps_compute_weights:
            model.refresh()
        self._captured.tokens_BT.copy_(tokens_BT)
        self._captured.targets_BT.copy_(targets_BT)
        self._captured.graph.replay()
        return self._captured.loss

    def accumulate(self, model: Llama, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Add the gradients of the next `micro_steps` micro-batches to the model's. Returns their mean loss, over all ranks."""
        loss = torch.zeros((), device=model.cos.device)
        for number in range(self.micro_steps):
            parallel.sync_gradients(model, now=number + 1 == self.micro_steps)
            loss += self(model, *next(batches))
        return parallel.mean(loss)

    def forget(self) -> None:
        """Give the graph's memory back: the model is about to change."""
        self._captured = None

    def _run(self, model: Llama, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        # Micro-batches and ranks are of equal size, so this and FSDP2's mean over ranks divide the sum of all losses by the
        # step's global number of targets.
        loss = model(tokens_BT, targets_BT) / self.micro_steps
        loss.backward()
        return loss.detach()

    def _capture(self, about: tuple, model: Llama, tokens_BT: Tensor, targets_BT: Tensor) -> Captured:
        """Record one micro-step that adds to gradients which stay where they are. They are zero before and after."""
        for parameter in model.parameters():
            parameter.grad = None  # zero anyway; one that is frozen now must have none
        tokens_BT, targets_BT = tokens_BT.clone(), targets_BT.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._run(model, tokens_BT, targets_BT)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the prefetcher's thread goes on copying
            loss = self._run(model, tokens_BT, targets_BT)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        return Captured(about, graph, tokens_BT, targets_BT, loss)
