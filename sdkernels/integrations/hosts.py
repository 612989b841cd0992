"""Whether the host is one whose private hooks an integration knows."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Mapping
from pkgutil import resolve_name


def check_host(distribution: str, tested: str, extra: str, hooks: Mapping[str, str]) -> None:
    """Raise ImportError, in one line, unless the host has the hooks that were there when it was tested.

    Args:
        distribution: The host's name in package indices.
        tested: The versions that tests ran with.
        extra: What `pip install` takes to get one of them.
        hooks: "module:attribute" to the parameters that must come first, as "self, model, inputs"; "" for an attribute
            that must only be there.

    """
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{distribution} is not installed: pip install '{extra}' (tested with {tested})") from None
    for hook, wanted in hooks.items():
        fault = _fault(hook, wanted)
        if fault:
            raise ImportError(f"{distribution} {version} {fault}; sdkernels was tested with {distribution} {tested}")


def _fault(hook: str, wanted: str) -> str | None:
    try:
        found = resolve_name(hook)
    except (ImportError, AttributeError) as error:
        return f"has no {hook.replace(':', '.')} ({error})"
    if not wanted:
        return None
    names = [name.strip() for name in wanted.split(",")]
    parameters = inspect.signature(found).parameters
    if list(parameters)[: len(names)] != names:
        return f"has {hook.replace(':', '.')}({', '.join(parameters)}), not ({wanted})"
    return None
