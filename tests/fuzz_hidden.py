"""Random calls of linear_*, as fuzz_cases.py draws those of the functions on logits."""

import heads
import nasty
import oracles
import torch
from fuzz_cases import near, reducing, weighing

import sdkernels

FUNCTIONS = heads.FUNCTIONS


def on_hidden(name, choose):
    """A problem, and options for `heads.check` or `heads.run_fused` of linear_<name>."""
    shape = choose("shape", ((0,), (5,), (2, 3), (3, 0), (2, 2, 2), (2, 1, 2, 2)))
    vocab, width = choose("V", (61, 257, 1000)), choose("H", (1, 12, 33))
    torch.manual_seed(choose("seed", range(1 << 16)))
    dtypes = [choose(each, nasty.DTYPES) for each in ("dtype of hidden states", "dtype of the head")]
    p = heads.problem(*shape, hidden=dtypes[0], weight=dtypes[1], vocab=vocab, width=width)
    head = {
        "bias": choose("bias", (None, p.bias)),
        "softcap": choose("softcap", (None, 30.0) if name == "truncated_support" else (None, 3.0, 30.0)),  # else ties
        "logit_scale": choose("logit_scale", (1.0, 0.5)),
    }
    temperature = choose("temperature", (1.0, 0.3, 1.6, p.positive, torch.rand(shape[:-1]) + 0.5))
    options = {**head, "temperature": temperature, "mask": choose("mask", (None, p.mask, p.mask.int()))}
    options["chunk_size"] = choose("chunk_size", (None, 1, 3, 1000))
    wide = [x if x is None else x.double() for x in (p.hidden, p.weight, head["bias"])]
    z = heads.logits_of(*wide, head["softcap"], head["logit_scale"])
    exact = torch.float64 in dtypes  # where rounding would decide what is kept or clipped, nothing is
    log_prob = oracles.token_log_prob(z, p.token_ids, temperature).log_prob
    if name in ("grpo_loss", "rlsd_loss"):
        p.old, options["dual_clip"] = near(log_prob), choose("dual_clip", (None, 3.0))
    if name.startswith("rlsd") and choose("teacher", ("hidden states", "log-probs")) == "log-probs":
        options["other"] = near(log_prob)
    if name.startswith("rlsd"):
        options |= weighing(choose, shape)
    if name == "ssd_loss" and choose("base is a Support", (False, True)):
        options["other"] = sdkernels.truncated_support(z, temperature, top_k=7, max_size=9)
    elif exact and name in ("ssd_loss", "token_log_prob", "truncated_support"):
        options |= {"top_k": choose("top_k", (None, 1, 5)), "top_p": choose("top_p", (None, 0.9))}
    if name == "opsd_loss":
        options["divergence"] = choose("divergence", ("forward_kl", "reverse_kl", "jsd"))
        options["top_k"] = choose("top_k", (None, 1, 7) if exact else (None,))
    if name in heads.LOSSES:
        options |= reducing(choose, p.shape, len(shape) > 1)
    return p, options
