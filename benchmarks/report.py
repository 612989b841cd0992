"""What a benchmark shows: a progress bar, tables, a header that says where it ran, and on request JSON and a plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import Measurement

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:  # plain text then
    Console = None

RESULTS = Path(__file__).parent / "results"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NARROWEST = 140  # columns where the output is no terminal


class Screen:
    """Prints lines and tables, above a progress bar where rich is installed; else as plain text without a bar."""

    def __init__(self, total: float) -> None:
        self.progress = None
        if Console:
            console = Console() if sys.stdout.isatty() else Console(width=NARROWEST)
            columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, console=console, transient=True)
            self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> Screen:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress:
            self.progress.stop()

    def advance(self, steps: float, doing: str = "") -> None:
        """Move the bar, and say what is being done."""
        if self.progress:
            self.progress.update(self.task, advance=steps, **({"description": doing} if doing else {}))

    def line(self, text: str) -> None:
        """Print a line."""
        if self.progress:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            print(text)

    def table(
        self, title: str, columns: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], text: set[str]
    ) -> None:
        """Print rows of cells, sections apart; columns named in `text` align left, the others right."""
        if not self.progress:
            rows = [columns, *(row for section in sections for row in section)]
            widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
            print(title, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), sep="\n", end="\n\n")
            return
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="left" if column in text else "right", no_wrap=column not in text)
        for section in sections:
            for row in section:
                table.add_row(*row)
            table.add_section()
        self.progress.console.print(table)


def _output(*command: str) -> str:
    """First line that a command prints, "unknown" if it cannot run."""
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if result.returncode == 0 and lines else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _processor() -> str:
    """The CPU's name."""
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def environment(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    found: dict[str, Any] = {}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda
    else:
        found["device"] = _processor()
        found["threads"] = torch.get_num_threads()
        if HUGE_PAGES.exists():
            mode = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
            found["transparent huge pages"] = mode[1] if mode else "unknown"
            hint = "unset, so PyTorch's own tensors get none; see --help" if mode and mode[1] == "madvise" else "unset"
            found["THP_MEM_ALLOC_ENABLE"] = os.environ.get("THP_MEM_ALLOC_ENABLE", hint)
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    found |= {package: _version(package) for package in packages}
    found["commit"] = _output("git", "describe", "--always", "--tags", "--dirty")
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found


def _significant(value: float, digits: int = 3) -> str:
    """A positive number with three digits: 0.0123, 1.23, 12.3, 1,230."""
    decimals = max(digits - len(str(int(value))), 0) if value >= 1 else digits
    return f"{value:,.{decimals}f}"


COLUMNS = (
    "operation",
    "implementation",
    "median ms",
    "p20 to p80",
    "speedup",
    "peak MB",
    "GB/s",
    "% of copy",
    "error / tolerance",
)


def measurement_cells(row: Measurement) -> tuple[str, ...]:
    """A row of the table of measurements; without a speed the last cell says why."""
    if row.seconds is None:
        return (row.name, *[""] * 6, row.reason)
    median, low, high = (_significant(1e3 * second) for second in row.seconds)
    return (
        row.name,
        median,
        f"{low} to {high}",
        f"{row.speedup:.2f}x" if row.speedup else "",
        f"{row.peak_bytes / 1e6:,.1f}",
        f"{row.bandwidth / 1e9:,.1f}",
        f"{100 * row.copy_share:.0f}" + (f" ({100 * row.kernel_copy_share:.0f})" if row.kernel_copy_share else ""),
        f"{row.worst_error[1]:.2g} {row.worst_error[0].replace('_', ' ')}",
    )


def show_measurements(screen: Screen, title: str, rows: Sequence[Measurement]) -> None:
    """One table per input, a section per operation; the operation's name and bytes run down its first column."""
    sections = []
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        kernel = next((f", ours {row.kernel_bytes:.3g}" for row in of_op if row.kernel_bytes), "")
        label = [*op.split(", "), f"{of_op[0].least_bytes} B/logit{kernel}"]
        cells = [measurement_cells(row) for row in of_op]
        blank = ("",) * (len(COLUMNS) - 1)
        sections.append([(name or "", *(row or blank)) for name, row in zip_longest(label, cells)])
    screen.table(title, COLUMNS, sections, text={"operation", "implementation", "error / tolerance"})
    for note in dict.fromkeys(row.note for row in rows if row.note):
        screen.line(f"  {note}\n")


def default_path(name: str, device: torch.device, suffix: str) -> Path:
    """Where results go unless told: results/NAME_DEVICE.suffix."""
    kind = "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower())
    return RESULTS / f"{name}_{kind}{suffix}"


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Everything that was measured, rows as dictionaries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=asdict) + "\n")


@contextmanager
def figure(path: Path, columns: int, size: tuple[float, float], **options: Any) -> Iterator[tuple[Any, Any]]:
    """A row of axes to plot on, and their figure, which is written to `path` in the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, columns, figsize=size, layout="constrained", **options)
    yield drawn, axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def write_plot(path: Path, title: str, op: str, baseline: str, tables: dict[str, list[Measurement]]) -> None:
    """For one operation: speedup over the baseline, and share of the copy bandwidth, a colour for each input."""
    from matplotlib import colormaps

    groups = {name: [row for row in rows if row.op == op and row.seconds] for name, rows in tables.items()}
    groups = {name: rows for name, rows in groups.items() if rows}
    names = list(dict.fromkeys(row.name for rows in groups.values() for row in rows))
    panels = {
        f"speedup over {baseline}": lambda row: row.speedup or float("nan"),
        "% of copy bandwidth, on the least bytes": lambda row: 100 * row.copy_share,
    }
    size = (12, 1.8 + 0.16 * (len(groups) + 1) * len(names))
    with figure(path, 2, size, sharey=True) as (drawn, axes):
        height = 0.8 / len(groups)
        for axis, (label, value) in zip(axes, panels.items(), strict=True):
            for i, (name, rows) in enumerate(groups.items()):
                at = [names.index(row.name) + (i - (len(groups) - 1) / 2) * height for row in rows]
                bars = axis.barh(at, [value(row) for row in rows], height, label=name, color=colormaps["tab20c"](i))
                axis.bar_label(bars, fmt="%.1f" if axis is axes[0] else "%.0f", padding=2, fontsize=7)
            axis.axvline(1 if axis is axes[0] else 100, color="0.4", linewidth=0.8, linestyle="--")
            axis.set_xlabel(label)
            axis.margins(x=0.08)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        drawn.legend(
            *axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2
        )
        drawn.suptitle(f"{op}\n{title}", fontsize=10)
