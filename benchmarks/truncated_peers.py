"""What a user would run instead of truncation and SSD: transformers' warpers, one sort, torch.compile, FlashInfer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.prepared import Forward, ForwardBackward, Results
from benchmarks.runner import Prepared, Unable
from benchmarks.truncated_truth import PLACES, Setting, recorded_base, sampled_ids, upstream

MOST_VARIANTS = 256  # of a compiled function: each setting and dtype is one, and beyond 8 PyTorch runs it eagerly

Filter = Callable[[Tensor, Setting], Tensor]  # of logits: divided by the temperature, float32, -inf outside the support
Build = Callable[[Inputs], Prepared]


def compiled(function: Callable) -> Callable:
    """torch.compile for fixed shapes."""
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    return torch.compile(function, dynamic=False)


def warpers(logits: Tensor, setting: Setting) -> Tensor:
    """transformers' own, in its order; where the temperature is 1 it calls no warper for it."""
    from transformers.generation import logits_process

    z = logits.float()
    if setting.temperature != 1.0:
        z = logits_process.TemperatureLogitsWarper(setting.temperature)(None, z)
    if setting.top_k:
        z = logits_process.TopKLogitsWarper(setting.top_k)(None, z)
    if setting.top_p:
        z = logits_process.TopPLogitsWarper(setting.top_p)(None, z)
    if setting.min_p:
        z = logits_process.MinPLogitsWarper(setting.min_p)(None, z)
    return z


def kept_in_order(ordered: Tensor, setting: Setting) -> Tensor:
    """Sorted float32 rows, -inf outside the support."""
    if setting.top_k and setting.top_k < ordered.shape[-1]:
        ordered = ordered.masked_fill(ordered < ordered[:, setting.top_k - 1, None], -torch.inf)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if setting.top_p:
        mass = ordered.softmax(-1)
        keep &= mass.cumsum(-1) - mass < setting.top_p
    if setting.min_p:
        keep &= (ordered - ordered[:, :1]).exp() >= setting.min_p
    return ordered.masked_fill(~keep, -torch.inf)


def one_sort(logits: Tensor, setting: Setting) -> Tensor:
    """The support as a threshold, from at most one sort and no scatter: what one writes by hand."""
    z = logits.float() / setting.temperature
    with torch.no_grad():
        if setting.top_p:
            ordered = z.sort(-1, descending=True).values
        else:
            ordered = z.topk(min(setting.top_k or 1, z.shape[-1])).values
        kept = kept_in_order(ordered, setting)
        threshold = kept.where(kept > -torch.inf, torch.inf).amin(-1, keepdim=True)
        if not setting.top_k and not setting.top_p:
            threshold = threshold + torch.tensor(setting.min_p).log()
    return z.masked_fill(z < threshold, -torch.inf)


def flashinfer(logits: Tensor, setting: Setting) -> Tensor:
    """FlashInfer's renormalised probabilities; it has no gradient, so their zeros mask the logits."""
    if not logits.is_cuda:
        raise Unable("needs a CUDA GPU")
    if setting.min_p:
        raise Unable("FlashInfer has no min_p renorm")
    from flashinfer.sampling import top_k_renorm_probs, top_p_renorm_probs

    z = logits.float() / setting.temperature
    with torch.no_grad():
        q = z.softmax(-1)
        q = top_k_renorm_probs(q, setting.top_k) if setting.top_k else q
        q = top_p_renorm_probs(q, setting.top_p) if setting.top_p else q
    return z.masked_fill(q == 0, -torch.inf)


def made(function: Callable, compiles: bool) -> Callable:
    """The function, compiled if so."""
    return compiled(function) if compiles else function


def kept_by(filter_: Filter, logits: Tensor, setting: Setting, compiles: bool) -> Callable[[], Results]:
    """The set that an implementation chose, found again outside its timed run."""
    return lambda: {"support": made(filter_, compiles)(logits, setting) > -torch.inf}


def log_softmax(filter_: Filter, setting: Setting, *, backward: bool, compiles: bool = False) -> Build:
    """log_softmax of filtered logits, in float32."""

    def log_q(logits: Tensor) -> Tensor:
        return torch.log_softmax(filter_(logits, setting), -1)

    def build(inputs: Inputs) -> Prepared:
        function = made(log_q, compiles)
        beside = kept_by(filter_, inputs.student, setting, compiles)
        if not backward:
            return Forward(lambda: {"log_q": function(inputs.student)}, beside)
        # log_softmax's backward would count what comes from outside the support, where a user's loss has nothing.
        gradient = upstream(inputs, rows_too=True).float() * beside()["support"]
        return ForwardBackward(
            inputs.student, lambda leaf: {"log_q": function(leaf)}, upstream=("log_q", gradient), beside=beside
        )

    return build


def token_log_prob(filter_: Filter, setting: Setting, *, compiles: bool = False) -> Build:
    """log_softmax of filtered logits and a gather, with backward."""

    def log_prob(logits: Tensor, token_ids: Tensor) -> Tensor:
        return torch.log_softmax(filter_(logits, setting), -1).gather(-1, token_ids[:, None])[:, 0]

    def build(inputs: Inputs) -> Prepared:
        function, token_ids = made(log_prob, compiles), sampled_ids(inputs, setting)
        return ForwardBackward(
            inputs.student,
            lambda leaf: {"log_prob": function(leaf, token_ids)},
            upstream=("log_prob", upstream(inputs, rows_too=False)),
            beside=kept_by(filter_, inputs.student, setting, compiles),
        )

    return build


