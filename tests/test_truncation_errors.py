"""Every message of the functions that truncate, raised before any kernel starts."""

import math
import re

import pytest
import torch
from test_errors import SHAPE_BT, B, T, V, cu_seqlens, per_token

from sdkernels import (
    Support,
    effective_temperature,
    ssd_decomposition,
    ssd_loss,
    token_log_prob,
    truncated_log_softmax,
    truncated_support,
)

TRUNCATED = {
    "truncated_log_softmax": lambda z, ids, **o: truncated_log_softmax(z, **o),
    "truncated_support": lambda z, ids, **o: truncated_support(z, max_size=3, **o),
    "token_log_prob": lambda z, ids, **o: token_log_prob(z, ids, **o),
    "ssd_decomposition": lambda z, ids, temperature=1.0, **o: ssd_decomposition(
        z, torch.randn(B, T, V), temperature, **o
    ),
    "ssd_loss": lambda z, ids, temperature=1.0, **o: ssd_loss(z, torch.randn(B, T, V), temperature, **o),
}
FILTER_MESSAGES = [
    (ValueError, "top_k must be >= 0, got -1", {"top_k": -1}),
    (TypeError, "top_k must be an integer, got float", {"top_k": 2.0}),
    (TypeError, "top_k must be an integer, got bool", {"top_k": True}),
    (TypeError, "top_k must be an integer, got Tensor", {"top_k": torch.tensor(2)}),
    *((ValueError, re.escape("top_p must be in (0, 1], got"), {"top_p": p}) for p in (0, 0.0, -0.1, 1.1, math.nan)),
    (TypeError, "top_p must be a number, got str", {"top_p": "0.9"}),
    *((ValueError, re.escape("min_p must be in [0, 1], got"), {"min_p": p}) for p in (-0.1, 1.1, math.nan)),
    (TypeError, "min_p must be a number, got bool", {"min_p": True}),
    *((ValueError, "temperature must be finite and > 0, got", {"temperature": t})
      for t in (0, -1.0, math.inf, math.nan)),
    *((ValueError, "temperature must be finite and > 0, got .* for an unmasked token",
       {"temperature": torch.tensor([1.0, t])}) for t in (0.0, -1.0, math.inf, math.nan)),
    (ValueError, "temperature must be finite and > 0, got .* for an unmasked token",
     {"temperature": torch.tensor([1.0, 0.0]), "top_k": 3}),
    (ValueError, "temperature requires grad", {"temperature": torch.ones(B, requires_grad=True)}),
    (ValueError, "temperature must have shape .* got " + re.escape("(2, 1); use temperature.squeeze(-1)"),
     {"temperature": torch.ones(B, 1)}),
    (TypeError, "temperature must be a floating tensor, got torch.int64",
     {"temperature": torch.ones(B, dtype=torch.int64)}),
]  # fmt: skip


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize(("error", "message", "options"), FILTER_MESSAGES, ids=[m[1][:60] for m in FILTER_MESSAGES])
def test_truncating_functions_name_what_is_wrong(error, message, options, name):
    with pytest.raises(error, match=message):
        TRUNCATED[name](torch.randn(B, T, V), torch.zeros(B, T, dtype=torch.int64), **options)


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize("filtering", [{"top_k": 2}, {"top_p": 0.5}, {}], ids=str)
def test_logits_and_masks_of_truncating_functions(filtering, name):
    ids = torch.zeros(B, T, dtype=torch.int64)
    for error, message, logits, options in [
        (TypeError, "logits must be a torch.Tensor, got list", [1.0], {}),
        (TypeError, "logits must be float64, .* got torch.int32", torch.ones(B, T, V, dtype=torch.int32), {}),
        (ValueError, "logits must have shape .* got " + re.escape("(2, 3, 0)"), torch.ones(B, T, 0), {}),
        (ValueError, "mask " + SHAPE_BT, torch.randn(B, T, V), {"mask": per_token(T, B)}),
        (ValueError, "mask is on meta, but", torch.randn(B, T, V), {"mask": torch.ones(B, T, device="meta")}),
        (TypeError, "mask must be a torch.Tensor, got list", torch.randn(B, T, V), {"mask": [[1, 1, 1]] * 2}),
    ]:
        if not (options and name == "truncated_log_softmax"):  # which has no mask
            with pytest.raises(error, match=message):
                TRUNCATED[name](logits, ids, **options, **filtering)


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize("filtering", [{"top_k": 2}, {"top_p": 0.5}, {}], ids=str)
def test_truncating_functions_do_not_read_a_bad_temperature_of_masked_tokens(filtering, name):
    if name == "truncated_log_softmax":
        return
    logits, ids, mask = torch.randn(B, T, V), torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T)
    mask[1] = 0
    TRUNCATED[name](logits, ids, mask=mask, temperature=torch.tensor([1.0, 0.0]), **filtering)
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got"):
        TRUNCATED[name](logits, ids, mask=mask, temperature=torch.tensor([0.0, 1.0]), **filtering)


