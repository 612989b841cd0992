"""A verifiable-arithmetic testbed that fits a laptop: a task, a tokenizer and a small Qwen3 that solves part of it.

The student reads `Q37+18+25=` and answers with a trace such as `18+25=43;43+37=80;A80`; the numbers may be added in any
of six orders. The teacher is the same network reading the answer first, `H080|Q37+18+25=`: the hint is the privileged
information. The environment checks the final answer. Student prompts all have one length and so have teacher prompts,
so batches need no padding on the left and no attention mask.

The vocabulary is exactly the 17 characters of the task and EOS, and EOS also pads. Every row of the LM head is used, so
a policy samples from the full softmax that a loss sees, and no logit has to be masked.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789+=;AQH|"
EOS = "<eos>"
MAX_RESPONSE_TOKENS = 28  # the longest right response has 24, EOS included
IGNORED = -100  # label of a token that carries no loss


@dataclass(frozen=True)
class ArithmeticConfig:
    """Shape of the model and recipe of its pre-training.

    Training stops as soon as the pass rate at temperature 1 reaches `target_pass_rate`: the rate rises steeply once the
    model begins to add, and groups of rollouts with mixed outcomes exist only part of the way up. With much less than
    half of the prompts privileged, some seeds reach that point before they have learnt to use the hint.
    """

    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    batch_size: int = 64
    privileged_share: float = 0.5
    target_pass_rate: float = 0.4
    eval_every: int = 10
    eval_problems: int = 256
    max_steps: int = 1200
    seed: int = 0


class Problem(NamedTuple):
    """Three numbers from 10 to 49 to add."""

    a: int
    b: int
    c: int

    @property
    def answer(self) -> int:
        """The sum, which the verifier asks for."""
        return self.a + self.b + self.c

    @property
    def prompt(self) -> str:
        """What the student reads."""
        return f"Q{self.a}+{self.b}+{self.c}="

    @property
    def privileged_prompt(self) -> str:
        """What the teacher reads: the answer, in three digits so that all hints have one length, then `prompt`."""
        return f"H{self.answer:03d}|{self.prompt}"


class Rollouts(NamedTuple):
    """Sampled responses, padded on the right with EOS; `mask` keeps the response up to and including its own EOS."""

    token_ids: Tensor  # (S, T) int64
    mask: Tensor  # (S, T) bool
    log_prob: Tensor  # (S, T) float32, of each token when it was sampled, 0 where masked


class PretrainingStep(NamedTuple):
    """What pre-training reports after a step; `pass_rate` is that of the last evaluation."""

    step: int
    loss: float
    pass_rate: float


def draw_problems(count: int, rng: random.Random) -> list[Problem]:
    """`count` independent problems, uniform over the 64,000 there are."""
    return [Problem(*(rng.randint(10, 49) for _ in range(3))) for _ in range(count)]


def trace(problem: Problem, order: Sequence[int]) -> str:
    """The response that adds the numbers in `order`, a permutation of (0, 1, 2)."""
    x, y, z = (problem[i] for i in order)
    return f"{x}+{y}={x + y};{x + y}+{z}={x + y + z};A{x + y + z}"


def verify(problem: Problem, response: str) -> float:
    """The reward: 1 if the response ends in the right answer, else 0. The steps are not looked at."""
    final = re.search(r"A(\d+)$", response)
    return float(final is not None and final[1] == str(problem.answer))


def steps_valid(problem: Problem, response: str) -> bool:
    """Whether the response is one of the six right traces: the answer is right and every step leads to it."""
    return any(response == trace(problem, order) for order in permutations(range(3)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and EOS, which also pads. A character outside the task raises."""
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, EOS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def build_model(config: ArithmeticConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with tied embeddings, seeded by `config.seed`."""
    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> Tensor:
    """(S, P) token ids of prompts that all have one length."""
    return torch.tensor(tokenizer(list(prompts))["input_ids"])


def decode_responses(tokenizer: PreTrainedTokenizerFast, rollouts: Rollouts) -> list[str]:
    """The responses as text, without EOS. A response that was cut off before its EOS keeps all it has."""
    return tokenizer.batch_decode(rollouts.token_ids, skip_special_tokens=True)


def pretraining_batch(
    tokenizer: PreTrainedTokenizerFast, config: ArithmeticConfig, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (batch_size, T): prompts followed by traces in a random order.

    A share of the prompts holds the hint, so that the network knows how to use it when it serves as the teacher. The
    order of the trace does not depend on the hint: a teacher is then never at a loss on the order a student chose.
    """
    orders = list(permutations(range(3)))
    token_ids, labels = [], []
    for problem in draw_problems(config.batch_size, rng):
        privileged = rng.random() < config.privileged_share
        prompt = tokenizer.encode(problem.privileged_prompt if privileged else problem.prompt)
        response = tokenizer.encode(trace(problem, rng.choice(orders)) + EOS)
        token_ids.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([IGNORED] * len(prompt) + response))
    return (
        pad_sequence(token_ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: ArithmeticConfig,
    on_step: Callable[[PretrainingStep], None] = lambda step: None,
) -> PretrainingStep:
    """Train from scratch with AdamW on right traces until the target pass rate; returns the last step.

    Raises RuntimeError if `config.max_steps` do not reach the target.
    """
    rng = random.Random(config.seed)
    problems = draw_problems(config.eval_problems, random.Random(config.seed + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    rate = 0.0
    for step in range(1, config.max_steps + 1):
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / config.warmup_steps)
        token_ids, labels = pretraining_batch(tokenizer, config, rng)
        logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % config.eval_every == 0:
            rate = pass_rate(model, tokenizer, problems, seed=config.seed)
        report = PretrainingStep(step, loss.item(), rate)
        on_step(report)
        if rate >= config.target_pass_rate:
            return report
    raise RuntimeError(f"the pass rate is {rate:.3f} after {step} steps, below {config.target_pass_rate}")


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM, prompt_ids: Tensor, generator: torch.Generator, temperature: float = 1.0
) -> Rollouts:
    """One response per row of `prompt_ids` (S, P), from the full softmax at `temperature`, with a KV cache."""
    eos = model.config.eos_token_id
    alive = torch.ones(len(prompt_ids), dtype=torch.bool)
    inputs, cache, columns = prompt_ids, None, []
    while len(columns) < MAX_RESPONSE_TOKENS and alive.any():
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        log_probs = F.log_softmax(output.logits[:, -1].float() / temperature, dim=-1)
        inputs = torch.multinomial(log_probs.exp(), 1, generator=generator).where(alive[:, None], eos)
        cache = output.past_key_values
        columns.append((inputs[:, 0], alive, log_probs.gather(1, inputs)[:, 0].where(alive, 0.0)))
        alive = alive & (inputs[:, 0] != eos)
    return Rollouts(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))


def response_hidden(model: Qwen3ForCausalLM, prompt_ids: Tensor, rollouts: Rollouts) -> Tensor:
    """(S, T, H): the final hidden states, after the last norm, that predict each response token after `prompt_ids`.

    `model.lm_head` of them are the logits. Differentiable; rows where `rollouts.mask` is False mean nothing.
    """
    token_ids = torch.cat([prompt_ids, rollouts.token_ids[:, :-1]], dim=1)
    hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state
    return hidden[:, prompt_ids.shape[1] - 1 :]


def pass_rate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    seed: int = 0,
    privileged: bool = False,
) -> float:
    """Share of problems answered right by one response each at temperature 1, with or without the hint."""
    prompts = [problem.privileged_prompt if privileged else problem.prompt for problem in problems]
    rollouts = sample(model, encode_prompts(tokenizer, prompts), torch.Generator().manual_seed(seed))
    responses = decode_responses(tokenizer, rollouts)
    return sum(map(verify, problems, responses)) / len(problems)
