"""Record the rollouts that the benchmarks run on: real student and teacher rows, instead of noise.

Pre-trains the small Qwen3 of trainers/arithmetic.py, samples a group of responses for each of several problems, rewards
them with the verifier, and scores every response token twice: by the student, which reads the question, and by the
teacher, the same network reading the right answer first. What is kept are the final hidden states, after the last norm:
times the LM head they give back the logits of both. Tokens are packed, so the file holds no padding, and responses are
sampled from the full softmax over a vocabulary whose every row is in use, so no logit has to be masked.

The same seed, versions, thread count and CPU give the same tensors.
"""

import argparse
import json
import os
import platform
import random
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the trainers are no installed package
from trainers import arithmetic  # noqa: E402

TEMPERATURE = 1.0
OUTPUT = ROOT / "benchmarks" / "data" / "rollouts.safetensors"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the data, the problems and the sampling")
    parser.add_argument("--problems", type=int, default=16, help="number of groups")
    parser.add_argument("--group-size", type=int, default=8, help="responses sampled for each problem")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number rounds differently")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write the safetensors file")
    return parser.parse_args()


def train_base(
    config: arithmetic.ArithmeticConfig, console: Console
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast, arithmetic.PretrainingStep]:
    """The base model, its tokenizer and the last step of its pre-training, with a bar that fills to the pass rate."""
    tokenizer = arithmetic.build_tokenizer()
    model = arithmetic.build_model(config, tokenizer)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("pre-training", total=config.target_pass_rate, state="")

        def show(report: arithmetic.PretrainingStep) -> None:
            state = f"step {report.step}, loss {report.loss:.3f}, pass rate {report.pass_rate:.1%}"
            progress.update(task, completed=report.pass_rate, state=state)

        last_step = arithmetic.pretrain(model, tokenizer, config, show)
    return model, tokenizer, last_step


@torch.no_grad()
def record(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[arithmetic.Problem],
    group_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """Sample `group_size` responses per problem and score them under both prompts: the tensors of the file."""
    problems = [problem for problem in problems for _ in range(group_size)]
    student_prompts = arithmetic.encode_prompts(tokenizer, [problem.prompt for problem in problems])
    teacher_prompts = arithmetic.encode_prompts(tokenizer, [problem.privileged_prompt for problem in problems])
    rollouts = arithmetic.sample(model, student_prompts, torch.Generator().manual_seed(seed), TEMPERATURE)
    responses = arithmetic.decode_responses(tokenizer, rollouts)
    mask = rollouts.mask
    return {
        "student_hidden": arithmetic.response_hidden(model, student_prompts, rollouts)[mask],  # (N, H)
        "teacher_hidden": arithmetic.response_hidden(model, teacher_prompts, rollouts)[mask],  # (N, H)
        "lm_head": model.lm_head.weight.detach().clone(),  # (V, H)
        "token_ids": rollouts.token_ids[mask].int(),  # (N,)
        "cu_seqlens": torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int(),  # (S + 1,)
        "rewards": torch.tensor([arithmetic.verify(*pair) for pair in zip(problems, responses, strict=True)]),  # (S,)
        "group_ids": (torch.arange(len(problems)) // group_size).int(),  # (S,)
        "sampling_log_prob": rollouts.log_prob[mask],  # (N,)
    }


def token_log_prob(hidden: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """(N,) log-probs of the recorded tokens, by plain PyTorch: the record must not rest on the kernels it serves."""
    log_probs = torch.log_softmax(hidden @ tensors["lm_head"].T / TEMPERATURE, dim=-1)
    return log_probs.gather(1, tensors["token_ids"].long()[:, None])[:, 0]


def summarise(tensors: dict[str, Tensor], group_size: int) -> dict[str, str]:
    """The figures that tell whether the record is a fair mix; raises if the hidden states do not give the log-probs."""
    student_log_prob = token_log_prob(tensors["student_hidden"], tensors)
    torch.testing.assert_close(student_log_prob, tensors["sampling_log_prob"], atol=1e-4, rtol=0)
    information_gain = token_log_prob(tensors["teacher_hidden"], tensors) - student_log_prob
    lengths = tensors["cu_seqlens"].diff().long()
    groups = tensors["rewards"].view(-1, group_size)
    sign = (groups - groups.mean(1, keepdim=True)).sign().flatten().repeat_interleave(lengths)
    weight = torch.exp(sign * information_gain)
    right = tensors["rewards"].bool().repeat_interleave(lengths)
    return {
        "responses, tokens": f"{len(lengths)}, {lengths.sum()}",
        "pass rate": f"{groups.mean():.1%}",
        "mean response length": f"{lengths.float().mean():.1f}",
        "mixed groups": f"{int((groups.std(1) > 0).sum())} of {len(groups)}",
        "mean |Delta|": f"{information_gain.abs().mean():.4f}",
        "sum Delta per right, wrong response": (
            f"{information_gain[right].sum() / groups.sum():.2f}, "
            f"{information_gain[~right].sum() / (1 - groups).sum():.2f}"
        ),
        "tokens with w outside [0.8, 1.2]": f"{((weight < 0.8) | (weight > 1.2)).float().mean():.1%}",
    }


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(tensors, metadata))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    """Train, record, check, write, and print what was recorded."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    console = Console()
    start = time.perf_counter()
    config = arithmetic.ArithmeticConfig(seed=arguments.seed)
    model, tokenizer, last_step = train_base(config, console)
    trained = time.perf_counter()

    problems = arithmetic.draw_problems(arguments.problems, random.Random(config.seed + 2))
    tensors = record(model, tokenizer, problems, arguments.group_size, config.seed)
    figures = summarise(tensors, arguments.group_size)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, safetensors)}
    metadata = {
        "task": " ".join(arithmetic.__doc__.split("\n\n")[1].split()),
        "problems": json.dumps([problem.prompt for problem in problems]),
        "vocabulary": json.dumps(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))),
        "model_config": model.config.to_json_string(),
        "training_config": json.dumps(asdict(config)),
        "versions": json.dumps({"python": platform.python_version(), **versions}),
        "seed": str(config.seed),
        "threads": str(arguments.threads),
        "temperature": str(TEMPERATURE),
        "command": shlex.join(["python", "benchmarks/record_rollouts.py", *sys.argv[1:]]),
    }
    write(arguments.output, tensors, metadata)

    other_problems = arithmetic.draw_problems(512, random.Random(config.seed + 3))
    student_rate = arithmetic.pass_rate(model, tokenizer, other_problems, config.seed)
    teacher_rate = arithmetic.pass_rate(model, tokenizer, other_problems, config.seed, privileged=True)
    table = Table("figure", "value", title=f"recorded rollouts, seed {config.seed}")
    table.add_row("training steps", f"{last_step.step} in {trained - start:.0f} s")
    table.add_row("training loss", f"{last_step.loss:.4f}")
    table.add_row("pass rate of student, teacher on 512 other problems", f"{student_rate:.1%}, {teacher_rate:.1%}")
    for row in figures.items():
        table.add_row(*row)
    table.add_row("file", f"{arguments.output.stat().st_size / 1e6:.2f} MB")
    console.print(table)


if __name__ == "__main__":
    main()
