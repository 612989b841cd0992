"""The verl integration, on verl's own losses, its FSDP2 engine, under torchrun and under Ray."""

import os
from functools import partial

import oracles
import pytest
import torch
from closeness import EAGER_FACTOR, assert_log_probs, assert_same_bits, assert_within, epsilon
from conftest import INTERPRETED
from hypothesis import given
from hypothesis import strategies as st

os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_cpu"
if INTERPRETED:
    pytest.skip("says nothing of a kernel", allow_module_level=True)
pytest.importorskip("verl")

import tiny
from verl.models.transformers import monkey_patch
from verl.trainer.distillation import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.experimental import torch_functional
from verl.workers.config import DistillationConfig, DistillationLossConfig, PolicyLossConfig
from verl.workers.utils import padding
from verl.workers.utils.losses import ppo_loss
from verl_cases import BATCH_TOKENS, DP_SIZE, PROMPTS, RESPONSES, RLSD, ROWS, micro_batch, rlsd, run, verl_config
from verl_worker import CLIPS, TEMPERATURE, actor_config, python

from sdkernels.integrations.verl import FusedLinear, RLSDLossConfig, _hooks

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

# ---- the loss, of log-probs ----


@given(
    seed=st.integers(0, 2**31),
    jagged=st.booleans(),
    loss_agg_mode=st.sampled_from(AGGREGATIONS),
    clips=st.sampled_from([CLIPS, {"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": None}]),
    entropy_coeff=st.sampled_from([0, 0.01]),
    kl=st.sampled_from([{}, *({"use_kl_loss": True, "kl_loss_type": x} for x in ("low_var_kl", "k1", "k2"))]),
    without=st.sampled_from([(), ("rollout_is_weights",)]),
)
def test_with_lam_0_it_is_verls_ppo_loss(seed, jagged, loss_agg_mode, clips, entropy_coeff, kl, without):
    config = actor_config(loss_agg_mode=loss_agg_mode, entropy_coeff=entropy_coeff, **clips, **kl)
    leaves, data = micro_batch(seed, jagged, without)
    host, host_gradients, host_metrics = run(partial(ppo_loss, config=config), leaves, data)
    ours, gradients, metrics = run(rlsd(config, lam=0.0), leaves, data)
    assert_within(ours, host.double(), 1e-6 * host.abs() + 1e-6)
    for mine, theirs in zip(gradients, host_gradients, strict=True):
        assert_within(mine, theirs.double(), 1e-6 * theirs.abs().max() + 1e-12)
    for name in ("actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"):
        assert metrics[name].aggregate() == pytest.approx(host_metrics[name].aggregate(), abs=1e-6)


OPTIONS = [{}, {"evidence_from": "old"}, {"apply_to": "negative"}, {"pessimistic": True},
           {"clip_range": [0.1, 0.4], "lam": 1.0}]  # fmt: skip


@pytest.mark.parametrize("jagged", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_lam_it_is_the_formula(options, jagged):
    options = {"lam": 0.5, "clip_range": 0.2, "evidence_from": "current"} | options
    leaves, data = micro_batch(0, jagged, without=("rollout_is_weights",))
    found, (gradient, _), metrics = run(rlsd(**options), leaves, data)
    weighing = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}
    source, below = weighing.pop("evidence_from"), 0.1 if isinstance(options["clip_range"], list) else 0.2
    rows = micro_batch(0)[1]
    rows = {name: [x.double() for x in rows[name].unbind()] for name in ("old_log_probs", "advantages",
            "response_mask")} | {"teacher": rows["teacher_logprobs"].values().double()[:, 0]}  # fmt: skip
    total, truth, below_clip = 0.0, torch.zeros_like(gradient, dtype=torch.float64), []
    start = 0
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        places = slice(start + prompt - 1, start + prompt + response - 1)  # log-probs stand before their tokens
        start += prompt + response
        new, old, mask = leaves[0].detach().double()[places], rows["old_log_probs"][i], rows["response_mask"][i]
        evidence = oracles.evidence(old if source == "old" else new, rows["teacher"][places], rows["advantages"][i],
                                    **weighing)  # fmt: skip
        value, slope, _ = oracles.surrogate(new, old, evidence.advantage, 0.2, 0.28, 2.0)
        total += (value * mask).sum() * DP_SIZE / BATCH_TOKENS
        truth[places] = slope * mask * DP_SIZE / BATCH_TOKENS
        below_clip.append((evidence.weight < 1 - below)[mask != 0])
    assert_within(found, total, 1e-5 * total.abs() + 1e-6)
    assert_within(gradient, truth, 1e-5 * truth.abs().max())
    share = torch.cat(below_clip).double().mean().item()
    assert metrics["rlsd/evidence_clipped_below"].aggregate() == pytest.approx(share, abs=1e-6)
    assert 0 < share < 1
    assert metrics["rlsd/lam"].aggregate() == options["lam"]


