"""What truncation and SSD give in float64, and how far from it a result is, on the support that it chose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, row_chunks
from benchmarks.truth import (
    FAR_OFF,
    LOG_PROB_TOLERANCE,
    ROUNDING,
    WEIGHT_TOLERANCE,
    gradient_multiples,
    worst_of,
)

MARGIN = 2e-6  # relative: a tie group so close to the boundary of top_p or min_p may fall either way
PLACES = 64  # of sparse supports; sdkernels keeps a support as a list of ids up to this size
Errors = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """A temperature and filters; `recorded` where SSD's base is a sparse support that was recorded with them."""

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    recorded: bool = False

    @property
    def filters(self) -> dict[str, float]:
        """Those that are on, as keyword arguments."""
        values = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.filters.items()), f"T={self.temperature}"])


class Boundary(NamedTuple):
    """What decides which logits of a row survive, each (N,), by the rule in float64."""

    maximum: Tensor
    kth: Tensor  # the least logit that top_k keeps
    log_mass: Tensor  # log of the sum of exp((z - maximum) / T) over those
    threshold: Tensor  # the least logit that all filters keep
    sure: Tensor  # bool: no tie group is within the margin of the boundary
    size: Tensor


def boundary(inputs: Inputs, of: str, setting: Setting) -> Boundary:
    """Of the student's or the teacher's rows; computed once."""
    key = (of, setting.temperature, *sorted(setting.filters.items()))
    if key not in inputs.derived:
        logits = getattr(inputs, of)
        parts = [_boundary(logits[rows].double(), setting) for rows in row_chunks(logits)]
        inputs.derived[key] = Boundary(*map(torch.cat, zip(*parts, strict=True)))
    return inputs.derived[key]


def _boundary(z: Tensor, setting: Setting) -> Boundary:
    ordered = z.sort(-1, descending=True).values
    maximum = ordered[:, 0]
    kth = ordered[:, min(setting.top_k or z.shape[-1], z.shape[-1]) - 1]
    mass = ((ordered - maximum[:, None]) / setting.temperature).exp_().where(ordered >= kth[:, None], 0)
    total = mass.sum(-1, keepdim=True)
    above = mass.cumsum(-1) - mass
    thresholds = []
    for margin in (0.0, -MARGIN, MARGIN):
        least = kth
        if setting.top_p:
            inside = above < setting.top_p * (1 + margin) * total
            least = least.maximum(ordered.where(inside, torch.inf).amin(-1))
        if setting.min_p:
            least = least.maximum(maximum + setting.temperature * math.log(setting.min_p * (1 - margin)))
        thresholds.append(least)
    size, fewest, most = ((ordered >= least[:, None]).sum(-1) for least in thresholds)
    threshold = ordered.gather(-1, size[:, None] - 1)[:, 0]
    return Boundary(maximum, kth, total[:, 0].log(), threshold, fewest == most, size)


def long_share(inputs: Inputs, of: str, setting: Setting) -> float:
    """The share of rows whose support is too long for a list of ids."""
    return float((boundary(inputs, of, setting).size > PLACES).float().mean())


def sampled_ids(inputs: Inputs, setting: Setting) -> Tensor:
    """(N,) tokens sampled from the student's truncated distribution, as a policy's are."""
    key = ("sampled", setting)
    if key not in inputs.derived:
        threshold = boundary(inputs, "student", setting).threshold
        generator = torch.Generator(inputs.student.device).manual_seed(1)
        ids = torch.empty_like(inputs.token_ids)
        for rows in row_chunks(inputs.student):
            z = inputs.student[rows].double()
            race = torch.empty_like(z).exponential_(generator=generator).log_()
            ids[rows] = (z / setting.temperature - race).where(z >= threshold[rows, None], -torch.inf).argmax(-1)
        inputs.derived[key] = ids
    return inputs.derived[key]


