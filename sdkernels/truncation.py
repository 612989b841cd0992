"""Truncated distributions: q = softmax(logits / temperature) on the tokens that top_k, top_p and min_p keep."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdkernels import _check, vocab_parallel
from sdkernels.rows.layout import RowSupport, as_rows, kernel_temperature
from sdkernels.rows.support import LISTED, row_support
from sdkernels.rows.truncated import truncated_log_softmax as rows_log_softmax
from sdkernels.vocab_parallel import Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Support(NamedTuple):
    """A truncated distribution in sparse form, as `truncated_support` returns it.

    Attributes:
        token_ids: (..., K) int64, most probable first, ties by id; -1 marks an unused place.
        log_probs: (..., K) log q of these tokens in nats, -inf in unused places; each row's probabilities sum to 1. (Of
            an inference engine's top log-probs, which do not, take ``log_softmax(-1)``.)
        size: (...) int64, |S|, also where it is larger than K; 0 for masked rows.
        temperature: what divided the logits, a number or a tensor (...).
    """

    token_ids: Tensor
    log_probs: Tensor
    size: Tensor
    temperature: float | Tensor

    def to(self, device: torch.device | str) -> Support:
        """The same on another device."""
        temperature = self.temperature.to(device) if isinstance(self.temperature, Tensor) else self.temperature
        return Support(self.token_ids.to(device), self.log_probs.to(device), self.size.to(device), temperature)


def checked_filters(
    top_k: int | None, top_p: float | None, min_p: float | None, logits: Tensor, shard: Shard | None = None
) -> Filters:
    """Checked filters; of a shard top_k may be more than it has columns."""
    vocab = logits.shape[-1] if shard is None else sys.maxsize
    return Filters(*_check.filters(top_k, top_p, min_p, vocab))


class Filters(NamedTuple):
    """Checked truncation filters; 0, 1.0 and 0.0 keep everything."""

    top_k: int
    top_p: float
    min_p: float

    @property
    def active(self) -> bool:
        """Whether any of them can drop a token."""
        return self != Filters(0, 1.0, 0.0)

    def given(self) -> dict[str, int | float | None]:
        """The options again, None for a filter that is off."""
        return {name: value if value != off else None
                for name, value, off in zip(self._fields, self, (0, 1.0, 0.0), strict=True)}  # fmt: skip


def rows_support(
    rows: Tensor,
    mask: Tensor | None,
    temperature: tuple[float, Tensor | None],
    filters: Filters,
    capacity: int,
    partial: bool = False,
    shard: Shard | None = None,
) -> RowSupport:
    """The supports of rows as `as_rows` returns them, with lists of at most `capacity` ids; of a shard without."""
    if shard is not None:
        keep = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device) if mask is None else mask
        return vocab_parallel.support(rows, keep, temperature, filters, shard)
    mask = None if mask is None else mask.reshape(rows.shape[:-1]).contiguous()
    return RowSupport(*row_support(rows.detach(), mask, *temperature, *filters, capacity, partial))


def truncated_log_softmax(
    logits: Tensor,  # (..., V)
    temperature: float | Tensor = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    dtype: torch.dtype | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Tensor:
    """log q, where q is softmax(logits / temperature) renormalised on its support S: log q on S, -inf elsewhere.

    S is what survives, in transformers' order: `top_k` keeps the k largest; `top_p` renormalises and keeps the fewest
    largest whose mass reaches it; `min_p` keeps z >= max + T log(min_p). Ties with the last token kept are kept, so S
    is {v : z_v >= threshold} whatever the order of the vocabulary. A logit of -inf is never in S, the largest always
    is.

    The gradient for an upstream g is (g - q sum_S(g)) / temperature on S and 0 elsewhere; S is a constant, and g
    outside S is not read. (Products of q and log q are 0 * -inf there: `token_log_prob` gives q's entropy.)

    One sweep reads the logits and one writes the result: nothing is sorted. Where |S| <= 64 backward reads |S| numbers
    of g and writes the gradient; larger supports are read again, 2 bytes per bfloat16 logit. On a GPU the search for S
    notes candidates: 16 kB a token until it is over, 32 kB where top_k > 256.

    Args:
        logits: (..., V) float64, float32, bfloat16 or float16.
        temperature: divides the logits; a number > 0, or a tensor (...), or (...) without time.
        top_k: at least 0; None or 0 is off.
        top_p: in (0, 1]; None or 1 is off.
        min_p: in [0, 1]; None or 0 is off.
        dtype: of the result, as in `torch.log_softmax`; None means the logits'.
        group: a process group over which the vocabulary is sharded in rank order: logits, result and upstream gradient
            are (..., V_r) of whole rows. Exchanges: one of statistics and one of sums on S; top_k and top_p take 7 of
            counts and 7 of masses (4 of 16-bit logits, 13 of float64), and one more together; backward takes one.
        vocab_start: this rank's first global id; None means equal shards.

    Returns:
        (..., V) in nats. A row that holds NaN or +inf, or only -inf, is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check.logits("logits", logits)
    if dtype is not None and dtype not in _check.FLOATS:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    shape = logits.shape[:-1]
    temperature = _check.temperature(temperature, shape, None, logits)
    shard = shard_of(group, vocab_start, logits)
    filters = checked_filters(top_k, top_p, min_p, logits, shard)
    rows = as_rows(logits.double() if dtype == torch.float64 else logits)
    scaling = kernel_temperature(temperature, shape, None)
    if shard is not None:
        result = vocab_parallel.log_softmax(rows, scaling, filters, logits.dtype if dtype is None else dtype, shard)
        return result.reshape(logits.shape)
    support = rows_support(rows, None, scaling, filters, LISTED if filters.active else 0)
    return rows_log_softmax(rows, *scaling, *support, logits.dtype if dtype is None else dtype).reshape(logits.shape)


def truncated_support(
    logits: Tensor,  # (..., V)
    temperature: float | Tensor = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    max_size: int,
    mask: Tensor | None = None,
) -> Support:
    """The distribution q of `truncated_log_softmax` in sparse form: ids and log-probs of at most `max_size` tokens.

    Where |S| > max_size the `max_size` most probable are kept and renormalised: another distribution than q. `size`
    tells the true |S|, so check ``(support.size > max_size).any()``.

    On a GPU the search takes up to 32 kB a token for its time; with `max_size` above 4,096 it is a sort of float64
    rows, some of them at a time.

    Args:
        logits: (..., V) float64, float32, bfloat16 or float16; read once.
        temperature, top_k, top_p, min_p: as for `truncated_log_softmax`.
        max_size: at least 1, the places K of each row.
        mask: (...), kept where non-zero; masked rows are not read, their supports are empty.

    Returns:
        Support(token_ids, log_probs, size, temperature): (..., K) int64, (..., K) float32 (float64 for float64 logits),
        (...) int64, without gradient. A row that holds NaN or +inf, or only -inf, is empty.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check.logits("logits", logits)
    shape = logits.shape[:-1]
    given = temperature
    temperature = _check.temperature(temperature, shape, None, logits)
    filters = checked_filters(top_k, top_p, min_p, logits)
    places = _check.integer("max_size", max_size, 1)
    mask = _check.mask("mask", mask, shape, logits)
    scaling = kernel_temperature(temperature, shape, None)
    found = rows_support(as_rows(logits), mask, scaling, filters, places, partial=True)
    kept_share = found.log_probs.logsumexp(-1, keepdim=True)
    log_probs = torch.where(found.size.unsqueeze(-1) > places, found.log_probs - kept_share, found.log_probs)
    token_ids = found.token_ids.long().reshape(*shape, places)
    return Support(token_ids, log_probs.reshape(*shape, places), found.size.reshape(shape),
                   given.detach() if isinstance(given, Tensor) else given)  # fmt: skip


def save_support(path: str | os.PathLike[str], support: Support) -> None:
    """Write a `Support` to a safetensors file: all of it, or, if interrupted, nothing."""
    if not isinstance(support, Support):
        raise TypeError(f"support must be a Support, got {type(support).__name__}")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
    temperature = support.temperature
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float64)
    tensors = support._replace(token_ids=support.token_ids.int(), temperature=temperature)._asdict()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_support(path: str | os.PathLike[str], rows: slice | None = None) -> Support:
    """Read a `Support` that `save_support` wrote, onto the CPU.

    Args:
        path: The file.
        rows: Which entries of the first dimension, a slice; the others are not read. Default: all.

    Raises:
        TypeError: rows is something else.
        ValueError: the file holds something else.
    """
    rows = slice(None) if rows is None else rows
    if not isinstance(rows, slice):
        raise TypeError(f"rows must be a slice, got {type(rows).__name__}")
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(Support._fields):
                raise ValueError(f"{os.fspath(path)} holds {sorted(file.keys())}, not the fields of a Support")
            token_ids, log_probs, size = (file.get_slice(name)[rows] for name in Support._fields[:3])
            temperature = file.get_tensor("temperature")
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file: {error}") from error
    return Support(token_ids.long(), log_probs, size, temperature[rows] if temperature.dim() else temperature.item())
