"""How much of OPSD's loss on a batch can only leak: RLSD's Theorem 1 (arXiv 2604.03128) averaged; a tool for a file.

python -m sdkernels.leakage batch.safetensors [--temperature T] [--plot out.png] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdkernels import _check
from sdkernels.opsd import OPSDTerms, opsd_decomposition
from sdkernels.reductions import reduce

LINES = 16  # of the printed table


class Leakage(NamedTuple):
    """Results of `estimate_leakage`, float64 in nats per kept token, 0-dim or by position (T,), and how many tokens.

    Attributes:
        total: OPSD's expected forward KL.
        marginal_kl: the part that a student that does not see r can remove.
        mutual_information: I(Y_t; R), the part that can only leak.
        share: mutual_information / total.
        total_by_position, mutual_information_by_position: (T,) over the kept tokens at each position.
        tokens: (T,) int64, the kept tokens at each position.
    """

    total: Tensor
    marginal_kl: Tensor
    mutual_information: Tensor
    share: Tensor
    total_by_position: Tensor
    mutual_information_by_position: Tensor
    tokens: Tensor


def estimate_leakage(terms: OPSDTerms, mask: Tensor | None = None) -> Leakage:
    """Average a decomposition over the kept tokens of a batch: how much of the loss can only leak, and where.

    ::

        x = sum_t m_t x_t / sum_t m_t  for each term,   total = marginal_kl + mutual_information,
        share = mutual_information / total

    R independent samples of r estimate I(Y_t; R) low: by E KL(mean of their P_T || E_r P_T^r) on average, and they give
    at most log R, one sample 0; so compare estimates of equal R only. Where total is no more than rounding, so is what
    the share is made of.

    Args:
        terms: of `opsd_decomposition`, each (B, T), or (N,) of one sequence.
        mask: (B, T) or (N,), kept where non-zero; masked terms are not read.

    Returns:
        Leakage. 0 / 0 is 0: means without a kept token, and the share of a total of 0. A kept +inf, where P_S is 0 and
        a teacher is not, makes its means +inf and the share 0; a NaN makes NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    if not isinstance(terms, OPSDTerms):
        raise TypeError(f"terms must be OPSDTerms, got {type(terms).__name__}")
    shape = _check.is_tensor("terms.total", terms.total).shape
    if len(shape) not in (1, 2):
        raise ValueError(f"terms must have shape (B, T) or (N,), got {tuple(shape)}")
    for name, value in terms._asdict().items():
        _check.floats(f"terms.{name}", value, terms.total)
        _check.same_shape(f"terms.{name}", value, shape)
    mask = _check.mask("mask", mask, shape, terms.total)
    keep = torch.ones(shape, dtype=torch.bool, device=terms.total.device) if mask is None else mask
    tokens = keep.long().sum_to_size(shape[-1:])
    values = [torch.where(keep, x, 0).double() for x in terms]
    total, marginal_kl, information = (reduce(x, keep, "token-mean") for x in values)
    share = torch.where(total == 0, 0, information / total)
    total_at, information_at = (values[i].sum_to_size(shape[-1:]) / tokens.clamp(min=1) for i in (0, 2))
    return Leakage(total, marginal_kl, information, share, total_at, information_at, tokens)


