"""RLSD's loss against what a user would run instead, on recorded rollouts and at real vocabulary sizes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
import sdkernels
from benchmarks import inputs as rows_of
from benchmarks import report, runner
from benchmarks.cases import BASELINE, RLSD_LOSS, rlsd_cases
from benchmarks.inputs import Inputs
from benchmarks.truth import CLIP_RANGE, Truth

Numbers = dict[str, dict[str, float]]  # RLSD's own, by input
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

GUIDE = """
inputs
  recorded rollouts   tokens that a small trained Qwen3 sampled, with the hidden states of student and teacher (see
                      benchmarks/record_rollouts.py). Its vocabulary has 18 tokens, so it is here for RLSD's own numbers
                      and for correctness; its times are call overhead. Always float32.
  Qwen3, Llama 3      synthetic rows with heavy tails and some p(y) near 1, at their vocabulary sizes.

implementations
  eager PyTorch       log_softmax and gather for student and teacher, the official formula, PPO's clip, autograd.
  torch.compile       of the same; compiling is not timed (the first run takes half a minute longer, for its cache).
  chunked eager       the same for a few tokens at a time, each chunk with its own backward.
  TRL log-probs       trl's selective_log_softmax in place of log_softmax and gather, on the logits as they are.
  Liger ... GRPO      with RLSD's token advantages. It takes one advantage per sequence, so it cannot do the job; given
                      one per token it raises nothing and is wrong.

columns
  median ms           of interleaved runs, caches flushed before each; gradients are freed and logits that an in-place
                      backward overwrote are restored outside the timed region. p20 to p80: how far to trust it.
  speedup             of the median over eager PyTorch's, for the same operation (bfloat16: after .float()).
  peak MB             memory beyond the inputs at the worst moment, the gradient included, from a separate run.
  GB/s, % of copy     on the least bytes per logit that any implementation must read or write ("B/logit"); the copy is
                      timed in the same rounds. In brackets: on the bytes that our kernels do move ("ours").
  error / tolerance   the worst of all results, against float64 on the same logits: gradient per row, loss, log-probs,
                      entropies, weights, advantages, each as a multiple of its tolerance. Beyond 1 (for peers: 100)
                      the row says "wrong" and shows no speed.

Out of place a CPU time is half page faults: see the transparent-huge-page line. sdkernels asks for huge pages itself;
PyTorch does with THP_MEM_ALLOC_ENABLE=1, which makes eager PyTorch several times as fast where the mode is "madvise".
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=GUIDE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="of the synthetic logits; default: float32 bfloat16, on a GPU bfloat16",
    )
    add("--tokens", type=int, help="synthetic rows; default: 256, on a GPU 8192")
    add("--vocab", nargs="+", type=int, default=list(rows_of.MODELS), help="vocabulary sizes; default: 151936 128256")
    add("--only", nargs="+", metavar="TEXT", help="keep rows whose input, operation or implementation holds a TEXT, "
        "e.g. recorded, 'token_log_prob, forward', TRL; eager PyTorch stays as the yardstick")  # fmt: skip
    add("--seconds", type=float, default=10.0, help="of timing per input; default: 10, at least five rounds")
    add(
        "--json", nargs="?", type=Path, const=True, metavar="PATH", help="write what was measured; default: in results/"
    )
    add("--plot", nargs="?", type=Path, const=True, metavar="PATH", help="write a PNG; default: in results/")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA GPU here")
    if (arguments.tokens or 16) < 16 or min(arguments.vocab) < 2 or arguments.seconds < 0:
        parser.error("needs at least 16 tokens, a vocabulary of 2 and 0 seconds")
    arguments.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = arguments.device.type == "cuda"
    arguments.dtype = arguments.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    arguments.tokens = arguments.tokens or (8192 if gpu else 256)
    if not plan(arguments):
        parser.error(f"--only {' '.join(arguments.only)}: nothing has that in its name")
    return arguments


def keep(cases: list[runner.Case], name: str, only: list[str] | None) -> list[runner.Case]:
    """The cases of an input that --only asks for, and the baseline of each operation that is left."""
    if not only:
        return cases
    wanted = [case for case in cases if any(text.lower() in f"{name}, {case.op}, {case.name}".lower() for text in only)]
    ops = {case.op for case in wanted}
    return [case for case in cases if case in wanted or (case.op in ops and case.name == BASELINE)]


def plan(arguments: argparse.Namespace) -> dict[str, list[runner.Case]]:
    """The cases to run on each kind of input."""
    names = ["recorded rollouts", *map(rows_of.synthetic_name, arguments.vocab)]
    return {name: cases for name in names if (cases := keep(rlsd_cases(), name, arguments.only))}


def all_inputs(arguments: argparse.Namespace, wanted: Container[str], numbers: Numbers) -> Iterator[Inputs]:
    """Every wanted input in turn; RLSD's own numbers are taken where the logits are still float32."""
    if "recorded rollouts" in wanted:
        inputs = rows_of.recorded_rollouts(arguments.device)
        numbers[inputs.name] = rlsd_numbers(inputs)
        yield inputs
    for vocab in arguments.vocab:
        if rows_of.synthetic_name(vocab) in wanted:
            inputs = rows_of.synthetic(arguments.tokens, vocab, arguments.device)
            numbers[inputs.name] = rlsd_numbers(inputs)
            for dtype in arguments.dtype:
                yield inputs.to(DTYPES[dtype])


