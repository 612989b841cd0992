"""Identities of SSD (arXiv 2604.01193) and RLSD (arXiv 2604.03128) that no function states alone: docs/papers.md."""

import itertools

import oracles
import pytest
import torch
from closeness import FLOAT64_BOUND, LOG_PROB_BOUND, WEIGHT_BOUND, assert_log_probs, assert_weights, assert_within
from conftest import no_kernel

from sdkernels import (
    effective_temperature,
    evidence_weighted_advantage,
    grpo_loss,
    opsd_loss,
    rlsd_loss,
    rlsd_token_advantage,
    ssd_decomposition,
    token_log_prob,
    truncated_log_softmax,
    truncated_support,
)

pytestmark = no_kernel
F64, VOCAB = torch.float64, 23
DTYPES = pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
LOG_ERROR = {F64: FLOAT64_BOUND, torch.float32: LOG_PROB_BOUND}
RATIO_ERROR = {F64: FLOAT64_BOUND, torch.float32: WEIGHT_BOUND}
FILTERS = pytest.mark.parametrize("chosen", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.7}], ids=str)


def rows(*shape, dtype=F64, device="cpu", vocab=VOCAB):
    return (2 * torch.randn(*shape, vocab, dtype=F64)).to(dtype).to(device)


def support_of(base, temperature, **chosen):
    """S by a sort, bool (..., V); no row of these leaves a choice."""
    found = oracles.support(base, temperature, **chosen)
    assert torch.equal(found.must, found.may)
    return found.must


def mass(probs, inside):
    return torch.where(inside, probs.double(), 0.0).sum(-1)


@DTYPES
@FILTERS
def test_cross_entropy_less_support_compression_is_that_of_the_student_on_s(chosen, dtype, device):
    """SSD Eq. 12: CE(q, p) = -log sum_S p + CE(q, p_S)."""
    student, base = rows(4, dtype=dtype, device=device), rows(4, dtype=dtype, device=device)
    terms = ssd_decomposition(student, base, 0.8, **chosen)
    inside = support_of(base, 0.8, **chosen)
    q, log_p_s = oracles.log_softmax(base, 0.8, inside=inside).exp(), oracles.log_softmax(student, inside=inside)
    gate = -mass(oracles.log_softmax(student).exp(), inside).log()
    assert (gate > 0.1).all()
    assert_within(terms.support_compression, gate, LOG_ERROR[dtype])
    within = -torch.where(inside, q * log_p_s, 0.0).sum(-1)
    assert_within(terms.cross_entropy - terms.support_compression, within, 2 * LOG_ERROR[dtype])


@DTYPES
@FILTERS
def test_a_student_that_fits_q_is_decoded_as_the_base_at_the_product_on_the_support_of_training(chosen, dtype, device):
    """SSD Prop. B.2: base^(1 / (T tau)) on S, which is T's: top_p keeps other tokens at T tau."""
    base, moved = rows(6, dtype=dtype, device=device), False
    for train, evaluation in itertools.product((0.5, 1.6), (0.6, 2.0)):
        inside, product = support_of(base, train, **chosen), effective_temperature(train, evaluation)
        fitted = truncated_log_softmax(base, train, **chosen)
        truth = oracles.log_softmax(base, product, inside=inside)
        assert_log_probs(truncated_log_softmax(fitted, evaluation), truth)
        moved = moved or not torch.equal(support_of(base, product, **chosen), inside)
    assert moved == ("top_p" in chosen)


@DTYPES
@FILTERS
def test_the_gain_on_a_set_is_that_of_a_hotter_base_over_its_mass_on_s(chosen, dtype, device):
    """SSD Prop. B.3, A in S and pi_g ~ base^g: pi_{1/(T tau)}(A) / pi_{1/tau}(A) / m_S, m_S = pi_{1/(T tau)}(S)."""
    base, parity = rows(6, dtype=dtype, device=device), torch.arange(VOCAB, device=device) % 2
    for train, evaluation in itertools.product((0.7, 1.6), (0.6, 1.0, 1.5)):
        inside = support_of(base, train, **chosen)
        some = inside & (parity == base.argmax(-1, keepdim=True) % 2)  # A: about half of S, never empty
        student = truncated_log_softmax(truncated_log_softmax(base, train, **chosen), evaluation).exp()
        gain = mass(student, some) / mass(truncated_log_softmax(base, evaluation).exp(), some)
        pi, pi_hot = (oracles.log_softmax(base, t).exp() for t in (evaluation, train * evaluation))
        kept = ssd_decomposition(base / (train * evaluation), base, train, **chosen).kept_mass
        assert_weights(kept, mass(pi_hot, inside))
        truth = mass(pi_hot, some) / mass(pi, some) / mass(pi_hot, inside)
        assert_within(gain, truth, RATIO_ERROR[dtype] * truth)


