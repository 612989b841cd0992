"""What works where: every function called in every way, and the table of README.md made of what happened.

``python tests/support_matrix.py`` writes the table; test_support_matrix.py compares it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from triton.runtime.jit import JITFunction

import sdkernels
from benchmarks.tables import ROOT, markdown, replaced
from sdkernels.rows import implementations, layout

B, T, H = 2, 3, 8
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # that both ways are the same way
FILTERS: dict[str, Any] = {"top_k": 5, "top_p": 0.8, "min_p": 0.05, "support": torch.arange(4).expand(B, T, 4)}
REFERENCE = str(Path(sdkernels.__file__).parent / "reference")


class Problem:
    """Tensors for any of the functions, the same for every dtype but for rounding."""

    def __init__(self, dtype: torch.dtype, vocab: int = 40, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.student, self.teacher = (self.rows(draw, B, T, vocab, dtype=dtype) for _ in range(2))
        self.student_hidden, self.teacher_hidden = (self.rows(draw, B, T, H, dtype=dtype) for _ in range(2))
        self.student.requires_grad_()
        self.student_hidden.requires_grad_()
        self.weight = self.rows(draw, vocab, H, dtype=dtype)
        self.token_ids = torch.randint(4, (B, T), generator=draw)
        self.advantages = torch.tensor([1.0, -2.0], dtype=dtype)
        self.log_probs = self.rows(draw, 2, B, T, dtype=dtype).abs().neg()

    @staticmethod
    def rows(draw: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
        """Multiples of 1/8 below 4, the same in every dtype."""
        return (torch.randint(-32, 33, shape, generator=draw).double() / 8).to(dtype)


CALLS: dict[str, Callable[..., Any]] = {
    "token_log_prob": lambda x, **more: sdkernels.token_log_prob(x.student, x.token_ids, **more),
    "truncated_log_softmax": lambda x, **more: sdkernels.truncated_log_softmax(x.student, **{"top_k": 5} | more),
    "truncated_support": lambda x, **more: sdkernels.truncated_support(
        x.student.detach(), **{"top_k": 5} | more, max_size=6
    ),
    "grpo_loss": lambda x, **more: sdkernels.grpo_loss(x.student, x.token_ids, x.advantages, **more),
    "rlsd_loss": lambda x, **more: sdkernels.rlsd_loss(x.student, x.teacher, x.token_ids, x.advantages, **more),
    "rlsd_token_advantage": lambda x, **more: sdkernels.rlsd_token_advantage(
        x.student.detach(), x.teacher, x.token_ids, x.advantages, **more
    ),
    "evidence_weighted_advantage": lambda x, **more: sdkernels.evidence_weighted_advantage(
        *x.log_probs, x.advantages, **more
    ),
    "ssd_loss": lambda x, **more: sdkernels.ssd_loss(x.student, x.teacher, 1.5, **{"top_k": 5} | more),
    "ssd_decomposition": lambda x, **more: sdkernels.ssd_decomposition(
        x.student, x.teacher, 1.5, **{"top_k": 5} | more
    ),
    "opsd_loss": lambda x, **more: sdkernels.opsd_loss(x.student, x.teacher, **more),
    "opsd_decomposition": lambda x, **more: sdkernels.opsd_decomposition(
        x.student.detach(), torch.stack([x.teacher, x.student.detach().flip(-1)]), **more
    ),
}
LINEAR_CALLS: dict[str, Callable[..., Any]] = {
    "token_log_prob": lambda x: sdkernels.linear_token_log_prob(x.student_hidden, x.weight, x.token_ids),
    "truncated_support": lambda x: sdkernels.linear_truncated_support(
        x.student_hidden.detach(), x.weight, top_k=5, max_size=6
    ),
    "grpo_loss": lambda x: sdkernels.linear_grpo_loss(x.student_hidden, x.weight, x.token_ids, x.advantages),
    "rlsd_loss": lambda x: sdkernels.linear_rlsd_loss(
        x.student_hidden, x.teacher_hidden, x.weight, x.token_ids, x.advantages
    ),
    "rlsd_token_advantage": lambda x: sdkernels.linear_rlsd_token_advantage(
        x.student_hidden.detach(), x.teacher_hidden, x.weight, x.token_ids, x.advantages
    ),
    "ssd_loss": lambda x: sdkernels.linear_ssd_loss(x.student_hidden, x.teacher_hidden, x.weight, 1.5, top_k=5),
    "opsd_loss": lambda x: sdkernels.linear_opsd_loss(x.student_hidden, x.teacher_hidden, x.weight),
}


def tensors(result: Any) -> list[Tensor]:
    """The tensors of nested results, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in tensors(part)] if isinstance(result, tuple) else []


