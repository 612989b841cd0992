"""The registry of opsd_loss: every divergence and reduction, what implements it, and the rows it moves."""

from __future__ import annotations

from torch import Tensor

import sdkernels
from benchmarks import opsd_peers as peers
from benchmarks.cases import BASELINE, PEER_ERROR
from benchmarks.inputs import Inputs
from benchmarks.opsd_truth import Setting
from benchmarks.prepared import ForwardBackward, Results
from benchmarks.runner import Case, Prepared
from benchmarks.truncated_peers import Build

JSD = Setting("jsd")
FORWARD_KL = Setting("forward_kl")
REVERSE_KL = Setting("reverse_kl")
CLIPPED = Setting("forward_kl", token_clip=0.001)  # OPSD's are 0.05, which clips one row in 64 here, and 1e-6
SDPO = Setting("jsd", top_k=100)  # its own
RENORMALISED = Setting("forward_kl", top_k=20, top_k_from="teacher", tail=False)
DENSE = (JSD, FORWARD_KL, REVERSE_KL)

OPSD_LOSS = "opsd_loss, forward + backward, {}"
OURS = "sdkernels"
HALF = "bfloat16 eager"
HALF_NOTE = f"{HALF}: it keeps log-probs in bfloat16. OPSD's own numbers, below, say how far off its gradients are."
# Rows of any implementation, and ours: without a tail the student's are read at the listed tokens alone, but we look
# whether all of them are finite.
SWEEPS = {JSD: (3, 7), FORWARD_KL: (3, 5), REVERSE_KL: (3, 5), CLIPPED: (3, 7), SDPO: (3, 5), RENORMALISED: (2, 3)}


def fused_loss(setting: Setting) -> Build:
    """opsd_loss."""

    def build(inputs: Inputs) -> Prepared:
        def loss(leaf: Tensor) -> Results:
            return sdkernels.opsd_loss(leaf, inputs.teacher, **setting.options)._asdict()

        return ForwardBackward(inputs.student, loss)

    return build


def peers_of(setting: Setting) -> dict[str, Build]:
    """Those that can do it; TRL and Liger do not clip."""
    found = {BASELINE: peers.formula(setting), "torch.compile": peers.formula(setting, compiles=True)}
    if setting == RENORMALISED:
        found |= {"listed logits": peers.formula(setting, listed=True)}
    found |= {HALF: peers.uncast(setting)}
    if setting in DENSE:
        found |= {"TRL GKD": peers.trl_gkd(setting)}
    if not setting.token_clip:
        found |= {"TRL SDPO": peers.trl_sdpo(setting)}
    if setting in DENSE:
        found |= {"Liger JSD": peers.liger_jsd(setting)}
    if setting == FORWARD_KL:
        found |= {"Liger KL": peers.liger_kl}
    return found


def opsd_cases() -> list[Case]:
    """The JSD, both KLs, OPSD's clip, SDPO's top-k with a tail, and a teacher's top-k renormalised."""
    cases = []
    for setting, (least, ours) in SWEEPS.items():
        op = OPSD_LOSS.format(setting)
        cases.append(Case(op, OURS, fused_loss(setting), least, ours, setting=setting))
        for name, build in peers_of(setting).items():
            note = HALF_NOTE if name == HALF else ""
            cases.append(Case(op, name, build, least, allowed_error=PEER_ERROR, note=note, setting=setting))
    return cases
