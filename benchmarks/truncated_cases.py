"""The registry of truncation and SSD: every operation in every setting, what implements it, and the rows it moves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import sdkernels
from benchmarks import truncated_peers as peers
from benchmarks.cases import BASELINE, PEER_ERROR
from benchmarks.inputs import Inputs
from benchmarks.prepared import Forward, ForwardBackward, Results
from benchmarks.runner import Case, Prepared
from benchmarks.truncated_truth import PLACES, Setting, long_share, recorded_base, sampled_ids, upstream

TRUNCATIONS = (
    Setting(1.0, top_k=20, top_p=0.8),
    Setting(1.0, top_k=50),
    Setting(1.0, top_p=0.95),
    Setting(1.0, min_p=0.05),
)
PAPER = Setting(1.6, top_k=20, top_p=0.8)  # of SSD
RECORDED = Setting(1.6, top_k=20, top_p=0.8, recorded=True)
NUCLEUS = Setting(1.6, top_p=0.95)
WHOLE = Setting(1.5)

LOG_SOFTMAX = "truncated_log_softmax, forward + backward, {}"
LOG_SOFTMAX_FORWARD = "truncated_log_softmax, forward, {}"
TOKEN_LOG_PROB = "token_log_prob, forward + backward, {}"
SUPPORT = "truncated_support, forward, {}"
SSD_LOSS = "ssd_loss, forward + backward, {}"
SSD_LOSS_RECORDED = "ssd_loss, forward + backward, recorded support, {}"
SSD_DECOMPOSITION = "ssd_decomposition, forward, {}"
CROSS_ENTROPY = "cross-entropy"
Build = Callable[[Inputs], Prepared]


def sweeps(short: int, long: int, setting: Setting, of: str = "student") -> Callable[[Inputs], float]:
    """What our kernels move where supports are lists of ids, and where they are longer; the mean over the rows."""
    return lambda inputs: short + (long - short) * long_share(inputs, of, setting)


def fused_log_softmax(setting: Setting, *, backward: bool) -> Build:
    """truncated_log_softmax."""

    def log_q(logits: Tensor) -> Results:
        return {"log_q": sdkernels.truncated_log_softmax(logits, setting.temperature, **setting.filters)}

    def build(inputs: Inputs) -> Prepared:
        if not backward:
            return Forward(lambda: log_q(inputs.student))
        return ForwardBackward(inputs.student, log_q, upstream=("log_q", upstream(inputs, rows_too=True)))

    return build


def fused_log_prob(setting: Setting) -> Build:
    """token_log_prob; it gives the entropy as well."""

    def build(inputs: Inputs) -> Prepared:
        token_ids = sampled_ids(inputs, setting)
        return ForwardBackward(
            inputs.student,
            lambda leaf: sdkernels.token_log_prob(leaf, token_ids, setting.temperature, **setting.filters)._asdict(),
            upstream=("log_prob", upstream(inputs, rows_too=False)),
        )

    return build


def fused_support(setting: Setting) -> Build:
    """truncated_support."""

    def build(inputs: Inputs) -> Prepared:
        def support() -> Results:
            found = sdkernels.truncated_support(inputs.student, setting.temperature, **setting.filters, max_size=PLACES)
            return {"token_ids": found.token_ids, "log_probs": found.log_probs, "support_size": found.size}

        return Forward(support)

    return build


def fused_ssd(setting: Setting, *, backward: bool) -> Build:
    """ssd_loss, or ssd_decomposition without backward."""

    def build(inputs: Inputs) -> Prepared:
        base = recorded_base(inputs, setting) if setting.recorded else inputs.teacher
        filters = {} if setting.recorded else setting.filters

        def decomposition() -> Results:
            return sdkernels.ssd_decomposition(inputs.student, base, setting.temperature, **filters)._asdict()

        def loss(leaf: Tensor) -> Results:
            output = sdkernels.ssd_loss(leaf, base, setting.temperature, **filters)
            return {"loss": output.loss, **output.terms._asdict()}

        return ForwardBackward(inputs.student, loss) if backward else Forward(decomposition)

    return build


def truncation_cases() -> list[Case]:
    """Truncated log-probs of rows and of tokens, and sparse supports."""
    cases = []

    def add(op: str, setting: Setting, least: int, kernels: Callable, ours: Build, others: dict[str, Build]) -> None:
        op = op.format(setting)
        cases.append(Case(op, "sdkernels", ours, least, kernels, setting=setting))
        for name, build in others.items():
            cases.append(Case(op, name, build, least, allowed_error=PEER_ERROR, setting=setting))

    for setting in TRUNCATIONS:
        build = peers.log_softmax
        add(
            LOG_SOFTMAX,
            setting,
            3,
            sweeps(3, 6, setting),
            fused_log_softmax(setting, backward=True),
            {
                BASELINE: build(peers.warpers, setting, backward=True),
                "one sort": build(peers.one_sort, setting, backward=True),
                "torch.compile": build(peers.warpers, setting, backward=True, compiles=True),
                "torch.compile of it": build(peers.one_sort, setting, backward=True, compiles=True),
                "FlashInfer mask": build(peers.flashinfer, setting, backward=True),
            },
        )
    for setting in TRUNCATIONS:
        add(
            LOG_SOFTMAX_FORWARD,
            setting,
            2,
            sweeps(2, 3, setting),
            fused_log_softmax(setting, backward=False),
            {
                BASELINE: peers.log_softmax(peers.warpers, setting, backward=False),
                "one sort": peers.log_softmax(peers.one_sort, setting, backward=False),
                "FlashInfer mask": peers.log_softmax(peers.flashinfer, setting, backward=False),
            },
        )
    for setting in TRUNCATIONS:
        add(
            TOKEN_LOG_PROB,
            setting,
            2,
            sweeps(2, 3, setting),
            fused_log_prob(setting),
            {
                BASELINE: peers.token_log_prob(peers.warpers, setting),
                "one sort": peers.token_log_prob(peers.one_sort, setting),
                "torch.compile": peers.token_log_prob(peers.warpers, setting, compiles=True),
                "torch.compile of it": peers.token_log_prob(peers.one_sort, setting, compiles=True),
                "FlashInfer mask": peers.token_log_prob(peers.flashinfer, setting),
            },
        )
    for setting in TRUNCATIONS:
        add(
            SUPPORT,
            setting,
            1,
            sweeps(1, 1, setting),
            fused_support(setting),
            {BASELINE: peers.support_of_warpers(setting), "one sort": peers.support_of_one_sort(setting)},
        )
    return cases


def ssd_cases() -> list[Case]:
    """SSD's loss in the paper's setting, with a nucleus, without truncation and on a recorded base; and its terms."""
    cases = []

    def add(op: str, setting: Setting, least: int, kernels: int | Callable, backward: bool = True) -> None:
        op = op.format(setting)
        terms, whole = peers.three_terms, peers.cross_entropy
        if setting.recorded:
            terms, whole = peers.recorded_three_terms, peers.recorded_cross_entropy
        others = {BASELINE: (terms, False), "torch.compile": (terms, True)}
        if backward:
            others |= {CROSS_ENTROPY: (whole, False), "torch.compile of it": (whole, True)}
        cases.append(Case(op, "sdkernels", fused_ssd(setting, backward=backward), least, kernels, setting=setting))
        for name, (formula, compiles) in others.items():
            build = peers.ssd(formula, setting, backward=backward, compiles=compiles)
            cases.append(Case(op, name, build, least, allowed_error=PEER_ERROR, setting=setting))

    add(SSD_LOSS, PAPER, 3, sweeps(4, 6, PAPER, "teacher"))
    add(SSD_LOSS, NUCLEUS, 3, sweeps(4, 6, NUCLEUS, "teacher"))
    add(SSD_LOSS, WHOLE, 3, 5)
    add(SSD_LOSS_RECORDED, RECORDED, 2, 3)
    add(SSD_DECOMPOSITION, PAPER, 2, sweeps(2, 3, PAPER, "teacher"), backward=False)
    return cases
