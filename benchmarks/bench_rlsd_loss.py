"""RLSD's loss against what a user would run instead, on recorded rollouts and at real vocabulary sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
import sdkernels
from benchmarks.cases import BASELINE, RLSD_LOSS, rlsd_cases
from benchmarks.harness import Benchmark, Figures
from benchmarks.inputs import Inputs
from benchmarks.truth import CLIP_RANGE, Truth

GUIDE = """
inputs
  recorded rollouts   tokens that a small trained Qwen3 sampled, with the hidden states of student and teacher (see
                      benchmarks/record_rollouts.py). Its vocabulary has 18 tokens, so it is here for RLSD's own numbers
                      and for correctness; its times are call overhead. Always float32.
  Qwen3, Llama 3      synthetic rows with heavy tails and some p(y) near 1, at their vocabulary sizes.

implementations
  eager PyTorch       log_softmax and gather for student and teacher, the official formula, PPO's clip, autograd.
  torch.compile       of the same; compiling is not timed (the first run takes half a minute longer, for its cache).
  chunked eager       the same for a few tokens at a time, each chunk with its own backward.
  TRL log-probs       trl's selective_log_softmax in place of log_softmax and gather, on the logits as they are.
  Liger ... GRPO      with RLSD's token advantages. It takes one advantage per sequence, so it cannot do the job; given
                      one per token it raises nothing and is wrong.

columns
  median ms           of interleaved runs, caches flushed before each; gradients are freed and logits that an in-place
                      backward overwrote are restored outside the timed region. p20 to p80: how far to trust it.
  speedup             of the median over eager PyTorch's, for the same operation (bfloat16: after .float()).
  peak MB             memory beyond the inputs at the worst moment, the gradient included, from a separate run.
  GB/s, % of copy     on the least bytes per logit that any implementation must read or write ("B/logit"); the copy is
                      timed in the same rounds. In brackets: on the bytes that our kernels do move ("ours").
  error / tolerance   the worst of all results, against float64 on the same logits: gradient per row, loss, log-probs,
                      entropies, weights, advantages, each as a multiple of its tolerance. Beyond 1 (for peers: 100)
                      the row says "wrong" and shows no speed.

Out of place a CPU time is half page faults: see the transparent-huge-page line. sdkernels asks for huge pages itself;
PyTorch does with THP_MEM_ALLOC_ENABLE=1, which makes eager PyTorch several times as fast where the mode is "madvise".
"""


def rlsd_numbers(inputs: Inputs) -> dict[str, float]:
    """How the evidence ratio behaves on float32 logits, and what rounding them to bfloat16 does to it."""
    arguments = inputs.token_ids, inputs.advantages, inputs.old_log_prob
    with torch.no_grad():
        exact = sdkernels.rlsd_loss(inputs.student, inputs.teacher, *arguments, clip_range=CLIP_RANGE)
        rounded = sdkernels.rlsd_loss(
            inputs.student.bfloat16(), inputs.teacher.bfloat16(), *arguments, clip_range=CLIP_RANGE
        )
    metrics = sdkernels.rlsd_metrics(exact, clip_range=CLIP_RANGE)
    clipped = [(x.weight > 1 + CLIP_RANGE).int() - (x.weight < 1 - CLIP_RANGE).int() for x in (exact, rounded)]
    gain, rounded_gain = exact.information_gain, rounded.information_gain
    return {
        "tokens": len(inputs.token_ids),
        "pass_rate": float(inputs.rewards.mean()),
        "tokens_with_advantage": float((inputs.advantages != 0).float().mean()),
        "evidence_clipped_below": float(metrics["evidence_clipped_below"]),
        "evidence_clipped_above": float(metrics["evidence_clipped_above"]),
        "information_gain_abs": float(metrics["information_gain_abs"]),
        "entropy": float(metrics["entropy"]),
        "bfloat16_gain_error_rms": float((rounded_gain - gain).square().mean().sqrt()),
        "bfloat16_sign_flips": float((rounded_gain.sign() != gain.sign()).float().mean()),
        "bfloat16_clip_changes": float((clipped[0] != clipped[1]).float().mean()),
    }


FIGURES = Figures(
    key="rlsd",
    title="RLSD's own numbers",
    of=rlsd_numbers,
    sections=(
        {
            "tokens": ("tokens", "{:,}", ""),
            "pass_rate": ("pass rate", "{:.1%}", ""),
            "tokens_with_advantage": ("tokens with A != 0", "{:.1%}", ""),
        },
        {
            "evidence_clipped_below": ("clipped, w < 0.8", "{:.1%}", ""),
            "evidence_clipped_above": ("clipped, w > 1.2", "{:.1%}", "both: 3 to 6% in the paper's runs"),
            "information_gain_abs": ("mean |Delta|, nats", "{:.3f}", ""),
            "entropy": ("mean entropy, nats", "{:.3f}", ""),
        },
        {
            "bfloat16_gain_error_rms": ("bfloat16: rms error of Delta", "{:.4f}", ""),
            "bfloat16_sign_flips": ("bfloat16: sign of Delta flips", "{:.1%}", "so keep logits in float32"),
            "bfloat16_clip_changes": ("bfloat16: clip decision changes", "{:.1%}", ""),
        },
    ),
)

BENCHMARK = Benchmark(
    name="rlsd_loss",
    description=__doc__,
    guide=GUIDE,
    cases=rlsd_cases,
    truth=Truth,
    baseline=BASELINE,
    headline=RLSD_LOSS,
    figures=FIGURES,
    tokens=(256, 8192),
    example="recorded, 'token_log_prob, forward', TRL",
    packages=("triton", "trl", "liger-kernel"),
)

if __name__ == "__main__":
    BENCHMARK.run()
