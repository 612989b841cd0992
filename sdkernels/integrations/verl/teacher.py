"""Privileged teacher scoring: the same responses after a prompt that says more, by any engine of verl's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from verl.utils import tensordict_utils as tu
from verl.utils.tokenizer import normalize_token_ids
from verl.utils.tokenizer.chat_template import apply_chat_template

from sdkernels.integrations.prompts import PRIVILEGED_TEMPLATE, privileged_prompt


def privileged_prompt_ids(
    tokenizer: Any,
    prompt: list[dict[str, Any]],
    extra_info: Mapping[str, Any] | None,
    key: str = "privileged",
    template: str = PRIVILEGED_TEMPLATE,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The teacher's prompt, as verl's agent loops render the student's.

    Args:
        tokenizer: with a chat template.
        prompt: verl's `raw_prompt`, a chat whose last message is the user's.
        extra_info: the row's `extra_info`, which holds the privileged text under `key`.
        key: where.
        template: see `privileged_prompt`.
        chat_template_kwargs: `data.apply_chat_template_kwargs`.

    Raises:
        KeyError: the row has no privileged text.

    """
    if not extra_info or key not in extra_info:
        raise KeyError(f"a row's extra_info has no {key!r} for the teacher to read, only {sorted(extra_info or {})}")
    messages = privileged_prompt(list(prompt), str(extra_info[key]), template)
    return normalize_token_ids(apply_chat_template(tokenizer, messages, **(chat_template_kwargs or {})))


def privileged_log_probs(
    batch: Any, prompt_ids: Sequence[Sequence[int]], infer: Callable[[Any], Any], temperature: float = 1.0
) -> Any:
    """log P_T of a batch's responses after other prompts, laid out as verl's teacher servers' is.

    Args:
        batch: TensorDict with `prompts` and `responses`, jagged (verl's v1 trainer) or padded left and right beside
            an `attention_mask` (its DataProto).
        prompt_ids: the teacher's prompts, one for each row.
        infer: a worker's `infer_batch`, or a worker group's `compute_log_prob` or `compute_ref_log_prob`: a live
            teacher, or a frozen one. (Of a group of `TrainingWorker`, `lambda x: group.infer_batch(x).get()`.)
        temperature: the rollout's; student and teacher must have the same.

    Returns:
        TensorDict(teacher_logprobs, teacher_ids), (B, prompt + response, 1) with the student's prompts: index t speaks
        of token t + 1 and prompts hold zeros. Jagged or padded, as the batch is. teacher_ids are the tokens, which
        verl wants to see beside it.

    Raises:
        ValueError: another number of prompts, an empty one, or images, which a text prompt has no place for.

    """
    prompt_lengths, responses, width = _responses(batch)
    if len(prompt_ids) != len(responses) or not all(map(len, prompt_ids)):
        raise ValueError(f"prompt_ids must be {len(responses)} prompts of at least one token, got "
                         f"{len(prompt_ids)} of lengths {sorted(set(map(len, prompt_ids)))}")  # fmt: skip
    if any(tu.get(batch, "multi_modal_inputs", None) or ()):
        raise ValueError("privileged_log_probs scores text, the batch has multi_modal_inputs")
    rows = [torch.cat([row.new_tensor(prompt), row]) for prompt, row in zip(prompt_ids, responses, strict=True)]
    options = {"temperature": temperature, "calculate_entropy": False, "compute_loss": False}
    scored = infer(tu.get_tensordict({
        "input_ids": _jagged(rows),
        "position_ids": _jagged([torch.arange(len(row), device=row.device) for row in rows]),
        "loss_mask": _jagged([torch.ones_like(row) for row in responses]),
    }, options))["log_probs"]  # fmt: skip
    values, ends = scored.values().float(), scored.offsets()[1:].tolist()
    log_probs = [values[end - len(row) - 1 : end - 1] for end, row in zip(ends, responses, strict=True)]
    return tu.get_tensordict({
        "teacher_logprobs": _placed(log_probs, prompt_lengths, width),
        "teacher_ids": _placed(responses, prompt_lengths, width),
    })  # fmt: skip


def score_privileged(
    batch: Any,
    tokenizer: Any,
    infer: Callable[[Any], Any],
    *,
    key: str = "privileged",
    template: str = PRIVILEGED_TEMPLATE,
    temperature: float = 1.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """`privileged_log_probs` after `privileged_prompt_ids` of the batch's `raw_prompt` and `extra_info`.

    Returns:
        TensorDict(teacher_logprobs, teacher_ids), for `batch.update`.

    """
    prompts, extra_infos = tu.get(batch, "raw_prompt"), tu.get(batch, "extra_info")
    ids = [
        privileged_prompt_ids(tokenizer, prompt, extra_info, key, template, chat_template_kwargs)
        for prompt, extra_info in zip(prompts, extra_infos, strict=True)
    ]
    return privileged_log_probs(batch, ids, infer, temperature)


def _responses(batch: Any) -> tuple[list[int], list[Tensor], tuple[int, int] | None]:
    """Where each student's prompt ends, its response without padding, and what both are padded to."""
    prompts, responses = batch["prompts"], batch["responses"]
    if prompts.is_nested:
        return prompts.offsets().diff().tolist(), list(responses.unbind()), None
    width = prompts.shape[1], responses.shape[1]
    lengths = batch["attention_mask"][:, width[0] :].sum(1).tolist()
    rows = [row[:length] for row, length in zip(responses, lengths, strict=True)]
    return [width[0]] * len(rows), rows, width  # prompts end where their padding on the left says


def _placed(values: list[Tensor], prompt_lengths: list[int], width: tuple[int, int] | None) -> Tensor:
    """Values of responses at the indices before them, as (B, prompt + response, 1) with zeros elsewhere."""
    right = [1 if width is None else width[1] - len(value) + 1 for value in values]
    rows = [pad(x, (left - 1, end))[:, None] for x, left, end in zip(values, prompt_lengths, right, strict=True)]
    return torch.stack(rows) if width else _jagged(rows)


def _jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
