"""OPSD's and SDPO's divergences against what a user would run instead: JSD, both KLs, clipped and reduced rows."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
from benchmarks import report
from benchmarks.cases import BASELINE
from benchmarks.harness import RECORDED, Benchmark, Figures, Tables
from benchmarks.inputs import Inputs, row_chunks
from benchmarks.opsd_cases import CLIPPED, DENSE, HALF, JSD, OPSD_LOSS, OURS, SDPO, opsd_cases
from benchmarks.opsd_peers import of_log_softmax
from benchmarks.opsd_truth import OPSDTruth, Setting, exact, relative_error

NEEDED = 4.0  # times as fast as eager PyTorch on a CPU, for the JSD forward and backward out of place
ONE_TENSOR = 1.01  # of the gradient's size: at most a few values per token beside it

GUIDE = """
inputs
  recorded rollouts   tokens that a small trained Qwen3 sampled, and its teacher, the same network that sees privileged
                      information. Its vocabulary has 18 tokens, fewer than any top_k here, so it is here for
                      correctness; its times are call overhead. Always float32.
  Qwen3, Llama 3      synthetic rows with heavy tails, from thousands of likely tokens to a handful, at their vocabulary
                      sizes. The teacher is the student plus noise.

operations
  jsd beta=0.5        beta KL(P_T||M) + (1 - beta) KL(P_S||M), M = beta P_T + (1 - beta) P_S: beta is the teacher's.
  forward_kl          KL(P_T||P_S); reverse_kl is KL(P_S||P_T). In TRL and Liger they are beta = 0 and beta = 1.
  token_clip=0.001    OPSD's: each token's part of the KL at most that. Its authors' 0.05 would hardly clip here.
  student top_k=100   SDPO's: the student's tokens, and the rest as one; the JSD of these.
  teacher top_k=20    the teacher's tokens, renormalised.

implementations
  eager PyTorch       TRL's formula: log_softmax of both in float32, the mixture by logsumexp, sums of kl_div, autograd.
  torch.compile       of the same; compiling is not timed, but takes minutes before the first rows appear.
  bfloat16 eager      the same without the cast of bfloat16 logits to float32.
  listed logits       log_softmax of the listed logits alone, where rows are renormalised.
  TRL GKD             GKDTrainer.generalized_jsd_loss on .float() of the logits.
  TRL SDPO            SDPOTrainer's compute_full_logit_self_distillation_loss, compute_topk_self_distillation_loss, or
                      compute_divergence of a teacher's tokens, likewise.
  Liger JSD, KL       LigerJSD and LigerKLDIVLoss on float32 log_softmax of both; they are Triton, so GPU only.

columns
  median ms           of interleaved runs, caches flushed before each; gradients are freed outside the timed region. p20
                      to p80: how far to trust it.
  speedup             of the median over eager PyTorch's, for the same operation. The last tables compare sdkernels with
                      each of the others.
  peak MB             memory beyond the inputs at the worst moment, the gradient included, from a separate run.
  GB/s, % of copy     on the least bytes per logit that any implementation must read or write ("B/logit"); the copy is
                      timed in the same rounds. In brackets: on the bytes that our kernels do move ("ours").
  error / tolerance   the worst of all results, against float64 on the same logits: gradient per row, loss, divergence,
                      each as a multiple of its tolerance. Beyond 1 (for peers: 100) the row says "wrong" and shows no
                      speed. sdkernels keeps ties of top_k by id; where a peer splits them otherwise, its own tokens
                      are what its values are held to.

