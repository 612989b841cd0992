"""What the tests of truncated rows share: rows and filters, and the support that the library chose, held to SPEC."""

import nasty
import oracles
import torch
from conftest import INTERPRETED

from sdkernels import truncated_log_softmax

FULL = 30011 if INTERPRETED else 151936  # a search there takes the interpreter a minute
WIDE = 2999 if INTERPRETED else 50257  # several blocks of any kernel
TEMPERATURES = (0.5, 0.8, 1.0, 1.6, 2.0)


def ascending(rows, vocab):
    return nasty.gaussian(rows, vocab).sort(dim=-1).values


def descending(rows, vocab):
    return nasty.gaussian(rows, vocab).sort(dim=-1, descending=True).values


def large_in_one_place(rows, vocab):
    """All that any filter keeps lies side by side, so that one part of a row must hold it all."""
    logits = torch.randn(rows, vocab)
    logits[:, vocab // 3 : vocab // 3 + 5000] += 20
    return logits


def large_at_the_end(rows, vocab):
    logits = torch.randn(rows, vocab) - 5
    logits[:, -min(70, vocab) :] += 20
    return logits


def all_equal(rows, vocab):
    return torch.full((rows, vocab), 1.5)


def tied_everywhere(rows, vocab):
    """Halves: thousands of ties at every place but the first few."""
    return (torch.randn(rows, vocab) * 6).round() / 2


def a_hundred_ties_in_the_fifth_place(rows, vocab):
    logits = nasty.gaussian(rows, vocab).clamp(max=30)
    logits[:, torch.randperm(vocab)[:100]] = 32.0
    logits[:, torch.randperm(vocab)[:4]] = torch.tensor([33.0, 34.0, 35.0, 36.0])[:vocab]
    return logits


def signed_zeros_at_the_top(rows, vocab):
    return torch.where(torch.rand(rows, vocab) < 0.01, torch.where(torch.rand(rows, vocab) < 0.5, 0.0, -0.0), -3.0)


OWN = {
    f.__name__: f
    for f in (ascending, descending, large_in_one_place, large_at_the_end, all_equal, tied_everywhere,
              a_hundred_ties_in_the_fifth_place, signed_zeros_at_the_top)
}  # fmt: skip


def few(values, step=6):
    """All of the values, but some of them under the interpreter, which is slow."""
    return list(values)[::step] if INTERPRETED else list(values)


KINDS = few((*nasty.ROWS, *OWN), 4)
DTYPES = few(nasty.DTYPES, 1)[: 2 if INTERPRETED else 4]
LAYOUTS = few(nasty.LAYOUTS, 3)


def rows(kind, count, vocab, dtype=torch.float32, device="cpu"):
    if kind in OWN:
        return OWN[kind](count, vocab).to(dtype).to(device)
    return nasty.rows(kind, count, vocab, dtype, device)


def filters(**options):
    """Every value alone, and of every combination of filters some."""
    vocab = options.pop("vocab", FULL)
    alone = [{"top_k": k} for k in (1, 5, 20, 64, 65, 300, vocab - 1, vocab, vocab + 1)]
    alone += [{"top_p": p} for p in (1e-6, 0.5, 0.8, 0.95, 0.999)] + [{"min_p": p} for p in (0.01, 0.3, 1.0)]
    both = [{"top_k": k, "top_p": p} for k, p in ((5, 0.5), (20, 0.95), (65, 0.999), (300, 0.8), (vocab - 1, 1e-6))]
    both += [{"top_k": k, "min_p": p} for k, p in ((1, 0.01), (64, 0.01), (300, 0.3))]
    both += [{"top_p": p, "min_p": m} for p, m in ((0.95, 0.01), (0.999, 0.01), (0.5, 0.3), (0.8, 1.0))]
    every = [{"top_k": k, "top_p": p, "min_p": m}
             for k, p, m in ((20, 0.8, 0.01), (65, 0.95, 0.3), (300, 0.999, 0.01), (vocab, 0.5, 1.0))]  # fmt: skip
    return [{}, *alone, *both, *every]


FILTERS = filters()
SOME_FILTERS = few([{"top_k": 20}, {"top_p": 0.95}, {"min_p": 0.01}, {"top_k": 300, "top_p": 0.999, "min_p": 0.01}], 3)
SWEEP = few(FILTERS, 12)


def name(chosen):
    return ", ".join(f"{key} {value}" for key, value in chosen.items()) or "no filter"


def assert_allowed(inside, logits, temperature=1.0, mask=None, cu_seqlens=None, **chosen):
    """S is a set {z >= threshold} of whole tie groups that SPEC allows; in masked rows anything."""
    keep = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask != 0
    allowed = oracles.support(logits, temperature, **chosen, keep=keep, cu_seqlens=cu_seqlens)
    z = torch.where(keep.unsqueeze(-1), logits.double(), 0.0)
    threshold = torch.where(inside, z, torch.inf).amin(-1, keepdim=True)
    wrong = (allowed.must & ~inside) | (inside & ~allowed.may) | (inside != ((z >= threshold) & (z > -torch.inf)))
    wrong = wrong & keep.unsqueeze(-1) & ~z.isnan().any(-1, keepdim=True)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        must, may = (x[index[:-1]].sum().item() for x in (allowed.must, allowed.may))
        verdict = f"{'holds' if inside[index] else 'lacks'} {list(index)}, z = {z[index].item():.10g}"
        raise AssertionError(
            f"S {verdict}, its threshold {threshold[index[:-1]].item():.10g}; |S| = {inside[index[:-1]].sum().item()}, "
            f"allowed {must} to {may}; {int(wrong.sum())} places wrong"
        )


def support_of(logits, temperature=1.0, mask=None, **chosen):
    """The library's S, bool (..., V), read off its log q; all of V in masked rows."""
    if mask is not None:
        logits = torch.where((mask != 0).unsqueeze(-1), logits, 0.0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    inside = truncated_log_softmax(logits.detach(), temperature, **chosen, dtype=dtype) > -torch.inf
    assert_allowed(inside, logits, temperature, mask, **chosen)
    return inside if mask is None else inside | (mask == 0).unsqueeze(-1)