def sparse(log_probs: Tensor, token_ids: Tensor, size: Tensor) -> Results:
    """The first places of sorted log-probs as a sparse support, renormalised."""
    log_probs = log_probs.log_softmax(-1)
    return {
        "token_ids": token_ids.masked_fill(log_probs == -torch.inf, -1),
        "log_probs": log_probs,
        "support_size": size,
    }


def support_of_warpers(setting: Setting, *, compiles: bool = False) -> Build:
    """The warpers, then topk."""

    def support(logits: Tensor) -> Results:
        z = warpers(logits, setting)
        return sparse(*z.topk(min(PLACES, z.shape[-1])), (z > -torch.inf).sum(-1))

    def build(inputs: Inputs) -> Prepared:
        function = made(support, compiles)
        return Forward(lambda: function(inputs.student), kept_by(warpers, inputs.student, setting, compiles))

    return build


def support_of_one_sort(setting: Setting) -> Build:
    """The head of one sort."""

    def support(logits: Tensor) -> Results:
        ordered, token_ids = (logits.float() / setting.temperature).sort(-1, descending=True)
        kept = kept_in_order(ordered, setting)
        return sparse(kept[:, :PLACES], token_ids[:, :PLACES], (kept > -torch.inf).sum(-1))

    def build(inputs: Inputs) -> Prepared:
        def beside() -> Results:
            ordered, token_ids = (inputs.student.float() / setting.temperature).sort(-1, descending=True)
            kept = kept_in_order(ordered, setting) > -torch.inf
            return {"support": torch.zeros_like(kept).scatter_(-1, token_ids, kept)}

        return Forward(lambda: support(inputs.student), beside)

    return build


def three_terms(student: Tensor, base: Tensor, setting: Setting) -> Results:
    """SSD's terms as one writes them from Eq. 4, with log_softmax and logsumexp; the loss is the mean of their sum."""
    t = setting.temperature
    with torch.no_grad():
        log_q = torch.log_softmax(warpers(base, setting), -1)
        inside, q = log_q > -torch.inf, log_q.exp()
        constant = -t * (q * log_q).where(inside, 0).sum(-1)
    z = student.float()
    of_support = z.masked_fill(~inside, -torch.inf)
    return _summed(z, of_support, log_q, q, inside, constant, t)


def recorded_three_terms(student: Tensor, token_ids: Tensor, log_q: Tensor, setting: Setting) -> Results:
    """The same where the base's support is recorded: its logits are gathered."""
    t = setting.temperature
    inside, q = token_ids >= 0, log_q.exp()
    constant = -t * (q * log_q).where(inside, 0).sum(-1)
    z = student.float()
    of_support = z.gather(-1, token_ids.clamp(min=0)).masked_fill(~inside, -torch.inf)
    return _summed(z, of_support, log_q, q, inside, constant, t)


def _summed(
    z: Tensor, of_support: Tensor, log_q: Tensor, q: Tensor, inside: Tensor, constant: Tensor, t: float
) -> Results:
    lse, support_lse = z.logsumexp(-1), of_support.logsumexp(-1)
    tempered_lse = t * (of_support / t).logsumexp(-1)
    log_p_st = torch.log_softmax(of_support / t, -1)
    terms = {
        "support_compression": lse - support_lse,
        "within_support_reshaping": support_lse - tempered_lse,
        "base_alignment": t * (q * (log_q - log_p_st)).where(inside, 0).sum(-1),
        "constant": constant,
    }
    return {"loss": sum(terms.values()).mean(), **terms}


def cross_entropy(student: Tensor, base: Tensor, setting: Setting) -> Results:
    """Soft-label cross-entropy: the loss where all three weights are 1."""
    with torch.no_grad():
        q = torch.softmax(warpers(base, setting), -1)
    each = torch.nn.functional.cross_entropy(student.float(), q, reduction="none")
    return {"loss": each.mean(), "cross_entropy": each}


def recorded_cross_entropy(student: Tensor, token_ids: Tensor, log_q: Tensor, setting: Setting) -> Results:
    """The same on a recorded support."""
    z = student.float()
    each = z.logsumexp(-1) - (log_q.exp() * z.gather(-1, token_ids.clamp(min=0))).sum(-1)
    return {"loss": each.mean(), "cross_entropy": each}


def ssd(formula: Callable[..., Results], setting: Setting, *, backward: bool, compiles: bool = False) -> Build:
    """One of the four formulas above."""

    def build(inputs: Inputs) -> Prepared:
        function = made(formula, compiles)
        if setting.recorded:
            base = recorded_base(inputs, setting)
            arguments: tuple[Tensor, ...] = (base.token_ids, base.log_probs)
            beside: Callable[[], Results] = dict
        else:
            arguments = (inputs.teacher,)
            beside = kept_by(warpers, inputs.teacher, setting, compiles)
        if backward:
            return ForwardBackward(inputs.student, lambda leaf: function(leaf, *arguments, setting), beside=beside)
        return Forward(lambda: function(inputs.student, *arguments, setting), beside)

    return build
