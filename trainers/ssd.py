"""SSD, Simple Self-Distillation: sample once from the frozen base, truncated and tempered, and fine-tune on that.

    python -m trainers.ssd --config trainers/configs/ssd_stdlib.yaml
    torchrun --nproc_per_node 8 -m trainers.ssd --model_name_or_path Qwen/Qwen3-4B --train_dataset prompts.jsonl --bf16

1. One response per prompt from the base at (T_train, top-k, top-p); only empty answers and one-line stubs are dropped.
   The base's truncated support is recorded at every token, so that the base need not stay in memory.
2. Fine-tuning: on the samples by cross-entropy (`--objective sampled`, the paper's), or on its expectation over the
   next token (`expected`: `ssd_loss` against the recorded support).
3. Decoding held-out problems at (T_eval, top-k, top-p): pass@1 and pass@5, against the base at its best temperature.

Each part leaves files behind and is not done again on resuming.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sdkernels import Support, load_support, save_support
from trainers import checkpoint
from trainers.config import InputError, TrainerConfig, option
from trainers.data import Example, batch_of, load_examples, load_held_out, seed_of
from trainers.evaluation import correct_counts, mean_and_error, paired_difference, pass_at_k
from trainers.generation import Sampling
from trainers.losses import call
from trainers.policy import (
    accumulating,
    check_head,
    inference,
    load_model,
    optimizer_for,
    optimizer_step,
    response_side,
    wrapped,
)
from trainers.processes import barrier, gathered, padded_share, rank, share, summed, world_size
from trainers.program import run
from trainers.prompts import Batch, Encoder, Prompt, by_length
from trainers.rollouts import Environment, Rollout
from trainers.tracking import Tracker, open_output, plot, write_json, write_lines

TERMS = ("support_compression", "within_support_reshaping", "base_alignment", "constant", "cross_entropy", "kept_mass")
PLOTTED = ("loss", *TERMS[:3], "kept_mass", "gradient_norm", "tokens_per_second")


@dataclass(kw_only=True)
class SSDConfig(TrainerConfig):
    """Options of `trainers.ssd`."""

    objective: Literal["sampled", "expected"] = option("sampled", "cross-entropy on samples, or its expectation")
    train_temperature: float = option(1.6, "T_train, at which the base is sampled", above=0)
    train_top_k: int | None = option(20, "truncation of the base while sampling; 0: none", least=0)
    train_top_p: float | None = option(0.8, "likewise; 1: none", above=0, most=1)
    support_size: int = option(
        64, "tokens of the base's support that are recorded; larger ones are renormalised", least=1
    )
    stub_length: int = option(
        10, "responses of one line with fewer characters are dropped as stubs; 0: none are", least=0
    )
    chunk_size: int = option(128, "prompts that are sampled and recorded at a time", least=1)
    num_train_prompts: int | None = option(None, "prompts to sample from; default: all", least=1)
    train_batch_size: int = option(32, "samples per step", least=1)
    terms_steps: int = option(5, "log the three terms of the loss every so many steps", least=1)
    eval_samples: int = option(10, "responses per held-out prompt and setting; pass@5 needs 5", least=5)
    eval_decodes: list[str] = option(["0.7/20/0.8", "0.9/20/0.8", "1.1/20/0.8", "1.0"], "T_eval/top-k/top-p")
    base_decodes: list[str] = option(["0.3/20/0.8", "0.5/20/0.8", "0.7/20/0.8", "0.9/20/0.8", "1.0"], "of the base")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        super().__post_init__()
        self.require_shares("train_batch_size")
        if not self.base_decodes or not self.eval_decodes:
            raise InputError("base_decodes and eval_decodes must not be empty")
        for decode in (*self.base_decodes, *self.eval_decodes):
            Sampling.parse(decode)


class Sample(NamedTuple):
    """A response of the base, and where its support at each token is recorded: a file and its rows."""

    prompt: Prompt
    token_ids: list[int]
    file: Path
    rows: slice


def train(config: SSDConfig) -> None:
    """All three parts."""
    directory = open_output(config)
    examples = load_examples(config, config.train_dataset, config.train_split, verified=False)
    examples = examples[: config.num_train_prompts]
    held_out = load_held_out(config)
    newest = checkpoint.last(directory) if config.resume else None
    start = checkpoint.step_of(newest) if newest else 0

    model, processor = load_model(config, newest)
    encoder = Encoder(processor, config)
    policy = wrapped(model, config)
    optimizer, set_rate = optimizer_for(policy, config)
    if newest:
        checkpoint.restore(newest, policy, optimizer, None)
    policy(check_head, encoder.batch([encoder(examples[0])], [[0]]))

    with (
        Tracker(config, start, shown=("loss", *TERMS[:3])) as tracker,
        Environment(config, encoder) as environment,
    ):
        examples = encoder.short_enough(examples, config.max_prompt_length, tracker.say)
        if not newest:
            record(policy, environment, config, examples, tracker)
            evaluate(policy, environment, config, held_out, "base", config.base_decodes, 0, tracker)
        samples = recorded(directory, encoder, examples, tracker)
        for step in range(start + 1, config.max_steps + 1):
            began = time.perf_counter()
            torch.manual_seed(seed_of(config.seed, step))
            set_rate(step)
            batch = share(batch_of(samples, config.train_batch_size, step, config.seed))
            metrics = update(policy, optimizer, encoder, config, batch, step)
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
            tracker.log(step, metrics)
            if step % config.save_steps == 0 or step == config.max_steps:
                checkpoint.save(directory, step, policy, optimizer, None, processor, config.save_total_limit)
        evaluate(policy, environment, config, held_out, "student", config.eval_decodes, config.max_steps, tracker)
        if rank() == 0:
            plot(directory, PLOTTED, f"SSD ({config.objective}) on {config.testbed or config.train_dataset}")
            if held_out:
                report(directory, tracker)


def record(
    policy: nn.Module, environment: Environment, config: SSDConfig, examples: Sequence[Example], tracker: Tracker
) -> None:
    """Sample the base, a chunk of prompts after the other, and record its support at every sampled token."""
    folder = Path(config.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    sampling = Sampling(config.train_temperature, config.train_top_k, config.train_top_p)
    starts = range(0, len(examples), config.chunk_size)
    missing = [start for start in starts if not (folder / f"{start:07d}.jsonl").exists()]
    for start in tracker.track(missing, "sampling the base"):
        local, weights = padded_share(examples[start : start + config.chunk_size])
        seeds = [seed_of(config.seed, "sample", example.source) for example in local]
        rollouts = environment.rollouts(policy, local, seeds, sampling, verified=False)
        rows = []
        for part in by_length(list(zip(rollouts, weights, strict=True)), config.per_device_train_batch_size, _length):
            prompts, responses = [r.prompt for r, _ in part], [r.response.token_ids for r, _ in part]
            with inference(policy):
                q = policy(support_of, config, environment.encoder.batch(prompts, responses)).to("cpu")
            pieces = zip(*(values.split([len(response) for response in responses]) for values in q[:3]), strict=True)
            rows += [(r.recorded(), Support(*piece, q.temperature))
                     for (r, weight), piece in zip(part, pieces, strict=True) if weight]  # fmt: skip
        order = {example.source: place for place, example in enumerate(examples)}
        rows = sorted(gathered(rows), key=lambda row: order[row[0]["source"]])  # whatever the number of processes
        kept = [(row, q) for row, q in rows if not is_stub(row["response"], config.stub_length)]
        if rank() == 0:
            first = {"dropped": len(rows) - len(kept), "tokens": 0, "cut": 0}
            if kept:
                q = joined([q for _, q in kept])
                first |= {"tokens": len(q.size), "cut": int((q.size > config.support_size).sum())}
                save_support(folder / f"{start:07d}.safetensors", q)
            write_lines(folder / f"{start:07d}.jsonl", [first, *(row for row, _ in kept)])
    barrier()


def _length(item: tuple[Rollout, float]) -> int:
    return item[0].length()


def support_of(model: nn.Module, config: SSDConfig, batch: Batch) -> Support:
    """q at the tokens of a batch."""
    filters = {"top_k": config.train_top_k, "top_p": config.train_top_p, "max_size": config.support_size}
    return call(
        config.head, "truncated_support", response_side(model, batch), None, config.train_temperature, **filters
    )


def joined(supports: Sequence[Support]) -> Support:
    """One support after the other."""
    columns = zip(*(support[:3] for support in supports), strict=True)
    return Support(*map(torch.cat, columns), supports[0].temperature)


def is_stub(text: str, length: int) -> bool:
    """Whether an answer is empty, or a single line of fewer than `length` characters."""
    text = text.strip()
    return not text or ("\n" not in text and len(text) < length)


def recorded(directory: Path, encoder: Encoder, examples: Sequence[Example], tracker: Tracker) -> list[Sample]:
    """All samples; what was dropped and cut is said."""
    by_source = {example.source: example for example in examples}
    samples: list[Sample] = []
    counts: Counter[str] = Counter()
    for path in sorted((directory / "samples").glob("*.jsonl")):
        first, *kept = map(json.loads, path.read_text().splitlines())
        counts.update(first)
        at = 0
        for row in kept:
            rows = slice(at, at := at + len(row["token_ids"]))
            prompt = encoder(by_source[row["source"]])
            samples.append(Sample(prompt, row["token_ids"], path.with_suffix(".safetensors"), rows))
    if not samples:
        raise InputError("every sample was empty or a stub (stub_length); there is nothing to train on")
    tracker.say(f"{len(samples)} samples of {counts['tokens']} tokens; {counts['dropped']} dropped; "
                f"{counts['cut'] / counts['tokens']:.1%} of supports cut to support_size")  # fmt: skip
    return samples


def update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    encoder: Encoder,
    config: SSDConfig,
    samples: Sequence[Sample],
    step: int,
) -> dict[str, float]:
    """One optimizer step; returns the loss, and means of its terms over tokens."""
    terms = config.objective == "expected" or step % config.terms_steps == 0
    (tokens,) = summed([sum(len(sample.token_ids) for sample in samples)])
    total, sums = 0.0, dict.fromkeys(TERMS, 0.0) if terms else {}
    parts = by_length(samples, config.per_device_train_batch_size, lambda sample: len(sample.token_ids))
    for i, part in enumerate(parts):
        batch = encoder.batch([sample.prompt for sample in part], [sample.token_ids for sample in part])
        q = joined([load_support(sample.file, sample.rows) for sample in part])
        with accumulating(policy, more=i + 1 < len(parts)):
            loss, metrics = policy(loss_of, config, batch, q.to(batch.input_ids.device), tokens / world_size(), terms)
            loss.backward()
        total = total + loss.detach()
        sums = {name: value + metrics[name] for name, value in sums.items()}
    norm = optimizer_step(policy, optimizer, config.max_grad_norm)
    total, *values = summed([float(total) / world_size(), *(float(value) / tokens for value in sums.values())])
    return {"loss": total, **dict(zip(sums, values, strict=True)), "gradient_norm": norm, "tokens": tokens,
            "learning_rate": optimizer.param_groups[0]["lr"]}  # fmt: skip


def loss_of(
    model: nn.Module, config: SSDConfig, batch: Batch, support: Support, normalizer: float, terms: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and, detached, sums of its terms over tokens."""
    student = response_side(model, batch)
    sampled = config.objective == "sampled"
    if sampled:
        loss = -call(config.head, "token_log_prob", student, None, batch.response_ids).log_prob.sum() / normalizer
    if not terms:
        return loss, {}
    with torch.set_grad_enabled(not sampled):
        output = call(config.head, "ssd_loss", student, support, config.train_temperature, normalizer=normalizer)
    sums = {name: getattr(output.terms, name).detach().sum() for name in TERMS}
    return (loss if sampled else output.loss), sums


