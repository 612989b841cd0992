"""Several processes on gloo, each running the same function of its rank."""

import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist


def _rank(rank, work, world, folder, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # transformers reads them
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # PyTorch keeps gloo's threads, and they abort if they meet the interpreter's end: pytorch#179291


def results_of(work, world, *arguments):
    """What `work(rank, *arguments)` returns on each of `world` processes, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (work, world, folder, arguments), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]
