"""The model: loading, LoRA, DDP and FSDP2, the hidden states of response tokens, and optimizer steps."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    get_scheduler,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from sdkernels.integrations.transformers import LMHead, base_of, lm_head
from trainers.config import InputError, TrainerConfig
from trainers.losses import Side
from trainers.processes import device
from trainers.prompts import Batch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Policy(nn.Module):
    """A model whose every use goes through `forward`, so that DDP and FSDP gather weights and reduce gradients.

    `policy(function, ...)` is `function(model, ...)`, under autocast if the run computes in bfloat16.
    """

    def __init__(self, model: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16

    def forward(
        self,
        function: Callable[Concatenate[nn.Module, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """`function(self.model, *args, **kwargs)`."""
        with torch.autocast(device().type, torch.bfloat16, enabled=self.bf16):
            return function(self.model, *args, **kwargs)


def load_model(config: TrainerConfig, checkpoint: Path | None = None) -> tuple[nn.Module, Any]:
    """The model, on this process's device, and its tokenizer or processor.

    Args:
        config: Which model, its dtype, attention, LoRA.
        checkpoint: A directory of `checkpoint.save` whose weights take the place of the model's own.

    """
    disable_progress_bar()
    name = config.model_name_or_path
    try:
        model_config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise InputError(f"model_name_or_path: {error}") from error
    multimodal = hasattr(model_config, "vision_config")
    attention = config.attn_implementation or ("flash_attention_2" if is_flash_attn_2_available() else "sdpa")
    weights = checkpoint if checkpoint and not config.lora_r else name
    model = (AutoModelForImageTextToText if multimodal else AutoModelForCausalLM).from_pretrained(
        weights, dtype=getattr(torch, config.dtype), attn_implementation=attention
    )
    processor = (AutoProcessor if multimodal else AutoTokenizer).from_pretrained(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.use_liger_kernel:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)
    if config.lora_r:
        model = _with_lora(model, config, checkpoint)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(device()).train(), processor  # in eval mode, as it is loaded, it would not checkpoint activations


def _with_lora(model: nn.Module, config: TrainerConfig, checkpoint: Path | None) -> nn.Module:
    from peft import LoraConfig, PeftModel, get_peft_model

    if checkpoint:
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    torch.manual_seed(config.seed)
    modules = config.lora_target_modules
    target = modules[0] if modules == ["all-linear"] else modules
    return get_peft_model(model, LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=target))


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a `Policy`, DDP or PEFT."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, Policy):
        model = model.model
    return base_of(model)


def response_side(model: nn.Module, batch: Batch) -> Side:
    """The hidden states, after the last norm, that predict each response token of the batch, and their head."""
    output = unwrapped(model).base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.media
    )
    return Side(output.last_hidden_state.flatten(0, 1)[batch.predicts], *head(model))


def head(model: nn.Module) -> LMHead:
    """What turns hidden states into logits: weight, bias, softcap and scale."""
    try:
        return lm_head(unwrapped(model))
    except TypeError as error:
        raise InputError(str(error)) from error


@torch.no_grad()
def check_head(model: nn.Module, batch: Batch) -> None:
    """Raise if the model's logits are not what `head` makes of its hidden states: some architectures do more."""
    logits = response_side(model, batch).logits()
    own = unwrapped(model)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.media
    ).logits.flatten(0, 1)[batch.predicts]
    if not torch.allclose(own.float(), logits, rtol=0, atol=0.02 * float(own.abs().max())):
        raise InputError(f"{type(unwrapped(model)).__name__} does more to its logits than its head; it cannot be used")


def wrapped(model: nn.Module, config: TrainerConfig, *, trained: bool = True) -> nn.Module:
    """The model as a `Policy`: alone, replicated by DDP, or sharded by FSDP2."""
    policy = Policy(model, config.bf16)
    if config.fsdp:
        return _sharded(policy)
    if trained and dist.is_initialized():
        return DistributedDataParallel(
            policy,
            device_ids=[device().index] if device().type == "cuda" else None,
            find_unused_parameters=hasattr(unwrapped(policy).config, "vision_config"),  # a batch may hold text alone
        )
    return policy


def _sharded(policy: Policy) -> nn.Module:
    blocks = unwrapped(policy)._no_split_modules or ()
    for module in policy.modules():
        if type(module).__name__ in blocks:
            fully_shard(module)
    fully_shard(policy)
    if not all(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        raise RuntimeError("FSDP2 left parameters unsharded")
    return policy


def optimizer_for(policy: nn.Module, config: TrainerConfig) -> tuple[AdamW, Callable[[int], None]]:
    """AdamW on what is trained, and a function that sets the learning rate of a step, counted from 1."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = AdamW(trained, config.learning_rate, betas, weight_decay=config.weight_decay)
    warmup, total = config.warmup_steps, config.max_steps
    first = 1 if warmup else 0  # of the schedule's steps, so that no step has a rate of 0
    (factor,) = get_scheduler(config.lr_scheduler_type, optimizer, warmup, total + first).lr_lambdas

    def set_rate(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor(step - 1 + first)

    return optimizer, set_rate


def optimizer_step(policy: nn.Module, optimizer: AdamW, max_norm: float) -> float:
    """Clip the gradient's norm, step, and forget the gradient; returns the norm before it was clipped.

    Raises RuntimeError if the norm is not finite: such a step would ruin the weights.
    """
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def accumulating(policy: nn.Module, more: bool) -> AbstractContextManager[None]:
    """Where DDP would reduce gradients in each backward: only in the last one of an optimizer step."""
    return policy.no_sync() if more and isinstance(policy, DistributedDataParallel) else nullcontext()


@contextmanager
def inference(policy: nn.Module) -> Iterator[None]:
    """No gradients, no dropout. FSDP gathers all weights first, and once: no process waits for another's forward."""
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.train(was_training)
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not policy)


def inferred_side(network: nn.Module, batch: Batch) -> Side:
    """`response_side` without gradients, for use outside the network's forward: FSDP shards the weights again there."""
    with inference(network):
        hidden = network(response_side, batch).hidden
    return Side(hidden, *head(network))


def full_weights(policy: nn.Module, *, everywhere: bool = True) -> dict[str, Tensor]:
    """All weights of the model, whole, under the model's own names: on every process, or the first one's CPU only.

    Collective: every process calls it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    weights = get_model_state_dict(policy, options=options)
    return {name.removeprefix("model."): value for name, value in weights.items()}
