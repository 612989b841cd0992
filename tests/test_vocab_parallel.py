"""Functions with `group`: what ranks with unequal shards compute is what one process computes of whole rows."""

import math

import pytest
import torch
import torch.distributed as dist
from closeness import EAGER_FACTOR, FLOAT64_BOUND, LOG_PROB_BOUND, ROUNDING, WEIGHT_BOUND
from conftest import INTERPRETED
from ranks import results_of

import sdkernels
from sdkernels import vocab_parallel

pytestmark = pytest.mark.skipif(INTERPRETED or not dist.is_gloo_available(), reason="the same code; needs gloo")

B, T, V, H, K = 2, 5, 97, 16, 12
CUTS = {2: (0, 40, V), 3: (0, 1, 60, V)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
FILTERS = {
    "top_k": {"top_k": 7},
    "more than a shard has": {"top_k": 60},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.05},
    "top_k, top_p": {"top_k": 70, "top_p": 0.5},
    "all filters": {"top_k": 30, "top_p": 0.9, "min_p": 0.01},
}
DIVERGENCES = {
    "forward KL": {},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD": {"divergence": "jsd", "beta": 0.3},
    "clipped KL": {"token_clip": 0.05},
    "clipped JSD": {"divergence": "jsd", "token_clip": 0.01},
    "top_k": {"top_k": 9},
    "the teacher's top_k": {"top_k": 9, "top_k_from": "teacher", "divergence": "jsd"},
    "renormalised": {"top_k": 9, "tail": False},
    "all of top_k": {"top_k": V + 3},
}
IN_PLACE = ("grpo_loss", "rlsd_loss", "ssd_loss", "ssd_loss, top_k", "opsd_loss, forward KL", "opsd_loss, top_k")
SUMS = 4  # roundings that summing in another order, over ranks, may add to a norm
RATIOS = {"weight", "advantage", "ratio", "loss", "cross_entropy", "total"}  # or sums of many terms: relative


class Problem:
    """Rows of logits on two sides, hidden states and a head, and tokens; with ties, masks, and a shard of -inf."""

    def __init__(self, dtype, world):
        torch.manual_seed(0)
        self.student, self.teacher = (torch.randn(B, T, V).mul(3).round(decimals=1).to(dtype) for _ in range(2))
        if dtype == torch.float64:
            self.teacher = self.teacher.float()  # distributions of two rows are computed in float64 all the same
        self.student[0, 0, : CUTS[world][1]] = -torch.inf
        self.ids, self.advantages = torch.randint(V, (B, T)), torch.randn(B)
        self.ids[0, 0], self.ids[0, 1] = V - 1, -100
        self.mask = torch.ones(B, T)
        self.mask[1, 3] = 0
        self.student[1, 4], self.teacher[1, 3] = torch.nan, torch.inf
        self.teacher[0, 2, : V - 3] = -torch.inf  # fewer tokens than top_k, all in one shard
        self.teacher[0, 3, V - 1] = 3e4  # a tail that weighs all
        self.temperature = torch.rand(B, T) + 0.5
        self.kept = torch.stack([torch.randperm(V)[:K] for _ in range(B * T)]).reshape(B, T, K)
        self.kept[..., 3] = -1
        self.recorded = sdkernels.truncated_support(self.teacher.double(), 1.6, top_k=20, max_size=32, mask=self.mask)
        self.hidden, self.other, self.weight = torch.randn(B, T, H), torch.randn(B, T, H), torch.randn(V, H)
        self.hidden[1, 4] = torch.nan
        self.tokens = {"mask": self.mask}


def flat(output):
    """Named results, of a Tensor or of nested named tuples."""
    if isinstance(output, torch.Tensor):
        return {"result": output}
    named = {}
    for name, value in output._asdict().items():
        named |= flat(value) if isinstance(value, tuple) else {name: value}
    return named


