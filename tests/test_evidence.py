"""RLSD's evidence weight and advantage, from log-probs (`evidence_weighted_advantage`) and from logits."""

import itertools

import nasty
import oracles
import pytest
import torch
from closeness import assert_log_probs, assert_same_bits, assert_weights, assert_within
from hypothesis import given
from hypothesis import strategies as st

from sdkernels import evidence_weighted_advantage, rlsd_token_advantage

CLIPS = [0.2, (0.1, 0.5), 0.0, (0.2, torch.inf), (torch.inf, 0.2), (1.5, 3.0)]
OPTIONS = list(itertools.product([0.0, 0.5, 1.0], ["all", "negative", "positive"], [False, True]))


def log_probs(*shape, dtype=torch.float64, device="cpu"):
    return (-torch.rand(shape, dtype=torch.float64) * 8).to(dtype).to(device)


def advantages_of_all_signs(*shape, device="cpu"):
    values = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.2, 0.0, values).to(device)


def check(result, truth, advantages, keep=None):
    """EvidenceAdvantage or RLSDAdvantage against the oracle; the advantage errs as the weight that makes it."""
    assert_weights(result.weight, truth.weight)
    gain = LOG_PROB_ERROR[result.information_gain.dtype] * truth.information_gain.abs().clamp(min=1)
    assert_within(result.information_gain, truth.information_gain, gain, "information_gain")
    assert_weights(result.advantage, truth.advantage, advantages.abs().clamp(min=truth.advantage.abs()), "advantage")
    assert not any(x.requires_grad for x in result)
    if keep is not None:
        assert all((x[~keep] == 0).all() for x in result)


LOG_PROB_ERROR = {torch.float32: 4e-5, torch.float64: 1e-10}  # a difference of two log-probs of SPEC's accuracy


@pytest.mark.parametrize("clip_range", CLIPS)
@pytest.mark.parametrize(("lam", "apply_to", "pessimistic"), OPTIONS)
def test_every_option_equals_the_formula(clip_range, lam, apply_to, pessimistic, device):
    student, teacher = log_probs(4, 9, device=device), log_probs(4, 9, device=device)
    advantages, mask = advantages_of_all_signs(4, 9, device=device), (torch.rand(4, 9) < 0.8).to(device)
    credit_mask = (torch.rand(4, 9) < 0.7).float().to(device)
    options = dict(clip_range=clip_range, lam=lam, apply_to=apply_to, pessimistic=pessimistic, credit_mask=credit_mask)
    result = evidence_weighted_advantage(student, teacher, advantages, mask=mask, **options)
    truth = oracles.evidence(student, teacher, advantages.double(), keep=mask, **options)
    check(result, truth, advantages.double(), mask)


@pytest.mark.parametrize("clip_range", CLIPS)
@pytest.mark.parametrize(("lam", "apply_to", "pessimistic"), OPTIONS)
def test_every_option_equals_the_formula_from_logits(clip_range, lam, apply_to, pessimistic, device):
    student = nasty.rows("gaussian", 8, 111, device=device).reshape(2, 4, 111) / 5
    teacher = student + torch.randn(2, 4, 111, device=device)
    token_ids, advantages = nasty.ids(8, 111, device).reshape(2, 4), advantages_of_all_signs(2, 4, device=device)
    mask, credit_mask = (torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]], device=device) > 0, (advantages * 7).round() % 3)
    options = dict(clip_range=clip_range, lam=lam, apply_to=apply_to, pessimistic=pessimistic, credit_mask=credit_mask,
                   mask=mask, temperature=0.8)  # fmt: skip
    result = rlsd_token_advantage(student, teacher, token_ids, advantages, **options)
    check(result, oracles.rlsd_token_advantage(student, teacher, token_ids, advantages, **options), advantages, mask)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_equals_the_official_code(lam, device):
    student, teacher = log_probs(5, 7, device=device), log_probs(5, 7, device=device)
    advantages = advantages_of_all_signs(5, device=device).double()
    mask = (torch.rand(5, 7) < 0.8).double().to(device)
    result = evidence_weighted_advantage(student, teacher, advantages, lam=lam, clip_range=0.2, mask=mask)
    advantage, weight = oracles.official_rlsd_advantages(student, teacher, advantages[:, None], mask, lam, 0.2)
    assert_within(result.advantage, advantage, 1e-14, "advantage")
    assert_within(result.weight, weight, 1e-12 * weight, "weight")


def test_weights_telescope_to_the_likelihood_ratio_of_the_sequence(device):
    student, teacher = log_probs(3, 11, device=device), log_probs(3, 11, device=device)
    weight = evidence_weighted_advantage(student, teacher, torch.ones(3, device=device)).weight
    ratio = (teacher.sum(-1) - student.sum(-1)).exp()
    assert_within(weight.prod(-1), ratio, 1e-12 * ratio)


