"""Compile every Triton kernel ahead of time, as its launcher launches it, and read what the compiler made of it.

``python tests/aot.py`` needs no GPU: the launchers run on CPU tensors with the launch replaced by compilation for
sm_80, sm_90, sm_100 and gfx942. Per kernel it prints registers, spills, shared memory and the widths of the loads and
stores found in the machine code, and it fails on any spill, and, over rows at 16-byte boundaries, on narrow loads: in
the row loops of sweeps that read nothing else, and elsewhere on fewer 16-byte accesses than a block of a row needs.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sdkernels.evidence import Weighing
from sdkernels.opsd import DIVERGENCES
from sdkernels.rows import (
    divergence,
    divergence_gradient,
    evidence,
    gradient,
    information,
    layout,
    masses,
    pair,
    pair_gradient,
    reduced,
    reduced_gradient,
    statistics,
    support,
    truncated,
    truncated_gradient,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 3
PIVOTS = (1, 31)  # of row_masses
CUDA_WIDTHS = {"": 4, "64": 8, "128": 16, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
WIDE_ACCESSES = {  # of 16 bytes that a kernel needs for its tile or block of a row: loads, stores
    "gradient": (2, 2),
    "log softmax": (2, 2),
    "upstream sum": (4, 0),
    "truncated gradient": (2, 2),
    "pair gradient": (2, 2),
    "in-place pair gradient": (2, 2),
    **{f"{kind} gradient": (2, 1) for kind in DIVERGENCES},
    "reduced gradient": (2, 2),
}
HIP_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2,
              "ubyte": 1, "sbyte": 1, "byte": 1}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One instantiation: a launcher, the logits' dtype, how rows lie in memory, and whether options are present."""

    op: str
    dtype: torch.dtype
    rows: str  # "even": V divisible by 16; "padded": V odd, rows aligned; "odd": V odd, rows anywhere
    options: bool
    other: torch.dtype | None = None  # of a teacher (None: log-probs), an upstream gradient, a base (None: a Support)

    def __str__(self) -> str:
        parts = [self.op, str(self.dtype)[6:], self.rows, "options" if self.options else "plain"]
        return " ".join(parts + ([] if self.other is None else [f"and {str(self.other)[6:]}"]))


@dataclass
class Report:
    """What the machine code of one instantiation holds; accesses are counted by their size in bytes."""

    registers: int
    spilled: int
    shared: int
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    loop_loads: Counter[int] = field(default_factory=Counter)


def cases() -> Iterator[Case]:
    """All instantiations that the launchers can ask for, options all absent or all present."""
    for rows in ("even", "padded", "odd"):
        for options in (False, True):
            for dtype in DTYPES:
                for op in ("statistics", "gradient", "support", "search", "log softmax", "truncated gradient",
                           "reduced gradient"):  # fmt: skip
                    yield Case(op, dtype, rows, options)
                for count in PIVOTS:
                    yield Case(f"masses of {count}", dtype, rows, options)
                yield Case("upstream sum", dtype, rows, options, dtype)
                yield Case("truncated gradient", dtype, rows, options, dtype)
                for other in (None, *DTYPES):
                    yield Case("evidence", dtype, rows, options, other)
                for other in dict.fromkeys((None, dtype, torch.float32)):
                    yield Case("pair statistics", dtype, rows, options, other)
                    yield Case("pair gradient", dtype, rows, options, other)
                    if options or other is None:  # there is a list
                        yield Case("in-place pair gradient", dtype, rows, options, other)
                for other in dict.fromkeys((dtype, torch.float32)):
                    for kind in DIVERGENCES:
                        yield Case(f"{kind} divergence", dtype, rows, options, other)
                        yield Case(f"{kind} partial divergence", dtype, rows, options, other)
                        yield Case(f"{kind} gradient", dtype, rows, options, other)
                    yield Case("reduced rows", dtype, rows, options, other)
                    yield Case("information", dtype, rows, options, other)
                    yield Case("partial information", dtype, rows, options, other)


def logits(case: Case, dtype: torch.dtype) -> Tensor:
    """A few rows that lie in memory as the case says."""
    vocab = 151936 if case.rows == "even" else 151669
    stride = vocab if case.rows == "odd" else 151936
    return torch.zeros(TOKENS, stride, dtype=dtype)[:, :vocab]