def upstream(inputs: Inputs, rows_too: bool) -> Tensor:
    """A random upstream gradient: (N, V) in the student's dtype for log q, or (N,) for log-probs of tokens."""
    key = ("upstream", rows_too)
    if key not in inputs.derived:
        generator = torch.Generator(inputs.student.device).manual_seed(2)
        like = inputs.student if rows_too else inputs.old_log_prob
        inputs.derived[key] = torch.empty_like(like).normal_(generator=generator)
    return inputs.derived[key]


def largest(z: Tensor, size: Tensor) -> Tensor:
    """bool (n, V): all logits that are not below the `size`-th largest of their row."""
    ordered = z.sort(-1, descending=True).values
    return z >= ordered.gather(-1, (size[:, None] - 1).clamp(min=0))


def chosen_set(z: Tensor, part: dict[str, Tensor], rule: Boundary, setting: Setting) -> tuple[Tensor, Tensor]:
    """The set that an implementation chose, bool (n, V), and its distance from an allowed one, (n,) in margins.

    `support` (n, V) says it outright and may split ties, as the warpers do; `log_q` (n, V) and `support_size` (n,) say
    it for implementations that keep ties. One that says nothing is held to the rule where that is sure.
    """
    if "support" in part:
        inside = part["support"]
    elif "log_q" in part:
        inside = part["log_q"] > -torch.inf
    elif "support_size" in part:
        same = part["support_size"] == rule.size
        inside = z >= rule.threshold[:, None] if bool(same.all()) else largest(z, part["support_size"])
    else:
        return z >= rule.threshold[:, None], torch.zeros_like(rule.threshold)
    distance = _distance(z, inside, rule, setting)
    if "support" not in part:
        ties = (z == z.where(inside, torch.inf).amin(-1, keepdim=True)) & ~inside
        distance = distance.masked_fill(ties.any(-1), FAR_OFF)
    if "support_size" in part:
        distance = distance.masked_fill(inside.sum(-1) != part["support_size"], FAR_OFF)
    return inside, distance


def _distance(z: Tensor, inside: Tensor, rule: Boundary, setting: Setting) -> Tensor:
    """How far a row's set is outside what the filters allow, relative to their boundary, in margins."""
    least = z.where(inside, torch.inf).amin(-1)
    dropped = z.masked_fill(inside, -torch.inf).amax(-1)
    mass = ((z - rule.maximum[:, None]) / setting.temperature - rule.log_mass[:, None]).exp_()
    keeps_too_much = [torch.where(least < rule.kth, torch.inf, 0.0)]
    drops_too_much = [torch.where(dropped < rule.kth, 0.0, torch.inf)]
    if setting.top_p:
        above = mass.where(z > least[:, None], 0).sum(-1)
        keeps_too_much.append(above / setting.top_p - 1)
        drops_too_much.append(1 - mass.where(inside, 0).sum(-1) / setting.top_p)
    if setting.min_p:
        least_ratio, dropped_ratio = (
            ((x - rule.maximum) / setting.temperature).exp() / setting.min_p for x in (least, dropped)
        )
        keeps_too_much.append(1 - least_ratio)
        drops_too_much.append(dropped_ratio - 1)
    kept, lost = torch.stack(keeps_too_much).amax(0), torch.stack(drops_too_much).amin(0)
    distance = kept.maximum(lost.where(dropped > -torch.inf, 0)).clamp(min=0) / MARGIN
    return distance.masked_fill((least < dropped) | ~inside.any(-1), FAR_OFF)


