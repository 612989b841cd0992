"""Record the rollouts that the benchmarks run on: real student and teacher rows, instead of noise.

Takes the small Qwen3 of the arithmetic testbed (trainers/arithmetic.py), samples a group of responses to each of
several problems, has them verified, and scores every response token twice: by the student, which reads the question,
and by the teacher, the same network reading the right answer first. What is kept are the final hidden states, after the
last norm: times the LM head they give back the logits of both. Tokens are packed, so the file holds no padding, and
responses are sampled from the full softmax over a vocabulary whose every row is in use, so no logit has to be masked.

The same seed, versions, thread count and CPU give the same tensors.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the trainers are no installed package
from trainers.config import TrainerConfig  # noqa: E402
from trainers.data import load_examples, seed_of  # noqa: E402
from trainers.generation import Sampling  # noqa: E402
from trainers.policy import Policy, inferred_side, load_model  # noqa: E402
from trainers.prompts import Encoder, privileged  # noqa: E402
from trainers.rollouts import Environment  # noqa: E402
from trainers.testbeds import with_testbed  # noqa: E402

TEMPERATURE = 1.0
TEMPLATE = "H{privileged}|{prompt}"
OUTPUT = ROOT / "benchmarks" / "data" / "rollouts.safetensors"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--problems", type=int, default=16, help="number of groups")
    parser.add_argument("--group-size", type=int, default=8, help="responses sampled for each problem")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number rounds differently")
    parser.add_argument("--testbed-dir", default="runs/testbeds", help="where testbeds are kept once made")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write the safetensors file")
    return parser.parse_args()


def record(config: TrainerConfig, problems: int, group_size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Sample `group_size` responses per problem and score them under both prompts: tensors and metadata of the file."""
    model, processor = load_model(config)
    policy, encoder = Policy(model, bf16=False), Encoder(processor, config)
    asked = load_examples(config, config.eval_dataset, config.eval_split)[:problems]
    examples = [example for example in asked for _ in range(group_size)]
    seeds = [seed_of(config.seed, i) for i in range(len(examples))]
    with Environment(config, encoder) as environment:
        rollouts = environment.rollouts(policy, examples, seeds, Sampling(TEMPERATURE))
    responses = [rollout.response.token_ids for rollout in rollouts]
    taught = [encoder(privileged(example, "answer", example.reference, TEMPLATE)) for example in examples]
    student = inferred_side(policy, batch := encoder.batch([rollout.prompt for rollout in rollouts], responses))
    teacher = inferred_side(policy, encoder.batch(taught, responses))
    tensors = {
        "student_hidden": student.hidden,  # (N, H)
        "teacher_hidden": teacher.hidden,  # (N, H)
        "lm_head": student.weight.detach().clone(),  # (V, H)
        "token_ids": batch.response_ids.int(),  # (N,)
        "cu_seqlens": torch.tensor([0, *map(len, responses)]).cumsum(0).int(),  # (S + 1,)
        "rewards": torch.tensor([rollout.verdict.reward for rollout in rollouts]),  # (S,)
        "group_ids": (torch.arange(len(examples)) // group_size).int(),  # (S,)
    }
    tensors["sampling_log_prob"] = token_log_prob(tensors["student_hidden"], tensors)  # (N,)
    metadata = {
        "problems": json.dumps([example.prompt for example in asked]),
        "vocabulary": json.dumps(encoder.tokenizer.convert_ids_to_tokens(range(len(encoder.tokenizer)))),
        "model_config": model.config.to_json_string(),
    }
    return tensors, metadata


def token_log_prob(hidden: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """(N,) log-probs of the recorded tokens, by plain PyTorch: the record must not rest on the kernels it serves."""
    log_probs = torch.log_softmax(hidden @ tensors["lm_head"].T / TEMPERATURE, dim=-1)
    return log_probs.gather(1, tensors["token_ids"].long()[:, None])[:, 0]


def summarise(tensors: dict[str, Tensor], group_size: int) -> dict[str, str]:
    """The figures that tell whether the record is a fair mix."""
    information_gain = token_log_prob(tensors["teacher_hidden"], tensors) - tensors["sampling_log_prob"]
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
    """Record, write, and print what was recorded."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    config = with_testbed(
        TrainerConfig(
            testbed="arithmetic", testbed_dir=arguments.testbed_dir, max_completion_length=28,
            seed=arguments.seed, per_device_generation_batch_size=arguments.problems * arguments.group_size,
        )
    )  # fmt: skip
    tensors, metadata = record(config, arguments.problems, arguments.group_size)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, safetensors)}
    metadata |= {
        "versions": json.dumps({"python": platform.python_version(), **versions}),
        "seed": str(arguments.seed),
        "threads": str(arguments.threads),
        "temperature": str(TEMPERATURE),
        "command": shlex.join(["python", "benchmarks/record_rollouts.py", *sys.argv[1:]]),
    }
    write(arguments.output, tensors, metadata)
    table = Table("figure", "value", title=f"recorded rollouts, seed {arguments.seed}")
    for row in summarise(tensors, arguments.group_size).items():
        table.add_row(*row)
    table.add_row("file", f"{arguments.output.stat().st_size / 1e6:.2f} MB")
    Console().print(table)


if __name__ == "__main__":
    main()
