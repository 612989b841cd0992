"""One process or several, started by torchrun or accelerate launch: sharing prompts, adding up what was measured."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional

Item = TypeVar("Item")


def launched_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def processes() -> Iterator[None]:
    """Join the other processes, if there are any, and leave them at the end."""
    if launched_processes() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """This process's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence[Item], block: int = 1) -> list[Item]:
    """This process's part of the items, dealt out in blocks; there must be as many blocks for each."""
    if len(items) % (block * world_size()):
        blocks = f" of {block}" if block > 1 else ""
        raise ValueError(f"{len(items)} prompts cannot be shared by {world_size()} processes in equal blocks{blocks}")
    return [item for place, item in enumerate(items) if place // block % world_size() == rank()]


def padded_share(items: Sequence[Item]) -> tuple[list[Item], list[float]]:
    """This process's part of any number of items, and weights: 0 for an item that is only there to make parts equal."""
    places = range(rank(), -(-len(items) // world_size()) * world_size(), world_size())
    return [items[place % len(items)] for place in places], [float(place < len(items)) for place in places]


def gathered(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, on every one, in rank order."""
    if not dist.is_initialized():
        return list(items)
    parts: list[list[Item]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def summed(values: Sequence[float]) -> list[float]:
    """Sums over processes, in rank order."""
    return [sum(column) for column in zip(*gathered([tuple(values)]), strict=True)]


def barrier() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()