class ChunkedTruth:
    """Errors of results that are (N, ...) tensors, a chunk of rows after the other."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def errors(self, result: dict[str, Tensor], setting: Any) -> Errors:
        """The worst error of each of an implementation's results, as a multiple of its tolerance, at most 1e30."""
        worst: Errors = {}
        of_rows = {name: value.detach() for name, value in result.items() if value.dim()}
        for rows in row_chunks(self.inputs.student):
            part = {name: value[rows] for name, value in of_rows.items()}
            for name, multiples in self.row_errors(part, rows, setting).items():
                worst[name] = max(worst.get(name, 0.0), worst_of(multiples))
        return worst

    def row_errors(self, part: dict[str, Tensor], rows: slice, setting: Any) -> dict[str, Tensor]:
        """The errors of some rows, each (n,) or (n, ...)."""
        raise NotImplementedError


class TruncationTruth(ChunkedTruth):
    """Of the student's logits; knows log_q, log_prob, entropy, gradient, and sparse supports.

    The gradient is of log_q for `upstream`, or, where there is none, of log_prob.
    """

    def row_errors(self, part: dict[str, Tensor], rows: slice, setting: Setting) -> dict[str, Tensor]:
        """See ChunkedTruth."""
        z = self.inputs.student[rows].double()
        rule = Boundary(*(x[rows] for x in boundary(self.inputs, "student", setting)))
        inside, distance = chosen_set(z, part, rule, setting)
        log_q = (z / setting.temperature).masked_fill(~inside, -torch.inf).log_softmax(-1)
        says = {"support", "log_q", "support_size"} & set(part)
        found = {"support": distance} if says else {}
        of_token = sampled_ids(self.inputs, setting)[rows, None] if "log_q" not in part else None
        for name in ("log_q", "log_prob", "entropy", "token_ids", "gradient"):
            if name in part:
                measure: Callable = getattr(self, f"_{name}_errors")
                multiples = measure(part, rows, setting, z, log_q, of_token)
                found[name] = multiples if says else multiples.where(rule.sure, 0)
        return found

    def _log_q_errors(self, part, rows, setting, z, log_q, of_token) -> Tensor:
        tolerance = LOG_PROB_TOLERANCE - ROUNDING[part["log_q"].dtype] * log_q
        return ((part["log_q"] - log_q).abs() / tolerance).where(log_q > -torch.inf, 0)

    def _log_prob_errors(self, part, rows, setting, z, log_q, of_token) -> Tensor:
        return (part["log_prob"] - log_q.gather(-1, of_token)[:, 0]).abs() / LOG_PROB_TOLERANCE

    def _entropy_errors(self, part, rows, setting, z, log_q, of_token) -> Tensor:
        entropy = -(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1)
        return (part["entropy"] - entropy).abs() / LOG_PROB_TOLERANCE

    def _token_ids_errors(self, part, rows, setting, z, log_q, of_token) -> Tensor:
        """Of a sparse support: as many ids as there are places, none below another, with their log q."""
        ids = part["token_ids"]
        listed = ids >= 0
        expected = log_q.gather(-1, ids.clamp(min=0)).where(listed, -torch.inf)
        wanted = part["support_size"].clamp(max=ids.shape[-1])
        least = log_q.sort(-1, descending=True).values.gather(-1, wanted[:, None] - 1)
        right = (listed.sum(-1, keepdim=True) == wanted[:, None]) & ((expected >= least) | ~listed)
        right &= listed == (part["log_probs"] > -torch.inf)
        error = (part["log_probs"] - expected.log_softmax(-1)).where(listed, 0).abs() / LOG_PROB_TOLERANCE
        return error.where(right, FAR_OFF)

    def _gradient_errors(self, part, rows, setting, z, log_q, of_token) -> Tensor:
        if of_token is None:
            g = upstream(self.inputs, rows_too=True)[rows].double().where(log_q > -torch.inf, 0)
            coefficient = g.sum(-1).abs() + g.norm(dim=-1)
        else:
            of_log_prob = upstream(self.inputs, rows_too=False)[rows].double()
            g = torch.zeros_like(z).scatter_(-1, of_token, of_log_prob[:, None])
            coefficient = of_log_prob
        expected = (g - log_q.exp() * g.sum(-1, keepdim=True)) / setting.temperature
        return gradient_multiples(part["gradient"], expected, coefficient / setting.temperature)


