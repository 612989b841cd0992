"""What ms-swift's GRPO asks for log-probs: its own method against sdkernels', forward and backward, with the model."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
from benchmarks import report, runner
from benchmarks.harness import DTYPES, add_output_options, output_path
from benchmarks.inputs import small_model

PROMPT, COMPLETION, TEMPERATURE, ROWS = 8, 64, 0.9, 64  # ROWS of float64 logits at a time
METHODS = {"sdkernels": "get_logps_via_local_forward", "ms-swift": "host_forward"}
COLUMNS = ("tokens", "method", "median s", "p20 to p80", "speed", "peak MB", "log-prob error", "gradient error")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default="float32", help="of the model; default: float32")
    add("--tokens", nargs="+", type=int, default=[256, 512], help=f"multiples of {COMPLETION}; default: 256 512")
    add("--vocab", type=int, default=151936, help="default: 151936")
    add("--hidden", type=int, default=256, help="default: 256")
    add("--seconds", type=float, default=20.0, help="of timing per size; default: 20, at least five rounds")
    add_output_options(parser, plot=False)
    return parser.parse_args()


class Step(runner.Prepared):
    """Log-probs of sampled completions by one of the methods, and the gradient of their weighted sum."""

    def __init__(self, method: Any, model: torch.nn.Module, ids: torch.Tensor, upstream: torch.Tensor) -> None:
        self.method, self.model, self.ids, self.upstream = method, model, ids, upstream
        self.trainer = SimpleNamespace(
            accelerator=SimpleNamespace(unwrap_model=lambda model: model), args=SimpleNamespace(torch_compile=False),
            model_kwarg_keys=("use_cache", "logits_to_keep"), temperature=TEMPERATURE,
            template=SimpleNamespace(padding_free=False),
        )  # fmt: skip

    def reset(self) -> None:
        """Free the gradients."""
        self.model.zero_grad()

    def run(self) -> None:
        """Forward and backward."""
        log_prob, _ = self.method(self.trainer, self.model, {"input_ids": self.ids}, COMPLETION, self.ids)
        (log_prob * self.upstream).sum().backward()
        self.log_prob = log_prob.detach()

    def errors(self) -> dict[str, float]:
        """The largest of log-probs, and the head's gradient's relative to its norm; float64 on the same states."""
        with torch.no_grad():
            hidden = self.model.model(self.ids).last_hidden_state[:, PROMPT - 1 : -1].flatten(0, 1).double()
        weight, ids = self.model.lm_head.weight.detach().double(), self.ids[:, PROMPT:].flatten()
        gradient, worst = torch.zeros_like(weight), 0.0
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            log_p = (hidden[rows] @ weight.T / TEMPERATURE).log_softmax(-1)
            log_prob = log_p.gather(-1, ids[rows, None])
            worst = max(worst, (self.log_prob.flatten()[rows] - log_prob[:, 0]).abs().max().item())
            slope = log_p.exp_().neg_().scatter_add_(-1, ids[rows, None], torch.ones_like(log_prob))
            gradient += (slope * self.upstream.flatten()[rows, None] / TEMPERATURE).T @ hidden[rows]
        relative = (self.model.lm_head.weight.grad - gradient).norm() / gradient.norm()
        return {"log_prob_error": worst, "gradient_error": relative.item()}


def measured(arguments: argparse.Namespace, tokens: int, advance: Any) -> list[dict[str, Any]]:
    """A row per method at one size."""
    from sdkernels.integrations import swift

    model, device = small_model(arguments.vocab, arguments.hidden).to(arguments.device), arguments.device
    prompts = torch.randint(arguments.vocab, (tokens // COMPLETION, PROMPT), device=device)
    ids = model.generate(prompts, do_sample=True, top_k=0, temperature=TEMPERATURE, max_new_tokens=COMPLETION)
    model, upstream = model.to(DTYPES[arguments.dtype]), torch.randn(len(ids), COMPLETION, device=device)
    steps = {name: Step(getattr(swift, method), model, ids, upstream) for name, method in METHODS.items()}
    peaks = {name: runner.peak_memory(step, device) for name, step in steps.items()}
    times = runner.interleave(steps, runner.Timer(device), arguments.seconds, advance)
    seconds, rows = {name: runner.quantiles(of) for name, of in times.items()}, []
    for name, step in steps.items():
        step.reset()
        step.run()
        rows.append({"tokens": tokens, "method": name, "seconds": seconds[name], "peak_bytes": peaks[name],
                     "speed": seconds["ms-swift"][0] / seconds[name][0], **step.errors()})  # fmt: skip
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of the table."""
    median, low, high = (f"{second:.2f}" for second in row["seconds"])
    errors = (f"{row[name]:.1e}" for name in ("log_prob_error", "gradient_error"))
    return (f"{row['tokens']:,}", row["method"], median, f"{low} to {high}", f"{row['speed']:.2f}x",
            f"{row['peak_bytes'] / 1e6:,.0f}", *errors)  # fmt: skip


def main() -> None:
    """Measure, print, and write what was asked for."""
    start, arguments = time.perf_counter(), parse_arguments()
    environment = report.environment(arguments.device, ("ms-swift", "transformers", "trl"))
    with report.Screen(len(arguments.tokens)) as screen:
        screen.line("\n".join(f"{name:24}{value}" for name, value in environment.items()) + "\n")
        rows = [row for tokens in arguments.tokens for row in measured(arguments, tokens, screen.advance)]
        title = f"V = {arguments.vocab:,}, H = {arguments.hidden:,}, {arguments.dtype}, forward + backward"
        screen.table(title, COLUMNS, [list(map(cells, rows))], text={"method"})
        screen.line(f"{time.perf_counter() - start:.0f} s")
    if path := output_path(arguments.json, "swift", arguments.device, ".json"):
        report.write_json(path, {"environment": environment, "vocab": arguments.vocab, "hidden": arguments.hidden,
                                 "dtype": arguments.dtype, "measurements": rows})  # fmt: skip
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
