"""linear_* under FSDP2: a step of two processes is a step of one on the mean of their losses."""

import pytest
import torch
import torch.distributed as dist
from closeness import EAGER_FACTOR, epsilon
from conftest import INTERPRETED
from ranks import results_of
from test_vocab_parallel import SUMS
from torch import nn

from sdkernels import linear_rlsd_loss, linear_ssd_loss

pytestmark = pytest.mark.skipif(INTERPRETED or not dist.is_gloo_available(), reason="the same code; needs gloo")

WORLD, TOKENS, H, V, STEPS = 2, 5, 8, 22, 3


class Model(nn.Module):
    """Hidden states, and with `inside` the loss too, in forward: there FSDP has the head's weight whole."""

    def __init__(self, loss, inside):
        super().__init__()
        self.embedding, self.body = nn.Embedding(V, H), nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V)
        self.loss, self.inside = loss, inside

    def forward(self, data):
        hidden = torch.tanh(self.body(self.embedding(data["inputs"]))) * 3
        return self.head(hidden, data) if self.inside else hidden

    def head(self, hidden, data):
        weight, bias = self.lm_head.weight, self.lm_head.bias
        if self.loss == "rlsd":
            return linear_rlsd_loss(hidden, data["teacher"], weight, data["ids"], data["advantages"], bias=bias,
                                    softcap=20.0, chunk_size=3).loss  # fmt: skip
        return linear_ssd_loss(hidden, data["teacher"], weight, 0.8, bias=bias, chunk_size=3).loss


def batch(step, rank, dtype=torch.float32):
    torch.manual_seed(100 * step + rank)
    return {
        "inputs": torch.randint(V, (TOKENS,)), "ids": torch.randint(V, (TOKENS,)), "advantages": torch.randn(TOKENS),
        "teacher": torch.randn(TOKENS, H).to(dtype),
    }  # fmt: skip


def model_of(loss, inside):
    torch.manual_seed(3)
    return Model(loss, inside)


def loss_of(model, data):
    output = model(data)
    return output if model.inside else model.head(output, data)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)  # it does not hide what scales a gradient


def one_process(loss, inside, dtype):
    model = model_of(loss, inside).to(dtype)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(loss_of(model, batch(step, rank, dtype)) for rank in range(WORLD)) / WORLD).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


CASES = [(loss, inside) for loss in ("rlsd", "ssd") for inside in (True, False)]


def work(rank):
    """The trained parameters of every case, whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    trained = []
    for loss, inside in CASES:
        model = model_of(loss, inside)
        if inside:
            fully_shard(model, mesh=mesh)
        else:
            for part in (model.body, model.lm_head, model.embedding):
                fully_shard(part, mesh=mesh)
            assert isinstance(model.lm_head.weight, DTensor)
        optimizer = optimizer_of(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(step, rank)).backward()
            assert isinstance(model.lm_head.weight.grad, DTensor)
            assert model.lm_head.weight.grad.placements == model.lm_head.weight.placements
            optimizer.step()
        trained.append({name: value.full_tensor().detach() for name, value in model.named_parameters()})
    return trained


@pytest.fixture(scope="module")
def trained():
    first, second = results_of(work, WORLD)
    for mine, others in zip(first, second, strict=True):
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    return dict(zip(CASES, first, strict=True))


@pytest.mark.parametrize(("loss", "inside"), CASES)
def test_two_processes_train_as_one_on_the_mean_of_their_losses(loss, inside, trained):
    before = dict(model_of(loss, inside).named_parameters())
    near = one_process(loss, inside, torch.float32)
    for name, truth in one_process(loss, inside, torch.float64).items():
        error, floor = ((x[name] - truth).norm() for x in (trained[loss, inside], near))
        assert error <= EAGER_FACTOR * floor + SUMS * epsilon(torch.float32) * truth.norm(), name
        assert (truth - before[name]).norm() > 1000 * error, f"{name} has not moved"
