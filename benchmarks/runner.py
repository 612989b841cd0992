"""Runs cases side by side: check against the truth, peak memory, then interleaved timing with a copy as the yardstick.

Every timed run starts with cold caches, and what a case must put back (its gradient freed, logits that it overwrote
restored) happens outside the timed region. A round runs each case once, in an order that rotates, so that a slow moment
of the machine hits all of them; medians over rounds are compared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
FLUSHES = {"cuda": 16, "cpu": 1}  # about 1 ms on a GPU, in which the host can run ahead as it does in training
COPY_BYTES = 128 << 20  # at the least, so that a copy never stays in the caches
FEWEST_ROUNDS = 5
COPY = "copy"


class Unable(Exception):
    """An implementation cannot do the job; the message says why in a few words."""


class Prepared:
    """One implementation on one input, ready to run again and again."""

    def reset(self) -> None:
        """Untimed, before each run: free the last results, restore what a run overwrites."""

    def run(self) -> None:
        """What is timed."""
        raise NotImplementedError

    def result(self) -> dict[str, Tensor]:
        """What the last run gave, under the names that the truth knows."""
        raise NotImplementedError


@dataclass(frozen=True)
class Case:
    """An implementation of an operation.

    `least_sweeps` counts the rows that any implementation must read or write per token, in units of the logits'
    dtype: times its size, the minimal bytes per logits element. `kernel_sweeps` counts what ours move; where that
    depends on the rows, it is a function of the inputs. `setting` is what the truth must know beside the inputs.
    """

    op: str
    name: str
    build: Callable  # of the inputs: a Prepared; may raise Unable or ImportError
    least_sweeps: int
    kernel_sweeps: int | Callable[[Any], float] | None = None
    allowed_error: float = 1.0  # as a multiple of the tolerance
    note: str = ""  # why it is wrong, where it is known to be
    setting: Any = None


@dataclass
class Measurement:
    """A row of the table: where `reason` is set there is no speed."""

    op: str
    name: str
    least_bytes: int  # per logits element
    kernel_bytes: float | None
    errors: dict[str, float] = field(default_factory=dict)  # as multiples of their tolerances
    reason: str = ""
    note: str = ""
    peak_bytes: int | None = None  # beyond the inputs
    logits_bytes: int | None = None  # of one (N, V) tensor, as the gradient is
    seconds: tuple[float, float, float] | None = None  # median, p20, p80
    speedup: float | None = None  # over the baseline of the same operation
    bandwidth: float | None = None  # bytes per second, of the least bytes
    copy_share: float | None = None  # of the measured copy bandwidth, of the least bytes
    kernel_copy_share: float | None = None  # the same of the bytes that the kernels move

    @property
    def worst_error(self) -> tuple[str, float]:
        """The result that is furthest off, and its error as a multiple of its tolerance."""
        return max(self.errors.items(), key=lambda item: item[1])


class Timer:
    """Times one run of a prepared case on a device, with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush_buffer = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)

    def __call__(self, prepared: Prepared) -> float:
        """Seconds."""
        prepared.reset()
        for _ in range(FLUSHES[self.device.type]):
            self.flush_buffer.zero_()
        if self.device.type == "cpu":
            start = time.perf_counter()
            prepared.run()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        prepared.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


class Copy(Prepared):
    """The yardstick: a plain copy of as many bytes as the logits have."""

    def __init__(self, logits: Tensor) -> None:
        size = max(logits.nbytes, COPY_BYTES)
        self.source = torch.ones(size, dtype=torch.uint8, device=logits.device)
        self.target = torch.empty_like(self.source)

    def run(self) -> None:
        """Read and write every byte."""
        self.target.copy_(self.source)


