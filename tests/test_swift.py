"""ms-swift's GRPO and RLSD with sdkernels' log-probs: against its own, and against a dense computation."""

import importlib
import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import no_kernel

pytest.importorskip("swift.rlhf_trainers")  # of ms-swift; another package has the name, but not this

import oracles
import swift_runs
from accelerate.utils import extract_model_from_parallel
from closeness import LOG_PROB_BOUND, assert_within
from peft import LoraConfig, get_peft_model
from ranks import results_of
from swift.rl_core.advantage import apply_rlsd_reweight
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.utils import import_external_file
from swift.utils.logger import warning_set
from tiny import SIZES, save_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from sdkernels import evidence_weighted_advantage
from sdkernels.integrations import swift

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).resolve().parents[1]
PLUGIN = Path(swift.__file__).with_name("sdkernels_plugin.py")
GUIDE = (ROOT / "docs" / "swift.md").read_text()
SAME = 1e-5  # of two float32 computations in other orders
HEAD = "_get_logps_via_local_forward"
SEQUENCES, KEEP = 3, 5


def trainer(**changes):
    """What the methods use of a GRPOTrainer."""
    return SimpleNamespace(**{
        "accelerator": SimpleNamespace(unwrap_model=extract_model_from_parallel), "temperature": 0.7,
        "model_kwarg_keys": {"use_cache", "logits_to_keep"}, "template": SimpleNamespace(padding_free=False),
        "args": SimpleNamespace(torch_compile=False),
    } | changes)  # fmt: skip


@pytest.fixture
def tiny_model(tmp_path):
    """A model of a family in float32."""

    def made(family="qwen3", **changes):
        auto = AutoModelForImageTextToText if family == "qwen3_vl" else AutoModelForCausalLM
        return auto.from_pretrained(save_model(tmp_path / family, family, **changes), dtype=torch.float32)

    return made


def batch(vocab=100, count=SEQUENCES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, vocab, (count, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(12) >= torch.arange(count)[:, None]).long()}


def results(method, model, inputs, using=None, keep=KEEP):
    """Log-probs, entropies and the gradients of a weighted sum of both."""
    model.zero_grad()
    log_prob, entropy = method(using or trainer(), model, dict(inputs), keep, inputs["input_ids"], compute_entropy=True)
    weights = torch.randn(2, *log_prob.shape, generator=torch.Generator().manual_seed(1))
    (weights * torch.stack([log_prob, entropy])).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return SimpleNamespace(log_prob=log_prob.detach(), entropy=entropy.detach(), gradients=gradients)


def assert_same(found, expected, tolerance=SAME):
    assert_within(found.log_prob, expected.log_prob, LOG_PROB_BOUND, "log_prob")
    assert_within(found.entropy, expected.entropy, LOG_PROB_BOUND, "entropy")
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name].double() - gradient.double()).norm()
        assert error <= tolerance * gradient.norm() + 1e-12, f"{name}: {error / gradient.norm():.2g}"


@pytest.fixture
def counted(monkeypatch):
    """The calls of linear_token_log_prob."""
    calls = []
    function = swift.linear_token_log_prob
    monkeypatch.setattr(swift, "linear_token_log_prob", lambda *a, **k: calls.append(a) or function(*a, **k))
    return calls


def frozen_head(model):
    model.lm_head.requires_grad_(False)
    return model


def lora(model, **options):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return adapted


def biased(model):
    model.lm_head.bias = nn.Parameter(torch.randn(model.lm_head.out_features))
    return model


@pytest.mark.parametrize(("family", "change"), [
    ("qwen3", lambda model: model),
    ("qwen3", frozen_head),
    ("qwen3", lora),
    ("qwen3", biased),
    ("llama", lambda model: model),
    ("qwen3_moe", lambda model: model),
], ids=["qwen3", "frozen head", "LoRA", "bias", "llama", "MoE"])  # fmt: skip
def test_the_hosts_log_probs_entropies_and_gradients(tiny_model, counted, family, change):
    model, inputs = change(tiny_model(family)), batch()
    assert_same(results(swift.get_logps_via_local_forward, model, inputs), results(swift.host_forward, model, inputs))
    assert len(counted) == 1
    assert counted[0][0].shape == (SEQUENCES, KEEP, SIZES["hidden_size"])  # nothing of the prompt


