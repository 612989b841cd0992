"""Two processes under TRL, replicated by DDP and sharded by FSDP2, take the steps that one takes."""

import json

import pytest
import tiny
import torch
from conftest import no_kernel
from programs import ROOT, ended, free_port, started

pytest.importorskip("trl")
pytestmark = no_kernel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def run(model, output, method, sharding, world):
    output.mkdir(parents=True)
    launcher = ["torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(free_port())]
    program = [str(ROOT / "tests" / "trl_program.py"), str(model), str(output), method, sharding]
    ended(started([*launcher, *program], output))
    return json.loads((output / "losses.json").read_text()), torch.load(output / "weights.pt", weights_only=True)


@pytest.mark.parametrize("method", ["rlsd", "ssd"])
def test_two_processes_take_one_processes_steps(method, model, tmp_path):
    losses, weights = run(model, tmp_path / "one", method, "ddp", 1)
    for sharding in ("ddp", "fsdp"):
        shared_losses, shared_weights = run(model, tmp_path / sharding, method, sharding, 2)
        assert shared_losses == pytest.approx(losses, rel=1e-5, abs=2e-6)
        for name, value in weights.items():
            assert torch.allclose(shared_weights[name], value, atol=1e-4), (sharding, name)
