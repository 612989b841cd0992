"""Losses of TRL's trainers and of sdkernels' in their place: time, peak memory and error, forward and backward."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
os.environ["HF_HUB_OFFLINE"] = "1"
from benchmarks import report, runner
from benchmarks.harness import add_output_options, output_path
from benchmarks.inputs import small_model

PROMPT, COMPLETION, EPSILON, JSD = 8, 64, 0.2, 0.5
ROWS = 64  # of float64 logits at a time
COLUMNS = ("loss", "trainer", "median s", "p20 to p80", "speed", "peak MB", "loss error", "gradient error")
Batch = dict[str, Tensor]


def batch_of(tokens: int, vocab: int) -> Batch:
    """Completions of random tokens, and what the losses need beside them."""
    rows = tokens // COMPLETION
    ids = torch.randint(2, vocab, (rows, PROMPT + COMPLETION))
    teacher = torch.cat((torch.randint(2, vocab, (rows, PROMPT)), ids), 1)
    return {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
        "completion_ids": ids[:, PROMPT:], "completion_mask": torch.ones_like(ids[:, PROMPT:]),
        "teacher_input_ids": teacher, "teacher_attention_mask": torch.ones_like(teacher),
        "advantages": torch.randn(rows), "num_items_in_batch": torch.tensor(float(tokens)),
    }  # fmt: skip


def trainers(directory: str) -> dict[str, dict[str, Any]]:
    """By loss, TRL's trainer and ours."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental import sdft

    from sdkernels.integrations.trl import RLSDConfig, RLSDTrainer, SDFTTrainer

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>"))
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")
    rows = Dataset.from_list([{"prompt": "a", "privileged_context": "b"}] * 4)
    options = {"output_dir": directory, "use_cpu": True, "bf16": False, "report_to": [], "num_generations": 2,
               "per_device_train_batch_size": 2}  # fmt: skip
    shared = {"train_dataset": rows, "processing_class": words}
    reward = lambda completions, **columns: [0.0] * len(completions)  # noqa: E731
    full = sdft.SDFTConfig(
        **options, distillation_mode="full_logits", distillation_alpha=JSD, teacher_model_kind="live"
    )
    without = RLSDConfig(**options, rlsd_lambda=0.0, teacher_model_kind="live")
    policy = {"TRL": (GRPOTrainer, GRPOConfig(**options)), "sdkernels": (RLSDTrainer, without)}
    found = {
        "GRPO": {name: trainer(directory, reward, args=args, **shared) for name, (trainer, args) in policy.items()},
        "SDFT, JSD": {name: trainer(directory, args=full, **shared)
                      for name, trainer in (("TRL", sdft.SDFTTrainer), ("sdkernels", SDFTTrainer))},
    }  # fmt: skip
    for each in (trainer for both in found.values() for trainer in both.values()):
        each.current_gradient_accumulation_steps = each.args.steps_per_generation = 1
        each.model.train().model.embed_tokens.requires_grad_(False)
    return found


class Step(runner.Prepared):
    """A trainer's loss of a batch, and its gradient."""

    def __init__(self, trainer: Any, batch: Batch) -> None:
        self.trainer, self.batch = trainer, batch

    def reset(self) -> None:
        """Free the gradients."""
        self.trainer.model.zero_grad()

    def run(self) -> None:
        """Forward and backward."""
        self.loss = self.trainer.compute_loss(self.trainer.model, self.batch)
        self.loss.backward()


def grpo(log_p: Tensor, other: Tensor | None, ids: Tensor, advantages: Tensor) -> Tensor:
    """Per token, on policy."""
    log_prob = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return -(log_prob - log_prob.detach()).exp() * advantages