@DTYPES
def test_derivatives_by_the_exponent_are_covariances(dtype, device):
    """SSD B.3, pi_g = softmax(g z) on S: d pi_g(A) / dg = Cov(1_A, z), dH / dg = -g Var(z)."""
    z, chosen = rows(4, dtype=dtype, device=device), {"top_k": 9}
    exponent = torch.tensor([[0.4], [0.8], [1.0], [1.7]], dtype=F64, device=device, requires_grad=True)
    heated = (exponent * z).to(dtype)
    some = support_of(z, 1.0, **chosen) & (z < z.max(-1, keepdim=True).values)
    on_some = truncated_log_softmax(heated, **chosen).exp().masked_fill(~some, 0).sum()
    entropy = token_log_prob(heated, z.argmax(-1), **chosen).entropy.sum()
    by_mass, by_entropy = (torch.autograd.grad(x, exponent, retain_graph=True)[0][:, 0] for x in (on_some, entropy))
    pi = oracles.log_softmax(exponent * z, inside=support_of(z, 1.0, **chosen)).exp()
    centred = z - (pi * z).sum(-1, keepdim=True)
    assert_within(by_mass, mass(pi * centred, some), RATIO_ERROR[dtype])
    variance = (pi * centred.square()).sum(-1)
    assert_within(by_entropy, -exponent[:, 0] * variance, RATIO_ERROR[dtype] * variance.clamp(min=1))


@pytest.mark.parametrize("chosen", [{}, {"top_k": 9}], ids=str)
def test_the_entropy_rises_with_the_temperature_by_a_variance(chosen, device):
    """SSD B.3: dH / dT = Var(z) / T^3, by differences: a temperature has no gradient."""
    z, step = rows(5, device=device), 1e-5
    temperature = torch.tensor([0.4, 0.7, 1.0, 1.6, 3.0], dtype=F64, device=device)
    above, below = (
        token_log_prob(z, z.argmax(-1), t, **chosen).entropy for t in (temperature + step, temperature - step)
    )
    pi = oracles.log_softmax(z, temperature, inside=support_of(z, temperature, **chosen)).exp()
    variance = (pi * (z - (pi * z).sum(-1, keepdim=True)).square()).sum(-1)
    assert (variance > 0.1).all()
    assert_within((above - below) / (2 * step), variance / temperature**3, 1e-8)


@DTYPES
def test_the_entropy_splits_at_a_support(dtype, device):
    """SSD B.4: H(p) = h2(sum_S p) + sum_S p H(p on S) + (1 - sum_S p) H(p outside S)."""
    student, base = rows(4, dtype=dtype, device=device), rows(4, dtype=dtype, device=device)
    support = truncated_support(base, 1.6, top_p=0.8, max_size=VOCAB)
    inside, chosen = oracles.named(support.token_ids, VOCAB), support.token_ids[:, 0]
    whole, head = (token_log_prob(student, chosen, support=s).entropy.double() for s in (None, support))
    tail = token_log_prob(student.masked_fill(inside, -torch.inf), base.argmin(-1)).entropy.double()
    kept = ssd_decomposition(student, support, 1.6).kept_mass.double()
    of_being_in_it = -(kept * kept.log() + (1 - kept) * torch.log1p(-kept))
    assert_within(of_being_in_it + kept * head + (1 - kept) * tail, whole, 3 * LOG_ERROR[dtype])


def bayesian_model(dtype, device, secrets=3, prompts=4, length=6):
    """A teacher for each r, the student that does not see r, a response y, and log P(r | x, y_<t) before and after y.

    The student is the teachers' mixture under the posterior of r given y_<t: no other is right in every prefix.
    """
    teachers = rows(secrets, prompts, length, dtype=dtype, device=device)
    token_ids = torch.randint(VOCAB, (prompts, length)).to(device)
    prior = torch.randn(secrets, prompts, 1, dtype=F64).log_softmax(0).to(device)
    tables = oracles.log_softmax(teachers)
    of_tokens = tables.gather(-1, token_ids.expand(secrets, -1, -1).unsqueeze(-1)).squeeze(-1)
    posterior = torch.cat((prior, prior + of_tokens.cumsum(-1)), -1).log_softmax(0)  # (r, x, length + 1)
    student = (posterior[..., :-1, None] + tables).logsumexp(0).to(dtype)
    return teachers, student.expand_as(teachers), token_ids.expand(secrets, -1, -1), posterior


