"""Testbeds: a small model trained from scratch, and prompts with verifiers, made on this machine without a download."""

import importlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from trainers.config import TrainerConfig
from trainers.processes import barrier, rank

Config = TypeVar("Config", bound=TrainerConfig)
IGNORED = -100  # label of a token that carries no loss
MODULES = {"arithmetic": "trainers.arithmetic", "stdlib": "trainers.stdlib_code"}


def with_testbed(config: Config) -> Config:
    """The config with the testbed's model, data and options where it has none; the testbed is made if need be."""
    if config.testbed is None:
        return config
    directory = Path(config.testbed_dir) / config.testbed
    testbed = importlib.import_module(MODULES[config.testbed])
    if rank() == 0 and not directory.exists():
        partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        print(f"making the testbed {directory}, once: a few minutes", flush=True)
        testbed.make(partial)
        partial.rename(directory)
    barrier()
    return replace(
        config,
        model_name_or_path=config.model_name_or_path or str(directory / "model"),
        train_dataset=config.train_dataset or str(directory / "train.jsonl"),
        eval_dataset=config.eval_dataset or str(directory / "eval.jsonl"),
        **{name: value for name, value in testbed.OPTIONS.items() if getattr(config, name, value) is None},
    )


def pretrain(
    model: PreTrainedModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizers: Sequence[Optimizer],
    factor: Callable[[int], float],
    on_step: Callable[[int, float], bool],
) -> None:
    """Train on (token ids, labels), both (B, T), until they end or `on_step(step, loss)` is true.

    `factor(step)`, with steps counted from 1, multiplies the optimizers' learning rates.
    """
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    for step, (token_ids, labels) in enumerate(batches, 1):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        inputs = token_ids.to(model.device), labels.to(model.device)
        loss = model(input_ids=inputs[0], labels=inputs[1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if on_step(step, loss.item()):
            return
