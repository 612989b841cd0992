"""Operators that write a gradient of rows: in memory of its own, or over the rows that it is the gradient of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdkernels.rows import layout


def gradient_operators(fill: Callable[..., None]) -> Callable[..., Tensor]:
    """Of `fill(grad, rows, ...)`, which writes `grad`, the operators `name(rows, ...)` and `name_(rows, ...)`.

    `fill` may read of its rows, once it has written, only what is not yet written. What is returned calls the first
    operator, or with `inplace=True` the second, and returns the gradient.
    """
    name = f"sdkernels::{fill.__name__}"
    schema = torch.library.infer_schema(fill, mutates_args=())
    arguments = schema.removeprefix("(Tensor grad, Tensor ").removesuffix(" -> ()")  # "rows, ...)"
    first = arguments.partition(",")[0]

    def new(rows: Tensor, *others: Any) -> Tensor:
        grad = layout.empty_rows(rows)
        if rows.shape[:-1].numel() > 0:
            fill(grad, rows, *others)
        return grad

    def over(rows: Tensor, *others: Any) -> None:
        if rows.shape[:-1].numel() > 0:
            fill(rows, rows, *others)

    make = torch.library.custom_op(name, new, mutates_args=(), schema=f"(Tensor {arguments} -> Tensor")
    make.register_fake(lambda rows, *others: layout.empty_rows(rows))
    overwrite = torch.library.custom_op(f"{name}_", over, mutates_args={first}, schema=f"(Tensor(a!) {arguments} -> ()")
    overwrite.register_fake(lambda rows, *others: None)

    def gradient(rows: Tensor, *others: Any, inplace: bool = False) -> Tensor:
        if not inplace:
            return make(rows, *others)
        if torch.is_grad_enabled():
            raise RuntimeError("inplace=True gives gradients that cannot be differentiated again (create_graph=True)")
        overwrite(rows, *others)
        return rows.detach()

    return gradient
