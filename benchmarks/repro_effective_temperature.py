"""SSD's temperatures multiply (arXiv 2604.01193, section 3.4 and Lemma B.1), checked at a real vocabulary size.

A student that fits q exactly, q being the base at T_train on its support S, and is decoded at T_eval, samples from
base^(1 / (T_train T_eval)) on S. First for q itself on a grid of temperatures, then for a student that was trained with
ssd_loss until it fits. The deviation is the largest difference of log-probabilities on S, in nats.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
import sdkernels
from benchmarks import harness, inputs, report

VOCAB, ROWS = 151936, 4
FILTERS = {"top_k": 20, "top_p": 0.8}
TRAIN = (0.5, 0.8, 1.0, 1.2, 1.6, 2.0)
EVAL = (0.4, 0.7, 0.9, 1.1, 1.6)
TOLERANCE = 5e-5  # nats, float32: two log-probs of 2e-5 each, and the logits' own rounding
TRAINED_TOLERANCE = 2e-3  # nats, of the student after STEPS
SMALL_VOCAB, SMALL_ROWS, STEPS, LEARNING_RATE = 1000, 8, 600, 0.3
CURVES = (0.3, 0.5, 0.8, 1.0, 1.3, 1.6, 2.0, 2.6, 3.2)  # of T_eff


def on_support(base: Tensor, support: sdkernels.Support, temperature: float) -> Tensor:
    """(N, K) log of base^(1 / temperature) renormalised on a support, -inf in unused places."""
    unused = support.token_ids < 0
    logits = base.double().gather(-1, support.token_ids.clamp(min=0))
    return (logits / temperature).masked_fill(unused, -torch.inf).log_softmax(-1)


def decoded(student: Tensor, support: sdkernels.Support, temperature: float) -> Tensor:
    """(N, K) log-probs at the support's tokens of the student decoded at a temperature, over the whole vocabulary."""
    log_q = sdkernels.truncated_log_softmax(student, temperature)
    return log_q.gather(-1, support.token_ids.clamp(min=0)).masked_fill(support.token_ids < 0, -torch.inf)


def deviation(student: Tensor, base: Tensor, support: sdkernels.Support, train: float, evaluation: float) -> float:
    """Largest |log student at T_eval - log base at T_eff| over the rows' supports."""
    expected = on_support(base, support, sdkernels.effective_temperature(train, evaluation))
    error = (decoded(student, support, evaluation) - expected).masked_fill(support.token_ids < 0, 0)
    return float(error.abs().nan_to_num(nan=torch.inf).max())


def exact_fits(base: Tensor) -> list[list[float]]:
    """The deviation for each T_train and T_eval; the student's logits are log q."""
    rows = []
    for train in TRAIN:
        student = sdkernels.truncated_log_softmax(base, train, **FILTERS)
        support = sdkernels.truncated_support(base, train, **FILTERS, max_size=64)
        rows.append([deviation(student, base, support, train, evaluation) for evaluation in EVAL])
    return rows


def train_student(base: Tensor, temperature: float) -> Tensor:
    """A table of logits, from the base to q with ssd_loss; Adam's memory is short: the loss's infimum is far away."""
    table = base.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=LEARNING_RATE, betas=(0.9, 0.9))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    support = sdkernels.truncated_support(base, temperature, **FILTERS, max_size=64)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sdkernels.ssd_loss(table, support, temperature, reduction="sum").loss.backward()
        optimizer.step()
        schedule.step()
    return table.detach()


def trained_fits(base: Tensor) -> list[list[float]]:
    """The deviation of trained students for each T_train and T_eval."""
    rows = []
    for train in TRAIN:
        student = train_student(base, train)
        support = sdkernels.truncated_support(base, train, **FILTERS, max_size=64)
        rows.append([deviation(student, base, support, train, evaluation) for evaluation in EVAL])
    return rows