def test_a_tied_head_and_a_model_without_logits_to_keep(tiny_model):
    model, using = tiny_model(tie_word_embeddings=True), trainer(model_kwarg_keys=set())
    ours = results(swift.get_logps_via_local_forward, model, batch(), using)
    assert_same(ours, results(swift.host_forward, model, batch(), using))


def test_padding_free(tiny_model):
    model, using = tiny_model(), trainer(template=SimpleNamespace(padding_free=True))
    lengths = (4, 7, 5)
    inputs = {
        "input_ids": torch.randint(8, 100, (1, sum(lengths))),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    ours = results(swift.get_logps_via_local_forward, model, inputs, using, keep=14)
    assert ours.log_prob.shape == (1, 14)
    assert_same(ours, results(swift.host_forward, model, inputs, using, keep=14))


def test_no_entropies_unless_asked(tiny_model):
    model, inputs = tiny_model(), batch()
    found = swift.get_logps_via_local_forward(trainer(), model, inputs, KEEP, inputs["input_ids"])
    assert found[1] is None
    assert "logits_to_keep" not in inputs  # the caller's stay as they are


def test_a_multimodal_template_embeds_in_front_of_the_forward(tiny_model, counted):
    """As ms-swift's templates do: the hook hands on the arguments that it knows, and drops all others."""
    model, inputs = tiny_model("qwen3_vl"), batch()

    def pre_forward_hook(module, arguments, named):
        embeds = module.get_input_embeddings()(named["input_ids"])
        return arguments, {"inputs_embeds": embeds} | {k: named[k] for k in ("attention_mask", "logits_to_keep")}

    model.register_forward_pre_hook(pre_forward_hook, with_kwargs=True)
    using = trainer(model_kwarg_keys={"logits_to_keep"})
    ours = results(swift.get_logps_via_local_forward, model, inputs, using)
    assert_same(ours, results(swift.host_forward, model, inputs, using))
    assert len(counted) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_models_have_log_probs_of_float32_logits(tiny_model, autocast):
    model, inputs = tiny_model(), batch()
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        ours, _ = swift.get_logps_via_local_forward(trainer(), model, inputs, KEEP, inputs["input_ids"])
        host, _ = swift.host_forward(trainer(), model, dict(inputs), KEEP, inputs["input_ids"])
        hidden = model.model(**inputs).last_hidden_state[:, -KEEP - 1 : -1].bfloat16().double()
    logits = hidden @ model.lm_head.weight.bfloat16().double().T / 0.7
    truth = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -KEEP:, None])[..., 0]
    assert_within(ours, truth, LOG_PROB_BOUND)
    assert (host - truth).abs().max() > 1e-3


def handed_over(model, message, using=None):
    """The host's own bits, and one warning that says why."""
    inputs = batch()
    warning_set.clear()
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swift.logger, "warning", said.append)
        for _ in range(2):
            found = results(swift.get_logps_via_local_forward, model, inputs, using)
    expected = results(swift.host_forward, model, inputs, using)
    assert torch.equal(found.log_prob, expected.log_prob)
    assert torch.equal(found.entropy, expected.entropy)
    assert all(torch.equal(found.gradients[name], gradient) for name, gradient in expected.gradients.items())
    (line,) = said
    assert line.startswith("sdkernels leaves log-probs to ms-swift, which makes logits: ")
    assert re.search(message, line)
    assert "\n" not in line


def test_what_cannot_be_served_goes_to_the_host_with_a_warning(tiny_model, counted):
    handed_over(lora(tiny_model(), modules_to_save=["lm_head"]), "LoRA's target_modules")
    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["lm_head"]))
    handed_over(adapted, "LoRA's target_modules")
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    handed_over(model, "caps or scales")
    model = tiny_model()
    model.config.logits_scaling = 8.0
    handed_over(model, "caps or scales")
    model = tiny_model()
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    handed_over(model, "device_map")
    handed_over(tiny_model(), "torch_compile", trainer(args=SimpleNamespace(torch_compile=True)))
    assert not counted


def test_sequence_parallel_goes_to_the_host_with_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(swift.logger, "warning", said.append)
    monkeypatch.setattr(swift, "host_sequence_parallel", lambda *arguments, **named: (arguments, named))
    warning_set.clear()
    method = GRPOTrainer._get_logps_via_sp
    assert [method(1, 2, compute_entropy=3) for _ in range(2)] == [((1, 2), {"compute_entropy": 3})] * 2
    assert len(said) == 1
    assert "sequence_parallel_size" in said[0]


