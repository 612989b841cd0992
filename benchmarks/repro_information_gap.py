"""RLSD's information gap (arXiv 2604.03128, Theorem 1 and Proposition 1), on a model small enough to enumerate.

In each of four contexts x the privileged r takes four values, P(r|x) = counts / 12, and P_T(y|x, r) is a table. The
student does not see r; its logits are the parameter. Everything goes through sdkernels in float64. P(r|x) enters as 12
equally likely samples, each r as often as its count, which is exact; what it is checked against weighs by P(r|x). P(x)
is uniform.

Theorem 1. E_r KL(P_T^r || P_S) = KL(E_r P_T^r || P_S) + I(Y; R | X): descent settles at I, not lower. A student that is
given r goes to 0: the gap is what r says about y.

Proposition 1. On one drawn r the gradient is g = g* + delta with E_r delta = 0. As P_T^r sums to 1 for every r,

    delta = -sum_v (P_T^r(v) - E_r P_T^r(v)) grad log P_S(v),    the same with the logits' gradients, grad z_v,
    E||delta||^2 = sum_{v, w} Cov_r(P_T(v), P_T(w)) <grad log P_S(v), grad log P_S(w)>.

Where the parameters are the logits, delta = E_r P_T^r - P_T^r and E||delta||^2 = sum_v Var_r P_T(v), whatever the
student: the noise stays when the loss has settled, and a constant small step then keeps the expected loss about
step / 4 E||delta||^2 above its floor. The sum without covariances, sum_v Var_r P_T(v) ||grad log P_S(v)||^2, is
exact where the gradients of the tokens that r moves are orthogonal to each other. In a table grad z_v are, and with
them for grad log P_S(v) it is exact; grad log P_S(v) are not: on a uniform student it is (1 - 1/V) of the truth. It
bounds from neither side: where those tokens' gradients are alike it is too large. Both sums are computed, on logits and
on hidden states below a fixed matrix.

Every bound is derived. Descent on a convex loss at step 1/L leaves a gap of at most ||z_0 - z*||^2 / (2 step k) after k
steps, L = 1/2 being the largest curvature of a log-sum-exp; on drawn r the gap is on average over K steps at most
||z_0 - z*||^2 / (2 step K) + step / 2 E||g||^2. Sampled means may be off by 5 standard errors, sums by their rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout is not installed
import sdkernels
from benchmarks import harness, report

CONTEXTS = {  # how far r moves the teacher's logits, and how often each r comes
    "r is the answer": (4.0, (6, 3, 2, 1)),
    "r is a hint": (1.5, (3, 3, 3, 3)),
    "one r prevails": (3.0, (9, 1, 1, 1)),
    "r says nothing": (0.0, (4, 4, 2, 2)),
}
SAMPLES, MOVED, VOCAB, HIDDEN = 12, 4, 8, 5  # each r moves a token of its own
STEP, STEPS = 2.0, 1000  # 1 / L
DRAWN_STEP, STUDENTS = 0.2, 64  # as many students, each with its own draws
DRAWS = 20_000
SHOWN = (0, 1, 10, 100, STEPS)
SIGMA = 5  # standard errors that a sampled mean may be off by


class Claim(NamedTuple):
    """A number, and the most that rounding, sampling or the theory of descent lets it be."""

    text: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False for NaN, too."""
        return self.found <= self.allowed


class Model(NamedTuple):
    """The teacher: its log-probs (R, X, V), P(r|x) (R, X), and its 12 equally likely samples (12, X, V)."""

    log_probs: Tensor
    weights: Tensor
    samples: Tensor

    @property
    def marginal(self) -> Tensor:
        """(X, V) log sum_r P(r|x) P_T(v|x, r)."""
        return self.expected(self.log_probs.exp()).log()

    def expected(self, values: Tensor) -> Tensor:
        """E_r of (R, X, ...)."""
        return torch.einsum("rx,rx...->x...", self.weights, values)

    @property
    def floor(self) -> Tensor:
        """(X,) I(Y; R | x) = H(E_r P_T^r) - E_r H(P_T^r)."""
        return entropy(self.marginal) - self.expected(entropy(self.log_probs))

    @property
    def rounding(self) -> float:
        """What a sum of as many terms as a context has may lose."""
        return float(torch.finfo(torch.float64).eps * SAMPLES * VOCAB * self.log_probs.abs().max())