def test_swapping_sign_inverts_the_weight(device):
    student, teacher = log_probs(50, device=device), log_probs(50, device=device)
    up = evidence_weighted_advantage(student, teacher, torch.ones(50, device=device)).weight
    down = evidence_weighted_advantage(student, teacher, -torch.ones(50, device=device)).weight
    assert_within(up * down, torch.ones(50), 1e-13)


def from_log_probs(student, teacher, advantages, **options):
    return evidence_weighted_advantage(student.float(), teacher.float(), advantages, **options)


def from_logits(student, teacher, advantages, **options):
    """The same log-probs as those of token 0 of logits with three tokens, token 1 filling up the rest."""
    logits = torch.stack([student, torch.log1p(-student.exp()), torch.full_like(student, -torch.inf)], -1)
    token_ids = torch.zeros_like(advantages, dtype=torch.int64)
    return rlsd_token_advantage(logits.float(), teacher.float(), token_ids, advantages, **options)


EITHER_WAY = pytest.mark.parametrize("weigh", [from_log_probs, from_logits])


@EITHER_WAY
@pytest.mark.parametrize("pessimistic", [False, True])
def test_impossible_tokens(weigh, pessimistic, device):
    inf, half = torch.inf, torch.tensor(0.5).log().item()
    student = torch.tensor([-inf, -inf, half, half, -inf, -inf, half], device=device)
    teacher = torch.tensor([half, half, -inf, -inf, half, -inf, -inf], device=device)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0, 3.0, 0.0], device=device)
    result = weigh(student, teacher, advantages, clip_range=0.2, pessimistic=pessimistic)
    nan = torch.nan
    assert_same_bits(result.weight.cpu(), torch.tensor([inf, 0, 0, inf, 1, nan, 1]))
    expected = [2.4, -1.6, 0, -inf, 0, nan, 0] if pessimistic else [2.4, -1.6, 1.6, -2.4, 0, nan, 0]
    assert_within(result.advantage, torch.tensor(expected, device=device), 1e-6)
    assert_same_bits(result.information_gain.cpu(), torch.tensor([inf, inf, -inf, -inf, inf, nan, -inf]))


@EITHER_WAY
def test_without_mixing_the_advantage_is_kept_whatever_is_infinite(weigh, device):
    inf, half = torch.inf, torch.tensor(0.5).log().item()
    student = torch.tensor([-inf, half, -inf, half], device=device)
    teacher = torch.tensor([half, -inf, half, half], device=device)
    advantages = torch.tensor([1.5, -1.5, -2.0, 0.0], device=device)
    for clip_range in (0.2, (0.2, inf)):
        result = weigh(student, teacher, advantages, lam=0.0, clip_range=clip_range)
        assert_same_bits(result.advantage, advantages)
        assert_same_bits(result.weight.cpu(), torch.tensor([inf, inf, 0, 1]))


@EITHER_WAY
def test_an_unclipped_side_lets_infinity_through(weigh, device):
    half = torch.tensor([0.5], device=device).log()
    never = torch.full((1,), -torch.inf, device=device)
    result = weigh(never, half, torch.tensor([2.0], device=device), clip_range=(0.2, torch.inf))
    assert result.advantage.item() == torch.inf
    result = weigh(half, never, torch.tensor([2.0], device=device), clip_range=(torch.inf, 0.2))
    assert result.advantage.item() == 0


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_log_prob_gives_nan(side, device):
    values = {"student": log_probs(3, device=device), "teacher": log_probs(3, device=device)}
    values[side][1] = torch.nan
    result = evidence_weighted_advantage(values["student"], values["teacher"], torch.ones(3, device=device))
    for each in result:
        assert each.isnan().tolist() == [False, True, False]


@EITHER_WAY
@pytest.mark.parametrize("clip_range", [0.2, (0.999, 5.0)])
def test_the_advantage_has_the_reward_s_sign_and_is_bounded(weigh, clip_range, device):
    student, teacher = log_probs(200, device=device) - 1e-3, log_probs(200, device=device)
    advantages = advantages_of_all_signs(200, device=device)
    below, above = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    for lam in (0.5, 1.0):
        result = weigh(student, teacher, advantages, clip_range=clip_range, lam=lam)
        assert torch.equal(result.advantage.sign(), advantages.sign())
        size = result.advantage.abs()
        assert (size <= advantages.abs() * (1 + lam * above) * (1 + 1e-6)).all()
        assert (size >= advantages.abs() * (1 - lam * below) * (1 - 1e-6) - 1e-6).all()


