"""RLSD inside verl: a distillation loss "rlsd", a fused LM head "sdkernels", and a teacher with a privileged prompt.

The entry point in `verl.plugins` imports this whenever verl is imported; it adds two names and changes nothing else:
`loss_mode: rlsd` with `RLSDLossConfig`, and `fused_kernel_options.impl_backend: sdkernels`. docs/verl.md is the guide.
"""

from sdkernels.integrations.verl._hooks import check

check()  # before what follows meets another verl

from sdkernels.integrations.verl.head import FusedLinear  # noqa: E402
from sdkernels.integrations.verl.loss import RLSDLossConfig, rlsd_distillation_loss  # noqa: E402
from sdkernels.integrations.verl.teacher import (  # noqa: E402
    privileged_log_probs,
    privileged_prompt_ids,
    score_privileged,
)

__all__ = [
    "FusedLinear",
    "RLSDLossConfig",
    "privileged_log_probs",
    "privileged_prompt_ids",
    "rlsd_distillation_loss",
    "score_privileged",
]
