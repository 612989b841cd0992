"""What the benchmarks run on: recorded rollouts, and heavy-tailed synthetic rows at real vocabulary sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

RECORD = Path(__file__).parent / "data" / "rollouts.safetensors"
MODELS = {151936: "Qwen3", 128256: "Llama 3"}  # whose vocabulary it is
GROUP_SIZE = 8
CHUNK_ELEMENTS = 1 << 24  # logits per chunk of rows in untimed work


@dataclass(frozen=True)
class Inputs:
    """Packed tokens with the logits of student and teacher, and what a policy loss needs beside them."""

    name: str
    student: Tensor  # (N, V)
    teacher: Tensor  # (N, V)
    token_ids: Tensor  # (N,)
    advantages: Tensor  # (N,) group-normalised, the same over a sequence
    old_log_prob: Tensor  # (N,)
    lengths: Tensor  # (S,) tokens of each sequence
    rewards: Tensor  # (S,)
    student_hidden: Tensor | None = None  # (N, H), of recorded rollouts
    lm_head: Tensor | None = None  # (V, H)

    @property
    def title(self) -> str:
        """Name, size and dtype in one line."""
        tokens, vocab = self.student.shape
        return f"{self.name}: {tokens:,} tokens, V = {vocab:,}, {str(self.student.dtype).removeprefix('torch.')}"

    @cached_property
    def scratch(self) -> Tensor:
        """Memory like the student's logits, shared by the cases that write over them."""
        return torch.empty_like(self.student)

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What was computed of these inputs once and is needed again, by key."""
        return {}

    @cached_property
    def teacher_log_prob(self) -> Tensor:
        """(N,) the teacher's log-probs of the tokens, in float64."""
        return exact_statistics(self.teacher, self.token_ids)[0]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same with logits in another dtype."""
        return replace(self, student=self.student.to(dtype), teacher=self.teacher.to(dtype))

    def padded(self, values: Tensor) -> Tensor:
        """(N, ...) packed values as (S, longest, ...), padded with zeros on the right."""
        out = values.new_zeros(*self.mask.shape, *values.shape[1:])
        out[self.mask] = values
        return out

    @cached_property
    def mask(self) -> Tensor:
        """(S, longest), true at the tokens of a padded batch."""
        positions = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return positions < self.lengths[:, None]


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows small enough for float64 temporaries."""
    rows = max(CHUNK_ELEMENTS // logits.shape[-1], 1)
    for start in range(0, logits.shape[0], rows):
        yield slice(start, min(start + rows, logits.shape[0]))


def exact_statistics(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) log-probs of the tokens and (N,) entropies, in float64."""
    log_prob, entropy = torch.empty(2, len(logits), dtype=torch.float64, device=logits.device)
    for rows in row_chunks(logits):
        log_p = torch.log_softmax(logits[rows].double(), -1)
        log_prob[rows] = log_p.gather(-1, token_ids[rows, None])[:, 0]
        entropy[rows] = -(log_p.exp() * log_p).sum(-1)
    return log_prob, entropy


def group_normalised_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(S,) GRPO's (reward - mean) / (std + 1e-6) within each group."""
    groups = torch.nn.functional.one_hot(group_ids.long()).to(rewards.dtype)  # (S, groups)
    size = groups.sum(0)
    centred = rewards - groups @ (rewards @ groups / size)
    deviation = (centred.square() @ groups / (size - 1)).sqrt()
    return centred / (groups @ deviation + 1e-6)


def off_policy(log_prob: Tensor, generator: torch.Generator) -> Tensor:
    """Log-probs of an older policy, a few per cent away, so that the ratio is not 1."""
    return log_prob + 0.05 * torch.randn(log_prob.shape, generator=generator, device=log_prob.device)


def recorded_rollouts(device: torch.device, path: Path = RECORD) -> Inputs:
    """The rollouts of record_rollouts.py with float32 logits, computed from their hidden states."""
    record = {name: tensor.to(device) for name, tensor in load_file(path).items()}
    lengths = record["cu_seqlens"].diff().long()
    advantages = group_normalised_advantages(record["rewards"].float(), record["group_ids"])
    return Inputs(
        name="recorded rollouts",
        student=record["student_hidden"] @ record["lm_head"].T,
        teacher=record["teacher_hidden"] @ record["lm_head"].T,
        token_ids=record["token_ids"].long(),
        advantages=advantages.repeat_interleave(lengths),
        old_log_prob=off_policy(record["sampling_log_prob"], torch.Generator(device).manual_seed(0)),
        lengths=lengths,
        rewards=record["rewards"].float(),
        student_hidden=record["student_hidden"],
        lm_head=record["lm_head"],
    )


def synthetic_name(vocab: int) -> str:
    """What `synthetic` calls its inputs."""
    return f"synthetic {MODELS.get(vocab, vocab)}"


def synthetic(tokens: int, vocab: int, device: torch.device) -> Inputs:
    """Float32 rows with the heavy tails of a language model's softmax, never scaled towards uniform.

    Gumbel noise times a scale gives a softmax with a power-law tail; the scale runs over the rows from 0.75 (thousands
    of likely tokens) to 2 (a handful), and every fourth row has one token raised by 8, so that some p(y) are near 1.
    The teacher adds noise of 0.1, which clips about as many evidence weights as the paper reports. Tokens are sampled
    from the student.
    """
    generator = torch.Generator(device).manual_seed(0)
    student = torch.empty(tokens, vocab, device=device)
    teacher = torch.empty_like(student)
    token_ids = torch.empty(tokens, dtype=torch.long, device=device)
    log_prob = torch.empty(tokens, device=device)
    scale = torch.linspace(0.75, 2.0, tokens, device=device)[:, None]
    for rows in row_chunks(student):
        z = student[rows].exponential_(generator=generator).clamp_(min=1e-7).log_().mul_(-scale[rows])
        peak = z.argmax(-1, keepdim=True)
        raised = (torch.arange(rows.start, rows.stop, device=device) % 4 == 0)[:, None]
        z.scatter_add_(-1, peak, 8.0 * raised)
        teacher[rows].normal_(0.0, 0.1, generator=generator).add_(z)
        log_p = torch.log_softmax(z, -1)
        race = torch.empty_like(z).exponential_(generator=generator).clamp_(min=1e-7).log_()
        token_ids[rows] = (log_p - race).argmax(-1)
        log_prob[rows] = log_p.gather(-1, token_ids[rows, None])[:, 0]
    sequences = min(GROUP_SIZE * max(tokens // 4096, 1), tokens)
    index = torch.arange(sequences, device=device)
    rewards = (torch.rand(sequences, generator=generator, device=device) < 0.4).float()
    rewards[index % GROUP_SIZE < 2] = (index[index % GROUP_SIZE < 2] % GROUP_SIZE).float()  # every group is mixed
    lengths = tokens // sequences + (index < tokens % sequences).long()
    return Inputs(
        name=synthetic_name(vocab),
        student=student,
        teacher=teacher,
        token_ids=token_ids,
        advantages=group_normalised_advantages(rewards, index // GROUP_SIZE).repeat_interleave(lengths),
        old_log_prob=off_policy(log_prob, generator),
        lengths=lengths,
        rewards=rewards,
    )


def small_model(vocab: int, size: int) -> torch.nn.Module:
    """A Qwen3 of one layer whose logits deviate by 2.5; embeddings are frozen: their gradient is any head's."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=1, head_dim=32,
        num_attention_heads=size // 32, num_key_value_heads=size // 32, eos_token_id=None, pad_token_id=0,
        bos_token_id=None, tie_word_embeddings=False,
    ))  # fmt: skip
    torch.nn.init.normal_(model.lm_head.weight, std=2.5 / size**0.5)
    model.model.embed_tokens.requires_grad_(False)
    return model