class TokenMeanTruth(ChunkedTruth):
    """Errors of a loss too, which is the token mean of what `row_errors` appends to `expected`."""

    def errors(self, result: dict[str, Tensor], setting: Any) -> Errors:
        """See ChunkedTruth."""
        self.expected: list[Tensor] = []
        worst = super().errors(result, setting)
        if "loss" in result:
            error = (result["loss"].detach().double() - torch.cat(self.expected).mean()).abs() / LOG_PROB_TOLERANCE
            worst["loss"] = worst_of(error)
        return worst


class SSDTruth(TokenMeanTruth):
    """Of the student against the teacher's logits as the base; the loss is the token mean of the cross-entropy.

    Knows loss, SSD's terms, cross_entropy, kept_mass and gradient.
    """

    def _of_rows(
        self, part: dict[str, Tensor], rows: slice, setting: Setting
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """The terms, the log-probabilities of student and base, and the distance of the chosen set."""
        z, b = self.inputs.student[rows].double(), self.inputs.teacher[rows].double()
        t = setting.temperature
        if setting.recorded:
            recorded = recorded_base(self.inputs, setting)
            ids, values = recorded.token_ids[rows], recorded.log_probs[rows].double()
            log_q = torch.full_like(torch.nn.functional.pad(b, (0, 1)), -torch.inf)
            log_q = log_q.scatter_(-1, ids.where(ids >= 0, b.shape[-1]), values)[:, :-1]
            inside, distance = log_q > -torch.inf, torch.zeros_like(z[:, 0])
        else:
            rule = Boundary(*(x[rows] for x in boundary(self.inputs, "teacher", setting)))
            inside, distance = chosen_set(b, part, rule, setting)
            log_q = (b / t).masked_fill(~inside, -torch.inf).log_softmax(-1)
        q, log_p = log_q.exp(), z.log_softmax(-1)
        log_kept, tempered = log_p.where(inside, -torch.inf), (z / t).where(inside, -torch.inf)
        support_lse = log_kept.logsumexp(-1)
        log_p_st = tempered.log_softmax(-1)
        terms = {
            "support_compression": -support_lse,
            "within_support_reshaping": support_lse - t * (log_kept / t).logsumexp(-1),
            "base_alignment": t * (q * (log_q - log_p_st)).where(inside, 0).sum(-1),
            "constant": -t * (q * log_q).where(inside, 0).sum(-1),
            "cross_entropy": -(q * log_p).sum(-1),
            "kept_mass": support_lse.exp(),
        }
        return terms, log_p, log_q, distance

    def row_errors(self, part: dict[str, Tensor], rows: slice, setting: Setting) -> dict[str, Tensor]:
        """See ChunkedTruth."""
        terms, log_p, log_q, distance = self._of_rows(part, rows, setting)
        self.expected.append(terms["cross_entropy"])
        found = {"support": distance}
        for name, expected in terms.items():
            if name in part:
                tolerance = WEIGHT_TOLERANCE * expected if name == "kept_mass" else LOG_PROB_TOLERANCE
                found[name] = (part[name] - expected).abs() / tolerance
        if "gradient" in part:
            share = 1 / len(self.inputs.student)
            expected = (log_p.exp_() - log_q.exp_()) * share
            found["gradient"] = gradient_multiples(part["gradient"], expected, expected.new_tensor(2 * share))
        return found


def recorded_base(inputs: Inputs, setting: Setting) -> Any:
    """The teacher's truncated distribution as sdkernels records it; data for all implementations alike."""
    import sdkernels

    key = ("recorded", setting)
    if key not in inputs.derived:
        inputs.derived[key] = sdkernels.truncated_support(
            inputs.teacher, setting.temperature, **setting.filters, max_size=PLACES
        )
    return inputs.derived[key]
