"""The formulas of SPEC and papers, typed anew in float64. Imports nothing of sdkernels.

Gradients are closed forms: d loss / d log_prob from the token's formula, then the row's (a (onehot - p) - b p (log p +
H)) / T. Where a rule is stated in words ("the gradient is zero iff ..."), it is a condition here.
"""

from itertools import pairwise
from types import SimpleNamespace

import torch

F64 = torch.float64


def kept(token_ids, mask=None):
    keep = token_ids != -100
    return keep if mask is None else keep & (mask != 0)


def per_token(values, shape, cu_seqlens=None):
    """A number, per-token or per-sequence values in float64, one for each token."""
    values = values.detach().to(F64) if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=F64)
    if values.shape == torch.Size(shape):
        return values
    if cu_seqlens is None or values.dim() == 0:
        return (values if values.dim() == 0 else values.unsqueeze(-1)).expand(shape)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long().to(values.device)
    return torch.cat([value.expand(int(n)) for value, n in zip(values, lengths, strict=True)])


def log_softmax(logits, temperature=1.0, keep=None, cu_seqlens=None, inside=None):
    """log softmax(logits / temperature), each step a textbook one; masked rows hold zeros instead of what they held.

    With a bool ``inside`` (..., V) renormalised on it, -inf elsewhere; masked rows ignore it.
    """
    z = logits.detach().to(F64)
    if inside is not None:
        z = torch.where(inside, z, -torch.inf)
    if keep is not None:
        z = torch.where(keep.unsqueeze(-1), z, 0.0)
    z = z / per_token(temperature, z.shape[:-1], cu_seqlens).to(z.device).unsqueeze(-1)
    z = z - z.max(-1, keepdim=True).values
    return z - z.exp().sum(-1, keepdim=True).log()


def token_log_prob(logits, token_ids, temperature=1.0, mask=None, cu_seqlens=None, inside=None):
    """log p(token) and the entropy -sum p log p (0 log 0 = 0); 0 where masked."""
    keep = kept(token_ids, mask)
    log_p = log_softmax(logits, temperature, keep, cu_seqlens, inside)
    log_prob = log_p.gather(-1, torch.where(keep, token_ids, 0).long().unsqueeze(-1)).squeeze(-1)
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return SimpleNamespace(log_prob=torch.where(keep, log_prob, 0.0), entropy=torch.where(keep, entropy, 0.0))


def token_log_prob_gradient(logits, token_ids, on_log_prob, on_entropy, temperature=1.0, mask=None, cu_seqlens=None,
                            inside=None):  # fmt: skip
    """The logits' gradient of sum on_log_prob log p(token) + on_entropy H; for its tolerance SPEC 9's c, and p."""
    keep = kept(token_ids, mask)
    log_p = log_softmax(logits, temperature, keep, cu_seqlens, inside)
    p = log_p.exp()
    forward = token_log_prob(logits, token_ids, temperature, mask, cu_seqlens, inside)
    a, b = (per_token(on, keep.shape).to(p.device) for on in (on_log_prob, on_entropy))
    a, b = torch.where(keep & (forward.log_prob != -torch.inf), a, 0.0), torch.where(keep, b, 0.0)
    onehot = torch.zeros_like(p).scatter_(-1, torch.where(keep, token_ids, 0).long().unsqueeze(-1), 1.0)
    surprise = torch.where(log_p == -torch.inf, 0.0, p * (log_p + forward.entropy.unsqueeze(-1)))
    inverse = 1 / per_token(temperature, keep.shape, cu_seqlens).to(p.device)
    gradient = (a.unsqueeze(-1) * (onehot - p) - b.unsqueeze(-1) * surprise) * inverse.unsqueeze(-1)
    c = (a.abs() + b.abs() * (1 + forward.entropy)) * inverse
    return SimpleNamespace(gradient=torch.where(keep.unsqueeze(-1), gradient, 0.0), c=c, p=p)


def evidence(student, teacher, advantages, *, clip_range=0.2, lam=1.0, keep=None, credit_mask=None,
             apply_to="all", pessimistic=False):  # fmt: skip
    """RLSD Eq. 13-16 per token, all (...) in float64."""
    below, above = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    a = advantages
    delta = teacher - student
    weight = torch.where(a == 0, 1.0, torch.exp(torch.sign(a) * delta))
    clipped = torch.where(weight.isnan(), weight, weight.clip(1 - below, 1 + above))
    replaced = torch.minimum(weight * a, clipped * a) if pessimistic else a * clipped
    advantage = a * (1 - lam) + lam * replaced
    own = (a == 0) | torch.tensor(lam == 0)
    if apply_to == "negative":
        own = own | ~(a < 0)
    if apply_to == "positive":
        own = own | ~(a > 0)
    if credit_mask is not None:
        own = own | (credit_mask == 0)
    results = {"advantage": torch.where(own, a, advantage), "weight": weight, "information_gain": delta}
    if keep is not None:
        results = {name: torch.where(keep, value, 0.0) for name, value in results.items()}
    return SimpleNamespace(**results)


