"""verl's LM head, unfused and fused by its torch backend, against sdkernels': time, peak memory, error vs float64."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
from verl.utils import torch_functional as verl_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO

import sdkernels.integrations.verl  # noqa: F401  its head is one of FusedLinearForPPO's backends
from benchmarks import report, runner
from benchmarks.harness import DTYPES, add_output_options, output_path
from benchmarks.linear_peers import HeadInputs, head_inputs

TEMPERATURE = 0.8
HEADS = ("verl, unfused", "verl, torch backend", "sdkernels")
RESULTS = ("log_prob", "entropy", "hidden_gradient", "weight_gradient")
COLUMNS = ("upstream of", "head", "median ms", "p20 to p80", "speed", "peak MB", "worst relative error")


class Step(runner.Prepared):
    """Log-probs and entropies of the sampled tokens as verl's engine asks for them, and their backward."""

    def __init__(self, head: str, inputs: HeadInputs, upstream: list[Tensor]) -> None:
        self.head, self.inputs, self.upstream = head, inputs, upstream

    def reset(self) -> None:
        """Free results and gradients."""
        self.output: tuple[Tensor, ...] = ()
        self.leaves = [x.detach().requires_grad_() for x in (self.inputs.student, self.inputs.weight)]

    def run(self) -> None:
        """Forward, and backward from the log-probs, or from entropies as well."""
        found = self.forward(*self.leaves)
        value = sum((x.float() * g).sum() for x, g in zip(found, self.upstream, strict=False))
        value.backward()
        self.output = tuple(x.detach() for x in found)

    def forward(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """What the engine does: unfused it computes the entropy only where it is asked for."""
        ids = self.inputs.token_ids
        if self.head == HEADS[0]:
            logits = hidden @ weight.T / TEMPERATURE
            entropies = (verl_functional.entropy_from_logits(logits),) if len(self.upstream) > 1 else ()
            return verl_functional.logprobs_from_logits(logits, ids, inplace_backward=not entropies), *entropies
        backend = "torch" if self.head == HEADS[1] else "sdkernels"
        return FusedLinearForPPO(impl_backend=backend)(hidden, weight, ids, TEMPERATURE)

    def result(self) -> dict[str, Tensor]:
        """Of the last run; entropies only where a gradient came through them."""
        names = RESULTS[: len(self.upstream)]
        gradients = {name: x.grad for name, x in zip(RESULTS[2:], self.leaves, strict=True)}
        return dict(zip(names, self.output, strict=False)) | gradients


def exactly(inputs: HeadInputs, upstream: list[Tensor], rows: int = 64) -> dict[str, Tensor]:
    """The same in float64, some rows at a time."""
    weight = inputs.weight.double().requires_grad_()
    hidden = inputs.student.double().requires_grad_()
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(hidden), rows):
        some = slice(first, first + rows)
        log_p = log_softmax(hidden[some] @ weight.T / TEMPERATURE, -1)
        both = log_p.gather(-1, inputs.token_ids[some, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        sum((x * g[some]).sum() for x, g in zip(both, upstream, strict=False)).backward()
        parts.append(tuple(x.detach() for x in both))
    return dict(zip(RESULTS, (*map(torch.cat, zip(*parts, strict=True)), hidden.grad, weight.grad), strict=True))


def rows_of(inputs: HeadInputs, seconds: float) -> list[dict]:
    """Every head, with and without a gradient through the entropies, all timed in the same rounds."""
    generator = torch.Generator().manual_seed(1)
    upstreams = torch.randn(2, len(inputs.student), generator=generator)
    rows, steps = [], {}
    for what, count in (("log-probs", 1), ("and entropies", 2)):
        upstream = list(upstreams[:count])
        truth = exactly(inputs, upstream)
        for head in HEADS:
            step = steps[what, head] = Step(head, inputs, upstream)
            peak = runner.peak_memory(step, inputs.student.device)
            errors = {name: float((x.double() - truth[name]).norm() / truth[name].norm())
                      for name, x in step.result().items()}  # fmt: skip
            step.reset()
            rows.append({"upstream": what, "head": head, "peak_bytes": peak, "errors": errors})
    times = runner.interleave(steps, runner.Timer(inputs.student.device), seconds, lambda _: None, fewest=3)
    for row in rows:
        row["seconds"] = runner.quantiles(times[row["upstream"], row["head"]])
        row["speed"] = runner.quantiles(times[row["upstream"], HEADS[1]])[0] / row["seconds"][0]
    return rows


def cells(row: dict) -> tuple[str, ...]:
    """Of the table."""
    median, low, high = (f"{1e3 * second:,.0f}" for second in row["seconds"])
    name, error = max(row["errors"].items(), key=lambda item: item[1])
    times = (median, f"{low} to {high}", f"{row['speed']:.2f}x")
    return (row["upstream"], row["head"], *times, f"{row['peak_bytes'] / 1e6:,.0f}", f"{error:.1e} {name}")


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    for name, default in (("tokens", 256), ("hidden", 256), ("vocab", 151936)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per dtype, at least three rounds")
    add_output_options(parser, plot=False)
    arguments, device = parser.parse_args(), torch.device("cpu")
    results: dict = {"environment": report.environment(device, ("verl", "tensordict"))}
    with report.Screen(len(arguments.dtype)) as screen:
        screen.line("\n".join(f"{name:24}{value}" for name, value in results["environment"].items()))
        for dtype in arguments.dtype:
            inputs = head_inputs(arguments.tokens, arguments.vocab, arguments.hidden, DTYPES[dtype], device)
            results[dtype] = rows_of(inputs, arguments.seconds)
            title = f"{arguments.tokens} tokens, V = {arguments.vocab:,}, H = {arguments.hidden}, {dtype}"
            screen.table(title, COLUMNS, [[cells(row) for row in results[dtype]]], text={*COLUMNS[:2], COLUMNS[-1]})
            screen.advance(1)
    if path := output_path(arguments.json, "verl", device, ".json"):
        report.write_json(path, results)


if __name__ == "__main__":
    main()
