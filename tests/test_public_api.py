import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import no_kernel

import sdkernels

pytestmark = no_kernel
ROOT = Path(__file__).parent.parent
# SPEC's signatures
SIGNATURES = {
    "token_log_prob": "(logits, token_ids, temperature=1.0, *, top_k=None, top_p=None, min_p=None, support=None, "
    "mask=None, cu_seqlens=None, group=None, vocab_start=None)",
    "rlsd_token_advantage": "(student_logits, teacher, token_ids, advantages, *, clip_range=0.2, lam=1.0, "
    "temperature=1.0, mask=None, credit_mask=None, apply_to='all', pessimistic=False, cu_seqlens=None, group=None, "
    "vocab_start=None)",
    "evidence_weighted_advantage": "(student_log_prob, teacher_log_prob, advantages, *, clip_range=0.2, lam=1.0, "
    "mask=None, credit_mask=None, apply_to='all', pessimistic=False, cu_seqlens=None)",
    "rlsd_loss": "(student_logits, teacher, token_ids, advantages, old_log_prob=None, *, clip_range=0.2, lam=1.0, "
    "apply_to='all', pessimistic=False, credit_mask=None, evidence_from='current', epsilon_low=0.2, epsilon_high=0.2, "
    "dual_clip=None, reference_log_prob=None, beta=0.0, temperature=1.0, mask=None, token_weight=None, "
    "reduction='token-mean', normalizer=None, cu_seqlens=None, inplace=False, group=None, vocab_start=None)",
    "grpo_loss": "(logits, token_ids, advantages, old_log_prob=None, *, epsilon_low=0.2, epsilon_high=0.2, "
    "dual_clip=None, reference_log_prob=None, beta=0.0, temperature=1.0, mask=None, token_weight=None, "
    "reduction='token-mean', normalizer=None, cu_seqlens=None, inplace=False, group=None, vocab_start=None)",
    "truncated_log_softmax": "(logits, temperature=1.0, *, top_k=None, top_p=None, min_p=None, dtype=None, group=None, "
    "vocab_start=None)",
    "truncated_support": "(logits, temperature=1.0, *, top_k=None, top_p=None, min_p=None, max_size, mask=None)",
    "save_support": "(path, support)",
    "load_support": "(path, rows=None)",
    "ssd_decomposition": "(student_logits, base, temperature, *, top_k=None, top_p=None, min_p=None, mask=None, "
    "group=None, vocab_start=None)",
    "ssd_loss": "(student_logits, base, temperature, *, top_k=None, top_p=None, min_p=None, weights=(1.0, 1.0, 1.0), "
    "mask=None, token_weight=None, reduction='token-mean', normalizer=None, cu_seqlens=None, inplace=False, "
    "group=None, vocab_start=None)",
    "opsd_loss": "(student_logits, teacher_logits, *, divergence='forward_kl', beta=0.5, temperature=1.0, top_k=None, "
    "top_k_from='student', tail=True, token_clip=None, mask=None, token_weight=None, reduction='token-mean', "
    "normalizer=None, cu_seqlens=None, inplace=False, group=None, vocab_start=None)",
    "opsd_decomposition": "(student_logits, teacher_logits, *, temperature=1.0, mask=None, group=None, "
    "vocab_start=None)",
    "linear_token_log_prob": "(hidden, lm_head_weight, token_ids, temperature=1.0, *, top_k=None, top_p=None, "
    "min_p=None, support=None, mask=None, cu_seqlens=None, bias=None, softcap=None, logit_scale=1.0, "
    "chunk_size=None, group=None, vocab_start=None)",
    "linear_grpo_loss": "(hidden, lm_head_weight, token_ids, advantages, old_log_prob=None, *, epsilon_low=0.2, "
    "epsilon_high=0.2, dual_clip=None, reference_log_prob=None, beta=0.0, temperature=1.0, mask=None, "
    "token_weight=None, reduction='token-mean', normalizer=None, cu_seqlens=None, bias=None, softcap=None, "
    "logit_scale=1.0, chunk_size=None, group=None, vocab_start=None)",
    "linear_rlsd_loss": "(student_hidden, teacher, lm_head_weight, token_ids, advantages, old_log_prob=None, *, "
    "clip_range=0.2, lam=1.0, apply_to='all', pessimistic=False, credit_mask=None, evidence_from='current', "
    "epsilon_low=0.2, epsilon_high=0.2, dual_clip=None, reference_log_prob=None, beta=0.0, temperature=1.0, "
    "mask=None, token_weight=None, reduction='token-mean', normalizer=None, cu_seqlens=None, bias=None, "
    "teacher_lm_head_weight=None, teacher_bias=None, softcap=None, logit_scale=1.0, chunk_size=None, group=None, "
    "vocab_start=None)",
    "linear_rlsd_token_advantage": "(student_hidden, teacher, lm_head_weight, token_ids, advantages, *, "
    "clip_range=0.2, lam=1.0, temperature=1.0, mask=None, credit_mask=None, apply_to='all', pessimistic=False, "
    "cu_seqlens=None, bias=None, teacher_lm_head_weight=None, teacher_bias=None, softcap=None, logit_scale=1.0, "
    "chunk_size=None, group=None, vocab_start=None)",
    "linear_ssd_loss": "(student_hidden, base, lm_head_weight, temperature, *, top_k=None, top_p=None, min_p=None, "
    "weights=(1.0, 1.0, 1.0), mask=None, token_weight=None, reduction='token-mean', normalizer=None, "
    "cu_seqlens=None, bias=None, base_lm_head_weight=None, base_bias=None, softcap=None, logit_scale=1.0, "
    "chunk_size=None, group=None, vocab_start=None)",
    "linear_opsd_loss": "(student_hidden, teacher_hidden, lm_head_weight, *, divergence='forward_kl', beta=0.5, "
    "temperature=1.0, top_k=None, top_k_from='student', tail=True, token_clip=None, mask=None, token_weight=None, "
    "reduction='token-mean', normalizer=None, cu_seqlens=None, bias=None, teacher_lm_head_weight=None, "
    "teacher_bias=None, softcap=None, logit_scale=1.0, chunk_size=None, group=None, vocab_start=None)",
    "linear_truncated_support": "(hidden, lm_head_weight, temperature=1.0, *, top_k=None, top_p=None, min_p=None, "
    "max_size, mask=None, bias=None, softcap=None, logit_scale=1.0, chunk_size=None)",
    "effective_temperature": "(train_temperature, eval_temperature)",
    "lambda_schedule": "(step, *, peak=0.5, warmup_steps=0, decay_steps=0)",
    "rlsd_metrics": "(output, mask=None, *, clip_range=0.2, epsilon_low=0.2, epsilon_high=0.2)",
}
RESULTS = {
    "TokenLogProb": ("log_prob", "entropy"),
    "EvidenceAdvantage": ("advantage", "weight", "information_gain"),
    "RLSDAdvantage": ("advantage", "weight", "information_gain", "student_log_prob", "teacher_log_prob",
                      "student_entropy", "teacher_entropy"),
    "RLSDOutput": ("loss", "advantage", "weight", "information_gain", "student_log_prob", "teacher_log_prob",
                   "student_entropy", "teacher_entropy", "ratio"),
    "GRPOOutput": ("loss", "log_prob", "entropy", "ratio"),
    "Support": ("token_ids", "log_probs", "size", "temperature"),
    "SSDTerms": ("support_compression", "within_support_reshaping", "base_alignment", "constant", "cross_entropy",
                 "kept_mass", "support_size"),
    "SSDOutput": ("loss", "terms"),
    "OPSDOutput": ("loss", "divergence"),
    "OPSDTerms": ("total", "marginal_kl", "mutual_information"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_contract_s(name):
    found = inspect.signature(getattr(sdkernels, name)).parameters
    scope = {}
    exec(f"def promised{SIGNATURES[name]}: ...", scope)
    promised = inspect.signature(scope["promised"]).parameters
    assert [(p.name, p.kind, p.default) for p in found.values()] == [
        (p.name, p.kind, p.default) for p in promised.values()
    ]


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_named_tuples_with_the_contract_s_fields(name):
    assert getattr(sdkernels, name)._fields == RESULTS[name]


def test_all_lists_what_the_package_defines_and_nothing_else():
    assert sdkernels.__all__ == sorted(set(sdkernels.__all__))
    public = {
        name
        for name, value in vars(sdkernels).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith("sdkernels")
    }
    assert set(sdkernels.__all__) == public
    assert {*SIGNATURES, *RESULTS} <= public


def test_the_version_is_pyproject_s():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = settings["tool"]["setuptools"]["dynamic"]["version"]
    assert (settings["project"]["dynamic"], declared) == (["version"], {"attr": "sdkernels.__version__"})
    assert importlib.metadata.version("sdkernels") == sdkernels.__version__


def python(code):
    return subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout.split()  # fmt: skip


def test_importing_has_no_side_effects():
    found = python(
        "import os, sys, torch\n"
        "before = dict(os.environ), torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()\n"
        "import sdkernels\n"
        "hosts = ('transformers', 'trl', 'verl', 'swift', 'accelerate', 'liger_kernel', 'torch._inductor.compile_fx')\n"
        "print(*(name for name in hosts if name in sys.modules))\n"
        "after = dict(os.environ), torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()\n"
        "same = before[0] == after[0] and torch.equal(before[1], after[1]) and before[2:] == after[2:]\n"
        "print('same' if same else 'changed', 'cuda' if torch.cuda.is_initialized() else 'untouched')\n"
    )
    assert found == ["same", "untouched"]


def test_everything_works_without_triton():
    found = python(
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import sdkernels\n"
        "x = torch.zeros(2, 3, 5, requires_grad=True)\n"
        "ids = torch.zeros(2, 3, dtype=torch.int64)\n"
        "sdkernels.rlsd_loss(x, x.detach(), ids, torch.ones(2)).loss.backward()\n"
        "print(sdkernels.rlsd_token_advantage(x, x.detach(), ids, torch.ones(2)).weight.sum().item())\n"
        "print(round(x.grad[0, 0, 0].item() * 6, 6))\n"
    )
    assert found == ["6.0", "-0.8"]


def test_a_torch_without_process_groups_is_enough():
    found = python(
        "import sys, torch\n"
        "sys.modules['torch.distributed.distributed_c10d'] = None\n"
        "import sdkernels\n"
        "x, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)\n"
        "print(sdkernels.linear_grpo_loss(x, weight, torch.ones(2, 3).long(), torch.ones(2)).loss.item())\n"
    )
    assert found == ["-1.0"]


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_are_the_functions_with_options(inplace):
    logits, teacher = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
    token_ids, advantages, old = torch.randint(11, (2, 3)), torch.tensor([1.0, -1.0]), -torch.rand(2, 3) * 4
    options = dict(epsilon_high=0.28, reduction="sum", normalizer=5, inplace=inplace)
    grpo, rlsd = sdkernels.GRPOLoss(**options), sdkernels.RLSDLoss(lam=0.5, clip_range=(0.1, 0.3), **options)
    assert torch.equal(grpo(logits, token_ids, advantages, old).loss,
                       sdkernels.grpo_loss(logits, token_ids, advantages, old, **options).loss)  # fmt: skip
    arguments = (logits, teacher, token_ids, advantages, old)
    assert torch.equal(rlsd(*arguments).loss,
                       sdkernels.rlsd_loss(*arguments, lam=0.5, clip_range=(0.1, 0.3), **options).loss)  # fmt: skip
    assert torch.equal(rlsd(*arguments, lam=0.0).loss, grpo(logits, token_ids, advantages, old).loss)
    assert not torch.equal(rlsd(*arguments).loss, rlsd(*arguments, lam=0.0).loss)
    for module in (grpo, rlsd):
        assert isinstance(module, torch.nn.Module)
        assert not module.state_dict()
        assert "epsilon_high=0.28" in repr(module)
