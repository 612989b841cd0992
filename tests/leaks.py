"""Thousands of random calls, forward and backward, after which the process is no larger: `make leaks`.

Every round makes the same calls, so that from the second one on what malloc keeps between them is the same too.
"""

import argparse
import ctypes
import gc
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from resource import getpagesize

import fuzz_cases
import heads
import torch
from fuzz_cases import on_logits
from fuzz_hidden import on_hidden

BOUND = 1 << 18  # bytes, of 8,000 calls: 33 a call
WARM = 2  # rounds that are not counted
FUNCTIONS = [*((on_logits, name) for name in fuzz_cases.FUNCTIONS), *((on_hidden, name) for name in heads.FUNCTIONS)]


def resident():
    """Bytes in memory, without what malloc could return."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


def call(seed):
    """A random call; every fifth time one that is refused."""
    generator = random.Random(seed)
    draw, name = FUNCTIONS[seed % len(FUNCTIONS)]
    case = draw(name, fuzz_cases.of_random(generator))
    if draw is on_hidden:
        problem, options = case
        heads.run_fused(name, problem, everything=generator.random() < 0.5, **options)
    elif generator.random() < 0.8:
        fuzz_cases.run(case)
    else:
        refused(case, generator)


def refused(case, generator):
    """The case with something that Python, or the C++ operator itself, must refuse."""
    kind = generator.choice(("dtype", "mask", "operator", "second backward"))
    try:
        if kind == "dtype":
            fuzz_cases.run(replace(case, arguments=[case.arguments[0].int(), *case.arguments[1:]]))
        elif kind == "mask":
            fuzz_cases.run(replace(case, options={**case.options, "mask": torch.ones(7, 7)}))
        elif kind == "operator":
            ids, wide, narrow = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.float64), torch.zeros(3)
            torch.ops.sdkernels_cpu.row_statistics(
                torch.zeros(3, 9), ids, None, 1.0, None, wide, narrow, narrow, narrow, "none"
            )
        else:
            found, _ = heads.run_fused("grpo_loss", heads.problem(3))
            found["loss"].backward()
    except (TypeError, ValueError, RuntimeError):
        return
    raise AssertionError(f"{case.name} with another {kind} was not refused")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000, help="of each round")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    begun, sizes = time.monotonic(), []
    for done in range(options.rounds):
        for seed in range(options.calls):
            call(seed)
        sizes.append(resident())
        print(f"{(done + 1) * options.calls:6} calls, {time.monotonic() - begun:4.0f} s: {sizes[-1] / 2**20:.2f} MiB")
    growth = sizes[-1] - min(sizes[WARM - 1 : -1])
    print(f"grew by {growth / 2**20:.2f} MiB after {WARM * options.calls} calls; allowed is {BOUND / 2**20:g} MiB")
    sys.exit(growth > BOUND)


if __name__ == "__main__":
    main()