def cases():
    """Functions of (problem, student, teacher, sharding), differentiable in the student."""
    f, found = sdkernels, {}
    found["token_log_prob"] = lambda p, x, y, g: f.token_log_prob(x, p.ids, p.temperature, **p.tokens, **g)
    found["replay"] = lambda p, x, y, g: f.token_log_prob(x, p.ids, p.temperature, support=p.kept, **p.tokens, **g)
    found["grpo_loss"] = lambda p, x, y, g: f.grpo_loss(
        x, p.ids, p.advantages, temperature=p.temperature, **p.tokens, **g
    )
    found["rlsd_loss"] = lambda p, x, y, g: f.rlsd_loss(x, y.to(x), p.ids, p.advantages, lam=0.5, **p.tokens, **g)
    found["rlsd_loss of log-probs"] = lambda p, x, y, g: f.rlsd_loss(
        x, -torch.ones(B, T), p.ids, p.advantages, lam=0.5, **p.tokens, **g
    )
    found["rlsd_token_advantage"] = lambda p, x, y, g: f.rlsd_token_advantage(
        x, y.to(x), p.ids, p.advantages, lam=0.5, **p.tokens, **g
    )
    found["ssd_loss"] = lambda p, x, y, g: f.ssd_loss(x, y, 1.6, **p.tokens, **g)
    found["ssd_loss of a Support"] = lambda p, x, y, g: f.ssd_loss(x, p.recorded, 1.6, **p.tokens, **g)
    for ids, log_q in (([0], [0.0]), ([3, 0], [0.0, -800.0])):  # of -inf to the student in a row, and of no weight
        support = f.Support(torch.tensor(ids), torch.tensor(log_q), torch.tensor(len(ids)), 1.6)
        found[f"ssd_loss of a Support of {ids}"] = lambda p, x, y, g, s=support: f.ssd_loss(
            x, f.Support(*(t.expand(B, T, *t.shape) for t in s[:3]), 1.6), 1.6, **p.tokens, **g
        )
    found["ssd_decomposition"] = lambda p, x, y, g: f.ssd_decomposition(x, y, p.temperature, **p.tokens, **g)
    found["truncated_log_softmax"] = lambda p, x, y, g: f.truncated_log_softmax(x, 0.7, **g)
    for name, filters in FILTERS.items():
        found[f"token_log_prob, {name}"] = lambda p, x, y, g, o=filters: f.token_log_prob(
            x, p.ids, p.temperature, **o, **p.tokens, **g
        )
        found[f"ssd_loss, {name}"] = lambda p, x, y, g, o=filters: f.ssd_loss(x, y, 1.6, **o, **p.tokens, **g)
        found[f"truncated_log_softmax, {name}"] = lambda p, x, y, g, o=filters: f.truncated_log_softmax(
            x, 0.7, **o, **g
        )
    for name, options in DIVERGENCES.items():
        found[f"opsd_loss, {name}"] = lambda p, x, y, g, o=options: f.opsd_loss(
            x, y, temperature=p.temperature, **o, **p.tokens, **g
        )
    for name, function in list(found.items()):
        if name in IN_PLACE:
            found[f"{name}, in place"] = lambda p, x, y, g, f=function: f(p, x, y, g | {"inplace": True})
    found["opsd_decomposition"] = lambda p, x, y, g: f.opsd_decomposition(
        x, torch.stack([y, y.flip(1) * 0.5, -y]), **p.tokens, **g
    )
    return found


def heads():
    """Functions of (problem, hidden, weight, sharding) with the head sharded."""
    f, found = sdkernels, {}
    found["linear_token_log_prob"] = lambda p, h, w, g: f.linear_token_log_prob(h, w, p.ids, **p.tokens, **g)
    found["linear_token_log_prob, top_k"] = lambda p, h, w, g: f.linear_token_log_prob(
        h, w, p.ids, top_k=60, **p.tokens, **g
    )
    found["linear_token_log_prob, replay"] = lambda p, h, w, g: f.linear_token_log_prob(
        h, w, p.ids, support=p.kept, **p.tokens, **g
    )
    found["linear_grpo_loss"] = lambda p, h, w, g: f.linear_grpo_loss(
        h, w, p.ids, p.advantages, softcap=5.0, **p.tokens, **g
    )
    found["linear_rlsd_loss"] = lambda p, h, w, g: f.linear_rlsd_loss(
        h, p.other, w, p.ids, p.advantages, chunk_size=3, **p.tokens, **g
    )
    found["linear_rlsd_token_advantage"] = lambda p, h, w, g: f.linear_rlsd_token_advantage(
        h, p.other, w, p.ids, p.advantages, **p.tokens, **g
    )
    found["linear_ssd_loss"] = lambda p, h, w, g: f.linear_ssd_loss(h, p.other, w, 1.6, top_k=20, **p.tokens, **g)
    found["linear_opsd_loss"] = lambda p, h, w, g: f.linear_opsd_loss(h, p.other, w, chunk_size=3, **p.tokens, **g)
    return found


