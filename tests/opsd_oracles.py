"""The formulas of SPEC section 5, typed anew in float64, with gradients as closed forms. Imports nothing of sdkernels.

A divergence is D = sum_v min(l_v, c) over entries: the tokens, or the listed tokens and a tail. With h_v = dl_v / dlog
P_S(v), 0 where l_v > c, and G = sum_v h_v, its gradient by the logarithms' logits is h_v - G P_S(v).
"""

import itertools
import math
from types import SimpleNamespace

import oracles
import torch
from closeness import FLOAT64_BOUND, LOG_PROB_BOUND, assert_within, epsilon

F64 = torch.float64
DIVERGENCES = [{"divergence": "forward_kl"}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.3}]
REDUCED = [{"top_k": 7, "top_k_from": side, "tail": tail} for side in ("student", "teacher") for tail in (True, False)]
CLIPS = [{}, {"token_clip": 0.02}]
EVERY = [{**d, **k, **c} for d, k, c in itertools.product(DIVERGENCES, [{}, *REDUCED], CLIPS)]
SOME = [
    {"divergence": "reverse_kl", "top_k": 7},
    {"divergence": "forward_kl"},
    {"divergence": "jsd", "beta": 0.3, "token_clip": 0.02},
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl", "top_k": 70, "top_k_from": "teacher", "tail": False},
    {"divergence": "jsd", "beta": 0.7, "top_k": 7, "top_k_from": "teacher", "token_clip": 0.02},
]
GRADIENT_FACTOR = {"forward_kl": 1e-6, "reverse_kl": 5e-6, "jsd": 5e-6}


def relative(log_p, log_q):
    """p (log p - log q): 0 where p is 0, +inf where only q is 0."""
    p = log_p.exp()
    only = (log_q == -torch.inf) & (log_p > -torch.inf)
    return torch.where(only, torch.inf, torch.where(p == 0, 0.0, p * (log_p - log_q)))


def entries(log_p, log_q, divergence, beta):
    """l_v, dl_v / dlog P_S(v), the size of the terms that l_v is the difference of, and P_S' own coefficient in c."""
    p, q = log_p.exp(), log_q.exp()
    size = lambda x, log_x, log_y: torch.where(x == 0, 0.0, x * (log_x.abs() + log_y.abs()))  # noqa: E731
    if divergence == "forward_kl":
        return relative(log_q, log_p), -q, size(q, log_q, log_p), 0 * q
    if divergence == "reverse_kl":
        value = relative(log_p, log_q)
        return value, value + p, size(p, log_p, log_q), 0 * p
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    slope = (1 - beta) * relative(log_p, log_m)
    sizes = beta * size(q, log_q, log_m) + (1 - beta) * size(p, log_p, log_m)
    return beta * relative(log_q, log_m) + slope, slope, sizes, (1 - beta) * p


def listed(logits, top_k):
    """The ids of the top_k largest logits, ties by id, -0 = +0."""
    return logits.detach().to(F64).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def reduced(log_p, ids, tail):
    """Log-probs of the listed tokens and of all others together, (..., k + 1); or of the listed renormalised."""
    chosen = log_p.gather(-1, ids)
    if not tail:
        return oracles.log_softmax(chosen)
    return torch.cat([chosen, log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)], -1)


def divergence_of(student, teacher, *, divergence="forward_kl", beta=0.5, temperature=1.0, top_k=None,
                  top_k_from="student", tail=True, token_clip=None, mask=None, cu_seqlens=None):  # fmt: skip
    """-> D (...), dD / dlogits (..., V), and per unit of upstream gradient SPEC 9's c; `scale` of D's rounding.

    c = (sum_v |h_v| + |G|) / T: the absolute sums of the two rows, h and G P_S, that the gradient is the difference of,
    with h_v of clipped entries too: the rest is not exact to its own size, as little as a small P is. For the JSD,
    whose h is (1 - beta) P_S times a difference of logarithms, besides the sum of (1 - beta) P_S.
    """
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask != 0
    wide = [oracles.log_softmax(x, temperature, keep, cu_seqlens) for x in (student, teacher)]
    log_p, log_q = wide
    reduces = bool(top_k) and top_k < student.shape[-1]
    if reduces:
        ids = listed(student if top_k_from == "student" else teacher, top_k)
        log_p, log_q = (reduced(x, ids, tail) for x in wide)
    clip = torch.inf if token_clip is None else token_clip
    value, whole, size, own = entries(log_p, log_q, divergence, beta)
    slope, size = (torch.where(value > clip, 0.0, x) for x in (whole, size))
    total = slope.sum(-1, keepdim=True)
    gradient = slope - log_p.exp() * total
    if reduces:
        others = wide[0].scatter(-1, ids, -torch.inf)
        share = torch.where((others == -torch.inf) | (not tail), 0.0, oracles.log_softmax(others).exp())
        rest = torch.where(share == 0, 0.0, gradient[..., -1:] * share)
        gradient = rest.scatter(-1, ids, gradient[..., :top_k])
    gradient = torch.where(total.isfinite(), gradient, torch.nan)
    inverse = 1 / oracles.per_token(temperature, keep.shape, cu_seqlens).to(keep.device)
    c = ((whole.nan_to_num(0.0, 0.0).abs() + own).sum(-1) + total.squeeze(-1).abs()) * inverse
    kept = lambda x: torch.where(keep, x, 0.0)  # noqa: E731
    return SimpleNamespace(
        divergence=kept(value.clamp(max=clip).sum(-1)), scale=kept(size.sum(-1)), c=kept(c), p=wide[0].exp(),
        gradient=torch.where(keep.unsqueeze(-1), gradient * inverse.unsqueeze(-1), 0.0), keep=keep,
    )  # fmt: skip


