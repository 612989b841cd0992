"""What this integration takes hold of in verl."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sdkernels.integrations.hosts import check_host

HOOKS = {
    "verl.trainer.distillation.losses:register_distillation_loss": "loss_settings",
    "verl.trainer.distillation.losses:DistillationLossSettings": "_target_, names, use_topk, use_estimator",
    "verl.trainer.distillation.losses:distillation_loss": "config, distillation_config, model_output, data",
    "verl.trainer.ppo.core_algos:kl_penalty": "logprob, ref_logprob, kl_penalty",
    "verl.workers.config:DistillationLossConfig": "",
    "verl.workers.utils.padding:no_padding_2_padding": "tensor, data",
    "verl.utils.tensordict_utils:get_tensordict": "tensor_dict, non_tensor_dict",
    "verl.utils.tokenizer.chat_template:apply_chat_template": "processor, messages",
    "verl.utils.experimental.torch_functional:FusedLinearForPPO": "chunk_size, impl_backend",
    "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward":
        "self, hidden_states, vocab_weights, input_ids, temperature",
    "verl.models.transformers.monkey_patch:patch_forward_with_backends":
        "model, use_fused_kernels, fused_kernels_backend",
}  # fmt: skip


def check() -> None:
    """Raise ImportError, in one line, unless this verl has the hooks."""
    check_host("verl", "0.9.1", "verl>=0.9,<0.10", HOOKS)


@contextmanager
def logged() -> Iterator[None]:
    """Log what is raised, in one line: verl says what a plugin raises at DEBUG only."""
    try:
        yield
    except Exception as error:
        logging.getLogger(__name__).error("verl runs without sdkernels: %s: %s", type(error).__name__, error)
        raise
