"""The two shapes that a benchmarked run takes: a function without gradient, and a loss with its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.runner import Prepared

Results = dict[str, Tensor]


class Forward(Prepared):
    """A function of nothing, run without gradient."""

    def __init__(self, function: Callable[[], Results], beside: Callable[[], Results] = dict) -> None:
        self.function, self.beside = function, beside

    def reset(self) -> None:
        """Free the last results."""
        self.output = None

    @torch.no_grad()
    def run(self) -> None:
        """Forward."""
        self.output = self.function()

    def result(self) -> Results:
        """What the function gave, and what the truth must know beside it."""
        return {**self.output, **self.beside()}


class ForwardBackward(Prepared):
    """A function of a leaf, with the leaf's gradient; with `scratch` the leaf is a copy there, to be written over.

    Backward starts from the result and with the gradient that `upstream` names; `beside` is never timed.
    """

    def __init__(
        self,
        leaf: Tensor,
        loss: Callable[[Tensor], Results],
        scratch: Tensor | None = None,
        gradient: Callable[[Tensor], Results] = lambda gradient: {"gradient": gradient},
        upstream: tuple[str, Tensor | None] = ("loss", None),
        beside: Callable[[], Results] = dict,
    ) -> None:
        self.source, self.loss, self.scratch, self.gradient = leaf.detach(), loss, scratch, gradient
        self.upstream, self.beside = upstream, beside

    def reset(self) -> None:
        """A new leaf without gradient, over the same logits."""
        self.output = self.leaf = None
        source = self.source if self.scratch is None else self.scratch.copy_(self.source)
        self.leaf = source.detach().requires_grad_()

    def run(self) -> None:
        """Forward and backward."""
        self.output = self.loss(self.leaf)
        name, gradient = self.upstream
        self.output[name].backward(gradient)

    def result(self) -> Results:
        """What the function gave, the gradient, and what the truth must know beside them."""
        return {**self.output, **self.gradient(self.leaf.grad), **self.beside()}