Out of place a CPU time is half page faults: see the transparent-huge-page line. sdkernels asks for huge pages itself;
PyTorch does with THP_MEM_ALLOC_ENABLE=1, which makes eager PyTorch several times as fast where the mode is "madvise".
"""


def half_precision_gradient(setting: Setting, student: Tensor, teacher: Tensor) -> Tensor:
    """What `bfloat16 eager` gives."""
    leaf = student.detach().requires_grad_()
    of_log_softmax(leaf, teacher, setting, leaf.dtype)["divergence"].sum().backward()
    return leaf.grad


def opsd_numbers(inputs: Inputs) -> dict[str, float]:
    """The size of the divergences on float32 logits, and what bfloat16 does to their gradients."""
    rounded = inputs.to(torch.bfloat16)
    numbers: dict[str, float] = {"tokens": len(inputs.token_ids)}
    rows_of = [(inputs.student[rows], inputs.teacher[rows]) for rows in row_chunks(inputs.student)]
    for setting in DENSE:
        numbers[str(setting)] = float(torch.cat([exact(*pair, setting).divergence for pair in rows_of]).mean())
    clipped = torch.cat([exact(*pair, CLIPPED).clipped for pair in rows_of])
    places = min(SDPO.top_k or 0, inputs.student.shape[-1])
    kept = [student.double().softmax(-1).topk(places).values.sum(-1) for student, _ in rows_of]
    numbers |= {"clipped": float(clipped.double().mean()), "kept": float(torch.cat(kept).mean())}
    for setting in DENSE:
        numbers[f"{setting}, rounded"] = relative_error(
            inputs, setting, lambda *pair, of=setting: exact(*(x.bfloat16() for x in pair), of).gradient
        )
        numbers[f"{setting}, {HALF}"] = relative_error(
            rounded, setting, lambda *pair, of=setting: half_precision_gradient(of, *pair)
        )
    return numbers


FIGURES = Figures(
    key="opsd",
    title="OPSD's own numbers",
    of=opsd_numbers,
    sections=(
        {"tokens": ("tokens", "{:,}", "")},
        {
            **{str(setting): (f"{setting}, nats", "{:.4f}", "means") for setting in DENSE},
            "clipped": ("rows with a clipped token", "{:.1%}", str(CLIPPED)),
            "kept": ("kept mass", "{:.1%}", str(SDPO)),
        },
        {
            f"{setting}, rounded": (f"{setting}: gradient's error", "{:.1%}", "of logits rounded to bfloat16")
            for setting in DENSE
        },
        {
            f"{setting}, {HALF}": (f"{setting}: gradient's error", "{:.1%}", f"on top: {HALF}, of those logits")
            for setting in DENSE
        },
    ),
)


def conclude(screen: report.Screen, device: torch.device, tables: Tables) -> None:
    """How many times as fast as each peer sdkernels is, and what is required of the JSD."""
    large = {title: rows for title, rows in tables.items() if not title.startswith(RECORDED)} or tables
    columns = [f"{title.split(':')[0].removeprefix('synthetic ')} {title.rsplit(' ', 1)[1]}" for title in large]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    required = []
    for (title, rows), column in zip(large.items(), columns, strict=True):
        ours = {row.op: row for row in rows if row.name == OURS}
        for row in rows:
            if row.name == OURS or row.op not in ours:
                continue
            seconds = ours[row.op].seconds
            ratio = f"{row.seconds[0] / seconds[0]:.2f}x" if row.seconds and seconds else row.reason or "no speed"
            cells.setdefault((row.op, row.name), {})[column] = ratio.split(":")[0]
        jsd = ours.get(OPSD_LOSS.format(JSD))
        if jsd and jsd.speedup:
            tensors = jsd.peak_bytes / jsd.logits_bytes
            fast, lean = ("yes" if met else "NO" for met in (jsd.speedup >= NEEDED, tensors <= ONE_TENSOR))
            required.append((title, f"{jsd.speedup:.2f}x", fast, f"{tensors:.3f}", lean))
        elif jsd:
            required.append((title, jsd.reason or "no speed", "NO", "", ""))
    sections = []
    for op in dict.fromkeys(op for op, _ in cells):
        of_op = [(peer, *(row.get(column, "") for column in columns)) for (of, peer), row in cells.items() if of == op]
        sections.append([(op.rsplit(", ", 1)[1] if not i else "", *row) for i, row in enumerate(of_op)])
    screen.table(
        f"{OURS}' speed over each peer's", ("operation", "peer", *columns), sections, text={"operation", "peer"}
    )
    if not required or device.type != "cpu":
        return
    screen.table(
        f"Required of {JSD} on a CPU, forward + backward out of place",
        ("input", f"over {BASELINE}", f">= {NEEDED:.0f}x", "peak / gradient", "no other (N, V)"),
        [required],
        text={"input"},
    )


BENCHMARK = Benchmark(
    name="opsd_loss",
    description=__doc__,
    guide=GUIDE,
    cases=opsd_cases,
    truth=OPSDTruth,
    baseline=BASELINE,
    headline=OPSD_LOSS.format(JSD),
    figures=FIGURES,
    tokens=(64, 4096),
    example="synthetic, reverse_kl, 'top_k=100 + tail', 'TRL GKD'",
    packages=("triton", "trl", "liger-kernel"),
    conclude=conclude,
)

if __name__ == "__main__":
    BENCHMARK.run()