def opsd_loss(student, teacher, *, token_weight=None, reduction="token-mean", normalizer=None, **options):
    """`divergence_of`, with the loss and share = d loss / d D of each token."""
    found = divergence_of(student, teacher, **options)
    share = oracles.reduction_weights(found.keep, reduction, normalizer, options.get("cu_seqlens"))
    if token_weight is not None:
        share = torch.where(found.keep, share * token_weight.to(F64), 0.0)
    value = torch.where(found.keep, found.divergence * share, 0.0)
    return SimpleNamespace(loss=value if reduction == "none" else value.sum(), share=share, **vars(found))


def pulled(truth, upstream):
    """The logits' gradient of sum upstream D, with its c and p, in rows (N, V); and which rows it is NaN in."""
    upstream = torch.where(truth.keep, upstream.to(F64), 0.0)
    column = upstream.unsqueeze(-1)
    vocab = truth.p.shape[-1]
    gradient = torch.where(column == 0, 0.0, truth.gradient * column).reshape(-1, vocab)
    bad = gradient.isnan().any(-1)
    c = torch.where(upstream == 0, 0.0, truth.c * upstream.abs()).flatten()
    return SimpleNamespace(gradient=gradient[~bad], c=c[~bad], p=truth.p.reshape(-1, vocab)[~bad]), bad


def rounding(value, scale, exact):
    """What a divergence may be off by: SPEC 9's bound; beyond logits of order 10, roundings of its terms."""
    bound = FLOAT64_BOUND * value.abs().clamp(min=1) if exact else LOG_PROB_BOUND + epsilon(torch.float32) * value.abs()
    allowed = (4 * epsilon(F64 if exact else torch.float32) * scale).clamp(min=bound)
    return allowed.nan_to_num(1.0, 1.0)


TERMS = ("total", "marginal_kl", "mutual_information")


def opsd_decomposition(student, teachers, *, temperature=1.0, mask=None):
    """RLSD Theorem 1 term by term -> OPSDTerms' fields, and a scale for each."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask != 0
    log_p = oracles.log_softmax(student, temperature, keep)
    log_q = torch.stack([oracles.log_softmax(x, temperature, keep) for x in teachers])
    log_mean = log_q.logsumexp(0) - math.log(len(log_q))
    pairs = {"total": (log_q, log_p), "marginal_kl": (log_mean, log_p), "mutual_information": (log_q, log_mean)}
    values, scales = {}, {}
    bad = log_p.isnan().any(-1) | log_q.isnan().any(-1).any(0)
    for term, (log_x, log_y) in pairs.items():
        value, _, size, _ = entries(log_y.expand(log_x.shape), log_x, "forward_kl", 0.5)
        value, size = (x.sum(-1).mean(0) if log_x is log_q else x.sum(-1) for x in (value, size))
        values[term] = torch.where(keep, torch.where(bad, torch.nan, value), 0.0)
        scales[term] = torch.where(keep, size, 0.0)
    return SimpleNamespace(**values, scale=SimpleNamespace(**scales))


def assert_decomposition(terms, truth, exact):
    for term in TERMS:
        value = getattr(truth, term)
        assert_within(getattr(terms, term), value, rounding(value, getattr(truth.scale, term), exact), term)
    parts = terms.marginal_kl.double() + terms.mutual_information.double()
    allowed = (8 * epsilon(F64 if exact else torch.float32) * truth.scale.total).clamp(min=1e-10 if exact else 5e-5)
    assert_within(parts, terms.total.double(), allowed.nan_to_num(1.0, 1.0), "Theorem 1")


def trl_divergence(student_log_probs, teacher_log_probs, alpha):
    """TRL 1.16, experimental/sdpo/loss_utils.py: compute_divergence."""
    kl = lambda log_x, log_y: torch.nn.functional.kl_div(log_y, log_x, reduction="none", log_target=True)  # noqa: E731
    if alpha == 0.0:
        return kl(teacher_log_probs, student_log_probs).sum(-1)
    if alpha == 1.0:
        return kl(student_log_probs, teacher_log_probs).sum(-1)
    a = torch.tensor(alpha, dtype=student_log_probs.dtype)
    mixture = torch.logsumexp(torch.stack([student_log_probs + (1 - a).log(), teacher_log_probs + a.log()]), dim=0)
    return torch.lerp(kl(student_log_probs, mixture), kl(teacher_log_probs, mixture), alpha).sum(-1)


def trl_top_k_divergence(student_logits, teacher_logits, k, alpha, add_tail):
    """TRL's compute_topk_self_distillation_loss and add_tail_bucket, whose tail is at least 1e-7."""
    ids = student_logits.topk(k, dim=-1).indices
    sides = []
    for logits in (student_logits, teacher_logits):
        log_probs = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
        kept = log_probs.logsumexp(-1, keepdim=True)
        bucket = torch.log(-torch.expm1(kept.clamp(max=-1e-7)))
        sides.append(torch.cat([log_probs, bucket], -1) if add_tail else log_probs - kept)
    return trl_divergence(*sides, alpha)
