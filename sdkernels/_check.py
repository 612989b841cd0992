"""Checks of arguments, before any kernel starts: a message names the argument, what it was and what it must be.

What only one function takes it checks itself, in the same words.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)


def values_are_checked(tensor: Tensor) -> bool:
    """Whether a tensor's values may be read: on the CPU, and on a GPU (where reading waits) if SDKERNELS_VALIDATE=1."""
    return tensor.device.type == "cpu" or os.environ.get("SDKERNELS_VALIDATE") == "1"


def is_tensor(name: str, value: Any) -> Tensor:
    """Refuse anything but a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{name} must be a plain torch.Tensor, got a DTensor: pass {name}.full_tensor(), or, with a "
                        f"group, {name}.to_local()")  # fmt: skip
    return value


def logits(name: str, value: Any) -> Tensor:
    """Floating logits (..., V) with V > 0."""
    is_tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., V) with V > 0, got {tuple(value.shape)}")
    return value


def same_logits(name: str, value: Any, like: Tensor) -> None:
    """Constant logits of the same shape on the same device."""
    logits(name, value)
    same_device(name, value, like)
    constant(name, value)
    if value.shape != like.shape:
        raise ValueError(f"{name} must have the student logits' shape {tuple(like.shape)}, got {tuple(value.shape)}")


def samples_of_logits(name: str, value: Any, like: Tensor) -> None:
    """Constant logits (R, ..., V), R >= 1, on the same device."""
    logits(name, value)
    same_device(name, value, like)
    constant(name, value)
    if value.dim() != like.dim() + 1 or value.shape[1:] != like.shape or value.shape[0] == 0:
        raise ValueError(f"{name} must have shape (R, ..., V) with R >= 1 for student logits of shape "
                         f"{tuple(like.shape)}, got {tuple(value.shape)}")  # fmt: skip


def head(
    name: str, hidden: Any, weight: Any, bias: Any, weight_name: str = "lm_head_weight", bias_name: str = "bias"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (..., H) and a head (V, H) with a bias (V,) or None, on one device."""
    for each, value in ((name, hidden), (weight_name, weight), (bias_name, bias)):
        if value is None and each == bias_name:
            continue
        if is_tensor(each, value).dtype not in FLOATS:
            raise TypeError(f"{each} must be float64, float32, bfloat16 or float16, got {value.dtype}")
        if value.device != hidden.device:
            raise ValueError(f"{each} is on {value.device}, but {name} is on {hidden.device}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., H) with H > 0, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{weight_name} must have shape (V, H) with V > 0, got {tuple(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name} must be hidden states (..., {weight.shape[1]}), as {weight_name} has shape "
                         f"{tuple(weight.shape)}, got shape {tuple(hidden.shape)}")  # fmt: skip
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{bias_name} must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    return hidden, weight, bias


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    """Refuse tensors on different devices."""
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the logits or log-probs are on {like.device}")


def constant(name: str, value: Tensor) -> None:
    """Refuse a tensor that expects a gradient that it will not get."""
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(f"{name} requires grad but gets no gradient here: pass {name}.detach()")


def same_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """One value per token."""
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must have one value per token, shape {tuple(shape)}, got {tuple(value.shape)}")


def token_ids(name: str, value: Any, shape: Sequence[int], like: Tensor) -> Tensor:
    """int32 or int64 ids of the leading shape."""
    is_tensor(name, value)
    if value.dtype not in INDICES:
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
    same_shape(name, value, shape)
    same_device(name, value, like)
    return value


def mask(name: str, value: Any, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """An optional mask of the leading shape, of any real dtype, as bool: kept where non-zero."""
    if value is None:
        return None
    is_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name} must be boolean, integer or floating, got {value.dtype}")
    same_shape(name, value, shape)
    same_device(name, value, like)
    constant(name, value)
    return value if value.dtype == torch.bool else value != 0


def floats(name: str, value: Any, like: Tensor) -> Tensor:
    """A floating tensor that gets no gradient."""
    is_tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    same_device(name, value, like)
    constant(name, value)
    return value


