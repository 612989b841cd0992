"""Training steps on verl's own FSDP2 engine: in this process, under torchrun (this file is the program), under Ray."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3ForCausalLM
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker

FORWARD = Qwen3ForCausalLM.forward
STEPS, TEMPERATURE, LR = 3, 0.8, 0.1
ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu", "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
CLIPS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 2.0}


def worker_config(path, backend):
    """A worker's, with verl's unfused head or a fused one; SGD, because it does not hide what scales a gradient."""
    fused = {} if backend is None else {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": backend}}
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(path=str(path), use_remove_padding=True, enable_gradient_checkpointing=False,
                                   override_config={"attn_implementation": "sdpa"}, **fused),
        engine_config=FSDPEngineConfig(strategy="fsdp2", model_dtype="fp32", mixed_precision=FLOAT32,
                                       use_torch_compile=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=2,
                                       infer_micro_batch_size_per_gpu=2),
        optimizer_config=FSDPOptimizerConfig(lr=LR, optimizer="SGD", optimizer_impl="torch.optim", weight_decay=0.0,
                                             clip_grad=1e9, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip


def actor_config(**changes):
    options = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 2} | CLIPS | changes
    return FSDPActorConfig(**options)


class Worker(TrainingWorker):
    """verl's worker on gloo, and the whole gradients and parameters that it has."""

    def __init__(self, config):
        torch.set_num_threads(1)
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self):
        super().reset()
        self.engine.optimizer.register_step_pre_hook(lambda *_: self._keep("gradient"))  # verl drops them afterwards

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def kept(self):
        self._keep("parameter")
        return {"gradient": self.gradient, "parameter": self.parameter}

    def _keep(self, what):
        whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
        tensors = {name: value.grad if what == "gradient" else value.detach()
                   for name, value in self.engine.module.named_parameters()}  # fmt: skip
        setattr(self, what, {name: whole(value).clone() for name, value in tensors.items()})


def worker_of(path, backend, loss=None):
    """A worker that is ready, in this process."""
    Qwen3ForCausalLM.forward = FORWARD  # which a fused worker of before has replaced
    worker = Worker(worker_config(path, backend))
    worker.reset()
    worker.set_loss_fn(loss)
    return worker


def train_data(batch, rows=slice(None), **options):
    """Rows of a batch as verl's trainer hands them to a worker."""
    tensors = {name: jagged(values[rows]) for name, values in batch.items() if torch.is_tensor(values[0])}
    tensors["position_ids"] = jagged([torch.arange(len(x)) for x in batch["input_ids"][rows]])
    tensors["loss_mask"] = tensors["response_mask"]
    common = {
        "temperature": TEMPERATURE, "global_batch_size": len(batch["input_ids"]), "calculate_entropy": True,
        "global_token_num": [len(x) for x in batch["input_ids"]],
    }  # fmt: skip
    return tu.get_tensordict(tensors, common | options)


def train(worker, data):
    """-> the loss, gradients and parameters of every step, and the last step's metrics."""
    history = []
    for _ in range(STEPS):
        metrics = tu.get(worker.train_batch(data.clone()), "metrics")
        history.append({"loss": metrics["loss"], **worker.kept()})
    return history, metrics


def jagged(rows):
    """Rows of different lengths in verl's layout."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def python(*arguments, **environment):
    """What another Python with verl on a CPU says on stderr."""
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | ENVIRONMENT | environment, cwd=Path(__file__).parent,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def main(job):
    """Under torchrun: the job's half of the batch on each rank."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    job = torch.load(job, weights_only=False)
    worker = worker_of(job["path"], job["backend"], job["loss"])
    half = len(job["batch"]["input_ids"]) // dist.get_world_size()
    mine = slice(half * dist.get_rank(), half * (dist.get_rank() + 1))
    inferred = worker.infer_batch(train_data(job["batch"], mine, compute_loss=False))
    history, _ = train(worker, train_data(job["batch"], mine))
    result = {"history": history, "log_probs": list(inferred["log_probs"].unbind())}
    torch.save(result | {"trainer": get_trainer_cls("rlsd").__name__}, f"{job['out']}/{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # PyTorch keeps gloo's threads, and they abort if they meet the interpreter's end: pytorch#179291


if __name__ == "__main__":
    main(sys.argv[1])
