"""What a user would run instead of opsd_loss: eager PyTorch, torch.compile, TRL and Liger. Called, never copied."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from benchmarks.inputs import Inputs
from benchmarks.opsd_truth import Setting
from benchmarks.prepared import ForwardBackward, Results
from benchmarks.runner import Prepared, Unable
from benchmarks.truncated_peers import Build, made

LARGEST_LOG_MASS = -1e-7  # of the listed tokens, as TRL and SDPO have it: the tail is 1 - kept, which cancels


def summed(log_p: Tensor, log_q: Tensor, setting: Setting) -> Tensor:
    """The divergence (N,) as one writes it with kl_div, from log-probs of student and teacher in their dtype."""
    if setting.divergence == "jsd":
        weighted = [log_p + math.log1p(-setting.beta), log_q + math.log(setting.beta)]
        log_m = torch.stack(weighted).logsumexp(0)
        of_student, of_teacher = (kl_div(log_m, x, reduction="none", log_target=True) for x in (log_p, log_q))
        entries = setting.beta * of_teacher + (1 - setting.beta) * of_student
    elif setting.divergence == "forward_kl":
        entries = kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        entries = kl_div(log_q, log_p, reduction="none", log_target=True)
    if setting.token_clip:
        entries = entries.clamp(max=setting.token_clip)
    return entries.sum(-1)


def chosen_ids(student: Tensor, teacher: Tensor, setting: Setting) -> Tensor:
    """(N, k) by torch.topk, which splits ties as it likes; a vocabulary of fewer tokens has them all."""
    decides = teacher if setting.top_k_from == "teacher" else student.detach()
    return decides.topk(min(setting.top_k or 0, decides.shape[-1])).indices


def reduced(log_p: Tensor, token_ids: Tensor, tail: bool) -> Tensor:
    """Log-probs (N, V) as those of the listed tokens, with a tail of 1 - their sum or renormalised."""
    listed = log_p.gather(-1, token_ids)
    log_mass = listed.logsumexp(-1, keepdim=True)
    if tail:
        return torch.cat([listed, (-log_mass.clamp(max=LARGEST_LOG_MASS).expm1()).log()], -1)
    return listed - log_mass


def of_log_softmax(student: Tensor, teacher: Tensor, setting: Setting, dtype: torch.dtype) -> Results:
    """log_softmax of both in `dtype`, reduced where top_k asks for it, and the formula."""
    log_p, log_q = (torch.log_softmax(x, -1, dtype=dtype) for x in (student, teacher))
    ids = {}
    if setting.top_k:
        ids["token_ids"] = chosen_ids(student, teacher, setting)
        log_p, log_q = (reduced(x, ids["token_ids"], setting.tail) for x in (log_p, log_q))
    divergence = summed(log_p, log_q, setting)
    return {"loss": divergence.mean(), "divergence": divergence, **ids}


def of_listed(student: Tensor, teacher: Tensor, setting: Setting, dtype: torch.dtype) -> Results:
    """Without a tail the listed logits are all there is to read of a row, once they are found."""
    token_ids = chosen_ids(student, teacher, setting)
    log_p, log_q = (torch.log_softmax(x.gather(-1, token_ids), -1, dtype=dtype) for x in (student, teacher))
    divergence = summed(log_p, log_q, setting)
    return {"loss": divergence.mean(), "divergence": divergence, "token_ids": token_ids}


def formula(setting: Setting, *, compiles: bool = False, listed: bool = False) -> Build:
    """One of the two above in float32, eager or compiled."""

    def build(inputs: Inputs) -> Prepared:
        function = made(of_listed if listed else of_log_softmax, compiles)
        return ForwardBackward(inputs.student, lambda leaf: function(leaf, inputs.teacher, setting, torch.float32))

    return build


def uncast(setting: Setting) -> Build:
    """The formula on log-probs that stay in bfloat16, as the logits are."""

    def build(inputs: Inputs) -> Prepared:
        dtype = inputs.student.dtype
        if dtype != torch.bfloat16:
            raise Unable("logits not bfloat16")
        return ForwardBackward(inputs.student, lambda leaf: of_log_softmax(leaf, inputs.teacher, setting, dtype))

    return build


def trl_gkd(setting: Setting) -> Build:
    """GKDTrainer's, on float32 logits."""

    def build(inputs: Inputs) -> Prepared:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd import GKDTrainer

        def loss(leaf: Tensor) -> Results:
            loss = GKDTrainer.generalized_jsd_loss(
                leaf.float(), inputs.teacher.float(), beta=setting.peers_beta, num_items_in_batch=len(leaf)
            )
            return {"loss": loss}

        return ForwardBackward(inputs.student, loss)

    return build


def trl_sdpo(setting: Setting) -> Build:
    """SDPOTrainer's, on float32 logits; where the teacher decides, reduced as it does for a teacher on a server."""

    def build(inputs: Inputs) -> Prepared:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.sdpo import loss_utils

        alpha = setting.peers_beta

        def divergence(student: Tensor, teacher: Tensor) -> Tensor:
            if not setting.top_k:
                return loss_utils.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
            if setting.top_k_from == "student":
                return loss_utils.compute_topk_self_distillation_loss(
                    student,
                    teacher,
                    distillation_topk=min(setting.top_k, student.shape[-1]),
                    distillation_alpha=alpha,
                    distillation_add_tail=setting.tail,
                )
            token_ids = chosen_ids(student, teacher, setting)
            log_p, log_q = (reduced(x.log_softmax(-1), token_ids, setting.tail) for x in (student, teacher))
            return loss_utils.compute_divergence(log_p, log_q, alpha)

        def loss(leaf: Tensor) -> Results:
            each = divergence(leaf.float(), inputs.teacher.float())
            return {"loss": each.mean(), "divergence": each}

        def beside() -> Results:
            if not setting.top_k:
                return {}
            return {"token_ids": chosen_ids(inputs.student.float(), inputs.teacher.float(), setting)}

        return ForwardBackward(inputs.student, loss, beside=beside)

    return build


def liger_jsd(setting: Setting) -> Build:
    """LigerJSD, which takes log-probs, in float32."""

    def build(inputs: Inputs) -> Prepared:
        if not inputs.student.is_cuda:
            raise Unable("needs a CUDA GPU")
        from liger_kernel.transformers.jsd import LigerJSD

        jsd = LigerJSD(beta=setting.peers_beta)

        def loss(leaf: Tensor) -> Results:
            log_p, log_q = (torch.log_softmax(x, -1, dtype=torch.float32) for x in (leaf, inputs.teacher))
            return {"loss": jsd(log_p, log_q)}

        return ForwardBackward(inputs.student, loss)

    return build


def liger_kl(inputs: Inputs) -> Prepared:
    """LigerKLDIVLoss, likewise: the forward KL alone, as its second argument gets no gradient."""
    if not inputs.student.is_cuda:
        raise Unable("needs a CUDA GPU")
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(leaf: Tensor) -> Results:
        log_p, log_q = (torch.log_softmax(x, -1, dtype=torch.float32) for x in (leaf, inputs.teacher))
        return {"loss": kl(log_p, log_q)}

    return ForwardBackward(inputs.student, loss)
