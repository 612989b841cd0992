"""Random calls on nasty rows in any layout equal the same calls in float64, which are plain PyTorch.

A case is dropped where rounding may decide: a support within SPEC's margin, an entry within rounding of `token_clip`.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import fuzz_cases
import fuzz_hidden
import heads
import nasty
import opsd_oracles
import oracles
import pytest
import torch
from closeness import LOG_PROB_BOUND, WEIGHT_BOUND, assert_gradient, assert_within, epsilon
from conftest import no_kernel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opsd_oracles import GRADIENT_FACTOR
from test_kernels import CSRC, INSTRUCTION_SETS
from test_opsd_kernels import OPERATORS as OF_DIVERGENCES
from test_truncated_kernels import OPERATORS as OF_SUPPORTS

from sdkernels import ssd_decomposition, token_log_prob

pytestmark = no_kernel
EPSILON = epsilon(torch.float32)
OPERATORS = {"row_statistics", "row_gradient", *OF_SUPPORTS, *OF_DIVERGENCES}
POLICIES = ("grpo_loss", "rlsd_loss")
DIFFERENCES = ("base_alignment", "cross_entropy", "divergence", *opsd_oracles.TERMS)  # of sums of large logarithms


def drawn_by(data):
    return lambda name, values: data.draw(st.sampled_from(values), name)


def a_part(of):
    """So many times fewer examples than a profile has: there are many functions."""
    return settings(max_examples=settings().max_examples // of)


@pytest.mark.parametrize("name", fuzz_cases.FUNCTIONS)
@a_part(of=2)
@given(data=st.data())
def test_a_call_equals_itself_in_float64(name, data):
    choose = drawn_by(data)
    case = fuzz_cases.on_logits(name, choose)
    exact = case.upcast()
    assume(is_decided(exact))
    truth, true_gradient, upstream = fuzz_cases.run(exact)
    with pytest.MonkeyPatch.context() as patch:
        if INSTRUCTION_SETS:
            which = choose("instruction set", INSTRUCTION_SETS)
            chosen = {operator: partial(getattr(CSRC, operator), instruction_set=which) for operator in OPERATORS}
            patch.setattr(torch.ops, "sdkernels_cpu", SimpleNamespace(**chosen))
        found, gradient, _ = fuzz_cases.run(case, upstream)  # last: it may overwrite the logits
    assert found.keys() == truth.keys()
    sizes = errors(exact, truth)
    for key, value in found.items():
        if key == "support_size":  # of a row that has no distribution it says nothing
            value, truth[key] = (x.masked_fill(truth["constant"].isnan(), 0) for x in (value, truth[key]))
        check_value(key, value, truth[key], sizes.get(key, LOG_PROB_BOUND))
    if gradient is not None:
        check_gradient(case, gradient, true_gradient, coefficients(exact, truth, upstream))


@pytest.mark.parametrize("name", fuzz_hidden.FUNCTIONS)
@a_part(of=4)
@given(data=st.data())
def test_a_call_from_hidden_states_equals_float64_logits(name, data):
    choose = drawn_by(data)
    problem, options = fuzz_hidden.on_hidden(name, choose)
    heads.check(name, problem, choose("pulls", (False, True)), **options)


@pytest.mark.parametrize("vocab", [257, 2048])
def test_a_base_of_one_against_many_is_as_exact_where_the_student_finds_the_one_improbable(vocab):
    """Each of the small terms is beside sums of the large one, which float32 rounds."""
    base, student = nasty.rows("one_against_many", 1, vocab), torch.randn(1, vocab) * 10
    student[0, 0] = student.max() - 57
    found, truth = (ssd_decomposition(*x, 1.6) for x in ((student, base), (student.double(), base.double())))
    assert_within(found.base_alignment, truth.base_alignment, LOG_PROB_BOUND)


def test_a_replayed_token_beyond_float32_has_no_entropy_gradient():
    logits = torch.tensor([[0.0, torch.finfo(torch.float32).min]], requires_grad=True)
    entropy = token_log_prob(logits, torch.tensor([0]), 0.5, support=torch.tensor([[0, 1]])).entropy
    assert_within(*torch.autograd.grad(entropy.sum(), logits), torch.zeros(1, 2), 0.0)


def is_decided(case):
    """Whether rounding decides neither what is in a support nor which entries are clipped."""
    options, rows = case.options, case.keep.unsqueeze(-1)
    if case.name != "opsd_loss":
        filters = {key: options.get(key) for key in ("top_k", "top_p", "min_p")}
        z = case.arguments[1 if case.name.startswith("ssd") else 0]
        if not any(filters.values()):
            return True
        allowed = oracles.support(z, case.temperature, **filters, keep=case.keep)
        return torch.equal(allowed.must & rows, allowed.may & rows)
    if options["token_clip"] is None:
        return True
    sides = [oracles.log_softmax(x, case.temperature, case.keep) for x in case.arguments]
    if options["top_k"] and options["top_k"] < rows.shape[-1]:
        ids = opsd_oracles.listed(case.arguments[options["top_k_from"] == "teacher"], options["top_k"])
        sides = [opsd_oracles.reduced(x, ids, options["tail"]) for x in sides]
    value, _, size, _ = opsd_oracles.entries(*sides, options["divergence"], options["beta"])
    near = (value - options["token_clip"]).abs() < 1e-3 * options["token_clip"] + 4 * EPSILON * size
    return not (near & rows).any()


def spread(case):
    """How far apart the finite logits of a row are, over temperature where that is below 1."""
    sides = [x for x in case.arguments if isinstance(x, torch.Tensor) and x.dim() == case.keep.dim() + 1]
    if case.name == "opsd_decomposition":
        sides = [case.arguments[0], *case.arguments[1]]
    widths = [torch.where(x.isfinite(), x, 0.0).aminmax(dim=-1) for x in sides]
    width = torch.stack([each.max - each.min for each in widths]).amax(0)
    return torch.where(case.keep, width / case.temperature.clamp(max=1.0) + 10 * case.temperature, 0.0)


def errors(case, truth):
    """By result what it may be off by, besides a rounding of itself, where that is not SPEC's LOG_PROB_BOUND."""
    found = {name: WEIGHT_BOUND * truth[name].abs() for name in ("weight", "ratio") if name in truth}
    if "information_gain" in truth:
        found["information_gain"] = 2 * LOG_PROB_BOUND
    if "advantage" in truth:
        own = advantages(case).abs()
        found["advantage"] = WEIGHT_BOUND * (truth["advantage"].abs() + own)
    if case.name.startswith(("ssd", "opsd")):  # beyond logits of order 10 as in float32 sums of them
        each = (4 * EPSILON * spread(case)).clamp(min=LOG_PROB_BOUND)
        found.update(dict.fromkeys(DIFFERENCES, each))
    if "loss" in truth:
        share = shares(case)
        if case.name in POLICIES:
            each = WEIGHT_BOUND * sum(policy_terms(case, truth))
        else:
            each = each * (1 + sum(abs(w) for w in case.options.get("weights", ())))
        each = torch.where(share == 0, 0.0, share.abs() * each)
        found["loss"] = each if truth["loss"].dim() else each.sum() + EPSILON * total(case)
    return found