def run(call: Callable[..., Any], problem: Problem, **options: Any) -> list[Tensor]:
    """Results and the gradient of what is differentiable, in float64."""
    results = tensors(call(problem, **options))
    leaves = [x for x in (problem.student, problem.student_hidden) if x.requires_grad]
    found = [x.detach().double() for x in results]
    for result in results:
        if result.requires_grad:
            result.masked_fill(result.isinf(), 0).sum().backward(retain_graph=True)
    return found + [x.grad.double() for x in leaves if x.grad is not None]


def agree(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> bool:
    """Whether results are the same but for rounding."""
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(a, b, tolerance, 10 * tolerance, equal_nan=False) for a, b in pairs)


@contextmanager
def watched() -> Iterator[set[str]]:
    """The implementations that serve rows meanwhile: "C++", "PyTorch"."""
    seen: set[str] = set()

    def look(frame: Any, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(REFERENCE) and code.co_filename.endswith(("rows.py", "divergences.py")):
            seen.add("PyTorch")
        if code.co_name == "__call__" and str(frame.f_locals.get("self", "")).startswith("sdkernels_cpu."):
            seen.add("C++")

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def on_cpu(name: str, dtype: torch.dtype) -> str:
    """What serves this function's rows on a CPU; "wrong" where it is not float64's result."""
    with watched() as seen:
        found = run(CALLS[name], Problem(dtype))
    truth = run(CALLS[name], Problem(torch.float64))
    if not agree(found, truth, ROUNDING.get(dtype, 1e-9)):
        return "wrong"
    return " and ".join(sorted(seen)) or "PyTorch"


def launches(name: str, warp_size: int = 32) -> list[tuple[JITFunction, tuple, dict]]:
    """The Triton kernels that a function launches, forward and backward, for bfloat16 rows of 151,936 logits."""
    recorded = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorded.append((kernel, arguments, options))

    with (
        mock.patch.object(implementations, "INTERPRETED", True),
        mock.patch.object(layout, "WARP_SIZE", warp_size),
        mock.patch.object(JITFunction, "run", record),
        watched() as seen,
    ):
        run(CALLS[name], Problem(torch.bfloat16, vocab=151_936))
    if seen:
        raise AssertionError(f"{name} leaves rows to {seen} where Triton should serve them")
    return recorded


@contextmanager
def group_of_one() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def accepts(name: str, option: str) -> bool:
    """Whether a function has an option."""
    return option in inspect.signature(getattr(sdkernels, name)).parameters


def sharded(name: str) -> str:
    """Whether a function takes a process group and then finds the same."""
    if not accepts(name, "group"):
        return ""
    with group_of_one() as group:
        found = run(CALLS[name], Problem(torch.float32), group=group)
    return "yes" if agree(found, run(CALLS[name], Problem(torch.float32)), 1e-5) else "wrong"


def truncating(name: str) -> str:
    """The filters that a function takes."""
    found = []
    for option, value in FILTERS.items():
        if accepts(name, option):
            run(
                CALLS[name], Problem(torch.float32), **({} if option == "top_k" else {"top_k": None}), **{option: value}
            )
            found.append(option)
    if accepts(name, "base"):
        problem = Problem(torch.float32)
        base = sdkernels.truncated_support(problem.teacher, 1.5, top_k=5, max_size=40)
        getattr(sdkernels, name)(problem.student, base, 1.5)
        found.append("a `Support` as base")
    return ", ".join(found)


def from_hidden(name: str) -> str:
    """The function on hidden states, if it finds what the one on logits does."""
    if name not in LINEAR_CALLS:
        return ""
    problem, whole = Problem(torch.float64), Problem(torch.float64)
    found = run(LINEAR_CALLS[name], problem)
    whole.student = whole.student_hidden @ whole.weight.T
    whole.student.retain_grad()
    whole.teacher = whole.teacher_hidden @ whole.weight.T
    results = [x.detach().double() for x in tensors(CALLS[name](whole))]
    return f"`linear_{name}`" if agree(found[: len(results)], results, 1e-9) else "wrong"


@cache
def rows() -> tuple[tuple[str, ...], ...]:
    """The table."""
    head = ("function", "float64", "float32, bfloat16, float16 on a CPU", "on CUDA, not yet run", "ROCm", "truncation",
            "sharded vocabulary", "from hidden states")  # fmt: skip
    body = []
    for name in CALLS:
        (on_kernels,) = {on_cpu(name, dtype) for dtype in KERNEL_DTYPES}
        by_triton = bool(launches(name))
        devices = ("Triton", "compiles") if by_triton else (on_kernels, on_kernels)
        cells = (on_cpu(name, torch.float64), on_kernels, *devices, truncating(name), sharded(name), from_hidden(name))
        body.append((f"`{name}`", *cells))
    return (head, *body)


def written(text: str) -> str:
    """README with the table made anew."""
    return replaced(text, "support matrix", markdown(iter(rows())))


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text()))