def test_the_teacher_moves_sizes_never_signs():
    leaves, data = micro_batch(4, without=("rollout_is_weights",))
    (plain, _), (weighed, _) = (run(rlsd(lam=lam), leaves, data)[1] for lam in (0.0, 1.0))
    assert (plain * weighed >= 0).all()
    assert (plain - weighed).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize("kind", ["number", "list", "tensor"])
def test_lam_follows_verls_global_steps(kind):
    assert (RLSDLossConfig().lam, RLSDLossConfig().warmup_steps, RLSDLossConfig().decay_steps) == (
        0.5,
        0,
        50,
    )  # the paper's
    options = RLSDLossConfig(lam=0.5, warmup_steps=2, decay_steps=4)
    x = torch.zeros(ROWS)
    for step, lam in [(1, 0.0), (2, 0.25), (3, 0.5), (5, 0.25), (9, 0.0)]:
        rows = {"list": {"global_steps": [step] * ROWS}, "tensor": {"global_steps": torch.full((ROWS,), step)}}
        data = tu.get_tensordict({"x": x} | rows.get(kind, {}), {"global_steps": step} if kind == "number" else {})
        assert options.lam_at(data) == pytest.approx(lam)
    with pytest.raises(ValueError, match=r"warmup_steps and decay_steps need `global_steps` in the batch"):
        options.lam_at(tu.get_tensordict({"x": x}))
    for stays in (RLSDLossConfig(lam=0.0), RLSDLossConfig(lam=0.3, decay_steps=0)):
        assert stays.lam_at(tu.get_tensordict({"x": x})) == stays.lam


# ---- options that cannot work ----


@pytest.mark.parametrize(("options", "message"), [
    ({"use_task_rewards": True}, "use_task_rewards must be False for RLSD, got True: .* PPO loss once more"),
    ({"use_policy_gradient": True}, "use_policy_gradient must be False for RLSD"),
    ({"loss_mode": "k3"}, "loss_mode must be 'rlsd' for RLSD, got 'k3'"),
    ({"loss_max_clamp": 10.0}, "loss_max_clamp must be None for RLSD, got 10.0"),
    ({"log_prob_min_clamp": -10.0}, "log_prob_min_clamp must be None for RLSD"),
    ({"distillation_loss_coef": 0.5}, "distillation_loss_coef must be 1.0 for RLSD, got 0.5"),
    ({"clip_ratio_high": 0.28}, "clip_ratio_high must be 0.2 for RLSD, got 0.28: set actor.clip_ratio_high"),
    ({"lam": 1.5}, r"lam must be in \[0, 1\], got 1.5"),
    ({"clip_range": [0.1]}, "clip_range must be a number or a pair"),
    ({"apply_to": "some"}, "apply_to must be one of 'all', 'negative', 'positive', got 'some'"),
    ({"evidence_from": "new"}, "evidence_from must be one of 'current', 'old', got 'new'"),
    ({"decay_steps": -1}, "decay_steps must be >= 0, got -1"),
    ({"privileged_template": "{prompt}"}, "the template must hold {prompt} and {privileged}"),
], ids=lambda x: str(x)[:40] if isinstance(x, dict) else "")  # fmt: skip
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RLSDLossConfig(**options)


def test_what_the_loss_cannot_do_it_refuses():
    leaves, data = micro_batch(0)
    plain = DistillationLossConfig(loss_mode="rlsd", use_task_rewards=False, use_policy_gradient=False)
    distillation = DistillationConfig(distillation_loss=plain)
    with pytest.raises(TypeError, match=r"_target_=sdkernels.integrations.verl.RLSDLossConfig, got a Distillation"):
        run(partial(distillation_ppo_loss, config=actor_config(), distillation_config=distillation), leaves, data)
    config = actor_config(policy_loss=PolicyLossConfig(loss_mode="gspo"))
    with pytest.raises(ValueError, match=r"actor.policy_loss.loss_mode must be 'vanilla' for RLSD, got 'gspo'"):
        run(rlsd(config), leaves, data)
    with pytest.raises(ValueError, match=r"actor.clip_ratio_c must be > 1, got 1.0"):
        run(rlsd(actor_config(clip_ratio_c=1.0)), leaves, data)


def test_the_command_line_reaches_the_loss():
    prefix = "+distillation.distillation_loss."
    config = verl_config(*RLSD, prefix + "lam=0.3", prefix + "clip_range=[0.1,0.3]", prefix + "decay_steps=40")
    loss = omega_conf_to_dataclass(config.distillation).distillation_loss
    assert isinstance(loss, RLSDLossConfig)
    assert (loss.lam, list(loss.clip_range), loss.decay_steps) == (0.3, [0.1, 0.3], 40)
    with pytest.raises(Exception, match="use_task_rewards must be False for RLSD"):
        omega_conf_to_dataclass(verl_config(*RLSD[:2]).distillation)
    with pytest.raises(Exception, match="lamb"):
        omega_conf_to_dataclass(verl_config(*RLSD, prefix + "lamb=0.3").distillation)


