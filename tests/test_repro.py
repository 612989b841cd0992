"""`make repro`: which programs it starts, and what its report makes of what they left."""

import itertools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import no_kernel

from trainers import repro, repro_report
from trainers.arithmetic import Problem
from trainers.evaluation import pass_at_k
from trainers.tracking import write_json, write_lines

pytestmark = no_kernel
SAMPLES = 10
DECODES = ("0.5", "2.0", "1.0", "0.5/20/0.8")


def rewards(method, seed, step):
    """GRPO climbs, RLSD climbs twice as fast, OPSD rises and falls."""
    shape = {"grpo": step / 100, "rlsd": min(1, step / 20) * 0.4, "opsd": 0.2 - abs(step - 10) / 100}
    return 0.3 + shape[method] + 0.01 * seed


@pytest.fixture
def folder(tmp_path):
    """What two seeds of three methods, and of SSD at two temperatures, could leave."""
    problem = Problem(18, 25, 37)
    for method in ("grpo", "rlsd", "opsd"):
        for seed in (0, 1):
            output = tmp_path / "rlsd" / f"{method}-{seed}"
            (output / "completions").mkdir(parents=True)
            logged = [{"step": 0, "eval/reward": rewards(method, seed, 0)}]
            for step in range(1, 41):
                row = {"step": step, "entropy": 0.5 - step / 100, "gradient_norm": 1.0}
                row |= {"evidence_clipped": 0.04 if step > 20 else 0.5} if method == "rlsd" else {}
                row |= {"leakage/total": 0.3, "leakage/mutual_information": 0.1} if step % 10 == 0 else {}
                row |= {"eval/reward": rewards(method, seed, step)} if step % 10 == 0 else {}
                logged.append(row)
            write_lines(output / "metrics.jsonl", logged)
            trace = sorted(problem.traces())[0]
            said = [trace, trace.replace("####80", "####81"), "nonsense", trace]
            write_lines(output / "completions" / "step-000040.jsonl",
                        [{"prompt": problem.prompt, "response": text} for text in said])  # fmt: skip
    rng = np.random.default_rng(0)
    for kind, train, seed in itertools.product(("truncated", "plain"), (0.5, 1.0), (0, 1)):
        output = tmp_path / "ssd" / f"{kind}-{train:g}-{seed}" / "evaluation"
        output.mkdir(parents=True)
        for model, decodes in (("base", DECODES), ("student", DECODES[2:] if kind == "truncated" else DECODES[:3])):
            for number, decode in enumerate(decodes):
                of_base = np.random.default_rng([seed, number])
                correct = (
                    rng.integers(0, SAMPLES + 1, 9) if model == "student" else of_base.integers(0, 6, 9)
                ).tolist()
                entry = {"model": model, "decode": decode, "samples": SAMPLES, "correct": correct}
                write_json(output / f"{model}-{number}.json", entry)
        hardness = [9, 0, 8, 7, 1, 6, 5, 2, 4]
        write_json(
            output / "difficulty-9.json", entry | {"model": "difficulty", "decode": DECODES[0], "correct": hardness}
        )
    write_json(tmp_path / "machine.json", repro.machine())
    return tmp_path


