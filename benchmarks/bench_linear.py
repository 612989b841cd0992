"""Losses from hidden states with the LM head fused in: peak memory and time against tokens and vocabulary."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
from benchmarks import report, runner
from benchmarks.harness import DTYPES, add_output_options, output_path
from benchmarks.inputs import GROUP_SIZE
from benchmarks.linear_peers import LOGITS, OURS, RLSD, TRL, LinearCase, Step, head_inputs, linear_cases
from benchmarks.linear_truth import (
    H200_FLOPS,
    LARGE,
    LinearTruth,
    Matmuls,
    delta_numbers,
    free_bytes,
    large_step,
    peak_memory,
)

TOKENS = ([256, 512, 1536], [1024, 4096, 16384, 65536])  # default on a CPU, on a GPU
VOCABS = ([151936, 65536], [151936, 128256])
HIDDEN = (256, 4096)
CHECKED = 64  # tokens that are compared with float64
DELTA_TOKENS = 256
SPARE = 4 << 30  # bytes that stay free
ROUNDS = 3  # at the least
REQUIRED_TOKENS, REQUIRED_HIDDEN = 512, (64, 256, 1024)
ASKED = 3.0  # times as fast as TRL's
MATMULS = "matmuls"

GUIDE = f"""
operations, forward + backward to hidden states and weight
  rlsd_loss           student with gradient, teacher without, the same head; per-token evidence weights.
  jsd, grpo_loss      OPSD's JSD of student and teacher; GRPO with one advantage per sequence. On a CPU at the smallest
                      --tokens only.

implementations
  sdkernels linear    linear_rlsd_loss, linear_opsd_loss, linear_grpo_loss.
  logits version      a matmul into float32 logits, and rlsd_loss, opsd_loss, grpo_loss of them (in place where it can).
  eager PyTorch       the formulas on log_softmax of such logits, autograd.
  TRL fused head      ChunkedLogProbFunction and the formula on its log-probs; ChunkedDivergenceFunction.
  Liger chunked ...   LigerFusedLinearJSDLoss, LigerFusedLinearGRPOLoss, not compiled.
  cut-cross-entropy   its log-probs, likewise; GPU only.

columns
  matmuls             of tokens x H x V: forward, teacher and backward, those made again in backward included.
  median ms           of interleaved runs with cold caches, for --seconds, at least {ROUNDS}; gradients freed untimed.
  speed               over the logits version's.
  at matmul rate      the share of the time that as many matmuls take alone, timed in the same rounds (CPU: float32).
  peak MB             beyond the inputs, both gradients included. On a GPU the allocator's; on a CPU the resident memory
                      of a process of its own. What would not leave {SPARE >> 30} GiB free is not run.
  error / tolerance   the worst result of {CHECKED} tokens against float64 on the same hidden states and weight.
                      Beyond 1 (for peers: 100) the row says "wrong" and shows no speed.

defaults on a CPU: H {HIDDEN[0]}, V {VOCABS[0]}, tokens {TOKENS[0]}, float32, 6 to 7 minutes on two cores;
on a GPU: H {HIDDEN[1]}, V {VOCABS[1]}, tokens {TOKENS[1]}, bfloat16.
"""
COLUMNS = ("operation", "implementation", "matmuls", "median ms", "p20 to p80", "speed", "at matmul rate", "peak MB",
           "error / tolerance")  # fmt: skip


@dataclass
class Row:
    """One implementation at one size; where `reason` is set something is missing."""

    op: str
    name: str
    tokens: int
    vocab: int
    hidden: int
    dtype: str
    matmuls: int
    errors: dict[str, float] = field(default_factory=dict)  # as multiples of their tolerances
    reason: str = ""
    peak_bytes: int | None = None
    seconds: tuple[float, float, float] | None = None  # median, p20, p80
    rounds: int = 0
    speed: float | None = None  # over the logits version's
    matmul_share: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Of the table."""
        peak = f"{self.peak_bytes / 1e6:,.0f}" if self.peak_bytes else ""
        if self.seconds is None:
            return (self.name, str(self.matmuls), *[""] * 4, peak, self.reason)
        median, low, high = (f"{1e3 * second:,.{0 if second >= 0.1 else 2}f}" for second in self.seconds)
        worst, error = max(self.errors.items(), key=lambda item: item[1])
        speed = f"{self.speed:.2f}x" if self.speed else ""
        rates = (median, f"{low} to {high}", speed, f"{self.matmul_share:.0%}")
        return (self.name, str(self.matmuls), *rates, peak, f"{error:.2g} {worst.replace('_', ' ')}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=GUIDE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--dtype", nargs="+", choices=DTYPES, help="of hidden states and weight; default: float32, on a GPU bfloat16")
    add("--tokens", nargs="+", type=int, help=f"multiples of {GROUP_SIZE}; default: see below")
    add("--vocab", nargs="+", type=int, help="vocabulary sizes; the first is plotted")
    add("--hidden", type=int, help="size of the hidden states")
    add("--only", nargs="+", metavar="TEXT", help="keep rows whose operation or implementation holds a TEXT, e.g. "
        f"jsd, TRL; {LOGITS} stays as the yardstick")  # fmt: skip
    add("--seconds", type=float, default=10.0, help=f"of timing per size; default: 10, at least {ROUNDS} rounds")
    add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA GPU here")
    arguments.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = arguments.device.type == "cuda"
    arguments.dtype = arguments.dtype or ["bfloat16" if gpu else "float32"]
    arguments.tokens = sorted(arguments.tokens or TOKENS[gpu])
    arguments.vocab, arguments.hidden = arguments.vocab or VOCABS[gpu], arguments.hidden or HIDDEN[gpu]
    if any(tokens < 16 or tokens % GROUP_SIZE for tokens in arguments.tokens):
        parser.error(f"--tokens: multiples of {GROUP_SIZE}, at least 16")
    if min(arguments.vocab) < 2 or arguments.hidden < 1 or arguments.seconds < 0:
        parser.error("needs a vocabulary of 2, hidden states of 1 and 0 seconds")
    arguments.cases = kept(arguments.only)
    if not arguments.cases:
        parser.error(f"--only {' '.join(arguments.only)}: nothing has that in its name")
    return arguments