def jsd(log_p: Tensor, log_q: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
    """Per token."""
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return 0.5 * ((log_q.exp() * (log_q - log_m)).sum(-1) + (log_p.exp() * (log_p - log_m)).sum(-1))


def truth(formula: Callable[..., Tensor], model: Any, batch: Batch) -> tuple[float, Tensor]:
    """The loss and the gradient of the head's weight in float64, on the model's own hidden states."""
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    with torch.no_grad():
        sides = [model.model(each).last_hidden_state[:, -COMPLETION - 1 : -1].flatten(0, 1).double()
                 for each in (ids, batch["teacher_input_ids"])]  # fmt: skip
    weight = model.lm_head.weight.detach().double().requires_grad_()
    tokens, advantages = batch["completion_ids"].flatten(), batch["advantages"].double().repeat_interleave(COMPLETION)
    total = 0.0
    for start in range(0, len(tokens), ROWS):
        rows = slice(start, start + ROWS)
        log_p = (sides[0][rows] @ weight.T).log_softmax(-1)
        log_q = None if formula is grpo else (sides[1][rows] @ weight.detach().T).log_softmax(-1)
        loss = formula(log_p, log_q, tokens[rows], advantages[rows]).sum() / len(tokens)
        loss.backward()
        total += loss.item()
    return total, weight.grad


def measured(arguments: argparse.Namespace, tokens: int, found: dict[str, Any], advance: Any) -> list[dict[str, Any]]:
    """A row per loss and trainer at one size."""
    batch, device = batch_of(tokens, arguments.vocab), torch.device("cpu")
    steps = {(loss, name): Step(trainer, batch) for loss, both in found.items() for name, trainer in both.items()}
    peaks = {key: runner.peak_memory(step, device) for key, step in steps.items()}
    times = runner.interleave(steps, runner.Timer(device), arguments.seconds, advance, fewest=3)
    rows = []
    for (loss, name), step in steps.items():
        step.reset()
        step.run()
        value, gradient = truth(grpo if loss == "GRPO" else jsd, step.trainer.model, batch)
        error = (step.trainer.model.lm_head.weight.grad - gradient).norm() / gradient.norm()
        step.reset()
        seconds, hosts = (runner.quantiles(times[loss, each]) for each in (name, "TRL"))
        row = {"tokens": tokens, "loss": loss, "trainer": name, "seconds": seconds, "speed": hosts[0] / seconds[0]}
        errors = {"loss_error": abs(step.loss.item() - value), "gradient_error": error.item()}
        rows.append(row | {"peak_bytes": peaks[loss, name]} | errors)
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of the table."""
    median, low, high = (f"{second:.2f}" for second in row["seconds"])
    errors = (f"{row[name]:.1e}" for name in ("loss_error", "gradient_error"))
    return (row["loss"], row["trainer"], median, f"{low} to {high}", f"{row['speed']:.2f}x",
            f"{row['peak_bytes'] / 1e6:,.0f}", *errors)  # fmt: skip


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser, start = argparse.ArgumentParser(description=__doc__), time.perf_counter()
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 512], help=f"multiples of {COMPLETION}")
    parser.add_argument("--vocab", type=int, default=151936, help="default: 151936")
    parser.add_argument("--hidden", type=int, default=256, help="default: 256")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of timing per size; default: 30, at least 3 rounds"
    )
    add_output_options(parser, plot=False)
    arguments = parser.parse_args()
    environment = report.environment(torch.device("cpu"), ("trl", "transformers", "accelerate"))
    with tempfile.TemporaryDirectory() as directory, report.Screen(len(arguments.tokens)) as screen:
        screen.line("\n".join(f"{name:24}{value}" for name, value in environment.items()) + "\n")
        small_model(arguments.vocab, arguments.hidden).save_pretrained(directory)
        found, rows = trainers(directory), []
        for tokens in arguments.tokens:
            rows += (some := measured(arguments, tokens, found, screen.advance))
            title = f"{tokens} tokens, V = {arguments.vocab:,}, H = {arguments.hidden:,}, float32, forward + backward"
            screen.table(title, COLUMNS, [list(map(cells, some))], text={"loss", "trainer"})
        screen.line(f"{time.perf_counter() - start:.0f} s")
    if path := output_path(arguments.json, "trl", torch.device("cpu"), ".json"):
        report.write_json(path, {"environment": environment, "vocab": arguments.vocab, "hidden": arguments.hidden,
                                 "measurements": rows})  # fmt: skip
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