def test_truncated_log_softmax_and_support_name_what_is_wrong():
    logits = torch.randn(B, T, V)
    for bad in (torch.int64, "float32", torch.bool):
        with pytest.raises(TypeError, match=f"dtype must be float64, float32, bfloat16 or float16, got {bad}"):
            truncated_log_softmax(logits, dtype=bad)
    for error, message, size in [
        (ValueError, "max_size must be >= 1, got 0", 0),
        (ValueError, "max_size must be >= 1, got -3", -3),
        (TypeError, "max_size must be an integer, got float", 2.0),
        (TypeError, "max_size must be an integer, got NoneType", None),
    ]:
        with pytest.raises(error, match=message):
            truncated_support(logits, max_size=size)
    with pytest.raises(TypeError, match="max_size"):
        truncated_support(logits)


def twice(ids, token):
    """The ids, in one row of them a token in both places."""
    ids = ids.clone()
    ids[0, 1] = token
    return ids


@pytest.mark.parametrize("sparse", [False, True])
def test_token_log_prob_names_what_is_wrong_with_a_support(sparse):
    logits, ids = torch.randn(B, T, V), torch.zeros(B, T, dtype=torch.int64)

    def support_of(token_ids):
        if not sparse:
            return token_ids
        return Support(token_ids, torch.zeros(B, T, 2), torch.ones(B, T), 1.0)

    good = torch.tensor([0, -1]).repeat(B, T, 1)
    for option in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match="support replaces top_k, top_p and min_p: they must be None"):
            token_log_prob(logits, ids, support=support_of(good), **option)
    for error, message, bad in [
        (TypeError, "support must hold int32 or int64 ids, got torch.float32", torch.zeros(B, T, 2)),
        (ValueError, re.escape("support must have shape (..., K) for tokens of shape (2, 3), got (3, 2)"), good[0]),
        (
            ValueError,
            re.escape("support must have shape (..., K) for tokens of shape (2, 3), got (2, 2, 2)"),
            good[:, :2],
        ),
        (ValueError, "support is on meta, but", good.to("meta")),
        (IndexError, rf"support must hold ids in \[0, {V}\), or -1 for none, got {V}", good + V),
        (IndexError, rf"support must hold ids in \[0, {V}\), or -1 for none, got -2", good - 2),
        (ValueError, "support must hold distinct ids, got 6 more than once for a token", twice(good, 6)),
        (ValueError, "support must hold distinct ids, got 0 more than once for a token", twice(good.int(), 0)),
    ]:
        with pytest.raises(error, match=message):
            token_log_prob(logits, ids, support=support_of(bad))
    if not sparse:
        with pytest.raises(TypeError, match=r"support must be a Support or a torch\.Tensor, got list"):
            token_log_prob(logits, ids, support=[1, 2])
    none = torch.full((B, T, 2), -1)
    token_log_prob(logits, ids, support=support_of(none))  # which may repeat
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    good[1, 2] = 99
    token_log_prob(logits, ids, support=support_of(good), mask=mask)
    with pytest.raises(IndexError, match=r"token_ids must be in \[0, 7\)"):
        token_log_prob(logits, ids + V, support=support_of(good), mask=mask)
    for option in ({"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(IndexError, match=r"token_ids must be in \[0, 7\)"):
            token_log_prob(logits, ids + V, **option)


SPARSE = Support(torch.tensor([0, 1]).repeat(B, T, 1), torch.zeros(B, T, 2), torch.ones(B, T), 0.8)
BASE_MESSAGES = [
    (TypeError, "base must be a torch.Tensor or a Support, got list", [1.0], {}),
    (TypeError, "base must be float64, .* got torch.int64", torch.ones(B, T, V, dtype=torch.int64), {}),
    (ValueError, re.escape("base must have the student logits' shape (2, 3, 7), got (2, 3, 8)"),
     torch.randn(B, T, V + 1), {}),
    (ValueError, "base is on meta, but", torch.zeros(B, T, V, device="meta"), {}),
    (ValueError, re.escape("base requires grad but gets no gradient here: pass base.detach()"),
     torch.randn(B, T, V, requires_grad=True), {}),
    *((ValueError, "a Support as base is truncated already: top_k, top_p and min_p must be None", SPARSE, option)
      for option in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1})),
    (ValueError, re.escape("base.temperature must equal temperature, 0.8, got 1.0"),
     SPARSE._replace(temperature=1.0), {}),
    (ValueError, "base.temperature must equal temperature, 0.8, got 0.9 for an unmasked token",
     SPARSE._replace(temperature=torch.tensor([0.8, 0.9], dtype=torch.float64)), {}),
    (ValueError, "base.temperature must equal temperature, 0.8, got 0.9 for an unmasked token",
     SPARSE._replace(temperature=torch.tensor([0.8, 0.9], dtype=torch.float64)),
     {"mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}),
    (TypeError, "base.token_ids must hold int32 or int64 ids, got torch.float32",
     SPARSE._replace(token_ids=torch.zeros(B, T, 2)), {}),
    (ValueError, re.escape("base.token_ids must have shape (..., K) for tokens of shape (2, 3), got (2, 2)"),
     SPARSE._replace(token_ids=torch.zeros(B, 2, dtype=torch.int64)), {}),
    (TypeError, "base.log_probs must be a floating tensor, got torch.int64",
     SPARSE._replace(log_probs=torch.zeros(B, T, 2, dtype=torch.int64)), {}),
    (ValueError, re.escape("base.log_probs must have the shape of base.token_ids, (2, 3, 2), got (2, 3, 1)"),
     SPARSE._replace(log_probs=torch.zeros(B, T, 1)), {}),
    (ValueError, "base.log_probs requires grad",
     SPARSE._replace(log_probs=torch.zeros(B, T, 2, requires_grad=True)), {}),
    (ValueError, re.escape("base.log_probs must be of probabilities that sum to 1 over the listed ids, got a sum of 2: "
                           "renormalise with base.log_probs.log_softmax(-1)"), SPARSE, {}),
    (ValueError, "base.token_ids is on meta, but", SPARSE._replace(token_ids=SPARSE.token_ids.to("meta")), {}),
    *((IndexError, rf"base.token_ids must hold ids in \[0, {V}\), or -1 for none, got {bad}",
       SPARSE._replace(token_ids=twice(SPARSE.token_ids, bad)), {}) for bad in (V, -2, 2**40)),
    (ValueError, "base.token_ids must hold distinct ids, got 3 more than once for a token",
     SPARSE._replace(token_ids=twice(SPARSE.token_ids, 3)), {}),
]  # fmt: skip


@pytest.mark.parametrize("function", [ssd_decomposition, ssd_loss])
@pytest.mark.parametrize(("error", "message", "base", "options"), BASE_MESSAGES, ids=[m[1][:60] for m in BASE_MESSAGES])
def test_ssd_names_what_is_wrong_with_the_base(error, message, base, options, function):
    with pytest.raises(error, match=message):
        function(torch.randn(B, T, V), base, 0.8, **options)


def test_ssd_loss_names_what_is_wrong_with_its_own_options():
    logits, base = torch.randn(B, T, V), torch.randn(B, T, V)
    packed = {"student_logits": logits.view(-1, V), "base": base.view(-1, V)}
    for error, message, options in [
        (TypeError, "weights must be 3 numbers, got float", {"weights": 1.0}),
        (TypeError, "weights must be 3 numbers, got str", {"weights": "111"}),
        (TypeError, "weights must be a number, got str", {"weights": (1, "1", 1)}),
        (ValueError, re.escape("weights must be 3 finite numbers, got (1, 1)"), {"weights": (1, 1)}),
        (ValueError, "weights must be 3 finite numbers", {"weights": (1, 1, math.nan)}),
        (ValueError, "token_weight " + SHAPE_BT, {"token_weight": per_token(T, B)}),
        (ValueError, "token_weight requires grad", {"token_weight": per_token(requires_grad=True)}),
        (TypeError, "inplace must be a bool, got int", {"inplace": 1}),
        (
            ValueError,
            "inplace=True needs student_logits whose tokens do not overlap",
            {"inplace": True, "student_logits": torch.randn(1, T, V).expand(B, T, V)},
        ),
        (ValueError, "reduction must be one of", {"reduction": "mean"}),
        (ValueError, "normalizer has nothing to divide", {"reduction": "none", "normalizer": 3}),
        (ValueError, "normalizer must be finite and > 0", {"normalizer": 0}),
        (ValueError, "cu_seqlens needs packed tokens", {"cu_seqlens": cu_seqlens(0, 6)}),
        (ValueError, "reduction='seq-mean-token-mean' needs sequences", {**packed, "reduction": "seq-mean-token-mean"}),
        (ValueError, "cu_seqlens must go from 0 to 6", {**packed, "cu_seqlens": cu_seqlens(0, 5)}),
    ]:
        with pytest.raises(error, match=message):
            ssd_loss(**{"student_logits": logits, "base": base, "temperature": 0.8, **options})


def test_effective_temperature_names_what_is_wrong():
    for name in ("train_temperature", "eval_temperature"):
        for bad in (0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be finite and > 0, got {bad}"):
                effective_temperature(**{"train_temperature": 1, "eval_temperature": 1, name: bad})
        with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
            effective_temperature(**{"train_temperature": 1, "eval_temperature": 1, name: "hot"})


def test_the_base_may_require_grad_where_no_gradient_is_asked_for():
    student, base = torch.randn(B, T, V), torch.randn(B, T, V, requires_grad=True)
    with torch.no_grad():
        quiet = ssd_loss(student, base, 0.8, top_k=3)
    assert torch.equal(quiet.loss, ssd_loss(student, base.detach(), 0.8, top_k=3).loss)
