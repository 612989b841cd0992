"""Truncated log-probs and supports against what a user would run instead, in four settings of the filters."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
from benchmarks.cases import BASELINE
from benchmarks.harness import Benchmark, Figures
from benchmarks.inputs import Inputs
from benchmarks.truncated_cases import LOG_SOFTMAX, TRUNCATIONS, truncation_cases
from benchmarks.truncated_truth import PLACES, TruncationTruth, boundary

GUIDE = """
inputs
  recorded rollouts   tokens that a small trained Qwen3 sampled. Its vocabulary has 18 tokens, so it is here for
                      correctness; its times are call overhead. Always float32.
  Qwen3, Llama 3      synthetic rows with heavy tails, from thousands of likely tokens to a handful, at their vocabulary
                      sizes. The last table says how large the supports are.

implementations
  eager PyTorch       transformers' warpers in its order, then log_softmax, then gather or topk.
  one sort            the support as a threshold, by hand: one sort where top_p is on, else one topk; then log_softmax.
  torch.compile       of the row above; compiling is not timed, but takes minutes before the first rows appear.
  FlashInfer mask     top_k_renorm_probs and top_p_renorm_probs, whose zeros mask the logits; then log_softmax.
  They compute in float32 and return float32; sdkernels' log q has the logits' dtype, as torch.log_softmax's has.

columns
  median ms           of interleaved runs, caches flushed before each; gradients are freed outside the timed region. p20
                      to p80: how far to trust it.
  speedup             of the median over eager PyTorch's, for the same operation and setting.
  peak MB             memory beyond the inputs at the worst moment, the gradient included, from a separate run.
  GB/s, % of copy     on the least bytes per logit that any implementation must read or write ("B/logit"); the copy is
                      timed in the same rounds. In brackets: on the bytes that our kernels do move ("ours"), which for
                      supports of more than 64 tokens are more: the mean over the rows.
  error / tolerance   the worst of all results, against float64 on the same logits and on the support that the
                      implementation chose, each as a multiple of its tolerance. "support": how far that is from the
                      exact one, in units of 2e-6 of the mass at the boundary of top_p, or of min_p. Beyond 1 (for
                      peers: 100) the row says "wrong" and shows no speed. Only sdkernels keeps ties together; where a
                      peer splits them, its own set is what its values are held to.

backward starts from a random gradient, for peers 0 outside the support, where they would count it. token_log_prob's
tokens are sampled from the truncated distribution.

Out of place a CPU time is half page faults: see the transparent-huge-page line. sdkernels asks for huge pages itself;
PyTorch does with THP_MEM_ALLOC_ENABLE=1, which makes eager PyTorch several times as fast where the mode is "madvise".
"""


def truncation_numbers(inputs: Inputs) -> dict[str, float]:
    """How large the supports are, and how many change when logits are rounded to bfloat16."""
    numbers: dict[str, float] = {"tokens": len(inputs.token_ids)}
    rounded = inputs.to(torch.bfloat16)
    for setting in TRUNCATIONS:
        size = boundary(inputs, "student", setting).size.double()
        numbers |= {
            f"{setting}: median size": float(size.median()),
            f"{setting}: largest size": float(size.max()),
            f"{setting}: share listed": float((size <= PLACES).double().mean()),
            f"{setting}: bfloat16 changes": float((boundary(rounded, "student", setting).size != size).double().mean()),
        }
    return numbers


FIGURES = Figures(
    key="truncation",
    title="The supports",
    of=truncation_numbers,
    sections=(
        {"tokens": ("tokens", "{:,}", "")},
        *(
            {
                f"{setting}: median size": (f"{setting}: median |S|", "{:,.0f}", ""),
                f"{setting}: largest size": ("largest |S|", "{:,.0f}", ""),
                f"{setting}: share listed": (f"|S| <= {PLACES}", "{:.1%}", "kept as lists of ids"),
                f"{setting}: bfloat16 changes": ("bfloat16: |S| changes", "{:.1%}", "ties are kept together"),
            }
            for setting in TRUNCATIONS
        ),
    ),
)

BENCHMARK = Benchmark(
    name="truncation",
    description=__doc__,
    guide=GUIDE,
    cases=truncation_cases,
    truth=TruncationTruth,
    baseline=BASELINE,
    headline=LOG_SOFTMAX.format(TRUNCATIONS[0]),
    figures=FIGURES,
    tokens=(16, 4096),
    example="recorded, token_log_prob, 'forward, top_k', 'one sort'",
    packages=("triton", "transformers", "flashinfer-python"),
)

if __name__ == "__main__":
    BENCHMARK.run()
