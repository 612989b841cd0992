"""The functions on logits as the fused LM head runs them on a chunk: per token, without a reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sdkernels.grpo import grpo_loss
from sdkernels.opsd import opsd_loss
from sdkernels.rlsd import rlsd_loss, rlsd_token_advantage
from sdkernels.ssd import ssd_loss
from sdkernels.token_log_prob import rows_log_probs, token_log_prob
from sdkernels.truncation import Support, truncated_support

Values = dict[str, Any]


class Result(NamedTuple):
    """One result per token (N,), or (N, max_size) where it is listed."""

    name: str
    flows: bool = False  # whether it is differentiable
    integer: bool = False
    listed: bool = False


class Family(NamedTuple):
    """`run(logits, other, values, inplace)` and its results; `other` is the other side's logits, or None.

    With `inplace` the logits' memory may take their gradient.
    """

    run: Callable[[Tensor, Tensor | None, Values, bool], Sequence[Tensor]]
    results: tuple[Result, ...]


def _grpo_loss(logits: Tensor, other: Tensor | None, values: Values, inplace: bool) -> Sequence[Tensor]:
    return grpo_loss(logits, **values, reduction="none", inplace=inplace)


def _rlsd_loss(logits: Tensor, other: Tensor | None, values: Values, inplace: bool) -> Sequence[Tensor]:
    return rlsd_loss(logits, values.pop("teacher", other), **values, reduction="none", inplace=inplace)


def _rlsd_token_advantage(logits: Tensor, other: Tensor | None, values: Values, inplace: bool) -> Sequence[Tensor]:
    return rlsd_token_advantage(logits, values.pop("teacher", other), **values)


def _ssd_loss(logits: Tensor, other: Tensor | None, values: Values, inplace: bool) -> Sequence[Tensor]:
    base: Tensor | Support | None = other
    if base is None:
        token_ids, log_probs = values.pop("base_ids"), values.pop("base_log_probs")
        base = Support(token_ids, log_probs, (token_ids >= 0).sum(-1), values["temperature"])
    output = ssd_loss(logits, base, **values, reduction="none", inplace=inplace)
    return output.loss, *output.terms


def _opsd_loss(logits: Tensor, other: Tensor | None, values: Values, inplace: bool) -> Sequence[Tensor]:
    return opsd_loss(logits, other, **values, reduction="none", inplace=inplace)  # type: ignore[arg-type]


def _token_log_prob(logits: Tensor, other: Tensor | None, values: Values, inplace: bool) -> Sequence[Tensor]:
    whole = {"token_ids", "temperature", "mask"}
    if any(value is not None for name, value in values.items() if name not in whole):
        return token_log_prob(logits, **values)
    given = {name: values[name] for name in whole}
    ((log_prob, entropy),) = rows_log_probs((logits,), **given, cu_seqlens=None, inplace=inplace)
    return log_prob.to(entropy.dtype), entropy


def _truncated_support(logits: Tensor, other: Tensor | None, values: Values, inplace: bool) -> Sequence[Tensor]:
    return truncated_support(logits, **values)[:3]


_LOSS = Result("loss", flows=True)
_EVIDENCE = (Result("advantage"), Result("weight"), Result("information_gain"))
_STUDENT_FIRST = ("student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy")
_TERMS = ("support_compression", "within_support_reshaping", "base_alignment")

FAMILIES = {
    "grpo_loss": Family(_grpo_loss, (_LOSS, Result("log_prob", True), Result("entropy", True), Result("ratio"))),
    "rlsd_loss": Family(
        _rlsd_loss,
        (_LOSS, *_EVIDENCE, *(Result(name, name.startswith("student")) for name in _STUDENT_FIRST), Result("ratio")),
    ),
    "rlsd_token_advantage": Family(_rlsd_token_advantage, (*_EVIDENCE, *map(Result, _STUDENT_FIRST))),
    "ssd_loss": Family(
        _ssd_loss,
        (
            _LOSS,
            *(Result(name, True) for name in _TERMS),
            Result("constant"),
            Result("cross_entropy", True),
            Result("kept_mass", True),
            Result("support_size", integer=True),
        ),
    ),
    "opsd_loss": Family(_opsd_loss, (_LOSS, Result("divergence", True))),
    "token_log_prob": Family(_token_log_prob, (Result("log_prob", True), Result("entropy", True))),
    "truncated_support": Family(
        _truncated_support,
        (
            Result("token_ids", integer=True, listed=True),
            Result("log_probs", listed=True),
            Result("size", integer=True),
        ),
    ),
}


def register(name: str, family: Family) -> None:
    """Let the fused head run a function of this name, as one that a host needs."""
    FAMILIES[name] = family