@pytest.mark.parametrize(("times", "scale", "message"), [
    (1, 0.5, "changes what its LM head gives"),
    (2, 1.0, "called its LM head 2 times"),
    (0, 1.0, "called its LM head 0 times"),
])  # fmt: skip
def test_a_forward_that_does_other_things_with_its_head_is_an_error(tiny_model, times, scale, message):
    model = tiny_model()

    def forward(input_ids, **named):
        hidden = model.model(input_ids).last_hidden_state
        logits = [model.lm_head(hidden) for _ in range(times)] or [hidden]
        return SimpleNamespace(logits=scale * logits[0])

    model.forward = forward
    inputs = batch()
    with pytest.raises(RuntimeError, match=f"cannot serve Qwen3ForCausalLM: its forward {message}"):
        swift.get_logps_via_local_forward(trainer(), model, inputs, KEEP, inputs["input_ids"])
    assert "forward" not in vars(model.lm_head)  # put back all the same


def wrapped_results(rank, directory):
    """Of DDP, of FSDP2, and of FSDP2 that rounds its outputs, each rank with its own sequences."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    inputs, found = batch(count=2, seed=rank), []
    for kind in ("DDP", "FSDP2", "FSDP2, rounding"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if kind == "DDP":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16 if "rounding" in kind else None)
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh, mp_policy=policy)
        got = results(swift.get_logps_via_local_forward, wrapped, inputs)
        whole = {name.removeprefix("module."): gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                 for name, gradient in got.gradients.items()}  # fmt: skip
        found.append({"log_prob": got.log_prob, "entropy": got.entropy, "gradients": whole})
    return found


def test_two_ranks_of_ddp_and_fsdp2(tmp_path, tiny_model):
    model = tiny_model()
    alone = [results(swift.host_forward, model, batch(count=2, seed=rank)) for rank in range(2)]
    mean = {name: sum(one.gradients[name] for one in alone) / 2 for name in alone[0].gradients}
    for rank, kinds in enumerate(results_of(wrapped_results, 2, str(tmp_path / "qwen3"))):
        for kind, tolerance in zip(kinds, (SAME, SAME, 1e-2), strict=True):  # the gradient of rounding is rounded
            expected = SimpleNamespace(log_prob=alone[rank].log_prob, entropy=alone[rank].entropy, gradients=mean)
            assert_same(SimpleNamespace(**kind), expected, tolerance)


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_hosts_rlsd_weights_are_ours(lam, negative_only):
    student, teacher = torch.randn(2, 6, 9) - 3
    advantages = torch.tensor([1.3, -0.7, 0.0, 2.0, -1.5, 0.1])
    mask = torch.arange(9) < torch.randint(1, 10, (6, 1))
    host = apply_rlsd_reweight(advantages, mask, teacher, student, lam, 0.2, negative_only)
    apply_to = "negative" if negative_only else "all"
    ours = evidence_weighted_advantage(student, teacher, advantages, lam=lam, mask=mask, apply_to=apply_to).advantage
    truth = oracles.evidence(student.double(), teacher.double(), advantages.double()[:, None].expand(6, 9), lam=lam,
                             keep=mask, apply_to=apply_to).advantage  # fmt: skip
    assert_within(host, truth, 1e-6)
    assert_within(ours, truth, 1e-6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model and rows."""
    directory = tmp_path_factory.mktemp("swift")
    swift_runs.write_model(directory / "model")
    swift_runs.write_rows(directory)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in swift_runs.QUIET.items():
            patch.setenv(name, value)
        yield directory


def rlsd(directory, lam, **options):
    return swift_runs.steps_of(directory, "rlsd.jsonl", advantage_reweight="rlsd", rlsd_lambda=lam, **options)


def test_with_lam_0_three_steps_are_the_hosts_grpo(directory, monkeypatch, counted):
    ours = rlsd(directory, 0)
    assert len(counted) == 3 * (2 + 1)  # old policy and teacher of each batch, and its update
    monkeypatch.setattr(GRPOTrainer, HEAD, swift.host_forward)
    host = swift_runs.steps_of(directory, "grpo.jsonl")
    assert len(counted) == 9
    for found, expected in zip(ours, host, strict=True):
        assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
        swift_runs.assert_same_step(found, expected, SAME)