def tables(text):
    """The rows of every table, as dictionaries."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def spread(values):
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"


def test_the_report_of_rlsd_says_what_the_runs_logged(folder):
    methods, claims, *_ = tables(repro_report.write(folder).read_text())
    by_method = {row["method"]: row for row in methods}
    for method, row in by_method.items():
        for step in (0, 10, 20, 40):
            assert row[f"reward, step {step}"] == spread([rewards(method, seed, step) for seed in (0, 1)])
        assert row["entropy"] == f"0.490 to {spread([0.5 - np.mean(range(21, 41)) / 100] * 2)}"
        assert row["floor"] == "0.100 +- 0.000"
        assert row["right in all steps"] == "0.500 +- 0.000"
        assert row["answer is the own last sum"] == "0.500 +- 0.000"
    level = np.mean([rewards("grpo", seed, 40) for seed in (0, 1)])
    assert level == pytest.approx(0.705)  # above all of seed 0
    assert {m: row["steps to GRPO's final level"] for m, row in by_method.items()} == {
        "grpo": "never, 40", "rlsd": "never, 20", "opsd": "never, never"
    }  # fmt: skip
    assert by_method["rlsd"]["clipped"] == "0.040 +- 0.000"
    assert by_method["grpo"]["clipped"] == ""
    faster, declines, *_ = (row["here"] for row in claims)
    assert faster == f"RLSD after 20: {spread([0.7, 0.71])}; GRPO after 40: {spread([0.7, 0.71])}"
    assert declines.endswith(
        ", ".join(spread([rewards("opsd", seed, step) for seed in (0, 1)]) for step in (0, 10, 20, 40))
    )
    assert (folder / "rlsd.png").stat().st_size > 20_000


def test_the_report_of_ssd_says_what_was_counted(folder):
    counts = {}
    for path in sorted((folder / "ssd").glob("*/evaluation/*.json")):
        kind, train, seed = path.parts[-3].split("-")
        entry = json.loads(path.read_text())
        key = (kind, train, entry["decode"]) if entry["model"] == "student" else (entry["model"], "", entry["decode"])
        counts.setdefault(key, {})[seed] = entry["correct"]
    hard = [1, 4, 7]

    def rate(key, name):
        k, which = int(name[-1]), hard if "hard" in name else range(9)
        return [
            np.mean([pass_at_k(SAMPLES, correct[i], k) for i in which]) for _, correct in sorted(counts[key].items())
        ]

    *_, rows, claims = tables(repro_report.write(folder).read_text())
    keys = {model: [key for key in counts if key[0] == model] for model in ("base", "truncated")}
    assert len(rows) >= 3 + 2 * 2
    gains = {}
    for name in repro_report.RATES:
        best = {model: max(found, key=lambda key: np.mean(rate(key, name))) for model, found in keys.items()}
        gains[name] = spread(np.subtract(rate(best["truncated"], name), rate(best["base"], name)))
        for row in rows:
            model, _, train = row["model"].partition(" ")
            key = ("base" if model == "base" else "truncated", train, row["decode"])
            assert row[name] == spread(rate(key, name))
            if "hard" not in name:
                difference = spread(np.subtract(rate(key, name), rate(best["base"], name)))
                assert row[f"{name} - best base"] == difference
    above, larger, effective = (row["here"] for row in claims)
    assert above == gains.pop("pass@1")
    assert larger == ", ".join(f"{name} {gain}" for name, gain in gains.items())
    # T_eff 0.25, 0.5, 1 and 0.5, 1, 2: two pairs are equal
    plain = {(t, d): np.mean(rate(("plain", t, d), "pass@1")) for t in ("0.5", "1") for d in DECODES[:3]}
    apart = [abs(plain["0.5", "1.0"] - plain["1", "0.5"]), abs(plain["0.5", "2.0"] - plain["1", "1.0"])]
    assert f"2 pairs of equal T_eff are {np.mean(apart):.3f} apart, {max(apart):.3f} at most" in effective
    assert (folder / "ssd.png").stat().st_size > 20_000


def test_rank_correlation_is_spearmans():
    found = repro_report._rank_correlation([10, 20, 20, 70], [-1, 5, 4, 6])
    assert found == pytest.approx(4.5 / (4.5 * 5) ** 0.5)  # of ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4


@pytest.fixture
def commands(monkeypatch):
    """Programs are not run but recorded, with the evaluations that they find; each leaves its proof."""
    found = []

    def run(command, **options):
        values = dict(part.lstrip("-").split("=", 1) for part in command if "=" in part)
        output = repro.Path(values["output_dir"])
        found.append((command, [path.name for path in output.glob("evaluation/*")]))
        if "trainers.ssd" in command:
            (output / "evaluation").mkdir(exist_ok=True)
            for name in ("base-0", "student-0"):
                write_json(output / "evaluation" / f"{name}.json", values["train_temperature"])
            write_json(output / "report.json", {})
        else:
            (output / f"checkpoint-{values['max_steps']}").mkdir()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_what_ended_is_not_run_again(tmp_path, commands):
    for run in repro.rlsd_runs(tmp_path, ["grpo", "rlsd"], [0, 1], steps=7) * 2:
        run()
    assert len(commands) == 4
    for command, _ in commands:
        assert command[:3] == [sys.executable, "-m", "trainers.rlsd"]
        assert "--resume" in command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grpo-0", "grpo-1", "rlsd-0", "rlsd-1"]


def test_the_base_is_evaluated_once_a_seed(tmp_path, commands):
    for run in repro.ssd_runs(tmp_path, [0.6, 0.8], [0, 1], problems=5):
        run()
    assert [found for _, found in commands] == [[], *[["base-0.json"]] * 3] * 2
    base = []
    for command, _ in commands:
        at, to = command.index("--base_decodes"), command.index("--eval_decodes")
        base.append(command[at + 1 : to])
        plain = "--train_top_k=0" in command
        assert plain == ("--train_top_p=1" in command)
        assert all(("/" in decode) != plain for decode in command[to + 1 :] if decode != "1.0")
        assert "1.0" in command[to + 1 :]
        assert set(command[to + 1 :]) <= set(base[-1])  # each has its base to compare with
    assert base == base[:1] * 8
    assert sum("--train_top_k=0" in command for command, _ in commands) == 4


def test_a_run_that_fails_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(repro, "CONFIGS", tmp_path)  # where there is no config
    with pytest.raises(RuntimeError, match=r"ended with 2: see .*grpo-0/log.txt"):
        repro.rlsd_runs(tmp_path, ["grpo"], [0], steps=1)[0]()
    assert "rlsd_arithmetic.yaml" in (tmp_path / "grpo-0" / "log.txt").read_text()