def kept(only: list[str] | None) -> list[LinearCase]:
    """The cases that --only asks for, and their yardstick."""
    cases = linear_cases()
    if not only:
        return cases
    texts = [text.lower() for text in only]
    wanted = [case for case in cases if any(text in f"{case.op}, {case.name}".lower() for text in texts)]
    ops = {case.op for case in wanted}
    return [case for case in cases if case in wanted or (case.op in ops and case.name == LOGITS)]


class Measuring:
    """One vocabulary size and dtype."""

    def __init__(self, screen: report.Screen, arguments: argparse.Namespace, vocab: int, dtype: str) -> None:
        self.screen, self.arguments, self.vocab, self.dtype = screen, arguments, vocab, dtype

    def checked(self, op: str) -> dict[str, Row]:
        """A row per case of an operation, with its errors; those that are wrong or cannot run have a reason."""
        arguments, of_op = self.arguments, [case for case in self.arguments.cases if case.op == op]
        self.screen.advance(0, f"{op}: float64 truth")
        inputs = head_inputs(CHECKED, self.vocab, arguments.hidden, DTYPES[self.dtype], arguments.device)
        truth, rows = LinearTruth(inputs, op), {}
        for case in of_op:
            row = Row(op, case.name, 0, self.vocab, arguments.hidden, self.dtype, case.matmuls)
            step = Step(inputs, case.loss)
            try:
                step.reset()
                step.run()
                row.errors = truth.errors(step.result())
            except Exception as error:  # whatever a peer raises belongs into its row
                row.reason = runner.why_not(error)
            worst = max(row.errors.values(), default=0.0)
            if worst > case.allowed_error:
                row.reason = f"wrong: error {worst:,.0f} x"
            rows[case.name] = row
            self.screen.advance(1, f"checked {op}, {case.name}")
        return rows

    def measured(self, op: str, tokens: int, checked: dict[str, Row], cases: list[LinearCase], hidden: int,
                 memory: bool = True) -> tuple[list[Row], float]:  # fmt: skip
        """Rows at a number of tokens, and the seconds of one matmul of that size."""
        device, sizes = self.arguments.device, (tokens, self.vocab, hidden)
        inputs = head_inputs(tokens, self.vocab, hidden, DTYPES[self.dtype], device)
        rows, ready = [], {MATMULS: Matmuls(inputs)}
        for case in cases:
            row = Row(**{**vars(checked[case.name]), "tokens": tokens, "hidden": hidden})
            rows.append(row)
            self.screen.advance(0, f"{op}, {tokens:,} tokens, {case.name}: memory")
            needs, free = case.estimate(*sizes), free_bytes(device) - SPARE
            if not row.reason and needs > free:
                row.reason = f"needs about {needs / 1e9:.0f} GB, {max(free, 0) / 1e9:.0f} are free"
            if not row.reason:
                step = Step(inputs, case.loss)
                try:
                    row.peak_bytes = peak_memory(case, step, sizes) if memory else None
                    ready[case.name] = step
                except Exception as error:
                    row.reason = runner.why_not(error)
            self.screen.advance(1)
        times = runner.interleave(
            ready, runner.Timer(device), self.arguments.seconds,
            lambda share: self.screen.advance(share * len(cases), f"{op}, {tokens:,} tokens: timing"),
            ROUNDS, warm_up=device.type == "cuda",
        )  # fmt: skip
        matmul = runner.quantiles(times[MATMULS])[0] / 3 * tokens / ready[MATMULS].rows
        for row in rows:
            if row.name in times:
                row.seconds, row.rounds = runner.quantiles(times[row.name]), len(times[row.name])
                row.matmul_share = row.matmuls * matmul / row.seconds[0]
                if LOGITS in times:
                    row.speed = runner.quantiles(times[LOGITS])[0] / row.seconds[0]
        return rows, matmul

    def sizes(self, op: str) -> list[int]:
        """The numbers of tokens at which an operation is run."""
        tokens = self.arguments.tokens
        return tokens if op == RLSD or self.arguments.device.type == "cuda" else tokens[:1]

    def run(self) -> list[Row]:
        """All operations at all sizes, shown."""
        rows: list[Row] = []
        sections = []
        for op in dict.fromkeys(case.op for case in self.arguments.cases):
            checked = self.checked(op)
            cases = [case for case in self.arguments.cases if case.op == op]
            for tokens in self.sizes(op):
                found, _ = self.measured(op, tokens, checked, cases, self.arguments.hidden)
                rows += found
                label = [op, f"{tokens:,} tokens"] + [""] * len(found)
                sections.append([(name, *row.cells()) for name, row in zip(label, found, strict=False)])
        title = f"V = {self.vocab:,}, H = {self.arguments.hidden:,}, {self.dtype}"
        self.screen.table(title, COLUMNS, sections, text={"operation", "implementation", "error / tolerance"})
        wrong = {row.name for row in rows if row.reason.startswith("wrong")}
        for note in dict.fromkeys(case.note for case in self.arguments.cases if case.note and case.name in wrong):
            self.screen.line(f"  {note}\n")
        return rows