def launch(case: Case) -> None:
    """Call the launcher that the operator would call."""
    rows, result = logits(case, case.dtype), logits(case, case.dtype)
    other = None if case.other is None else logits(case, case.other)
    ids = torch.zeros(TOKENS, dtype=torch.int32 if case.options else torch.int64)
    values, doubles, sizes = torch.ones(TOKENS), torch.ones(TOKENS).double(), torch.ones(TOKENS).long()
    mask, temperatures, present = (values.bool(), doubles, values) if case.options else (None, None, None)
    places = torch.zeros(TOKENS, support.LISTED)
    found = layout.RowSupport(values, sizes, values, doubles, values, places.int(), places)
    sparse = (None, None, found.token_ids, found.log_probs)
    dense = (found.threshold, found.size, *sparse[2:]) if case.options else (None,) * 4
    pair_support = sparse if other is None else dense
    pair_results = (*(doubles,) * 5, sizes, doubles, doubles, *(values,) * 3)
    if case.op == "statistics":
        statistics._launch(rows, ids, mask, 0.7, temperatures, (doubles, *(values,) * 3))
    elif case.op == "gradient":
        gradient._launch(rows, result, ids, mask, 0.7, temperatures, (doubles, *(values,) * 4, present))
    elif case.op == "evidence":
        teacher = values if other is None else other
        options = ((mask, mask, temperatures), (values,) * 7, 0.7, Weighing(0.5, 0.8, 1.2, "all", False))
        evidence._launch(rows, teacher, ids, values, *options)
    elif case.op in ("support", "search"):
        filters = (20, 0.8, 0.1) if case.options else (0, 0.95, 0.0)
        support._launch(rows, mask, 0.7, temperatures, filters, support.LISTED, case.options, found)
    elif case.op == "log softmax":
        truncated._launch(rows, 0.7, temperatures, found, result)
    elif case.op == "upstream sum":
        truncated_gradient._upstream_sum(rows, other, found)
    elif case.op == "truncated gradient":
        label = (None, None, None) if case.other else (ids, values, present)
        with mock.patch.object(truncated_gradient, "_upstream_sum", return_value=doubles):
            truncated_gradient._launch(rows, other, *label, 0.7, temperatures, found, result)
    elif case.op == "pair statistics":
        pair._launch(rows, other, mask, 0.7, temperatures, pair_support, pair_results)
    elif case.op.endswith("pair gradient"):
        arguments = (pair_support, pair_results, (doubles,) * 4, result if case.op == "pair gradient" else rows)
        pair_gradient._launch(rows, other, 0.7, temperatures, *arguments)
    elif case.op.split()[0] in DIVERGENCES:
        options = (case.op.split()[0], 0.3, 0.05 if case.options else math.inf)
        if case.op.endswith("divergence"):
            known = (doubles, doubles, values, values) if "partial" in case.op else (None,) * 4
            results = (*(doubles,) * 4, values, values)
            divergence._launch(rows, other, mask, 0.7, temperatures, *options, known, results)
        else:
            saved = (*(doubles,) * 3, values, values)
            divergence_gradient._launch(rows, other, 0.7, temperatures, options, saved, doubles, result)
    elif case.op == "reduced rows":
        reduced_row = torch.zeros(TOKENS, support.LISTED + 1)
        arguments = (mask, 0.7, temperatures, (reduced_row, reduced_row, *(values, doubles) * 2))
        reduced._launch(rows, other, found.token_ids, case.options, not case.options, *arguments)
    elif case.op == "reduced gradient":
        upstream = torch.zeros(TOKENS, support.LISTED + 1)
        reduced_gradient._launch(rows, found.token_ids, 0.7, temperatures, (values, doubles), upstream, result)
    elif case.op.startswith("masses"):
        pivots = torch.zeros(TOKENS, int(case.op.split()[-1]))
        results = (pivots.long(), pivots.double(), pivots.double())
        masses._launch(rows, mask, 0.7, temperatures, values, pivots, results)
    elif case.op.endswith("information"):
        known = (doubles, values) if "partial" in case.op else (None, None)
        teachers = torch.zeros(2, *other.shape[:-1], other.stride(0), dtype=other.dtype)[..., : other.shape[-1]]
        information._launch(rows, teachers, mask, 0.7, temperatures, known, (doubles,) * 3)


def launched_by(case: Case) -> tuple[JITFunction, tuple, dict]:
    """The kernel and the arguments that the launcher hands to Triton."""
    launches = []

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        launches.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        launch(case)
    return launches[-1 if case.op == "search" else 0]


