"""What the runs of `trainers.repro` found, beside what the papers claim: report.md, rlsd.png and ssd.png."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from trainers.arithmetic import problem_of
from trainers.evaluation import pass_at_k
from trainers.tracking import read_metrics

OWN_SUM = re.compile(r"=(\d+);####(\d+)$")

RLSD_CLAIMS = """\
| claim of the RLSD paper (2604.03128) | here |
|---|---|
| RLSD after 200 steps is above GRPO after 400 | steps to GRPO's final level: see the table |
| OPSD peaks within 10 to 20 steps, then declines | see OPSD's rewards at steps 10 and 20, and at the end |
| the share of clipped evidence weights is 3 to 6% | see "clipped", of all tokens, those without advantage too |
| GRPO's entropy collapses, RLSD's stays higher | see "entropy" |
| OPSD's loss has a floor that no student trains away (Theorem 1) | "floor": mutual information with r, nats per token |

Others find less: RLSD below GRPO on Qwen3-4B-Base (2605.10781), below GRPO in AMR-SD's table (2605.18529), and level
with GRPO on Qwen3-8B in ReTeach's.
"""

SSD_CLAIMS = """\
| claim of the SSD paper (2604.01193) | here |
|---|---|
| the student is above the base at its best temperature, by 1 to 12 points of pass@1 | "- best base" |
| gains are larger at pass@5 and on hard problems | "pass@5 - best base" and "hard" |
| pass@1 depends on T_eff = T_train T_eval alone | rank correlation below, and ssd.png |
"""

Series = dict[str, list[list[dict[str, float]]]]  # metrics of each seed, by method


def write(folder: Path) -> Path:
    """Write the report of the runs below `folder`; returns its path."""
    text = [_rlsd(folder), _ssd(folder)]
    (folder / "report.md").write_text("\n".join(text))
    return folder / "report.md"


def _rlsd(folder: Path) -> str:
    series: Series = {}
    for path in sorted((folder / "rlsd").iterdir()):
        series.setdefault(path.name.rsplit("-", 1)[0], []).append(read_metrics(path))
    last = max(row["step"] for row in series["grpo"][0])
    level = _mean(_at(rows, "eval/reward", last) for rows in series["grpo"])
    rows = []
    for method, runs in series.items():
        rewards = [[row["eval/reward"] for row in rows if "eval/reward" in row] for rows in runs]
        reached = [_first(rows, level) for rows in runs]
        texts = [_said(folder / "rlsd" / f"{method}-{seed}") for seed in range(len(runs))]
        rows.append({
            "method": method,
            **{f"reward, step {step}": _spread(_at(rows, "eval/reward", step) for rows in runs)
               for step in (0, 10, 20, last // 2, last)},
            "mean over steps": _spread(map(_mean, rewards)),
            "steps to GRPO's final level": ", ".join("never" if step is None else str(step) for step in reached),
            "entropy": f"{_mean(r[1]['entropy'] for r in runs):.3f} to {_spread(_tail(r, 'entropy') for r in runs)}",
            "clipped": _spread(_tail(r, "evidence_clipped") for r in runs),
            "floor": _spread(_tail(r, "leakage/mutual_information") for r in runs),
            "right with valid steps": _spread(text[0] for text in texts),
            "answer is the own last sum": _spread(text[1] for text in texts),
        })  # fmt: skip
    _rlsd_plot(series, folder / "rlsd.png")
    seeds = len(series["grpo"])
    return (
        f"# RLSD and its baselines on the arithmetic testbed\n\n{seeds} seeds, mean +- standard deviation over seeds; "
        f"reward is that of one response at temperature 1 to each of 512 held-out questions.\n\n{_table(rows)}\n\n"
        f"![rewards, entropy, evidence, leakage](rlsd.png)\n\n{RLSD_CLAIMS}"
    )


def _said(output: Path) -> tuple[float, float]:
    """Of the last recorded completions: the share that are right in every step, and that answer their own last sum."""
    rows = [json.loads(line) for line in max((output / "completions").glob("*.jsonl")).read_text().splitlines()]
    valid = [row["response"] in problem_of(row["prompt"]).traces() for row in rows]
    sums = [match for row in rows if (match := OWN_SUM.search(row["response"]))]
    return _mean(valid), _mean(match[1] == match[2] for match in sums)


def _rlsd_plot(series: Series, path: Path) -> None:
    panels = (
        "eval/reward",
        "entropy",
        "evidence_clipped",
        "leakage/mutual_information",
        "leakage/total",
        "gradient_norm",
    )
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    for axis, name in zip(axes.flat, panels, strict=True):
        for number, (method, runs) in enumerate(series.items()):
            steps = [row["step"] for row in runs[0] if name in row]
            if steps:
                values = _smooth(np.array([[row[name] for row in rows if name in row] for rows in runs]))
                axis.plot(steps, values.mean(0), color=f"C{number}", label=method)
                axis.fill_between(steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.15)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("arithmetic testbed: mean over seeds, band from the least to the largest")
    figure.supxlabel("step", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Running means along a long series."""
    if values.shape[1] < 5 * width:
        return values
    padded = np.pad(values, ((0, 0), (width // 2, width // 2)), mode="edge")
    return np.stack([np.convolve(row, np.full(width, 1 / width), mode="valid") for row in padded])


def _ssd(folder: Path) -> str:
    found: dict[tuple[str, float, str], list[np.ndarray]] = {}  # model, T_train, decode: right counts by seed
    for path in sorted((folder / "ssd").iterdir()):
        train = float(path.name.rsplit("-", 1)[0])
        for entry in (json.loads(p.read_text()) for p in sorted((path / "evaluation").glob("*.json"))):
            key = (entry["model"], train if entry["model"] == "student" else 0.0, entry["decode"])
            runs = found.setdefault(key, [])
            if entry["model"] == "student" or len(runs) <= int(path.name.rsplit("-", 1)[1]):
                runs.append(np.array(entry["correct"]))
            samples = entry["samples"]
    (difficulty,) = (runs for (model, _, _), runs in found.items() if model == "difficulty")
    hard = np.argsort(np.mean(difficulty, 0), kind="stable")[: len(difficulty[0]) // 3]
    rate = _rates(found, samples, hard)
    best = max((key for key in rate if key[0] == "base"), key=lambda key: rate[key]["pass@1"].mean())
    rows = []
    for key in sorted((key for key in rate if key[0] == "base"), key=lambda key: -rate[key]["pass@1"].mean())[:3]:
        rows.append(_ssd_row(key, rate, best))
    for train in sorted({key[1] for key in rate if key[0] == "student"}):
        students = [key for key in rate if key[:2] == ("student", train)]
        for key in (max(students, key=lambda key: rate[key]["pass@1"].mean()), ("student", train, "1.0")):
            rows.append(_ssd_row(key, rate, best))
    points = [(train * float(decode), rate[key]["pass@1"].mean(), train) for key in rate
              for model, train, decode in [key] if model == "student" and "/" not in decode]  # fmt: skip
    correlation = _rank_correlation([p[0] for p in points], [p[1] for p in points])
    _ssd_plot(rate, points, folder / "ssd.png")
    decodes = sum(key[0] == "base" for key in rate)
    return (
        f"# SSD on the code testbed\n\n{len(rate[best]['pass@1'])} seeds, {len(difficulty[0])} held-out problems x "
        f"{samples} samples, mean +- standard deviation over seeds. For every T_train the student's best decode, and "
        f"decoding at temperature 1 without truncation. Hard: the third that the base solves least, by separate "
        f"samples. The base's best decode, {best[2]}, is the best of {decodes} on the very problems.\n\n"
        f"{_table(rows)}\n\nRank correlation of T_eff and pass@1 over {len(points)} students decoded without "
        f"truncation: {correlation:.3f}.\n\n![pass@1 against T_eff, and by decode](ssd.png)\n\n{SSD_CLAIMS}"
    )


def _rates(found: dict[Any, list[np.ndarray]], samples: int, hard: np.ndarray) -> dict[Any, dict[str, np.ndarray]]:
    """pass@k of each seed, over all problems and over the hard ones."""
    estimate = {k: np.array([pass_at_k(samples, c, k) for c in range(samples + 1)]) for k in (1, 5)}
    return {
        key: {
            f"{prefix}pass@{k}": np.array([estimate[k][counts[which]].mean() for counts in runs])
            for k in (1, 5)
            for prefix, which in (("", slice(None)), ("hard ", hard))
        }
        for key, runs in found.items()
        if key[0] != "difficulty"
    }


def _ssd_row(key: Any, rate: dict[Any, dict[str, np.ndarray]], best: Any) -> dict[str, str]:
    model, train, decode = key
    same = ("base", 0.0, decode)
    row = {"model": model if model == "base" else f"T_train {train:g}", "decode": decode}
    row |= {name: _spread(values) for name, values in rate[key].items()}
    for name in ("pass@1", "pass@5"):
        row[f"{name} - best base"] = _spread(rate[key][name] - rate[best][name])
        row[f"{name} - same decode"] = _spread(rate[key][name] - rate[same][name]) if same in rate else ""
    return row


def _ssd_plot(rate: dict[Any, dict[str, np.ndarray]], points: Sequence[tuple[float, float, float]], path: Path) -> None:
    figure, (effective, decodes, hard) = plt.subplots(1, 3, figsize=(15, 4.4))
    base = sorted((float(d), v["pass@1"].mean()) for (m, _, d), v in rate.items() if m == "base" and "/" not in d)
    effective.plot(*zip(*base, strict=True), "k--", label="base at T = T_eff")
    for train in sorted({point[2] for point in points}):
        effective.plot(
            *zip(*sorted(p[:2] for p in points if p[2] == train), strict=True), "o-", label=f"T_train {train:g}"
        )
    effective.set_xlabel("T_eff = T_train T_eval, decoded without truncation")
    effective.set_ylabel("pass@1")
    for axis, name in ((decodes, "pass@1"), (hard, "hard pass@5")):
        for model, train in sorted({key[:2] for key in rate}):
            line = sorted((float(d.split("/")[0]), v[name]) for (m, t, d), v in rate.items()
                          if (m, t) == (model, train) and "/" in d)  # fmt: skip
            label, style = ("base", "k--") if model == "base" else (f"T_train {train:g}", "o-")
            axis.errorbar(
                [t for t, _ in line], [v.mean() for _, v in line], [v.std() for _, v in line], fmt=style, label=label
            )
        axis.set_xlabel("T_eval, top_k 20, top_p 0.8")
        axis.set_ylabel(name)
    for axis in (effective, decodes, hard):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's."""
    first, second = (
        np.array([np.less(values, v).sum() + np.equal(values, v).sum() / 2 for v in values]) for values in (x, y)
    )
    return float(np.corrcoef(first, second)[0, 1])


def _at(rows: Sequence[dict[str, float]], name: str, step: float) -> float:
    return next((row[name] for row in rows if row["step"] == step and name in row), math.nan)


def _first(rows: Sequence[dict[str, float]], level: float) -> int | None:
    """The first evaluated step at which the reward reaches a level."""
    return next((int(row["step"]) for row in rows if row.get("eval/reward", -math.inf) >= level), None)


def _tail(rows: Sequence[dict[str, float]], name: str, count: int = 20) -> float:
    """The mean over the last steps."""
    values = [row[name] for row in rows[-count:] if name in row]
    return _mean(values) if values else math.nan


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _spread(values: Iterable[float]) -> str:
    """Mean and standard deviation; empty where there is nothing."""
    found = np.array([value for value in values if not math.isnan(value)])
    if not found.size:
        return ""
    return f"{found.mean():.3f}" + (f" +- {found.std(ddof=1):.3f}" if found.size > 1 else "")


def _table(rows: Sequence[dict[str, str]]) -> str:
    lines: list[Callable[[dict[str, str]], Sequence[str]]] = [lambda row: list(row), lambda row: ["---"] * len(row)]
    head = [line(rows[0]) for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *(list(row.values()) for row in rows)])