def official_rlsd_advantages(student, teacher, advantages, mask, lam, epsilon):
    """The authors' `_build_stgca_advantages`, on current log-probs -> advantage, weight."""
    delta = (teacher - student) * mask
    weight = torch.exp(torch.sign(advantages) * delta) * mask
    reweight = ((1 - lam) + lam * torch.clamp(weight, 1 - epsilon, 1 + epsilon)) * mask
    return advantages * reweight, weight


def swift_rlsd_advantages(old, teacher, advantages, mask, lam, epsilon):
    """ms-swift's `apply_rlsd_reweight`: the same on the log-probs of the rollout, once per batch."""
    return official_rlsd_advantages(old, teacher, advantages, mask, lam, epsilon)[0]


def surrogate(log_prob, old_log_prob, advantages, epsilon_low=0.2, epsilon_high=0.2, dual_clip=None):
    """-min(r A, clip(r) A), at most -c A where A < 0; -> value, its derivative by log_prob, r."""
    ratio = torch.ones_like(log_prob) if old_log_prob is None else torch.exp(log_prob - old_log_prob)
    if old_log_prob is None:
        ratio = torch.where(log_prob.isnan(), log_prob, ratio)
    unclipped = torch.where(advantages == 0, 0.0, ratio * advantages)
    value = -torch.minimum(unclipped, ratio.clip(1 - epsilon_low, 1 + epsilon_high) * advantages)
    flat = ((advantages > 0) & (ratio > 1 + epsilon_high)) | ((advantages < 0) & (ratio < 1 - epsilon_low))
    if dual_clip is not None:
        value = torch.where(advantages < 0, torch.minimum(value, -dual_clip * advantages), value)
        flat = flat | ((advantages < 0) & (ratio > dual_clip))
    return value, torch.where(flat, 0.0, -unclipped), ratio


def k3(log_prob, reference_log_prob):
    """exp(d) - d - 1 and its derivative by log_prob."""
    d = reference_log_prob - log_prob
    return d.exp() - d - 1, 1 - d.exp()


def sequences(keep, cu_seqlens=None):
    """Index tensors into the flattened tokens, one for each sequence."""
    flat = torch.arange(keep.numel(), device=keep.device)
    if cu_seqlens is not None:
        return [flat[begin:end] for begin, end in pairwise(cu_seqlens.tolist())]
    length = keep.shape[-1]
    return [flat[i * length : (i + 1) * length] for i in range(keep.shape[:-1].numel())]


def reduction_weights(keep, reduction, normalizer=None, cu_seqlens=None):
    """d reduced / d value for each token: what SPEC's reductions multiply kept values with."""
    weights = keep.to(F64)
    divided = lambda total, count: total / count if count else torch.zeros_like(total)  # noqa: E731
    if reduction == "none":
        return weights
    if reduction in ("sum", "token-mean"):
        count = 1 if reduction == "sum" else int(keep.sum())
    else:
        parts = sequences(keep, cu_seqlens)
        count = len(parts)
        if reduction == "seq-mean-token-mean":
            flat = weights.reshape(-1)
            for part in parts:
                flat[part] = divided(flat[part], int(keep.reshape(-1)[part].sum()))
            weights = flat.reshape(keep.shape)
    return divided(weights, count if normalizer is None else float(normalizer))


def policy_loss(log_prob, advantages, keep, old_log_prob=None, *, epsilon_low=0.2, epsilon_high=0.2, dual_clip=None,
                reference_log_prob=None, beta=0.0, token_weight=None, reduction="token-mean", normalizer=None,
                cu_seqlens=None):  # fmt: skip
    """GRPO's loss of (...) float64 log-probs -> loss, slope = d loss / d log_prob, slope_size, ratio, scale.

    slope_size adds the sizes of slope's terms; scale is what a relative error of the ratios moves a token's loss by.
    """
    value, slope, ratio = surrogate(log_prob, old_log_prob, advantages, epsilon_low, epsilon_high, dual_clip)
    if token_weight is not None:
        value, slope = value * token_weight, slope * token_weight
    scale, size = value.abs(), slope.abs()
    if beta > 0:
        k3_value, k3_slope = k3(log_prob, reference_log_prob)
        value, slope, size = value + beta * k3_value, slope + beta * k3_slope, size + beta * (2 - k3_slope)  # e^d + 1
        scale = scale + beta * ((reference_log_prob - log_prob).exp() + 1)
    weights = reduction_weights(keep, reduction, normalizer, cu_seqlens)
    value, slope, size, ratio, scale = (torch.where(keep, x, 0.0) for x in (value, slope, size, ratio, scale))
    return SimpleNamespace(
        loss=value if reduction == "none" else (value * weights).sum(), ratio=ratio, scale=scale * weights,
        slope=slope * weights, slope_size=size * weights,
    )  # fmt: skip


