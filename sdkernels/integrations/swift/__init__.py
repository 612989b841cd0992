"""GRPO and RLSD in ms-swift without logits: importing this, or `--external_plugins .../swift/sdkernels_plugin.py`.

One method of ms-swift's GRPO trainer gives all its log-probs: of the policy, as it sampled and as it is now, of the
reference and of the teacher. Its own has the model make the logits of all tokens. Here the LM head gives log-probs and
entropies in the place of logits, for the time of one forward: everything around it, DDP, FSDP, PEFT, autocast, a
template that embeds images, stays as it is. What the trainer makes of log-probs, its RLSD weights too, is not touched.

Where that cannot be, ms-swift's own method runs, and a warning says why.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sdkernels import linear_token_log_prob
from sdkernels.integrations.hosts import check_host

check_host("ms-swift", "4.6.0", "ms-swift>=4.6,<5", {
    "swift.rlhf_trainers.grpo_trainer:GRPOTrainer._get_logps_via_local_forward":
        "self, model, model_inputs, logits_to_keep, input_ids, compute_entropy",
    "swift.rlhf_trainers.grpo_trainer:GRPOTrainer._get_logps_via_sp": "self, model, model_inputs, grpo_batch",
})  # fmt: skip

from swift.rlhf_trainers.grpo_trainer import GRPOTrainer  # noqa: E402
from swift.utils import get_logger  # noqa: E402

from sdkernels.integrations.transformers import base_of, lm_head  # noqa: E402

HANDED_OVER = "sdkernels leaves log-probs to ms-swift, which makes logits: "
logger = get_logger()
host_forward = inspect.unwrap(GRPOTrainer._get_logps_via_local_forward)  # the host's, also where this ran before
host_sequence_parallel = inspect.unwrap(GRPOTrainer._get_logps_via_sp)


@functools.wraps(host_forward)
def get_logps_via_local_forward(
    self: GRPOTrainer,
    model: nn.Module,  # as DDP, FSDP or DeepSpeed wraps it
    model_inputs: dict[str, Any],
    logits_to_keep: int,
    input_ids: Tensor,  # (B, L), or (1, tokens of all sequences) where the template is padding-free
    compute_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies (B, logits_to_keep) in float32 of the last tokens."""
    base: Any = base_of(self.accelerator.unwrap_model(model))
    reason = why_not(self.args, base)
    if reason:
        logger.warning_once(HANDED_OVER + reason)
        return host_forward(self, model, model_inputs, logits_to_keep, input_ids, compute_entropy)
    inputs = dict(model_inputs)
    if "use_cache" in self.model_kwarg_keys:
        inputs["use_cache"] = False
    if "logits_to_keep" in self.model_kwarg_keys:
        inputs["logits_to_keep"] = logits_to_keep + 1
    token_ids = input_ids[:, -logits_to_keep:]
    values = forward_with_head(model, base.get_output_embeddings(), inputs, token_ids, self.temperature)
    return values[..., 0], values[..., 1] if compute_entropy else None


def why_not(args: Any, base: Any) -> str | None:
    """Why the LM head of a transformers model cannot give log-probs in the place of logits; None where it can."""
    try:
        head = lm_head(base)
    except (AttributeError, TypeError) as error:
        return str(error)
    if head.softcap is not None or head.logit_scale != 1:
        return "the model caps or scales logits behind its LM head"
    if "forward" in vars(base.get_output_embeddings()):
        return "something else has replaced the LM head's forward, as a device_map over several devices does"
    if args.torch_compile:
        return "torch_compile is set"
    return None


def forward_with_head(
    model: nn.Module, head: nn.Linear, inputs: dict[str, Any], token_ids: Tensor, temperature: float
) -> Tensor:
    """(B, T, 2) log-probs and entropies of the T tokens (B, T) that end the inputs, by one forward of the model.

    Raises:
        RuntimeError: the forward does not call its head once, or changes what the head gives.

    """
    length = token_ids.shape[1]
    given: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        hidden = hidden[:, -(length + 1) : -1]
        values = linear_token_log_prob(hidden, head.weight, token_ids, temperature, bias=head.bias)
        given.append(torch.stack(values, -1))
        return given[-1]

    head.forward = forward  # type: ignore  # of the instance: hooks around it fire, and del undoes it
    try:
        values = model(**inputs).logits
    finally:
        del head.forward
    cannot = f"sdkernels cannot serve {type(model).__name__}: its forward"
    if len(given) != 1:
        raise RuntimeError(f"{cannot} called its LM head {len(given)} times, not once")
    exact = given[0].detach()
    if values.shape != exact.shape or not torch.allclose(
        values, exact.to(values.dtype), rtol=0, atol=0, equal_nan=True
    ):
        raise RuntimeError(f"{cannot} changes what its LM head gives")
    if values.dtype != exact.dtype:  # FSDP may round a model's outputs: their gradient is wanted, not their values
        values = exact + (values - values.detach())
    return values


@functools.wraps(host_sequence_parallel)
def get_logps_via_sp(self: GRPOTrainer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The host's own, with a warning."""
    logger.warning_once(f"{HANDED_OVER}sequence_parallel_size is not 1")
    return host_sequence_parallel(self, *args, **kwargs)


GRPOTrainer._get_logps_via_local_forward = get_logps_via_local_forward
GRPOTrainer._get_logps_via_sp = get_logps_via_sp
logger.info("sdkernels: GRPO's log-probs come from hidden states, without logits.")
