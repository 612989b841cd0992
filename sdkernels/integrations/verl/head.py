"""verl's fused LM head through `linear_token_log_prob`: `fused_kernel_options.impl_backend: sdkernels`.

verl knows "torch", "triton" and "liger". The two attributes replaced here add a fourth and hand the others on: what a
user has not asked for stays as it was.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl.models.transformers import monkey_patch
from verl.utils.experimental import torch_functional

from sdkernels.integrations.transformers import lm_head
from sdkernels.linear import linear_token_log_prob

BACKEND = "sdkernels"
_patch_forward_with_backends = monkey_patch.patch_forward_with_backends


class FusedLinear(torch_functional.FusedLinearForPPO):
    """verl's `FusedLinearForPPO` with one more backend, "sdkernels": float32 logits, a chunk of them at a time."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__(chunk_size, "torch" if impl_backend == BACKEND else impl_backend)
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # (..., H)
        vocab_weights: Tensor,  # (V, H)
        input_ids: Tensor,  # (...)
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, each (...) float32 and differentiable; see `linear_token_log_prob`."""
        if self.impl_backend != BACKEND:
            return super().forward(hidden_states, vocab_weights, input_ids, temperature)
        result = linear_token_log_prob(hidden_states, vocab_weights, input_ids, temperature)
        return result.log_prob, result.entropy


def patch_forward_with_backends(
    model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """verl's function of that name, which picks a model's fused forward, with one more backend.

    Raises:
        TypeError: the LM head is not a plain linear layer.
        ValueError: it has a bias, a softcap or a scale, which verl's fused forwards drop.

    """
    ours = use_fused_kernels and fused_kernels_backend == BACKEND
    if ours:
        _check_head(model)
    _patch_forward_with_backends(model, use_fused_kernels, "torch" if ours else fused_kernels_backend)
    if ours:
        model._verl_fused_kernels_backend = BACKEND  # the forward that calls FusedLinearForPPO reads it


def _check_head(model: Any) -> None:
    head = lm_head(model)
    dropped = {"bias": head.bias is not None, "softcap": head.softcap is not None, "scale": head.logit_scale != 1}
    if any(dropped.values()):
        names = " and ".join(name for name, there in dropped.items() if there)
        raise ValueError(f"verl's fused forward drops the {names} of {type(model).__name__}'s LM head: "
                         "set model.use_fused_kernels=False")  # fmt: skip


torch_functional.FusedLinearForPPO = FusedLinear  # both are looked up when they are called
monkey_patch.patch_forward_with_backends = patch_forward_with_backends
