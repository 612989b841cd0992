"""What the benchmarks share: the command line, the plan, the loop over inputs, and what is written at the end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import inputs as rows_of
from benchmarks import report, runner
from benchmarks.inputs import Inputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORDED = "recorded rollouts"
Numbers = dict[str, dict[str, float]]  # a benchmark's own, by input
Tables = dict[str, list[runner.Measurement]]  # by the input's title


@dataclass(frozen=True)
class Figures:
    """A benchmark's own numbers: what `of` says of float32 inputs, in sections of key: (label, format, remark)."""

    key: str  # in the JSON
    title: str
    of: Callable[[Inputs], dict[str, float]]
    sections: tuple[dict[str, tuple[str, str, str]], ...]

    def show(self, screen: report.Screen, numbers: Numbers) -> None:
        """An input per column."""
        sections = [
            [(label, *(form.format(of_input[key]) for of_input in numbers.values()), remark)
             for key, (label, form, remark) in section.items()]
            for section in self.sections
        ]  # fmt: skip
        screen.table(self.title, ("figure", *numbers, "remark"), sections, text={"figure", "remark"})


@dataclass(frozen=True)
class Benchmark:
    """A headline: its cases, their truth, and what its command line says and defaults to."""

    name: str  # results/NAME_DEVICE.json
    description: str
    guide: str  # below the options in --help
    cases: Callable[[], list[runner.Case]]
    truth: Callable[[Inputs], Any]
    baseline: str
    headline: str  # the operation that is plotted
    figures: Figures
    tokens: tuple[int, int]  # default on a CPU, on a GPU
    example: str  # of --only
    packages: tuple[str, ...]  # whose versions the header names
    conclude: Callable[[report.Screen, torch.device, Tables], None] | None = None  # what is shown last

    def parse_arguments(self) -> argparse.Namespace:
        """The command line."""
        parser = argparse.ArgumentParser(
            description=self.description, epilog=self.guide, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = parser.add_argument
        add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
        add(
            "--dtype",
            nargs="+",
            choices=DTYPES,
            help="of the synthetic logits; default: float32 bfloat16, on a GPU bfloat16",
        )
        add("--tokens", type=int, help=f"synthetic rows; default: {self.tokens[0]}, on a GPU {self.tokens[1]}")
        vocab = list(rows_of.MODELS)
        add("--vocab", nargs="+", type=int, default=vocab, help="vocabulary sizes; default: 151936 128256")
        add("--only", nargs="+", metavar="TEXT", help="keep rows whose input, operation or implementation holds a "
            f"TEXT, e.g. {self.example}; {self.baseline} stays as the yardstick")  # fmt: skip
        add("--seconds", type=float, default=10.0, help="of timing per input; default: 10, at least five rounds")
        add_output_options(parser)
        arguments = parser.parse_args()
        if arguments.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: no CUDA GPU here")
        if (arguments.tokens or 16) < 16 or min(arguments.vocab) < 2 or arguments.seconds < 0:
            parser.error("needs at least 16 tokens, a vocabulary of 2 and 0 seconds")
        arguments.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        gpu = arguments.device.type == "cuda"
        arguments.dtype = arguments.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"])
        arguments.tokens = arguments.tokens or self.tokens[gpu]
        if not self.plan(arguments):
            parser.error(f"--only {' '.join(arguments.only)}: nothing has that in its name")
        return arguments

    def keep(self, cases: list[runner.Case], name: str, only: list[str] | None) -> list[runner.Case]:
        """The cases of an input that --only asks for, and the baseline of each operation that is left."""
        if not only:
            return cases
        texts = [text.lower() for text in only]
        wanted = [case for case in cases if any(text in f"{name}, {case.op}, {case.name}".lower() for text in texts)]
        ops = {case.op for case in wanted}
        return [case for case in cases if case in wanted or (case.op in ops and case.name == self.baseline)]

    def plan(self, arguments: argparse.Namespace) -> dict[str, list[runner.Case]]:
        """The cases to run on each kind of input."""
        names = [RECORDED, *map(rows_of.synthetic_name, arguments.vocab)]
        return {name: cases for name in names if (cases := self.keep(self.cases(), name, arguments.only))}

    def inputs(self, arguments: argparse.Namespace, wanted: Container[str], numbers: Numbers) -> Iterator[Inputs]:
        """Every wanted input in turn; the benchmark's own numbers are taken where the logits are still float32."""
        if RECORDED in wanted:
            inputs = rows_of.recorded_rollouts(arguments.device)
            numbers[inputs.name] = self.figures.of(inputs)
            yield inputs
        for vocab in arguments.vocab:
            if rows_of.synthetic_name(vocab) in wanted:
                inputs = rows_of.synthetic(arguments.tokens, vocab, arguments.device)
                numbers[inputs.name] = self.figures.of(inputs)
                for dtype in arguments.dtype:
                    yield inputs.to(DTYPES[dtype])

    def write(self, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
        """The JSON and the plot, where they were asked for."""
        if path := output_path(arguments.json, self.name, arguments.device, ".json"):
            report.write_json(path, results)
            print(f"wrote {path}")
        if path := output_path(arguments.plot, self.name, arguments.device, ".png"):
            environment, tables = results["environment"], results["measurements"]
            title = f"{environment['device']}, torch {environment['torch']}, {environment['commit']}"
            synthetic = {name: rows for name, rows in tables.items() if not name.startswith("recorded")}
            timed = [row.op for rows in (synthetic or tables).values() for row in rows if row.seconds]
            if not timed:
                print("nothing was timed, so there is nothing to plot")
                return
            op = self.headline if self.headline in timed else timed[0]  # --only may have left it out
            report.write_plot(path, title, op, self.baseline, synthetic or tables)
            print(f"wrote {path}")

    def run(self) -> None:
        """Measure, print, and write what was asked for."""
        start = time.perf_counter()
        arguments = self.parse_arguments()
        cases = self.plan(arguments)
        environment = report.environment(arguments.device, self.packages)
        steps = {name: 2 * len(of_input) * (1 if name == RECORDED else len(arguments.dtype))
                 for name, of_input in cases.items()}  # fmt: skip
        numbers: Numbers = {}
        tables: Tables = {}
        bandwidths: dict[str, float] = {}
        with report.Screen(sum(steps.values())) as screen:
            screen.line("\n".join(f"{name:24}{value}" for name, value in environment.items()) + "\n")
            screen.advance(0, "preparing inputs")
            for inputs in self.inputs(arguments, cases, numbers):
                screen.advance(0, f"{inputs.title}: float64 truth")
                truth, of_input, seconds = self.truth(inputs), cases[inputs.name], arguments.seconds
                rows, bandwidth = runner.measure(
                    of_input, inputs, truth, inputs.student, self.baseline, seconds, screen.advance
                )
                tables[inputs.title], bandwidths[inputs.title] = rows, bandwidth
                report.show_measurements(screen, f"{inputs.title}; copy {bandwidth / 1e9:,.1f} GB/s", rows)
                screen.advance(0, "preparing inputs")
            self.figures.show(screen, numbers)
            if self.conclude:
                self.conclude(screen, arguments.device, tables)
            screen.line(f"{time.perf_counter() - start:.0f} s")
        results = {"environment": environment, "copy_bandwidth": bandwidths}
        self.write(arguments, {**results, self.figures.key: numbers, "measurements": tables})


def add_output_options(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    """--json, and --plot where there is something to plot."""
    options = {"json": "what was measured", **({"plot": "a PNG"} if plot else {})}
    for name, what in options.items():
        parser.add_argument(f"--{name}", nargs="?", type=Path, const=True, metavar="PATH",
                            help=f"write {what}; default: in results/")  # fmt: skip


def output_path(option: Path | bool | None, name: str, device: torch.device, suffix: str) -> Path | None:
    """Where an output option sends its file; None if it was not given."""
    if not option:
        return None
    return report.default_path(name, device, suffix) if option is True else Path(option)