def evaluate(
    policy: nn.Module,
    environment: Environment,
    config: SSDConfig,
    examples: Sequence[Example],
    who: str,
    decodes: Sequence[str],
    step: int,
    tracker: Tracker,
) -> None:
    """Count right responses under every decode, into evaluation/<who>-<number>.json.

    The base is sampled once more under its first decode: how hard a problem is must not rest on what it is judged by.
    """
    folder = Path(config.output_dir) / "evaluation"
    folder.mkdir(exist_ok=True)
    asked = [(who, decode, config.seed) for decode in decodes]
    if who == "base":
        asked.append(("difficulty", decodes[0], seed_of(config.seed, "difficulty")))
    for number, (name, decode, seed) in enumerate(tracker.track(asked if examples else [], f"decoding, {who}")):
        path = folder / f"{name}-{number}.json"
        entry = {"model": name, "decode": decode, "samples": config.eval_samples, "step": step}
        if not path.exists() or not entry.items() <= json.loads(path.read_text()).items():
            right, failed = correct_counts(
                environment, policy, examples, Sampling.parse(decode), config.eval_samples, seed
            )
            barrier()  # all have looked for the file
            if failed:
                tracker.say(f"{name}, {decode}: {failed} of {len(right) * config.eval_samples} verifications failed")
            if rank() == 0:
                write_json(path, entry | {"correct": right, "verifier_failures": failed})
    barrier()


