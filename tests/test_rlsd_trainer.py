"""trainers.rlsd with tiny random models: every method, every way to start and to go on, the same numbers."""

import json
import random
import signal
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import no_kernel
from PIL import Image
from programs import close, ended, free_port, metrics_of, same_weights, started
from safetensors.torch import load_file
from tiny import VERIFIER, rows, save_model, vision_processor, write_rows
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from trainers import policy as policies
from trainers import rlsd
from trainers.data import Example, load_examples
from trainers.generation import Response
from trainers.policy import Policy, load_model, optimizer_for, wrapped
from trainers.program import parse
from trainers.prompts import Encoder, privileged
from trainers.rlsd import DEFAULTS, RLSDConfig
from trainers.rollouts import Environment, Rollout
from trainers.teacher import Teacher, copy_of
from trainers.verifiers import Verdict

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
METHODS = sorted(DEFAULTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, prompts and a verifier."""
    made = tmp_path_factory.mktemp("rlsd")
    save_model(made / "model")
    write_rows(made / "train.jsonl", rows())
    (made / "verifier.py").write_text(VERIFIER)
    return made


def arguments(folder, output, **options):
    options = {
        "model_name_or_path": folder / "model", "train_dataset": folder / "train.jsonl", "output_dir": output,
        "verifier": f"{folder}/verifier.py:reward", "verifier_workers": 1, "max_completion_length": 6,
        "num_prompts": 4, "num_generations": 4, "learning_rate": 1e-3, "max_steps": 3, "leakage_steps": 2,
        "privileged_template": "({privileged}) {prompt}", "save_steps": 1, "completions_steps": 0,
    } | options  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def train(folder, output, **options):
    rlsd.main(arguments(folder, output, **options))
    return metrics_of(output)


def weights_of(output, step=3):
    return load_file(output / f"checkpoint-{step}" / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_says_what_it_did(folder, tmp_path, method):
    logged = train(folder, tmp_path / "out", method=method, num_minibatches=2, num_iterations=2)
    assert [row["step"] for row in logged] == [1, 2, 3]
    always = {"reward", "loss", "entropy", "gradient_norm", "learning_rate", "tokens", "verifier_failures", "finished"}
    policy = {"ratio_clipped", "approx_kl"} if method not in ("opsd", "sdpo") else {"divergence"}
    evidence = {"evidence_clipped", "information_gain_abs"} if method == "rlsd" else set()
    for row in logged:
        assert always | policy | evidence <= set(row)
        assert all(value == value and abs(value) < 1e3 for value in row.values())
        assert row["gradient_norm"] > 0
    assert 0 < logged[1]["leakage/mutual_information"] < logged[1]["leakage/total"]
    before, after = load_file(folder / "model" / "model.safetensors"), weights_of(tmp_path / "out")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("method", METHODS)
def test_the_head_does_not_change_the_result(folder, tmp_path, method):
    options = {"method": method, "num_minibatches": 2, "save_steps": 3}
    close(train(folder, tmp_path / "a", head="logits", **options), train(folder, tmp_path / "b", **options), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_micro_batch_does_not_change_the_result(folder, tmp_path, method):
    options = {"method": method, "save_steps": 3}
    one = train(folder, tmp_path / "a", per_device_train_batch_size=1, **options)
    close(train(folder, tmp_path / "b", per_device_train_batch_size=8, **options), one, rtol=1e-4)


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_teachers_follow(folder, tmp_path, teacher):
    """With one optimizer step in each, a copy that takes the weights after every step is a live teacher."""
    logged = train(folder, tmp_path / "a", teacher=teacher, teacher_sync_steps=1, teacher_ema_rate=1.0, save_steps=3)
    live = train(folder, tmp_path / "b", teacher="live", save_steps=3)
    close(logged, live, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sync_steps", "expected"),
    [
        ("live", 0, [1, 4, 9, 16, 25, 36, 49]),
        ("frozen", 0, [7] * 7),
        ("frozen", 3, [7, 7, 9, 9, 9, 36, 36]),
        ("ema", 3, [0.9**n * 7 + sum(0.1 * 0.9 ** (n - i) * i**2 for i in range(1, n + 1)) for n in range(1, 8)]),
    ],
)
def test_what_a_teachers_weight_is_after_every_step(kind, sync_steps, expected):
    """Of a policy with one weight, 7 before the first step and n^2 after the n-th."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    policy, weight = Policy(model, bf16=False), model.weight.detach()
    weight.fill_(7)
    teacher = Teacher(policy, None if kind == "live" else Policy(copy_of(model), bf16=False), kind, sync_steps, 0.1)
    found = []
    for step in range(1, 8):
        weight.fill_(step**2)
        teacher.follow(step)
        found.append(next(teacher.network.parameters()).item())
    assert found == pytest.approx(expected, rel=1e-14)


REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.3, 0.9, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 1e-6]]


