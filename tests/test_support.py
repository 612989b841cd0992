"""S itself: ties, sizes, what transformers would keep; and `truncated_support`, its sparse form, on disk too."""

import math

import nasty
import oracles
import pytest
import torch
from closeness import assert_log_probs, assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from supports import DTYPES, FULL, KINDS, LAYOUTS, SOME_FILTERS, SWEEP, WIDE, few, filters, name, rows, support_of
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sdkernels import Support, load_support, save_support, truncated_log_softmax, truncated_support
from sdkernels import truncation as module
from sdkernels.reference import truncation as reference
from sdkernels.rows import support as row_operator


def warped(logits, temperature, top_k=None, top_p=None, min_p=None):
    """The tokens that transformers would sample from, in float64."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    scores = scores if not top_k else TopKLogitsWarper(top_k)(None, scores)
    scores = scores if top_p is None else TopPLogitsWarper(top_p)(None, scores)
    return (scores if min_p is None else MinPLogitsWarper(min_p)(None, scores)) > -torch.inf


def check(logits, max_size, temperature=1.0, mask=None, function=truncated_support, **chosen):
    """Ids exactly, log-probs within SPEC's bound, of the S that `truncated_log_softmax` chose too."""
    found = function(logits, temperature, max_size=max_size, mask=mask, **chosen)
    inside = support_of(logits, temperature, mask, **chosen)
    keep = None if mask is None else mask != 0
    log_q = oracles.log_softmax(logits, temperature, keep, inside=inside)
    if mask is not None:
        log_q = torch.where(keep.unsqueeze(-1), log_q, -torch.inf)
        logits = torch.where(keep.unsqueeze(-1), logits, 0)
    truth = oracles.sparse(log_q, logits, max_size)
    assert torch.equal(found.token_ids, truth.token_ids)
    assert torch.equal(found.size, truth.size)
    assert_log_probs(found.log_probs, truth.log_probs)
    assert not found.log_probs.requires_grad
    total = found.log_probs.double().exp().sum(-1)
    assert_within(total, (found.size > 0).double(), 1e-5, "sum of q")
    return found


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("chosen", SWEEP, ids=name)
def test_every_filter_at_a_full_vocabulary(chosen, dtype, device):
    logits = torch.cat([rows(kind, 1, FULL, dtype, device) for kind in ("gaussian", "tied_everywhere")])
    for max_size, temperature in ((1, 0.8), (64, 1.0), (100, 1.6)):
        check(logits, max_size, temperature, **chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nasty_rows(kind, dtype, device):
    logits = rows(kind, 3, WIDE, dtype, device)
    for chosen in ({"top_k": 5}, {"top_p": 0.95}, {"min_p": 0.3}, {}):
        check(logits, 70, 1.6, **chosen)


@pytest.mark.parametrize("size", [5, 63, 64, 65, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supports_as_large_as_the_lists_and_one_more(dtype, size, device):
    """Once by count, once by mass; both with a last place that ties make as large."""
    steps = -torch.arange(size, device=device) / 8
    logits = torch.full((2, WIDE), -30.0, device=device)
    logits[0, torch.randperm(WIDE, device=device)[:size]] = steps  # distinct, also in bfloat16
    logits[1, torch.randperm(WIDE, device=device)[:size]] = steps.clamp(min=-0.5)  # tied from the fifth place on
    logits = logits.to(dtype)
    for chosen in ({"top_k": size}, {"min_p": 1e-6}, {"top_p": 0.9999999}):
        found = check(logits, 64, 1.0, **chosen)
        if "top_p" not in chosen:
            assert found.size.tolist() == [size, size]
    found = check(logits, 80, 1.0, top_k=5)
    assert found.size.tolist() == [5, size]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [3, 60, 64, 65, 1000])
def test_every_token_tied_with_the_last_one_kept_is_kept(ties, dtype, device):
    places = torch.randperm(WIDE, device=device)
    logits = torch.randn(1, WIDE, device=device) - 20
    logits[0, places[: ties + 1]] = 4.0
    logits[0, places[0]] = 5.0
    logits = logits.to(dtype)
    for chosen in ({"top_k": 2}, {"top_k": ties}, {"top_p": 0.999}, {"top_p": 0.8, "top_k": 2}, {"min_p": 0.2}):
        assert check(logits, 64, **chosen).size.item() == ties + 1, chosen
    for chosen in ({"top_k": 1}, {"min_p": 0.9}, {"top_p": 1e-6}, {"top_k": 2, "min_p": 0.5}):
        assert check(logits, 64, **chosen).size.item() == 1, chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.1}, {"min_p": 1.0}, {}], ids=name)
