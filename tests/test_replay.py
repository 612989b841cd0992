"""`token_log_prob` on a support that is replayed."""

import nasty
import oracles
import pytest
import torch
from closeness import assert_log_probs
from supports import DTYPES, WIDE, name, rows, support_of
from test_truncated_log_prob import check, check_replay

from sdkernels import truncated_support


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [{"top_k": 20}, {"top_p": 0.9}, {"top_k": 300}], ids=name)
def test_replaying_what_truncated_support_found_gives_the_same(chosen, dtype, device):
    logits = rows("gaussian", 4, WIDE, dtype, device)
    support = truncated_support(logits, 0.8, **chosen, max_size=400)
    assert (support.size < 400).all()
    token_ids = support.token_ids[:, 0].clone()
    token_ids[1] = support.token_ids[1, support.size[1] - 1]
    direct, _ = check(logits, token_ids, temperature=0.8, **chosen)
    order = torch.randperm(400, device=device)
    for replayed in (support, support.token_ids.int(), support.token_ids[:, order]):
        result, _ = check_replay(logits, token_ids, replayed, temperature=0.8)
        truth = oracles.token_log_prob(logits, token_ids, 0.8, inside=support_of(logits, 0.8, **chosen))
        for each, value in zip(result, (truth.log_prob, truth.entropy), strict=True):
            assert_log_probs(each, value)
    assert_log_probs(direct.log_prob, truth.log_prob)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sampled_token_is_always_counted_in(dtype, device):
    logits, token_ids = rows("gaussian", 4, 1111, dtype, device), torch.tensor([3, 5, 900, 7], device=device)
    support = torch.tensor([[3, 4, -1], [-1, 4, 5], [-1, 1, 2], [-1, -1, -1]], device=device)
    result, gradient = check_replay(logits, token_ids, support, temperature=0.7)
    assert result.log_prob[3].item() == 0
    assert (gradient[3] == 0).all()
    assert (result.log_prob > -torch.inf).all()
    assert gradient[2, 900] != 0
    nothing = torch.zeros(4, 0, dtype=torch.int64, device=device)
    assert (check_replay(logits, token_ids, nothing)[0].log_prob == 0).all()


def test_replaying_the_whole_vocabulary_is_no_truncation(device):
    logits, token_ids = rows("gaussian", 4, 1111, device=device), nasty.ids(4, 1111, device)
    everything = torch.randperm(1111, device=device).expand(4, 1111)
    result, _ = check_replay(logits, token_ids, everything)
    truth = oracles.token_log_prob(logits, token_ids)
    assert_log_probs(result.log_prob, truth.log_prob)


def test_minus_inf_in_a_replayed_support_has_no_mass(device):
    logits, token_ids = rows("gaussian", 3, 111, device=device), torch.tensor([3, 4, 90], device=device)
    logits[:, 4] = -torch.inf
    result, _ = check_replay(logits, token_ids, torch.tensor([[2, 3, 4, -1]] * 3, device=device))
    assert (result.log_prob == -torch.inf).tolist() == [False, True, False]
