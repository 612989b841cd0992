"""What the loss modules share."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import nn


class LossModule(nn.Module):
    """A loss configured once: its keyword options here, its tensors (and any other option) at each call."""

    function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = {name for name, each in signature(self.function).parameters.items() if each.kind is each.KEYWORD_ONLY}
        for name in options.keys() - known:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        self.options = options

    def forward(self, *tensors: Any, **options: Any) -> Any:
        """The loss of these tensors; options given here win over those given to the module."""
        return self.function(*tensors, **{**self.options, **options})

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