def grpo_loss(logits, token_ids, advantages, old_log_prob=None, *, temperature=1.0, mask=None, upstream=1.0, **options):
    """-> loss, log_prob, entropy, ratio, scale, slope, and the logits' gradient of upstream * loss with its c and p."""
    cu_seqlens = options.get("cu_seqlens")
    keep = kept(token_ids, mask)
    forward = token_log_prob(logits, token_ids, temperature, mask, cu_seqlens)
    constants = {
        name: None if value is None else torch.where(keep, value.detach().to(F64), 0.0)
        for name, value in (
            ("old_log_prob", old_log_prob),
            ("reference_log_prob", options.pop("reference_log_prob", None)),
            ("token_weight", options.pop("token_weight", None)),
        )
    }
    advantages = per_token(advantages, keep.shape, cu_seqlens)
    loss = policy_loss(forward.log_prob, advantages, keep, **constants, **options)
    on_log_prob, size = (torch.where(keep, x * upstream, 0.0) for x in (loss.slope, loss.slope_size))
    gradient = token_log_prob_gradient(logits, token_ids, on_log_prob, 0.0, temperature, mask, cu_seqlens)
    gradient.c = size.abs() / per_token(temperature, keep.shape, cu_seqlens).to(size.device)
    return SimpleNamespace(
        loss=loss.loss, log_prob=forward.log_prob, entropy=forward.entropy, ratio=loss.ratio, scale=loss.scale,
        slope=loss.slope, **vars(gradient),
    )  # fmt: skip


def rlsd_token_advantage(student, teacher, token_ids, advantages, *, temperature=1.0, mask=None, cu_seqlens=None,
                         **options):  # fmt: skip
    """`evidence` from logits, or from teacher log-probs (...); with both sides' log-probs and entropies."""
    keep = kept(token_ids, mask)
    policy = token_log_prob(student, token_ids, temperature, mask, cu_seqlens)
    if teacher.dim() == student.dim():
        judge = token_log_prob(teacher, token_ids, temperature, mask, cu_seqlens)
    else:
        log_prob = torch.where(keep, teacher.to(F64), 0.0)
        judge = SimpleNamespace(log_prob=log_prob, entropy=torch.zeros_like(log_prob))
    advantages = per_token(advantages, keep.shape, cu_seqlens)
    weighed = evidence(policy.log_prob, judge.log_prob, advantages, keep=keep, **options)
    return SimpleNamespace(
        **vars(weighed), student_log_prob=policy.log_prob, teacher_log_prob=judge.log_prob,
        student_entropy=policy.entropy, teacher_entropy=judge.entropy,
    )  # fmt: skip


EVIDENCE_OPTIONS = ("clip_range", "lam", "apply_to", "pessimistic", "credit_mask")


def rlsd_loss(student, teacher, token_ids, advantages, old_log_prob=None, *, evidence_from="current", **options):
    """-> the fields of RLSDOutput, and of `grpo_loss` on these advantages."""
    weighing = {name: options.pop(name) for name in EVIDENCE_OPTIONS if name in options}
    shared = {name: options.get(name) for name in ("mask", "cu_seqlens")}
    shared["temperature"] = options.get("temperature", 1.0)
    found = rlsd_token_advantage(student, teacher, token_ids, advantages, **shared, **weighing)
    if evidence_from == "old" and old_log_prob is not None:
        keep = kept(token_ids, shared["mask"])
        old = torch.where(keep, old_log_prob.to(F64), 0.0)
        spread = per_token(advantages, keep.shape, shared["cu_seqlens"])
        again = evidence(old, found.teacher_log_prob, spread, keep=keep, **weighing)
        vars(found).update(vars(again))
    policy = grpo_loss(student, token_ids, found.advantage, old_log_prob, **options)
    return SimpleNamespace(**vars(policy), **vars(found))


MARGIN = 2e-6  # of a boundary's mass: tie groups so close to it may fall either way