def test_an_all_equal_row_is_kept_whole_and_minus_zero_is_zero(chosen, dtype, device):
    for logits in (rows("all_equal", 2, WIDE, dtype, device), rows("signed_zeros", 2, WIDE, dtype, device)):
        found = check(logits, 64, **chosen)
        assert (found.size == WIDE).all()
        assert (found.token_ids == torch.arange(64, device=device)).all()


def test_top_p_renormalises_over_what_top_k_left(device):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], device=device).log()
    for k, p, size in ((0, 0.39, 1), (0, 0.41, 2), (0, 0.71, 3), (2, 0.55, 1), (2, 0.6, 2), (3, 0.77, 2), (3, 0.79, 3)):
        assert check(logits, 4, top_k=k, top_p=p).size.item() == size


def test_min_p_is_relative_to_the_largest(device):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], device=device).log()
    assert [check(logits, 4, min_p=p).size.item() for p in (0.76, 0.74, 0.51, 0.49, 0.26, 0.24)] == [1, 2, 2, 3, 3, 4]
    assert check(logits, 4, 2.0, min_p=0.72).size.item() == 2  # 0.3 / 0.4 to the power 1/2 is 0.87, 1/2 is 0.71


@pytest.mark.parametrize("chosen", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.01}], ids=name)
def test_minus_inf_is_never_kept_and_the_largest_always(chosen, device):
    logits = torch.full((2, WIDE), -torch.inf, device=device)
    logits[0, 7], logits[1, [3, 9]] = -1e4, torch.tensor([1.0, -40.0], device=device)
    found = check(logits, 3, **chosen)
    assert found.token_ids[:, 0].tolist() == [7, 3]
    assert found.size.tolist() == [1, 2 if "top_k" in chosen else 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
@pytest.mark.parametrize("chosen", few(filters(vocab=5000)), ids=name)
def test_random_rows_keep_what_transformers_keeps(chosen, temperature, device):
    quantiles = torch.special.ndtri((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000)  # no two alike
    for scale in (1, 4):
        logits = torch.stack([quantiles[torch.randperm(5000)] * scale * (1 + torch.rand(1)) for _ in range(4)])
        logits = logits.float().to(device)
        assert torch.equal(support_of(logits, temperature, **chosen), warped(logits, temperature, **chosen))


def test_among_ties_transformers_keeps_fewer_with_top_p_only(device):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]], device=device)
    for chosen in ({"top_k": 2}, {"min_p": 1.0}):
        assert torch.equal(support_of(logits, **chosen), warped(logits, 1.0, **chosen))
    assert support_of(logits, top_p=0.3).tolist() == [[False, True, True, True, False]]
    assert warped(logits, 1.0, top_p=0.3).sum() < 3  # those of its ties that its sort happens to put first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_the_bits_of_contiguous_logits(layout, dtype, device):
    logits = rows("gumbel", 4, WIDE, dtype, device).reshape(2, 2, WIDE)
    for chosen in ({"top_k": 20}, {"top_p": 0.99}):
        found = check(nasty.LAYOUTS[layout](logits), 30, **chosen)
        for each, same in zip(found[:3], truncated_support(logits, max_size=30, **chosen)[:3], strict=True):
            assert_same_bits(each, same)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_are_empty_whatever_they_hold(dtype, device):
    logits = rows("gaussian", 6, WIDE, dtype, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    logits[mask == 0] = torch.nan
    temperature = torch.where(mask == 0, torch.nan, 0.8)
    found = check(logits, 20, temperature.nan_to_num(1.0), mask, top_p=0.95)
    given = truncated_support(logits, temperature, top_p=0.95, max_size=20, mask=mask)
    for each, same in zip(given[:3], found[:3], strict=True):
        assert_same_bits(each, same)
    assert (found.size[mask == 0] == 0).all()
    assert (found.token_ids[mask == 0] == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_a_bad_row_is_empty_and_changes_no_other(chosen, bad, dtype, device):
    logits = rows("gaussian", 3, WIDE, dtype, device)
    clean = truncated_support(logits, max_size=9, **chosen)
    logits[1, slice(None) if bad == -torch.inf else WIDE // 2] = bad
    found = truncated_support(logits, max_size=9, **chosen)
    assert (found.token_ids[1] == -1).all()
    for each, before in zip(found[:3], clean[:3], strict=True):
        assert_same_bits(each[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3), (2, 1, 2, 2), (1, 2, 1, 2, 2)])
def test_every_leading_shape_and_more_places_than_tokens(shape, device):
    logits = rows("gaussian", torch.Size(shape).numel(), 11, device=device).reshape(*shape, 11)
    for max_size in (1, 11, 20):
        found = check(logits, max_size, top_k=5)
        assert found.token_ids.shape == (*shape, max_size)
        assert (found.token_ids.dtype, found.size.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_temperature_is_kept_as_it_was_given(dtype, device):
    logits = rows("gaussian", 4, 111, dtype, device).reshape(2, 2, 111)
    for temperature in (0.7, torch.tensor([0.5, 2.0], device=device), torch.tensor(0.9), torch.rand(2, 2) + 0.5):
        temperature = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
        found = check(logits, 8, temperature, top_p=0.9)
        assert found.temperature is temperature or torch.equal(found.temperature, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_nor_on_the_run(dtype, device):
    logits = rows("gumbel", 7, WIDE, dtype, device)
    for chosen in SOME_FILTERS:
        whole, again, alone = (truncated_support(x, 0.9, **chosen, max_size=90) for x in (logits, logits, logits[4:5]))
        for each, repeated, single in zip(whole[:3], again[:3], alone[:3], strict=True):
            assert_same_bits(repeated, each)
            assert_same_bits(single, each[4:5])


@pytest.mark.parametrize("chosen", few(filters(vocab=111)), ids=name)
def test_the_reference_equals_the_formula(chosen):
    mask = torch.tensor([1, 1, 0])
    for kind in ("gaussian", "ties", "scattered_minus_inf"):
        for max_size in (3, 64, 200):
            check(rows(kind, 3, 111, torch.float64), max_size, 0.8, mask, reference.truncated_support, **chosen)


@given(st.data())
def test_any_shape_and_options_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3), "shape"))
    vocab, dtype = data.draw(st.integers(1, 300), "V"), data.draw(st.sampled_from(nasty.DTYPES), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    kind = data.draw(st.sampled_from(["gaussian", "gumbel", "scattered_minus_inf", "ties", "tied_everywhere"]), "rows")
    logits = rows(kind, torch.Size(shape).numel(), vocab, dtype).reshape(*shape, vocab)
    check(
        logits,
        data.draw(st.integers(1, 100), "max_size"),
        data.draw(st.sampled_from([1.0, 0.5, 2.0, torch.rand(shape) + 0.5]), "temperature"),
        data.draw(st.sampled_from([None, (torch.rand(shape) < 0.7).int()]), "mask"),
        top_k=data.draw(st.none() | st.integers(0, vocab + 2), "top_k"),
        top_p=data.draw(st.none() | st.floats(1e-6, 1), "top_p"),
        min_p=data.draw(st.none() | st.floats(0, 1), "min_p"),
    )


@pytest.mark.parametrize(
    "temperature", [0.7, torch.tensor([0.5, 2.0]), torch.rand(2, 3) + 0.5], ids=["0", "(B,)", "()"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_saved_is_loaded(dtype, temperature, tmp_path, device):
    logits = rows("gaussian", 6, 111, dtype, device).reshape(2, 3, 111)
    moved = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
    support = truncated_support(logits, moved, top_p=0.9, max_size=8, mask=torch.tensor([[1, 1, 0]] * 2, device=device))
    for path in (tmp_path / "support.safetensors", str(tmp_path / "again")):
        save_support(path, support)
        loaded = load_support(path)
        assert isinstance(loaded, Support)
        for each, expected in zip(loaded[:3], support[:3], strict=True):
            assert_same_bits(each, expected.cpu())
        same = loaded.temperature == temperature
        assert same if isinstance(same, bool) else same.all()
        assert type(loaded.temperature) is type(temperature)
        for chosen in (slice(1, 2), slice(0), slice(-1, None)):
            part, tensor = load_support(path, chosen), isinstance(temperature, torch.Tensor)
            for each, expected in zip(part[:3], support[:3], strict=True):
                assert_same_bits(each, expected[chosen].cpu())
            assert (part.temperature.tolist() == temperature[chosen].tolist()) if tensor else part[3] == temperature
    assert {path.name for path in tmp_path.iterdir()} == {"support.safetensors", "again"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, old = tmp_path / "support", truncated_support(torch.randn(3, 11), top_k=2, max_size=2)
    save_support(path, old)

    def interrupted(tensors, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_support(path, truncated_support(torch.randn(3, 11), top_k=2, max_size=2))
    assert torch.equal(load_support(path).log_probs, old.log_probs)
    assert [each.name for each in tmp_path.iterdir()] == ["support"]


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"token_ids": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"weights holds \['token_ids'\], not the fields of a Support"):
        load_support(tmp_path / "weights")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text is not a safetensors file"):
        load_support(tmp_path / "text")
    with pytest.raises(TypeError, match="support must be a Support, got Tensor"):
        save_support(tmp_path / "tensor", torch.zeros(3))


def test_a_place_or_rows_that_cannot_be_are_named(tmp_path):
    support = truncated_support(torch.randn(3, 11), top_k=2, max_size=2)
    for parent in ("missing", "support"):  # the second will be a file
        path = tmp_path / parent / "name"
        with pytest.raises(FileNotFoundError, match=f"{path} cannot be written: there is no directory {path.parent}"):
            save_support(path, support)
        save_support(tmp_path / "support", support)
    for bad in (0, [0, 2], True, torch.tensor([0])):
        with pytest.raises(TypeError, match=f"rows must be a slice, got {type(bad).__name__}"):
            load_support(tmp_path / "support", bad)


@pytest.mark.parametrize("max_size", [10, 63, 64])
def test_a_nucleus_that_ends_within_rounding_of_a_list(max_size, device):
    """Summed in another order the mass may put token 0, the next largest, out of S or in: the list must agree."""
    small = math.log(0.7 * 2**-23)
    logits = torch.full((1, 60_000), small, device=device)
    logits[0, :1024], logits[0, 1:64], logits[0, 0] = -17.0, 0.0, small + 0.2
    share = 63 / logits.double().exp().sum().item()
    for top_p in (share * (1 - 1.5e-6), share * (1 - 3e-7), share * (1 - 1e-7)):
        found = truncated_support(logits, top_p=top_p, max_size=max_size)
        assert found.size.item() in (63, 64)
        assert found.token_ids[0, : min(max_size, 63)].tolist() == list(range(1, min(max_size, 63) + 1))
        assert abs(found.log_probs.double().exp().sum() - 1) < 1e-6
        log_q = truncated_log_softmax(logits, top_p=top_p)
        assert (log_q > -torch.inf).sum() == found.size
        assert abs(log_q.double().exp().sum() - 1) < 1e-6


@pytest.mark.parametrize("members", [20, 300])
def test_a_min_p_so_small_that_float32_misses_it(members, device):
    """The products of T and log(min_p) are rounded by more than what is left between S and the rest."""
    min_p, m = 1.995262314968932e-280, 644.0330200195312
    logits = torch.full((1, 3000), -100.0, device=device)
    logits[0, 5], logits[0, 100 : 100 + members] = m, (m + math.log(min_p)) * 0.7
    found = truncated_support(logits, min_p=min_p, max_size=64)
    assert found.size.item() == members + 1
    assert found.token_ids[0].tolist() == ([5, *range(100, 100 + members)] + [-1] * 64)[:64]
    assert (truncated_log_softmax(logits, min_p=min_p) > -torch.inf).sum() == members + 1


@pytest.mark.parametrize("temperature", [0.7, torch.ones(3)], ids=["number", "tensor"])
def test_a_support_moves_to_a_device(temperature):
    moved = truncated_support(torch.randn(3, 11), temperature, top_k=2, max_size=2).to("meta")
    assert isinstance(moved, Support)
    assert {x.device.type for x in moved if isinstance(x, torch.Tensor)} == {"meta"}


def by_sort(logits, most, mask, monkeypatch, **options):
    """`truncated_support` where the reference serves, of at most `most` rows at a time; how many it had each time."""
    seen, sort = [], row_operator.reference.row_support
    monkeypatch.setattr(row_operator.reference, "row_support", lambda x, *a: seen.append(x.shape) or sort(x, *a))
    monkeypatch.setattr(row_operator, "SORT_BYTES", most * 8 * logits.shape[-1])
    return truncated_support(logits, mask=mask, **options), [shape[:-1].numel() for shape in seen]


LARGE, VOCAB = row_operator.MOST_CANDIDATES + 1, 5000  # longer lists than a Triton kernel has


@pytest.mark.parametrize(
    "temperature", [1.3, torch.tensor([0.7, 2.0]), torch.rand(2, 4) + 0.5], ids=["1", "(B,)", "(B, T)"]
)
@pytest.mark.parametrize("layout", ["contiguous", "time_major", "padded_vocabulary"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_no_kernel_serves_is_sorted_a_piece_at_a_time(dtype, layout, temperature, device, monkeypatch):
    # As on a GPU, where Triton serves shorter lists.
    monkeypatch.setattr(row_operator, "runs_csrc", lambda logits: False)
    logits = nasty.LAYOUTS[layout](rows("ties", 8, VOCAB, dtype, device).reshape(2, 4, VOCAB))
    logits[1, 2] = torch.nan
    mask = torch.ones(2, 4, device=device)
    mask[0, 3] = 0
    moved = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
    for chosen in ({"top_k": 20}, {"top_p": 0.9, "min_p": 1e-5}, {}):
        options = {"temperature": moved, "max_size": LARGE, **chosen}
        whole, at_once = by_sort(logits, 8, mask, monkeypatch, **options)
        assert at_once == [8]
        for most in (3, 1):
            found, counts = by_sort(logits, most, mask, monkeypatch, **options)
            assert (sum(counts), max(counts), len(counts)) == (8, most, -(-8 // most))
            for each, same in zip(found[:3], whole[:3], strict=True):
                assert_same_bits(each, same)