def total(case):
    """The sum of the sizes of tokens' losses, which may cancel."""
    options = {**case.options, "reduction": "none", "normalizer": None}
    each = fuzz_cases.call(replace(case, options=options))["loss"]
    return (each * oracles.reduction_weights(case.keep, *reduction_of(case))).abs().nan_to_num(0.0).sum()


def reduction_of(case):
    return case.options["reduction"], case.options["normalizer"], case.options["cu_seqlens"]


def shares(case):
    """d loss / d token's loss but for the k3 estimate, which no weight touches."""
    share = oracles.reduction_weights(case.keep, *reduction_of(case))
    weight = case.options["token_weight"]
    return share if weight is None or case.name in POLICIES else share * weight


def policy_terms(case, truth):
    """The sizes of the terms of the surrogate and of the k3 estimate, and of their slopes."""
    options = case.options
    advantage = truth["advantage"] if "advantage" in truth else advantages(case)
    weight = 1.0 if options["token_weight"] is None else options["token_weight"].abs()
    surrogate = weight * torch.where(advantage == 0, 0.0, advantage.abs() * (1 + truth["ratio"]))
    log_prob = truth["log_prob" if "log_prob" in truth else "student_log_prob"]
    if not options["beta"]:
        return surrogate, torch.zeros_like(surrogate)
    return surrogate, options["beta"] * ((options["reference_log_prob"] - log_prob).exp() + 1)