@EITHER_WAY
def test_own_advantage_where_the_teacher_has_no_say_but_weights_everywhere(weigh, device):
    student, teacher = log_probs(40, device=device) - 1e-3, log_probs(40, device=device)
    advantages, credit = advantages_of_all_signs(40, device=device), (torch.rand(40) < 0.5).to(device)
    full = weigh(student, teacher, advantages)
    nowhere = torch.zeros_like(credit)
    for apply_to, outside in (("negative", advantages >= 0), ("positive", advantages <= 0), ("all", nowhere)):
        result = weigh(student, teacher, advantages, apply_to=apply_to, credit_mask=credit)
        own = outside | ~credit
        assert_same_bits(result.advantage, torch.where(own, advantages, full.advantage))
        assert_same_bits(result.weight, full.weight)
        assert_same_bits(result.information_gain, full.information_gain)


def test_masked_tokens_are_zero_whatever_they_hold(device):
    student, teacher = log_probs(2, 3, device=device), log_probs(2, 3, device=device)
    student[0, 1], teacher[1, 2] = torch.nan, -torch.inf
    advantages = torch.ones(2, 3, device=device)
    advantages[0, 0] = torch.nan
    mask = torch.tensor([[0, 0, 1], [1, 1, 0]], device=device)
    for result in (
        evidence_weighted_advantage(student, teacher, advantages, mask=mask),
        rlsd_token_advantage(torch.where(mask == 0, torch.nan, 0.0).unsqueeze(-1).expand(2, 3, 7), teacher,
                             torch.where(mask == 0, 10**9, 3), advantages, mask=mask),
    ):  # fmt: skip
        for each in result:
            assert (each[mask == 0] == 0).all()
            assert not each[mask != 0].isnan().any()


@pytest.mark.parametrize("dtypes", list(itertools.product(nasty.DTYPES, nasty.DTYPES)), ids=str)
def test_student_and_teacher_may_differ_in_dtype(dtypes, device):
    student, teacher = (nasty.rows("gumbel", 4, 3000, dtype, device) for dtype in dtypes)
    token_ids, advantages = nasty.ids(4, 3000, device), torch.tensor([1.0, -1.0, 0.5, -2.0], device=device)
    result = rlsd_token_advantage(student, teacher, token_ids, advantages)
    truth = oracles.rlsd_token_advantage(student, teacher, token_ids, advantages)
    for name in ("student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy"):
        loose = getattr(truth, name)
        assert_within(getattr(result, name), loose, 2e-5 + 1.2e-7 * loose.abs(), name)
    assert_within(result.weight, truth.weight, 1e-4 * truth.weight, "weight")
    assert_within(result.advantage, truth.advantage, 1e-4 * truth.advantage.abs(), "advantage")


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "all_but_the_last"])
def test_accuracy_at_a_full_vocabulary(layout, dtype, device):
    vocab = 151936
    student = nasty.rows("gaussian", 4, vocab, dtype, device).reshape(2, 2, vocab)
    teacher = (student + torch.randn(2, 2, vocab, device=device) / 2).to(dtype)
    token_ids = student.argmax(-1)
    token_ids[0, 0], token_ids[1, 1] = 0, vocab - 1
    advantages = torch.tensor([1.3, -0.7], device=device)
    result = rlsd_token_advantage(*(nasty.LAYOUTS[layout](x) for x in (student, teacher)), token_ids, advantages)
    truth = oracles.rlsd_token_advantage(student, teacher, token_ids, advantages)
    for name in ("student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy"):
        assert_log_probs(getattr(result, name), getattr(truth, name), name)
    check(result, truth, advantages[:, None].expand(2, 2))


@pytest.mark.parametrize("kind", nasty.ROWS)
def test_nasty_rows_on_either_side(kind, device):
    vocab, advantages = 50257, torch.tensor([1.0, -1.0, 0.0], device=device)
    other, token_ids = nasty.rows("gumbel", 3, vocab, device=device), nasty.ids(3, vocab, device)
    rows = nasty.rows(kind, 3, vocab, device=device)
    for student, teacher in ((rows, other), (other, rows), (rows, rows)):
        result = rlsd_token_advantage(student, teacher, token_ids, advantages)
        truth = oracles.rlsd_token_advantage(student, teacher, token_ids, advantages)
        for name in ("student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy"):
            assert_log_probs(getattr(result, name), getattr(truth, name), name)
        assert_weights(result.weight.clamp(1e-34, 1e34), truth.weight.clamp(1e-34, 1e34))  # float32 ends soon after
        assert_weights(result.advantage, truth.advantage)


def test_teacher_log_probs_equal_teacher_logits(device):
    student, teacher = (nasty.rows("gaussian", 6, 111, device=device).reshape(2, 3, 111) for _ in range(2))
    token_ids, advantages = nasty.ids(6, 111, device).reshape(2, 3), torch.tensor([1.0, -2.0], device=device)
    dense = rlsd_token_advantage(student, teacher, token_ids, advantages)
    sparse = rlsd_token_advantage(student, dense.teacher_log_prob, token_ids, advantages)
    assert (sparse.teacher_entropy == 0).all()
    for each, expected in zip(sparse[:3], dense[:3], strict=True):  # from a float32 log-prob, not from one more precise
        assert_weights(each, expected)
    for each, expected in zip(sparse[3:6], dense[3:6], strict=True):
        assert_same_bits(each, expected)


