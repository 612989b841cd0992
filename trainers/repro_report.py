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

FOLLOW_UPS = """\
Others find less: RLSD below GRPO on Qwen3-4B-Base (2605.10781), below GRPO in AMR-SD's table (2605.18529), and level
with GRPO on Qwen3-8B in ReTeach's.
"""

RATES = ("pass@1", "pass@5", "hard pass@1", "hard pass@5")
Series = dict[str, list[list[dict[str, float]]]]  # metrics of each seed, by method


def write(folder: Path) -> Path:
    """Write the report of the runs below `folder`; returns its path."""
    machine = json.loads((folder / "machine.json").read_text())
    made = "Made by trainers/repro.py: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".\n"
    (folder / "report.md").write_text("\n".join([_rlsd(folder), _ssd(folder), made]))
    return folder / "report.md"


def _rlsd(folder: Path) -> str:
    series: Series = {}
    for path in sorted((folder / "rlsd").iterdir()):
        series.setdefault(path.name.rsplit("-", 1)[0], []).append(read_metrics(path))
    last = int(max(row["step"] for row in series["grpo"][0]))
    level = _mean(_at(rows, "eval/reward", last) for rows in series["grpo"])

    def reward(method: str, step: int) -> str:
        return _spread(_at(rows, "eval/reward", step) for rows in series[method])

    def ends(method: str, name: str) -> str:
        return _spread(_tail(rows, name) for rows in series[method])

    rows = []
    for method, runs in series.items():
        rewards = [[row["eval/reward"] for row in rows if "eval/reward" in row] for rows in runs]
        reached = [_first(rows, level) for rows in runs]
        texts = [_said(folder / "rlsd" / f"{method}-{seed}") for seed in range(len(runs))]
        rows.append({
            "method": method,
            **{f"reward, step {step}": reward(method, step) for step in (0, 10, 20, last // 2, last)},
            "mean over steps": _spread(map(_mean, rewards)),
            "steps to GRPO's final level": ", ".join("never" if step is None else str(step) for step in reached),
            "entropy": f"{_mean(r[1]['entropy'] for r in runs):.3f} to {ends(method, 'entropy')}",
            "clipped": ends(method, "evidence_clipped"),
            "floor": ends(method, "leakage/mutual_information"),
            "right in all steps": _spread(text[0] for text in texts),
            "answer is the own last sum": _spread(text[1] for text in texts),
        })  # fmt: skip
    _rlsd_plot(series, folder / "rlsd.png")
    claims = {
        "RLSD after 200 steps is above GRPO after 400":
            f"RLSD after {last // 2}: {reward('rlsd', last // 2)}; GRPO after {last}: {reward('grpo', last)}",
        "OPSD peaks within 10 to 20 steps, then declines":
            f"OPSD at steps 0, 10, 20 and {last}: {', '.join(reward('opsd', step) for step in (0, 10, 20, last))}",
        "3 to 6% of evidence weights are clipped": ends("rlsd", "evidence_clipped"),
        "GRPO's entropy collapses, RLSD's stays higher":
            f"at the end GRPO {ends('grpo', 'entropy')}, RLSD {ends('rlsd', 'entropy')}",
        "of OPSD's loss, the mutual information with r cannot be trained away (Theorem 1)":
            f"at the end {ends('opsd', 'leakage/mutual_information')} of {ends('opsd', 'leakage/total')} nats a token",
    }  # fmt: skip
    return (
        f"# RLSD and its baselines on the arithmetic testbed\n\n{_table(rows)}\n\n"
        f"Seeds: {len(series['grpo'])}; mean +- standard deviation over seeds. Reward: of one response at "
        f"temperature 1 to each of 512 questions that this training does not see. Entropy: nats per token, of the "
        f"first step and of the last 20, as are clipped (share of all tokens, those without advantage too) and the "
        f"floor (mutual information with r, nats per token). The last two columns are of the responses that the last "
        f"logged step trained on: right in every intermediate sum, and consistent, whether right or not.\n\n"
        f"![rewards, entropy, evidence, leakage](rlsd.png)\n\n"
        f"{_claims('RLSD paper (2604.03128)', claims)}\n\n{FOLLOW_UPS}"
    )


def _said(output: Path) -> tuple[float, float]:
    """Of the last recorded completions: the share that are right in every step, and that answer their own last sum."""
    rows = [json.loads(line) for line in max((output / "completions").glob("*.jsonl")).read_text().splitlines()]
    valid = [row["response"] in problem_of(row["prompt"]).traces() for row in rows]
    sums = [match for row in rows if (match := OWN_SUM.search(row["response"]))]
    return _mean(valid), sum(match[1] == match[2] for match in sums) / len(rows)


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
    figure.suptitle("arithmetic testbed: mean and range over seeds; of what is logged at every step running means of 5")
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
        kind, train, seed = path.name.split("-")
        for entry in (json.loads(p.read_text()) for p in sorted((path / "evaluation").glob("*.json"))):
            student = entry["model"] == "student"
            runs = found.setdefault((kind if student else entry["model"], float(train) * student, entry["decode"]), [])
            if len(runs) <= int(seed):  # the base's counts are the same in all runs of a seed
                runs.append(np.array(entry["correct"]))
            samples = entry["samples"]
    (difficulty,) = (runs for (model, _, _), runs in found.items() if model == "difficulty")
    hard = np.argsort(np.mean(difficulty, 0), kind="stable")[: len(difficulty[0]) // 3]
    rate = _rates(found, samples, hard)
    best = {
        name: max((key for key in rate if key[0] == "base"), key=lambda key: rate[key][name].mean()) for name in RATES
    }
    rows = []
    for key in sorted((key for key in rate if key[0] == "base"), key=lambda key: -rate[key]["pass@1"].mean())[:3]:
        rows.append(_ssd_row(key, rate, best))
    for train in sorted({key[1] for key in rate if key[0] == "truncated"}):
        students = [key for key in rate if key[:2] == ("truncated", train)]
        chosen = (max(students, key=lambda key: rate[key][name].mean()) for name in ("pass@1", "pass@5"))
        rows += [_ssd_row(key, rate, best) for key in dict.fromkeys((*chosen, ("truncated", train, "1.0")))]
    points = [(train * float(decode), rate[key]["pass@1"].mean(), train) for key in rate
              for model, train, decode in [key] if model == "plain"]  # fmt: skip
    correlation = _rank_correlation([p[0] for p in points], [p[1] for p in points])
    apart = [abs(a[1] - b[1]) for i, a in enumerate(points) for b in points[:i] if math.isclose(a[0], b[0])]
    _ssd_plot(rate, points, folder / "ssd.png")
    gains = {
        name: _spread(
            max((v[name] for k, v in rate.items() if k[0] == "truncated"), key=np.mean) - rate[best[name]][name]
        )
        for name in RATES
    }
    claims = {
        "the student is above the base at its best temperature, by 1 to 12 points of pass@1": gains["pass@1"],
        "gains are larger at pass@5 and on hard problems":
            ", ".join(f"{name} {gain}" for name, gain in gains.items() if name != "pass@1"),
        "pass@1 depends on T_eff = T_train T_eval alone":
            f"rank correlation {correlation:.3f} over {len(points)} settings, nothing truncated, which span "
            f"{np.ptp([p[1] for p in points]):.3f}" + (f"; the {len(apart)} pairs of equal T_eff are "
            f"{_mean(apart):.3f} apart, {max(apart):.3f} at most" if apart else ""),
    }  # fmt: skip
    decodes, students = (sum(key[0] == model for key in rate) for model in ("base", "truncated"))
    return (
        f"# SSD on the code testbed\n\n{_table(rows)}\n\nSeeds: {len(rate[best['pass@1']]['pass@1'])}; mean +- "
        f"standard deviation over seeds; {len(difficulty[0])} held-out problems x {samples} samples. The base at its "
        f"three best decodes (T_eval/top-k/top-p) and, for every T_train, the student at its best for pass@1, for "
        f"pass@5, and at temperature 1 without truncation. Hard: the third that the base solves least, by separate "
        f"samples. Best base: the best of {decodes} decodes for that column, on the very problems; in the claims the "
        f"student is the best of {students} pairs of T_train and decode, chosen alike.\n\n"
        f"![pass@1 against T_eff, and by decode](ssd.png)\n\n{_claims('SSD paper (2604.01193)', claims)}\n"
    )


def _rates(found: dict[Any, list[np.ndarray]], samples: int, hard: np.ndarray) -> dict[Any, dict[str, np.ndarray]]:
    """pass@k of each seed, over all problems and over the hard ones."""
    estimate = {k: np.array([pass_at_k(samples, c, k) for c in range(samples + 1)]) for k in (1, 5)}
    return {
        key: {
            f"{prefix}pass@{k}": np.array([estimate[k][counts[which]].mean() for counts in runs])
            for prefix, which in (("", slice(None)), ("hard ", hard))
            for k in (1, 5)
        }
        for key, runs in found.items()
        if key[0] != "difficulty"
    }


def _ssd_row(key: Any, rate: dict[Any, dict[str, np.ndarray]], best: dict[str, Any]) -> dict[str, str]:
    model, train, decode = key
    same = ("base", 0.0, decode)
    row = {"model": model if model == "base" else f"T_train {train:g}", "decode": decode}
    row |= {name: _spread(values) for name, values in rate[key].items()}
    for name in ("pass@1", "pass@5"):
        row[f"{name} - best base"] = _spread(rate[key][name] - rate[best[name]][name])
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
    effective.set_xlabel("T_eff = T_train T_eval, nothing truncated")
    effective.set_ylabel("pass@1")
    for axis, name in ((decodes, "pass@1"), (hard, "hard pass@5")):
        for model, train in sorted({key[:2] for key in rate if key[0] != "plain"}):
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


def _claims(source: str, found: dict[str, str]) -> str:
    return _table([{f"claim of the {source}": claim, "here": value} for claim, value in found.items()])


def _table(rows: Sequence[dict[str, str]]) -> str:
    lines: list[Callable[[dict[str, str]], Sequence[str]]] = [lambda row: list(row), lambda row: ["---"] * len(row)]
    head = [line(rows[0]) for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *(list(row.values()) for row in rows)])