def advantages(case):
    position = {"grpo_loss": 2, "evidence_weighted_advantage": 2}.get(case.name, 3)
    return oracles.per_token(case.arguments[position], case.keep.shape, case.options["cu_seqlens"])


def coefficients(case, truth, upstream):
    """SPEC 9's c: the absolute coefficients of the distributions in each row's gradient."""
    zero = torch.zeros(case.keep.shape, dtype=torch.float64)
    on = {key: torch.where(case.keep, g.double(), 0.0) for key, g in upstream.items() if key != "log_q"}
    on_loss = on.get("loss", zero) * (shares(case) if "loss" in truth else 1.0)
    of = lambda key: on.get(key, zero)  # noqa: E731
    if "log_q" in truth:
        inside = truth["log_q"] > -torch.inf
        g = torch.where(inside, upstream["log_q"].double(), 0.0)
        c = g.sum(-1).abs() + g.norm(dim=-1)
    elif case.name.startswith("ssd"):
        a, b, align = (of(term) + w * on_loss for term, w in
                       zip(oracles.SSD_TERMS, case.options.get("weights", (0.0,) * 3), strict=False))  # fmt: skip
        entropy, mass = of("cross_entropy"), of("kept_mass") * truth["kept_mass"]
        parts = (a + entropy - mass, -a + b + mass, -b + align, -align - entropy)
        return sum(x.abs() for x in parts)  # at temperature 1
    elif case.name == "opsd_loss":
        c = (on_loss + of("divergence")).abs() * slopes(case)
    else:
        policy = sum(policy_terms(case, truth)) if case.name in POLICIES else 0.0
        entropy = truth["student_entropy" if "student_entropy" in truth else "entropy"]
        on_label = on_loss.abs() * policy + of("log_prob").abs() + of("student_log_prob").abs()
        possible = truth["student_log_prob" if "student_log_prob" in truth else "log_prob"] != -torch.inf
        on_entropy = (of("entropy") + of("student_entropy")).abs()
        c = torch.where(possible, on_label, 0.0) + on_entropy * (1 + entropy)
    return c / case.temperature


def slopes(case):
    """sum_v |h_v| + |G|, at most: of a KL of the student sum p |log p / q| is less than the KL + 0.74."""
    if case.options["divergence"] == "forward_kl":
        return torch.full(case.keep.shape, 2.0, dtype=torch.float64)
    options = {**case.options, "reduction": "none", "normalizer": None, "token_weight": None, "token_clip": None}
    return 2 * fuzz_cases.call(replace(case, options=options))["divergence"] + 3


def check_value(name, value, truth, allowed):
    """Within what it may be off by and a rounding; integers equal."""
    if not truth.is_floating_point():
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth), name
        return
    # Differences as large as no sum of them is may be inf, or stop at the largest number.
    value, truth = (torch.where(x.abs() > 1e37, x.sign() * torch.inf, x) for x in (value, truth.to(value.dtype)))
    tiny = torch.finfo(value.dtype).tiny
    assert_within(value, truth, allowed + epsilon(value.dtype) * truth.abs() + tiny, name)


def check_gradient(case, gradient, truth, c):
    """`assert_gradient`; NaN or beyond the range of its dtype in the rows, not the places, where it is."""
    dtype, vocab = case.arguments[0].dtype, gradient.shape[-1]
    factor, largest = GRADIENT_FACTOR[case.options.get("divergence", "forward_kl")], torch.finfo(dtype).max
    rows, truth, c = gradient.reshape(-1, vocab), truth.reshape(-1, vocab), c.reshape(-1)
    assert (rows[~case.keep.reshape(-1)] == 0).all(), "a masked row's gradient is not 0"
    bad = ~(truth.abs() <= largest).all(-1)
    assert not rows[bad].isfinite().all(-1).any(), "a row's gradient is finite"
    held = ~bad & (factor * c < largest)  # where rounding alone reaches further, it is held to nothing
    assert_gradient(rows[held], SimpleNamespace(gradient=truth[held], c=c[held]), dtype, factor=factor)