def upstream_sum(results, columns, seed):
    """A random combination of the differentiable results, of a result (..., V) only these columns."""
    torch.manual_seed(seed)
    total = 0.0
    for value in results.values():
        wide = value.dim() == 3
        weights = torch.randn((B, T, V) if wide else value.shape, dtype=torch.float64)
        if value.requires_grad:
            weights = weights[..., columns] if wide else weights
            total = total + torch.where(value.isfinite(), value.double(), 0).mul(weights).sum()
    return total


def too_far(name, actual, truth):
    """Why a result is too far from its truth, if it is."""
    actual, truth = actual.detach(), truth.detach().double()
    if actual.dtype == torch.int64:
        return None if torch.equal(actual, truth.long()) else f"{name} differs"
    relative = FLOAT64_BOUND if actual.dtype == torch.float64 else WEIGHT_BOUND
    absolute = FLOAT64_BOUND if actual.dtype == torch.float64 else LOG_PROB_BOUND
    allowed = torch.finfo(actual.dtype).eps * truth.abs() + absolute + (relative * truth.abs() if name in RATIOS else 0)
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    error = (actual.double() - truth).abs().masked_fill(same, 0)
    return None if ((error <= allowed) | same).all() else f"{name} is off by {error.max().item():.3g}"


def gradients_too_far(actual, plain, truth, results):
    """Why a gradient is: each row's norm within SPEC's bound, or as good as the whole rows'."""
    sizes = [x.detach().abs().nan_to_num(0, 0) for x in results.values() if x.shape == (B, T) and x.is_floating_point()]
    upstream = 4 * math.log(V) * torch.stack([torch.ones(B, T), *sizes]).amax(0)  # a divergence's c is of its size
    rounding = ROUNDING[actual.dtype]
    factor = FLOAT64_BOUND if actual.dtype == torch.float64 else 1e-6
    error, floor = (actual.double() - truth).norm(dim=-1), (plain.double() - truth).norm(dim=-1)
    allowed = factor * upstream + rounding * truth.norm(dim=-1) + EAGER_FACTOR * floor
    same = actual.isnan().all(-1) & truth.isnan().all(-1)
    return None if ((error <= allowed) | same).all() else f"gradient is off by {error[~same].max().item():.3g}"


def check_logits(function, problem, columns, sharding, inplace):
    """Why a function on a shard of the logits is not the one on whole rows, in words."""
    found = []
    for dtype, sides in ((None, 1), (torch.float64, 0)):
        whole, other = (x if dtype is None else x.to(dtype) for x in (problem.student, problem.teacher))
        leaf = whole.clone().requires_grad_()
        results = flat(function(problem, leaf, other, {}))
        found.append((results, leaf, slice(None), sides))
    leaf = problem.student[..., columns].clone().requires_grad_()
    found.append((flat(function(problem, leaf, problem.teacher[..., columns], sharding)), leaf, columns, 1))
    (plain, plain_leaf, *_), (truth, truth_leaf, *_), (mine, leaf, *_) = found
    for name, value in mine.items():
        expected = plain[name] if plain[name].dim() == 3 else truth[name]
        expected = expected[..., columns] if expected.dim() == 3 else expected
        if why := too_far(name, value, expected):
            return why
    sums = [upstream_sum(results, part, 1) for results, _, part, _ in found]
    if isinstance(sums[0], float):
        return None
    grads = [torch.autograd.grad(total, x)[0] for total, x in zip(sums, (plain_leaf, truth_leaf, leaf), strict=True)]
    if (grads[2].data_ptr() == leaf.data_ptr()) != inplace:
        return "the gradient should be in place" if inplace else "the gradient should not be in place"
    return gradients_too_far(grads[2], grads[0][..., columns], grads[1][..., columns], found[1][0])


