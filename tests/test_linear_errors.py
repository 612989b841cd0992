"""What linear_* says to bad input, before any matmul."""

import math
import re

import pytest
import torch
from heads import FUNCTIONS, H2, LOSSES, WITH_OTHER, H, V, fused, problem

import sdkernels
from sdkernels import Support

B, T = 2, 3
LABELLED = [x for x in FUNCTIONS if "rlsd" in x or x in ("token_log_prob", "grpo_loss")]
STUDENT = {x: "student_hidden" if x in WITH_OTHER else "hidden" for x in FUNCTIONS}


@pytest.fixture(autouse=True)
def _no_matmul(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a matmul came before the check")

    for name in ("addmm", "mm"):
        monkeypatch.setattr(torch, name, refuse)


def refused(kind, message, function, other=None, chunk_size=None, options=None, **changes):
    p = problem(B, T)
    vars(p).update(changes)
    with pytest.raises(kind, match=message):
        fused(function, p, other=other, chunk_size=chunk_size, **(options or {}))


FLOATS = "must be float64, float32, bfloat16 or float16, got torch.int64"
SHARED = [
    (TypeError, "STUDENT must be a torch.Tensor, got list", {"hidden": [1.0]}),
    (TypeError, "lm_head_weight must be a torch.Tensor, got NoneType", {"weight": None}),
    (TypeError, f"STUDENT {FLOATS}", {"hidden": torch.ones(B, T, H, dtype=torch.int64)}),
    (TypeError, f"lm_head_weight {FLOATS}", {"weight": torch.ones(V, H, dtype=torch.int64)}),
    (ValueError, re.escape("STUDENT must have shape (..., H) with H > 0, got ()"), {"hidden": torch.tensor(1.0)}),
    (ValueError, re.escape("STUDENT must have shape (..., H) with H > 0, got (2, 3, 0)"),
     {"hidden": torch.ones(B, T, 0)}),
    (ValueError, re.escape(f"STUDENT must be hidden states (..., {V}), as lm_head_weight has shape ({H}, {V}), "
                           f"got shape ({B}, {T}, {H})"), {"weight": torch.ones(H, V)}),
    (ValueError, re.escape(f"lm_head_weight must have shape (V, H) with V > 0, got (0, {H})"),
     {"weight": torch.ones(0, H)}),
    (ValueError, re.escape(f"lm_head_weight must have shape (V, H) with V > 0, got ({V},)"),
     {"weight": torch.ones(V)}),
    (ValueError, "lm_head_weight is on meta, but STUDENT is on cpu", {"weight": torch.ones(V, H, device="meta")}),
    (TypeError, "bias must be a torch.Tensor, got float", {"options": {"bias": 1.0}}),
    (TypeError, f"bias {FLOATS}", {"options": {"bias": torch.ones(V, dtype=torch.int64)}}),
    (ValueError, re.escape(f"bias must have shape ({V},), got ({V + 1},)"), {"options": {"bias": torch.ones(V + 1)}}),
    (ValueError, "bias is on meta", {"options": {"bias": torch.ones(V, device="meta")}}),
    (ValueError, "softcap must be > 0, got 0", {"options": {"softcap": 0.0}}),
    (ValueError, "softcap must be > 0, got -3", {"options": {"softcap": -3}}),
    (ValueError, "softcap must be > 0, got nan", {"options": {"softcap": math.nan}}),
    (ValueError, "softcap must be >= 1.18e-38, the smallest normal float32, got 1e-46",
     {"options": {"softcap": 1e-46}}),
    (TypeError, "softcap must be a number, got str", {"options": {"softcap": "30"}}),
    (TypeError, "softcap must be a number, got bool", {"options": {"softcap": True}}),
    (TypeError, "logit_scale must be a number, got Tensor", {"options": {"logit_scale": torch.ones(())}}),
    (TypeError, "logit_scale must be a number, got NoneType", {"options": {"logit_scale": None}}),
    (ValueError, "chunk_size must be >= 1, got 0", {"chunk_size": 0}),
    (ValueError, "chunk_size must be >= 1, got -4", {"chunk_size": -4}),
    (TypeError, "chunk_size must be an integer, got float", {"chunk_size": 4.0}),
    (TypeError, "chunk_size must be an integer, got bool", {"chunk_size": True}),
    (TypeError, "mask must be a torch.Tensor, got list", {"options": {"mask": [[1]]}}),
    (ValueError, re.escape("mask must have one value per token, shape (2, 3), got (3, 2)"),
     {"options": {"mask": torch.ones(T, B)}}),
    (ValueError, "temperature must be finite and > 0, got 0", {"options": {"temperature": 0.0}}),
    (ValueError, "temperature must be finite and > 0, got inf", {"options": {"temperature": math.inf}}),
    (TypeError, "temperature must be a number, got str", {"options": {"temperature": "1"}}),
    (ValueError, re.escape("temperature must have shape (2, 3) (per token) or (2,)"),
     {"options": {"temperature": torch.ones(T)}}),
    (ValueError, "temperature must be finite and > 0, got -1.0 for an unmasked token",
     {"options": {"temperature": torch.tensor([1.0, -1.0])}}),
    (ValueError, "temperature requires grad", {"options": {"temperature": torch.ones(B, requires_grad=True)}}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "changes"), SHARED, ids=[m[:60] for _, m, _ in SHARED])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_they_share(function, kind, message, changes):
    refused(kind, message.replace("STUDENT", STUDENT[function]), function, **changes)


def ids(value, dtype=torch.int64):
    return torch.full((B, T), value, dtype=dtype)


LABELS = [
    (TypeError, "token_ids must be a torch.Tensor, got int", 3),
    (TypeError, "token_ids must be int32 or int64, got torch.float32", torch.zeros(B, T)),
    (ValueError, re.escape("token_ids must have one value per token, shape (2, 3), got (3, 2)"),
     torch.zeros(T, B, dtype=torch.int64)),
    (ValueError, "token_ids is on meta", torch.zeros(B, T, dtype=torch.int64, device="meta")),
    (IndexError, re.escape(f"token_ids must be in [0, {V}), or -100 for a masked token, got {V}"), ids(V)),
    (IndexError, re.escape("or -100 for a masked token, got -1"), ids(-1, torch.int32)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "token_ids"), LABELS, ids=[m[:60] for _, m, _ in LABELS])
@pytest.mark.parametrize("function", LABELLED)
def test_token_ids(function, kind, message, token_ids):
    refused(kind, message, function, token_ids=token_ids)


LOSS = [
    (ValueError, "reduction must be one of 'token-mean', .* got 'mean'", {"reduction": "mean"}),
    (ValueError, "normalizer has nothing to divide with reduction='none'", {"reduction": "none", "normalizer": 3}),
    (ValueError, "normalizer must be finite and > 0, got 0", {"normalizer": 0}),
    (ValueError, re.escape("normalizer must be a number or a 0-dim tensor, got shape (2,)"),
     {"normalizer": torch.ones(2)}),
    (TypeError, "token_weight must be a floating tensor", {"token_weight": torch.ones(B, T, dtype=torch.int64)}),
    (ValueError, "token_weight must have one value per token", {"token_weight": torch.ones(B)}),
    (ValueError, "token_weight requires grad", {"token_weight": torch.ones(B, T, requires_grad=True)}),
    (ValueError, re.escape("cu_seqlens needs packed tokens of shape (N,)"),
     {"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "options"), LOSS, ids=[m[:60] for _, m, _ in LOSS])
@pytest.mark.parametrize("function", LOSSES)
def test_reductions_and_weights(function, kind, message, options):
    refused(kind, message, function, options=options)


@pytest.mark.parametrize("function", LOSSES)
def test_packed_tokens_need_their_sequences(function):
    p = problem(B * T)
    with pytest.raises(ValueError, match="needs sequences"):
        fused(function, p, reduction="seq-mean-token-mean")
    with pytest.raises(ValueError, match="cu_seqlens must go from 0 to 6 without decreasing"):
        fused(function, p, cu_seqlens=torch.tensor([0, 4, 5], dtype=torch.int32))


@pytest.mark.parametrize("function", WITH_OTHER)
def test_the_other_side_and_its_head(function):
    prefix = WITH_OTHER[function]
    named = {"opsd_loss": "teacher_hidden"}.get(function, prefix)
    weight, bias = f"{prefix}_lm_head_weight", f"{prefix}_bias"
    head = torch.ones(V, H)
    for kind, message, other, options in (
        (ValueError, f"{named} requires grad but gets no gradient", torch.ones(B, T, H, requires_grad=True), {}),
        (ValueError, f"{named} is on meta", torch.ones(B, T, H, device="meta"), {}),
        (TypeError, f"{named} must be", torch.ones(B, T, H, dtype=torch.int64), {}),
        (TypeError, f"{named} must be a torch.Tensor", [1.0], {}),
        (ValueError, named + re.escape(f" must be hidden states (..., {H}), as lm_head_weight has shape ({V}, {H}), "
                                       f"got shape (2, 3, {V})"), torch.ones(B, T, V), {}),
        (ValueError, named + re.escape(" must be hidden states (..., H) of tokens of shape (2, 3), got shape (3, 2, "),
         torch.ones(T, B, H), {}),
        (ValueError, named + re.escape(f" must be hidden states (..., {H}), as ") + weight, torch.ones(B, T, H2),
         {weight: head}),
        (ValueError, f"{weight} must have the student's vocabulary, {V}, got 5", None, {weight: torch.ones(5, H)}),
        (ValueError, f"{weight} requires grad", None, {weight: torch.ones(V, H, requires_grad=True)}),
        (ValueError, f"{bias} requires grad", None, {weight: head, bias: torch.ones(V, requires_grad=True)}),
        (ValueError, f"{bias} must have shape", None, {weight: head, bias: torch.ones(5)}),
        (TypeError, f"{weight} must be a torch.Tensor, got float", None, {weight: 1.0}),
        (TypeError, f"{weight} {FLOATS}", None, {weight: torch.ones(V, H, dtype=torch.int64)}),
    ):  # fmt: skip
        refused(kind, message, function, other=other, options=options)


@pytest.mark.parametrize("function", ["rlsd_loss", "rlsd_token_advantage"])
@pytest.mark.parametrize("options", [{"teacher_lm_head_weight": torch.ones(V, H)}, {"teacher_bias": torch.ones(V)}])
def test_teacher_log_probs_have_no_head(function, options):
    refused(
        ValueError, "need a teacher of hidden states .* got log-probs", function, torch.zeros(B, T), options=options
    )
    refused(ValueError, "teacher must have one value per token", function, torch.zeros(B))
    refused(ValueError, "teacher requires grad", function, torch.zeros(B, T, requires_grad=True))


def support(**changes):
    found = {"token_ids": torch.tensor([4, 0]).repeat(B, T, 1), "log_probs": torch.full((B, T, 2), 0.5).log(),
             "size": torch.full((B, T), 2), "temperature": 0.8}  # fmt: skip
    return Support(**{**found, **changes})


BASES = [
    (ValueError, "base_lm_head_weight and base_bias need a base of hidden states", {},
     {"base_lm_head_weight": torch.ones(V, H)}),
    (ValueError, "base_lm_head_weight and base_bias need a base of hidden states", {}, {"base_bias": torch.ones(V)}),
    (ValueError, "top_k, top_p and min_p must be None", {}, {"top_k": 3}),
    (ValueError, "base.temperature must equal temperature, 0.8, got 0.9", {"temperature": 0.9}, {}),
    (IndexError, "base.token_ids must hold ids in", {"token_ids": torch.full((B, T, 2), V)}, {}),
    (ValueError, "base.token_ids must hold distinct ids, got 0 more than once for a token",
     {"token_ids": torch.zeros(B, T, 2, dtype=torch.int64)}, {}),
    (ValueError, "base.token_ids must have shape", {"token_ids": torch.zeros(B, 2, dtype=torch.int64)}, {}),
    (ValueError, "base.log_probs must have the shape of base.token_ids", {"log_probs": torch.zeros(B, T, 3)}, {}),
    (ValueError, "base.log_probs must be of probabilities that sum to 1", {"log_probs": torch.zeros(B, T, 2)}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "changes", "options"), BASES, ids=[m[:60] for _, m, *_ in BASES])
def test_a_support_as_base(kind, message, changes, options):
    refused(kind, message, "ssd_loss", support(**changes), options=options)


OPTIONS = [
    ("token_log_prob", ValueError, "top_k must be >= 0", {"top_k": -1}),
    ("token_log_prob", ValueError, "top_p must be in", {"top_p": 0.0}),
    (
        "token_log_prob",
        ValueError,
        "support replaces top_k, top_p and min_p",
        {"support": ids(0)[..., None], "top_k": 3},
    ),
    ("token_log_prob", IndexError, "support must hold ids in", {"support": ids(V)[..., None]}),
    (
        "token_log_prob",
        ValueError,
        "support must hold distinct ids, got 3",
        {"support": ids(3)[..., None].repeat(1, 1, 2)},
    ),
    ("token_log_prob", TypeError, "support must be a Support or a torch.Tensor, got list", {"support": [3]}),
    ("truncated_support", ValueError, "max_size must be >= 1, got 0", {"max_size": 0}),
    ("truncated_support", TypeError, "max_size must be an integer", {"max_size": 2.0}),
    ("truncated_support", ValueError, "min_p must be in", {"min_p": 1.5}),
    ("grpo_loss", ValueError, "epsilon_low must be >= 0", {"epsilon_low": -0.1}),
    ("grpo_loss", ValueError, "dual_clip must be > 1", {"dual_clip": 1.0}),
    ("grpo_loss", ValueError, "reference_log_prob", {"beta": 0.1}),
    ("rlsd_loss", ValueError, "lam must be in", {"lam": 1.5}),
    ("rlsd_loss", ValueError, "clip_range must be >= 0", {"clip_range": -0.1}),
    ("rlsd_loss", ValueError, "apply_to must be one of", {"apply_to": "none"}),
    ("rlsd_loss", ValueError, "evidence_from must be one of", {"evidence_from": "new"}),
    ("rlsd_loss", ValueError, "credit_mask must have one value per token", {"credit_mask": torch.ones(T)}),
    ("rlsd_token_advantage", TypeError, "pessimistic must be a bool", {"pessimistic": 1}),
    ("ssd_loss", ValueError, "weights must be 3 finite numbers", {"weights": (1.0, 1.0)}),
    ("ssd_loss", TypeError, "weights must be 3 numbers", {"weights": 1.0}),
    ("opsd_loss", ValueError, "divergence must be one of", {"divergence": "kl"}),
    ("opsd_loss", ValueError, "beta must be in", {"divergence": "jsd", "beta": 1.0}),
    ("opsd_loss", ValueError, "token_clip must be > 0", {"token_clip": 0.0}),
    ("opsd_loss", ValueError, "top_k_from must be one of", {"top_k": 3, "top_k_from": "both"}),
    ("opsd_loss", TypeError, "tail must be a bool", {"top_k": 3, "tail": 1}),
]


@pytest.mark.parametrize(("function", "kind", "message", "options"), OPTIONS, ids=lambda x: str(x)[:40])
def test_the_options_of_each(function, kind, message, options):
    refused(kind, message, function, options=options)


@pytest.mark.parametrize("base", [[1.0], "base"])
def test_a_base_that_is_neither_hidden_states_nor_a_support(base):
    message = f"base must be a torch.Tensor or a Support, got {type(base).__name__}"
    refused(TypeError, message, "ssd_loss", other=base)
    with pytest.raises(TypeError, match=r"base must be a torch.Tensor or a Support, got NoneType"):
        sdkernels.linear_ssd_loss(torch.randn(B, T, H), None, torch.randn(V, H), 0.8)


@pytest.mark.parametrize("function", ["grpo_loss", "rlsd_loss", "rlsd_token_advantage"])
def test_advantages(function):
    refused(ValueError, re.escape("use advantages.squeeze(-1)"), function, advantages=torch.ones(B, 1))
    refused(TypeError, "advantages must be a floating tensor", function, advantages=torch.ones(B, dtype=torch.int64))
    refused(ValueError, "advantages requires grad", function, advantages=torch.ones(B, requires_grad=True))
    if function != "rlsd_token_advantage":
        refused(ValueError, "old_log_prob must have one value per token", function, old=torch.ones(B))
        refused(ValueError, "old_log_prob requires grad", function, old=torch.ones(B, T, requires_grad=True))


@pytest.mark.parametrize("function", LOSSES)
def test_there_is_nothing_to_write_in_place(function):
    with pytest.raises(TypeError, match="unexpected keyword argument 'inplace'"):
        fused(function, problem(B, T), inplace=True)


def test_every_function_is_covered():
    assert {f"linear_{x}" for x in FUNCTIONS} == {x for x in sdkernels.__all__ if x.startswith("linear_")}
