"""Every message a user can see, raised before any kernel starts."""

import math
import re

import pytest
import torch

import sdkernels
from sdkernels import (
    evidence_weighted_advantage,
    grpo_loss,
    lambda_schedule,
    rlsd_loss,
    rlsd_metrics,
    rlsd_token_advantage,
    token_log_prob,
)

B, T, V = 2, 3, 7
PACKED = {
    "student_logits": torch.randn(B * T, V),
    "teacher": torch.randn(B * T, V),
    "token_ids": torch.zeros(B * T, dtype=torch.int64),
    "advantages": torch.ones(B * T),
}


def cu_seqlens(*ends, dtype=torch.int32):
    return torch.tensor(ends, dtype=dtype)


def arguments(**changes):
    found = {
        "student_logits": torch.randn(B, T, V),
        "teacher": torch.randn(B, T, V),
        "token_ids": torch.zeros(B, T, dtype=torch.int64),
        "advantages": torch.ones(B),
    }
    return {**found, **changes}


def per_token(*shape, **options):
    return torch.ones(*(shape or (B, T)), **options)


SHAPE_BT = re.escape("must have one value per token, shape (2, 3), got (3, 2)")
MESSAGES = [
    # what is not a tensor, or of another dtype
    (TypeError, "student_logits must be a torch.Tensor, got list", {"student_logits": [1.0]}),
    (TypeError, "teacher must be a torch.Tensor, got NoneType", {"teacher": None}),
    (TypeError, "token_ids must be a torch.Tensor, got int", {"token_ids": 3}),
    (TypeError, "advantages must be a torch.Tensor, got float", {"advantages": 1.0}),
    (TypeError, "mask must be a torch.Tensor, got list", {"mask": [[1, 1, 1]] * 2}),
    (TypeError, "student_logits must be float64, float32, bfloat16 or float16, got torch.int64",
     {"student_logits": torch.ones(B, T, V, dtype=torch.int64)}),
    (TypeError, "token_ids must be int32 or int64, got torch.float32", {"token_ids": per_token()}),
    (TypeError, "token_ids must be int32 or int64, got torch.bool", {"token_ids": per_token(dtype=torch.bool)}),
    (TypeError, "advantages must be a floating tensor, got torch.int64",
     {"advantages": torch.ones(B, dtype=torch.int64)}),
    (TypeError, "teacher must be a floating tensor, got torch.int64", {"teacher": per_token(dtype=torch.int64)}),
    (TypeError, "temperature must be a floating tensor, got torch.int64",
     {"temperature": per_token(dtype=torch.int64)}),
    (TypeError, "mask must be boolean, integer or floating, got torch.complex64",
     {"mask": per_token(dtype=torch.complex64)}),
    # shapes
    (ValueError, re.escape("student_logits must have shape (..., V) with V > 0, got (2, 3, 0)"),
     {"student_logits": torch.zeros(B, T, 0)}),
    (ValueError, re.escape("student_logits must have shape (..., V) with V > 0, got ()"),
     {"student_logits": torch.tensor(1.0)}),
    (ValueError, "teacher must be logits of the student's shape .* got " + re.escape("(2, 3, 8)"),
     {"teacher": torch.randn(B, T, V + 1)}),
    (ValueError, "token_ids " + SHAPE_BT, {"token_ids": torch.zeros(T, B, dtype=torch.int64)}),
    (ValueError, "mask " + SHAPE_BT, {"mask": per_token(T, B)}),
    (ValueError, "credit_mask " + SHAPE_BT, {"credit_mask": per_token(T, B)}),
    (ValueError, "old_log_prob " + SHAPE_BT, {"old_log_prob": per_token(T, B)}),
    (ValueError, "reference_log_prob " + SHAPE_BT, {"reference_log_prob": per_token(T, B)}),
    (ValueError, "token_weight " + SHAPE_BT, {"token_weight": per_token(T, B)}),
    (ValueError, re.escape("advantages must have shape (2, 3) (per token) or (2,) (per sequence), got (3,)"),
     {"advantages": torch.ones(T)}),
    (ValueError, re.escape("advantages must have shape (2, 3) (per token) or (2,) (per sequence), got (2, 1); use "
                           "advantages.squeeze(-1) for one value per sequence, advantages.expand((2, 3)) for one per"),
     {"advantages": torch.ones(B, 1)}),
    (ValueError, "temperature must have shape .* got " + re.escape("(2, 1); use temperature.squeeze(-1)"),
     {"temperature": torch.ones(B, 1)}),
    # devices
    (ValueError, "token_ids is on meta, but the logits or log-probs are on cpu",
     {"token_ids": torch.zeros(B, T, dtype=torch.int64, device="meta")}),
    (ValueError, "teacher is on meta, but", {"teacher": torch.zeros(B, T, V, device="meta")}),
    (ValueError, "mask is on meta, but", {"mask": torch.ones(B, T, device="meta")}),
    (ValueError, "normalizer is on meta, but", {"normalizer": torch.ones((), device="meta")}),
    # constants that expect a gradient
    *((ValueError, f"{name} requires grad but gets no gradient here: pass {name}.detach\\(\\)",
       {name: torch.ones(*shape, requires_grad=True)})
      for name, shape in (("teacher", (B, T, V)), ("advantages", (B,)), ("old_log_prob", (B, T)),
                          ("token_weight", (B, T)), ("reference_log_prob", (B, T)), ("temperature", (B,)))),
    # numbers
    *((ValueError, "temperature must be finite and > 0, got", {"temperature": t})
      for t in (0, 0.0, -1.0, math.inf, math.nan)),
    *((ValueError, "temperature must be finite and > 0, got .* for an unmasked token",
       {"temperature": torch.tensor([1.0, t])}) for t in (0.0, -1.0, math.inf, math.nan)),
    (TypeError, "temperature must be a number, got str", {"temperature": "hot"}),
    *((ValueError, re.escape("lam must be in [0, 1], got"), {"lam": lam}) for lam in (-0.1, 1.1, math.nan)),
    *((ValueError, f"{name} must be >= 0, got", {name: bad})
      for name in ("clip_range", "epsilon_low", "epsilon_high", "beta") for bad in (-0.1, math.nan)),
    (ValueError, "clip_range must be >= 0, got -1", {"clip_range": (0.2, -1)}),
    (ValueError, re.escape("clip_range must be a number or a pair (below, above), got (0.1, 0.2, 0.3)"),
     {"clip_range": (0.1, 0.2, 0.3)}),
    *((TypeError, re.escape("clip_range must be a number or a pair (below, above), got ") + kind, {"clip_range": bad})
      for kind, bad in (("str", "0.2"), ("NoneType", None), ("Tensor", torch.tensor(0.2)), ("bool", True))),
    (TypeError, "clip_range must be a number, got NoneType", {"clip_range": (0.1, None)}),
    *((ValueError, "dual_clip must be > 1, got", {"dual_clip": c}) for c in (1.0, 0.5, -3.0, math.nan)),
    *((ValueError, "normalizer must be finite and > 0, got", {"normalizer": n}) for n in (0, -1.0, math.nan, math.inf)),
    *((ValueError, f"normalizer must be finite and > 0, or 0 where no token is kept, got {n}",
       {"normalizer": torch.tensor(n)}) for n in (-1, -0.5, math.nan, math.inf)),
    (ValueError, re.escape("normalizer must be a number or a 0-dim tensor, got shape (1,)"),
     {"normalizer": torch.ones(1)}),
    # words and flags
    (ValueError, "reduction must be one of 'token-mean', .* got 'mean'", {"reduction": "mean"}),
    (ValueError, "apply_to must be one of 'all', 'negative', 'positive', got 'both'", {"apply_to": "both"}),
    (ValueError, "evidence_from must be one of 'current', 'old', got 'new'", {"evidence_from": "new"}),
    (TypeError, "pessimistic must be a bool, got int", {"pessimistic": 1}),
    (TypeError, "inplace must be a bool, got NoneType", {"inplace": None}),
    # combinations
    (ValueError, "beta=0.1 needs reference_log_prob, got None", {"beta": 0.1}),
    (ValueError, "normalizer has nothing to divide with reduction='none'", {"reduction": "none", "normalizer": 3}),
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
    (ValueError, re.escape("advantages must have shape (6,) (per token) or (2,) (per sequence), got (3,)"),
     {**PACKED, "cu_seqlens": cu_seqlens(0, 2, 6), "advantages": torch.ones(3)}),
    (ValueError, "normalizer requires grad", {"normalizer": torch.ones((), requires_grad=True)}),
    # inplace
    (ValueError, "inplace=True needs student_logits with an adjacent vocabulary",
     {"inplace": True, "student_logits": torch.randn(B, V, T).transpose(1, 2)}),
    (ValueError, "inplace=True needs student_logits .* at most three leading",
     {"inplace": True, "student_logits": torch.randn(1, 1, B, T, V), "teacher": torch.randn(1, 1, B, T, V),
      "token_ids": torch.zeros(1, 1, B, T, dtype=torch.int64), "advantages": torch.ones(1, 1, B)}),
    (ValueError, "inplace=True needs student_logits whose tokens do not overlap",
     {"inplace": True, "student_logits": torch.randn(1, T, V).expand(B, T, V)}),
    (ValueError, "inplace=True needs student_logits whose tokens do not overlap",
     {"inplace": True, "student_logits": torch.randn(60).as_strided((B, T, V), (20, V - 1, 1))}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), MESSAGES, ids=[m[1][:60] for m in MESSAGES])