def check_head(function, problem, columns, sharding):
    """Why a function of hidden states and a shard of the head is not the one of the whole head."""
    results, sums, leaves = [], [], []
    for part, options, dtype in ((slice(None), {}, torch.float64), (slice(None), {}, torch.float32),
                                 (columns, sharding, torch.float32)):  # fmt: skip
        hidden, weight = problem.hidden.to(dtype).requires_grad_(), problem.weight[part].to(dtype).requires_grad_()
        problem.other = problem.other.to(dtype)
        results.append(flat(function(problem, hidden, weight, options)))
        sums.append(upstream_sum(results[-1], part, 1))
        leaves.append((hidden, weight))
    truth, _, mine = results
    for name, value in mine.items():
        if why := too_far("loss", value, truth[name]):  # matmuls in float32: relative
            return f"{name}: {why}"
    if isinstance(sums[0], float):
        return None
    truth, plain, mine = (torch.autograd.grad(*each) for each in zip(sums, leaves, strict=True))
    truth, plain = (truth[0], truth[1][columns]), (plain[0], plain[1][columns])
    for name, actual, near, exact in zip(("hidden", "weight"), mine, plain, truth, strict=True):
        kept = exact.isfinite()
        error, floor = ((x - exact)[kept].norm() for x in (actual, near))
        if error > EAGER_FACTOR * floor + SUMS * torch.finfo(torch.float32).eps * exact[kept].norm():
            return f"gradient of {name} is off by {error.item():.3g}"
    return None


def work(rank, world):
    """Of every case, why this rank's part of it is wrong, or None."""
    columns = slice(*CUTS[world][rank : rank + 2])
    sharding = {"group": dist.group.WORLD, "vocab_start": columns.start}
    verdicts = {}
    for dtype in DTYPES:
        problem = Problem(dtype, world)
        for name, function in cases().items():
            verdicts[f"{name}, {dtype}"] = check_logits(function, problem, columns, sharding, "in place" in name)
    for name, function in heads().items():
        verdicts[f"{name}, {torch.float32}"] = check_head(function, Problem(torch.float32, world), columns, sharding)
    return verdicts


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_the_threshold_search_finds_every_number(dtype):
    """Of any sign and size, between the lowest number and any maximum, within the promised rounds."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    sizes = (0, 5e-324, 2.225073858507201e-308, 1e-45, 1e-7, 0.3, 1, 1.5, 2, 4, 5, 1e4, 3e38, 1.7e308)
    sizes = torch.tensor(sizes, dtype=torch.float64)
    values = torch.cat((sizes, -sizes, torch.randn(50, dtype=torch.float64) * 3))
    values = values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    wanted, last = (x.flatten().to(dtype) for x in torch.meshgrid(values, values, indexing="ij"))
    wanted, last = wanted.minimum(last), wanted.maximum(last).to(wide)
    rounds = []

    def holds(pivots):
        rounds.append(pivots)
        return pivots <= wanted.to(wide).unsqueeze(-1)

    found = vocab_parallel._largest(holds, torch.full_like(last, torch.finfo(wide).min), last, dtype)
    below = torch.nextafter(wanted.cpu(), torch.full_like(wanted, -torch.inf))
    assert ((below.to(wide) < found) & (found <= wanted.to(wide))).all()  # the same numbers of this dtype are above
    assert len(rounds) == {torch.float64: 13, torch.float32: 7, torch.bfloat16: 4, torch.float16: 4}[dtype]


NAMES = [f"{name}, {dtype}" for dtype in DTYPES for name in cases()] + [f"{name}, {torch.float32}" for name in heads()]


@pytest.fixture(scope="module", params=CUTS)
def verdicts(request):
    """Of each rank, of every case."""
    return results_of(work, request.param, request.param)


@pytest.mark.parametrize("name", NAMES)
def test_shards_give_what_whole_rows_give(name, verdicts):
    assert [of_rank[name] for of_rank in verdicts] == [None] * len(verdicts)
