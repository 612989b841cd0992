"""Losses from hidden states: what they are in float64, what they need, how far off bfloat16 logits put Delta."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdkernels
from benchmarks import runner
from benchmarks.inputs import row_chunks
from benchmarks.linear_peers import (
    JSD,
    JSD_SETTING,
    RLSD,
    HeadInputs,
    LinearCase,
    Step,
    grpo_formula,
    head_inputs,
    linear_cases,
)
from benchmarks.opsd_truth import RATIO_FACTOR, exact
from benchmarks.prepared import Results
from benchmarks.runner import Prepared, Unable
from benchmarks.truth import (
    GRADIENT_TOLERANCE,
    LINEAR_TOLERANCE,
    LOG_PROB_TOLERANCE,
    ROUNDING,
    WEIGHT_TOLERANCE,
    rlsd_formula,
    worst_of,
)
from sdkernels.head import CHUNK_BYTES

STATUS = Path("/proc/self/status")
MEMORY = Path("/proc/meminfo")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
LARGE = (65536, 151936, 4096)  # tokens, V, H of a step whose needs are computed
H200_FLOPS = 790e12  # of its 16-bit matmuls, as measured by others
WARM_UP = (16, 1024, 64)  # tokens, V, H: what a first call loads and allocates for good is not counted
PRELOAD = ["torch", "trl.trainer.utils", "trl.kernels.chunked_logprob", "trl.kernels.chunked_divergence",
           "liger_kernel.chunked_loss"]  # fmt: skip


class Matmuls(Prepared):
    """The yardstick: a head's three matmuls as fast as they go, of float32 on a CPU, on a GPU of the given dtype."""

    def __init__(self, inputs: HeadInputs) -> None:
        cuda = inputs.student.is_cuda
        self.rows = min(len(inputs.student), 2048 if cuda else 512)
        self.hidden, self.weight = (x if cuda else x.float() for x in (inputs.student[: self.rows], inputs.weight))
        self.logits = self.hidden.new_empty(self.rows, len(self.weight))
        self.gradients = [torch.empty_like(self.hidden), torch.empty_like(self.weight)]

    def run(self) -> None:
        """Logits, and as if they were their own gradient, those of hidden states and weight."""
        torch.mm(self.hidden, self.weight.T, out=self.logits)
        torch.mm(self.logits, self.weight, out=self.gradients[0])
        torch.mm(self.logits.T, self.hidden, out=self.gradients[1])


