"""What the tests of linear_* share: problems, the logits version in float64, and how close to it is close."""

from types import SimpleNamespace

import nasty
import torch
from closeness import EAGER_FACTOR, FLOAT64_BOUND, LOG_PROB_BOUND, ROUNDING, WEIGHT_BOUND, assert_within, epsilon
from conftest import INTERPRETED

import sdkernels

H, H2, V = 12, 7, 61
WITH_OTHER = {"rlsd_loss": "teacher", "rlsd_token_advantage": "teacher", "ssd_loss": "base", "opsd_loss": "teacher"}
NUMBERS = {"loss", "weight", "ratio", "advantage", "kept_mass"}  # the rest are logarithms and their expectations
CONSTANT = {"advantage", "weight", "information_gain", "teacher_log_prob", "teacher_entropy", "ratio", "constant"}
LOSSES = ("grpo_loss", "rlsd_loss", "ssd_loss", "opsd_loss")
FUNCTIONS = ("token_log_prob", *LOSSES, "rlsd_token_advantage", "truncated_support")
DIFFERENTIABLE = FUNCTIONS[:5]


def problem(*shape, hidden=torch.float32, weight=None, device="cpu", width=H, vocab=V):
    """Hidden states and heads of both sides, whose logits are of order 4, and per-token arguments."""
    weight = weight or hidden
    spread = 4 * width**-0.5
    draw = lambda *size: torch.randn(size, device=device)  # noqa: E731
    count = torch.Size(shape).numel()
    student = draw(*shape, width)
    return SimpleNamespace(
        shape=torch.Size(shape),
        hidden=student.to(hidden),
        weight=(draw(vocab, width) * spread).to(weight),
        bias=draw(vocab).to(weight),
        other=(student + draw(*shape, width) / 4).to(hidden),
        own=(draw(*shape, H2).to(hidden), (draw(vocab, H2) * 1.5).to(weight), draw(vocab).to(weight)),
        token_ids=nasty.ids(count, vocab, device).reshape(shape),
        advantages=draw(*shape),
        old=-torch.rand(shape, device=device) * 9,
        positive=torch.rand(shape, device=device) + 0.5,
        mask=torch.rand(shape, device=device) < 0.7,
    )


def arguments_of(name, p):
    """Positional arguments after the head, and the options without which a function cannot be called."""
    positional = {
        "token_log_prob": (p.token_ids,),
        "grpo_loss": (p.token_ids, p.advantages, p.old),
        "rlsd_loss": (p.token_ids, p.advantages, p.old),
        "rlsd_token_advantage": (p.token_ids, p.advantages),
    }.get(name, ())
    needed = {"ssd_loss": {"temperature": 0.8}, "truncated_support": {"max_size": 5}}.get(name, {})
    return positional, needed


def from_head(name, p, *, other=None, chunk_size=None, **options):
    """linear_<name> of a problem as a function of hidden states, weight and bias."""
    positional, needed = arguments_of(name, p)
    side = (p.other if other is None else other,) if name in WITH_OTHER else ()
    function, given = getattr(sdkernels, f"linear_{name}"), {**needed, **options, "chunk_size": chunk_size}
    return lambda hidden, weight, bias: function(hidden, *side, weight, *positional, **{**given, "bias": bias})


def fused(name, p, bias=None, **options):
    """linear_<name> of a problem; `other` replaces the hidden states of teacher or base."""
    return from_head(name, p, **options)(p.hidden, p.weight, bias)


def logits_of(hidden, weight, bias=None, softcap=None, logit_scale=1.0):
    z = hidden @ weight.t()
    z = (z if bias is None else z + bias) * logit_scale
    return z if softcap is None else softcap * (z / softcap).tanh()


def dense(name, p, *, other=None, **options):
    """The logits version, and its logits."""
    positional, needed = arguments_of(name, p)
    head = {key: options.pop(key) for key in ("bias", "softcap", "logit_scale") if key in options}
    student = logits_of(p.hidden, p.weight, **head)
    side = ()
    if name in WITH_OTHER:
        prefix, hidden = WITH_OTHER[name], p.other if other is None else other
        weight, bias = (options.pop(f"{prefix}_{key}", None) for key in ("lm_head_weight", "bias"))
        if isinstance(hidden, torch.Tensor) and hidden.dim() == len(p.shape) + 1:
            own = {"bias": head.get("bias") if bias is None else bias}
            with torch.no_grad():
                hidden = logits_of(hidden, p.weight if weight is None else weight, **{**head, **own})
        side = (hidden,)
    return getattr(sdkernels, name)(student, *side, *positional, **{**needed, **options}), student


def fields(output):
    """Results by name, SSDOutput's terms among them."""
    found = {}
    for name, value in output._asdict().items():
        if name == "terms":
            found.update(fields(value))
        elif name != "temperature":
            found[name] = value
    return found


def totals_of(found, everything, seed=7):
    """What to differentiate: the loss, where it is a number, and random upstream gradients on all else that flows."""
    pulls = torch.Generator(device="cpu").manual_seed(seed)
    reduced = "loss" in found and found["loss"].dim() == 0
    rest = 0
    for name, value in found.items():
        upstream = torch.randn(value.shape, generator=pulls, dtype=torch.float64).to(value.device)
        if value.requires_grad and name not in CONSTANT and not (reduced and name == "loss"):
            rest = rest + (value.double() * upstream).sum()
    if not reduced:
        return [rest]
    loss = found["loss"].double() * 1.7
    return [loss, rest] if everything else [loss]


