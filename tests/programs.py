"""The trainers as programs of their own, and what they left behind."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def metrics_of(output):
    """The logged rows, without what depends on the clock."""
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in logged]


def close(found, expected, rtol):
    """Whether rows of metrics are equal up to rounding."""
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name, value in row.items():
            assert value == pytest.approx(wanted[name], rel=rtol, abs=rtol * 0.1), (name, row["step"])


def same_weights(found, expected):
    """Whether weights are equal but where Adam took rounding for a gradient and made a step of it."""
    assert sorted(found) == sorted(expected)
    apart = torch.cat([(found[name] - value).abs().flatten() for name, value in expected.items()])
    assert (apart < 1e-5).float().mean() > 0.999


def started(command, directory):
    """`python -m ...` in a process of its own, one thread."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=directory, env=variables, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    """Wait for its end, which must be a good one."""
    try:
        _, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
