"""Every message of the functions of OPSD, raised before any kernel starts."""

import math
import re

import pytest
import torch
from test_errors import SHAPE_BT, B, T, V, cu_seqlens, per_token

from sdkernels import OPSDLoss, opsd_decomposition, opsd_loss

PACKED = {"student_logits": torch.randn(B * T, V), "teacher_logits": torch.randn(B * T, V)}
SHARED = [  # with a teacher of a shape that suits either function
    (TypeError, "student_logits must be a torch.Tensor, got list", {"student_logits": [1.0]}),
    (TypeError, "teacher_logits must be a torch.Tensor, got NoneType", {"teacher_logits": None}),
    (TypeError, "student_logits must be float64, float32, bfloat16 or float16, got torch.int64",
     {"student_logits": torch.ones(B, T, V, dtype=torch.int64)}),
    (TypeError, "teacher_logits must be float64, float32, bfloat16 or float16, got torch.bool",
     {"teacher_logits": torch.ones(B, T, V, dtype=torch.bool)}),
    (ValueError, re.escape("student_logits must have shape (..., V) with V > 0, got (2, 3, 0)"),
     {"student_logits": torch.zeros(B, T, 0)}),
    (ValueError, re.escape("student_logits must have shape (..., V) with V > 0, got ()"),
     {"student_logits": torch.tensor(1.0)}),
    (ValueError, re.escape("teacher_logits must have shape (..., V) with V > 0, got (2, 3, 0)"),
     {"teacher_logits": torch.zeros(B, T, 0)}),
    (ValueError, "teacher_logits is on meta, but the logits or log-probs are on cpu",
     {"teacher_logits": torch.zeros(B, T, V, device="meta")}),
    (ValueError, re.escape("teacher_logits requires grad but gets no gradient here: pass teacher_logits.detach()"),
     {"teacher_logits": torch.randn(B, T, V, requires_grad=True)}),
    (TypeError, "mask must be a torch.Tensor, got list", {"mask": [[1, 1, 1]] * 2}),
    (TypeError, "mask must be boolean, integer or floating, got torch.complex64",
     {"mask": per_token(dtype=torch.complex64)}),
    (ValueError, "mask " + SHAPE_BT, {"mask": per_token(T, B)}),
    (ValueError, "mask is on meta, but", {"mask": torch.ones(B, T, device="meta")}),
    (ValueError, "mask requires grad", {"mask": per_token(requires_grad=True)}),
    (TypeError, "temperature must be a number, got str", {"temperature": "hot"}),
    (TypeError, "temperature must be a floating tensor, got torch.int64",
     {"temperature": per_token(dtype=torch.int64)}),
    *((ValueError, "temperature must be finite and > 0, got", {"temperature": t})
      for t in (0, 0.0, -1.0, math.inf, math.nan)),
    *((ValueError, "temperature must be finite and > 0, got .* for an unmasked token",
       {"temperature": torch.tensor([1.0, t])}) for t in (0.0, -1.0, math.inf, math.nan)),
    *((ValueError, "temperature must be finite and > 0, got .* for an unmasked token", {"temperature": torch.tensor(t)})
      for t in (0.0, math.nan)),
    (ValueError, "temperature must have shape .* got " + re.escape("(2, 1); use temperature.squeeze(-1)"),
     {"temperature": torch.ones(B, 1)}),
    (ValueError, "temperature must have shape .* got " + re.escape("(3,)"), {"temperature": torch.ones(T)}),
    (ValueError, "temperature requires grad", {"temperature": torch.ones(B, requires_grad=True)}),
    (ValueError, "temperature is on meta, but", {"temperature": torch.ones(B, device="meta")}),
]  # fmt: skip
LOSS = [
    (ValueError, re.escape("teacher_logits must have the student logits' shape (2, 3, 7), got (2, 3, 8)"),
     {"teacher_logits": torch.randn(B, T, V + 1)}),
    (ValueError, re.escape("teacher_logits must have the student logits' shape (2, 3, 7), got (1, 2, 3, 7)"),
     {"teacher_logits": torch.randn(1, B, T, V)}),
    (ValueError, re.escape("teacher_logits must have the student logits' shape (2, 3, 7), got (3, 7)"),
     {"teacher_logits": torch.randn(T, V)}),
    # numbers
    *((ValueError, re.escape("beta must be in (0, 1), got"), {"divergence": "jsd", "beta": beta})
      for beta in (0, 0.0, 1.0, 1, -0.1, 1.1, math.nan)),
    (TypeError, "beta must be a number, got str", {"divergence": "jsd", "beta": "0.5"}),
    (TypeError, "beta must be a number, got bool", {"divergence": "jsd", "beta": True}),
    (TypeError, "beta must be a number, got NoneType", {"beta": None}),
    *((ValueError, "token_clip must be > 0, got", {"token_clip": clip})
      for clip in (0, 0.0, -0.05, math.nan)),
    (TypeError, "token_clip must be a number, got str", {"token_clip": "0.05"}),
    (TypeError, "token_clip must be a number, got bool", {"token_clip": True}),
    (TypeError, "token_clip must be a number, got Tensor", {"token_clip": torch.tensor(0.05)}),
    (ValueError, "top_k must be >= 0, got -1", {"top_k": -1}),
    (TypeError, "top_k must be an integer, got float", {"top_k": 2.0}),
    (TypeError, "top_k must be an integer, got bool", {"top_k": True}),
    (TypeError, "top_k must be an integer, got Tensor", {"top_k": torch.tensor(2)}),
    # words and flags
    (ValueError, "divergence must be one of 'forward_kl', 'reverse_kl', 'jsd', got 'kl'", {"divergence": "kl"}),
    (ValueError, "divergence must be one of .* got None", {"divergence": None}),
    (ValueError, "top_k_from must be one of 'student', 'teacher', got 'both'", {"top_k": 2, "top_k_from": "both"}),
    (ValueError, "top_k_from must be one of 'student', 'teacher', got 'both'", {"top_k_from": "both"}),
    (TypeError, "tail must be a bool, got int", {"top_k": 2, "tail": 1}),
    (TypeError, "tail must be a bool, got NoneType", {"tail": None}),
    (TypeError, "inplace must be a bool, got int", {"inplace": 1}),
    (ValueError, "inplace=True needs student_logits whose tokens do not overlap",
     {"inplace": True, "student_logits": torch.randn(1, T, V).expand(B, T, V)}),
    # the reduction
    (ValueError, "reduction must be one of 'token-mean', .* got 'mean'", {"reduction": "mean"}),
    (ValueError, "reduction must be one of 'token-mean', .* got 'batchmean'", {"reduction": "batchmean"}),
    (ValueError, "normalizer has nothing to divide with reduction='none'", {"reduction": "none", "normalizer": 3}),
    *((ValueError, "normalizer must be finite and > 0, got", {"normalizer": n}) for n in (0, -1.0, math.nan, math.inf)),
    (ValueError, re.escape("normalizer must be a number or a 0-dim tensor, got shape (1,)"),
     {"normalizer": torch.ones(1)}),
    (TypeError, "normalizer must be a number, got str", {"normalizer": "3"}),
    (ValueError, "normalizer is on meta, but", {"normalizer": torch.ones((), device="meta")}),
    (ValueError, "token_weight " + SHAPE_BT, {"token_weight": per_token(T, B)}),
    (TypeError, "token_weight must be a floating tensor, got torch.int64",
     {"token_weight": per_token(dtype=torch.int64)}),
    (TypeError, "token_weight must be a torch.Tensor, got float", {"token_weight": 0.5}),
    (ValueError, "token_weight requires grad", {"token_weight": per_token(requires_grad=True)}),
    # packed sequences
    (ValueError, re.escape("cu_seqlens needs packed tokens of shape (N,), got tokens of shape (2, 3)"),
     {"cu_seqlens": cu_seqlens(0, 6)}),
    (ValueError, "reduction='seq-mean-token-mean' needs sequences", {**PACKED, "reduction": "seq-mean-token-mean"}),
    (ValueError, "reduction='seq-mean-token-sum' needs sequences", {**PACKED, "reduction": "seq-mean-token-sum"}),
    (TypeError, "cu_seqlens must be int32 or int64, got torch.float32",
     {**PACKED, "cu_seqlens": cu_seqlens(0, 6, dtype=torch.float32)}),
    (ValueError, re.escape("cu_seqlens must have shape (S + 1,), got (1, 2)"),
     {**PACKED, "cu_seqlens": cu_seqlens([0, 6])}),
    *((ValueError, "cu_seqlens must go from 0 to 6 without decreasing", {**PACKED, "cu_seqlens": cu_seqlens(*ends)})
      for ends in ((0, 5), (1, 6), (0, 4, 2, 6), (0, 7))),
    (ValueError, re.escape("temperature must have shape (6,) (per token) or (2,) (per sequence), got (3,)"),
     {**PACKED, "cu_seqlens": cu_seqlens(0, 2, 6), "temperature": torch.ones(3)}),
]  # fmt: skip
DECOMPOSITION = [
    *((ValueError, re.escape(f"teacher_logits must have shape (R, ..., V) with R >= 1 for student logits of shape "
                             f"(2, 3, 7), got {shape}"), {"teacher_logits": torch.randn(shape)})
      for shape in ((B, T, V), (4, B, T, V + 1), (4, T, B, V), (0, B, T, V), (1, 4, B, T, V), (T, V))),
]  # fmt: skip


