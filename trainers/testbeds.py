"""Testbeds: a small model trained from scratch, and prompts with verifiers, made on this machine without a download."""

import importlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from trainers.config import TrainerConfig
from trainers.processes import barrier, rank

Config = TypeVar("Config", bound=TrainerConfig)
IGNORED = -100  # label of a token that carries no loss
MODULES = {"arithmetic": "trainers.arithmetic", "stdlib": "trainers.stdlib_code"}


def with_testbed(config: Config) -> Config:
    """The config with the testbed's model and data where it names none; the testbed is made unless it was before."""
    if config.testbed is None:
        return config
    directory = Path(config.testbed_dir) / config.testbed
    if rank() == 0 and not directory.exists():
        partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        importlib.import_module(MODULES[config.testbed]).make(partial)
        partial.rename(directory)
    barrier()
    return replace(
        config,
        model_name_or_path=config.model_name_or_path or str(directory / "model"),
        train_dataset=config.train_dataset or str(directory / "train.jsonl"),
        eval_dataset=config.eval_dataset or str(directory / "eval.jsonl"),
    )


def pretrain(
    model: PreTrainedModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    learning_rate: float,
    warmup_steps: int,
    on_step: Callable[[int, float], bool],
) -> None:
    """AdamW on (token ids, labels), both (B, T), until they end or `on_step(step, loss)` is true."""
    optimizer = AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    model.train()
    for step, (token_ids, labels) in enumerate(batches, 1):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, step / warmup_steps)
        loss = model(input_ids=token_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step(step, loss.item()):
            return