def rlsd_numbers(inputs: Inputs) -> dict[str, float]:
    """How the evidence ratio behaves on float32 logits, and what rounding them to bfloat16 does to it."""
    arguments = inputs.token_ids, inputs.advantages, inputs.old_log_prob
    with torch.no_grad():
        exact = sdkernels.rlsd_loss(inputs.student, inputs.teacher, *arguments, clip_range=CLIP_RANGE)
        rounded = sdkernels.rlsd_loss(
            inputs.student.bfloat16(), inputs.teacher.bfloat16(), *arguments, clip_range=CLIP_RANGE
        )
    metrics = sdkernels.rlsd_metrics(exact, clip_range=CLIP_RANGE)
    clipped = [(x.weight > 1 + CLIP_RANGE).int() - (x.weight < 1 - CLIP_RANGE).int() for x in (exact, rounded)]
    gain, rounded_gain = exact.information_gain, rounded.information_gain
    return {
        "tokens": len(inputs.token_ids),
        "pass_rate": float(inputs.rewards.mean()),
        "tokens_with_advantage": float((inputs.advantages != 0).float().mean()),
        "evidence_clipped_below": float(metrics["evidence_clipped_below"]),
        "evidence_clipped_above": float(metrics["evidence_clipped_above"]),
        "information_gain_abs": float(metrics["information_gain_abs"]),
        "entropy": float(metrics["entropy"]),
        "bfloat16_gain_error_rms": float((rounded_gain - gain).square().mean().sqrt()),
        "bfloat16_sign_flips": float((rounded_gain.sign() != gain.sign()).float().mean()),
        "bfloat16_clip_changes": float((clipped[0] != clipped[1]).float().mean()),
    }


NUMBERS = {
    "tokens": ("tokens", "{:,}"),
    "pass_rate": ("pass rate", "{:.1%}"),
    "tokens_with_advantage": ("tokens with A != 0", "{:.1%}"),
    "evidence_clipped_below": ("clipped, w < 0.8", "{:.1%}"),
    "evidence_clipped_above": ("clipped, w > 1.2", "{:.1%}"),
    "information_gain_abs": ("mean |Delta|, nats", "{:.3f}"),
    "entropy": ("mean entropy, nats", "{:.3f}"),
    "bfloat16_gain_error_rms": ("bfloat16: rms error of Delta", "{:.4f}"),
    "bfloat16_sign_flips": ("bfloat16: sign of Delta flips", "{:.1%}"),
    "bfloat16_clip_changes": ("bfloat16: clip decision changes", "{:.1%}"),
}


def show_numbers(screen: report.Screen, numbers: Numbers) -> None:
    """RLSD's own numbers, an input per column."""
    remarks = {
        "evidence_clipped_above": "both: 3 to 6% in the paper's runs",
        "bfloat16_sign_flips": "so keep logits in float32",
    }
    rows = [
        (label, *(form.format(values[key]) for values in numbers.values()), remarks.get(key, ""))
        for key, (label, form) in NUMBERS.items()
    ]
    columns = ("figure", *numbers, "remark")
    screen.table("RLSD's own numbers", columns, [rows[:3], rows[3:7], rows[7:]], text={"figure", "remark"})


def write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """The JSON and the plot, where they were asked for."""

    def path(option: Path | bool, suffix: str) -> Path:
        return report.default_path("rlsd_loss", arguments.device, suffix) if option is True else Path(option)

    if arguments.json:
        report.write_json(path(arguments.json, ".json"), results)
        print(f"wrote {path(arguments.json, '.json')}")
    if arguments.plot:
        environment, tables = results["environment"], results["measurements"]
        title = f"{environment['device']}, torch {environment['torch']}, {environment['commit']}"
        synthetic = {name: rows for name, rows in tables.items() if not name.startswith("recorded")}
        report.write_plot(path(arguments.plot, ".png"), title, RLSD_LOSS, BASELINE, synthetic or tables)
        print(f"wrote {path(arguments.plot, '.png')}")


def main() -> None:
    """Measure, print, and write what was asked for."""
    start = time.perf_counter()
    arguments = parse_arguments()
    cases = plan(arguments)
    environment = report.environment(arguments.device)
    steps = {name: 2 * len(of_input) * (1 if name.startswith("recorded") else len(arguments.dtype))
             for name, of_input in cases.items()}  # fmt: skip
    numbers: Numbers = {}
    tables: dict[str, list[runner.Measurement]] = {}
    bandwidths: dict[str, float] = {}
    with report.Screen(sum(steps.values())) as screen:
        screen.line("\n".join(f"{name:24}{value}" for name, value in environment.items()) + "\n")
        screen.advance(0, "preparing inputs")
        for inputs in all_inputs(arguments, cases, numbers):
            screen.advance(0, f"{inputs.title}: float64 truth")
            rows, bandwidth = runner.measure(
                cases[inputs.name], inputs, Truth(inputs), inputs.student, BASELINE, arguments.seconds, screen.advance
            )
            tables[inputs.title], bandwidths[inputs.title] = rows, bandwidth
            report.show_measurements(screen, f"{inputs.title}; copy {bandwidth / 1e9:,.1f} GB/s", rows)
            screen.advance(0, "preparing inputs")
        show_numbers(screen, numbers)
        screen.line(f"{time.perf_counter() - start:.0f} s")
    write(
        arguments,
        {"environment": environment, "copy_bandwidth": bandwidths, "rlsd": numbers, "measurements": tables},
    )


if __name__ == "__main__":
    main()
