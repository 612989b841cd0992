"""How close is close: SPEC section 9, and no worse than eager PyTorch in the same dtype."""

import torch

LOG_PROB_BOUND = 2e-5  # log-probs and entropies, absolute
WEIGHT_BOUND = 1e-4  # ratios of probabilities, relative
FLOAT64_BOUND = 1e-10
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 0.0}
EAGER_FACTOR = 2.0  # a kernel may err twice as much as eager does at the same place


def epsilon(dtype):
    return torch.finfo(dtype).eps


def assert_within(actual, truth, allowed, name="value", eager=None):
    """|actual - truth| <= allowed, elementwise; NaN only where truth is NaN, infinities equal."""
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    kernel, truth = actual.detach().double(), truth.detach().double().to(actual.device)
    error = torch.where(kernel == truth, 0.0, (kernel - truth).abs())
    error = torch.where(kernel.isnan() & truth.isnan(), 0.0, error).nan_to_num(torch.inf, torch.inf)
    excess = (error - torch.as_tensor(allowed, dtype=torch.float64, device=error.device)).nan_to_num(torch.inf)
    excess = torch.where(error == 0, -1.0, excess)
    if not (excess > 0).any():
        return
    worst = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    limit = torch.as_tensor(allowed, dtype=torch.float64).expand(error.shape).reshape(-1)[worst].item()
    values = f"kernel {kernel.reshape(-1)[worst].item():.10g}, truth {truth.reshape(-1)[worst].item():.10g}"
    if eager is not None:
        values += f", eager {eager.detach().double().reshape(-1)[worst].item():.10g}"
    raise AssertionError(
        f"{name}{list(index)}: {values}; error {error.reshape(-1)[worst].item():.3g} > {limit:.3g} allowed; "
        f"{int((excess > 0).sum())} of {error.numel()} too far"
    )


def assert_log_probs(actual, truth, name="log_prob", eager=None):
    """Log-probs and entropies: SPEC's bound plus the rounding of the result; and as good as eager."""
    wanted = torch.promote_types(actual.dtype, torch.float32)
    assert actual.dtype == wanted, f"{name} is {actual.dtype}"
    truth = torch.where(truth.to(wanted).isinf(), -torch.inf, truth)  # beyond the range of the result's dtype
    if actual.dtype == torch.float64:
        assert_within(actual, truth, FLOAT64_BOUND * truth.abs().clamp(min=1), name)
        return
    ulp = epsilon(actual.dtype) * truth.abs()
    assert_within(actual, truth, LOG_PROB_BOUND + ulp, name, eager)
    if eager is not None:
        eager_error = (eager.double() - truth).abs().nan_to_num(0, 0)
        floor = 8 * epsilon(actual.dtype) * truth.abs().clamp(min=1)  # a few roundings of the terms that make it up
        assert_within(actual, truth, EAGER_FACTOR * eager_error + floor, f"{name} against eager", eager)


def assert_weights(actual, truth, scale=None, name="weight"):
    """Ratios of probabilities and what is proportional to them: relative to `scale` (None: the truth itself)."""
    scale = truth.abs() if scale is None else scale
    bound = FLOAT64_BOUND if actual.dtype == torch.float64 else WEIGHT_BOUND
    tiny = torch.finfo(actual.dtype).tiny
    assert_within(actual, truth, bound * scale + tiny, name)


def assert_gradient(actual, truth, dtype, name="gradient", eager=None, factor=None):
    """Row norms within SPEC's bound, `truth` an oracle's gradient, c and p; with eager, each element as good as it."""
    factor = factor or (FLOAT64_BOUND if dtype == torch.float64 else 1e-6)
    assert actual.dtype == dtype, f"{name} is {actual.dtype}, its logits are {dtype}"
    error = actual.detach().double() - truth.gradient
    assert not (actual.isnan() & ~truth.gradient.isnan()).any(), f"{name} has NaN where truth has none"
    assert (actual[truth.c == 0] == 0).all(), f"{name} is not 0 where no gradient flows"
    norm = truth.gradient.norm(dim=-1)
    bound = factor * truth.c + ROUNDING[dtype] * norm
    least = 6e-8 if dtype == torch.float16 else torch.finfo(dtype).tiny
    bound = bound + least * truth.gradient.shape[-1] ** 0.5
    assert_within(error.norm(dim=-1), torch.zeros_like(norm), bound, f"row norm of the error of {name}")
    if eager is not None:
        floor = epsilon(dtype) * truth.gradient.abs() + LOG_PROB_BOUND * truth.c.unsqueeze(-1) * truth.p
        floor = floor + (6e-8 if dtype == torch.float16 else 2 * torch.finfo(dtype).tiny)
        eager_error = (eager.detach().double() - truth.gradient).abs()
        assert_within(actual, truth.gradient, EAGER_FACTOR * eager_error + floor, f"{name} against eager", eager)


def assert_same_bits(actual, expected, name="value"):
    """Equal bit for bit; NaN equals NaN."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    assert same.all(), f"{name} differs in {int((~same).sum())} of {same.numel()} places"
