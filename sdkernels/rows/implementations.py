"""Which implementation an operator gets on a CPU: csrc, the interpreted Triton kernels, or plain PyTorch.

On CUDA an operator runs its Triton kernel. On the CPU it runs csrc/cpu, or, under Triton's own TRITON_INTERPRET=1, the
Triton kernel interpreted: that is how the kernels are tested without a GPU. float64 runs the reference everywhere, and
so do, where Triton would serve, lists of more than 4,096 ids (``support.row_support``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def compiled() -> bool:
    """Whether csrc was built when the package was installed; loads it, and says so once if it was not."""
    libraries = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if libraries:
        torch.ops.load_library(libraries[0])
        return True
    warnings.warn(
        "sdkernels was installed without its C++ kernels: its CPU functions run plain PyTorch, correct but slow. "
        "Reinstall where torch and a C++ compiler are, with --no-build-isolation.",
        stacklevel=2,
    )
    return False


def runs_triton(rows: Tensor) -> bool:
    """Whether the Triton kernel serves these rows."""
    return rows.dtype != torch.float64 and (rows.is_cuda or INTERPRETED)


def runs_csrc(rows: Tensor) -> bool:
    """Whether csrc/cpu serves these rows."""
    return rows.dtype != torch.float64 and rows.device.type == "cpu" and compiled()


def serves_both(runs: Callable[[Tensor], bool], rows: Tensor, others: Tensor | None) -> bool:
    """Whether an implementation serves the rows of a pair, the second of which may be absent."""
    return runs(rows) and (others is None or runs(others))
