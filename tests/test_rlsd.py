import itertools
import math

import nasty
import oracles
import pytest
import torch
from closeness import assert_log_probs, assert_same_bits, assert_weights, assert_within
from hypothesis import given
from hypothesis import strategies as st
from test_evidence import CLIPS, LOG_PROB_ERROR
from test_grpo import CLIPPING, check_loss, differentiate, policy

from sdkernels import grpo_loss, lambda_schedule, rlsd_loss, rlsd_metrics, rlsd_token_advantage


def problem(*shape, vocab=111, dtype=torch.float32, device="cpu"):
    """Student and teacher logits, ids, per-token advantages, old log-probs."""
    student, token_ids, advantages, old = policy(*shape, vocab=vocab, dtype=dtype, device=device)
    teacher = (student + torch.randn(*shape, vocab, device=device) / 3).to(dtype)
    return student, teacher, token_ids, advantages, old


def check(student, teacher, token_ids, advantages, old=None, upstream=None, **options):
    output, gradient = differentiate(
        rlsd_loss, student, teacher, token_ids, advantages, old, upstream=upstream, **options
    )
    options["upstream"] = 1.0 if upstream is None else upstream
    truth = oracles.rlsd_loss(student, teacher, token_ids, advantages, old, **options)
    for name in ("student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy"):
        assert_log_probs(getattr(output, name), getattr(truth, name), name)
    assert_weights(output.weight, truth.weight)
    assert_weights(output.ratio, truth.ratio, name="ratio")
    gain = LOG_PROB_ERROR[output.information_gain.dtype] * truth.information_gain.abs().clamp(min=1)
    assert_within(output.information_gain, truth.information_gain, gain, "information_gain")
    spread = oracles.per_token(advantages, token_ids.shape, options.get("cu_seqlens"))
    size = torch.where(oracles.kept(token_ids, options.get("mask")), spread.abs(), 0.0)
    assert_weights(output.advantage, truth.advantage, size.clamp(min=truth.advantage.abs()), "advantage")
    check_loss(output, gradient, truth, student.dtype, options.get("reduction", "token-mean"))
    constants = ("advantage", "weight", "information_gain", "teacher_log_prob", "teacher_entropy", "ratio")
    assert not any(getattr(output, name).requires_grad for name in constants)
    return output, gradient


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("clipping", CLIPPING, ids=str)
def test_the_ratio_s_clipping_equals_the_formula(clipping, dtype, device):
    check(*problem(3, 4, dtype=dtype, device=device), **clipping)


@pytest.mark.parametrize("clip_range", CLIPS)
@pytest.mark.parametrize(("lam", "apply_to", "pessimistic", "evidence_from"), list(itertools.product(
    [0.0, 0.5, 1.0], ["all", "negative", "positive"], [False, True], ["current", "old"])))  # fmt: skip
def test_the_evidence_options_equal_the_formula(clip_range, lam, apply_to, pessimistic, evidence_from, device):
    student, teacher, token_ids, advantages, old = problem(2, 5, vocab=30, dtype=torch.float64, device=device)
    advantages[0, 0] = 0
    options = dict(clip_range=clip_range, lam=lam, apply_to=apply_to, pessimistic=pessimistic)
    credit_mask = torch.rand(2, 5, device=device) < 0.7
    check(student, teacher, token_ids, advantages, old, evidence_from=evidence_from, credit_mask=credit_mask, **options)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "all_but_the_last"])
def test_accuracy_at_a_full_vocabulary(layout, dtype, device):
    vocab = 151936
    student = nasty.rows("gaussian", 4, vocab, dtype, device).reshape(2, 2, vocab)
    teacher = (student + torch.randn(2, 2, vocab, device=device) / 2).to(dtype)
    token_ids = student.argmax(-1)
    token_ids[0, 0], token_ids[1, 1] = 0, vocab - 1
    views = [nasty.LAYOUTS[layout](x) for x in (student, teacher)]
    check(*views, token_ids, torch.tensor([1.3, -0.7], device=device))


