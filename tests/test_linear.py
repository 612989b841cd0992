"""linear_* from hidden states equal the logits versions on float64 logits, gradients of hidden states, weight, bias."""

import itertools

import pytest
import torch
from closeness import assert_same_bits
from heads import DIFFERENTIABLE, FUNCTIONS, LOSSES, WITH_OTHER, check, fused, problem, run_fused
from supports import few, name
from test_ssd_loss import REDUCTIONS

from sdkernels import truncated_support

HEADS = [dict(zip(("bias", "softcap", "logit_scale"), x, strict=True))
         for x in itertools.product((False, True), (None, 3.0), (1.0, 0.5))]  # fmt: skip
FILTERS = [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9, "min_p": 0.001}]
DTYPES = [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.float16, None),
          (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16),
          (torch.float32, torch.float64)]  # fmt: skip
OWN = ("lm_head_weight", "bias")


def name_of(value):
    return value if isinstance(value, str) else name(value)


def with_bias(p, head):
    return {**head, "bias": p.bias if head["bias"] else None}


@pytest.mark.parametrize(("function", "head"), few(itertools.product(FUNCTIONS, HEADS), 17), ids=name_of)
def test_bias_scale_and_softcap_in_this_order(function, head, device):
    for dtype in (torch.float64, torch.float32):
        p = problem(2, 3, hidden=dtype, device=device)
        check(function, p, **with_bias(p, head), chunk_size=4)