def model() -> Model:
    """Each r lifts its own token, and others at random; how far is the context's."""
    generator = torch.Generator().manual_seed(0)
    strengths, counts = zip(*CONTEXTS.values(), strict=True)
    base = torch.randn(len(CONTEXTS), VOCAB, dtype=torch.float64, generator=generator)
    lift = torch.eye(MOVED, VOCAB) + 0.3 * torch.randn(MOVED, VOCAB, dtype=torch.float64, generator=generator)
    log_probs = (base + torch.tensor(strengths).unsqueeze(-1) * lift.unsqueeze(1)).log_softmax(-1)
    drawn = [torch.arange(MOVED).repeat_interleave(torch.tensor(count)) for count in counts]
    samples = torch.stack([log_probs[which, x] for x, which in enumerate(drawn)], 1)
    return Model(log_probs, torch.tensor(counts).double().T / SAMPLES, samples)


def entropy(log_p: Tensor) -> Tensor:
    """H of (..., V)."""
    return -(log_p.exp() * log_p).sum(-1)


def centred(log_p: Tensor) -> Tensor:
    """The logits of log_p that are nearest to 0: descent from 0 keeps the mean 0."""
    return log_p - log_p.mean(-1, keepdim=True)


def sample_gradients(hidden: Tensor, matrix: Tensor, teachers: Tensor) -> Tensor:
    """(12, X, D) what opsd_loss gives the parameters, logits = hidden @ matrix.T, for each sample of r on its own."""
    leaf = hidden.expand(len(teachers), *hidden.shape).clone().requires_grad_()
    sdkernels.opsd_loss(leaf @ matrix.T, teachers, reduction="sum").loss.backward()
    return leaf.grad


def predicted_noise(hidden: Tensor, matrix: Tensor, teacher: Model) -> tuple[Tensor, Tensor, Tensor]:
    """E||delta||^2 summed over contexts: by covariances with grad log P_S and with grad z, and by variances alone."""
    p = (hidden @ matrix.T).softmax(-1)
    grad_log_p = matrix - (p @ matrix).unsqueeze(-2)  # (X, V, D)
    deviation = teacher.log_probs.exp() - teacher.marginal.exp()
    covariance = teacher.expected(deviation.unsqueeze(-1) * deviation.unsqueeze(-2))
    parts = covariance * (grad_log_p @ grad_log_p.mT)
    return parts.sum(), (covariance * (matrix @ matrix.T)).sum(), parts.diagonal(dim1=-2, dim2=-1).sum()


def descend(teacher: Model) -> tuple[dict[str, Tensor], Tensor]:
    """On the expected loss: means over contexts in nats, squared norms summed over contexts; and the student."""
    student, eye = torch.zeros_like(teacher.marginal), torch.eye(VOCAB, dtype=torch.float64)
    curves: dict[str, list[Tensor]] = {}
    for _ in range(STEPS + 1):
        terms = sdkernels.opsd_decomposition(student, teacher.samples)
        loss = sdkernels.opsd_loss(student.expand_as(teacher.samples), teacher.samples).loss
        cross_entropy = -(teacher.marginal.exp() * student.log_softmax(-1)).sum(-1)
        gradients = sample_gradients(student, eye, teacher.samples)
        mean = gradients.mean(0)
        now = {
            "loss": loss,
            "floor": terms.mutual_information.mean(),
            "marginal_kl": terms.marginal_kl.mean(),
            "identity": (terms.total - terms.marginal_kl - terms.mutual_information).abs().max(),
            "independent": (cross_entropy - teacher.expected(entropy(teacher.log_probs))).mean(),
            "signal": mean.square().sum(),
            "noise": (gradients - mean).square().sum() / SAMPLES,
            "variances": predicted_noise(student, eye, teacher)[2],
            "against": ((gradients * mean).sum(-1) < 0).double().mean(),
        }
        for name, value in now.items():
            curves.setdefault(name, []).append(value)
        student = student - STEP * mean
    return {name: torch.stack(values) for name, values in curves.items()}, student