def plot_leakage(found: Leakage, path: str | os.PathLike[str]) -> None:
    """Save a figure of total and mutual_information by position; positions without a kept token are left out."""
    from matplotlib.figure import Figure  # needs no display, and is not a dependency of the library

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    position = found.tokens.nonzero().squeeze(-1).cpu()
    for name in ("total", "mutual_information"):
        values = getattr(found, f"{name}_by_position").cpu()[position]
        axis.plot(position, values, marker=".", linewidth=1, label=name.replace("_", " "))
    axis.set(xlabel="position", ylabel="nats per token", title=f"share that can only leak: {float(found.share):.1%}")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def read_batch(path: str | os.PathLike[str], temperature: float = 1.0) -> tuple[Leakage, int]:
    """Leakage of a safetensors file, and its number R of samples of r.

    The file holds student_logits (B, T, V), teacher_logits (R, B, T, V) with R >= 2, and perhaps mask (B, T).
    """
    tensors = load_file(path)
    if set(tensors) - {"mask"} != {"student_logits", "teacher_logits"}:
        raise ValueError(f"{os.fspath(path)} must hold student_logits, teacher_logits and perhaps mask, "
                         f"got {', '.join(sorted(tensors))}")  # fmt: skip
    student, teacher = _check.logits("student_logits", tensors["student_logits"]), tensors["teacher_logits"]
    if student.dim() != 3:
        raise ValueError(f"student_logits must have shape (B, T, V), got {tuple(student.shape)}")
    _check.samples_of_logits("teacher_logits", teacher, student)
    if len(teacher) == 1:
        raise ValueError("teacher_logits must hold at least 2 samples of r: one tells nothing about what r changes")
    mask = _check.mask("mask", tensors.get("mask"), student.shape[:-1], student)
    terms = OPSDTerms(*torch.zeros(3, *student.shape[:-1], dtype=torch.float64))
    for b in range(len(student)):  # a sequence at a time: the file is mapped and may be larger than the memory
        keep = None if mask is None else mask[b]
        of_sequence = opsd_decomposition(student[b], teacher[:, b], temperature=temperature, mask=keep)
        for values, row in zip(terms, of_sequence, strict=True):
            values[b] = row
    return estimate_leakage(terms, mask), len(teacher)


def table(found: Leakage, samples: int) -> str:
    """What the tool prints: the means, and those of at most 16 ranges of positions."""
    lines = [f"{name:20}{float(getattr(found, name)):12.6f} nats per token" for name in Leakage._fields[:3]]
    lines += [f"{'share':20}{float(found.share):12.1%}", f"{'kept tokens':20}{int(found.tokens.sum()):12}"]
    lines += [
        f"{'samples of r':20}{samples:12}, so mutual_information is estimated low, at most {math.log(samples):.4f}",
        "",
    ]
    lines.append(f"{'positions':14}{'tokens':>8}{'total':>12}{'mutual_information':>20}")
    width = max(math.ceil(len(found.tokens) / LINES), 1)
    for low in range(0, len(found.tokens), width):
        tokens, *means = (x[low : low + width] for x in (found.tokens, *found[4:6]))
        total, information = (float((x * tokens).sum() / tokens.sum().clamp(min=1)) for x in means)
        places = f"{low} to {low + len(tokens) - 1}" if width > 1 else str(low)
        lines.append(f"{places:14}{int(tokens.sum()):8}{total:12.6f}{information:20.6f}")
    return "\n".join(lines)


def plain(values: Tensor) -> Any:
    """Numbers for JSON, which has none for what is not finite: "inf" or "nan"."""
    if values.dim():
        return [plain(x) for x in values]
    return values.item() if values.isfinite() else str(values.item())


def main() -> None:
    """Read a batch, print its table, write what was asked for."""
    parser = argparse.ArgumentParser("python -m sdkernels.leakage", description=__doc__.splitlines()[0])
    parser.add_argument("batch", type=Path, help="safetensors: student_logits (B, T, V), teacher_logits (R, B, T, V), "
                        "and mask (B, T) if not all tokens count")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0, help="of both distributions; default: 1")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a figure by position")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything, position by position")
    arguments = parser.parse_args()
    try:
        found, samples = read_batch(arguments.batch, arguments.temperature)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(table(found, samples))
    if arguments.json:
        values = {name: plain(value) for name, value in found._asdict().items()}
        arguments.json.write_text(json.dumps({"samples": samples, **values}, indent=1) + "\n")
    if arguments.plot:
        plot_leakage(found, arguments.plot)


if __name__ == "__main__":
    main()