def support(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, keep=None, cu_seqlens=None):
    """SPEC section 2 by a sort -> the tokens that S must hold and those that it may, both bool (..., V).

    Rows without a distribution (NaN, +inf, or only -inf) hold none; masked rows hold all.
    """
    z = logits.detach().to(F64)
    if keep is not None:
        z = torch.where(keep.unsqueeze(-1), z, 0.0)
    t = per_token(temperature, z.shape[:-1], cu_seqlens).to(z.device).unsqueeze(-1)
    ordered, order = z.sort(dim=-1, descending=True)
    largest = ordered[..., :1]
    must = (ordered > -torch.inf) & largest.isfinite()
    if top_k:
        must = must & (ordered >= ordered[..., min(top_k, z.shape[-1]) - 1].unsqueeze(-1))
    may = must
    gap = torch.where(may, (ordered - largest) / t, -torch.inf)
    if top_p is not None and top_p < 1:
        mass = gap.exp()
        total, reached = mass.sum(-1, keepdim=True), mass.cumsum(-1)
        places = torch.arange(z.shape[-1], device=z.device).expand(z.shape)
        first = torch.where(ordered == ordered.roll(1, -1), 0, places).cummax(-1).values  # of a token's ties
        above = torch.where(first == 0, 0.0, reached.gather(-1, (first - 1).clamp(min=0)))
        must, may = must & (above < top_p * total * (1 - MARGIN)), may & (above < top_p * total * (1 + MARGIN))
    if min_p:
        least = torch.tensor(min_p, dtype=F64).log()
        must = must & ((gap >= least + MARGIN) | (ordered == largest))
        may = may & (gap >= least - MARGIN)
    unsorted = lambda x: torch.zeros_like(x).scatter_(-1, order, x)  # noqa: E731
    return SimpleNamespace(must=unsorted(must), may=unsorted(may))


def named(token_ids, vocab):
    """The tokens (..., V) that ids (..., K) name, -1 naming none."""
    inside = torch.zeros(*token_ids.shape[:-1], vocab + 1, dtype=torch.bool, device=token_ids.device)
    return inside.scatter_(-1, torch.where(token_ids == -1, vocab, token_ids).long(), True)[..., :vocab]


def dense(token_ids, log_probs, vocab):
    """log q (..., V) of a sparse distribution, -inf at ids that it does not list."""
    log_q = torch.full((*token_ids.shape[:-1], vocab + 1), -torch.inf, dtype=F64, device=token_ids.device)
    places = torch.where(token_ids == -1, vocab, token_ids).long()
    return log_q.scatter_(-1, places, log_probs.to(F64))[..., :vocab]


def sparse(log_q, logits, places):
    """The `places` most probable, ties by id, of log q (..., V) -> ids and log-probs, renormalised if they are cut."""
    inside = log_q > -torch.inf
    size = inside.sum(-1)
    z = torch.where(inside, logits.detach().to(F64), -torch.inf)
    order = z.sort(dim=-1, descending=True, stable=True).indices[..., :places]
    token_ids, log_probs = order, log_q.gather(-1, order)
    token_ids = torch.where(log_probs == -torch.inf, -1, token_ids)
    cut = torch.where(size > places, log_probs.exp().sum(-1).log(), 0.0)
    log_probs = log_probs - cut.unsqueeze(-1)
    rest = (0, max(places - log_q.shape[-1], 0))
    pad = torch.nn.functional.pad
    return SimpleNamespace(
        token_ids=pad(token_ids, rest, value=-1), log_probs=pad(log_probs, rest, value=-torch.inf), size=size
    )


def log_softmax_gradient(logits, upstream, inside, temperature=1.0):
    """The logits' gradient of sum_S g log q, (g - q sum_S(g)) / T; c counts q's coefficient and the norm of g."""
    q = log_softmax(logits, temperature, inside=inside).exp()
    inverse = 1 / per_token(temperature, q.shape[:-1]).to(q.device)
    g = torch.where(inside, upstream.detach().to(F64), 0.0)
    total = g.sum(-1)
    gradient = (g - q * total.unsqueeze(-1)) * inverse.unsqueeze(-1)
    return SimpleNamespace(gradient=gradient, c=(total.abs() + g.norm(dim=-1)) * inverse, p=q)


SSD_TERMS = ("support_compression", "within_support_reshaping", "base_alignment", "constant", "cross_entropy",
             "kept_mass")  # fmt: skip


