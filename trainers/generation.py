"""Sampling responses, with transformers or with vLLM.

A response depends on its own seed, not on the batch or the process that it is sampled in: runs on one and on several
processes, and runs that were resumed, sample the same. (In bfloat16 another batch rounds otherwise, which may turn a
token.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.core_model_loading import revert_weight_conversion

from sdkernels import truncated_log_softmax
from trainers.config import InputError, TrainerConfig
from trainers.policy import full_weights, inference, unwrapped
from trainers.processes import device
from trainers.prompts import Prompt, stack_media


@dataclass(frozen=True)
class Sampling:
    """How to decode; temperature 0 is greedy. Filters are those of `sdkernels.truncated_log_softmax`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Sampling":
        """As SSD's tables write it: temperature, or temperature/top-k/top-p, "none" or 0 and 1 for no filter."""
        temperature, *filters = text.split("/")
        try:
            top_k, top_p = filters or ("none", "none")
            kept, mass = 0 if top_k == "none" else int(top_k), 1.0 if top_p == "none" else float(top_p)
            parsed = cls(float(temperature), kept, mass)
            if not (0 <= parsed.temperature < math.inf and parsed.top_k >= 0 and 0 < parsed.top_p <= 1):
                raise ValueError
        except ValueError:
            raise InputError(
                f"a decode is temperature or temperature/top-k/top-p, such as 0.7/20/0.8, got {text!r}"
            ) from None
        return parsed


class Response(NamedTuple):
    """Sampled tokens, EOS included unless the response was cut off at the limit."""

    token_ids: list[int]
    finished: bool


@dataclass
class Draft:
    """A response that is being sampled."""

    prompt: Prompt
    seed: int
    token_ids: list[int] = field(default_factory=list)  # so far

    def so_far(self) -> Prompt:
        """What the model reads to go on."""
        added = len(self.token_ids)
        media = {
            name: torch.nn.functional.pad(value, (0, added)) if self.prompt.is_per_token(value) else value
            for name, value in self.prompt.media.items()
        }
        return Prompt([*self.prompt.token_ids, *self.token_ids], media)


class SeededSampler(LogitsProcessor):
    """Leaves one token of each row: the one in which that row's next uniform number falls, by inverse CDF."""

    def __init__(self, drafts: Sequence[Draft], sampling: Sampling, width: int, max_tokens: int) -> None:
        draws = [torch.rand(max_tokens, generator=torch.Generator().manual_seed(draft.seed)) for draft in drafts]
        self.uniforms = torch.stack(draws).to(device())  # (B, max_tokens)
        begun = torch.tensor([len(draft.token_ids) for draft in drafts], device=device())
        self.positions = begun[:, None] - width  # (B, 1), of the token after one that ends at 0
        self.sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (B, V) with -inf for all but the sampled token."""
        if self.sampling.temperature == 0:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            s = self.sampling
            log_q = truncated_log_softmax(scores.float(), s.temperature, top_k=s.top_k, top_p=s.top_p)
            mass = log_q.exp().double().cumsum(-1)
            at = (self.positions + input_ids.shape[1]).clamp(max=self.uniforms.shape[1] - 1)
            uniform = self.uniforms.gather(1, at).double()
            chosen = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class Waste(StoppingCriteria):
    """Ends a batch once rows that have ended took as many steps as there are tokens to read again without them.

    Whatever the lengths turn out to be, each decision to stay or to leave costs at most twice the better one.
    """

    def __init__(self, drafts: Sequence[Draft], eos: Sequence[int], width: int, max_tokens: int) -> None:
        self.eos = torch.tensor(eos, device=device())
        self.last = torch.tensor([width + max_tokens - len(draft.token_ids) for draft in drafts], device=device())
        self.ended = torch.zeros(len(drafts), dtype=torch.bool, device=device())
        self.wasted = torch.zeros((), dtype=torch.int64, device=device())

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) which rows take no further token."""
        self.wasted += self.ended.sum()
        self.ended |= torch.isin(input_ids[:, -1], self.eos) | (self.last <= input_ids.shape[1])
        again = (~self.ended).sum() * input_ids.shape[1]
        return self.ended | (self.wasted > again)


