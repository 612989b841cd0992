"""Hidden states and the LM head of a transformers model, inside its forward, for the `linear_*` functions."""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

from torch import Tensor, nn

from sdkernels.integrations.hosts import check_host

check_host("transformers", "5.10 to 5.24", "transformers>=5.10", {
    "transformers:PreTrainedModel.get_output_embeddings": "self",
    "transformers:PreTrainedModel.base_model": "",
    "transformers:PretrainedConfig.get_text_config": "self",
})  # fmt: skip


class LMHead(NamedTuple):
    """What makes logits of hidden states: softcap tanh((hidden @ weight.T + bias) logit_scale / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float

    @property
    def options(self) -> dict[str, Any]:
        """All but the weight, as the `linear_*` functions name them."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head(model: nn.Module) -> LMHead:
    """The head of a transformers model that generates text. Under FSDP its weight is whole inside `forward` alone.

    Raises:
        TypeError: the head is not a plain linear layer, as where LoRA adapts it.

    """
    from torch.distributed.fsdp import FSDPModule

    network: Any = base_of(model)
    layer = network.get_output_embeddings()
    if type(layer) is not nn.Linear and not issubclass(type(layer), FSDPModule):
        raise TypeError(f"the LM head is a {type(layer).__name__}, not a Linear: leave it out of LoRA's target_modules")
    if hasattr(layer.weight, "ds_id") and layer.weight.numel() == 0:
        raise TypeError("the LM head is partitioned by DeepSpeed ZeRO-3, which gathers it in its own forward only")
    config = network.config.get_text_config()
    return LMHead(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), _logit_scale(config))


def _logit_scale(config: Any) -> float:
    """What an architecture multiplies its logits by, under the names that they have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling


def add_from_hidden(model: nn.Module) -> None:
    """Let `model(..., from_hidden=function)` return `function(hidden, lm_head)`, without logits.

    `hidden` (B, L, H) are the last hidden states, after the last norm, and `lm_head` is the model's `LMHead`. As the
    function runs inside the model's forward, the hooks of DDP and FSDP around it see to weights and gradients. Without
    `from_hidden` the forward is what it was. Call it before DDP or FSDP wrap the model.

    Raises:
        TypeError: the head is not a plain linear layer.

    """
    model = base_of(model)
    if getattr(model.forward, "takes_from_hidden", False):
        return
    lm_head(model)
    original = model.forward

    @functools.wraps(type(model).forward)  # whose signature `generate` validates its arguments by
    def forward(self: Any, *args: Any, from_hidden: Any = None, **kwargs: Any) -> Any:
        if from_hidden is None:
            return original(*args, **kwargs)
        kwargs["use_cache"] = False
        return from_hidden(self.base_model(*args, **kwargs).last_hidden_state, lm_head(self))

    forward.takes_from_hidden = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
