"""Options that both trainers share."""

import operator
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trainers.losses import Head
from trainers.processes import launched_processes

BOUNDS = {
    "above": ("above", operator.gt), "least": ("at least", operator.ge),
    "most": ("at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip


class InputError(ValueError):
    """What the user gave, options, data or a model, cannot be used; the message says why."""


def option(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with a line for ``--help``; `bounds` of its value are named as in `BOUNDS`."""
    metadata = {"help": help, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TrainerConfig:
    """Shared by all trainers. Counts of prompts and sequences are of the whole run, not of one process."""

    output_dir: str = option("runs/latest", "where checkpoints, metrics, completions and plots go")
    resume: bool = option(False, "go on from the last checkpoint in output_dir, or from the start if there is none")
    seed: int = option(0, "of data order, sampling and dropout")
    testbed: Literal["arithmetic", "stdlib"] | None = option(None, "make the model and data of a testbed; no download")
    testbed_dir: str = option("runs/testbeds", "where testbeds are kept once made")

    model_name_or_path: str | None = option(None, "a Hugging Face name or a directory")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights")
    bf16: bool = option(False, "compute in bfloat16 by autocast")
    attn_implementation: str | None = option(
        None, "default: flash_attention_2 where flash-attn is installed, else sdpa"
    )
    use_liger_kernel: bool = option(False, "Liger's layer kernels (CUDA)")
    gradient_checkpointing: bool = option(False, "recompute activations in backward")
    lora_r: int = option(0, "rank of LoRA adapters; 0 trains all weights", least=0)
    lora_alpha: int = option(32, "LoRA's alpha", least=1)
    lora_target_modules: list[str] = option(["all-linear"], "modules that LoRA adapts")
    fsdp: bool = option(False, "shard weights with FSDP2 instead of replicating them with DDP")

    train_dataset: str | None = option(
        None, "a .jsonl, .json, .csv or .parquet file, or a name for datasets.load_dataset"
    )
    eval_dataset: str | None = option(None, "likewise; without it nothing is evaluated")
    num_eval_prompts: int | None = option(None, "prompts of eval_dataset that are used; default: all", least=1)
    dataset_config: str | None = option(None, "configuration of a named dataset")
    train_split: str = option("train", "split of a named train_dataset")
    eval_split: str = option("test", "split of a named eval_dataset")
    prompt_column: str = option("prompt", "column of the prompt: text, or chat messages")
    reference_column: str = option("reference", "column of what the verifier compares with: an answer, or tests")
    solutions_column: str = option("solutions", "column of worked solutions: text, or a list of texts; need not exist")
    images_column: str = option("images", "column of images or their paths; need not exist")
    verifier_column: str = option("verifier", "column of a verifier per row; need not exist")
    as_chat: bool = option(False, "make prompts that are text one user turn of the model's chat template")
    system_prompt: str | None = option(None, "first turn of chats that have no system turn")
    max_prompt_length: int | None = option(
        None, "training prompts of more tokens are left out, counted and reported", least=1
    )
    max_completion_length: int = option(512, "tokens a response may have, EOS included", least=1)

    verifier: str = option("numeric", "exact, numeric, python, or your.module:function, for rows that name none")
    finished_only: bool = option(False, "reward 0 for responses that were cut off at max_completion_length")
    verifier_workers: int = option(2, "processes that verify", least=1)
    verifier_timeout: float = option(30.0, "seconds after which a verification counts as failed", above=0)

    use_vllm: bool = option(False, "sample with vLLM, in this process")
    vllm_gpu_memory_utilization: float = option(0.3, "share of the GPU's memory that vLLM takes", above=0, most=1)
    per_device_generation_batch_size: int = option(64, "sequences sampled at a time by transformers", least=1)

    max_steps: int = option(100, "steps of the trainer", least=1)
    per_device_train_batch_size: int = option(
        8, "sequences per forward; changes memory and speed, not the result", least=1
    )
    learning_rate: float = option(1e-6, "peak learning rate of AdamW", above=0)
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "constant_with_warmup", "transformers' schedule of the learning rate over trainer steps"
    )
    warmup_steps: int = option(0, "steps of linear warm-up", least=0)
    adam_beta1: float = option(0.9, "AdamW's beta1", least=0, below=1)
    adam_beta2: float = option(0.95, "AdamW's beta2", least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    head: Head = option("fused", "losses from hidden states; from logits in memory; or plain PyTorch, to compare with")

    save_steps: int = option(50, "checkpoint every so many steps, and at the end", least=1)
    save_total_limit: int = option(2, "checkpoints that are kept", least=1)
    report_to: list[str] = option([], "tensorboard, trackio; metrics.jsonl is always written")
    run_name: str | None = option(None, "name for trackio; default: the last part of output_dir")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded."""
        if (self.model_name_or_path is None or self.train_dataset is None) and self.testbed is None:
            raise InputError("give --model_name_or_path and --train_dataset, or --testbed")
        for entry in fields(self):
            value, bounds = getattr(self, entry.name), entry.metadata["bounds"]
            if value is not None and not all(BOUNDS[name][1](value, bound) for name, bound in bounds.items()):
                wanted = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items())
                raise InputError(f"{entry.name} must be {wanted}, got {value}")
        if self.use_vllm and self.lora_r:
            raise InputError("use_vllm needs whole weights: adapters (lora_r) cannot be handed over")
        unknown = set(self.report_to) - {"tensorboard", "trackio"}
        if unknown:
            raise InputError(f"report_to knows tensorboard and trackio, got {sorted(unknown)}")
        self._check_launch()

    def _check_launch(self) -> None:
        """Refuse what a launcher was told that is this program's to know."""
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise InputError("DeepSpeed is not supported; use --fsdp")
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise InputError("sharding is this program's option: launch with --multi_gpu and give --fsdp")
        if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("no", "bf16" if self.bf16 else "no"):
            raise InputError(
                "precision is this program's option: give --bf16 instead of accelerate's --mixed_precision"
            )
        if self.fsdp and launched_processes() == 1:
            raise InputError("fsdp shards over processes: start two or more with torchrun or accelerate launch")

    def require_shares(self, name: str, block: int = 1) -> None:
        """Refuse a count that this run's processes cannot share in equal blocks."""
        if getattr(self, name) % (block * launched_processes()):
            blocks = f", in blocks of {block}" if block > 1 else ""
            raise InputError(
                f"{name} must be a multiple of the {launched_processes()} processes{blocks}, got {getattr(self, name)}"
            )