def test_with_lam_a_half_three_steps_are_those_of_a_dense_computation(directory, counted):
    steps, ratios, weights = rlsd(directory, 0.5, rlsd_reweight_clip_range=0.05), [], []
    for step in steps:
        expected = swift_runs.dense_step(directory, steps[0], step, lam=0.5, clip_range=0.05)
        swift_runs.assert_same_step(step, expected, SAME)
        ratios.append(expected.ratio)
        weights.append(expected.weight)
    assert len(counted) == 9
    ratios, weights = torch.cat(ratios), torch.cat(weights)
    for values, clip in ((ratios, 0.2), (weights, 0.05)):  # the run reaches both sides of both clips, and between
        assert (values > 1 + clip).any()
        assert (values < 1 - clip).any()
        assert ((values - 1).abs() < clip).any()


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    return found


def test_the_guides_command_takes_two_steps_that_are_the_hosts(directory, tmp_path, monkeypatch):
    """`swift rlhf` with the plugin as a program of its own; and the same run without it here."""
    (tmp_path / "rows.jsonl").write_text(block("json"))
    (tmp_path / "reward.py").write_text(block("python"))
    options = swift_runs.SMALL | {
        "num_generations": 8, "per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 0.01,
        "output_dir": "ours",
    }  # fmt: skip
    command = block("bash").strip()
    assert "Qwen/Qwen3-0.6B" in command
    assert len([line for line in (block("python") + block("bash")).splitlines() if line]) == 8
    command = command.replace("Qwen/Qwen3-0.6B", str(directory / "model"))
    more = " ".join(swift_runs.options(**options))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(["bash", "-c", f"{command} {more}"], cwd=tmp_path, env=os.environ | {"PATH": path},
                         capture_output=True, text=True, timeout=400)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "sdkernels: GRPO's log-probs come from hidden states" in ran.stdout + ran.stderr
    assert "leaves log-probs" not in ran.stdout + ran.stderr

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GRPOTrainer, HEAD, swift.host_forward)
    words = re.sub(r'\\\n|".*/sdkernels_plugin.py"', " ", command).split()
    assert words[:2] == ["swift", "rlhf"]
    from swift import rlhf_main  # the host's

    rlhf_main([*words[2:], *swift_runs.options(**options | {"output_dir": "host"})])
    ours, host = swift_runs.logged(tmp_path / "ours"), swift_runs.logged(tmp_path / "host")
    assert len(ours) == len(host) == 2
    for found, expected in zip(ours, host, strict=True):
        assert expected["grad_norm"] > 0.01
        for name in ("loss", "grad_norm", "teacher_kl", "rlsd_lambda", "reward"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-6), name


def test_running_the_plugin_again_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = GRPOTrainer._get_logps_via_local_forward, GRPOTrainer._get_logps_via_sp, swift.host_forward
    copied = tmp_path / "again.py"
    copied.write_text(PLUGIN.read_text())
    assert import_external_file(str(PLUGIN)).__name__ != import_external_file(str(copied)).__name__
    assert before == (GRPOTrainer._get_logps_via_local_forward, GRPOTrainer._get_logps_via_sp, swift.host_forward)
    importlib.reload(swift)
    assert swift.host_forward is before[2]
    assert swift.host_forward.__module__ == "swift.rlhf_trainers.grpo_trainer"
    assert GRPOTrainer._get_logps_via_local_forward is swift.get_logps_via_local_forward


def test_the_plugins_directory_shadows_no_module():
    """ms-swift puts it on sys.path, first."""
    for path in PLUGIN.parent.glob("*.py"):
        assert path.stem in ("__init__", "sdkernels_plugin")
    for name in ("swift", "transformers", "trl", "verl", "hosts", "prompts"):
        assert PathFinder.find_spec(name, [str(PLUGIN.parent)]) is None


def test_another_signature_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, HEAD, lambda self, model, inputs: None)
    message = r"ms-swift 4\.\S+ has .*_get_logps_via_local_forward\(self, model, inputs\), not \(self, model, " \
              r"model_inputs, .*; sdkernels was tested with ms-swift 4\.6\.0"  # fmt: skip
    with pytest.raises(ImportError, match=message) as raised:
        importlib.reload(swift)
    assert "\n" not in str(raised.value)


def test_sdkernels_imports_no_host():
    code = "import sys, sdkernels.integrations; print({'swift', 'transformers', 'trl'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "set()\n"
