"""Arguments of the linear_* functions: checked, flattened to tokens, and handed to the fused head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels.evidence import checked_weighing
from sdkernels.grpo import check_policy_options
from sdkernels.head import Other, Side, first_row, fused, local_rows, whole
from sdkernels.reductions import divided, over_tokens, token_factors
from sdkernels.rows.layout import at_tokens, kept_tokens, kernel_temperature
from sdkernels.rows.statistics import check_values
from sdkernels.vocab_parallel import is_group, shard_of


class Call:
    """Checked arguments that all of these functions share, flattened to tokens (N,)."""

    def __init__(self, name: str, hidden: Any, weight: Any, bias: Any, softcap: Any, logit_scale: Any,
                 chunk_size: Any, group: Any = None, vocab_start: Any = None) -> None:  # fmt: skip
        self.group = None if group is None else is_group(group)
        if self.group is not None and vocab_start is None:
            vocab_start = first_row(weight, self.group)
        weight, bias = self.plain(weight, bias)
        self.student = Side(*_check.head(name, hidden, weight, bias))
        hidden, weight, _ = self.student
        self.shape = hidden.shape[:-1]
        self.logits = hidden.detach().new_zeros(1).expand(*self.shape, weight.shape[0])  # stands in for checks
        cap = _check.optional_above("softcap", softcap, 0)
        normal = torch.finfo(torch.float32)
        if cap is not None and cap < normal.tiny:
            raise ValueError(f"softcap must be >= {normal.tiny:.3g}, the smallest normal float32, got {softcap}")
        capped = cap is not None and cap <= normal.max
        scale = _check.finite("logit_scale", logit_scale)
        self.values: dict[str, Any] = {"logit_scale": scale, "softcap": cap if capped else 0.0}
        self.chunk_size = None if chunk_size is None else _check.integer("chunk_size", chunk_size, 1)
        self.other = Other()
        self.shard = shard_of(group, vocab_start, self.logits)
        if self.shard is not None:
            self.values |= {"group": self.shard.group.group_name, "vocab_start": self.shard.start}

    def plain(self, weight: Any, bias: Any, prefix: str = "") -> tuple[Any, Any]:
        """DTensors of a head as tensors: gathered, or with a group the local part."""
        if self.group is None:
            return whole(weight), whole(bias)
        return (
            local_rows(f"{prefix}lm_head_weight", weight, self.group),
            local_rows(f"{prefix}bias", bias, self.group),
        )

    def detach(self) -> None:
        """Let no gradient flow."""
        hidden, weight, bias = self.student
        self.student = Side(hidden.detach(), weight.detach(), None if bias is None else bias.detach())

    def set_other(self, name: str, hidden: Any, weight: Any, bias: Any, prefix: str) -> None:
        """The side that gets no gradient."""
        student = self.student
        names = (name, f"{prefix}lm_head_weight", f"{prefix}bias")
        weight, bias = self.plain(weight, bias, prefix)
        used = student.weight.detach() if weight is None else weight
        hidden, _, _ = _check.head(name, hidden, used, bias, "lm_head_weight" if weight is None else names[1], names[2])
        for each, value in zip(names[1:], (weight, bias), strict=True):
            if value is not None:
                _check.constant(each, value)
        if used.shape[0] != student.weight.shape[0]:
            raise ValueError(f"{names[1]} must have the student's vocabulary, {student.weight.shape[0]}, "
                             f"got {used.shape[0]}")  # fmt: skip
        if bias is not None:
            weight = used
        elif weight is not None and student.bias is not None:
            bias = student.bias.detach()
        _check.constant(name, hidden)
        if hidden.shape[:-1] != self.shape:
            raise ValueError(f"{name} must be hidden states (..., H) of tokens of shape {tuple(self.shape)}, "
                             f"got shape {tuple(hidden.shape)}")  # fmt: skip
        _check.same_device(name, hidden, self.logits)
        self.other = Other(hidden.reshape(-1, hidden.shape[-1]), weight, bias)

    def set_temperature(self, temperature: Any, cu_seqlens: Tensor | None) -> None:
        """One number, or float64 values per token."""
        temperature = _check.temperature(temperature, self.shape, cu_seqlens, self.logits)
        number, values = kernel_temperature(temperature, self.shape, cu_seqlens)
        self.values["temperature"] = number if values is None else at_tokens(values, self.shape).reshape(-1)

    def set_tokens(self, token_ids: Any, mask: Any) -> Tensor:
        """Which tokens count, from checked ids (or None) and mask."""
        mask = _check.mask("mask", mask, self.shape, self.logits)
        temperature = self.values["temperature"]
        tempered = temperature.reshape(self.shape) if isinstance(temperature, Tensor) else None
        if token_ids is not None:
            _check.token_ids("token_ids", token_ids, self.shape, self.logits)
            keep = kept_tokens(token_ids, mask)
            if self.shard is None and not torch.compiler.is_compiling():
                check_values(self.logits, token_ids, keep, tempered)
            self.values["token_ids"] = token_ids.reshape(-1)
        else:
            keep = torch.ones(self.shape, dtype=torch.bool, device=self.logits.device) if mask is None else mask
            if tempered is not None and not torch.compiler.is_compiling() and _check.values_are_checked(keep):
                _check.temperature_values(tempered, keep)
        self.values["mask"] = keep.reshape(-1)
        return keep

    def set_values(self, **values: Any) -> None:
        """Further options; tensors are per token."""
        for name, value in values.items():
            self.values[name] = value.reshape(-1) if isinstance(value, Tensor) else value

    def run(self, function: str) -> list[Tensor]:
        """The function's results per token, (...)."""
        _, results = self._fused(function, None)
        return results

    def run_loss(self, function: str, keep: Tensor, reduction: str, normalizer: Any,
                 cu_seqlens: Tensor | None) -> list[Tensor]:  # fmt: skip
        """The function's results, the first of them, the loss, reduced."""
        factor = None if reduction == "none" else token_factors(keep, reduction, cu_seqlens).reshape(-1)
        total, results = self._fused(function, factor)
        if total is not None:
            loss = divided(total, keep, reduction, normalizer, cu_seqlens)
            results[0] = loss.to(results[0].dtype)
        return results

    def _fused(self, function: str, factor: Tensor | None) -> tuple[Tensor | None, list[Tensor]]:
        hidden, weight, bias = self.student
        student = Side(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
        total, results = fused(function, student, self.other, factor, self.values, self.chunk_size)
        return total, [x.reshape((*self.shape, *x.shape[1:])) for x in results]


def set_policy(
    call: Call, token_ids: Tensor, advantages: Tensor, old_log_prob: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Check and set what GRPO and RLSD share; which tokens count."""
    check_policy_options("hidden", call.logits, token_ids, old_log_prob, options)
    cu_seqlens = options["cu_seqlens"]
    _check.per_sequence("advantages", advantages, call.shape, cu_seqlens, call.logits)
    call.set_temperature(options["temperature"], cu_seqlens)
    keep = call.set_tokens(token_ids, options["mask"])
    call.set_values(
        advantages=over_tokens(advantages, call.shape, cu_seqlens),
        old_log_prob=old_log_prob,
        **{name: options[name] for name in ("epsilon_low", "epsilon_high", "dual_clip", "beta")},
        reference_log_prob=options["reference_log_prob"],
        token_weight=options["token_weight"],
    )
    return keep


def set_evidence(call: Call, teacher: Any, weight: Any, bias: Any, clip_range: Any, lam: Any, apply_to: Any,
                  pessimistic: Any, credit_mask: Any) -> None:  # fmt: skip
    """Check and set the teacher and how its evidence weighs."""
    _check.floats("teacher", teacher, call.logits)
    if teacher.dim() == len(call.shape) + 1:
        call.set_other("teacher", teacher, weight, bias, "teacher_")
    elif weight is not None or bias is not None:
        raise ValueError("teacher_lm_head_weight and teacher_bias need a teacher of hidden states (..., H), "
                         f"got log-probs of shape {tuple(teacher.shape)}")  # fmt: skip
    else:
        _check.same_shape("teacher", teacher, call.shape)
        call.set_values(teacher=teacher)
    checked_weighing(clip_range, lam, apply_to, pessimistic)
    call.set_values(
        clip_range=_check.clip_range(clip_range),
        lam=float(lam),
        apply_to=apply_to,
        pessimistic=pessimistic,
        credit_mask=_check.mask("credit_mask", credit_mask, call.shape, call.logits),
    )
