"""Layers that are computed twice: what a layer keeps for its backward pass is dropped and made again there.

PyTorch's `checkpoint` keeps the layer's graph, a hundred small objects in the gaps between the layer's short-lived
tensors. The next layer's tensors do not fit into what is left of those gaps, and every layer takes new memory: 29 MB
each on the 2.7 B shape. Here the graph goes with the layer, and what stays lies in memory that was set aside before the
first one. What this leaves out: arguments with a gradient besides the residual stream.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174) §3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Room:
    """What is kept of one layer: its input (B, T, E), and the random state that a dropout in it began with."""

    def __init__(self, like: Tensor) -> None:
        self.h = torch.empty_like(like, requires_grad=False)
        self.device = like.device
        self.states = [state.clone() for state in self._states()]

    def fill(self, h: Tensor) -> None:
        """Take over a layer's input, and the random state."""
        self.h.copy_(h)
        for kept, now in zip(self.states, self._states(), strict=True):
            kept.copy_(now)

    def restore_random_state(self) -> None:
        """Let the layer draw what it drew before."""
        torch.set_rng_state(self.states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.states[1], self.device)

    def _states(self) -> list[Tensor]:
        on_device = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]


def make_rooms(h: Tensor, count: int) -> list[Room]:
    """Return rooms for the inputs of `count` layers, side by side; `h` (B, T, E) has a gradient from now on."""
    # A frozen embedding has none, and then the layers' own parameters would get none.
    if count and not h.requires_grad:
        h.requires_grad_()
    return [Room(h) for _ in range(count)]


def computed_twice(room: Room, forward: Callable[..., Tensor], layer: Any, h: Tensor, *rest: Any) -> Tensor:
    """Return `forward(layer, h, *rest)`, (B, T, E), of which only what is in `room` is kept."""
    result: Tensor = _Twice.apply(h, room, forward, layer, rest)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
    return result


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, room: Room, forward: Callable[..., Tensor], layer: Any, rest: tuple[Any, ...]
    ) -> Tensor:
        room.fill(h)
        ctx.room, ctx.run = room, lambda h: forward(layer, h, *rest)
        # With a graph, so that compiled code is the same both times; it is gone when this returns.
        with torch.enable_grad():
            result: Tensor = ctx.run(h.detach().requires_grad_())
            return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        room: Room = ctx.room
        devices = [room.device] if room.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices=devices):
            room.restore_random_state()
            h = room.h.detach().requires_grad_()
            torch.autograd.backward(ctx.run(h), grad)
        return h.grad, None, None, None, None
