"""docs/recipes.md: every block runs, and its loss and gradient are those of the formula under its heading."""

import ast
import re
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from conftest import no_kernel

pytestmark = no_kernel
PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
SECTIONS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            for name, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)}  # fmt: skip
(SET_UP,) = SECTIONS.pop("Set-up")
F64 = torch.float64
TOLERANCE = {torch.float32: 2e-6, F64: 1e-12}
SDPO = "trl.experimental.sdpo.loss_utils"
TRUTHS, TRL = {}, {}  # heading -> the loss of float64 inputs, typed anew here or computed by TRL


def truth(heading):
    return lambda function: TRUTHS.setdefault(heading, function)


def inputs_of_the_page():
    names = {}
    exec(compile(SET_UP, "set-up", "exec"), names)
    return names


def harder_inputs():
    """In float64: clips that bind, a rollout without a kept token, NaN wherever a masked token might be read."""
    torch.set_default_dtype(F64)
    try:
        names = inputs_of_the_page()
    finally:
        torch.set_default_dtype(torch.float32)
    z = names["old_logits"] + 1.5 * torch.randn_like(names["old_logits"])
    z[::2] += 3 * torch.nn.functional.one_hot(names["token_ids"][::2], names["V"])  # half of the ratios above 1
    names["student_logits"] = z
    names["mask"][2] = 0
    for name in ("student_logits", "teacher_logits", "contrast_logits", "rollout_log_prob"):
        names[name][names["mask"] == 0] = torch.nan
    for name in ("old_log_prob", "teacher_log_prob"):
        names[name][names["mask"] == 0] = 0
    z.requires_grad_()
    return names


INPUTS = {"page": inputs_of_the_page, "harder": harder_inputs}


def run(code, names):
    """The loss and the student's gradient of a recipe, which gets the set-up's names and no other's."""
    assert "loss" not in names
    student = names["student_logits"]
    exec(compile(code, "recipe", "exec"), names)
    return names["loss"].detach(), *torch.autograd.grad(names["loss"], student)


def expected(function, names):
    """The same by `function`, of the inputs in float64."""
    floats = {k: x for k, x in names.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    b = SimpleNamespace(**names | {k: x.detach().to(F64).nan_to_num(0) for k, x in floats.items()})
    b.keep, b.A, b.z = b.mask > 0, b.advantages.unsqueeze(-1), b.student_logits.requires_grad_()
    b.token_log_prob = chosen(b.z, b.token_ids)
    b.old_log_prob = torch.where(b.keep, chosen(b.old_logits, b.token_ids), 0)
    loss = function(b)
    return loss.detach(), *torch.autograd.grad(loss, b.z)


def far(found, wanted):
    """How many tolerances the loss and the worst row of the gradient are off."""
    scales = max(1, wanted[0].abs()), wanted[1].norm(dim=-1).max()
    assert scales[1] > 1e-4, "these inputs have no gradient to compare"
    errors = (found[0] - wanted[0]).abs(), (found[1] - wanted[1]).norm(dim=-1).max()
    return max(error / (TOLERANCE[found[1].dtype] * scale) for error, scale in zip(errors, scales, strict=True))


def test_every_recipe_has_a_truth_and_every_truth_a_recipe():
    assert list(SECTIONS) == list(TRUTHS)
    assert all(len(blocks) == 1 for blocks in SECTIONS.values())
    assert TRL.keys() < SECTIONS.keys()


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("heading", SECTIONS)
def test_a_recipe_is_its_formula(heading, inputs, device):
    with torch.device(device):
        names = INPUTS[inputs]()
        found = run(SECTIONS[heading][0], names)
        assert not found[1][names["mask"] == 0].any()
        assert far(found, expected(TRUTHS[heading], names)) < 1


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_recipe_with_another_number_is_not(heading):
    """So that the page cannot drift: each decimal and each k of a recipe matters to what the test above compares."""
    numbers = lambda tree: (  # noqa: E731
        [x for x in ast.walk(tree) if isinstance(x, ast.Constant) and isinstance(x.value, float)]
        + [x.value for x in ast.walk(tree) if isinstance(x, ast.keyword) and x.arg == "top_k"]
    )
    for place in range(len(numbers(ast.parse(SECTIONS[heading][0])))):
        tree = ast.parse(SECTIONS[heading][0])
        number = numbers(tree)[place]
        number.value = number.value * 0.7 if isinstance(number.value, float) else number.value + 1
        changes = []
        for inputs in INPUTS.values():
            names = inputs()
            found = run(tree, names)
            changes.append(far(found, expected(TRUTHS[heading], names)))
        assert max(changes) > 10, f"{heading} does not depend on {ast.unparse(number)}"


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("heading", TRL)
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_a_recipe_is_what_trl_computes(heading, inputs):
    pytest.importorskip("trl")
    names = INPUTS[inputs]()
    found = run(SECTIONS[heading][0], names)
    assert far(found, expected(TRL[heading], names)) < 1


def log_softmax(z, temperature=1.0):
    z = z / temperature
    return z - z.logsumexp(-1, keepdim=True)


def chosen(z, token_ids, temperature=1.0):
    return log_softmax(z, temperature).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def mean(x, keep):
    return torch.where(keep, x, 0).sum() / keep.sum()


def ppo(b, advantages, low=0.2, high=0.2):
    ratio = (b.token_log_prob - b.old_log_prob).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def with_tail(log_p, ids):
    """The listed tokens and, as one more, all others."""
    inside = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, ids, True)
    rest = log_p.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((log_p.gather(-1, ids), rest), -1)