@pytest.mark.parametrize("scaled", [True, False])
def test_an_advantage_is_a_reward_normalised_within_its_group(scaled):
    """RLSD Eq. 1 as its code has it: the unbiased deviation, plus 1e-6."""
    rewards = iter([reward for of_group in REWARDS for reward in of_group])
    examples = [Example("p", "r", (), "exact", (), f"{i}") for i in range(len(REWARDS))]

    def rollouts(policy, examples, seeds, sampling):
        return [Rollout(example, None, Response([1], True), "", Verdict(next(rewards))) for example in examples]

    config = RLSDConfig(testbed="arithmetic", method="grpo", num_prompts=4, num_generations=4, scale_rewards=scaled)
    groups = rlsd.sample(None, SimpleNamespace(rollouts=rollouts), config, examples, 1)
    for of_group, example, group in zip(REWARDS, examples, groups, strict=True):
        mean, spread = statistics.mean(of_group), statistics.stdev(of_group) + 1e-6 if scaled else 1.0
        assert [rollout.example for rollout in group] == [example] * 4
        assert [rollout.advantage for rollout in group] == pytest.approx(
            [(reward - mean) / spread for reward in of_group], rel=1e-12, abs=1e-15
        )


def test_a_frozen_teacher_stays(folder, tmp_path):
    train(folder, tmp_path / "out", method="opsd", teacher_sync_steps=0)
    before = load_file(folder / "model" / "model.safetensors")
    kept = load_file(tmp_path / "out" / "checkpoint-3" / "teacher.safetensors")
    assert {name: True for name in before} == {name: torch.equal(kept[name], before[name]) for name in before}


def replayed(folder, tmp_path, method, head, steps=50):
    """Losses and gradient norms of optimizer steps on the same recorded rollouts, three inner updates each."""
    config = parse(
        rlsd.RLSDConfig,
        arguments(folder, tmp_path, method=method, head=head, num_minibatches=2, learning_rate=1e-4, teacher="ema"), "",
    )  # fmt: skip
    model, processor = load_model(config)
    encoder = Encoder(processor, config)
    policy = wrapped(model, config)
    teacher = Teacher(policy, wrapped(copy_of(model), config, trained=False), "ema", 0, 0.1)
    optimizer, _ = optimizer_for(policy, config)
    examples = load_examples(config, config.train_dataset, "train")
    with Environment(config, encoder) as environment:
        recorded = rlsd.sample(policy, environment, config, examples[:8], 1)
    found = []
    for step in range(1, steps + 1):
        metrics = rlsd.update(policy, teacher, optimizer, encoder, config, recorded, step)
        teacher.follow(step)
        found.append((metrics["loss"], metrics["gradient_norm"], metrics["entropy"]))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_fused_and_reference_losses_give_the_same_trajectory(folder, tmp_path, method):
    fused, reference = (replayed(folder, tmp_path, method, head) for head in ("fused", "reference"))
    assert (fused[0] - fused[-1]).abs().max() > 0.1  # it went somewhere
    scale = reference.abs().clamp(min=reference.abs().mean(0))
    assert ((fused - reference).abs() / scale).max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_other_families_train(folder, tmp_path, family):
    save_model(tmp_path / "model", family)
    options = {"model_name_or_path": tmp_path / "model", "num_minibatches": 2, "save_steps": 3}
    fused = train(folder, tmp_path / "a", **options)
    close(fused, train(folder, tmp_path / "b", **options, head="reference"), rtol=1e-4)


def test_images_pass_through_student_and_teacher_prompts(folder, tmp_path, monkeypatch):
    processor = vision_processor()
    monkeypatch.setattr(policies.AutoProcessor, "from_pretrained", lambda name: processor)
    save_model(tmp_path / "model", "qwen3_vl")
    for i, color in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (40 + 8 * i, 24), color).save(tmp_path / f"{color}.png")
    pictured = [
        row | {"images": [str(tmp_path / f"{color}.png")] * (1 + i % 2)}
        for i, (row, color) in enumerate(zip(rows(4), ["red", "green", "blue", "white"], strict=True))
    ]
    options = {
        "model_name_or_path": tmp_path / "model", "train_dataset": write_rows(tmp_path / "train.jsonl", pictured),
        "num_minibatches": 2, "per_device_train_batch_size": 3, "save_steps": 3,
    }  # fmt: skip
    seen = train(folder, tmp_path / "a", **options)
    close(seen, train(folder, tmp_path / "b", **options, head="reference"), rtol=1e-4)
    for path in tmp_path.glob("*.png"):
        Image.new("RGB", Image.open(path).size, "black").save(path)
    assert train(folder, tmp_path / "c", **options)[0]["entropy"] != seen[0]["entropy"]


