"""What OPSD's divergences give in float64, and how far from it a result is, on the tokens that it reduced rows to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, row_chunks
from benchmarks.truncated_truth import TokenMeanTruth
from benchmarks.truth import FAR_OFF, GRADIENT_TOLERANCE, LOG_PROB_TOLERANCE, gradient_multiples

RATIO_FACTOR = 5.0  # the gradient tolerance of reverse KL and JSD, which take log-ratios, over that of forward KL
CLIP_MARGIN = 1e-4  # relative: an entry so close to token_clip may fall either way


@dataclass(frozen=True)
class Setting:
    """The options of opsd_loss, under its names; beta is the teacher's weight, as in TRL and Liger."""

    divergence: str
    beta: float = 0.5
    token_clip: float | None = None
    top_k: int | None = None
    top_k_from: str = "student"
    tail: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments of opsd_loss."""
        return vars(self)

    @property
    def peers_beta(self) -> float:
        """TRL and Liger take the forward KL as beta = 0 and the reverse KL as beta = 1."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, self.beta)

    def places(self, vocab: int) -> int:
        """The tokens that rows are reduced to; 0 where all of the vocabulary is kept."""
        return self.top_k if self.top_k and self.top_k < vocab else 0

    def __str__(self) -> str:
        words = [f"jsd beta={self.beta}" if self.divergence == "jsd" else self.divergence]
        if self.token_clip:
            words.append(f"token_clip={self.token_clip}")
        if self.top_k:
            words.append(f"{self.top_k_from} top_k={self.top_k}{' + tail' if self.tail else ''}")
        return " ".join(words)


class Exact(NamedTuple):
    """Of some rows, in float64."""

    divergence: Tensor  # (n,)
    gradient: Tensor  # (n, V) of the divergence
    unsure: Tensor  # (n,) how far the gradient is off if entries at token_clip fall the other way
    clipped: Tensor  # bool (n,): any entry is


def exact(student: Tensor, teacher: Tensor, setting: Setting, token_ids: Tensor | None = None) -> Exact:
    """The divergence and, by autograd, its gradient; with `token_ids` (n, k) on rows reduced to them."""
    with torch.enable_grad():
        leaf = student.detach().double().requires_grad_()
        log_p, log_q = (_log_probs(z, token_ids, setting.tail) for z in (leaf, teacher.double()))
        p, q = log_p.exp(), log_q.exp()
        if setting.divergence == "jsd":
            log_m = torch.logaddexp(log_p + math.log1p(-setting.beta), log_q + math.log(setting.beta))
            entries = setting.beta * q * (log_q - log_m) + (1 - setting.beta) * p * (log_p - log_m)
        else:
            entries = q * (log_q - log_p) if setting.divergence == "forward_kl" else p * (log_p - log_q)
        clip = setting.token_clip or math.inf
        divergence = entries.clamp(max=clip).sum(-1)
        (gradient,) = torch.autograd.grad(divergence.sum(), leaf)
    entries, divergence = entries.detach(), divergence.detach()
    if not setting.token_clip:
        nothing = torch.zeros_like(divergence)
        return Exact(divergence, gradient, nothing, nothing > 0)
    # Of the forward KL, which alone is clipped here: an entry adds q_v (p - onehot_v).
    unsure = math.sqrt(2) * q.where((entries - clip).abs() <= CLIP_MARGIN * clip, 0).sum(-1)
    return Exact(divergence, gradient, unsure, (entries > clip).any(-1))


def _log_probs(z: Tensor, token_ids: Tensor | None, tail: bool) -> Tensor:
    if token_ids is None:
        return z.log_softmax(-1)
    listed = z.gather(-1, token_ids)
    if tail:
        others = z.scatter(-1, token_ids, -torch.inf).logsumexp(-1, keepdim=True)
        listed = torch.cat([listed, others], -1)
    return listed.log_softmax(-1)


def top_ids(z: Tensor, places: int) -> Tensor:
    """(n, k) ids of the largest logits, ties by id: torch.topk leaves ties to chance."""
    least = z.topk(places).values[:, -1:]
    above, ties = z > least, z == least
    keep = above | (ties & (ties.cumsum(-1) <= places - above.sum(-1, keepdim=True)))
    return keep.nonzero()[:, 1].unflatten(0, (len(z), places))


def misses_the_top(z: Tensor, token_ids: Tensor) -> Tensor:
    """bool (n,): the ids are not those of the k largest logits; ties may be split in any way."""
    inside = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, token_ids, True)
    least, dropped = z.where(inside, torch.inf).amin(-1), z.masked_fill(inside, -torch.inf).amax(-1)
    return (inside.sum(-1) != token_ids.shape[-1]) | (least < dropped)


class OPSDTruth(TokenMeanTruth):
    """Of the student against the teacher; the loss is the token mean of the divergence.

    Knows loss, divergence, gradient, and token_ids (N, k), which say how an implementation split ties of `top_k`; one
    that does not say is held to the rule, ties by id.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.known: dict[tuple[Setting, int], Exact] = {}  # of the latest setting by the rule, by the first row

    def _by_the_rule(self, rows: slice, setting: Setting) -> Exact:
        """`exact` is slow, and each of an operation's implementations is held to it."""
        key = (setting, rows.start)
        if key not in self.known:
            self.known = {at: known for at, known in self.known.items() if at[0] == setting}
            student, teacher = self.inputs.student[rows], self.inputs.teacher[rows]
            places = setting.places(student.shape[-1])
            decides = teacher if setting.top_k_from == "teacher" else student
            self.known[key] = exact(student, teacher, setting, top_ids(decides, places) if places else None)
        return self.known[key]

    def row_errors(self, part: dict[str, Tensor], rows: slice, setting: Setting) -> dict[str, Tensor]:
        """See ChunkedTruth."""
        student, teacher = self.inputs.student[rows], self.inputs.teacher[rows]
        found = {}
        if setting.places(student.shape[-1]) and "token_ids" in part:
            decides = teacher if setting.top_k_from == "teacher" else student
            found["support"] = misses_the_top(decides, part["token_ids"]) * FAR_OFF
            truth = exact(student, teacher, setting, part["token_ids"])
        else:
            truth = self._by_the_rule(rows, setting)
        self.expected.append(truth.divergence)
        if "divergence" in part:
            found["divergence"] = (part["divergence"] - truth.divergence).abs() / LOG_PROB_TOLERANCE
        if "gradient" in part:
            share = 1 / len(self.inputs.student)
            multiples = gradient_multiples(
                part["gradient"], truth.gradient * share, _coefficient(truth, setting) * share
            )
            found["gradient"] = multiples
        return found


def _coefficient(truth: Exact, setting: Setting) -> Tensor:
    """(n,) what GRADIENT_TOLERANCE is multiplied by: of p and q together, or of p, whose factor has a log-ratio."""
    factor = {"forward_kl": 2.0, "reverse_kl": RATIO_FACTOR, "jsd": RATIO_FACTOR * (1 - setting.beta)}
    return factor[setting.divergence] + truth.unsure / GRADIENT_TOLERANCE


def relative_error(inputs: Inputs, setting: Setting, gradient: Callable[[Tensor, Tensor], Tensor]) -> float:
    """||g - g*|| / ||g*|| of all rows, `gradient` being a function of some rows' logits of student and teacher."""
    error = size = 0.0
    for rows in row_chunks(inputs.student):
        student, teacher = inputs.student[rows], inputs.teacher[rows]
        expected = exact(student, teacher, setting).gradient
        error += float((gradient(student, teacher) - expected).square().sum())
        size += float(expected.square().sum())
    return math.sqrt(error / size)