@DTYPES
@pytest.mark.parametrize("sign", [1, -1])
def test_the_weight_is_what_a_token_does_to_the_posterior_of_r(sign, dtype, device):
    """RLSD Theorem 4, w_t = P(r | x, y_<=t) / P(r | x, y_<t), and Eq. 37, its product; for A < 0 the inverse."""
    teachers, student, token_ids, posterior = bayesian_model(dtype, device)
    advantages = sign * (torch.rand(token_ids.shape[:-1], dtype=F64) + 0.5).to(device)
    result = rlsd_token_advantage(student, teachers, token_ids, advantages.to(dtype), clip_range=torch.inf)
    ratio = (sign * posterior.diff(dim=-1)).exp()
    assert_weights(result.weight, ratio)
    assert_weights(result.advantage, advantages.unsqueeze(-1) * ratio)
    whole = (sign * (posterior[..., -1] - posterior[..., 0])).exp()
    assert_within(result.weight.double().prod(-1), whole, token_ids.shape[-1] * RATIO_ERROR[dtype] * whole)
    log_probs = result.student_log_prob, result.teacher_log_prob
    assert_weights(evidence_weighted_advantage(*log_probs, advantages.to(dtype)).weight, ratio)


@DTYPES
def test_the_weight_is_opsds_of_a_token_that_the_student_draws(dtype, device):
    """RLSD A.5.6 as we read it: OPSD's gradient is that of -E_{y ~ P_S} w(y) log P_S(y), w a constant, A = 1."""
    student, teacher = rows(4, dtype=dtype, device=device).requires_grad_(), rows(4, dtype=dtype, device=device)
    spread = [x.unsqueeze(1).expand(-1, VOCAB, -1) for x in (student, teacher)]
    every = torch.arange(VOCAB, device=device).expand(4, -1)
    drawn = rlsd_loss(*spread, every, torch.ones(4, device=device), clip_range=torch.inf, reduction="sum",
                      token_weight=oracles.log_softmax(student).exp().to(dtype))  # fmt: skip
    distilled = opsd_loss(student, teacher, reduction="sum")
    found, truth = (torch.autograd.grad(x.loss, student)[0] for x in (drawn, distilled))
    assert_within(found, truth, RATIO_ERROR[dtype])


OPSD = {"full": {}, **{f"{who}-top-1": {"top_k": 1, "top_k_from": who} for who in ("teacher", "student")}}


def pulls(loss, student, token_ids):
    """How fast a step against the loss's gradient raises the tokens' log-probs; and the gradient."""
    (gradient,) = torch.autograd.grad(loss, student)
    up = torch.nn.functional.one_hot(token_ids, VOCAB) - oracles.log_softmax(student).exp()
    return -(gradient.double() * up).sum(-1), gradient


@DTYPES
def test_r_turns_opsds_updates_and_only_sizes_rlsds(dtype, device):
    """RLSD A.3 and Eq. 15: whether a token gets more or less likely is up to r in OPSD, to the reward in RLSD."""
    student = rows(1, 5, dtype=dtype, device=device).repeat(24, 1, 1)
    teachers = student + rows(24, 5, dtype=dtype, device=device)  # one for each r
    token_ids = student.argmax(-1)
    student.requires_grad_()
    for options in OPSD.values():
        pull, _ = pulls(opsd_loss(student, teachers, reduction="sum", **options).loss, student, token_ids)
        assert (pull.amin(0) < -1e-3).all()
        assert (pull.amax(0) > 1e-3).all()
    for advantage in (1.5, -0.5):
        advantages = torch.full(token_ids.shape[:-1], advantage, device=device)
        weighted = rlsd_loss(student, teachers, token_ids, advantages, reduction="sum")
        pull, gradient = pulls(weighted.loss, student, token_ids)
        _, of_grpo = pulls(grpo_loss(student, token_ids, advantages, reduction="sum").loss, student, token_ids)
        assert (pull.sign() == (1 if advantage > 0 else -1)).all()
        sizes = gradient.norm(dim=-1, keepdim=True) / of_grpo.norm(dim=-1, keepdim=True)
        assert_within(gradient, sizes * of_grpo, RATIO_ERROR[dtype])
        assert_within(sizes.amin(0), torch.full((5, 1), 0.8, dtype=F64), RATIO_ERROR[dtype])
        assert_within(sizes.amax(0), torch.full((5, 1), 1.2, dtype=F64), RATIO_ERROR[dtype])