def test_teacher_log_probs_equal_teacher_logits(device):
    student, teacher, token_ids, advantages, old = problem(3, 4, device=device)
    dense, _ = check(student, teacher, token_ids, advantages, old)
    sparse, _ = check(student, dense.teacher_log_prob, token_ids, advantages, old)
    assert_weights(sparse.advantage, dense.advantage)
    for name in ("student_log_prob", "teacher_log_prob", "student_entropy", "ratio"):
        assert_same_bits(getattr(sparse, name), getattr(dense, name), name)
    assert (sparse.teacher_entropy == 0).all()


def test_equals_the_official_code(device):
    """Current log-probs in the evidence, then PPO with dual clip 3 on the weighted advantages, token mean."""
    student, teacher, token_ids, _, old = problem(4, 6, dtype=torch.float64, device=device)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.3], dtype=torch.float64, device=device)
    mask = (torch.rand(4, 6, device=device) < 0.8).double()
    options = dict(lam=0.5, clip_range=0.2, epsilon_low=0.2, epsilon_high=0.28, dual_clip=3.0, mask=mask)
    output, gradient = differentiate(rlsd_loss, student, teacher, token_ids, advantages, old, **options)

    leaf = student.clone().requires_grad_()
    log_prob, judge = (x.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) for x in (leaf, teacher))
    weighted, _ = oracles.official_rlsd_advantages(log_prob.detach(), judge, advantages[:, None], mask, 0.5, 0.2)
    ratio = (log_prob - old).clamp(-20, 20).exp()
    losses = torch.maximum(-weighted * ratio, -weighted * ratio.clamp(1 - 0.2, 1 + 0.28))
    losses = torch.where(weighted < 0, torch.minimum(losses, -weighted * 3.0), losses)
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    assert_within(output.loss, loss, 1e-12, "loss")
    assert_within(gradient, leaf.grad, 1e-12, "gradient")


def test_evidence_from_old_equals_ms_swift(device):
    student, teacher, token_ids, _, old = problem(4, 6, dtype=torch.float64, device=device)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.3], dtype=torch.float64, device=device)
    mask = (torch.rand(4, 6, device=device) < 0.8).double()
    output = rlsd_loss(student, teacher, token_ids, advantages, old, lam=0.5, mask=mask, evidence_from="old")
    judge = oracles.token_log_prob(teacher, token_ids).log_prob
    swift = oracles.swift_rlsd_advantages(old, judge, advantages[:, None], mask, 0.5, 0.2)
    assert_within(output.advantage, swift, 1e-12, "advantage")
    elsewhere = rlsd_loss(student + torch.randn_like(student), teacher, token_ids, advantages, old, lam=0.5, mask=mask,
                          evidence_from="old")  # fmt: skip
    assert_same_bits(elsewhere.advantage, output.advantage)
    current = rlsd_loss(student, teacher, token_ids, advantages, old, lam=0.5, mask=mask)
    assert not torch.equal(current.advantage, output.advantage)


def test_on_the_first_step_both_kinds_of_evidence_agree(device):
    student, teacher, token_ids, advantages, _ = problem(3, 4, device=device)
    current = rlsd_loss(student, teacher, token_ids, advantages)
    again = rlsd_loss(student, teacher, token_ids, advantages, evidence_from="old")
    for each, expected in zip(again, current, strict=True):
        assert_same_bits(each, expected)
    stored = rlsd_loss(student, teacher, token_ids, advantages, current.student_log_prob, evidence_from="old")
    assert (stored.ratio == 1).all()  # the stored log-prob is the current one, rounded
    assert_weights(stored.advantage, current.advantage)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_it_is_grpo_with_the_weighted_advantage(dtype, device):
    student, teacher, token_ids, advantages, old = problem(3, 4, dtype=dtype, device=device)
    output, gradient = differentiate(rlsd_loss, student, teacher, token_ids, advantages, old, dual_clip=3.0)
    plain, same = differentiate(grpo_loss, student, token_ids, output.advantage, old, dual_clip=3.0)
    size = (output.ratio * output.advantage).abs().mean().double()
    assert_weights(output.loss, plain.loss, size)  # a float32 advantage is a rounded one
    if dtype == torch.float64:
        assert_same_bits(output.loss, plain.loss)
        assert_same_bits(gradient, same)
    weighed = rlsd_token_advantage(student, teacher, token_ids, advantages)
    assert_within(output.advantage, weighed.advantage, 1e-6 * weighed.advantage.abs(), "advantage")