def test_rlsd_loss_names_what_is_wrong(error, message, changes):
    with pytest.raises(error, match=message):
        rlsd_loss(**arguments(**changes))


ALL = {
    "token_log_prob": lambda x, **o: token_log_prob(x["student_logits"], x["token_ids"], **o),
    "grpo_loss": lambda x, **o: grpo_loss(x["student_logits"], x["token_ids"], x["advantages"], **o),
    "rlsd_loss": lambda x, **o: rlsd_loss(**x, **o),
    "rlsd_token_advantage": lambda x, **o: rlsd_token_advantage(**x, **o),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_an_id_outside_the_vocabulary_is_an_index_error(name, dtype):
    for bad in (V, -1, -101, 2**31, -(2**40)):
        x = arguments(student_logits=torch.randn(B, T, V, dtype=dtype))
        x["token_ids"][1, 2] = bad
        with pytest.raises(
            IndexError, match=rf"token_ids must be in \[0, {V}\), or -100 for a masked token, got {bad}"
        ):
            ALL[name](x)
        mask = torch.ones(B, T)
        mask[1, 2] = 0
        ALL[name](x, mask=mask)


@pytest.mark.parametrize("name", ALL)
def test_a_bad_temperature_of_masked_tokens_is_not_read(name):
    mask, per_token_temperature = torch.ones(B, T), torch.ones(B, T)
    mask[1], per_token_temperature[1, 2] = 0, 0.0
    ALL[name](arguments(), mask=mask, temperature=per_token_temperature)
    ALL[name](arguments(), mask=mask, temperature=torch.tensor([1.0, 0.0]))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be finite and > 0, got"):
            ALL[name](arguments(), mask=mask, temperature=torch.tensor([bad, 1.0]))
        with pytest.raises(ValueError, match="temperature must be finite and > 0, got"):
            ALL[name](arguments(), mask=mask, temperature=torch.tensor(bad))


@pytest.mark.parametrize("name", ALL)
def test_shared_arguments_are_checked_everywhere(name):
    shared = [
        (TypeError, "_?logits must be float64", {"student_logits": torch.ones(B, T, V, dtype=torch.int32)}, {}),
        (ValueError, "_?logits must have shape", {"student_logits": torch.ones(B, T, 0)}, {}),
        (TypeError, "token_ids must be int32 or int64", {"token_ids": torch.zeros(B, T)}, {}),
        (
            ValueError,
            "token_ids must have one value per token",
            {"token_ids": torch.zeros(B, 1, dtype=torch.int64)},
            {},
        ),
        (ValueError, "mask must have one value per token", {}, {"mask": torch.ones(B)}),
        (ValueError, "temperature must be finite and > 0", {}, {"temperature": -1.0}),
        (ValueError, "temperature requires grad", {}, {"temperature": torch.ones(B, requires_grad=True)}),
        (ValueError, "cu_seqlens needs packed tokens", {}, {"cu_seqlens": cu_seqlens(0, 6)}),
    ]
    if name != "token_log_prob":
        shared += [
            (ValueError, r"advantages must have shape .* got \(2, 1\); use", {"advantages": torch.ones(B, 1)}, {}),
            (ValueError, "advantages requires grad", {"advantages": torch.ones(B, requires_grad=True)}, {}),
        ]
    for error, message, changes, options in shared:
        with pytest.raises(error, match=message):
            ALL[name](arguments(**changes), **options)


def test_evidence_weighted_advantage_names_what_is_wrong():
    x = -torch.rand(B, T)
    for error, message, changed, options in [
        (TypeError, "student_log_prob must be a torch.Tensor", ([1.0], x, x), {}),
        (TypeError, "student_log_prob must be a floating tensor", (x.long(), x, x), {}),
        (TypeError, "teacher_log_prob must be a floating tensor", (x, x.long(), x), {}),
        (ValueError, "teacher_log_prob must have one value per token", (x, x[:1], x), {}),
        (ValueError, "teacher_log_prob requires grad", (x, x.clone().requires_grad_(), x), {}),
        (ValueError, "advantages must have shape .*; use", (x, x, x[:, :1]), {}),
        (ValueError, "advantages requires grad", (x, x, torch.ones(B, requires_grad=True)), {}),
        (ValueError, "mask must have one value per token", (x, x, x), {"mask": x[0]}),
        (ValueError, "credit_mask must have one value per token", (x, x, x), {"credit_mask": x[0]}),
        (ValueError, "clip_range must be >= 0", (x, x, x), {"clip_range": -0.2}),
        (ValueError, "lam must be in", (x, x, x), {"lam": 2}),
        (ValueError, "apply_to must be one of", (x, x, x), {"apply_to": "none"}),
        (ValueError, "cu_seqlens needs packed tokens", (x, x, x), {"cu_seqlens": cu_seqlens(0, 6)}),
    ]:
        with pytest.raises(error, match=message):
            evidence_weighted_advantage(*changed, **options)


def test_a_normalizer_of_0_is_for_a_batch_without_a_kept_token():
    zero = torch.zeros(())
    assert rlsd_loss(**arguments(), mask=torch.zeros(B, T), reduction="sum", normalizer=zero).loss == 0


def test_one_token_per_sequence_needs_no_hint():
    logits, token_ids = torch.randn(B, 1, V), torch.zeros(B, 1, dtype=torch.int64)
    per_token_loss = grpo_loss(logits, token_ids, torch.tensor([[1.0], [-2.0]])).loss
    assert torch.equal(per_token_loss, grpo_loss(logits, token_ids, torch.tensor([1.0, -2.0])).loss)


def test_constants_may_require_grad_where_no_gradient_is_asked_for():
    x = arguments(advantages=torch.ones(B, requires_grad=True), teacher=torch.randn(B, T, V, requires_grad=True))
    with torch.no_grad():
        quiet = rlsd_loss(**x)
    x = {name: value.detach() for name, value in x.items()}
    assert torch.equal(quiet.loss, rlsd_loss(**x).loss)


def test_the_schedule_and_the_metrics_check_their_arguments():
    for message, options in [
        ("step must be >= 0", {"step": -1}),
        ("warmup_steps must be >= 0", {"warmup_steps": -1}),
        ("decay_steps must be >= 0", {"decay_steps": -1}),
        ("peak must be in", {"peak": 1.5}),
    ]:
        with pytest.raises(ValueError, match=message):
            lambda_schedule(**{"step": 0, **options})
    output = rlsd_loss(**arguments())
    with pytest.raises(ValueError, match="clip_range must be >= 0"):
        rlsd_metrics(output, clip_range=-1.0)
    with pytest.raises(ValueError, match="mask must have one value per token"):
        rlsd_metrics(output, torch.ones(T, B))
    for other in (output.loss, rlsd_token_advantage(**arguments()), None):
        with pytest.raises(
            TypeError, match=f"output must be an RLSDOutput or a GRPOOutput, got {type(other).__name__}"
        ):
            rlsd_metrics(other)


def test_an_unknown_option_is_refused():
    for name in ("token_log_prob", "grpo_loss", "rlsd_loss", "rlsd_token_advantage"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'label_smoothing'"):
            ALL[name](arguments(), label_smoothing=0.1)
    for module, given in ((sdkernels.GRPOLoss, ()), (sdkernels.RLSDLoss, ()), (sdkernels.SSDLoss, (0.8,))):
        with pytest.raises(TypeError, match=r"Loss\(\) got an unexpected keyword argument 'label_smoothing'"):
            module(*given, label_smoothing=0.1)
    for module, tensor in ((sdkernels.GRPOLoss, "logits"), (sdkernels.GRPOLoss, "old_log_prob"),
                           (sdkernels.RLSDLoss, "teacher"), (sdkernels.OPSDLoss, "teacher_logits")):  # fmt: skip
        with pytest.raises(TypeError, match=rf"Loss\(\) got an unexpected keyword argument '{tensor}'"):
            module(**{tensor: torch.ones(B, T)})
    with pytest.raises(TypeError, match=r"SSDLoss\(\) got an unexpected keyword argument 'base'"):
        sdkernels.SSDLoss(0.8, base=torch.ones(B, T, V))
