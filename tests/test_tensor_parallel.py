"""What a sharded vocabulary exchanges and refuses, and a transformers model under tensor parallelism."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from closeness import EAGER_FACTOR, epsilon
from conftest import INTERPRETED
from ranks import results_of
from test_vocab_parallel import SUMS

import sdkernels
from sdkernels import Support, linear_grpo_loss, opsd_decomposition, opsd_loss, rlsd_loss, ssd_loss, token_log_prob

pytestmark = pytest.mark.skipif(INTERPRETED or not dist.is_gloo_available(), reason="the same code; needs gloo")

B, T, V = 2, 3, 50


@pytest.fixture(scope="module")
def group():
    """Of one rank: what is exchanged does not depend on how many there are."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


EXCHANGES = {
    "token_log_prob": (lambda x, y, i, g: token_log_prob(x, i, **g), 1),
    "replay": (lambda x, y, i, g: token_log_prob(x, i, support=i.unsqueeze(-1), **g), 1),
    "rlsd_loss": (lambda x, y, i, g: rlsd_loss(x, y, i, x.new_ones(B), **g), 1),
    "ssd_loss": (lambda x, y, i, g: ssd_loss(x, y, 1.6, **g), 1),
    "ssd_loss, top_k": (lambda x, y, i, g: ssd_loss(x, y, 1.6, top_k=5, **g), 1 + 7 + 1 + 1),
    "ssd_loss, top_k, 16 bits": (lambda x, y, i, g: ssd_loss(x, y.bfloat16(), 1.6, top_k=5, **g), 1 + 4 + 1 + 1),
    "min_p": (lambda x, y, i, g: sdkernels.truncated_log_softmax(x, min_p=0.1, **g), 1 + 1),
    "top_k, top_p": (lambda x, y, i, g: sdkernels.truncated_log_softmax(x, top_k=9, top_p=0.5, **g), 1 + 7 + 1 + 7 + 1),
    "a KL": (lambda x, y, i, g: opsd_loss(x, y, **g), 1),
    "the JSD": (lambda x, y, i, g: opsd_loss(x, y, divergence="jsd", **g), 2),
    "a clip": (lambda x, y, i, g: opsd_loss(x, y, token_clip=0.1, **g), 2),
    "top_k of a divergence": (lambda x, y, i, g: opsd_loss(x, y, top_k=5, **g), 2),
    "opsd_decomposition": (lambda x, y, i, g: opsd_decomposition(x, y.unsqueeze(0), **g), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_are_as_many_as_promised_and_backward_has_none(name, group, monkeypatch):
    function, promised = EXCHANGES[name]
    student, teacher, ids = torch.randn(B, T, V, requires_grad=True), torch.randn(B, T, V), torch.randint(V, (B, T))
    calls, gather = [], dist.all_gather
    monkeypatch.setattr(dist, "all_gather", lambda *a, **k: calls.append(a) or gather(*a, **k))
    output = function(student, teacher, ids, {"group": group})
    assert len(calls) == promised
    loss = output if isinstance(output, torch.Tensor) else output[0]
    if loss.requires_grad:
        loss.sum().backward()
        assert len(calls) == promised + isinstance(output, torch.Tensor)  # sums of the upstream gradient of log q


@pytest.mark.parametrize("name", EXCHANGES)
def test_off_the_cpu_no_number_goes_to_the_device_and_none_is_read(name, group, monkeypatch):
    """On tensors without values, where reading one raises, as `item` and branches do."""
    student, teacher, ids = (
        x.to("meta") for x in (torch.randn(B, T, V), torch.randn(B, T, V), torch.ones(B, T).long())
    )
    made, gathered = [], []

    def noting(make):
        return lambda *a, **o: made.append(make(*a, **o)) or made[-1]

    for holder, makes in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(holder, makes, noting(getattr(holder, makes)))
    monkeypatch.setattr(dist, "all_gather", lambda received, sent, group: gathered.append(sent.numel()))
    EXCHANGES[name][0](student.requires_grad_(), teacher, ids, {"group": group})
    assert len(gathered) == EXCHANGES[name][1]
    assert not [x for x in made if x.device.type == "meta"]
    assert all(numbers % (B * T) == 0 for numbers in gathered)


@pytest.mark.parametrize("name", EXCHANGES)
def test_no_tokens_give_empty_results_and_a_loss_of_0_that_backpropagates(name, group):
    student, teacher = torch.randn(B, 0, V, requires_grad=True), torch.randn(B, 0, V)
    ids = torch.zeros(B, 0, dtype=torch.int64)
    found, plain = (EXCHANGES[name][0](student, teacher, ids, g) for g in ({"group": group}, {}))
    found, plain = (x if isinstance(x, torch.Tensor) else x[0] for x in (found, plain))
    assert torch.equal(found, plain)
    if found.requires_grad:
        found.sum().backward()
        assert student.grad.shape == student.shape


def test_what_cannot_be_a_shard_is_refused(group):
    logits, ids = torch.randn(B, T, V), torch.randint(V, (B, T))
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, got str"):
        token_log_prob(logits, ids, group="tp")
    with pytest.raises(ValueError, match=r"vocab_start=3 needs a group"):
        token_log_prob(logits, ids, vocab_start=3)
    with pytest.raises(TypeError, match=r"vocab_start must be an integer, got float"):
        token_log_prob(logits, ids, group=group, vocab_start=0.0)
    with pytest.raises(ValueError, match=r"vocab_start must be >= 0, got -1"):
        token_log_prob(logits, ids, group=group, vocab_start=-1)
    with pytest.raises(
        ValueError, match=r"cover the vocabulary in rank order, got shards of \[50\] tokens from \[3\] on"
    ):
        token_log_prob(logits, ids, group=group, vocab_start=3)
    ids[1, 1] = V
    with pytest.raises(IndexError, match=r"token_ids must be in \[0, 50\), or -100 for a masked token, got 50"):
        token_log_prob(logits, ids, group=group)
    with pytest.raises(IndexError, match=r"got 50"):
        linear_grpo_loss(torch.randn(B, T, 4), torch.randn(V, 4), ids, torch.ones(B), group=group)
    token_log_prob(logits, ids, mask=ids < V, group=group)
    listed = torch.tensor([3, V]).expand(B, T, 2)
    with pytest.raises(IndexError, match=r"support must hold ids in \[0, 50\), or -1 for none, got 50"):
        token_log_prob(logits, ids.clamp(max=V - 1), support=listed, group=group)
    with pytest.raises(IndexError, match=r"base.token_ids must hold ids in \[0, 50\), or -1 for none, got 50"):
        ssd_loss(logits, Support(listed, torch.full((B, T, 2), 0.5).log(), listed[..., 0], 1.0), 1.0, group=group)
    with pytest.raises(ValueError, match=r"temperature must be finite and > 0, got 0.0 for an unmasked token"):
        token_log_prob(logits, ids, torch.zeros(B, T), support=listed, mask=ids < V, group=group)
    listed = torch.tensor([3, 3]).expand(B, T, 2)
    with pytest.raises(ValueError, match=r"support must hold distinct ids, got 3 more than once for a token"):
        token_log_prob(logits, ids.clamp(max=V - 1), support=listed, group=group)
    with pytest.raises(ValueError, match=r"base.token_ids must hold distinct ids, got 3 more than once for a token"):
        ssd_loss(logits, Support(listed, torch.full((B, T, 2), 0.5).log(), listed[..., 0], 1.0), 1.0, group=group)


@pytest.mark.parametrize("name", ["token_log_prob", "ssd_loss", "a KL", "top_k of a divergence"])
def test_gradients_of_shards_cannot_be_differentiated_again(name, group):
    student, teacher, ids = torch.randn(B, T, V, requires_grad=True), torch.randn(B, T, V), torch.randint(V, (B, T))
    output = EXCHANGES[name][0](student, teacher, ids, {"group": group})
    (first,) = torch.autograd.grad(output[0].sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (output[0].sum() + first.square().sum()).backward()


@pytest.mark.parametrize("function", [
    lambda x, y, i, g: rlsd_loss(x, y, i, torch.ones(B), **g).loss,
    lambda x, y, i, g: ssd_loss(x, y, 1.6, **g).loss,
    lambda x, y, i, g: opsd_loss(x, y, **g).loss,
    lambda x, y, i, g: opsd_loss(x, y, top_k=5, **g).loss,
])  # fmt: skip
def test_in_place_refuses_create_graph_before_it_writes(function, group):
    student, teacher, ids = torch.randn(B, T, V), torch.randn(B, T, V), torch.randint(V, (B, T))
    for sharding in ({}, {"group": group}):
        leaf = student.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(function(leaf, teacher, ids, {**sharding, "inplace": True}), leaf, create_graph=True)
        assert torch.equal(leaf.detach(), student)


def test_a_sharded_tensor_itself_is_refused(group):
    mesh = dist.init_device_mesh("cpu", (1,))
    logits = torch.distributed.tensor.distribute_tensor(torch.randn(B, T, V), mesh)
    with pytest.raises(TypeError, match=r"logits must be a plain torch.Tensor, got a DTensor: pass logits.full_tensor"):
        token_log_prob(logits, torch.randint(V, (B, T)))
    with pytest.raises(TypeError, match=r"hidden must be a plain torch.Tensor, got a DTensor"):
        linear_grpo_loss(logits, torch.randn(9, V), torch.randint(9, (B, T)), torch.ones(B), group=group)


def placed(value, sizes, dims):
    """A DTensor on a mesh of such sizes, sharded in these dimensions; None: replicated."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    return distribute_tensor(value, dist.init_device_mesh("cpu", sizes), placements)


def test_a_head_that_is_not_sharded_over_the_group_alone_is_refused(group):
    hidden, weight, bias, ids = torch.randn(B, T, 4), torch.randn(V, 4), torch.randn(V), torch.randint(V, (B, T))
    good = placed(weight, (1,), [0])

    def rlsd(student, **options):
        return sdkernels.linear_rlsd_loss(hidden, hidden, student, ids, torch.ones(B), group=group, **options).loss

    def ssd(student, **options):
        return sdkernels.linear_ssd_loss(hidden, hidden, student, 1.0, group=group, **options).loss

    for sizes, dims, ranks in (
        ((1,), [None], "[0]"),
        ((1,), [1], "[0]"),
        ((1, 1), [0, 0], "[[0]]"),  # FSDP x TP outside of the forward
        ((1, 1), [None, 0], "[[0]]"),
    ):
        bad = placed(weight, sizes, dims)
        for name, function, student, options in (
            ("lm_head_weight", rlsd, bad, {}),
            ("lm_head_weight", ssd, bad, {"vocab_start": 0}),
            ("bias", rlsd, good, {"bias": placed(bias, sizes, [None for _ in dims])}),
            ("teacher_lm_head_weight", rlsd, good, {"teacher_lm_head_weight": bad}),
            ("base_lm_head_weight", ssd, good, {"base_lm_head_weight": bad}),
        ):
            message = f"{name} is a DTensor with placements (.*) over ranks {re.escape(ranks)}; with a group it must "
            message += re.escape("have (Shard(dim=0),) over the group's, [0]: redistribute it so, or pass this rank's")
            with pytest.raises(ValueError, match=f"^{message}"):
                function(student, **options)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, got str"):
        linear_grpo_loss(hidden, good, ids, torch.ones(B), group="tp")
    assert torch.equal(rlsd(good, bias=placed(bias, (1,), [0])), rlsd(weight, bias=bias))


def other_groups(rank):
    """What a head says that is sharded over both ranks, to each rank's group of its own."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    weight = placed(torch.randn(V, 4), (2,), [0])
    try:
        linear_grpo_loss(
            torch.randn(3, 4), weight, torch.zeros(3, dtype=torch.int64), torch.ones(3), group=groups[rank]
        )
    except ValueError as error:
        return str(error)


def test_a_head_sharded_over_another_group_is_refused():
    for rank, message in enumerate(results_of(other_groups, 2)):
        assert f"over ranks [0, 1]; with a group it must have (Shard(dim=0),) over the group's, [{rank}]" in message


HEAD = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}  # fmt: skip


def step(model, group):
    """Loss and gradients of the head's weight and of the embedding."""
    torch.manual_seed(1)
    ids, advantages = torch.randint(37, (2, 6)), torch.randn(2)
    hidden = model.model(ids).last_hidden_state
    output = linear_grpo_loss(hidden[:, :-1], model.lm_head.weight, ids[:, 1:], advantages, group=group)
    output.loss.backward()
    grads = [x.grad for x in (model.lm_head.weight, model.model.embed_tokens.weight)]
    return output.loss.detach(), *(x.full_tensor() if hasattr(x, "full_tensor") else x for x in grads)


def work(rank, path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    weight = model.lm_head.weight
    assert weight.to_local().shape[0] < weight.shape[0] == HEAD["vocab_size"]
    return step(model, weight.device_mesh.get_group())


def test_a_tensor_parallel_transformers_model_takes_the_same_step(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**HEAD))
    model.save_pretrained(tmp_path)
    truth, plain = step(copy.deepcopy(model).double(), None), step(model, None)
    for rank, found in enumerate(results_of(work, 2, str(tmp_path))):
        for name, actual, near, exact in zip(("loss", "lm_head", "embedding"), found, plain, truth, strict=True):
            assert actual.shape == exact.shape, f"{name} of rank {rank}"
            error, floor = (actual - exact).norm(), (near - exact).norm()
            bound = EAGER_FACTOR * floor + SUMS * epsilon(torch.float32) * exact.norm()
            assert error <= bound, f"{name} of rank {rank} is off by {error:.3g}, in one process by {floor:.3g}"