def report(directory: Path, tracker: Tracker) -> None:
    """Every decode against the base under the same and under its best one, as report.json and a table."""
    entries = [json.loads(path.read_text()) for path in sorted((directory / "evaluation").glob("*.json"))]
    (difficulty,) = (entry["correct"] for entry in entries if entry["model"] == "difficulty")
    hard = sorted(range(len(difficulty)), key=difficulty.__getitem__)[: len(difficulty) // 3 or 1]
    rates = {
        (entry["model"], entry["decode"], k): [pass_at_k(entry["samples"], c, k) for c in entry["correct"]]
        for entry in entries
        for k in (1, 5)
    }
    decodes = [decode for model, decode, k in rates if (model, k) == ("base", 1)]
    best = {
        k: max(decodes, key=lambda decode, k=k: mean_and_error(rates["base", decode, k]).mean)  # type: ignore[misc]
        for k in (1, 5)
    }
    rows = []
    for model, decode, k in rates:
        if k == 1 and model != "difficulty":
            row: dict[str, Any] = {"model": model, "decode": decode}
            for k in best:
                name, found = f"pass@{k}", rates[model, decode, k]
                against = {"best": rates["base", best[k], k]}
                against |= {"same": rates["base", decode, k]} if decode in decodes else {}
                row |= {name: mean_and_error(found), f"hard {name}": mean_and_error([found[i] for i in hard])}
                row |= {f"{name} - {which} base": paired_difference(found, base) for which, base in against.items()}
            rows.append(row)
    write_json(
        directory / "report.json", {"best base decode": best[1], "best base decode of pass@5": best[5], "rows": rows}
    )
    shown = ("model", "decode", "pass@1", "pass@1 - best base", "pass@1 - same base", "pass@5", "hard pass@5")
    table = [{name: row.get(name, "") for name in shown} for row in rows]
    tracker.table(f"held-out problems; the base's best decode is {best[1]}", table)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run(SSDConfig, train, __doc__, argv)


if __name__ == "__main__":
    main()
