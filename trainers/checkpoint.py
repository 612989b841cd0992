"""Checkpoints from which a killed run goes on to the same result: directories in safetensors, whole or not there.

What a step does follows from the seed and the step's number, so weights, the optimizer's state and the step are all
there is to keep.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainers.policy import full_weights
from trainers.processes import barrier, rank
from trainers.teacher import Teacher

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process; others get nothing


def save(
    directory: Path,
    step: int,
    policy: nn.Module,
    optimizer: Optimizer,
    teacher: Teacher | None,
    processor: Any,
    keep: int,
) -> None:
    """Write `directory`/checkpoint-`step` and delete all but the last `keep`. Collective: every process calls it."""
    weights = full_weights(policy, everywhere=False)
    state = get_optimizer_state_dict(policy, optimizer, options=WHOLE).get("state", {})
    copies = {} if teacher is None else {name: _whole(value) for name, value, _ in teacher.pairs()}
    if rank() == 0:
        target, temporary = directory / f"checkpoint-{step}", directory / f".checkpoint-{step}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        save_model(temporary, policy, weights, processor)
        flat = {f"{name}/{key}": value.contiguous() for name, entry in state.items() for key, value in entry.items()}
        save_file(flat, temporary / "optimizer.safetensors")
        if copies:
            save_file(copies, temporary / "teacher.safetensors")
        (temporary / "trainer_state.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in _checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    barrier()


def save_model(directory: Path, policy: nn.Module, weights: dict[str, Tensor], processor: Any) -> None:
    """The model, or its adapters, and its tokenizer, as transformers and peft load them."""
    wrapped = policy.module if hasattr(policy, "module") else policy
    wrapped.model.save_pretrained(directory, state_dict=weights)
    processor.save_pretrained(directory)


def last(directory: Path) -> Path | None:
    """The newest checkpoint, if there is one."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["step"])


def restore(checkpoint: Path, policy: nn.Module, optimizer: Optimizer, teacher: Teacher | None) -> None:
    """Put the optimizer's and the teacher's state back; the policy was loaded from the checkpoint already."""
    groups = get_optimizer_state_dict(policy, optimizer, options=WHOLE).get("param_groups", [])
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(checkpoint / "optimizer.safetensors").items() if rank() == 0 else ():
        parameter, key = name.rsplit("/", 1)
        state.setdefault(parameter, {})[key] = value
    # Not strict: what got no gradient yet, a vision tower in a run on text, has no state.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized(), strict=False)
    set_optimizer_state_dict(policy, optimizer, {"state": state, "param_groups": groups}, options=options)
    copies = load_file(checkpoint / "teacher.safetensors") if (checkpoint / "teacher.safetensors").exists() else {}
    for name, parameter, _ in teacher.pairs() if teacher else ():
        value = copies[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.data.copy_(value)


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _whole(value: Tensor) -> Tensor:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu().clone()
