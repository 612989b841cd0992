"""SSD's loss and its terms against what a user would run instead, with truncated, whole and recorded bases."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
import sdkernels
from benchmarks.cases import BASELINE
from benchmarks.harness import Benchmark, Figures
from benchmarks.inputs import Inputs
from benchmarks.truncated_cases import NUCLEUS, PAPER, SSD_LOSS, ssd_cases
from benchmarks.truncated_truth import PLACES, SSDTruth, boundary

GUIDE = """
inputs
  recorded rollouts   tokens that a small trained Qwen3 sampled. Its vocabulary has 18 tokens, so it is here for
                      correctness; its times are call overhead. Always float32.
  Qwen3, Llama 3      synthetic rows with heavy tails, from thousands of likely tokens to a handful, at their vocabulary
                      sizes. The base is the student plus noise. The last table says how large the supports are.

operations
  top_k=20 top_p=0.8  at T = 1.6: the paper's setting for Qwen3-4B-Instruct and Qwen3-30B-A3B-Instruct.
  top_p=0.95          alone: supports of most rows are too long for lists of ids.
  T=1.5               no truncation.
  recorded support    the paper's setting with the base's ids and log-probs stored, 64 places a row.

implementations
  eager PyTorch       transformers' warpers on the base, the terms of Eq. 4 with log_softmax and logsumexp, autograd.
  cross-entropy       the warpers, softmax and F.cross_entropy: the same loss, as all three weights are 1; no terms.
  torch.compile       of the row above; compiling is not timed.

columns
  median ms           of interleaved runs, caches flushed before each; gradients are freed outside the timed region. p20
                      to p80: how far to trust it.
  speedup             of the median over eager PyTorch's, for the same operation.
  peak MB             memory beyond the inputs at the worst moment, the gradient included, from a separate run.
  GB/s, % of copy     on the least bytes per logit that any implementation must read or write ("B/logit"); the copy is
                      timed in the same rounds. In brackets: on the bytes that our kernels do move ("ours"), which for
                      supports of more than 64 tokens are more: the mean over the rows.
  error / tolerance   the worst of all results, against float64 on the same logits and on the support that the
                      implementation chose, each as a multiple of its tolerance. "support": how far that is from the
                      exact one, in units of 2e-6 of the mass at the boundary of top_p. Beyond 1 (for peers: 100) the
                      row says "wrong" and shows no speed. Only sdkernels keeps ties together; where a peer splits
                      them, its own set is what its values are held to.

Out of place a CPU time is half page faults: see the transparent-huge-page line. sdkernels asks for huge pages itself;
PyTorch does with THP_MEM_ALLOC_ENABLE=1, which makes eager PyTorch several times as fast where the mode is "madvise".
"""


def ssd_numbers(inputs: Inputs) -> dict[str, float]:
    """The size of SSD's terms and supports on float32 logits, and what rounding them to bfloat16 does."""
    rounded = inputs.to(torch.bfloat16)
    exact, coarse = (
        sdkernels.ssd_decomposition(x.student, x.teacher, PAPER.temperature, **PAPER.filters) for x in (inputs, rounded)
    )
    nucleus = boundary(inputs, "teacher", NUCLEUS).size
    return {
        "tokens": len(inputs.token_ids),
        **{name: float(value.double().mean()) for name, value in exact._asdict().items()},
        "nucleus_size": float(nucleus.double().median()),
        "nucleus_listed": float((nucleus <= PLACES).double().mean()),
        "bfloat16_error_rms": float((coarse.cross_entropy - exact.cross_entropy).square().mean().sqrt()),
        "bfloat16_size_changes": float((coarse.support_size != exact.support_size).double().mean()),
    }


FIGURES = Figures(
    key="ssd",
    title="SSD's own numbers",
    of=ssd_numbers,
    sections=(
        {"tokens": ("tokens", "{:,}", "")},
        {
            "support_compression": ("support compression, nats", "{:.3f}", f"means, {PAPER}"),
            "within_support_reshaping": ("within-support reshaping, nats", "{:.3f}", ""),
            "base_alignment": ("base alignment, nats", "{:.4f}", ""),
            "constant": ("constant, nats", "{:.3f}", ""),
            "cross_entropy": ("cross-entropy, nats", "{:.3f}", "their sum"),
            "kept_mass": ("kept mass", "{:.1%}", ""),
            "support_size": ("|S|", "{:.1f}", ""),
        },
        {
            "nucleus_size": ("median |S|", "{:,.0f}", str(NUCLEUS)),
            "nucleus_listed": (f"|S| <= {PLACES}", "{:.1%}", "kept as lists of ids"),
        },
        {
            "bfloat16_error_rms": ("bfloat16: rms error of cross-entropy", "{:.4f}", str(PAPER)),
            "bfloat16_size_changes": ("bfloat16: |S| changes", "{:.1%}", "ties are kept together"),
        },
    ),
)

BENCHMARK = Benchmark(
    name="ssd_loss",
    description=__doc__,
    guide=GUIDE,
    cases=ssd_cases,
    truth=SSDTruth,
    baseline=BASELINE,
    headline=SSD_LOSS.format(PAPER),
    figures=FIGURES,
    tokens=(64, 4096),
    example="recorded, decomposition, 'T=1.6, eager'",
    packages=("triton", "transformers"),
)

if __name__ == "__main__":
    BENCHMARK.run()