def compile_case(case: Case, target: GPUTarget) -> CompiledKernel:
    """The kernel that a launch of this case compiles on this target."""
    with mock.patch.object(layout, "WARP_SIZE", target.warp_size):
        return compile_launch(*launched_by(case), target)


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict, target: GPUTarget) -> CompiledKernel:
    """The kernel that a launch compiles on this target."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def in_loops(lines: list[tuple[int, str]], branches: list[tuple[int, int]]) -> list[str]:
    """The instructions between a backward branch and its target."""
    loops = [(to, at) for at, to in branches if to < at]
    return [text for at, text in lines if any(begin <= at <= end for begin, end in loops)]


def widths(instructions: list[str], pattern: str, sizes: dict[str, int]) -> Counter[int]:
    """How many of the loads or stores that the pattern finds have each size."""
    matches = (re.search(pattern, text) for text in instructions)
    return Counter(sizes[match.group(1) or ""] for match in matches if match)


def read_cuda(kernel: CompiledKernel) -> Report:
    """Registers and SASS by the disassembler in Triton's package."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        options = ("--dump-resource-usage", "--dump-sass")
        usage_text, sass = (subprocess.check_output([tool, option, cubin.name], text=True) for option in options)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage_text)}
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    jumps = ((at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in lines)
    branches = [(at, int(match.group(1), 16)) for at, match in jumps if match]
    texts = [text for _, text in lines]
    access = r"\b{}\.E(?:\.(?!64|128|U16|S16|U8|S8)\w+)*(?:\.(64|128|U16|S16|U8|S8))?\b"
    loads, stores = access.format("LDG"), access.format("STG")
    return Report(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"] + sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in texts),
        shared=kernel.metadata.shared,
        loads=widths(texts, loads, CUDA_WIDTHS),
        stores=widths(texts, stores, CUDA_WIDTHS),
        loop_loads=widths(in_loops(lines, branches), loads, CUDA_WIDTHS),
    )


def read_hip(kernel: CompiledKernel) -> Report:
    """Registers and instructions of the AMD assembly."""
    assembly = kernel.asm["amdgcn"]
    lines = list(enumerate(line.strip() for line in assembly.splitlines()))
    usage = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s", assembly)}
    labels = {match.group(1): at for at, line in lines if (match := re.match(r"(\.L\w+):", line))}
    jumps = ((at, re.match(r"s_c?branch\w*\s+(\.L\w+)", line)) for at, line in lines)
    branches = [(at, labels[match.group(1)]) for at, match in jumps if match]
    texts = [line for _, line in lines]
    access = r"^(?:global|buffer)_{}_(dwordx4|dwordx3|dwordx2|dword|ushort|sshort|short|ubyte|sbyte|byte)"
    loads, stores = access.format("load"), access.format("store")
    return Report(
        registers=usage["vgpr_count"],
        spilled=sum(usage[name] for name in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")),
        shared=kernel.metadata.shared,
        loads=widths(texts, loads, HIP_WIDTHS),
        stores=widths(texts, stores, HIP_WIDTHS),
        loop_loads=widths(in_loops(lines, branches), loads, HIP_WIDTHS),
    )


def faults(case: Case, report: Report) -> list[str]:
    """What must not be: spills anywhere, narrow accesses to aligned rows."""
    found = [f"{report.spilled} bytes or registers spilled"] if report.spilled else []
    if case.rows == "odd":
        return found
    if case.op in ("statistics", "evidence"):
        if set(report.loop_loads) != {16}:
            found.append(f"loads of {sorted(report.loop_loads)} bytes in the row loop, 16 wanted")
        return found
    if case.op not in WIDE_ACCESSES:  # wider, the many lanes of sums and predicates of some would spill
        if not report.loads[8] + report.loads[16]:
            found.append("no loads of 8 bytes")
        return found
    least_loads, least_stores = WIDE_ACCESSES[case.op]
    if report.loads[16] < least_loads or report.stores[16] < least_stores:
        found.append(f"{report.loads[16]} loads and {report.stores[16]} stores of 16 bytes, "
                     f"{least_loads} and {least_stores} needed")  # fmt: skip
    return found


def check(job: tuple[Case, str]) -> tuple[Report, list[str]]:
    """Compile and read one instantiation for one target."""
    case, name = job
    target = TARGETS[name]
    kernel = compile_case(case, target)
    report = read_cuda(kernel) if target.backend == "cuda" else read_hip(kernel)
    return report, faults(case, report)


def show(sizes: Counter[int]) -> str:
    """Such as 16Bx8 4Bx3."""
    return " ".join(f"{size}Bx{count}" for size, count in sorted(sizes.items(), reverse=True)) or "-"


def main() -> int:
    """Compile all, print a line each, count the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be repeated")
    parser.add_argument("--only", default="", help="only instantiations whose name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    arguments = parser.parse_args()
    jobs = [(case, name) for name in arguments.target or TARGETS for case in cases() if arguments.only in str(case)]
    failed = 0
    print(f"{'instantiation':52} {'target':7} {'regs':>4} {'spill':>5} {'shared':>6}  row-loop loads | loads | stores")
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for (case, name), (report, found) in zip(jobs, pool.map(check, jobs), strict=True):
            accesses = " | ".join(map(show, (report.loop_loads, report.loads, report.stores)))
            numbers = f"{report.registers:4} {report.spilled:5} {report.shared:6}"
            print(f"{case!s:52} {name:7} {numbers}  {accesses}", flush=True)
            for fault in found:
                print(f"    FAULT: {fault}")
            failed += bool(found)
    print(f"{len(jobs)} instantiations, {failed} with faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