def test_lam_zero_is_grpo_whatever_the_teacher_says(device):
    student, teacher, token_ids, advantages, old = problem(3, 4, device=device)
    teacher[..., ::2] = -torch.inf
    output, gradient = differentiate(rlsd_loss, student, teacher, token_ids, advantages, old, lam=0.0)
    plain, same = differentiate(grpo_loss, student, token_ids, advantages, old)
    assert_same_bits(output.loss, plain.loss)
    assert_same_bits(gradient, same)


def test_zero_advantage_is_zero_loss_and_zero_gradient(device):
    student, teacher, token_ids, _, old = problem(3, 4, device=device)
    teacher[0, :, token_ids[0]] = -torch.inf
    old[1] = -1e4
    output, gradient = differentiate(rlsd_loss, student, teacher, token_ids, torch.zeros(3, device=device), old)
    assert (output.weight == 1).all()
    assert output.loss.item() == 0
    assert (gradient == 0).all()


def test_masked_tokens_hold_anything(device):
    student, teacher, token_ids, advantages, old = problem(2, 4, device=device)
    keep, weight = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 1]], device=device), old.exp()
    token_ids[0, 3] = -100
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]], device=device)
    options = dict(beta=0.1, mask=mask)
    arguments = (student, teacher, advantages, old, old - 0.2, weight)
    results = []
    for value in (None, torch.nan, -torch.inf):
        if value is None:
            s, t, a, o, reference, w = arguments
        else:
            s, t, a, o, reference, w = (
                torch.where((keep == 0).view(2, 4, *[1] * (x.dim() - 2)), value, x) for x in arguments
            )
        output, gradient = check(s, t, token_ids, a, o, reference_log_prob=reference, token_weight=w, **options)
        results.append((*output, gradient))
    for each in results[1:]:
        for value, expected in zip(each, results[0], strict=True):
            assert_same_bits(value, expected)
    for value in results[1][1:]:
        assert (value[keep == 0] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_bad_row_makes_its_token_nan_and_no_other(side, bad, device):
    arguments = problem(1, 4, device=device)
    clean, clean_gradient = differentiate(rlsd_loss, *arguments, reduction="none")
    arguments[side][0, 2, 50] = bad
    output, gradient = differentiate(rlsd_loss, *arguments, reduction="none")
    others = torch.tensor([0, 1, 3], device=device)
    for each, before in zip((*output, gradient), (*clean, clean_gradient), strict=True):
        assert_same_bits(each[:, others], before[:, others])
    for name in ("loss", "advantage", "weight", "information_gain"):
        assert getattr(output, name)[0, 2].isnan(), name
    assert gradient[0, 2].isnan().all()


def test_student_and_teacher_may_differ_in_dtype_and_layout(device):
    student, teacher, token_ids, advantages, old = problem(2, 3, device=device)
    check(student.bfloat16(), nasty.time_major(teacher), token_ids, advantages, old)
    check(nasty.misaligned(student), nasty.odd_strides(teacher.bfloat16()), token_ids, advantages, old)


@given(st.data())
def test_any_shape_and_options_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=3), "shape"))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    student, teacher, token_ids, advantages, old = problem(
        *shape, vocab=data.draw(st.integers(1, 150), "V"), dtype=dtype
    )
    if data.draw(st.booleans(), "teacher is log-probs"):
        teacher = -torch.rand(shape, dtype=dtype) * 4
    token_ids[torch.rand(shape) < 0.1] = -100
    mean = advantages.sum(-1)
    options = {
        **data.draw(st.sampled_from(CLIPPING), "clipping"),
        "clip_range": data.draw(st.sampled_from(CLIPS), "clip_range"),
        "lam": data.draw(st.sampled_from([0.0, 0.3, 1.0]), "lam"),
        "apply_to": data.draw(st.sampled_from(["all", "negative", "positive"]), "apply_to"),
        "pessimistic": data.draw(st.booleans(), "pessimistic"),
        "evidence_from": data.draw(st.sampled_from(["current", "old"]), "evidence_from"),
        "credit_mask": data.draw(st.sampled_from([None, torch.rand(shape) < 0.7]), "credit_mask"),
        "mask": data.draw(st.sampled_from([None, torch.rand(shape) < 0.7]), "mask"),
        "temperature": data.draw(st.sampled_from([1.0, 0.8, torch.rand(shape[:-1]) + 0.5]), "temperature"),
        "reduction": data.draw(st.sampled_from(["token-mean", "seq-mean-token-mean", "sum"]), "reduction"),
        "normalizer": data.draw(st.sampled_from([None, 3, torch.tensor(0.5)]), "normalizer"),
    }
    advantages = data.draw(st.sampled_from([advantages, mean]), "advantages")
    check(student, teacher, token_ids, advantages, data.draw(st.sampled_from([None, old]), "old"), **options)


