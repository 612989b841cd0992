"""The nasty list: rows, layouts and vocabularies that every operation faces."""

import torch

VOCABULARIES = (1, 2, 111, 50257, 151669, 151936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gaussian(rows, vocab):
    return torch.randn(rows, vocab) * 10


def gumbel(rows, vocab):
    return -torch.empty(rows, vocab).exponential_().log() * 3


def peaky(rows, vocab):
    """Nearly all mass on token 0, so p(y) -> 1 where it is chosen."""
    logits = torch.randn(rows, vocab)
    logits[:, 0] = torch.linspace(10, 40, max(rows, 1))[:rows]
    return logits


def one_against_many(rows, vocab):
    """Every other probability is a little less than half a unit in the last place of the first one."""
    logits = torch.zeros(rows, vocab)
    logits[:, 0] = 16.75
    return logits


def scattered_minus_inf(rows, vocab):
    logits = gaussian(rows, vocab)
    logits[:, 1:] = logits[:, 1:].masked_fill(torch.rand(rows, max(vocab - 1, 0)) < 0.5, -torch.inf)
    return logits


def first_block_minus_inf(rows, vocab):
    logits = gaussian(rows, vocab)
    logits[:, : min(40000, vocab - 1)] = -torch.inf  # longer than any kernel's first block
    return logits


def only_one_possible(rows, vocab):
    logits = torch.full((rows, vocab), -torch.inf)
    logits[:, vocab // 2] = -3.0
    return logits


def far_below_zero(rows, vocab):
    return gaussian(rows, vocab) - 1e4


def further_below_zero(rows, vocab):
    return torch.randn(rows, vocab).clamp(-3, 3) * 1e23 - 1e30


def lowest(rows, vocab):
    """Every logit is the least finite number, one of them a little more in the first row."""
    logits = torch.full((rows, vocab), torch.finfo(torch.float32).min)
    logits[:1, vocab - 1] = 0.0
    return logits


def far_above_zero(rows, vocab):
    return gaussian(rows, vocab) + 1e4


def ties(rows, vocab):
    return torch.randint(-2, 3, (rows, vocab)).float()


def signed_zeros(rows, vocab):
    return torch.where(torch.rand(rows, vocab) < 0.5, 0.0, -0.0)


ROWS = {
    f.__name__: f
    for f in (gaussian, gumbel, peaky, one_against_many, scattered_minus_inf, first_block_minus_inf, only_one_possible,
              far_below_zero, further_below_zero, lowest, far_above_zero, ties, signed_zeros)
}  # fmt: skip


def rows(kind, count, vocab, dtype=torch.float32, device="cpu"):
    """(count, vocab) logits of a kind, what a 16-bit dtype cannot hold clamped to what it can."""
    logits = ROWS[kind](count, vocab)
    finite = logits.isfinite()
    least = torch.finfo(dtype).min if dtype != torch.float64 else torch.finfo(torch.float32).min
    return torch.where(finite, logits.clamp(min=least), logits).to(dtype).to(device)


def ids(count, vocab, device="cpu", dtype=torch.int64):
    """Random token ids with 0, V - 1 and the middle among them."""
    token_ids = torch.randint(vocab, (count,))
    special = torch.tensor([0, vocab - 1, vocab // 2])[:count]
    token_ids[: special.numel()] = special
    return token_ids.to(dtype).to(device)


def _embed(logits, shape, view):
    """A view of a NaN-filled buffer, holding the logits."""
    buffer = torch.full(shape, torch.nan, dtype=logits.dtype, device=logits.device)
    target = view(buffer)
    target.copy_(logits)
    return target


def contiguous(x):
    return x.clone()


def time_major(x):
    b, t, v = x.shape
    return _embed(x, (t, b, v), lambda buffer: buffer.transpose(0, 1))


def all_but_the_last(x):
    b, t, v = x.shape
    return _embed(x, (b, t + 1, v), lambda buffer: buffer[:, :-1])


def misaligned(x):
    return _embed(x, (x.numel() + 1,), lambda buffer: buffer[1:].view(x.shape))


def odd_strides(x):
    b, t, v = x.shape
    return _embed(x, (b, t, v + 3), lambda buffer: buffer[..., 1 : v + 1])


def padded_vocabulary(x):
    b, t, v = x.shape
    return _embed(x, (b, t, -(-v // 16) * 16 + 16), lambda buffer: buffer[..., :v])


def every_other_token(x):
    b, t, v = x.shape
    return _embed(x, (b, 2 * t, v), lambda buffer: buffer[:, ::2])


def vocabulary_first(x):
    b, t, v = x.shape
    return _embed(x, (v, b, t), lambda buffer: buffer.permute(1, 2, 0))


LAYOUTS = {
    f.__name__: f
    for f in (contiguous, time_major, all_but_the_last, misaligned, odd_strides, padded_vocabulary, every_other_token,
              vocabulary_first)
}  # fmt: skip