def entropies(base: Tensor) -> dict[str, list[float]]:
    """Mean entropy of what is sampled, by T_eff, for each T_train: curves that coincide if S is the same for all."""
    support = sdkernels.truncated_support(base, 1.0, top_k=20, max_size=64)
    found = {"base at T_eff": [_mean_entropy(on_support(base, support, t)) for t in CURVES]}
    for train in TRAIN:
        student = sdkernels.truncated_log_softmax(base, train, top_k=20)
        found[f"T_train = {train}"] = [_mean_entropy(decoded(student, support, t / train).double()) for t in CURVES]
    return found


def _mean_entropy(log_q: Tensor) -> float:
    return float(-(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1).mean())


def show(screen: report.Screen, title: str, rows: list[list[float]]) -> None:
    """T_train down, T_eval across."""
    cells = [(f"{train}", *(f"{x:.1e}" for x in row)) for train, row in zip(TRAIN, rows, strict=True)]
    screen.table(title, ("T_train", *(f"T_eval = {t}" for t in EVAL)), [cells], text=set())


def plot(path: Path, curves: dict[str, list[float]]) -> None:
    """Entropy against T_eval, where the curves differ, and against T_eff, where they are one."""
    with report.figure(path, 2, (9, 3.6), sharey=True) as (_, axes):
        expected = curves["base at T_eff"]
        for name, values in curves.items():
            if name == "base at T_eff":
                continue
            train = float(name.rpartition(" ")[2])
            axes[0].plot([t / train for t in CURVES], values, marker=".", linewidth=1, label=name)
            axes[1].plot(CURVES, values, marker=".", linewidth=1, label=name)
        axes[1].plot(CURVES, expected, color="black", linestyle="--", linewidth=2, alpha=0.5, label="base at T_eff")
        axes[0].set(xlabel="T_eval", ylabel="mean entropy of exact fits, nats", title=f"V = {VOCAB:,}, top_k = 20")
        axes[1].set(xlabel="T_eff = T_train T_eval", title="the same, by effective temperature")
        axes[1].legend(frameon=False, fontsize=7)


def main() -> int:
    """Check, print, write what was asked for; 1 if a deviation is out of tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_output_options(parser)
    arguments, cpu, start = parser.parse_args(), torch.device("cpu"), time.perf_counter()
    base = inputs.synthetic(ROWS, VOCAB, cpu).student
    exact = exact_fits(base)
    trained = trained_fits(inputs.synthetic(SMALL_ROWS, SMALL_VOCAB, cpu).student)
    worst, worst_trained = (max(map(max, rows)) for rows in (exact, trained))
    filters = ", ".join(f"{name} = {value}" for name, value in FILTERS.items())
    with report.Screen(1) as screen:
        show(screen, f"Exact fits, {ROWS} rows, V = {VOCAB:,}, {filters}, float32: deviation, nats", exact)
        show(screen, f"Students after {STEPS} steps, {SMALL_ROWS} rows, V = {SMALL_VOCAB:,}: deviation, nats", trained)
        screen.line(f"largest deviation: exact {worst:.1e} (tolerance {TOLERANCE:.0e}), "
                    f"trained {worst_trained:.1e} (tolerance {TRAINED_TOLERANCE:.0e}) nats")  # fmt: skip
        screen.line(f"{time.perf_counter() - start:.0f} s")
    curves = entropies(base) if arguments.json or arguments.plot else {}
    if path := harness.output_path(arguments.json, "effective_temperature", cpu, ".json"):
        results = {"environment": report.environment(cpu, ()), "train": TRAIN, "eval": EVAL, "effective": CURVES,
                   "exact": exact, "trained": trained, "entropy": curves}  # fmt: skip
        report.write_json(path, results)
        print(f"wrote {path}")
    if path := harness.output_path(arguments.plot, "effective_temperature", cpu, ".png"):
        plot(path, curves)
        print(f"wrote {path}")
    return worst > TOLERANCE or worst_trained > TRAINED_TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