def spectral_norm(matrix: Tensor) -> Tensor:
    """The largest singular value of a tall matrix or a wide one."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(tall.T @ tall)[-1].sqrt()


class LinearTruth:
    """One loss in float64 on the same hidden states and weights.

    A row's gradient may be off by its bound (1e-6 c + u ||g*||), and as the logits are made here too, by c times what
    log-probs may be off. Through the head that becomes at most the spectral norm of the weight times as much, and of
    all rows, in the weight's gradient, that of the hidden states.
    """

    def __init__(self, inputs: HeadInputs, op: str) -> None:
        self.half = inputs.student.dtype != torch.float32
        hidden, teacher_hidden, weight = (x.double() for x in (inputs.student, inputs.teacher, inputs.weight))
        student, teacher = hidden @ weight.T, teacher_hidden @ weight.T
        share = 1 / len(hidden)
        if op == JSD:
            found = exact(student, teacher, JSD_SETTING)
            self.values, per_token = {"divergence": found.divergence}, found.divergence
            gradient = found.gradient * share
            coefficient = torch.full_like(per_token, RATIO_FACTOR * (1 - JSD_SETTING.beta) * share)
        else:
            log_p = torch.log_softmax(student, -1)
            log_prob = log_p.gather(-1, inputs.token_ids[:, None])[:, 0].requires_grad_()
            advantages, old_log_prob = inputs.advantages.double(), inputs.old_log_prob.double()
            if op == RLSD:
                teacher_log_prob = torch.log_softmax(teacher, -1).gather(-1, inputs.token_ids[:, None])[:, 0]
                per_token = rlsd_formula(log_prob, teacher_log_prob, advantages, old_log_prob).loss
                self.values = {"information_gain": teacher_log_prob - log_prob.detach()}
            else:
                per_token = grpo_formula(log_prob, advantages, old_log_prob)
                self.values = {"log_prob": log_prob.detach()}
            (coefficient,) = torch.autograd.grad(per_token.mean(), log_prob)
            gradient = -coefficient[:, None] * log_p.exp()
            gradient.scatter_add_(-1, inputs.token_ids[:, None], coefficient[:, None])
        self.loss, self.size = per_token.detach().mean(), per_token.detach().abs().mean()
        self.gradients = {"hidden_gradient": gradient @ weight, "weight_gradient": gradient.T @ hidden}
        self.rounding = ROUNDING[inputs.student.dtype]
        log_prob_tolerance = LINEAR_TOLERANCE if self.half else LOG_PROB_TOLERANCE
        bound = (GRADIENT_TOLERANCE + log_prob_tolerance) * coefficient.abs() + self.rounding * gradient.norm(dim=-1)
        self.bounds = {
            "hidden_gradient": spectral_norm(weight) * bound,  # per row
            "weight_gradient": spectral_norm(hidden) * bound.norm(),  # of all of it
        }
        self.tolerances = {
            "information_gain": LINEAR_TOLERANCE if self.half else 2 * LOG_PROB_TOLERANCE,
            "log_prob": log_prob_tolerance,
            "divergence": LOG_PROB_TOLERANCE,
        }

    def errors(self, result: Results) -> dict[str, float]:
        """The worst error of each result as a multiple of its tolerance."""
        worst = {}
        for name, value in result.items():
            value = value.double()
            if name == "loss":
                relative = LINEAR_TOLERANCE if self.half else WEIGHT_TOLERANCE
                multiples = (value - self.loss).abs() / (relative * self.size)
            elif name in self.values:
                multiples = (value - self.values[name]).abs() / self.tolerances[name]
            else:
                expected, dims = self.gradients[name], {"hidden_gradient": -1, "weight_gradient": (0, 1)}[name]
                bound = self.bounds[name] + self.rounding * expected.norm(dim=dims)
                multiples = (value - expected).norm(dim=dims) / (bound + 1e-30)
            worst[name] = worst_of(multiples)
        return worst


def large_step() -> dict[str, Any]:
    """Computed, not measured: what RLSD needs on a GPU in bfloat16, in bytes and FLOP."""
    tokens, vocab, hidden = LARGE
    logits, weight = 4 * tokens * vocab, 2 * hidden * vocab
    chunk = 4 * vocab * -(-tokens // -(-tokens // (CHUNK_BYTES["cuda"] // (4 * vocab))))  # chunks of one size
    flops = 4 * 2 * tokens * vocab * hidden
    on_hidden = 2 * tokens * hidden
    return {
        "bytes": {  # the logits version in forward and in backward, linear_rlsd_loss likewise
            "student logits, or in their place their gradient, float32": (logits, logits, chunk, 0),
            "teacher logits, float32": (logits, 0, chunk, 0),
            "the gradient again for the matmuls, bfloat16": (0, logits // 2, chunk // 2, 0),
            "hidden gradient, sum in float32": (0, 0, 2 * on_hidden, 2 * on_hidden),
            "hidden gradient, bfloat16": (0, on_hidden, 0, on_hidden),
            "weight gradient, sum in float32": (0, 0, 2 * weight, 2 * weight),
            "weight gradient, bfloat16": (0, weight, 0, weight),
        },
        "flops": flops,
        "floor_seconds": flops / H200_FLOPS,
    }


def delta_numbers(inputs: HeadInputs) -> dict[str, dict[str, float]]:
    """How far Delta is from float64 arithmetic on the same hidden states and weights, ours and on rounded logits."""
    with torch.no_grad():
        ours = sdkernels.linear_rlsd_token_advantage(
            inputs.student, inputs.teacher, inputs.weight, inputs.token_ids, inputs.advantages
        ).information_gain
    wide = inputs.weight.double()
    truth, rounded = torch.empty(2, len(inputs.student), dtype=torch.float64, device=wide.device)
    for rows in row_chunks(inputs.token_ids[:, None].expand(-1, len(wide))):
        ids = inputs.token_ids[rows, None]
        logits = [x[rows].double() @ wide.T for x in (inputs.student, inputs.teacher)]
        for gain, dtype in ((truth, torch.float64), (rounded, torch.bfloat16)):
            student, teacher = (torch.log_softmax(x.to(dtype).double(), -1).gather(-1, ids)[:, 0] for x in logits)
            gain[rows] = teacher - student
    numbers = {"Delta": {"rms": float(truth.square().mean().sqrt()), "max": float(truth.abs().max())}}
    for name, gain in (("sdkernels linear", ours.double()), ("logits in bfloat16", rounded)):
        error = gain - truth
        numbers[name] = {
            "rms": float(error.square().mean().sqrt()),
            "max": float(error.abs().max()),
            "flips": float((gain.sign() != truth.sign()).double().mean()),
        }
    return numbers


def _kilobytes(key: str, path: Path = STATUS) -> int:
    return int(re.search(rf"{key}:\s*(\d+) kB", path.read_text())[1])


def free_bytes(device: torch.device) -> int:
    """What the device could still give."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * _kilobytes("MemAvailable", MEMORY) if MEMORY.exists() else sys.maxsize


def _resident_peak(step: Step) -> int:
    """Bytes of resident memory that a run adds at its worst moment."""
    step.reset()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be there to be used again
    CLEAR.write_text(RESET_PEAK)
    before = _kilobytes("VmRSS")
    step.run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _measure(send: Connection, op: str, name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """In a process of its own, after a warm-up at a tiny size."""
    try:
        case = next(case for case in linear_cases() if (case.op, case.name) == (op, name))
        device = torch.device("cpu")
        warm_up = Step(head_inputs(*WARM_UP, dtype, device), case.loss)
        warm_up.reset()
        warm_up.run()
        del warm_up
        step = Step(head_inputs(*sizes, dtype, device, distinct=WARM_UP[0]), case.loss)
        send.send(_resident_peak(step) if CLEAR.exists() else runner.peak_memory(step, device))
    except Exception as error:
        send.send(runner.why_not(error))


def peak_memory(case: LinearCase, step: Step, sizes: tuple[int, int, int]) -> int:
    """Bytes beyond the inputs; sizes are tokens, V, H. On a CPU a process of its own is asked."""
    if step.inputs.weight.is_cuda:
        found = runner.peak_memory(step, step.inputs.weight.device)
        step.reset()
        return found
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send, case.op, case.name, sizes, step.inputs.weight.dtype))
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        found = "its process was killed"
    process.join()
    if isinstance(found, str):
        raise Unable(found)
    return found