def per_token(name: str, value: Any, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """An optional floating tensor of the leading shape that gets no gradient."""
    if value is None:
        return None
    floats(name, value, like)
    same_shape(name, value, shape)
    return value


def per_sequence(name: str, value: Any, shape: Sequence[int], cu_seqlens: Tensor | None, like: Tensor) -> Tensor:
    """A floating tensor of the leading shape, or of the leading shape without time: one value per sequence."""
    floats(name, value, like)
    shape = tuple(shape)
    sequences = (cu_seqlens.numel() - 1,) if cu_seqlens is not None else shape[:-1]
    if tuple(value.shape) in (shape, sequences):
        return value
    hint = ""
    if shape and value.shape == (*shape[:-1], 1):
        hint = f"; use {name}.squeeze(-1) for one value per sequence, {name}.expand({shape}) for one per token"
    raise ValueError(f"{name} must have shape {shape} (per token) or {sequences} (per sequence), "
                     f"got {tuple(value.shape)}{hint}")  # fmt: skip


def temperature(value: Any, shape: Sequence[int], cu_seqlens: Tensor | None, like: Tensor) -> float | Tensor:
    """A finite positive number, or a tensor of them per token or per sequence."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            floats("temperature", value, like)
            return value
        return per_sequence("temperature", value, shape, cu_seqlens, like)
    return positive("temperature", value)


def same_temperature(name: str, value: float | Tensor, wanted: float | Tensor, keep: Tensor) -> None:
    """Equal temperatures, numbers or float64 (...), up to float32's rounding; tensors where values may be read."""
    rounding = 1e-7
    if not isinstance(value, Tensor) and not isinstance(wanted, Tensor):
        if abs(value - wanted) > rounding * wanted:
            raise ValueError(f"{name} must equal temperature, {wanted}, got {value}")
    elif not torch.compiler.is_compiling() and values_are_checked(keep):
        found, expected = (
            torch.as_tensor(x, dtype=torch.float64, device=keep.device).expand(keep.shape) for x in (value, wanted)
        )
        bad = ((found - expected).abs() > rounding * expected) & keep
        if bad.any():
            raise ValueError(f"{name} must equal temperature, {expected[bad][0].item():g}, "
                             f"got {found[bad][0].item():g} for an unmasked token")  # fmt: skip


def temperature_values(temperatures: Tensor, keep: Tensor) -> None:
    """The values of a temperature tensor (...), at the kept tokens."""
    bad = keep & ~((temperatures > 0) & temperatures.isfinite())
    if bad.any():
        raise ValueError(f"temperature must be finite and > 0, got {temperatures[bad][0].item()} for an unmasked token")


def token_id_values(ids: Tensor, keep: Tensor, vocab: int) -> None:
    """The values of token ids, at the kept tokens."""
    bad = keep & ((ids < 0) | (ids >= vocab))
    if bad.any():
        raise IndexError(f"token_ids must be in [0, {vocab}), or -100 for a masked token, got {ids[bad][0].item()}")


def support_ids(name: str, value: Any, shape: Sequence[int], like: Tensor) -> Tensor:
    """int32 or int64 ids (..., K)."""
    is_tensor(name, value)
    if value.dtype not in INDICES:
        raise TypeError(f"{name} must hold int32 or int64 ids, got {value.dtype}")
    if value.dim() == 0 or value.shape[:-1] != torch.Size(shape):
        raise ValueError(
            f"{name} must have shape (..., K) for tokens of shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    same_device(name, value, like)
    return value


def support_id_values(name: str, ids: Tensor, keep: Tensor, vocab: int) -> None:
    """The values of a support's ids (..., K), at the kept tokens: in the vocabulary and distinct, or -1."""
    if values_are_checked(ids):
        kept = keep.unsqueeze(-1)
        bad = kept & ((ids < -1) | (ids >= vocab))
        if bad.any():
            raise IndexError(f"{name} must hold ids in [0, {vocab}), or -1 for none, got {ids[bad][0].item()}")
        ordered = ids.where(kept, -1).sort(-1).values
        again = ordered[..., 1:][(ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != -1)]
        if again.numel() > 0:
            raise ValueError(f"{name} must hold distinct ids, got {again[0].item()} more than once for a token")


def normalised(name: str, log_probs: Tensor, token_ids: Tensor, keep: Tensor) -> None:
    """Log-probs (..., K) whose probabilities sum to 1 at the kept tokens that list any, up to rounding in 16 bits."""
    if values_are_checked(log_probs):
        mass = log_probs.double().exp().where(token_ids >= 0, 0).sum(-1)
        bad = keep & (mass > 0) & ((mass - 1).abs() > 0.02)
        if bad.any():
            raise ValueError(f"{name} must be of probabilities that sum to 1 over the listed ids, got a sum of "
                             f"{mass[bad][0].item():.4g}: renormalise with {name}.log_softmax(-1)")  # fmt: skip


def real(name: str, value: Any) -> float:
    """A Python number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number > 0."""
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return number


def finite(name: str, value: Any) -> float:
    """A finite number."""
    number = real(name, value)
    if not -math.inf < number < math.inf:  # math.isfinite breaks a compiled graph
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def reals(name: str, value: Any, count: int) -> tuple[float, ...]:
    """A sequence of so many finite numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be {count} numbers, got {type(value).__name__}")
    numbers = tuple(real(name, x) for x in value)
    if len(numbers) != count or not all(-math.inf < x < math.inf for x in numbers):
        raise ValueError(f"{name} must be {count} finite numbers, got {value!r}")
    return numbers


def at_least(name: str, value: Any, low: float) -> float:
    """A number >= low; inf is allowed."""
    number = real(name, value)
    if not number >= low:
        raise ValueError(f"{name} must be >= {low:g}, got {value}")
    return number


def unit_interval(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    number = real(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return number


def inside_unit_interval(name: str, value: Any) -> float:
    """A number in (0, 1)."""
    number = real(name, value)
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {value}")
    return number


def integer(name: str, value: Any, low: int) -> int:
    """A Python integer >= low."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    return int(value)


def filters(top_k: Any, top_p: Any, min_p: Any, vocab: int) -> tuple[int, float, float]:
    """The three truncation filters, None or what keeps everything as 0, 1.0 and 0.0."""
    k = 0 if top_k is None else integer("top_k", top_k, 0)
    p = 1.0 if top_p is None else real("top_p", top_p)
    if not 0.0 < p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    return k if k < vocab else 0, p, 0.0 if min_p is None else unit_interval("min_p", min_p)


def clip_range(value: Any) -> tuple[float, float]:
    """eps_w or (below, above), as the pair."""
    below = above = value
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"clip_range must be a number or a pair (below, above), got {value!r}")
        below, above = value
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"clip_range must be a number or a pair (below, above), got {type(value).__name__}")
    return at_least("clip_range", below, 0), at_least("clip_range", above, 0)