def show_delta(screen: report.Screen, arguments: argparse.Namespace) -> dict[str, Any]:
    """The accuracy of Delta on bfloat16 hidden states."""
    vocab = arguments.vocab[0]
    inputs = head_inputs(DELTA_TOKENS, vocab, arguments.hidden, torch.bfloat16, arguments.device)
    numbers = delta_numbers(inputs)
    rows = [
        (name, f"{found['rms']:.2g}", f"{found['max']:.2g}", f"{found['flips']:.1%}" if "flips" in found else "")
        for name, found in numbers.items()
    ]
    title = (f"Delta = log P_T - log P_S of {DELTA_TOKENS} tokens, bfloat16 hidden states and weight, V = {vocab:,}: "
             "error in nats against float64")  # fmt: skip
    screen.table(title, ("", "rms", "max", "sign flips"), [rows[:1], rows[1:]], text={""})
    return numbers


def show_large_step(screen: report.Screen) -> dict[str, Any]:
    """What a large step needs, by term."""
    numbers = large_step()
    rows = [(name, *(f"{value / 2**30:,.2f}" if value else "" for value in of)) for name, of in
            numbers["bytes"].items()]  # fmt: skip
    total = [sum(of) / 2**30 for of in zip(*numbers["bytes"].values(), strict=True)]
    tokens, vocab, hidden = LARGE
    title = f"rlsd_loss of {tokens:,} tokens, V = {vocab:,}, H = {hidden:,}, bfloat16, on a GPU: GiB, computed"
    columns = ("term", "logits version: forward", "backward", f"{OURS}: forward", "backward")
    screen.table(title, columns, [rows, [("all", *(f"{value:,.2f}" for value in total))]], text={"term"})
    screen.line(f"  4 matmuls either way: {numbers['flops'] / 1e12:,.0f} TFLOP, at least "
                f"{1e3 * numbers['floor_seconds']:,.0f} ms at an H200's {H200_FLOPS / 1e12:.0f} TFLOP/s\n")  # fmt: skip
    return numbers


