"""RLSDTrainer or SSDTrainer as torchrun starts it, with completions that do not depend on how processes share them.

torchrun --nproc_per_node 2 tests/trl_program.py MODEL OUTPUT {rlsd,ssd} {ddp,fsdp}
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from trl_runs import ONLINE, SMALL, questions, reward, samples

from sdkernels.integrations.trl import RLSDConfig, RLSDTrainer, SSDConfig, SSDTrainer

FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}
ONE_STEP = {"learning_rate": 1e-3, "gradient_accumulation_steps": 2, "max_grad_norm": 1e9}


class Written(RLSDTrainer):
    """Its completions are of the prompt and of the place in the group alone."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        seen, written = {}, []
        for ids in prompt_ids:
            place = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
            words = torch.Generator().manual_seed(sum(ids) + 1000 * place)
            written.append(torch.randint(8, 90, (3 + place,), generator=words).tolist())
        return written, None


def with_fsdp_on_a_cpu():
    """accelerate takes its FSDP path on GPUs only; the same code runs on CPUs."""
    initialise = PartialState.__init__

    def initialised(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialised


def main(model, output, method, sharding):
    torch.set_num_threads(1)
    if sharding == "fsdp":
        with_fsdp_on_a_cpu()
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = ONE_STEP | {"output_dir": output, "per_device_train_batch_size": 8 // world}
    options |= FSDP if sharding == "fsdp" else {}
    if method == "rlsd":
        teacher = {"teacher_sync_steps": 1, "teacher_update_rate": 0.5}
        trainer = Written(model, reward, args=RLSDConfig(**ONLINE | options | teacher), train_dataset=questions())
    else:
        truncation = {"objective": "expected", "train_temperature": 1.6, "train_top_k": 20}
        trainer = SSDTrainer(model, SSDConfig(**SMALL | options | truncation), train_dataset=samples())
    trainer.train()
    if sharding == "fsdp":
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    weights = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if int(os.environ.get("RANK", 0)) == 0:
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        Path(output, "losses.json").write_text(json.dumps(losses))
        torch.save(weights, Path(output, "weights.pt"))
    trainer.accelerator.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort where they meet the interpreter's end: pytorch#179291


if __name__ == "__main__":
    main(*sys.argv[1:])