def optional_above(name: str, value: Any, low: float) -> float | None:
    """None, or a number > low; inf is allowed."""
    if value is None:
        return None
    number = real(name, value)
    if not number > low:
        raise ValueError(f"{name} must be > {low:g}, got {value}")
    return number


def one_of(name: str, value: Any, options: Sequence[str]) -> str:
    """One of a few words."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def cu_seqlens(value: Any, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """Optional cumulative sequence lengths of packed tokens: 0, ..., N, not decreasing."""
    if value is None:
        return None
    is_tensor("cu_seqlens", value)
    if value.dtype not in INDICES:
        raise TypeError(f"cu_seqlens must be int32 or int64, got {value.dtype}")
    same_device("cu_seqlens", value, like)
    if len(shape) != 1:
        raise ValueError(f"cu_seqlens needs packed tokens of shape (N,), got tokens of shape {tuple(shape)}")
    if value.dim() != 1 or value.numel() == 0:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(value.shape)}")
    if not torch.compiler.is_compiling() and values_are_checked(value):
        ends = value.tolist()
        if ends[0] != 0 or ends[-1] != shape[0] or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must go from 0 to {shape[0]} without decreasing, got {ends[:8]}")
    return value


def reduction(value: Any, normalizer: Any, shape: Sequence[int], cu_seqlens: Tensor | None, like: Tensor) -> None:
    """The reduction's name, its normalizer, and whether the tokens have sequences."""
    one_of("reduction", value, ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none"))
    if value.startswith("seq-mean") and len(shape) < 2 and cu_seqlens is None:
        raise ValueError(f"reduction={value!r} needs sequences: tokens of shape (B, T), or cu_seqlens; "
                         f"got tokens of shape {tuple(shape)}")  # fmt: skip
    if normalizer is None:
        return
    if value == "none":
        raise ValueError("normalizer has nothing to divide with reduction='none'")
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be a number or a 0-dim tensor, got shape {tuple(normalizer.shape)}")
        same_device("normalizer", normalizer, like)
        constant("normalizer", normalizer)
        if not torch.compiler.is_compiling() and values_are_checked(normalizer):
            number = normalizer.item()
            if not 0 <= number < math.inf:
                raise ValueError(f"normalizer must be finite and > 0, or 0 where no token is kept, got {number}")
    elif not 0 < real("normalizer", normalizer) < math.inf:
        raise ValueError(f"normalizer must be finite and > 0, got {normalizer}")


def inplace(given: Any, name: str, value: Tensor) -> None:
    """The option, and with it logits whose memory backward may overwrite: adjacent vocabulary, no tokens that share."""
    if not flag("inplace", given):
        return
    if value.stride(-1) != 1 or value.dim() > 4:
        raise ValueError(f"inplace=True needs {name} with an adjacent vocabulary and at most three leading "
                         f"dimensions, got strides {value.stride()}")  # fmt: skip
    extent = value.shape[-1]
    for stride, size in sorted(zip(value.stride()[:-1], value.shape[:-1], strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(f"inplace=True needs {name} whose tokens do not overlap in memory, "
                             f"got shape {tuple(value.shape)} with strides {value.stride()}")  # fmt: skip
        extent += (size - 1) * stride