def test_per_sequence_advantages_and_temperatures_spread_over_their_tokens(device):
    student, teacher = (nasty.rows("gaussian", 6, 111, device=device) for _ in range(2))
    token_ids = nasty.ids(6, 111, device)
    ends = torch.tensor([0, 2, 2, 6, 6], dtype=torch.int32, device=device)
    advantages, temperature = (torch.tensor(x, device=device) for x in ([1.0, 9.0, -2.0, 9.0], [0.5, 9.0, 2.0, 9.0]))
    each, hot = (torch.stack([x[0], x[0], x[2], x[2], x[2], x[2]]) for x in (advantages, temperature))
    packed = rlsd_token_advantage(student, teacher, token_ids, advantages, temperature=temperature, cu_seqlens=ends)
    for result, expected in zip(
        packed, rlsd_token_advantage(student, teacher, token_ids, each, temperature=hot), strict=True
    ):
        assert_same_bits(result, expected)
    plain = evidence_weighted_advantage(packed.student_log_prob, packed.teacher_log_prob, advantages, cu_seqlens=ends)
    for result, expected in zip(plain, packed[:3], strict=True):
        assert_weights(result, expected)
    batched = rlsd_token_advantage(
        *(x.reshape(2, 3, -1) for x in (student, teacher)), token_ids.reshape(2, 3), advantages[:2]
    )
    expected = rlsd_token_advantage(student, teacher, token_ids, advantages[:2].repeat_interleave(3))
    for result, flat in zip(batched, expected, strict=True):
        assert_same_bits(result.reshape(-1), flat)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_a_token_depends_on_its_own_rows_only(dtype, device):
    student, teacher = (nasty.rows("gumbel", 9, 3001, dtype, device).reshape(3, 3, -1) for _ in range(2))
    token_ids, advantages = nasty.ids(9, 3001, device).reshape(3, 3), torch.randn(3, 3, device=device)
    whole = rlsd_token_advantage(student, teacher, token_ids, advantages)
    alone = rlsd_token_advantage(*(x[1:2, 2] for x in (student, teacher, token_ids, advantages)))
    for each, single in zip(whole, alone, strict=True):
        assert_same_bits(single, each[1:2, 2])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), ()])
def test_zero_tokens_and_one_without_dimensions(shape, device):
    logits, token_ids = torch.randn(*shape, 7, device=device), torch.zeros(shape, dtype=torch.int64, device=device)
    result = rlsd_token_advantage(logits, logits, token_ids, torch.ones(shape, device=device))
    assert_within(result.weight, torch.ones(shape), 1e-6)
    weighed = evidence_weighted_advantage(logits[..., 0], logits[..., 0], torch.ones(shape, device=device))
    assert_within(weighed.advantage, torch.ones(shape), 0.0)


@given(st.data())
def test_any_shape_and_options_equal_the_formula_from_logits(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3), "shape"))
    vocab, torch_seed = data.draw(st.integers(2, 200), "V"), data.draw(st.integers(0, 99), "seed")
    torch.manual_seed(torch_seed)
    count = torch.Size(shape).numel()
    student = torch.randn(*shape, vocab) * 2
    teacher = data.draw(st.sampled_from([student + torch.randn(*shape, vocab), -torch.rand(shape) * 5]), "teacher")
    token_ids = nasty.ids(count, vocab).reshape(shape)
    advantages = advantages_of_all_signs(*data.draw(st.sampled_from([shape, shape[:-1]]), "advantages"))
    options = {
        "clip_range": data.draw(st.sampled_from(CLIPS), "clip_range"),
        "lam": data.draw(st.floats(0, 1), "lam"),
        "apply_to": data.draw(st.sampled_from(["all", "negative", "positive"]), "apply_to"),
        "pessimistic": data.draw(st.booleans(), "pessimistic"),
        "mask": data.draw(st.sampled_from([None, torch.rand(shape) < 0.7]), "mask"),
        "credit_mask": data.draw(st.sampled_from([None, torch.rand(shape) < 0.7]), "credit_mask"),
        "temperature": data.draw(st.sampled_from([1.0, 0.6, torch.rand(shape[:-1]) + 0.5]), "temperature"),
    }
    result = rlsd_token_advantage(student, teacher, token_ids, advantages, **options)
    truth = oracles.rlsd_token_advantage(student, teacher, token_ids, advantages, **options)
    check(result, truth, oracles.per_token(advantages, shape), oracles.kept(token_ids, options["mask"]))