def descend_given_r(teacher: Model) -> Tensor:
    """The loss by step of a student with a row of logits for each r."""
    student, losses = torch.zeros_like(teacher.log_probs), []
    for _ in range(STEPS + 1):
        leaf = student.requires_grad_()
        output = sdkernels.opsd_loss(leaf, teacher.log_probs, reduction="sum")
        losses.append(teacher.expected(output.divergence.detach()).mean())
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        student = student.detach() - STEP * gradient
    return torch.stack(losses)


def descend_on_draws(teacher: Model) -> tuple[Tensor, Tensor]:
    """Students that see one drawn r at a step: expected loss above its floor and ||g||^2 / X, (STEPS + 1, 64) each."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(len(CONTEXTS)).expand(STUDENTS, -1)
    student = torch.zeros(STUDENTS, *teacher.marginal.shape, dtype=torch.float64)
    gaps, norms = [], []
    for _ in range(STEPS + 1):
        draws = torch.randint(SAMPLES, rows.shape, generator=generator)
        gaps.append(sdkernels.opsd_loss(student, teacher.marginal.expand_as(student)).divergence.mean(-1))
        leaf = student.requires_grad_()
        loss = sdkernels.opsd_loss(leaf, teacher.samples[draws, rows], reduction="sum").loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        norms.append(gradient.square().sum((-1, -2)) / len(CONTEXTS))
        student = student.detach() - DRAWN_STEP * gradient
    return torch.stack(gaps), torch.stack(norms)


def theorem_claims(
    teacher: Model, curves: dict[str, Tensor], given: Tensor, gaps: Tensor, norms: Tensor
) -> list[Claim]:
    """Theorem 1 and the theory of descent, the worst of all steps."""
    loss, gap, floor = curves["loss"], curves["loss"] - curves["floor"], teacher.floor.mean()
    distance = centred(teacher.marginal).square().sum(-1).mean()
    distance_given = teacher.expected(centred(teacher.log_probs).square().sum(-1)).mean()
    steps = torch.arange(1, STEPS + 1)
    excess = gaps.mean(0) - distance / (2 * DRAWN_STEP * len(gaps)) - DRAWN_STEP / 2 * norms.mean(0)
    exact = {
        "|total - marginal_kl - mutual_information|": curves["identity"],
        "|mutual_information - (H(E_r P_T^r) - E_r H(P_T^r))|": (curves["floor"] - floor).abs(),
        "|opsd_loss - (CE(E_r P_T^r, P_S) - E_r H(P_T^r))|": (loss - curves["independent"]).abs(),
        "|loss - floor - marginal_kl|": (gap - curves["marginal_kl"]).abs(),
        "floor - loss": -gap,
        "loss - the loss a step before": loss.diff(),
        "loss - floor - its bound": gap[1:] - distance / (2 * STEP * steps),
        "given r: loss - its bound": given[1:] - distance_given / (2 * STEP * steps),
        "one drawn r: floor - expected loss": -gaps,
        "change of E||delta||^2 while the loss settles": (curves["noise"] - curves["noise"][0]).abs(),
    }
    return [*(Claim(text, float(found.max()), teacher.rounding) for text, found in exact.items()),
            Claim("one drawn r: mean gap - its bound", float(excess.mean()),
                  SIGMA * float(excess.std() / STUDENTS**0.5))]  # fmt: skip


def noise_row(name: str, hidden: Tensor, matrix: Tensor, teacher: Model) -> tuple[tuple[str, ...], list[Claim]]:
    """E||delta||^2 enumerated and sampled, beside what is predicted."""
    gradients = sample_gradients(hidden, matrix, teacher.samples)
    mean = gradients.mean(0)
    enumerated = (gradients - mean).square().sum() / SAMPLES
    exact, by_logits, variances = predicted_noise(hidden, matrix, teacher)
    draws = torch.randint(SAMPLES, (DRAWS, len(CONTEXTS)), generator=torch.Generator().manual_seed(2))
    drawn = (gradients - mean)[draws, torch.arange(len(CONTEXTS))]
    squares = drawn.square().sum((-1, -2))
    error = float(squares.std() / DRAWS**0.5)
    off = max(float((enumerated - x).abs()) for x in (exact, by_logits))
    claims = [
        Claim(f"{name}: |enumerated - covariances|", off, teacher.rounding * float(matrix.square().sum(-1).max())),
        Claim(f"{name}: |sampled - covariances|", float((squares.mean() - exact).abs()), SIGMA * error),
        Claim(f"{name}: ||mean of sampled delta||", float(drawn.mean(0).norm()), SIGMA * float(exact / DRAWS) ** 0.5),
    ]
    cells = (name, f"{mean.square().sum():.1e}", f"{enumerated:.6f}", f"{squares.mean():.4f} +- {error:.4f}",
             f"{exact:.6f}", f"{variances:.6f}")  # fmt: skip
    return cells, claims


def noise_rows(student: Tensor, teacher: Model) -> tuple[list[tuple[str, ...]], list[Claim]]:
    """Logits before and after descent, and hidden states, whose tokens' gradients are not orthogonal."""
    generator = torch.Generator().manual_seed(3)
    eye, uniform = torch.eye(VOCAB, dtype=torch.float64), torch.zeros_like(student)
    hidden = torch.randn(len(CONTEXTS), HIDDEN, dtype=torch.float64, generator=generator)
    matrix = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    alike = matrix.clone()
    alike[:MOVED] = matrix[0] + 0.1 * matrix[:MOVED]
    cases = {"logits, uniform": (uniform, eye), "logits, settled": (student, eye),
             "hidden states": (hidden, matrix), "hidden, moved tokens alike": (hidden, alike)}  # fmt: skip
    cells, claims = zip(*(noise_row(name, *case, teacher) for name, case in cases.items()), strict=True)
    exact, _, variances = predicted_noise(uniform, eye, teacher)
    share = float((variances - (1 - 1 / VOCAB) * exact).abs())
    last = Claim("logits, uniform: |variances alone - (1 - 1/V) truth|", share, teacher.rounding)
    return list(cells), [*(claim for of_case in claims for claim in of_case), last]