def _ssd_distributions(student, log_q, temperature, keep, cu_seqlens):
    """log p, log p_S, log p_ST and log q, in masked rows of one and the same distribution, and T as a column."""
    log_q = torch.where(keep.unsqueeze(-1), log_q, -torch.tensor(float(log_q.shape[-1]), dtype=F64).log())
    log_p = log_softmax(student, 1.0, keep)
    inside = log_q != -torch.inf
    log_p_s = log_softmax(log_p, inside=inside)
    log_p_st = log_softmax(log_p, temperature, keep, cu_seqlens, inside)
    t = per_token(temperature, keep.shape, cu_seqlens).to(log_p.device)
    return log_p, log_p_s, log_p_st, log_q, torch.where(keep, t, 1.0)


def ssd(student, log_q, temperature, mask=None, cu_seqlens=None):
    """SSD Eq. 4 term by term, from log q (..., V), -inf outside S -> SSDTerms' fields, and `scale`.

    scale is E_q |log p_S - max log p_S| + T H(q): the size of the sums that base_alignment is the difference of.
    """
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask != 0
    log_p, log_p_s, log_p_st, log_q, t = _ssd_distributions(student, log_q, temperature, keep, cu_seqlens)
    q, inside = log_q.exp(), log_q != -torch.inf
    expected = lambda x: torch.where(q == 0, 0.0, q * x).sum(-1)  # noqa: E731
    kept_mass = torch.where(inside, log_p.exp(), 0.0).sum(-1)
    order = 1 / t
    power_sum = torch.where(inside, log_p_s.exp() ** order.unsqueeze(-1), 0.0).sum(-1)
    renyi = torch.where(order == 1, 0.0, power_sum.log() / torch.where(order == 1, 1.0, 1 - order))
    entropy = -expected(log_q)
    log_kept = log_softmax_sum(log_p, inside)
    terms = {
        "support_compression": -log_kept,
        "within_support_reshaping": (1 - t) * renyi,
        "base_alignment": t * expected(log_q - log_p_st),
        "constant": t * entropy,
        "cross_entropy": -expected(log_p),
        "kept_mass": kept_mass,
        "support_size": inside.sum(-1),
    }
    drop = log_p_s - log_p_s.amax(-1, keepdim=True)
    scale = expected(drop.abs()).nan_to_num(0.0, 0.0) + t * entropy.abs()
    return SimpleNamespace(**{name: torch.where(keep, x, 0) for name, x in terms.items()}, scale=scale)


def log_softmax_sum(log_p, inside):
    """log sum_S p without the underflow of p."""
    x = torch.where(inside, log_p, -torch.inf)
    m = x.amax(-1, keepdim=True)
    return ((x - m).exp().sum(-1, keepdim=True).log() + m).squeeze(-1)


def ssd_gradient(student, log_q, temperature, upstream, mask=None, cu_seqlens=None):
    """The student's gradient of sum over SSD_TERMS of upstream[name] term; c adds |coefficients| of p, p_S, p_ST, q."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask != 0
    logs = _ssd_distributions(student, log_q, temperature, keep, cu_seqlens)[:4]
    zero = torch.zeros(keep.shape, dtype=F64, device=keep.device)
    a, b, c, _, e, f = (torch.where(keep, upstream.get(name, zero).to(F64), 0.0) for name in SSD_TERMS)
    mass = log_softmax_sum(logs[0], logs[3] != -torch.inf).exp()
    coefficients = [k.unsqueeze(-1) for k in (a + e - f * mass, -a + b + f * mass, -b + c, -c - e)]
    rows = [torch.where(k == 0, 0.0, k * log_x.exp()) for k, log_x in zip(coefficients, logs, strict=True)]
    c = sum(k.abs() for k in coefficients).squeeze(-1)
    return SimpleNamespace(gradient=sum(rows), c=c, p=logs[0].exp())


def ssd_loss(terms, weights=(1.0, 1.0, 1.0), keep=None, token_weight=None, reduction="token-mean", normalizer=None,
             cu_seqlens=None):  # fmt: skip
    """-> loss, d loss / d term for each of SSD_TERMS, and the loss' scale per token."""
    each = terms.constant + sum(w * getattr(terms, name) for w, name in zip(weights, SSD_TERMS, strict=False) if w)
    share = reduction_weights(keep, reduction, normalizer, cu_seqlens)
    if token_weight is not None:
        share = torch.where(keep, share * token_weight.to(F64), 0.0)
    value = torch.where(share == 0, 0.0, each * share)
    upstream = {name: share * w for w, name in zip(weights, SSD_TERMS, strict=False)}
    return SimpleNamespace(loss=value if reduction == "none" else value.sum(), upstream=upstream, share=share)