def arguments(samples=None, **changes):
    shape = (B, T, V) if samples is None else (samples, B, T, V)
    return {"student_logits": torch.randn(B, T, V), "teacher_logits": torch.randn(shape), **changes}


def named(messages):
    return {"argvalues": messages, "ids": [m[1][:60] for m in messages]}


@pytest.mark.parametrize(("error", "message", "changes"), **named(SHARED + LOSS))
def test_opsd_loss_names_what_is_wrong(error, message, changes):
    with pytest.raises(error, match=message):
        opsd_loss(**arguments(**changes))


@pytest.mark.parametrize(("error", "message", "changes"), **named(SHARED + DECOMPOSITION))
def test_opsd_decomposition_names_what_is_wrong(error, message, changes):
    with pytest.raises(error, match=message):
        opsd_decomposition(**arguments(4, **changes))


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_bad_temperature_of_masked_tokens_is_not_read(top_k):
    mask, each = torch.ones(B, T), torch.ones(B, T)
    mask[1], each[1, 2] = 0, 0.0
    for temperature in (each, torch.tensor([1.0, 0.0])):
        opsd_loss(**arguments(), mask=mask, temperature=temperature, top_k=top_k)
        opsd_decomposition(**arguments(2), mask=mask, temperature=temperature)
    for bad in (0.0, -1.0, math.nan, math.inf):
        for temperature in (torch.tensor([bad, 1.0]), torch.tensor(bad)):
            with pytest.raises(ValueError, match="temperature must be finite and > 0, got"):
                opsd_loss(**arguments(), mask=mask, temperature=temperature, top_k=top_k)
            with pytest.raises(ValueError, match="temperature must be finite and > 0, got"):
                opsd_decomposition(**arguments(2), mask=mask, temperature=temperature)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_beta_is_the_jsd_s_alone(divergence):
    given = arguments()
    expected = opsd_loss(**given, divergence=divergence).loss
    for beta in (0, 1, 0.3, -2.0):
        assert torch.equal(opsd_loss(**given, divergence=divergence, beta=beta).loss, expected)


def test_an_unknown_option_is_refused():
    for function, given in ((opsd_loss, arguments()), (opsd_decomposition, arguments(2))):
        with pytest.raises(TypeError, match="unexpected keyword argument 'label_smoothing'"):
            function(**given, label_smoothing=0.1)
        with pytest.raises(TypeError, match="positional argument"):
            function(*given.values(), "jsd")
    with pytest.raises(TypeError, match=r"OPSDLoss\(\) got an unexpected keyword argument 'label_smoothing'"):
        OPSDLoss(label_smoothing=0.1)


def test_constants_may_require_grad_where_no_gradient_is_asked_for():
    for function, given in ((opsd_loss, arguments()), (opsd_decomposition, arguments(2))):
        expected = function(**given)[0]
        given["teacher_logits"].requires_grad_()
        with torch.no_grad():
            assert torch.equal(function(**given)[0], expected)
