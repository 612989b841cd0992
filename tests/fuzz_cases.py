"""Random calls of the functions on logits: drawn by hypothesis in test_fuzz.py, by random in leaks.py.

`choose(name, values)` is all that they know of where a choice comes from; the numbers follow from a seed chosen first.
"""

import math
from dataclasses import dataclass, replace

import heads
import nasty
import oracles
import torch
from supports import OWN, rows
from test_evidence import CLIPS
from test_ssd_loss import REDUCTIONS, WEIGHTS

import sdkernels
from sdkernels import Support

VOCABULARIES = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 100, 127, 255, 256, 257, 511, 1000, 1023, 1025, 2048,
                4095, 4096, 4097, 4160, 9001, 32769)  # fmt: skip
SHAPES = ((), (0,), (1,), (5,), (2, 3), (3, 0), (1, 4), (2, 2, 2), (2, 1, 2, 2))
FEW = ((), (2,), (1, 2))  # of rows so long that more would take long
KINDS = (*nasty.ROWS, *OWN)
FINITE = tuple(kind for kind in KINDS if kind not in ("lowest", "further_below_zero"))  # also their divergences
DTYPES = nasty.DTYPES[:3]
OFFSETS = (-3.0, -0.5, -0.1, 0.1, 0.5, 1.5)  # of log r; with 0.02 of noise, none within rounding of where it is clipped
DIFFERENTIABLE = ("token_log_prob", "truncated_log_softmax", "grpo_loss", "rlsd_loss", "ssd_loss", "ssd_decomposition",
                  "opsd_loss")  # fmt: skip
DETACHED = ("rlsd_token_advantage", "evidence_weighted_advantage", "opsd_decomposition", "truncated_support")
FUNCTIONS = (*DIFFERENTIABLE, *DETACHED)