def show_required(screen: report.Screen, arguments: argparse.Namespace, rows: list[Row]) -> list[dict[str, Any]]:
    """On a CPU: at least as fast as the logits version; TRL's time over ours, and how much of ours are matmuls."""
    cases = [case for case in linear_cases() if case.op == RLSD and case.name in (OURS, LOGITS, TRL)]
    measuring = Measuring(screen, arguments, arguments.vocab[0], "float32")
    missing = {row.name: row.reason for row in rows if row.op == RLSD and not row.errors}
    cells, numbers = [], []
    for hidden in REQUIRED_HIDDEN:
        checked = {case.name: Row(RLSD, case.name, 0, measuring.vocab, hidden, "float32", case.matmuls,
                                  reason=missing.get(case.name, "")) for case in cases}  # fmt: skip
        found, matmul = measuring.measured(RLSD, REQUIRED_TOKENS, checked, cases, hidden, memory=False)
        ours, logits, trl = (row.seconds[0] if row.seconds else float("nan") for row in found)
        numbers.append({"hidden": hidden, OURS: ours, LOGITS: logits, TRL: trl, "4 matmuls": 4 * matmul})
        cells.append((f"{hidden:,}", *(f"{1e3 * x:,.0f}" for x in (ours, logits)), "yes" if ours <= logits else "NO",
                      f"{1e3 * trl:,.0f}", f"{trl / ours:.2f}x", "yes" if trl >= ASKED * ours else "NO",
                      f"{4e3 * matmul:,.0f}", f"{4 * matmul / ours:.0%}"))  # fmt: skip
    columns = ("H", "ours, ms", "logits version", "as fast", TRL, "its time / ours", f">= {ASKED:.0f}x",
               "4 matmuls, ms", "share of ours")  # fmt: skip
    title = f"Required of linear_rlsd_loss on a CPU: {REQUIRED_TOKENS} tokens, V = {measuring.vocab:,}, float32"
    screen.table(title, columns, [cells], text=set())
    speeds = [row.speed for row in rows if row.op == RLSD and row.name == OURS and row.speed]
    if speeds:
        met = "yes" if min(speeds) >= 1 else "NO"
        screen.line(f"  as fast as the logits version at every size above: {met}, {min(speeds):.2f}x at the least\n")
    return numbers


def write_plot(path: Path, title: str, rows: list[Row]) -> None:
    """Peak memory and time against tokens, a line per implementation."""
    names = list(dict.fromkeys(row.name for row in rows if row.peak_bytes or row.seconds))
    panels = {
        "peak memory beyond the inputs, GB": lambda row: row.peak_bytes and row.peak_bytes / 1e9,
        "forward + backward, s": lambda row: row.seconds and row.seconds[0],
    }
    with report.figure(path, 2, (11, 4.5)) as (drawn, axes):
        for axis, (label, value) in zip(axes, panels.items(), strict=True):
            for name in names:
                at = [(row.tokens, y) for row in rows if row.name == name and (y := value(row))]
                if at:
                    axis.loglog(*zip(*at, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1.3)
            ticks = sorted({row.tokens for row in rows})
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.minorticks_off()
            axis.set_xlabel("tokens")
            axis.set_ylabel(label)
        axes[0].legend(frameon=False, fontsize=8)
        drawn.suptitle(title, fontsize=10)


def main() -> None:
    """Measure, print, and write what was asked for."""
    start, arguments = time.perf_counter(), parse_arguments()
    environment = report.environment(arguments.device, ("triton", "trl", "liger-kernel", "cut-cross-entropy"))
    pairs = [(vocab, dtype) for vocab in arguments.vocab for dtype in arguments.dtype]
    cpu = arguments.device.type == "cpu"
    required = cpu and not arguments.only
    one = Measuring(report.Screen(0), arguments, arguments.vocab[0], arguments.dtype[0])
    steps = sum(1 + 2 * len(one.sizes(case.op)) for case in arguments.cases) * len(pairs)
    rows: list[Row] = []
    with report.Screen(steps + 6 * len(REQUIRED_HIDDEN) * required) as screen:
        screen.line("\n".join(f"{name:24}{value}" for name, value in environment.items()) + "\n")
        for vocab, dtype in pairs:
            rows += Measuring(screen, arguments, vocab, dtype).run()
        results: dict[str, Any] = {"environment": environment, "measurements": [asdict(row) for row in rows]}
        results["delta"] = show_delta(screen, arguments)
        results["large_step"] = show_large_step(screen)
        if required:
            results["required"] = show_required(screen, arguments, rows)
        screen.line(f"{time.perf_counter() - start:.0f} s")
    if path := output_path(arguments.json, "linear", arguments.device, ".json"):
        report.write_json(path, results)
        print(f"wrote {path}")
    if path := output_path(arguments.plot, "linear", arguments.device, ".png"):
        op = RLSD if any(row.op == RLSD for row in rows) else rows[0].op
        vocab, dtype = pairs[0]
        title = (f"{op}, V = {vocab:,}, H = {arguments.hidden:,}, {dtype}\n"
                 f"{environment['device']}, torch {environment['torch']}, {environment['commit']}")  # fmt: skip
        write_plot(path, title, [row for row in rows if (row.op, row.vocab, row.dtype) == (op, vocab, dtype)])
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
