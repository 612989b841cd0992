"""SSD on TRL's SFTTrainer: plain cross-entropy on self-sampled data, or its exact expectation over the next token."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from sdkernels import linear_ssd_loss
from sdkernels.integrations.transformers import LMHead, add_from_hidden, base_of, lm_head
from sdkernels.integrations.trl.forward import without_dropout


@dataclass
class SSDConfig(SFTConfig):
    """SFTConfig, and SSD's options. The dataset holds what the model itself sampled at train_temperature and filters.

    objective "sampled" is the paper's: cross-entropy on the samples, SFTTrainer's own loss. "expected" is `ssd_loss`
    against the frozen initial model, truncated, at the same positions.
    """

    objective: str = field(default="sampled", metadata={"help": "sampled, or expected."})
    train_temperature: float = field(default=1.0, metadata={"help": "T_train, as the samples were drawn."})
    train_top_k: int | None = field(default=None, metadata={"help": "The base's truncation: its k likeliest tokens."})
    train_top_p: float | None = field(default=None, metadata={"help": "The base's truncation: its nucleus."})
    train_min_p: float | None = field(default=None, metadata={"help": "The base's truncation, beside the likeliest."})

    def __post_init__(self) -> None:
        """Refuse what cannot work, and options that the objective would ignore."""
        super().__post_init__()
        if self.objective not in ("sampled", "expected"):
            raise ValueError(f"objective must be sampled or expected, got {self.objective!r}")
        of_base = {"train_temperature": 1.0, "train_top_k": None, "train_top_p": None, "train_min_p": None}
        for name, default in of_base.items():
            if self.objective == "sampled" and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is of the base, which objective='sampled' does without, got {getattr(self, name)}"
                )
        if self.objective == "expected" and self.loss_type != "nll":
            raise ValueError(
                f"objective='expected' is a loss of its own: loss_type must be nll, got {self.loss_type!r}"
            )


class SSDTrainer(SFTTrainer):
    """SFTTrainer for Simple Self-Distillation (arXiv 2604.01193), of hidden states, without logits.

    With objective "expected" the base is the model as it was: a second copy, or of a PEFT model the same one without
    its adapters. Logged are the means of SSDTerms: `ssd/support_compression`, `ssd/within_support_reshaping`,
    `ssd/base_alignment`, their constant, the cross-entropy that they add up to, kept mass and support size.

    Args:
        model, args: As SFTTrainer takes them, args an SSDConfig.
        kwargs: What SFTTrainer takes besides.

    Raises:
        TypeError, ValueError: other args, or with objective "expected" a loss beside it.

    """

    _tag_names = ["trl", "ssd"]  # noqa: RUF012
    _name = "SSD"
    _paper = {"title": "Simple Self-Distillation", "id": "2604.01193"}  # noqa: RUF012

    def __init__(self, model: Any, args: SSDConfig, **kwargs: Any) -> None:
        if not isinstance(args, SSDConfig):
            raise TypeError(f"args must be an SSDConfig, got {type(args).__name__}")
        super().__init__(model, args, **kwargs)
        if args.objective == "sampled":
            return
        others = {
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.label_smoother is not None,
            "MoE's auxiliary loss": self.aux_loss_enabled,
        }
        for name, given in others.items():
            if given:
                raise ValueError(f"objective='expected' has no place for {name}")
        add_from_hidden(self.model)
        self.base_model = self.model if base_of(self.model) is not self.model else self._frozen_copy()

    def _frozen_copy(self) -> nn.Module:
        options = dict(self.args.model_init_kwargs or {}) | {"dtype": self.model.dtype, "device_map": None}
        options.setdefault("attn_implementation", self.model.config._attn_implementation)
        options.setdefault("trust_remote_code", self.args.trust_remote_code)
        base = create_model_from_path(get_config_model_id(self.model.config), **options)
        add_from_hidden(base)
        base.requires_grad_(False).eval()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            base.load_state_dict(self.model.state_dict())
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(base, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(base, self.accelerator)
        return self.accelerator.prepare_model(base, evaluation_mode=True)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch: SFTTrainer's, or `linear_ssd_loss` at the labels that are not -100."""
        if self.args.objective == "sampled":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ValueError("objective='expected' makes no outputs to return: evaluate with prediction_loss_only")
        inputs = dict(inputs)
        keep = inputs.pop("labels")[:, 1:] != -100
        places = slice(-keep.shape[1] - 1, -1)  # behind a prompt that PEFT has learnt
        with torch.no_grad(), without_dropout(self.base_model), self._without_adapters():
            hidden = self.base_model(**inputs, from_hidden=lambda hidden, head: hidden[:, places][keep])
        base = self.accelerator.unwrap_model(self.base_model)
        own = {} if self.base_model is self.model else _named(lm_head(base))
        args = self.args

        def loss(student: Tensor, head: LMHead) -> Any:
            return linear_ssd_loss(
                student[:, places][keep], hidden, head.weight, args.train_temperature, top_k=args.train_top_k,
                top_p=args.train_top_p, min_p=args.train_min_p, normalizer=num_items_in_batch, **own, **head.options,
            )  # fmt: skip

        output = model(**inputs, from_hidden=loss)
        self._log_terms(output, keep)
        if args.average_tokens_across_devices and num_items_in_batch is not None:  # DDP takes the mean of gradients
            return output.loss * (self.accelerator.num_processes // self.get_tp_size())
        return output.loss

    def _without_adapters(self) -> Any:
        if self.base_model is not self.model:
            return nullcontext()
        return use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None)

    def _log_terms(self, output: Any, keep: Tensor) -> None:
        terms = output.terms._asdict()
        sums = torch.stack([keep.sum().float(), *(term.detach().sum().float() for term in terms.values())])
        count, *totals = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        if not count:
            return
        for name, total in zip(terms, totals, strict=True):
            metrics[f"ssd/{name}"].append(total / count)


def _named(head: LMHead) -> dict[str, Any]:
    return {"base_lm_head_weight": head.weight.detach(), "base_bias": None if head.bias is None else head.bias.detach()}
