"""From examples to token ids: chat templates, images, and the privileged prompts that only a teacher reads."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdkernels.integrations.prompts import PRIVILEGED_TEMPLATE, privileged_prompt
from trainers.config import InputError, TrainerConfig
from trainers.data import Chat, Example
from trainers.processes import device

Privilege = Literal["answer", "solution", "rollout", "feedback"]

Item = TypeVar("Item")

PRIVILEGED_TEMPLATES: dict[str, str] = {
    "answer": PRIVILEGED_TEMPLATE,
    "solution": "{prompt}\n\nA correct solution:\n{privileged}\n\nNow write your own solution.",
    "rollout": "{prompt}\n\nAn earlier attempt that was right:\n{privileged}\n\nNow write your own solution.",
    "feedback": "{prompt}\n\nFeedback on an earlier attempt:\n{privileged}\n\nNow write a correct solution.",
}


class Prompt(NamedTuple):
    """An encoded prompt; `media` is what the model's forward takes besides, as pixel_values."""

    token_ids: list[int]
    media: dict[str, Tensor]

    def is_per_token(self, value: Tensor) -> bool:
        """Whether an entry of `media` says something of each token."""
        return value.shape == (1, len(self.token_ids))


class Batch(NamedTuple):
    """Prompts and responses, padded on the right. `predicts` indexes the flattened (B L) positions of which the next
    token is a response token: hidden states there, in order, are those that score the responses, without padding.
    """

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    predicts: Tensor  # (N,)
    response_ids: Tensor  # (N,)
    media: dict[str, Tensor]


def privileged(example: Example, kind: Privilege, text: str, template: str | None = None) -> Example:
    """The example with `text`, of the kind named, put into its last user turn."""
    try:
        prompt = privileged_prompt(example.prompt, text, template or PRIVILEGED_TEMPLATES[kind])
    except ValueError as error:
        raise InputError(f"{example.source}: {error}") from error
    return replace(example, prompt=prompt)


class Encoder:
    """Encodes examples with a tokenizer, or with a multimodal model's processor."""

    def __init__(self, processor: Any, config: TrainerConfig) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.pad = self.tokenizer.pad_token_id
        self.as_chat = config.as_chat
        self.system_prompt = config.system_prompt

    def __call__(self, example: Example) -> Prompt:
        """Token ids and media of the example's prompt, ready for a response to follow."""
        if isinstance(example.prompt, str) and not self.as_chat and not example.images:
            if self.system_prompt:
                raise InputError(f"{example.source}: system_prompt is for chats; make one of the text with --as_chat")
            return Prompt(self.tokenizer(example.prompt)["input_ids"], {})
        encoded = self.processor.apply_chat_template(
            self._chat(example), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        encoded = dict(encoded)
        token_ids = encoded.pop("input_ids")[0].tolist()
        encoded.pop("attention_mask", None)
        return Prompt(token_ids, encoded)

    def short_enough(
        self, examples: Sequence[Example], limit: int | None, say: Callable[[str], None]
    ) -> Sequence[Example]:
        """The examples whose prompts have at most `limit` tokens; how many are left out, and which, is said."""
        if limit is None:
            return examples
        kept: list[Example] = []
        left_out: list[str] = []
        for example in examples:
            if len(self(example).token_ids) <= limit:
                kept.append(example)
            else:
                left_out.append(example.source)
        if left_out:
            say(f"{len(left_out)} of {len(examples)} prompts have more than {limit} tokens: {', '.join(left_out[:10])}")
        if not kept:
            raise InputError(f"no prompt has at most {limit} tokens (max_prompt_length)")
        return kept

    def _chat(self, example: Example) -> Chat:
        chat = [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
        if self.system_prompt and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": self.system_prompt}, *chat]
        if not example.images:
            return chat
        if self.processor is self.tokenizer:
            raise InputError(f"{example.source} has images, which this model does not read")
        images = [{"type": "image", "image": image} for image in example.images]
        content = chat[-1]["content"]
        text = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [*chat[:-1], {**chat[-1], "content": [*images, *text]}]

    def batch(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Batch:
        """What a model reads to score `responses` after `prompts`, on this process's device."""
        lengths = [len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        width = max(lengths)
        input_ids = torch.full((len(lengths), width), self.pad)
        attention_mask = torch.zeros_like(input_ids)
        predicts = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            input_ids[row, : lengths[row]] = torch.tensor([*prompt.token_ids, *response])
            attention_mask[row, : lengths[row]] = 1
            first = row * width + len(prompt.token_ids) - 1
            predicts.append(torch.arange(first, first + len(response)))
        response_ids = torch.tensor([token for response in responses for token in response])
        tensors = [tensor.to(device()) for tensor in (input_ids, attention_mask, torch.cat(predicts), response_ids)]
        return Batch(*tensors, stack_media(prompts, width, left=False))

    def decode(self, responses: Sequence[list[int]]) -> list[str]:
        """Responses as text, without special tokens."""
        return self.tokenizer.batch_decode(list(responses), skip_special_tokens=True)


def stack_media(prompts: Sequence[Prompt], length: int, left: bool) -> dict[str, Tensor]:
    """The media of a batch: per-token entries padded with 0 to `length`, others one after the other.

    A per-token entry that some prompts have is 0 for those that are text alone.
    """
    media: dict[str, list[Tensor]] = {}
    per_token = {n: v for prompt in prompts for n, v in prompt.media.items() if prompt.is_per_token(v)}
    for prompt in prompts:
        missing = length - len(prompt.token_ids)
        absent = {name: value.new_zeros(1, len(prompt.token_ids)) for name, value in per_token.items()}
        for name, value in (absent | prompt.media).items():
            if name in per_token:
                value = torch.nn.functional.pad(value, (missing, 0) if left else (0, missing))
            media.setdefault(name, []).append(value)
    return {name: torch.cat(values).to(device()) for name, values in media.items()}


def by_length(items: Sequence[Item], size: int, length: Callable[[Item], int]) -> list[list[Item]]:
    """The items in parts of `size`, those of like length together, so that little of a batch is padding."""
    ordered = sorted(items, key=length)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
