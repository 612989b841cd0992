"""What a run tells: progress, metrics.jsonl, TensorBoard, trackio, tables of completions, and a plot."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from trainers.config import InputError, TrainerConfig
from trainers.processes import barrier, rank

Item = TypeVar("Item")


class Tracker:
    """Writes on the first process only. A context manager.

    On resuming, what was logged after the checkpoint is dropped, so that metrics.jsonl is that of one run.
    """

    def __init__(self, config: TrainerConfig, start: int, shown: Sequence[str]) -> None:
        self.directory = Path(config.output_dir)
        self.shown = shown
        self.silent = rank() != 0
        self.console = Console(quiet=self.silent)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn(), TextColumn("{task.fields[state]}"))  # fmt: skip
        self.progress = Progress(*columns, console=self.console)
        self.task = self.progress.add_task("training", total=config.max_steps, completed=start, state="")
        self.writers: list[Any] = []
        if not self.silent:
            self._truncate(start)
            self.writers = [_WRITERS[name](config, start) for name in config.report_to]

    def __enter__(self) -> "Tracker":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        for writer in self.writers:
            writer.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of the `step`-th step, counted from 1 (0: before the first)."""
        state = "  ".join(f"{name} {metrics[name]:.3g}" for name in self.shown if name in metrics)
        self.progress.update(self.task, completed=step, state=state)
        if self.silent:
            return
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for writer in self.writers:
            writer.log(step, metrics)

    def completions(self, step: int, rows: Sequence[dict[str, Any]], printed: int = 3) -> None:
        """Store sampled completions as completions/step-N.jsonl and print the first few."""
        if self.silent:
            return
        folder = self.directory / "completions"
        folder.mkdir(exist_ok=True)
        write_lines(folder / f"step-{step:06d}.jsonl", rows)
        names = ("prompt", "response", "reference", "reward")
        table = Table(*names, title=f"completions of step {step}", show_lines=True)
        for row in rows[:printed]:
            table.add_row(*(_cell(row[name]) for name in names))
        self.console.print(table)

    def table(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Print rows that have the same keys."""
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*map(_cell, row.values()))
        self.console.print(table)

    def track(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items, with a bar of their own."""
        task = self.progress.add_task(what, total=len(items), state="")
        for item in items:
            yield item
            self.progress.advance(task)
        self.progress.remove_task(task)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text)

    def _truncate(self, start: int) -> None:
        """Keep what was logged up to step `start`; a line that a kill cut short goes too."""
        kept = [row for row in read_metrics(self.directory) if row["step"] <= start] if start else []
        write_lines(self.directory / "metrics.jsonl", kept)
        for old in (self.directory / "completions").glob("step-*.jsonl"):
            if int(old.stem.rsplit("-", 1)[1]) > start:
                old.unlink()


def _cell(value: Any) -> str:
    """What a table shows of a value: its end, where a response has its answer."""
    if isinstance(value, tuple):  # a mean and its standard error
        return " +- ".join(f"{number:.3f}" for number in value)
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 400 else f"... {text[-400:]}"


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that are whole."""
    rows = []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_json(path: Path, value: Any) -> None:
    """Write all of it or nothing."""
    write_lines(path, [value])


def write_lines(path: Path, values: Sequence[Any]) -> None:
    """Write a line of JSON for each value: all of them or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(value) + "\n" for value in values))
    partial.replace(path)


# How and how long a run goes on, not what it computes: options that may be others when it is resumed. (`max_steps` not
# where the learning rate follows it.)
FREE = {
    "output_dir", "resume", "testbed_dir", "max_steps", "save_steps", "save_total_limit", "eval_steps", "leakage_steps",
    "completions_steps", "report_to", "run_name", "fsdp", "head", "gradient_checkpointing", "verifier_workers",
    "verifier_timeout", "per_device_generation_batch_size", "per_device_train_batch_size",
}  # fmt: skip


def open_output(config: TrainerConfig) -> Path:
    """The output directory, made if need be, with config.json in it.

    Raises InputError if it holds a run that is not to be resumed, or is resumed with other options.
    """
    directory = Path(config.output_dir)
    stored = directory / "config.json"
    options = dataclasses.asdict(config)
    results = [*directory.glob("checkpoint-*"), *directory.glob("samples/*.jsonl")]
    if results and not config.resume:
        raise InputError(f"{directory} holds a run; give --resume to go on with it, or another --output_dir")
    if stored.exists() and config.resume:
        before = json.loads(stored.read_text())
        free = FREE if config.lr_scheduler_type == "constant_with_warmup" else FREE - {"max_steps"}
        changed = [name for name, value in options.items() if name not in free and before.get(name) != value]
        if changed:
            raise InputError(
                f"{directory} holds a run with another {', '.join(changed)}; it cannot be resumed with these"
            )
    if rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for partial in directory.glob(".checkpoint-*.partial"):
            shutil.rmtree(partial)
        write_json(stored, options)
    barrier()
    return directory


def plot(directory: Path, names: Sequence[str], title: str) -> Path:
    """A panel per metric that was logged, against steps, as plot.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(directory)
    names = [name for name in names if any(name in row for row in rows)]
    columns = min(3, len(names))
    figure, panels = plt.subplots(
        -(-len(names) // columns), columns, figsize=(4.2 * columns, 2.6 * -(-len(names) // columns)), squeeze=False
    )
    for panel in panels.flat[len(names) :]:
        panel.remove()
    for panel, name in zip(panels.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "")
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.supxlabel("step", fontsize=9)
    figure.tight_layout()
    figure.savefig(directory / "plot.png", dpi=130)
    plt.close(figure)
    return directory / "plot.png"


class _TensorBoard:
    def __init__(self, config: TrainerConfig, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(Path(config.output_dir) / "tensorboard", purge_step=start + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, config: TrainerConfig, start: int) -> None:
        import trackio

        self.trackio = trackio
        name = config.run_name or Path(config.output_dir).name
        trackio.init(project="sdkernels", name=name, config=vars(config), resume="allow" if config.resume else "never")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.trackio.log(metrics, step=step)

    def close(self) -> None:
        self.trackio.finish()


_WRITERS = {"tensorboard": _TensorBoard, "trackio": _Trackio}
