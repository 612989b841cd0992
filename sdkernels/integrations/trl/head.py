"""TRL's head kernel swapped for ours: under SFT, DPO, KTO, GRPO, RLOO and all else that calls `add_fused_lm_head`."""

from __future__ import annotations

import torch
from torch import Tensor
from trl.trainer import utils

from sdkernels.families import Family, Result, Values, register
from sdkernels.head import Other, Side, fused
from sdkernels.rows.statistics import row_statistics

FUNCTION = "trl_head"
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
HOSTS = utils._ChunkedLogProbFunction


def _of_logits(logits: Tensor, other: Tensor | None, values: Values, inplace: bool) -> tuple[Tensor, ...]:
    ids, temperature, wanted = values["token_ids"], values["temperature"], values["outputs"].split(",")
    rows, squares, mean = logits.detach(), None, None
    if "log_sum_sq_probs" in wanted:  # log sum p^2 = 2 log p_T(y) - log p_(T / 2)(y)
        squares, *_ = row_statistics(rows, ids, None, temperature / 2, None, False)
    if "mean_logits" in wanted:
        mean = rows.mean(-1) / temperature
    log_prob, entropy, largest, _ = row_statistics(logits, ids, None, temperature, None, inplace)
    with torch.no_grad():
        absent = torch.zeros_like(entropy)
        squares = absent if squares is None else (2 * log_prob - squares).to(entropy.dtype)
        is_top = (rows.gather(1, ids.unsqueeze(1)).squeeze(1) == largest).to(entropy.dtype)
    return log_prob.to(entropy.dtype), entropy, squares, absent if mean is None else mean, is_top


register(
    FUNCTION, Family(_of_logits, tuple(Result(name, flows=i < 2) for i, name in enumerate(("log_prob", *OUTPUTS))))
)


class FusedHead:
    """In place of TRL's `_ChunkedLogProbFunction`: the same results, of float32 logits, by our row kernels.

    Its `chunk_size`, of the vocabulary, says nothing here: a chunk is of tokens.
    """

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """log_prob, and each of OUTPUTS or None, as `ChunkedLogProbFunction.apply` returns them."""
        values = {
            "token_ids": targets,
            "mask": torch.ones_like(targets, dtype=torch.bool),
            "temperature": float(temperature),
            "outputs": ",".join(outputs),
            "logit_scale": float(logit_scale),
            "softcap": float(final_logit_softcapping or 0.0),
        }
        _, (log_prob, *others) = fused(FUNCTION, Side(hidden, weight, bias), Other(), None, values, None)
        found = {name: x if name in outputs else None for name, x in zip(OUTPUTS, others, strict=True)}
        if found["is_top1"] is not None:
            found["is_top1"] = found["is_top1"].bool()
        return log_prob, *found.values()


def use_fused_head(enabled: bool = True) -> None:
    """Let every TRL trainer of this process take its log-probs from our kernels; False gives them TRL's own again.

    The loss is the same; logits are float32 where TRL's are of the model's dtype. Entropy and log-probs are
    differentiable, as there. (An RLSDTrainer, an SSDTrainer and the self-distillation trainers need no swap.)
    """
    utils._ChunkedLogProbFunction = FusedHead if enabled else HOSTS