@truth("On-policy distillation (OPD)")
def _(b):
    gain = chosen(b.teacher_logits, b.token_ids) - b.old_log_prob
    return -mean((b.token_log_prob - b.old_log_prob).exp() * gain, b.keep)


@truth("OPSD")
def _(b):
    log_s, log_t = log_softmax(b.z, 1.1), log_softmax(b.teacher_logits, 1.1)
    each = torch.minimum(log_t.exp() * (log_t - log_s), torch.tensor(0.05, dtype=F64)).sum(-1)
    return (torch.where(b.keep, each, 0).sum(-1) / b.keep.sum(-1).clamp(min=1)).mean()


@truth("SDPO")
def _(b):
    ids = b.z.detach().topk(100).indices
    log_s, log_t = with_tail(log_softmax(b.z), ids), with_tail(log_softmax(b.teacher_logits), ids)
    log_m = (0.5 * log_s.exp() + 0.5 * log_t.exp()).log()
    weight = (b.token_log_prob.detach() - b.old_log_prob).exp().clamp(max=2)
    return mean(weight * (0.5 * kl(log_s, log_m) + 0.5 * kl(log_t, log_m)), b.keep)


@truth("GKD")
def _(b):
    log_s, log_t = (log_softmax(x[:, :-1], 0.9) for x in (b.z, b.teacher_logits))
    log_m = (0.7 * log_s.exp() + 0.3 * log_t.exp()).log()
    return mean(0.7 * kl(log_s, log_m) + 0.3 * kl(log_t, log_m), b.keep[:, 1:])


TRUTHS["GRPO + OPSD"] = lambda b: mean(
    ppo(b, b.A) + 0.1 * kl(log_softmax(b.teacher_logits), log_softmax(b.z)), b.keep)  # fmt: skip


def on_top_1(b, logits):
    best = logits.detach().argmax(-1, keepdim=True)
    s, t = (log_softmax(x).gather(-1, best).squeeze(-1).exp() for x in (b.z, b.teacher_logits))
    return mean(t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log(), b.keep)


TRUTHS["Teacher-top-1"] = lambda b: on_top_1(b, b.teacher_logits)
TRUTHS["Student-top-1"] = lambda b: on_top_1(b, b.z)


@truth("RLRT")
def _(b):
    weight = (b.old_log_prob - chosen(b.teacher_logits, b.token_ids)).exp().clamp(0.5, 1.5)
    right = b.rewards.unsqueeze(-1) == 1
    return mean(ppo(b, torch.where(right, b.A * (0.5 + 0.5 * weight), b.A)), b.keep)


@truth("SDAR")
def _(b):
    gap = chosen(b.teacher_logits, b.token_ids) - b.token_log_prob
    gate = (1 / (1 + (-5 * gap).exp())).detach()
    return mean(ppo(b, b.A) + 0.01 * gate * gap, b.keep)


@truth("CEPO")
def _(b):
    gain = chosen(b.teacher_logits, b.token_ids) - chosen(b.contrast_logits, b.token_ids)
    lam = 0.5 * (1 - 10 / 25)
    weight = torch.where(b.A == 0, 1, (b.A.sign() * gain).exp()).clamp(0.8, 1.2)
    return mean(ppo(b, b.A * (1 - lam + lam * weight)), b.keep)


@truth("GSPO")
def _(b):
    total = torch.where(b.keep, b.token_log_prob - b.old_log_prob, 0).sum(-1)
    some = b.keep.any(-1)
    s, advantages = (total[some] / b.keep[some].sum(-1)).exp(), b.advantages[some]
    return -torch.minimum(s * advantages, s.clamp(1 - 0.0003, 1 + 0.0004) * advantages).sum() / b.B


@truth("CISPO")
def _(b):
    weight = (b.token_log_prob - b.old_log_prob).exp().clamp(max=5).detach()
    return -mean(weight * b.A * b.token_log_prob, b.keep)


def informative(b):
    groups = b.rewards.view(-1, b.G)
    return b.keep & (groups.amax(-1) != groups.amin(-1)).repeat_interleave(b.G).unsqueeze(-1)


TRUTHS["DAPO"] = lambda b: mean(ppo(b, b.A, 0.2, 0.28), informative(b))


@truth("Dr. GRPO")
def _(b):
    groups = b.rewards.view(-1, b.G)
    centred = groups - groups.sum(-1, keepdim=True) / b.G
    return torch.where(b.keep, ppo(b, centred.reshape(-1, 1)), 0).sum() / (b.B * 16)


