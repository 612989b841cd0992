"""Functions of the completions' hidden states, run inside a model's forward by GRPOTrainer's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from sdkernels import TokenLogProb, linear_token_log_prob
from sdkernels.integrations.transformers import LMHead

# What a model reads of images: of each image, and of each token.
MEDIA = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "image_position_ids",
)  # fmt: skip
MEDIA_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")

Results = TypeVar("Results", bound=tuple[Tensor, ...])
Function = Callable[[Tensor, LMHead, Tensor], Results]  # (hidden (N, H), head, token ids (N,)) -> results (N,)


def padded(results: Results, keep: Tensor) -> Results:
    """Results (N,) at the kept places of (B, T), 0 elsewhere; numbers as they are."""
    places = [x if x.dim() == 0 else x.new_zeros(keep.shape).masked_scatter(keep, x) for x in results]
    return type(results)(*places)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, for a time."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class HiddenStates(GRPOTrainer):
    """A GRPOTrainer whose log-probs come from `linear_token_log_prob`, without padding: old, reference and current."""

    def _scores(self, hidden: Tensor, head: LMHead, ids: Tensor) -> TokenLogProb:
        return linear_token_log_prob(hidden, head.weight, ids, self.temperature, **head.options)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        through = self._through(model, logits_to_keep, self._scores, [])
        return super()._get_per_token_logps_and_entropies(
            through, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _run(self, model: nn.Module, inputs: dict[str, Any], function: Function) -> Any:
        """The function's results (B, T) for the completions."""
        ids = inputs["completion_ids"]
        found: list[Any] = []
        super()._get_per_token_logps_and_entropies(
            self._through(model, ids.shape[1], function, found),
            torch.cat((inputs["prompt_ids"], ids), dim=1),
            torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1),
            ids.shape[1],
            **{name: inputs.get(name) for name in (*MEDIA, *MEDIA_PER_TOKEN)},
        )
        return found[0]

    def _through(self, model: nn.Module, length: int, function: Function, found: list[Any]) -> Callable[..., Any]:
        """Stands for the model in the host's code, which knows what each row reads and asks for log-probs."""

        def forward(*, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Any:
            if "output_router_logits" in inputs:  # the host's head sees to MoE's auxiliary loss
                return model(**inputs, labels=labels, fused_lm_head=fused_lm_head)
            ids = labels[:, -length:]
            keep = ids != -100

            def of_completions(hidden: Tensor, head: LMHead) -> Any:
                hidden = hidden[:, -length - 1 : -1][keep]
                if not self.args.cast_lm_head_to_fp32:
                    return function(hidden, head, ids[keep])
                with torch.autocast(hidden.device.type, enabled=False):
                    return function(hidden.float(), head, ids[keep])

            results = padded(model(**inputs, from_hidden=of_completions), keep)
            found.append(results)
            names = ("log_prob", "entropy") if hasattr(results, "log_prob") else ("student_log_prob", "student_entropy")
            return FusedCausalLMOutput(log_probs=getattr(results, names[0]), entropy=getattr(results, names[1]))

        return forward