def rlsd_scales(student: Tensor, teacher: Model) -> Tensor:
    """(2, V, 12, X) A_t / A for A = 1 and -1, every y, sample of r and x: what r does to RLSD's A_t grad log P_S(y)."""
    shape = (2, VOCAB, *teacher.samples.shape)
    token_ids = torch.arange(VOCAB).view(-1, 1, 1).expand(shape[:-1]).contiguous()
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64).view(-1, 1, 1, 1).expand(shape[:-1])
    rows = (x.expand(shape) for x in (student, teacher.samples))
    return sdkernels.rlsd_token_advantage(*rows, token_ids, advantage).advantage / advantage


def show(
    screen: report.Screen, teacher: Model, curves: dict[str, Tensor], given: Tensor, gaps: Tensor, student: Tensor
) -> None:
    """The loss by step, and by context in the end."""
    lines = {
        "opsd_loss": (".6f", curves["loss"]),
        "floor, mutual_information": (".6f", curves["floor"]),
        "loss - floor": (".1e", curves["loss"] - curves["floor"]),
        "loss of a student given r": (".6f", given),
        f"one drawn r, mean of {STUDENTS}: expected loss - floor": (".4f", gaps.mean(1)),
        "||g*||^2": (".1e", curves["signal"]),
        "E||delta||^2": (".6f", curves["noise"]),
        "share of r whose gradient is against g*": (".2f", curves["against"]),
    }
    cells = [(name, *(format(float(values[step]), form) for step in SHOWN)) for name, (form, values) in lines.items()]
    columns = ("nats per token; squared norms of gradients", *(f"step {step}" for step in SHOWN))
    screen.table("Theorem 1 along descent, float64", columns, [cells], {columns[0]})
    hovers, predicted = gaps[STEPS // 2 :].mean(), DRAWN_STEP / 4 * curves["noise"][-1] / len(CONTEXTS)
    screen.line(f"  one drawn r, second half: {hovers:.4f} above the floor; step / 4 E||delta||^2 / contexts is "
                f"{predicted:.4f}, the step being {DRAWN_STEP}\n")  # fmt: skip
    settled = sdkernels.opsd_decomposition(student, teacher.samples)
    values = zip(CONTEXTS.items(), teacher.floor.tolist(), (settled.total - teacher.floor).tolist(), strict=True)
    rows = [(name, " ".join(map(str, counts)), f"{floor:.6f}", f"{gap:.1e}")
            for (name, (_, counts)), floor, gap in values]  # fmt: skip
    screen.table("By context", ("context", "12 P(r|x)", "I(Y; R | x)", "settled loss - I"), [rows], {"context"})


def plot(path: Path, curves: dict[str, Tensor], given: Tensor, gaps: Tensor) -> None:
    """The loss and its floor, and the gradient's signal and noise, by step."""
    with report.figure(path, 2, (10, 3.8)) as (_, axes):
        drawn = gaps.mean(1) + curves["floor"]
        axes[0].plot(drawn, label=f"on one drawn r, mean of {STUDENTS}", linewidth=1, color="0.7")
        axes[0].plot(curves["loss"], label="expected loss", linewidth=1.4)
        axes[0].plot(given, label="student given r", linewidth=1.4)
        axes[0].axhline(float(curves["floor"][0]), color="black", linestyle="--", linewidth=0.8, label="I(Y; R | X)")
        axes[0].set(ylabel="nats per token", title="OPSD's loss and its floor", ylim=(0, None))
        axes[1].plot(curves["signal"], label="||g*||²", linewidth=1.4)
        axes[1].plot(curves["noise"], label="E||δ||²", linewidth=1.4)
        axes[1].plot(curves["variances"], label="variances alone, with grad log P_S", linewidth=1, linestyle=":")
        axes[1].set(ylabel="squared norm", title="logits' gradient on one drawn r", yscale="log")
        for axis in axes:
            axis.set(xlabel="step", xscale="symlog", xlim=(0, STEPS))
            axis.legend(frameon=False, fontsize=7)


def main() -> int:
    """Descend, print, write what was asked for; 1 if a claim fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_output_options(parser)
    arguments, cpu, start = parser.parse_args(), torch.device("cpu"), time.perf_counter()
    teacher = model()
    curves, student = descend(teacher)
    given, (gaps, norms) = descend_given_r(teacher), descend_on_draws(teacher)
    noise, claims = noise_rows(student, teacher)
    scales = rlsd_scales(student, teacher)
    claims = [*theorem_claims(teacher, curves, given, gaps, norms), *claims,
              Claim("RLSD: -A_t / A of any x, y, r", -float(scales.min()), 0.0)]  # fmt: skip
    columns = ("gradient of", "||g*||^2", "enumerated", "sampled", "covariances", "variances alone")
    with report.Screen(1) as screen:
        show(screen, teacher, curves, given, gaps, student)
        screen.line(
            "  Proposition 1: on one drawn r the gradient is g* + delta, E delta = 0, whatever has been learnt\n"
        )
        screen.table(
            "E||delta||^2, four ways; on logits it is the same for every student", columns, [noise], {columns[0]}
        )
        screen.line(f"  RLSD, settled student: A_t / A from {scales.min():.2f} to {scales.max():.2f} over all x, y, r: "
                    "r changes an update's length, not its direction\n")  # fmt: skip
        cells = [(x.text, f"{x.found:.1e}", f"{x.allowed:.1e}", "yes" if x.holds else "NO") for x in claims]
        screen.table(
            "Claims: found at most what is allowed", ("number", "found", "allowed", "holds"), [cells], {"number"}
        )
        screen.line(f"{time.perf_counter() - start:.0f} s")
    if path := harness.output_path(arguments.json, "information_gap", cpu, ".json"):
        by_step = {**curves, "given_r": given, "one_drawn_r": gaps.mean(1)}
        results = {"environment": report.environment(cpu, ()), "claims": [x._asdict() for x in claims],
                   "floor": dict(zip(CONTEXTS, teacher.floor.tolist(), strict=True)),
                   "noise": [dict(zip(columns, row, strict=True)) for row in noise],
                   "by_step": {name: values.tolist() for name, values in by_step.items()}}  # fmt: skip
        report.write_json(path, results)
        print(f"wrote {path}")
    if path := harness.output_path(arguments.plot, "information_gap", cpu, ".png"):
        plot(path, curves, given, gaps)
        print(f"wrote {path}")
    failed = [claim.text for claim in claims if not claim.holds]
    if failed:
        print(f"does not hold: {'; '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