TRUTHS["Truncated importance sampling"] = lambda b: mean(
    ppo(b, b.A) * (b.old_log_prob - b.rollout_log_prob).exp().clamp(max=2), b.keep)  # fmt: skip


@truth("Truncated rollouts")
def _(b):
    ordered, order = (b.old_logits / 0.8).sort(-1, descending=True)
    p = ordered[..., :20].softmax(-1)
    kept = torch.zeros_like(b.z).scatter(-1, order[..., :20], (p.cumsum(-1) - p < 0.9).to(F64)) > 0
    kept = kept | torch.zeros_like(kept).scatter(-1, b.sampled.unsqueeze(-1), True)
    b.token_log_prob = chosen(b.z.masked_fill(~kept, -torch.inf), b.sampled, 0.8)
    b.old_log_prob = chosen(b.old_logits.masked_fill(~kept, -torch.inf), b.sampled, 0.8)
    return mean(ppo(b, b.A), b.keep)


@truth("Top-entropy tokens")
def _(b):
    log_p = log_softmax(b.z.detach())
    entropy = -(log_p.exp() * log_p).sum(-1)
    top = b.keep & (entropy >= entropy[b.keep].quantile(0.8))
    return torch.where(top, ppo(b, b.A), 0).sum() / b.keep.sum()


TRUTHS["Padded vocabularies"] = lambda b: mean(kl(log_softmax(b.teacher_logits), log_softmax(b.z)), b.keep)


@truth("Shifted ids")
def _(b):
    b.old_log_prob = b.token_log_prob = chosen(b.z[:, :-1], b.token_ids[:, 1:])
    b.old_log_prob = b.old_log_prob.detach()
    return mean(ppo(b, b.A), b.keep[:, 1:])


def trl_grpo(b, mask=None, advantages=None, **settings):
    """GRPOTrainer._compute_loss on these log-probs, entropies and advantages."""
    from trl import GRPOTrainer

    mask = (b.keep if mask is None else mask).to(F64)
    log_p = log_softmax(b.z)
    statistics = b.token_log_prob, -(log_p.exp() * log_p).sum(-1).detach(), None
    same = lambda x, **options: x  # noqa: E731
    trainer = SimpleNamespace(**dict(
        loss_type="bnpo", importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, beta=0.0,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, max_completion_length=16,
        use_vllm=False, vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, args=SimpleNamespace(delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same, pad_across_processes=same),
        model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: statistics,
    ) | settings)  # fmt: skip
    trainer.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    batch = dict(
        prompt_ids=b.token_ids, prompt_mask=mask, completion_ids=b.token_ids, completion_mask=mask,
        advantages=b.advantages if advantages is None else advantages, old_per_token_logps=b.old_log_prob,
        importance_sampling_ratio=(b.old_log_prob - b.rollout_log_prob).exp().clamp(max=2.0),
        num_items_in_batch=mask.sum(),
    )  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, batch)


def trl_gkd(student, teacher, keep, **options):
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student, teacher, labels=torch.where(keep, 0, -100), **options)


def trl_forward_kl(b):
    return trl_gkd(b.z, b.teacher_logits, b.keep, beta=0)


def trl_top_k(student, teacher, k, alpha):
    options = dict(distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=True)
    return import_module(SDPO).compute_topk_self_distillation_loss(student, teacher, **options)


TRL["SDPO"] = lambda b: mean(import_module(SDPO).apply_importance_sampling_clipping(
    trl_top_k(b.z, b.teacher_logits, 100, 0.5), b.token_log_prob, b.old_log_prob, 2.0), b.keep)  # fmt: skip
TRL["GKD"] = lambda b: trl_gkd(b.z[:, :-1], b.teacher_logits[:, :-1], b.keep[:, 1:], beta=0.3, temperature=0.9)
TRL["GRPO + OPSD"] = lambda b: trl_grpo(b) + 0.1 * trl_forward_kl(b)
TRL["Teacher-top-1"] = lambda b: mean(trl_top_k(b.teacher_logits, b.z, 1, 1.0), b.keep)  # KL(first || second)
TRL["Student-top-1"] = lambda b: mean(trl_top_k(b.z, b.teacher_logits, 1, 0.0), b.keep)
TRL["GSPO"] = lambda b: trl_grpo(
    b, loss_type="grpo", importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)  # fmt: skip
TRL["CISPO"] = lambda b: trl_grpo(b, loss_type="cispo", epsilon_high=5.0)
TRL["DAPO"] = lambda b: trl_grpo(b, informative(b), loss_type="dapo", epsilon_high=0.28)
TRL["Dr. GRPO"] = lambda b: trl_grpo(b, loss_type="dr_grpo", advantages=b.centred.view(-1))
TRL["Truncated importance sampling"] = lambda b: trl_grpo(b, use_vllm=True)
TRL["Top-entropy tokens"] = lambda b: trl_grpo(b, top_entropy_quantile=0.2)
TRL["Padded vocabularies"] = trl_forward_kl
