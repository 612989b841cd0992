"""Sampling responses, with transformers or with vLLM.

A response depends on its own seed, not on the batch or the process that it is sampled in: runs on one and on several
processes, and runs that were resumed, sample the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
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
        """As SSD's tables write it: temperature, or temperature/top-k/top-p, 0 and 1 meaning none."""
        temperature, *filters = text.split("/")
        try:
            top_k, top_p = filters or ("0", "1")
            return cls(float(temperature), int(top_k), float(top_p))
        except ValueError:
            raise InputError(f"a decode is temperature or temperature/top-k/top-p, got {text!r}") from None


class Response(NamedTuple):
    """Sampled tokens, EOS included unless the response was cut off at the limit."""

    token_ids: list[int]
    finished: bool


class SeededSampler(LogitsProcessor):
    """Leaves one token of each row: the one in which that row's next uniform number falls, by inverse CDF."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling, prompt_length: int, max_tokens: int) -> None:
        draws = [torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.uniforms = torch.stack(draws).to(device())  # (B, max_tokens)
        self.sampling = sampling
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (B, V) with -inf for all but the sampled token."""
        if self.sampling.temperature == 0:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            s = self.sampling
            log_q = truncated_log_softmax(scores.float(), s.temperature, top_k=s.top_k, top_p=s.top_p)
            mass = log_q.exp().double().cumsum(-1)
            at = input_ids.shape[1] - self.prompt_length
            uniform = self.uniforms[:, at : at + 1].double()
            chosen = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


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
        """One response per prompt and seed, in their order. Processes of one run must call it with as many prompts."""
        if self.vllm is not None:
            return self.vllm(policy, prompts, seeds, sampling)
        responses: list[Response | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))  # so that little is padding
        with inference(policy):
            for rows in _chunks(order, self.batch_size):
                found = policy(self._sample, [prompts[i] for i in rows], [seeds[i] for i in rows], sampling)
                for row, response in zip(rows, found, strict=True):
                    responses[row] = response
        return responses

    def _sample(
        self, model: nn.Module, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling
    ) -> list[Response]:
        width = max(len(prompt.token_ids) for prompt in prompts)
        padded = [[self.pad] * (width - len(p.token_ids)) + p.token_ids for p in prompts]
        kept = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts]
        media = stack_media(prompts, width, left=True)
        sampler = SeededSampler(seeds, sampling, width, self.max_tokens)
        network = unwrapped(model)
        own = network.generation_config
        eos = _ids(own.eos_token_id) or self.eos
        network.generation_config = GenerationConfig()  # of its own, generate would take what is not given below
        try:
            sequences = model.generate(
                input_ids=torch.tensor(padded, device=device()),
                attention_mask=torch.tensor(kept, device=device()),
                **media,
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=self.max_tokens, pad_token_id=self.pad, eos_token_id=eos,
                    suppress_tokens=_media_ids(network),
                ),
                synced_gpus=any(isinstance(module, FSDPModule) for module in model.modules()),
            )  # fmt: skip
        finally:
            network.generation_config = own
        return [_until_eos(row, set(eos)) for row in sequences[:, width:].tolist()]


def _until_eos(token_ids: list[int], eos: set[int]) -> Response:
    for position, token in enumerate(token_ids):
        if token in eos:
            return Response(token_ids[: position + 1], True)
    return Response(token_ids, False)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _media_ids(model: nn.Module) -> list[int] | None:
    """Tokens that stand for images and videos: said in a response they would ask for one that is not there."""
    names = ("image_token_id", "video_token_id")
    return [getattr(model.config, name) for name in names if hasattr(model.config, name)] or None


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