def peak_memory(prepared: Prepared, device: torch.device) -> int:
    """Bytes that a run holds at its peak beyond what was there before: its results, gradient and temporaries.

    On a GPU the caching allocator counts; on a CPU the allocations that torch.profiler records are added up in order.
    """
    prepared.reset()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        prepared.run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler logs each start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        prepared.run()
    held = peak = 0
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def why_not(error: Exception) -> str:
    """An exception in a few words."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.split('.')[0]} is not installed"
    if isinstance(error, Unable):
        return str(error)
    line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {line if len(line) <= 60 else line[:57] + '...'}"


def check(case: Case, inputs: Any, truth: Any, itemsize: int) -> tuple[Measurement, Prepared | None]:
    """Build and run a case once; it comes back prepared only if every result is right."""
    sweeps = case.kernel_sweeps(inputs) if callable(case.kernel_sweeps) else case.kernel_sweeps
    kernel_bytes = sweeps * itemsize if sweeps else None
    measurement = Measurement(case.op, case.name, case.least_sweeps * itemsize, kernel_bytes)
    try:
        prepared = case.build(inputs)
        prepared.reset()
        prepared.run()
        measurement.errors = truth.errors(prepared.result(), case.setting)
    except Exception as error:  # whatever a peer raises belongs into its row
        measurement.reason = why_not(error)
        return measurement, None
    _, worst = measurement.worst_error
    if worst > case.allowed_error:
        measurement.reason = f"wrong: error {worst:,.0f} x"
        measurement.note = case.note
        return measurement, None
    return measurement, prepared


def interleave(
    prepared: dict[str, Prepared],
    timer: Timer,
    seconds: float,
    on_progress: Callable[[float], None],
    fewest: int = FEWEST_ROUNDS,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Rounds of all cases until the time is up: seconds of each run, by key."""
    keys = list(prepared)
    for key in keys if warm_up else ():
        timer(prepared[key])
    times: dict[str, list[float]] = {key: [] for key in keys}
    start, rounds, shown = time.perf_counter(), 0, 0.0
    while rounds < fewest or time.perf_counter() - start < seconds:
        first = rounds % len(keys)
        for key in keys[first:] + keys[:first]:
            times[key].append(timer(prepared[key]))
        rounds += 1
        done = min((time.perf_counter() - start) / max(seconds, 1e-9), rounds / fewest, 1.0)
        on_progress(done - shown)
        shown = done
    on_progress(1.0 - shown)
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist())


def measure(
    cases: list[Case],
    inputs: Any,
    truth: Any,
    logits: Tensor,
    baseline: str,
    seconds: float,
    on_progress: Callable[[float, str], None],
) -> tuple[list[Measurement], float]:
    """Check, then time the cases on one input: a row for each, and the copy bandwidth in bytes per second.

    `truth.errors(result, setting)` gives errors as multiples of their tolerances; speedups are over the case named
    `baseline` of the same operation. Progress counts one per checked case and as many again for the timing.
    """
    rows: list[Measurement] = []
    ready: dict[str, Prepared] = {}
    for case in cases:
        on_progress(0, f"checking {case.op}, {case.name}")
        row, prepared = check(case, inputs, truth, logits.element_size())
        if prepared:
            row.peak_bytes, row.logits_bytes = peak_memory(prepared, logits.device), logits.nbytes
            prepared.reset()
            ready[f"{case.op}, {case.name}"] = prepared
        rows.append(row)
        on_progress(1, "")
    timed = {COPY: Copy(logits), **ready}
    times = interleave(timed, Timer(logits.device), seconds, lambda share: on_progress(share * len(cases), "timing"))
    copy_bandwidth = 2 * timed[COPY].source.nbytes / quantiles(times[COPY])[0]
    medians = {key: quantiles(values)[0] for key, values in times.items()}
    for row in rows:
        key = f"{row.op}, {row.name}"
        if key not in times:
            continue
        row.seconds = quantiles(times[key])
        base = medians.get(f"{row.op}, {baseline}")
        row.speedup = base / row.seconds[0] if base else None
        row.bandwidth = row.least_bytes * logits.numel() / row.seconds[0]
        row.copy_share = row.bandwidth / copy_bandwidth
        if row.kernel_bytes:
            row.kernel_copy_share = row.copy_share * row.kernel_bytes / row.least_bytes
    return rows, copy_bandwidth
