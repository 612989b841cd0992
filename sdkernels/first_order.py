"""Gradients that are constants to autograd: to differentiate them again raises, and is not 0 without a word."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Constant(torch.autograd.Function):
    """A gradient, tied to what it was made of."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError("the gradients of sdkernels cannot be differentiated again")


def first_order(backward: Callable[..., Sequence[Tensor | None]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """An autograd function's `backward(ctx, saved, *upstream)` with gradients that cannot be differentiated again.

    `saved()` are the saved tensors, which hooks may let be unpacked only once. PyTorch's `once_differentiable` raises
    only if the upstream gradients are to be differentiated.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return tuple(backward(ctx, lambda: ctx.saved_tensors, *upstream))
        saved = ctx.saved_tensors
        sources = [x for x in (*saved, *upstream) if x is not None and x.requires_grad]
        gradients = backward(ctx, lambda: saved, *upstream)
        return tuple(None if x is None else _Constant.apply(x, *sources) for x in gradients)

    return wrapped