class Generator:
    """Samples from a policy with its current weights."""

    def __init__(self, config: TrainerConfig, tokenizer: Any) -> None:
        self.max_tokens = config.max_completion_length
        self.batch_size = config.per_device_generation_batch_size
        self.pad = tokenizer.pad_token_id
        self.eos = [tokenizer.eos_token_id]
        self.vllm = _VLLM(config) if config.use_vllm else None

    def __call__(
        self, policy: nn.Module, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling
    ) -> list[Response]:
        """One response per prompt and seed, in their order. Collective, where weights are sharded."""
        if self.vllm is not None:
            return self.vllm(policy, prompts, seeds, sampling)
        drafts = [Draft(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        waiting = sorted(drafts, key=lambda draft: len(draft.prompt.token_ids))  # so that little is padding
        eos = _ids(unwrapped(policy).generation_config.eos_token_id) or self.eos
        with inference(policy):
            while waiting:
                batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
                policy(self._go_on, batch, sampling, eos)
                waiting += [draft for draft in batch if not self._response(draft, eos)]
        return [self._response(draft, eos) for draft in drafts]

    def _go_on(self, model: nn.Module, drafts: Sequence[Draft], sampling: Sampling, eos: list[int]) -> None:
        """Sample on until all have ended, or so many that the others are better read anew."""
        prompts = [draft.so_far() for draft in drafts]
        width = max(len(prompt.token_ids) for prompt in prompts)
        padded = [[self.pad] * (width - len(p.token_ids)) + p.token_ids for p in prompts]
        kept = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts]
        network = unwrapped(model)
        own = network.generation_config
        network.generation_config = GenerationConfig()  # of its own, generate would take what is not given below
        try:
            sequences = model.generate(
                input_ids=torch.tensor(padded, device=device()),
                attention_mask=torch.tensor(kept, device=device()),
                **stack_media(prompts, width, left=True),
                logits_processor=LogitsProcessorList([SeededSampler(drafts, sampling, width, self.max_tokens)]),
                stopping_criteria=StoppingCriteriaList([Waste(drafts, eos, width, self.max_tokens)]),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=self.max_tokens - min(len(draft.token_ids) for draft in drafts),
                    pad_token_id=self.pad, eos_token_id=eos, suppress_tokens=_media_ids(network),
                ),
                synced_gpus=False,  # by itself it would wait for other processes where a model is sharded
            )  # fmt: skip
        finally:
            network.generation_config = own
        for draft, added in zip(drafts, sequences[:, width:].tolist(), strict=True):
            draft.token_ids += added

    def _response(self, draft: Draft, eos: Sequence[int]) -> Response | None:
        """The draft as a response, if it has ended."""
        found = draft.token_ids[: self.max_tokens]
        for position, token in enumerate(found):
            if token in eos:
                return Response(found[: position + 1], True)
        return Response(found, False) if len(found) == self.max_tokens else None


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _media_ids(model: nn.Module) -> list[int] | None:
    """Tokens that stand for images and videos: said in a response they would ask for one that is not there."""
    names = ("image_token_id", "video_token_id")
    return [getattr(model.config, name) for name in names if hasattr(model.config, name)] or None


class _VLLM:
    """vLLM in this process, beside the policy whose weights it is given before every call."""

    def __init__(self, config: TrainerConfig) -> None:
        import vllm

        self.vllm = vllm
        self.max_tokens = config.max_completion_length
        self.engine = vllm.LLM(
            model=config.model_name_or_path,
            dtype="bfloat16" if config.bf16 else config.dtype,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            distributed_executor_backend="external_launcher",
            seed=config.seed,
        )

    def __call__(
        self, policy: nn.Module, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling
    ) -> list[Response]:
        """As `Generator.__call__`."""
        if any(prompt.media for prompt in prompts):
            raise InputError("use_vllm samples from text alone; these prompts have images")
        worker = self.engine.llm_engine.model_executor.driver_worker.model_runner.model
        weights = revert_weight_conversion(unwrapped(policy), full_weights(policy))  # as checkpoints name them
        worker.load_weights(weights.items())
        self.engine.reset_prefix_cache()  # it holds what the last weights made of the same prompts
        filters = {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
        limits = {"max_tokens": self.max_tokens, "detokenize": False}
        asked = [
            self.vllm.SamplingParams(temperature=sampling.temperature, **filters, **limits, seed=seed) for seed in seeds
        ]
        ids = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        outputs = [output.outputs[0] for output in self.engine.generate(ids, asked, use_tqdm=False)]
        return [Response(list(output.token_ids), output.finish_reason == "stop") for output in outputs]