def leaves(p, options, dtype=None):
    """A copy of the problem and its options with leaves for hidden states, weight and bias."""
    own = lambda x: x.detach().to(dtype or x.dtype).requires_grad_()  # noqa: E731
    heads = ("teacher_lm_head_weight", "teacher_bias", "base_lm_head_weight", "base_bias")
    options = {k: v.to(dtype or v.dtype) if k in heads and v is not None else v for k, v in options.items()}
    changes = {"hidden": own(p.hidden), "weight": own(p.weight), "other": p.other.to(dtype or p.other.dtype)}
    other = options.get("other")
    if isinstance(other, torch.Tensor):
        options["other"] = other.to(dtype or other.dtype)
    inputs = [changes["hidden"], changes["weight"]]
    if options.get("bias") is not None:
        options["bias"] = own(options["bias"])
        inputs.append(options["bias"])
    return SimpleNamespace(**{**vars(p), **changes}), options, inputs


def run_fused(name, p, everything=False, **options):
    """Results by name, and gradients of hidden states, weight and bias."""
    copy, options, inputs = leaves(p, options)
    found = fields(fused(name, copy, **options))
    if name not in DIFFERENTIABLE:
        assert not any(x.requires_grad for x in found.values())
        return found, []
    return found, torch.autograd.grad(sum(totals_of(found, everything)), inputs)


def run_dense(name, p, dtype, everything=False, **options):
    """`run_fused` of the logits version in a dtype, its gradients in parts to sum; and the sizes of its logits'."""
    copy, options, inputs = leaves(p, options, dtype)
    options.pop("chunk_size", None)
    output, student = dense(name, copy, **options)
    found = fields(output)
    if name not in DIFFERENTIABLE:
        return found, [], None
    parts = [torch.autograd.grad(x, [*inputs, student], retain_graph=True) for x in totals_of(found, everything)]
    *gradients, on_logits = (torch.stack(x) for x in zip(*parts, strict=True))
    return found, gradients, on_logits.abs().sum(0)


def check(name, p, everything=False, clean=None, **options):
    """Fused equals float64; `clean` holds the same problem without what masked tokens' hidden states hold."""
    found, gradients = run_fused(name, p, everything, **options)
    clean = clean or p
    truth, exact, on_logits = run_dense(name, clean, torch.float64, everything, **options)
    wide = torch.promote_types(torch.promote_types(p.hidden.dtype, p.weight.dtype), torch.float32)
    eager, near = truth, exact
    if not INTERPRETED:  # where eager is slow, it gives no slack
        eager, near, _ = run_dense(name, clean, wide, everything, **options)
    assert found.keys() == truth.keys()
    for key, value in found.items():
        assert_result(key, value, truth[key], eager[key], wide)
    sizes = magnitudes(clean, on_logits, options) if gradients else ()
    for key, *each in zip(("hidden", "weight", "bias"), gradients, exact, near, sizes, strict=False):
        dtype = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}[key].dtype
        assert_pulled(key, *each, dtype, wide)
    return found, gradients


def assert_result(name, value, truth, eager, wide):
    assert value.shape == truth.shape, name
    if not truth.is_floating_point():
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth), name
        return
    assert value.dtype == wide, name
    bound = FLOAT64_BOUND if wide == torch.float64 else WEIGHT_BOUND if name in NUMBERS else LOG_PROB_BOUND
    allowed = bound * truth.abs().clamp(min=1) + EAGER_FACTOR * (eager.double() - truth).abs()
    assert_within(value, truth, allowed.nan_to_num(1.0, 1.0), name, eager)


def magnitudes(p, on_logits, options):
    """What a relative error of the logits' gradient moves the gradients by: |G| |W|, |G|^T |h|, sums of |G|."""
    g = on_logits.reshape(-1, on_logits.shape[-1]) * options.get("logit_scale", 1.0)
    on_hidden = (g @ p.weight.detach().double().abs()).reshape(p.hidden.shape)
    return on_hidden, g.t() @ p.hidden.detach().double().abs().reshape(-1, p.hidden.shape[-1]), g.sum(0)


def assert_pulled(name, gradient, parts, eager, size, dtype, wide):
    """As good as float32 logits up to a few roundings of the terms of its sums; and the result's roundings.

    Norms of hidden states' rows, and of all of weight and bias. A 16-bit gradient is rounded where it is handed out,
    and where autograd adds two.
    """
    truth = parts.sum(0)
    assert gradient.dtype == dtype, f"{name}'s gradient is {gradient.dtype}"
    assert gradient.shape == truth.shape, name
    norm = lambda x: x.double().norm(dim=-1) if name == "hidden" else x.double().norm()  # noqa: E731
    floor = (FLOAT64_BOUND if wide == torch.float64 else 32 * epsilon(torch.float32)) * norm(size)
    floor = floor.clamp(min=floor.mean()) if floor.numel() else floor  # a row's own terms may nearly cancel in p - q
    unit = ROUNDING[dtype] or (epsilon(dtype) if dtype != wide else 0.0)
    rounding = unit * (sum(norm(part) for part in parts) + (norm(truth) if len(parts) > 1 else 0.0))
    least = 6e-8 if dtype == torch.float16 else torch.finfo(dtype).tiny
    allowed = EAGER_FACTOR * norm(eager.double().sum(0) - truth) + floor + rounding + 4 * least * truth.numel() ** 0.5
    error = norm(gradient.double() - truth)
    assert_within(error, torch.zeros_like(error), allowed, f"error of the gradient of {name}")