@dataclass
class Case:
    """A call: `sdkernels.<name>(*arguments, **options)`, whose first argument a differentiable one is pulled at."""

    name: str
    arguments: list
    options: dict
    keep: torch.Tensor  # (...) tokens that count
    temperature: torch.Tensor  # (...) float64, 1 where masked
    pulls: str  # "loss", or "everything" that is differentiable
    seed: int

    def upcast(self):
        """The same in float64, which runs the reference, and not in place."""
        options = {key: _double(x) for key, x in self.options.items() if key != "inplace"}
        return replace(self, arguments=[_double(x) for x in self.arguments], options=options)

    def upstream(self, found):
        """What comes back to each result that is differentiable, exact in any dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = {key: torch.randn(x.shape, generator=generator).bfloat16() for key, x in found.items()}
        pulled = {key: g for key, g in drawn.items() if found[key].requires_grad}
        if self.pulls == "loss" and "loss" in pulled:
            return {"loss": pulled["loss"]}
        if "log_q" in pulled:  # what is outside S is not read
            pulled["log_q"] = torch.where(found["log_q"] == -torch.inf, torch.nan, pulled["log_q"])
        return pulled


def _double(value):
    if isinstance(value, Support):
        return Support(*(_double(x) for x in value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def call(case, leaf=None):
    """Results by name."""
    first, *rest = case.arguments
    output = getattr(sdkernels, case.name)(first if leaf is None else leaf, *rest, **case.options)
    return heads.fields(output) if hasattr(output, "_asdict") else {"log_q": output}


def run(case, upstream=None):
    """Results by name, the gradient of the first argument, and what comes back to the results, drawn if not given."""
    if case.name not in DIFFERENTIABLE:
        return call(case), None, {}
    leaf = case.arguments[0].detach().requires_grad_()
    found = call(case, leaf)
    upstream = upstream or case.upstream(found)
    outputs = [found[key] for key in upstream]
    (gradient,) = torch.autograd.grad(outputs, leaf, [g.to(x) for x, g in zip(outputs, upstream.values(), strict=True)])
    return {key: x.detach() for key, x in found.items()}, gradient, upstream


class Draw:
    """What the functions share: shape, vocabulary, masks, and drawing rows."""

    def __init__(self, choose, sequences):
        self.choose = choose
        self.vocab = choose("V", VOCABULARIES)
        self.shape = torch.Size(choose("shape", SHAPES if self.vocab < 5000 else FEW))
        self.seed = choose("seed", range(1 << 16))
        torch.manual_seed(self.seed)
        mask = torch.rand(self.shape) < 0.7
        self.mask = choose("mask", (None, mask, mask.int(), mask * 0.5))
        self.keep = torch.ones(self.shape, dtype=torch.bool) if self.mask is None else mask
        self.cu_seqlens = None
        if sequences and len(self.shape) == 1:
            inner = torch.randint(self.shape[0] + 1, (3,)).sort().values
            ends = torch.tensor([0, *inner, self.shape[0]], dtype=torch.int32)
            self.cu_seqlens = choose("cu_seqlens", (None, ends))

    def label(self):
        """Token ids of the shape, of which -100 masks too."""
        ids = nasty.ids(self.shape.numel(), self.vocab).reshape(self.shape)
        ignored = torch.rand(self.shape) < 0.1
        if self.choose("-100", (False, True)):
            ids[ignored] = -100
            self.keep = self.keep & ~ignored
        return ids.to(self.choose("dtype of ids", (torch.int32, torch.int64)))

    def logits(self, side, like=None):
        """(..., V), NaN where masked, in some layout; if asked, of about the probabilities of others."""
        kinds = KINDS if like is None else FINITE
        kind, dtype = self.choose(f"{side}'s rows", kinds), self.choose(f"{side}'s dtype", DTYPES)
        z = rows(kind, self.shape.numel(), self.vocab, dtype).reshape(*self.shape, self.vocab)
        if like is not None and self.choose(f"{side} is like the student", (True, False)):
            z = (like.float() + torch.randn(z.shape) / 3).to(dtype)
        bad = self.choose(f"in {side}", (None, None, None, None, torch.nan, torch.inf))
        if bad is not None and z.numel():
            z = z.contiguous()
            z.view(-1)[torch.randint(z.numel(), ())] = bad
        return self.laid_out(side, z.masked_fill(~self.keep.unsqueeze(-1), torch.nan))

    def laid_out(self, side, z):
        """The same in memory of other strides; once, the first of a dimension in all its places."""
        layouts = ["contiguous", "odd columns"]
        layouts += list(nasty.LAYOUTS) if z.dim() == 3 else []
        layouts += ["expanded"] if z.dim() > 1 and z.shape[0] > 1 else []
        layout = self.choose(f"{side}'s layout", layouts)
        if layout == "expanded":
            return z[:1].expand(z.shape)
        if layout == "odd columns":
            wide = z.new_full((*z.shape[:-1], z.shape[-1] + 3), torch.nan)
            wide[..., 1:-2] = z
            return wide[..., 1:-2]
        return nasty.LAYOUTS[layout](z)

    def temperature(self):
        """A number or a tensor of one of the shapes, at masked tokens anything."""
        sequences = self.shape[:-1] if self.cu_seqlens is None else (self.cu_seqlens.numel() - 1,)
        each = torch.where(self.keep, torch.rand(self.shape) + 0.3, 0.0)
        values = (1.0, 1.0, 0.05, 0.3, 1.6, 20.0, torch.tensor(0.8), each, torch.rand(sequences) + 0.3)
        return self.choose("temperature", values)

    def per_token(self, temperature):
        return torch.where(self.keep, oracles.per_token(temperature, self.shape, self.cu_seqlens), 1.0)

    def filters(self):
        return {
            "top_k": self.choose("top_k", (None, None, 0, 1, 2, 5, 64, 65, 300, self.vocab - 1, self.vocab + 2)),
            "top_p": self.choose("top_p", (None, None, 1.0, 1e-6, 0.3, 0.9, 0.999)),
            "min_p": self.choose("min_p", (None, None, 0.0, 0.01, 0.3, 1.0)),
        }

    def reducing(self):
        return reducing(self.choose, self.shape, len(self.shape) > 1 or self.cu_seqlens is not None)

    def advantages(self):
        sequences = self.shape[:-1] if self.cu_seqlens is None else (self.cu_seqlens.numel() - 1,)
        shape = self.choose("shape of advantages", (self.shape, sequences))
        return torch.where(torch.rand(shape) < 0.2, 0.0, torch.randn(shape))

    def policy(self, logits, token_ids, temperature):
        options = {"cu_seqlens": self.cu_seqlens, "mask": self.keep}
        log_prob = sdkernels.token_log_prob(logits.detach().double(), token_ids, temperature, **options).log_prob
        beta = self.choose("beta", (0.0, 0.1))
        old = torch.where(log_prob.abs() < 100, near(log_prob), -5.0)
        return {
            "old_log_prob": self.choose("old", (None, old)),
            "reference_log_prob": near(log_prob) if beta else None,
            "beta": beta,
            "epsilon_low": self.choose("epsilon_low", (0.2, 0.0, 0.7)),
            "epsilon_high": self.choose("epsilon_high", (0.2, 0.28, 0.0, math.inf)),
            "dual_clip": self.choose("dual_clip", (None, 3.0, math.inf)),
        }

    def divergence(self):
        divergence = self.choose("divergence", ("forward_kl", "reverse_kl", "jsd"))
        return {
            "divergence": divergence,
            "beta": self.choose("beta", (0.5, 0.01, 0.9)),
            "top_k": self.choose("top_k", (None, None, 0, 1, 7, 64, 65, self.vocab - 1, self.vocab + 2)),
            "top_k_from": self.choose("top_k_from", ("student", "teacher")),
            "tail": self.choose("tail", (True, False)),
            "token_clip": self.choose("token_clip", (None, None, 0.3, 0.01)),
        }

    def weighing(self):
        return weighing(self.choose, self.shape)

    def inplace(self, logits):
        may = 0 not in logits.stride() and logits.dim() <= 4 and logits.stride(-1) == 1
        return {"inplace": self.choose("inplace", (False, True))} if may else {}

    def case(self, name, arguments, temperature, options):
        pulls = self.choose("pulls", ("loss", "everything"))
        return Case(name, arguments, options, self.keep, self.per_token(temperature), pulls, self.seed)


def reducing(choose, shape, sequences):
    """Options of the losses."""
    reduction = choose("reduction", REDUCTIONS if sequences else ("token-mean", "sum", "none"))
    return {
        "reduction": reduction,
        "normalizer": choose("normalizer", (None,) if reduction == "none" else (None, 3, torch.tensor(0.5))),
        "token_weight": choose("token_weight", (None, torch.randn(shape))),
    }


def weighing(choose, shape):
    """Options of the evidence."""
    return {
        "clip_range": choose("clip_range", CLIPS),
        "lam": choose("lam", (1.0, 0.3, 0.0)),
        "apply_to": choose("apply_to", ("all", "negative", "positive")),
        "pessimistic": choose("pessimistic", (False, True)),
        "credit_mask": choose("credit_mask", (None, torch.rand(shape) < 0.7)),
    }


def near(log_prob):
    """Log-probs that differ by one of OFFSETS; those so large that float32 has none near them, by about nothing."""
    chosen = torch.tensor(OFFSETS)[torch.randint(len(OFFSETS), log_prob.shape)] + 0.02 * torch.rand(log_prob.shape)
    return torch.where(log_prob.abs() < 100, log_prob - chosen, log_prob).float()


def on_logits(name, choose):
    """A call of one of FUNCTIONS."""
    return _DRAWN[name](Draw(choose, sequences=name not in WITHOUT_SEQUENCES))


WITHOUT_SEQUENCES = ("truncated_log_softmax", "truncated_support", "ssd_decomposition", "opsd_decomposition")


def _token_log_prob(draw):
    token_ids, logits, temperature = draw.label(), draw.logits("student"), draw.temperature()
    options = {"mask": draw.mask, "cu_seqlens": draw.cu_seqlens}
    if draw.choose("replay", (False, True)):
        ids = torch.rand(*draw.shape, draw.vocab).argsort(-1)[..., : draw.choose("K", (0, 1, 5, 70))]
        options["support"] = torch.where(torch.rand(ids.shape) < 0.2, -1, ids)
    else:
        options |= draw.filters()
    return draw.case("token_log_prob", [logits, token_ids, temperature], temperature, options)


def _truncated_log_softmax(draw):
    draw.mask, draw.keep = None, torch.ones(draw.shape, dtype=torch.bool)
    logits, temperature = draw.logits("student"), draw.temperature()
    options = {"dtype": draw.choose("dtype", (None, torch.float32)), **draw.filters()}
    return draw.case("truncated_log_softmax", [logits, temperature], temperature, options)


def _truncated_support(draw):
    logits, temperature = draw.logits("base"), draw.temperature()
    options = {"max_size": draw.choose("max_size", (1, 7, 64, 65, 300)), "mask": draw.mask, **draw.filters()}
    return draw.case("truncated_support", [logits, temperature], temperature, options)


def _grpo_loss(draw):
    token_ids, logits, temperature = draw.label(), draw.logits("student"), draw.temperature()
    policy = draw.policy(logits, token_ids, temperature)
    options = {"temperature": temperature, "mask": draw.mask, "cu_seqlens": draw.cu_seqlens, **draw.reducing()}
    arguments = [logits, token_ids, draw.advantages(), policy.pop("old_log_prob")]
    return draw.case("grpo_loss", arguments, temperature, {**policy, **options, **draw.inplace(logits)})


def _teacher(draw, logits):
    if draw.choose("teacher", ("logits", "log-probs")) == "logits":
        return draw.logits("teacher", like=logits)
    return torch.where(draw.keep, -5 * torch.rand(draw.shape), torch.nan)


def _rlsd_loss(draw):
    token_ids, logits, temperature = draw.label(), draw.logits("student"), draw.temperature()
    policy = draw.policy(logits, token_ids, temperature)
    options = {"temperature": temperature, "mask": draw.mask, "cu_seqlens": draw.cu_seqlens, **draw.reducing()}
    options |= draw.weighing() | {"evidence_from": draw.choose("evidence_from", ("current", "old"))}
    arguments = [logits, _teacher(draw, logits), token_ids, draw.advantages(), policy.pop("old_log_prob")]
    return draw.case("rlsd_loss", arguments, temperature, {**policy, **options, **draw.inplace(logits)})


def _rlsd_token_advantage(draw):
    token_ids, logits, temperature = draw.label(), draw.logits("student"), draw.temperature()
    options = {
        "temperature": temperature,
        "mask": draw.mask,
        "cu_seqlens": draw.cu_seqlens,
        **draw.weighing(),
    }
    arguments = [logits, _teacher(draw, logits), token_ids, draw.advantages()]
    return draw.case("rlsd_token_advantage", arguments, temperature, options)


def _evidence_weighted_advantage(draw):
    log_probs = [torch.where(draw.keep, -9 * torch.rand(draw.shape), torch.nan) for _ in range(2)]
    options = {"mask": draw.mask, "cu_seqlens": draw.cu_seqlens, **draw.weighing()}
    return draw.case("evidence_weighted_advantage", [*log_probs, draw.advantages()], 1.0, options)


def _ssd(name):
    def drawn(draw):
        logits, temperature = draw.logits("student"), draw.temperature()
        base, chosen = draw.logits("base", like=logits), draw.filters()
        if draw.choose("base is a Support", (False, True)):
            temperature = draw.per_token(temperature)
            places = {"max_size": draw.choose("max_size", (1, 7, 65, 300)), "mask": draw.mask}
            base, chosen = sdkernels.truncated_support(base, temperature, **chosen, **places), {}
        options = {"mask": draw.mask, **chosen}
        if name == "ssd_loss":
            options |= {"weights": draw.choose("weights", WEIGHTS), "cu_seqlens": draw.cu_seqlens, **draw.reducing()}
            options |= draw.inplace(logits)
        return draw.case(name, [logits, base, temperature], temperature, options)

    return drawn


def _opsd_loss(draw):
    logits, temperature = draw.logits("student"), draw.temperature()
    options = {"temperature": temperature, "mask": draw.mask, "cu_seqlens": draw.cu_seqlens}
    options |= {**draw.divergence(), **draw.reducing(), **draw.inplace(logits)}
    return draw.case("opsd_loss", [logits, draw.logits("teacher", like=logits)], temperature, options)


def _opsd_decomposition(draw):
    logits, temperature = draw.logits("student"), draw.temperature()
    teachers = [draw.logits("teacher", like=logits)] * draw.choose("R", (1, 2, 3, 9))
    noise = torch.randn(len(teachers), *teachers[0].shape)
    teachers = (torch.stack(teachers).float() + noise).to(teachers[0].dtype)
    options = {"temperature": temperature, "mask": draw.mask}
    return draw.case("opsd_decomposition", [logits, teachers], temperature, options)


_DRAWN = {
    **{f.__name__.removeprefix("_"): f
       for f in (_token_log_prob, _truncated_log_softmax, _truncated_support, _grpo_loss, _rlsd_loss,
                 _rlsd_token_advantage, _evidence_weighted_advantage, _opsd_loss, _opsd_decomposition)},
    **{name: _ssd(name) for name in ("ssd_loss", "ssd_decomposition")},
}  # fmt: skip


def of_random(generator):
    """`choose` of a random.Random."""
    return lambda _, values: generator.choice(values)