@pytest.mark.parametrize("softcap", [float("inf"), 1e300, 1e39])
def test_a_softcap_beyond_the_range_of_logits_is_none(softcap, device):
    p = problem(2, 3, device=device)
    (found, gradients), (expected, again) = (run_fused("grpo_loss", p, softcap=x) for x in (softcap, None))
    for x, y in zip((*found.values(), *gradients), (*expected.values(), *again), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("softcap", [1.2e-38, 1e-30, 1e-3, 1e30])
def test_a_softcap_of_any_size(softcap, device):
    check("grpo_loss", problem(2, 3, device=device), softcap=softcap)


@pytest.mark.parametrize(("function", "dtypes"), few(itertools.product(FUNCTIONS, DTYPES), 11), ids=str)
def test_dtypes_of_hidden_states_and_weight(function, dtypes, device):
    p = problem(2, 4, hidden=dtypes[0], weight=dtypes[1], device=device)
    check(function, p, bias=p.bias, logit_scale=0.5)
    check(function, p, everything=True, softcap=5.0)


@pytest.mark.parametrize(("function", "shape", "chunk_size"), few(itertools.product(
    FUNCTIONS, [(8,), (2, 4), (2, 1, 2, 2)], [1, 3, 8, 9, 1000, None]), 31), ids=str)  # fmt: skip
def test_shapes_and_chunks(function, shape, chunk_size, device):
    p = problem(*shape, device=device)
    check(function, p, bias=p.bias, chunk_size=chunk_size)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_token_or_none(function, shape, device):
    p = problem(*shape, device=device)
    _, gradients = check(function, p, bias=p.bias)
    if 0 in shape:
        assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize(("function", "reduction", "normalizer"), few(itertools.product(
    LOSSES, REDUCTIONS, [None, 7.0, torch.tensor(0.5)]), 17), ids=str)  # fmt: skip
def test_reductions_and_normalizers(function, reduction, normalizer, device):
    if reduction == "none" and normalizer is not None:
        return
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    p = problem(3, 4, device=device)
    p.mask[1] = False
    options = dict(mask=p.mask, token_weight=p.positive, reduction=reduction, normalizer=normalizer, chunk_size=5)
    check(function, p, **options)
    check(function, p, everything=True, **options)


@pytest.mark.parametrize("ends", [[0, 4, 9], [0, 0, 4, 9, 9]], ids=str)
@pytest.mark.parametrize("function", few([*DIFFERENTIABLE, "rlsd_token_advantage"], 3))
def test_packed_sequences_with_their_own_temperatures(function, ends, device):
    p = problem(9, device=device)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    packed = torch.rand(len(ends) - 1, device=device) + 0.5
    for reduction in few(REDUCTIONS, 2) if function in LOSSES else [None]:
        options = {} if reduction is None else {"reduction": reduction}
        check(function, p, temperature=packed, mask=p.mask, cu_seqlens=cu_seqlens, chunk_size=5, **options)


@pytest.mark.parametrize("function", few(FUNCTIONS, 3))
def test_temperatures_per_token_per_sequence_and_zero_dimensional(function, device):
    p = problem(2, 4, device=device)
    for temperature in few([p.positive[:, 0], p.positive, p.positive[0, 0], 0.7, 2], 4):
        check(function, p, temperature=temperature, chunk_size=3)


@pytest.mark.parametrize("function", [x for x in FUNCTIONS if "loss" in x or "rlsd" in x])
def test_advantages_per_sequence_and_constants_of_other_dtypes(function, device):
    p = problem(2, 4, device=device)
    p.advantages, p.old, p.positive = p.advantages[:, 0], p.old.bfloat16(), p.positive.double()
    p.token_ids = p.token_ids.int()
    check(function, p, mask=p.mask.int(), **({"token_weight": p.positive} if function in LOSSES else {}))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masked_tokens_hold_anything(function, device):
    for dtype in few([torch.bfloat16, torch.float64, torch.float32], 3):
        p = problem(3, 4, hidden=dtype, device=device)
        dirty = problem(3, 4, hidden=dtype, device=device)
        vars(dirty).update(vars(p))
        p.token_ids[0, 1], p.mask[0, 1], p.mask[0, 0] = -100, "token_ids" in ACCEPTS[function], False
        keep = p.mask & (p.token_ids != -100)
        dirty.hidden, dirty.other = (
            torch.where(keep.unsqueeze(-1), x, bad) for x, bad in ((p.hidden, torch.nan), (p.other, torch.inf))
        )
        dirty.own = tuple(torch.where(keep.unsqueeze(-1), x, torch.nan) if x.dim() == 3 else x for x in p.own)
        found, gradients = check(function, dirty, clean=p, mask=p.mask, bias=p.bias, chunk_size=5)
        for value in found.values():
            if value.shape[:2] == keep.shape and value.dim() == 2:
                assert (value[~keep] == 0).all()
        for gradient in gradients[:1]:
            assert (gradient[~keep] == 0).all()
        if function in WITH_OTHER:
            own = {f"{WITH_OTHER[function]}_{key}": x for key, x in zip(OWN, p.own[1:], strict=True)}
            clean_own = fused(function, p, other=p.own[0], mask=p.mask, **own)[0]
            assert_same_bits(fused(function, dirty, other=dirty.own[0], mask=p.mask, **own)[0], clean_own)


ACCEPTS = {
    function: {"token_ids"} if "rlsd" in function or function in ("grpo_loss", "token_log_prob") else set()
    for function in FUNCTIONS
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_everything_masked_is_zero_and_backpropagates_zeros(function, device):
    p = problem(2, 3, device=device)
    p.hidden[:], p.other[:] = torch.nan, torch.nan
    found, gradients = run_fused(function, p, mask=torch.zeros(2, 3, device=device), bias=p.bias)
    assert all((x == 0).all() for x in gradients)
    if "loss" in found:
        assert found["loss"].item() == 0


@pytest.mark.parametrize(("function", "head"), few(itertools.product(WITH_OTHER, HEADS), 11), ids=name_of)
def test_the_other_side_s_own_head_and_width(function, head, device):
    prefix = WITH_OTHER[function]
    for dtype in few([torch.bfloat16, torch.float64, torch.float32], 3):
        p = problem(2, 3, hidden=dtype, device=device)
        hidden, weight, bias = p.own
        options = with_bias(p, head)
        check(function, p, other=hidden, **{f"{prefix}_lm_head_weight": weight}, **options, chunk_size=4)
        own = {f"{prefix}_lm_head_weight": weight, f"{prefix}_bias": bias}
        check(function, p, other=hidden, **own, **options)
        check(function, p, **{f"{prefix}_bias": bias}, **options)


@pytest.mark.parametrize("function", WITH_OTHER)
def test_student_and_other_side_may_differ_in_dtype(function, device):
    prefix = WITH_OTHER[function]
    for mine, others in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        p, q = problem(2, 3, hidden=mine, device=device), problem(2, 3, hidden=others, device=device)
        check(function, p, other=q.own[0], **{f"{prefix}_lm_head_weight": q.own[1]}, bias=p.bias, chunk_size=4)
        if mine == torch.float32:
            check(function, p, other=q.other, bias=p.bias)


@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize("function", ["rlsd_loss", "rlsd_token_advantage"])
def test_teacher_log_probs(function, chunk_size, device):
    for dtype in few([torch.bfloat16, torch.float64, torch.float32], 3):
        p = problem(2, 3, hidden=dtype, device=device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found, _ = check(function, p, other=p.old.to(wide), bias=p.bias, mask=p.mask, chunk_size=chunk_size)
        assert (found["teacher_entropy"] == 0).all()


@pytest.mark.parametrize("temperature", [0.8, "per token"])
def test_a_support_as_base(temperature, device):
    for dtype in few([torch.bfloat16, torch.float64, torch.float32], 3):
        p = problem(2, 3, hidden=dtype, device=device)
        t = p.positive if temperature == "per token" else temperature
        base = truncated_support(p.other.float() @ p.weight.float().t(), t, top_k=20, top_p=0.9, max_size=8)
        check("ssd_loss", p, other=base, temperature=t, bias=p.bias, mask=p.mask, chunk_size=4)


POLICY = [
    {"epsilon_low": 0.1, "epsilon_high": 0.28, "dual_clip": 3.0},
    {"epsilon_high": float("inf"), "beta": 0.1},
    {"epsilon_low": 0, "epsilon_high": 1},
]
WEIGHING = [
    {"clip_range": (0.1, 0.3), "lam": 0.5, "pessimistic": True, "apply_to": "negative"},
    {"clip_range": float("inf"), "lam": 1, "apply_to": "positive"},
    {"lam": 0.0, "clip_range": 0},
]
DIVERGENCES = [
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.3, "token_clip": 0.02},
    {"top_k": 7, "top_k_from": "teacher"},
    {"divergence": "reverse_kl", "top_k": 7, "tail": False},
    {"divergence": "jsd", "top_k": 1000},
]
EVERY = {
    "token_log_prob": FILTERS,
    "truncated_support": [{**x, "max_size": size} for x in FILTERS for size in (1, 9, 100)],
    "grpo_loss": POLICY,
    "rlsd_loss": [{**x, **y, "evidence_from": e} for x in POLICY for y in WEIGHING for e in ("current", "old")],
    "rlsd_token_advantage": WEIGHING,
    "ssd_loss": [{**x, "weights": w} for x in FILTERS for w in ((1.0, 0.5, 2), (0.0, 1.0, 0.0))],
    "opsd_loss": DIVERGENCES,
}


@pytest.mark.parametrize(("function", "chosen"), [(f, x) for f in EVERY for x in few(EVERY[f], 5)], ids=str)
def test_every_option(function, chosen, device):
    for dtype in few([torch.bfloat16, torch.float64, torch.float32], 3):
        p = problem(2, 4, hidden=dtype, device=device)
        options = {**chosen}
        if options.get("beta") and function != "opsd_loss":
            options["reference_log_prob"] = p.old + 0.2
        if function.startswith("rlsd"):
            options["credit_mask"] = p.positive > 0.8
        if function in LOSSES:
            options["token_weight"] = p.positive
        check(function, p, bias=p.bias, softcap=9.0, temperature=0.8, mask=p.mask, chunk_size=3, **options)
        check(function, p, everything=True, temperature=0.8, **options)


@pytest.mark.parametrize("function", ["grpo_loss", "rlsd_loss"])
def test_without_old_log_probs(function, device):
    p = problem(2, 4, device=device)
    p.old = None
    found, _ = check(function, p, bias=p.bias)
    assert (found["ratio"] == 1).all()


def test_a_support_to_replay(device):
    p = problem(2, 4, device=device)
    ids = torch.stack([torch.randperm(61, device=device)[:9] for _ in range(8)]).reshape(2, 4, 9)
    ids[0, 1, 3:] = -1
    check("token_log_prob", p, support=ids, chunk_size=3, bias=p.bias, mask=p.mask)
    recorded = truncated_support(p.hidden @ p.weight.t(), top_k=6, max_size=6)
    check("token_log_prob", p, support=recorded, softcap=4.0)


VIEWS = {
    "time_major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.nn.functional.pad(x, (2, 3), value=torch.nan)[..., 2:-3],
    "every_other": lambda x: x.repeat_interleave(2, 0)[::2],
    "features_first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}


@pytest.mark.parametrize(("function", "of_hidden", "of_weight"), few(itertools.product(
    FUNCTIONS, VIEWS, ["sliced", "every_other", "features_first"]), 23), ids=str)  # fmt: skip
def test_views(function, of_hidden, of_weight, device):
    p = problem(2, 4, device=device)
    expected, gradients = run_fused(function, p, bias=p.bias, chunk_size=3)
    p.hidden, p.other, p.weight = VIEWS[of_hidden](p.hidden), VIEWS[of_hidden](p.other), VIEWS[of_weight](p.weight)
    found, again = check(function, p, bias=VIEWS["every_other"](p.bias), chunk_size=3)
    for x, y in zip((*found.values(), *again), (*expected.values(), *gradients), strict=True):
        assert x.shape == y.shape
