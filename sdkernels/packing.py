"""Options by name through an operator, whose schema knows tensors and texts only."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Values by name as an operator takes them: tensors, numbers, and a text that says what is what.

    Numbers come in a CPU tensor: another one (RLSD's lam changes every step) then compiles nothing anew.
    """

    tensors: list[Tensor]
    numbers: Tensor
    layout: str


def pack(values: dict[str, Any]) -> Packed:
    """Values by name, packed."""
    tensors, numbers, words = [], [], []
    one = torch.ones((), dtype=torch.float64)
    for name, value in values.items():
        if isinstance(value, Tensor):
            words.append(f"{name}=tensor")
            tensors.append(value)
        elif isinstance(value, float):
            words.append(f"{name}=number")
            numbers.append(one * value)
        elif isinstance(value, tuple):
            words.append(f"{name}=numbers {len(value)}")
            numbers += [one * each for each in value]
        elif value is None or isinstance(value, int | str):
            words.append(f"{name}={value!r}")
        else:  # a number of another library
            words.append(f"{name}=number")
            numbers.append(one * float(value))
    return Packed(tensors, torch.stack(numbers), ";".join(words))


def unpack(tensors: Sequence[Tensor], numbers: Tensor, layout: str) -> dict[str, Any]:
    """The values that `pack` was given."""
    values: dict[str, Any] = {}
    next_tensor, next_number = iter(tensors), iter(numbers.tolist())
    for word in layout.split(";"):
        name, kind = word.split("=", 1)
        if kind == "tensor":
            values[name] = next(next_tensor)
        elif kind == "number":
            values[name] = next(next_number)
        elif kind.startswith("numbers "):
            values[name] = tuple(next(next_number) for _ in range(int(kind.split()[1])))
        else:
            values[name] = ast.literal_eval(kind)
    return values
