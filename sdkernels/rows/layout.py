"""How rows lie in memory, and how a kernel walks them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels.reductions import over_tokens

THREADS = 256  # of a program that sweeps a row
SPANS = ("span", "temperature_span", "advantage_span")
PER_TOKEN = ("token_ids_ptr", "label_ids_ptr", "mask_ptr", "credit_mask_ptr", "temperatures_ptr", "advantages_ptr",
             "max_ptr", "pivots_ptr")  # fmt: skip
WARP_SIZE = 64 if torch.version.hip else 32


class RowSupport(NamedTuple):
    """The support S = {z >= threshold} of each row and its distribution q = softmax(z / T) on S, all detached.

    A row is *listed* if its size is at most C: then its ids and log-probs are all that later sweeps need of it. A row
    without a distribution (NaN, +inf, or only -inf) has size 0 and NaN elsewhere; a masked one has zeros.
    """

    threshold: Tensor  # (...)
    size: Tensor  # (...) int64, |S|
    max: Tensor  # (...) the largest logit
    log_sum: Tensor  # (...) float64, log sum_S exp((z - max) / T)
    entropy: Tensor  # (...) of q
    token_ids: Tensor  # (..., C) int32, the C most probable of S, ties by id; -1 where there are fewer
    log_probs: Tensor  # (..., C) their log q; -inf there


def as_rows(logits: Tensor, samples: bool = False) -> Tensor:
    """A view that the row operations read through its strides: at most three leading dimensions, adjacent vocabulary.

    ``samples`` says that one more dimension comes before them. Only a vocabulary stride other than 1, or more leading
    dimensions than three that do not merge, cost a copy.
    """
    if logits.dim() > 4 + samples:
        logits = logits.flatten(int(samples), -4)
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def kernel_temperature(
    temperature: float | Tensor, shape: torch.Size, cu_seqlens: Tensor | None
) -> tuple[float, Tensor | None]:
    """A checked temperature as the row operations take it: a number, or float values for runs of consecutive tokens."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    values = temperature.detach().double()
    return 1.0, values.reshape(1) if values.dim() == 0 else kernel_values(values, shape, cu_seqlens)


def kernel_values(values: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Per-token or per-sequence values, contiguous: one for each run of consecutive tokens."""
    return (values if cu_seqlens is None else over_tokens(values, shape, cu_seqlens)).contiguous()


def kept_tokens(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens that count: id not -100, mask not 0."""
    keep = token_ids != -100
    return keep if mask is None else keep & (mask != 0)


def span(values: Tensor, tokens: int) -> int:
    """How many consecutive tokens share one of the values."""
    return max(tokens // max(values.numel(), 1), 1)


def at_tokens(values: Tensor, shape: torch.Size) -> Tensor:
    """Values of runs of consecutive tokens, at each token."""
    tokens = shape.numel()
    return values.reshape(-1, 1).expand(-1, span(values, tokens)).reshape(-1)[:tokens].reshape(shape)


def check_temperatures(temperatures: Tensor | None, keep: Tensor | None, logits: Tensor) -> None:
    """Refuse bad temperatures at the kept tokens, where their values may be read."""
    if temperatures is not None and _check.values_are_checked(temperatures):
        values = at_tokens(temperatures, logits.shape[:-1])
        _check.temperature_values(values, torch.ones_like(values, dtype=torch.bool) if keep is None else keep)


def alignment(*tensors: Tensor) -> int:
    """16 if every row of every tensor starts at a multiple of 16 elements and 16 bytes, else 1."""
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    return 16 if math.gcd(16, *strides) == 16 and all(x.data_ptr() % 16 == 0 for x in tensors) else 1


def kernel_sizes(rows: Tensor) -> tuple[int, int]:
    """The two inner of the three leading sizes."""
    _, size1, size2 = (1,) * (4 - rows.dim()) + tuple(rows.shape[:-1])
    return size1, size2


def kernel_strides(rows: Tensor, align: int) -> tuple[int, ...]:
    """The three leading strides over `align`."""
    return tuple(stride // align for stride in (0,) * (4 - rows.dim()) + rows.stride()[:-1])


def unspecialised(*views: str) -> dict[str, list[str]]:
    """Options of `jit`: sizes, strides of views by the prefixes of their names, and addresses that make nothing new."""
    sizes = ["size1", "size2", "capacity", "pivots", "top_k", "samples", "sample_stride"]
    strides = [f"{view}stride{i}" for view in views for i in range(3)]
    return {
        "do_not_specialize": [*sizes, *strides, *SPANS],
        "do_not_specialize_on_alignment": list(PER_TOKEN),
    }


def block_options(rows: Tensor, thread_bytes: int = 32) -> dict[str, int]:
    """Launch options of a program of THREADS threads that writes a block of so many bytes a thread."""
    return {"BLOCK": thread_bytes * THREADS // rows.element_size(), **sweep_options()}


def sweep_options() -> dict[str, int]:
    """Launch options of a program of THREADS threads: without the allowance ptxas spills to fit more programs."""
    options = {"num_warps": THREADS // WARP_SIZE}
    return options if WARP_SIZE == 64 else options | {"maxnreg": 128}


def tile(rows: Tensor) -> tuple[int, int]:
    """(depth, lanes) of a tile: each thread loads 16 bytes from each of `depth` lines of a row.

    It depends on the dtype and V only, and so do the order of a row's sums and its result.
    """
    lanes = THREADS * 16 // rows.element_size()
    lines = -(-rows.shape[-1] // lanes)
    return min(8192 // lanes, 1 << (lines - 1).bit_length()), lanes


def pair_tile(rows: Tensor) -> tuple[int, int]:
    """The same for two rows side by side, 4 logits of a line a thread: more lanes of several sums each would spill."""
    lanes = 4 * THREADS
    lines = -(-rows.shape[-1] // lanes)
    return min(4, 1 << (lines - 1).bit_length()), lanes


def empty_rows(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor like the logits, of `dtype` if it is given, with adjacent vocabulary too."""
    grad = torch.empty_like(logits, dtype=dtype)
    adjacent = grad.stride(-1) == 1 or grad.shape[-1] == 1
    return grad if adjacent else torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