@pytest.mark.parametrize(("peak", "warmup", "decay"), [(0.5, 0, 0), (0.5, 0, 50), (1.0, 10, 0), (0.5, 10, 50)])
def test_lambda_schedule_rises_and_falls_linearly(peak, warmup, decay):
    for step in range(120):
        rising = step / warmup if step < warmup else 1.0
        falling = 1 - (step - warmup) / decay if decay and step >= warmup else 1.0
        assert math.isclose(lambda_schedule(step, peak=peak, warmup_steps=warmup, decay_steps=decay),
                            peak * rising * max(falling, 0.0), abs_tol=1e-15)  # fmt: skip
    assert lambda_schedule(0) == 0.5


def test_metrics_are_the_shares_and_means_of_kept_tokens(device):
    student, teacher, token_ids, advantages, old = problem(4, 8, device=device)
    mask = torch.rand(4, 8, device=device) < 0.7
    output = rlsd_loss(student, teacher, token_ids, advantages, old, mask=mask)
    metrics = rlsd_metrics(output, mask, clip_range=(0.1, 0.3), epsilon_low=0.15, epsilon_high=0.25)
    tokens = [
        [getattr(output, name)[index].item() for name in ("weight", "ratio", "information_gain", "student_entropy")]
        for index in map(tuple, mask.nonzero().tolist())
    ]
    mean = lambda values: sum(values) / len(tokens)  # noqa: E731
    expected = {
        "evidence_clipped_below": mean([w < 0.9 for w, *_ in tokens]),
        "evidence_clipped_above": mean([w > 1.3 for w, *_ in tokens]),
        "ratio_clipped_below": mean([r < 0.85 for _, r, *_ in tokens]),
        "ratio_clipped_above": mean([r > 1.25 for _, r, *_ in tokens]),
        "information_gain_abs": mean([abs(gain) for *_, gain, _ in tokens]),
        "entropy": mean([entropy for *_, entropy in tokens]),
        "approx_kl": mean([r - 1 - math.log(r) for _, r, *_ in tokens]),
    }
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.dim() == 0
        assert not value.requires_grad
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name
        assert expected[name] > 0, name


def test_metrics_of_grpo_are_those_without_a_teacher(device):
    student, teacher, token_ids, advantages, old = problem(4, 8, device=device)
    mask = torch.rand(4, 8, device=device) < 0.7
    clips = {"epsilon_low": 0.15, "epsilon_high": 0.25}
    grpo = rlsd_metrics(grpo_loss(student, token_ids, advantages, old, mask=mask), mask, **clips)
    rlsd = rlsd_metrics(rlsd_loss(student, teacher, token_ids, advantages, old, mask=mask), mask, **clips)
    assert grpo.keys() == {"ratio_clipped_below", "ratio_clipped_above", "entropy", "approx_kl"}
    assert all(torch.equal(value, rlsd[name]) for name, value in grpo.items())


def test_metrics_of_nothing_are_zero(device):
    student, teacher, token_ids, advantages, old = problem(2, 3, device=device)
    mask = torch.zeros(2, 3, device=device)
    metrics = rlsd_metrics(rlsd_loss(student, teacher, token_ids, advantages, old, mask=mask), mask)
    assert {value.item() for value in metrics.values()} == {0.0}
