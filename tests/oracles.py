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


def log_softmax(logits, temperature=1.0, keep=None, cu_seqlens=None):
    """log softmax(logits / temperature), each step a textbook one; masked rows hold zeros instead of what they held."""
    z = logits.detach().to(F64)
    if keep is not None:
        z = torch.where(keep.unsqueeze(-1), z, 0.0)
    z = z / per_token(temperature, z.shape[:-1], cu_seqlens).to(z.device).unsqueeze(-1)
    z = z - z.max(-1, keepdim=True).values
    return z - z.exp().sum(-1, keepdim=True).log()


def token_log_prob(logits, token_ids, temperature=1.0, mask=None, cu_seqlens=None):
    """log p(token) and the entropy -sum p log p (0 log 0 = 0); 0 where masked."""
    keep = kept(token_ids, mask)
    log_p = log_softmax(logits, temperature, keep, cu_seqlens)
    log_prob = log_p.gather(-1, torch.where(keep, token_ids, 0).long().unsqueeze(-1)).squeeze(-1)
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return SimpleNamespace(log_prob=torch.where(keep, log_prob, 0.0), entropy=torch.where(keep, entropy, 0.0))


def token_log_prob_gradient(logits, token_ids, on_log_prob, on_entropy, temperature=1.0, mask=None, cu_seqlens=None):
    """The logits' gradient of sum on_log_prob log p(token) + on_entropy H; for its tolerance SPEC 9's c, and p."""
    keep = kept(token_ids, mask)
    log_p = log_softmax(logits, temperature, keep, cu_seqlens)
    p = log_p.exp()
    forward = token_log_prob(logits, token_ids, temperature, mask, cu_seqlens)
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
