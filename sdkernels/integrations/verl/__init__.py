"""RLSD inside verl: a distillation loss "rlsd", a fused LM head "sdkernels", and a teacher with a privileged prompt.

The entry point in `verl.plugins` imports this whenever verl is imported. It adds two names, `loss_mode: rlsd` with
`RLSDLossConfig` and `fused_kernel_options.impl_backend: sdkernels`, the second by replacing two attributes of verl's,
`FusedLinearForPPO` and `patch_forward_with_backends`, which hand on every other backend. docs/verl.md is the guide.
"""

from sdkernels.integrations.verl._hooks import check, logged

with logged():
    check()  # before what follows meets another verl

    from sdkernels.integrations.verl.head import FusedLinear
    from sdkernels.integrations.verl.loss import RLSDLossConfig, rlsd_distillation_loss
    from sdkernels.integrations.verl.teacher import privileged_log_probs, privileged_prompt_ids, score_privileged

__all__ = [
    "FusedLinear",
    "RLSDLossConfig",
    "privileged_log_probs",
    "privileged_prompt_ids",
    "rlsd_distillation_loss",
    "score_privileged",
]
