"""Both methods on their testbeds, several seeds, beside what the papers claim: tables and plots in one folder.

    make repro                # an hour and a half on two busy cores
    make repro ARGS=--quick   # minutes

Runs are programs of their own, one thread each, as many at a time as there are cores. A run that ended is not repeated,
one that was cut off is resumed.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trainers import repro_report
from trainers.config import TrainerConfig
from trainers.testbeds import with_testbed
from trainers.tracking import write_json

CONFIGS = Path(__file__).parent / "configs"
METHODS = ("grpo", "rlsd", "opsd", "sdpo", "grpo+opsd")
TEMPERATURES = (0.6, 0.8, 1.0, 1.3, 1.6)  # T_train
EVAL_TEMPERATURES = (0.4, 0.6, 0.8, 1.0, 1.2)
TRUNCATED = ("0.2/20/0.8", "0.4/20/0.8", "0.6/20/0.8", "0.8/20/0.8", "1.0/20/0.8")

Run = Callable[[], None]


def rlsd_runs(folder: Path, methods: Sequence[str], seeds: Sequence[int], steps: int) -> list[Run]:
    """A run of trainers.rlsd for every method and seed."""
    return [
        functools.partial(
            finish, "rlsd", folder / f"{method}-{seed}", f"checkpoint-{steps}",
            [f"--method={method}", f"--seed={seed}", f"--max_steps={steps}", "--eval_steps=10",
             "--leakage_steps=10", "--leakage_prompts=16"],
        )
        for seed in seeds
        for method in methods
    ]  # fmt: skip


def ssd_runs(folder: Path, temperatures: Sequence[float], seeds: Sequence[int], problems: int) -> list[Run]:
    """For every seed the runs of trainers.ssd, one after the other: the first evaluates the base for all.

    Students of the truncated base are decoded with truncation, and at temperature 1 without. Where T_eff is all that
    counts, nothing is truncated: neither the base that is sampled nor the student.
    """
    plain = [str(temperature) for temperature in EVAL_TEMPERATURES]
    kinds = {"truncated": [[], [*TRUNCATED, "1.0"]], "plain": [["--train_top_k=0", "--train_top_p=1"], plain]}

    def chain(seed: int) -> None:
        first = folder / f"{next(iter(kinds))}-{temperatures[0]:g}-{seed}"
        for kind, (filters, decodes) in kinds.items():
            for temperature in temperatures:
                output = folder / f"{kind}-{temperature:g}-{seed}"
                if output != first and not output.exists():
                    shutil.copytree(first / "evaluation", output / "evaluation", ignore=lambda _, names: [
                        name for name in names if name.startswith("student")])  # fmt: skip
                finish("ssd", output, "report.json", [
                    f"--train_temperature={temperature}", *filters, f"--seed={seed}", f"--num_eval_prompts={problems}",
                    "--base_decodes", "0.8/20/0.8", *(d for d in (*plain, *TRUNCATED) if d != "0.8/20/0.8"),
                    "--eval_decodes", *decodes,
                ])  # fmt: skip

    return [functools.partial(chain, seed) for seed in seeds]


def finish(program: str, output: Path, proof: str, options: Sequence[str]) -> None:
    """Run or resume a trainer until `proof` is in its output."""
    if (output / proof).exists():
        return
    config = CONFIGS / {"rlsd": "rlsd_arithmetic.yaml", "ssd": "ssd_stdlib.yaml"}[program]
    command = [sys.executable, "-m", f"trainers.{program}", f"--config={config}", f"--output_dir={output}",
               "--resume", *options]  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: see {output / 'log.txt'}")


def machine() -> dict[str, str]:
    """What a reader needs to know about where the runs ran."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"commit": git.stdout.strip(), "python": platform.python_version(), **versions,
            platform.machine(): f"{os.cpu_count()} cores"}  # fmt: skip


def record_machine(path: Path) -> None:
    """Keep what is known of the machine, with every commit whose runs are in the folder."""
    now = machine()
    before = json.loads(path.read_text())["commit"].split(", ") if path.exists() else []
    write_json(path, now | {"commit": ", ".join(dict.fromkeys([*before, now["commit"]]))})


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("runs/repro"), help="where runs and the report go")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer settings and steps")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    arguments = parser.parse_args(argv)
    folder = arguments.output / ("quick" if arguments.quick else "full")
    if arguments.quick:
        rlsd = rlsd_runs(folder / "rlsd", METHODS[:3], [0], steps=40)
        ssd = ssd_runs(folder / "ssd", TEMPERATURES[1:4:2], [0], problems=120)
    else:
        rlsd = rlsd_runs(folder / "rlsd", METHODS, range(3), steps=100)
        ssd = ssd_runs(folder / "ssd", TEMPERATURES, range(3), problems=200)
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    for name in ("arithmetic", "stdlib"):
        with_testbed(TrainerConfig(testbed=name))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console()) as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task("runs", total=len(rlsd) + len(ssd))
        submitted = [pool.submit(run) for run in (*ssd, *rlsd)]  # the long ones first
        for ended in as_completed(submitted):
            if ended.exception():
                pool.shutdown(cancel_futures=True)
            ended.result()
            progress.advance(task)
    Console().print(repro_report.write(folder))


if __name__ == "__main__":
    main()
