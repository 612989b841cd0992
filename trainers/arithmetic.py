"""The arithmetic testbed for RLSD: sums of three numbers, of which every order of adding is a valid solution.

The student reads `Q37+18+25=` and answers with a trace such as `18+25=43;43+37=80;####80`, in any of six orders. The
teacher reads the answer or a worked trace in front of it, `H80|Q37+18+25=`. The verifier compares the final answer.
A prompt of its solutions' six orders leaves the teacher's distribution truly uncertain, so that what it knows of the
trace it was shown can leak.

The vocabulary is the 17 symbols of the task and EOS, which also pads, so no row of the LM head is unused.
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trainers.config import TrainerConfig
from trainers.data import seed_of
from trainers.generation import Generator, Sampling
from trainers.policy import Policy
from trainers.processes import device
from trainers.prompts import Prompt
from trainers.testbeds import IGNORED, pretrain
from trainers.verifiers import exact

SYMBOLS = ["####", *"0123456789+=;QH|"]
EOS = "<eos>"
MAX_RESPONSE_TOKENS = 28  # the longest right response has 24, EOS included
ORDERS = tuple(itertools.permutations(range(3)))
TARGET_PASS_RATE = 0.35  # steeply rising when it is reached; groups of mixed outcome exist only part of the way up
HINT_STEPS = 60
OPTIONS = {"privileged_template": "H{privileged}|{prompt}"}


class Problem(NamedTuple):
    """Three numbers from 10 to 49 to add."""

    a: int
    b: int
    c: int

    @property
    def answer(self) -> str:
        """The sum."""
        return str(self.a + self.b + self.c)

    @property
    def prompt(self) -> str:
        """What the student reads."""
        return f"Q{self.a}+{self.b}+{self.c}="

    def trace(self, order: tuple[int, ...]) -> str:
        """The response that adds the numbers in `order`, a permutation of (0, 1, 2)."""
        x, y, z = (self[i] for i in order)
        return f"{x}+{y}={x + y};{x + y}+{z}={x + y + z};####{x + y + z}"

    def traces(self) -> list[str]:
        """All right responses."""
        return sorted({self.trace(order) for order in ORDERS})


def problem_of(prompt: str) -> Problem:
    """The problem that a prompt asks."""
    return Problem(*map(int, prompt.removeprefix("Q").removesuffix("=").split("+")))


def draw_problems(count: int, rng: random.Random) -> list[Problem]:
    """Different problems, of the 64,000 that there are."""
    return [Problem(*(10 + n // 40**i % 40 for i in range(3))) for n in rng.sample(range(40**3), count)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per symbol, and EOS. A character outside the task raises."""
    vocabulary = {token: i for i, token in enumerate([*SYMBOLS, EOS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("####|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of 446,000 parameters, embeddings tied."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=96,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def batches(
    tokenizer: PreTrainedTokenizerFast, shares: tuple[float, float, float], rng: random.Random, size: int = 64
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels (size, T) of prompts and traces; `shares` of them have no hint, the answer, or a trace.

    Half of the traces follow the order of the trace that was hinted, half any order: a teacher that always copied its
    hint would be at a loss on any other order that a student takes, and its evidence worthless.
    """
    while True:
        rows = []
        for problem in (Problem(*(rng.randint(10, 49) for _ in range(3))) for _ in range(size)):
            response = problem.trace(rng.choice(ORDERS))
            hinted = response if rng.random() < 0.5 else problem.trace(rng.choice(ORDERS))
            (hint,) = rng.choices(["", f"H{problem.answer}|", f"H{hinted}|"], shares)
            prompt = tokenizer.encode(hint + problem.prompt)
            rows.append((prompt, tokenizer.encode(response + EOS)))
        yield (
            pad_sequence([torch.tensor(p + r) for p, r in rows], True, tokenizer.pad_token_id),
            pad_sequence([torch.tensor([IGNORED] * len(p) + r) for p, r in rows], True, IGNORED),
        )


def pass_rate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> float:
    """Share of problems answered right by one response each at temperature 1."""
    config = TrainerConfig(
        testbed="arithmetic", max_completion_length=MAX_RESPONSE_TOKENS, per_device_generation_batch_size=256
    )
    prompts = [Prompt(tokenizer.encode(problem.prompt), {}) for problem in problems]
    seeds = [seed_of(i) for i in range(len(problems))]
    responses = Generator(config, tokenizer)(Policy(model, False), prompts, seeds, Sampling())
    texts = tokenizer.batch_decode([response.token_ids for response in responses], skip_special_tokens=True)
    return sum(exact(text, problem.answer).reward for text, problem in zip(texts, problems, strict=True)) / len(texts)


def make(directory: Path, seed: int = 0, max_steps: int = 2000) -> None:
    """Train the base in two phases, to add and then to read hints, and write it with 4,096 prompts and 512 held out.

    Raises RuntimeError if `max_steps` do not reach the target.
    """
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed).to(device())
    problems = draw_problems(4096 + 512, random.Random(seed_of(seed, "problems")))
    columns = TextColumn("arithmetic testbed"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn()
    rate = 0.0

    def adamw(learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task("", total=TARGET_PASS_RATE, state="")

        def adds(step: int, loss: float) -> bool:
            nonlocal rate
            if step % 10 == 0:
                rate = pass_rate(model, tokenizer, problems[-256:])
            progress.update(task, completed=rate, state=f"step {step}, loss {loss:.3f}, pass rate {rate:.1%}")
            return rate >= TARGET_PASS_RATE or step == max_steps

        pretrain(model, batches(tokenizer, (0.5, 0.5, 0.0), rng), [adamw(2e-3)], lambda step: min(1.0, step / 20), adds)
        if rate < TARGET_PASS_RATE:
            raise RuntimeError(f"the pass rate is {rate:.3f} after {max_steps} steps, below {TARGET_PASS_RATE}")
        hinted = itertools.islice(batches(tokenizer, (0.15, 0.2, 0.65), rng), HINT_STEPS)
        pretrain(model, hinted, [adamw(1e-3)], lambda step: 1.0, lambda step, loss: False)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for name, part in (("train", problems[:4096]), ("eval", problems[4096:])):
        rows = ({"prompt": p.prompt, "reference": p.answer, "solutions": p.traces(), "verifier": "exact"} for p in part)
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
