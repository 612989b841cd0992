"""What is available on this machine, and what a bug report needs: ``python -m sdkernels.info``, or with ``--json``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import sdkernels
from sdkernels.rows import implementations

HOSTS = ("transformers", "trl", "verl", "ms-swift")
VARIABLES = ("SDKERNELS_VALIDATE", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
TOLERANCE = 1e-5  # of a row's gradient in float32, whose coefficients sum to less than 2


def installed(distribution: str) -> str:
    """Its version, or "not installed"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    """The CPU, and every GPU that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def described(device: torch.device) -> str:
    """The device's name, and what of it matters."""
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def implementation(device: torch.device, dtype: torch.dtype) -> str:
    """What serves rows of logits of a dtype on a device."""
    rows = torch.empty(0, dtype=dtype, device=device)
    if implementations.runs_triton(rows):
        return "Triton, interpreted" if device.type == "cpu" else "Triton"
    if implementations.runs_csrc(rows):
        return f"C++ ({torch.ops.sdkernels_cpu.instruction_sets().split()[0]})"
    return "plain PyTorch" if dtype == torch.float64 else "plain PyTorch: the C++ kernels were not built"


def gradient(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of a small `rlsd_loss` whose inputs are the same everywhere."""
    rows = torch.linspace(-3, 3, 2 * 3 * 70, dtype=torch.float64).sin().mul(4).reshape(2, 3, 70)
    student, teacher = (x.to(device, dtype) for x in (rows, rows.flip(-1)))
    student.requires_grad_()
    advantages = torch.tensor([1.0, -1.0], device=device, dtype=dtype)
    token_ids = torch.arange(6, device=device).reshape(2, 3)
    loss = sdkernels.rlsd_loss(student, teacher, token_ids, advantages, lam=0.5).loss
    return torch.autograd.grad(loss, student)[0].double().cpu()


def self_test(device: torch.device) -> str:
    """Whether the float32 kernels of a device agree with plain PyTorch in float64: "passed", or what went wrong."""
    try:
        error = (gradient(device, torch.float32) - gradient(torch.device("cpu"), torch.float64)).abs().max().item()
    except Exception as failure:  # a report is of use above all where something fails
        return f"failed: {type(failure).__name__}: {failure}"
    return "passed" if error < TOLERANCE else f"failed: the gradient is off by {error:.1e}"


def info() -> dict[str, dict[str, str]]:
    """Versions, devices with the implementation that serves them, trainers that are installed, settings.

    Returns:
        Groups of names and texts: "versions", one group per device, "trainers" and, where any is set, "environment".
    """
    found = {
        "versions": {
            "sdkernels": f"{sdkernels.__version__}, {Path(sdkernels.__file__).parent}",
            "python": f"{platform.python_version()}, {platform.platform()}",
            "torch": torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ""),
            "triton": installed("triton"),
        }
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the C++ kernels are missing is in the report
        for device in devices():
            found[str(device)] = {
                "device": described(device),
                "float32, bfloat16, float16": implementation(device, torch.float32),
                "float64": implementation(device, torch.float64),
                "self-test": self_test(device),
            }
    found["trainers"] = {host: installed(host) for host in HOSTS}
    settings = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return found | ({"environment": settings} if settings else {})


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser("python -m sdkernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    as_json = parser.parse_args().json
    found = info()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for group, values in found.items():
        print(group, *(f"  {name:28}{text}" for name, text in values.items()), sep="\n")


if __name__ == "__main__":
    main()