def test_adapters_train_alone_and_resume(folder, tmp_path):
    options = {"lora_r": 4, "num_minibatches": 2, "teacher": "ema"}
    whole = train(folder, tmp_path / "whole", **options)
    train(folder, tmp_path / "parts", **options | {"max_steps": 2})
    assert train(folder, tmp_path / "parts", **options, resume=True) == whole
    path = "checkpoint-3/adapter_model.safetensors"
    assert (tmp_path / "parts" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    assert all("lora" in name for name in load_file(tmp_path / "whole" / path))
    assert all("lora" in name for name in load_file(tmp_path / "whole" / "checkpoint-3" / "teacher.safetensors"))


def test_gradient_checkpointing_recomputes_and_does_not_change_the_result(folder, tmp_path, monkeypatch):
    options = {"num_minibatches": 2, "save_steps": 3}
    calls = []
    forward = Qwen3Attention.forward
    monkeypatch.setattr(Qwen3Attention, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    plain = train(folder, tmp_path / "a", **options)
    once = len(calls)
    close(train(folder, tmp_path / "b", **options, gradient_checkpointing=True), plain, rtol=1e-5)
    assert len(calls) - once > once


GRADER = """
from trainers.verifiers import Verdict

def reward(response, reference):
    right = sum(map(ord, response)) % 3 == 0
    return Verdict(float(right), "" if right else f"not {reference}: {len(response)} letters")
"""


def test_feedback_is_read_by_the_teacher_of_what_it_is_about(folder, tmp_path, monkeypatch):
    (tmp_path / "grader.py").write_text(GRADER)
    told = []
    monkeypatch.setattr(rlsd, "privileged", lambda *a: told.append(a) or privileged(*a))
    options = {"method": "sdpo", "privilege": "feedback", "verifier": f"{tmp_path}/grader.py:reward", "max_steps": 1}
    (row,) = train(folder, tmp_path / "out", completions_steps=1, **options)
    stored = (tmp_path / "out" / "completions" / "step-000001.jsonl").read_text().splitlines()
    wrong = [kept for kept in map(json.loads, stored) if not kept["reward"]]
    assert 0 < len(wrong) < 16
    assert [(e.source, kind, text) for e, kind, text, _ in told] == [
        (kept["source"], "feedback", f"not {kept['reference']}: {len(kept['response'])} letters") for kept in wrong
    ]
    tokens = sum(len(kept["token_ids"]) for kept in wrong)
    assert row["taught"] == pytest.approx(tokens / row["tokens"])


def test_finished_only_takes_the_reward_of_what_was_cut_off(folder, tmp_path):
    (tmp_path / "good.py").write_text("def reward(response, reference):\n    return 1.0\n")
    options = {"verifier": f"{tmp_path}/good.py:reward", "max_steps": 1, "completions_steps": 1, "method": "grpo",
               "max_completion_length": 60}  # fmt: skip
    for finished_only in (False, True):
        output = tmp_path / str(finished_only)
        (row,) = train(folder, output, finished_only=finished_only, **options)
        kept = list(map(json.loads, (output / "completions" / "step-000001.jsonl").read_text().splitlines()))
        assert [k["reward"] for k in kept] == [float(k["finished"] or not finished_only) for k in kept]
        assert 0 < row["finished"] < 1


def test_equal_rewards_are_no_advantage(folder, tmp_path):
    """Not even by rounding, which a division by the spread would blow up."""
    (tmp_path / "same.py").write_text("def reward(response, reference):\n    return 0.3\n")
    logged = train(folder, tmp_path / "out", verifier=f"{tmp_path}/same.py:reward", method="grpo", max_steps=1)
    assert logged[0]["reward"] == pytest.approx(0.3)
    assert logged[0]["gradient_norm"] < 1e-8


def test_autocast_stays_near_float32(folder, tmp_path):
    options = {"max_steps": 1, "temperature": 0.7}
    (plain,), (rounded,) = (train(folder, tmp_path / str(bf16), **options, bf16=bf16) for bf16 in (False, True))
    assert rounded["entropy"] == pytest.approx(plain["entropy"], rel=2**-5)
    assert rounded["entropy"] != plain["entropy"]


def test_a_run_that_is_resumed_equals_one_that_was_not(folder, tmp_path):
    options = {"num_minibatches": 2, "teacher": "ema", "lr_scheduler_type": "cosine", "warmup_steps": 1, "max_steps": 4}
    whole = train(folder, tmp_path / "whole", **options)
    train(folder, tmp_path / "parts", **options | {"save_steps": 2}, **{"resume": True})  # nothing there yet: starts
    for leftover in (tmp_path / "parts" / "checkpoint-4").iterdir():
        leftover.unlink()
    (tmp_path / "parts" / "checkpoint-4").rmdir()
    assert train(folder, tmp_path / "parts", **options, resume=True) == whole
    for name in ("model", "optimizer", "teacher"):
        path = f"checkpoint-4/{name}.safetensors"
        assert (tmp_path / "parts" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_evaluations_and_completions_are_kept(folder, tmp_path):
    options = {"eval_dataset": folder / "train.jsonl", "num_eval_prompts": 5, "eval_steps": 2, "completions_steps": 2}
    logged = train(folder, tmp_path / "whole", **options, max_steps=4)
    assert [row["step"] for row in logged if "eval/reward" in row] == [0, 2, 4]
    assert all((5 * row["eval/reward"]).is_integer() for row in logged if "eval/reward" in row)
    stored = tmp_path / "whole" / "completions"
    for step in (2, 4):
        kept = [json.loads(line) for line in (stored / f"step-{step:06d}.jsonl").read_text().splitlines()]
        assert len(kept) == 16
        assert sum(row["reward"] for row in kept) / 16 == pytest.approx(logged[step]["reward"])
    assert train(folder, tmp_path / "parts", **options, max_steps=3)[:3] == logged[:3]
    assert train(folder, tmp_path / "parts", **options, max_steps=4, resume=True)[-1] == logged[-1]


def refusal(capsys, *arguments, **options):
    """The one line with which the program ends."""
    with pytest.raises(SystemExit) as exit:
        train(*arguments, **options)
    assert exit.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def test_a_run_is_resumed_with_the_options_it_began_with(folder, tmp_path, capsys):
    train(folder, tmp_path / "out", max_steps=1)
    said = refusal(capsys, folder, tmp_path / "out", seed=1, rlsd_clip_range=0.3, resume=True)
    assert "holds a run with another seed, rlsd_clip_range" in said


def test_an_output_directory_is_not_overwritten(folder, tmp_path, capsys):
    train(folder, tmp_path / "out", max_steps=1)
    assert "holds a run; give --resume" in refusal(capsys, folder, tmp_path / "out", max_steps=1)


def test_bad_data_and_models_end_the_program_with_a_line(folder, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "reference": "1"}\n{"prompt": "y", "reference": }\n')
    said = refusal(capsys, folder, tmp_path / "a", train_dataset=tmp_path / "bad.jsonl")
    assert f"{tmp_path}/bad.jsonl:2: not JSON" in said
    assert "no solutions" not in said
    said = refusal(capsys, folder, tmp_path / "b", model_name_or_path=tmp_path / "no_model")
    assert "model_name_or_path" in said
    assert "no_model" in said


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(folder, tmp_path):
    """kill -9 at random times, while steps run and while checkpoints are written."""
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "num_minibatches": 2, "method": "sdpo"}
    ended(started(["trainers.rlsd", *arguments(folder, tmp_path / "whole", **options)], tmp_path))
    seed = time.time_ns()
    print(f"kills at the moments of seed {seed}")
    moments = random.Random(seed)
    kills = 0
    while True:
        process = started(["trainers.rlsd", *arguments(folder, tmp_path / "killed", **options, resume=True)], tmp_path)
        if kills == 4:
            ended(process)
            break
        logged = tmp_path / "killed" / "metrics.jsonl"
        while process.poll() is None and not (logged.exists() and logged.stat().st_size):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    for name in ("model", "optimizer", "teacher"):
        path = f"checkpoint-12/{name}.safetensors"
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The metrics and weights of one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    return train(folder, output, **SHARED), weights_of(output)


SHARED = {"num_minibatches": 2, "teacher": "ema", "per_device_train_batch_size": 2, "eval_steps": 3}


@pytest.mark.parametrize(("launcher", "fsdp"), [("torchrun", False), ("torchrun", True), ("accelerate", False)])
def test_two_processes_match_one(folder, tmp_path, alone, launcher, fsdp):
    """DDP and FSDP2, which also go on from their own checkpoint."""
    for steps in (2, 3) if fsdp else (3,):
        options = arguments(folder, tmp_path / "out", **SHARED | {"max_steps": steps}, fsdp=fsdp, resume=fsdp)
        port = f"--main_process_port={free_port()}"
        program = {
            "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
            "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", port],
        }[launcher]  # fmt: skip
        ended(started([*program, "-m", "trainers.rlsd", *options], tmp_path))
    metrics, weights = alone
    close(metrics_of(tmp_path / "out"), metrics, rtol=1e-4)
    same_weights(weights_of(tmp_path / "out"), weights)
