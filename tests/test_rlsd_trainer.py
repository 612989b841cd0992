"""trainers.rlsd with tiny random models: every method, every way to start and to go on, the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import no_kernel
from safetensors.torch import load_file
from tiny import VERIFIER, rows, save_model, vision_processor, write_rows

from trainers import rlsd
from trainers.rlsd import DEFAULTS

pytestmark = no_kernel
METHODS = sorted(DEFAULTS)
ROOT = Path(__file__).resolve().parents[1]


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


def metrics_of(output):
    """The logged rows, without what depends on the clock."""
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in logged]


def train(folder, output, **options):
    rlsd.main(arguments(folder, output, **options))
    return metrics_of(output)


def weights_of(output, step=3):
    return load_file(output / f"checkpoint-{step}" / "model.safetensors")


def close(found, expected, rtol):
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name, value in row.items():
            assert value == pytest.approx(wanted[name], rel=rtol, abs=rtol * 0.1), (name, row["step"])


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
@pytest.mark.parametrize("head", ["logits", "reference"])
def test_the_head_does_not_change_the_result(folder, tmp_path, method, head):
    options = {"method": method, "num_minibatches": 2, "save_steps": 3}
    close(train(folder, tmp_path / "a", head=head, **options), train(folder, tmp_path / "b", **options), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_micro_batch_does_not_change_the_result(folder, tmp_path, method):
    options = {"method": method, "save_steps": 3}
    one = train(folder, tmp_path / "a", per_device_train_batch_size=1, **options)
    close(train(folder, tmp_path / "b", per_device_train_batch_size=8, **options), one, rtol=1e-4)


@pytest.mark.parametrize("teacher", ["live", "frozen", "ema"])
def test_teachers_follow(folder, tmp_path, teacher):
    """A frozen teacher that takes the weights every step is a live one, a step behind within the inner updates."""
    logged = train(folder, tmp_path / "a", teacher=teacher, teacher_sync_steps=1, teacher_ema_rate=1.0, save_steps=3)
    live = train(folder, tmp_path / "b", teacher="live", save_steps=3)
    close(logged, live, rtol=1e-5)


def test_a_frozen_teacher_stays(folder, tmp_path):
    train(folder, tmp_path / "out", method="opsd", teacher_sync_steps=0)
    before = load_file(folder / "model" / "model.safetensors")
    kept = load_file(tmp_path / "out" / "checkpoint-3" / "teacher.safetensors")
    assert {name: True for name in before} == {name: torch.equal(kept[name], before[name]) for name in before}