# ---- the plugin ----

PLUGIN = """
import sys
import sdkernels
hosts = {"verl", "ray", "transformers", "tensordict"} & set(sys.modules)
assert not hosts, hosts
import verl
from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
from verl.utils.experimental.torch_functional import FusedLinearForPPO
assert "rlsd" in DISTILLATION_LOSS_REGISTRY
assert FusedLinearForPPO(impl_backend="sdkernels").impl_backend == "sdkernels"
assert "sdkernels.integrations.verl.trainer" not in sys.modules
"""


def test_importing_verl_is_enough_and_sdkernels_imports_no_host():
    python("-c", PLUGIN, VERL_USE_EXTERNAL_MODULES="")


def test_another_verl_is_refused_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(padding, "no_padding_2_padding", lambda tensor, batch: tensor)
    line = (
        "verl 0.9.1 has verl.workers.utils.padding.no_padding_2_padding(tensor, batch), not (tensor, data); "
        "sdkernels was tested with verl 0.9.1"
    )
    with pytest.raises(ImportError) as raised, _hooks.logged():
        _hooks.check()
    assert str(raised.value) == line
    assert f"verl runs without sdkernels: ImportError: {line}" in caplog.messages  # verl drops what a plugin raises


FAILING = """
from sdkernels.integrations import hosts
check_host = hosts.check_host
def of_transformers(distribution, *arguments):
    if distribution == "transformers":
        raise {error}("transformers is another")
    check_host(distribution, *arguments)
hosts.check_host = of_transformers
import verl
"""


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_whatever_the_plugin_raises_is_logged(error):
    said = python("-c", FAILING.format(error=error), VERL_USE_EXTERNAL_MODULES="")
    assert f"verl runs without sdkernels: {error}: transformers is another" in said


# ---- the fused head ----


@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_is_as_good_as_verls(shape, dtype):
    hidden = (torch.randn(*shape, 16) * 2).to(dtype).requires_grad_()
    weight = torch.randn(50, 16).to(dtype).requires_grad_()
    ids = torch.randint(50, shape)
    upstream = [torch.randn(shape), torch.randn(shape)]
    results = {}
    for backend in ("torch", "sdkernels"):
        head = torch_functional.FusedLinearForPPO(chunk_size=5, impl_backend=backend)
        assert isinstance(head, FusedLinear)
        log_prob, entropy = head(hidden, weight, ids, TEMPERATURE)
        assert log_prob.shape == entropy.shape == shape
        value = (log_prob * upstream[0] + entropy.float() * upstream[1]).sum()
        results[backend] = (log_prob, entropy, *torch.autograd.grad(value, (hidden, weight)))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    log_p = torch.log_softmax(exact[0] @ exact[1].T / TEMPERATURE, -1)
    truth = [log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)]
    value = (truth[0] * upstream[0] + truth[1] * upstream[1]).sum()
    truth += torch.autograd.grad(value, exact)
    for name, ours, verls, exactly in zip(("log_prob", "entropy", "hidden", "weight"), results["sdkernels"],
                                          results["torch"], truth, strict=True):  # fmt: skip
        error, floor = ((x.double() - exactly).norm() for x in (ours, verls))
        assert error <= EAGER_FACTOR * floor + 4 * epsilon(torch.float32) * exactly.norm(), name
    assert_log_probs(results["sdkernels"][0], truth[0].detach())


def test_other_backends_stay_verls():
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: other"):
        torch_functional.FusedLinearForPPO(impl_backend="other")
    assert torch_functional.FusedLinearForPPO().impl_backend == "torch"
    hidden, weight, ids = torch.randn(4, 8), torch.randn(9, 8), torch.randint(9, (4,))
    ours = torch_functional.FusedLinearForPPO()(hidden, weight, ids)
    theirs = torch_functional.FusedLinearForPPOFunction.apply(hidden, weight, ids, 1.0, 512)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_bits(mine, other)


@pytest.mark.parametrize("named", ["softcap", "bias"])
def test_a_head_that_verl_would_compute_wrongly_is_refused(named, tmp_path):
    from transformers import AutoModelForCausalLM

    class Model(AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path)).__class__):
        pass  # verl patches the class

    model = Model.from_pretrained(tmp_path)
    if named == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    else:
        model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=f"verl's fused forward drops the {named} of Model's LM head"):
        monkey_patch.patch_forward_with_backends(model, True, "sdkernels")
    monkey_patch.patch_forward_with_backends(model, False, "sdkernels")
    assert "_verl_fused_kernels_backend" not in vars(model)
