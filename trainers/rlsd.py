"""RLSD and its baselines on verifiable rewards: GRPO, OPSD, SDPO and GRPO + OPSD.

    python -m trainers.rlsd --config trainers/configs/rlsd_arithmetic.yaml --method rlsd
    torchrun --nproc_per_node 8 -m trainers.rlsd --model_name_or_path Qwen/Qwen3-4B --train_dataset train.jsonl --bf16

A step samples `num_generations` responses to each of `num_prompts` prompts, has them verified, and normalises rewards
within each group to advantages. A teacher, the same network reading the prompt with privileged information, scores the
same responses. Then come `num_iterations` passes of `num_minibatches` optimizer steps each.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdkernels import lambda_schedule, rlsd_metrics
from trainers import checkpoint
from trainers.config import InputError, TrainerConfig, option
from trainers.data import Example, batch_of, load_examples, load_held_out, seed_of
from trainers.generation import Sampling
from trainers.losses import Side, call
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
from trainers.processes import gathered, rank, share, summed, world_size
from trainers.program import run
from trainers.prompts import Batch, Encoder, Privilege, by_length, privileged
from trainers.rollouts import Environment, Rollout, summary
from trainers.teacher import Teacher, copy_of, leakage, privileges
from trainers.tracking import Tracker, open_output, plot

# What the papers use (RLSD section 5.1, OPSD, SDPO's code); an option that is given takes precedence.
DEFAULTS: dict[str, dict[str, Any]] = {
    "rlsd": {"teacher": "frozen", "teacher_sync_steps": 10, "privilege": "answer"},
    "grpo": {"teacher": "live"},
    "opsd": {"teacher": "frozen", "teacher_sync_steps": 0, "privilege": "solution", "divergence": "forward_kl"},
    "sdpo": {"teacher": "ema", "privilege": "rollout", "divergence": "jsd"},
    "grpo+opsd": {"teacher": "frozen", "teacher_sync_steps": 0, "privilege": "solution", "divergence": "forward_kl"},
}
PLOTTED = (
    "reward", "eval/reward", "entropy", "evidence_clipped", "information_gain_abs", "ratio_clipped", "divergence",
    "leakage/total", "leakage/mutual_information", "gradient_norm", "tokens_per_second",
)  # fmt: skip


@dataclass(kw_only=True)
class RLSDConfig(TrainerConfig):
    """Options of `trainers.rlsd`."""

    method: Literal["rlsd", "grpo", "opsd", "sdpo", "grpo+opsd"] = option("rlsd", "what is minimised")
    num_prompts: int = option(16, "prompts per step", least=1)
    num_generations: int = option(8, "responses per prompt: the group", least=1)
    num_minibatches: int = option(1, "optimizer steps per pass over a step's responses", least=1)
    num_iterations: int = option(1, "passes over a step's responses", least=1)
    temperature: float = option(1.0, "of sampling and of the loss", above=0)
    reduction: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = option("token-mean", "of the loss")
    epsilon_low: float = option(0.2, "the importance ratio is clipped at 1 - epsilon_low", least=0, most=1)
    epsilon_high: float = option(0.28, "and at 1 + epsilon_high", least=0)
    scale_rewards: bool = option(True, "divide a group's centred rewards by their standard deviation")
    rlsd_lambda: float = option(0.5, "weight of the evidence in a token's advantage", least=0, most=1)
    rlsd_lambda_warmup_steps: int = option(0, "steps over which it rises from 0", least=0)
    rlsd_lambda_decay_steps: int = option(50, "steps over which it then falls to 0; 0: it stays", least=0)
    rlsd_clip_range: float = option(0.2, "evidence weights are clipped to 1 +- this", least=0, most=1)
    evidence_from: Literal["current", "old"] = option("current", "the student's log-probs in the evidence ratio")
    teacher: Literal["live", "frozen", "ema"] | None = option(
        None, "the policy, a copy, or a moving average; by method"
    )
    teacher_sync_steps: int | None = option(
        None, "a frozen teacher takes the policy's weights every so often; 0 never", least=0
    )
    teacher_ema_rate: float = option(0.05, "share of the policy in a step of the moving average", least=0, most=1)
    privilege: Privilege | None = option(None, "what the teacher reads besides the prompt; by method")
    privileged_template: str | None = option(None, "how it reads it, with {prompt} and {privileged}")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] | None = option(None, "of OPSD and SDPO; by method")
    divergence_top_k: int | None = option(None, "on the student's k most probable tokens and a tail", least=1)
    divergence_token_clip: float | None = option(None, "bound of a token's contribution", above=0)
    opsd_weight: float = option(1.0, "weight of OPSD's loss in grpo+opsd", least=0)
    eval_steps: int = option(20, "evaluate every so many steps", least=1)
    completions_steps: int = option(20, "print and store sample completions every so many steps; 0 never", least=0)
    eval_temperature: float = option(1.0, "of the responses that are evaluated, one per prompt", least=0)
    leakage_steps: int = option(20, "measure what can leak every so many steps; 0 never", least=0)
    leakage_prompts: int = option(4, "on so many responses, or more where processes share them unevenly", least=1)
    leakage_samples: int = option(4, "under so many samples of the privileged information each", least=2)
    leakage_tokens: int = option(256, "and on no more than so many tokens of each", least=1)

    def __post_init__(self) -> None:
        """The method's defaults, and what cannot work."""
        super().__post_init__()
        for name, value in DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.require_shares("num_prompts", block=self.num_minibatches)
        if self.num_generations < 2 and self.method != "opsd":
            raise InputError(
                f"{self.method} compares the responses of a group: num_generations must be at least 2, got 1"
            )
        template = self.privileged_template
        if template is not None and not ("{prompt}" in template and "{privileged}" in template):
            raise InputError("privileged_template must hold {prompt} and {privileged}, got " + repr(template))

    def without_effect(self) -> list[str]:
        """Options that were given another value than their own, and that nothing in this run reads."""
        policy = self.method in ("rlsd", "grpo", "grpo+opsd")
        read = {
            "epsilon": policy, "scale_rewards": policy, "rlsd": self.method == "rlsd",
            "evidence_from": self.method == "rlsd", "privilege": self.method != "grpo",
            "divergence": self.method not in ("rlsd", "grpo"), "opsd_weight": self.method == "grpo+opsd",
            "teacher_sync_steps": self.teacher == "frozen", "teacher_ema_rate": self.teacher == "ema",
        }  # fmt: skip
        unread = [name for name, is_read in read.items() if not is_read]
        usual = {entry.name: (entry.default, DEFAULTS[self.method].get(entry.name)) for entry in fields(self)}
        given = [name for name, values in usual.items() if getattr(self, name) not in values]
        return [name for name in given if any(name == part or name.startswith(f"{part}_") for part in unread)]


def train(config: RLSDConfig) -> None:
    """Train from the model, or from the last checkpoint, to `max_steps`."""
    directory = open_output(config)
    needs = {"answer": ["reference"], "solution": ["solutions"]}.get(config.privilege, [])
    examples = load_examples(config, config.train_dataset, config.train_split, needs=needs)
    held_out = load_held_out(config)
    newest = checkpoint.last(directory) if config.resume else None
    start = checkpoint.step_of(newest) if newest else 0

    model, processor = load_model(config, newest)
    encoder = Encoder(processor, config)
    copied = wrapped(copy_of(model), config, trained=False) if config.teacher != "live" else None
    policy = wrapped(model, config)
    teacher = Teacher(policy, copied, config.teacher, config.teacher_sync_steps, config.teacher_ema_rate)
    optimizer, set_rate = optimizer_for(policy, config)
    if newest:
        checkpoint.restore(newest, policy, optimizer, teacher)
    policy(check_head, encoder.batch([encoder(examples[0])], [[0]]))

    with (
        Tracker(config, start, shown=("reward", "eval/reward", "entropy")) as tracker,
        Environment(config, encoder) as environment,
    ):
        examples = encoder.short_enough(examples, config.max_prompt_length, tracker.say)
        if unread := config.without_effect():
            tracker.say(f"without effect on {config.method}: {', '.join(unread)}")
        evaluated = Sampling(config.eval_temperature)
        if held_out and not start:
            tracker.log(0, environment.evaluate(policy, held_out, evaluated, config.seed))
        for step in range(start + 1, config.max_steps + 1):
            began = time.perf_counter()
            torch.manual_seed(seed_of(config.seed, step))
            batch = batch_of(examples, config.num_prompts, step, config.seed)
            groups = sample(policy, environment, config, batch, step)
            metrics = summary(groups)
            if config.leakage_steps and step % config.leakage_steps == 0:
                metrics |= leakage(
                    policy, teacher, encoder, groups[: -(-config.leakage_prompts // world_size())],
                    samples=config.leakage_samples, max_tokens=config.leakage_tokens, temperature=config.temperature,
                    template=config.privileged_template,
                )  # fmt: skip
            set_rate(step)
            metrics |= update(policy, teacher, optimizer, encoder, config, groups, step)
            teacher.follow(step)
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
            if held_out and (step % config.eval_steps == 0 or step == config.max_steps):
                metrics |= environment.evaluate(policy, held_out, evaluated, config.seed)
            tracker.log(step, metrics)
            if config.completions_steps and step % config.completions_steps == 0:
                tracker.completions(step, gathered([rollout.recorded() for group in groups for rollout in group]))
            if step % config.save_steps == 0 or step == config.max_steps:
                checkpoint.save(directory, step, policy, optimizer, teacher, processor, config.save_total_limit)
    if rank() == 0:
        plot(directory, PLOTTED, f"{config.method} on {config.testbed or config.train_dataset}")


def sample(
    policy: nn.Module, environment: Environment, config: RLSDConfig, examples: Sequence[Example], step: int
) -> list[list[Rollout]]:
    """This process's groups: sampled, verified, with their advantages and what their teacher will read."""
    size = config.num_generations
    places = [place for place in share(range(len(examples)), block=config.num_minibatches) for _ in range(size)]
    seeds = [seed_of(config.seed, step, place, i % size) for i, place in enumerate(places)]
    sampling = Sampling(config.temperature)
    rollouts = environment.rollouts(policy, [examples[place] for place in places], seeds, sampling)
    groups = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
    for members in groups:
        rewards = torch.tensor([rollout.verdict.reward for rollout in members], dtype=torch.float64)
        spread = rewards.std() + 1e-6 if config.scale_rewards and len(members) > 1 else 1.0
        for rollout, advantage in zip(members, ((rewards - rewards.mean()) / spread).tolist(), strict=True):
            rollout.advantage = advantage
    for i, (seed, rollout) in enumerate(zip(seeds, rollouts, strict=True)):
        if config.privilege and (texts := privileges(config.privilege, rollout, groups[i // size])):
            rollout.teacher_prompt = environment.encoder(
                privileged(
                    rollout.example, config.privilege, random.Random(seed).choice(texts), config.privileged_template
                )
            )
    return groups


def update(
    policy: nn.Module,
    teacher: Teacher,
    optimizer: Optimizer,
    encoder: Encoder,
    config: RLSDConfig,
    groups: Sequence[Sequence[Rollout]],
    step: int,
) -> dict[str, float]:
    """The optimizer steps on one step's rollouts; returns means over tokens."""
    lam = lambda_schedule(
        step - 1, peak=config.rlsd_lambda, warmup_steps=config.rlsd_lambda_warmup_steps,
        decay_steps=config.rlsd_lambda_decay_steps,
    )  # fmt: skip
    reads_teacher = config.method != "grpo" and (config.method != "rlsd" or lam > 0)
    if config.num_minibatches * config.num_iterations > 1:
        score(policy, encoder, config, [rollout for group in groups for rollout in group])
    totals: dict[str, Tensor] = {}
    tokens, norms, total = 0, [], 0.0
    for minibatch in list(range(config.num_minibatches)) * config.num_iterations:
        rollouts = [rollout for group in groups[minibatch :: config.num_minibatches] for rollout in group]
        normalizers = [max(1.0, count) / world_size() for count in summed(counts(config, rollouts))]
        parts = by_length(rollouts, config.per_device_train_batch_size, Rollout.length)
        for i, part in enumerate(parts):
            told = teacher.side(batch_for(encoder, part, of_teacher=True)) if reads_teacher else None
            with accumulating(policy, more=i + 1 < len(parts)):
                loss, metrics = policy(loss_of, config, part, batch_for(encoder, part), told, lam, normalizers)
                loss.backward()
            total = total + loss.detach()
            size = sum(map(Rollout.length, part))
            tokens += size
            totals = {name: totals.get(name, 0.0) + size * value for name, value in metrics.items()}
        norms.append(optimizer_step(policy, optimizer, config.max_grad_norm))
    total, tokens, *sums = summed([float(total), tokens, *map(float, totals.values())])
    metrics = {name: value / tokens for name, value in zip(totals, sums, strict=True)}
    if "divergence" in metrics:  # over the tokens that have a teacher
        metrics["divergence"] /= metrics["taught"] or 1.0
    for name in ("evidence_clipped", "ratio_clipped"):
        if f"{name}_below" in metrics:
            metrics[name] = metrics[f"{name}_below"] + metrics[f"{name}_above"]
    return {
        "loss": total / world_size() / len(norms), **metrics, "gradient_norm": sum(norms) / len(norms), "lambda": lam,
        "learning_rate": optimizer.param_groups[0]["lr"], "tokens": tokens / config.num_iterations,
    }  # fmt: skip


def counts(config: RLSDConfig, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """What the reduction divides by, tokens or sequences: of all rollouts, and of those with a teacher."""
    sizes = [rollout.length() if config.reduction == "token-mean" else 1 for rollout in rollouts]
    return sum(sizes), sum(size for size, rollout in zip(sizes, rollouts, strict=True) if rollout.teacher_prompt)


def loss_of(
    model: nn.Module,
    config: RLSDConfig,
    rollouts: Sequence[Rollout],
    batch: Batch,
    teacher: Side | None,
    lam: float,
    normalizers: Sequence[float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and, detached, means over its tokens."""
    student = response_side(model, batch)
    lengths = torch.tensor([rollout.length() for rollout in rollouts], device=student.hidden.device)
    token_ids = batch.response_ids
    taught = lengths.new_tensor([rollout.teacher_prompt is not None for rollout in rollouts]).repeat_interleave(lengths)
    shared = {
        "temperature": config.temperature, "reduction": config.reduction,
        "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    }  # fmt: skip
    loss, metrics = torch.zeros((), device=lengths.device), {}
    if config.method not in ("opsd", "sdpo"):
        clips = {"epsilon_low": config.epsilon_low, "epsilon_high": config.epsilon_high}
        advantages = torch.tensor([rollout.advantage for rollout in rollouts], device=lengths.device)
        old = None if rollouts[0].old_log_prob is None else torch.cat([rollout.old_log_prob for rollout in rollouts])
        arguments = token_ids, advantages, old
        if config.method == "rlsd" and teacher is not None:
            output = call(
                config.head, "rlsd_loss", student, teacher, *arguments, lam=lam, clip_range=config.rlsd_clip_range,
                credit_mask=taught, evidence_from=config.evidence_from, normalizer=normalizers[0], **clips, **shared,
            )  # fmt: skip
        else:
            output = call(
                config.head, "grpo_loss", student, None, *arguments, normalizer=normalizers[0], **clips, **shared
            )
        loss, metrics = output.loss, rlsd_metrics(output, clip_range=config.rlsd_clip_range, **clips)
    if config.method in ("opsd", "sdpo", "grpo+opsd"):
        output = call(
            config.head, "opsd_loss", student, teacher, divergence=config.divergence, top_k=config.divergence_top_k,
            token_clip=config.divergence_token_clip, token_weight=taught.float(), normalizer=normalizers[1], **shared,
        )  # fmt: skip
        loss = loss + (config.opsd_weight if config.method == "grpo+opsd" else 1.0) * output.loss
        metrics |= {"taught": taught.float().mean(), "divergence": (taught * output.divergence.detach()).mean()}
    if "entropy" not in metrics:
        with torch.no_grad():
            scored = call(config.head, "token_log_prob", student, None, token_ids, config.temperature)
        metrics["entropy"] = scored.entropy.mean()
    return loss, metrics


def batch_for(encoder: Encoder, rollouts: Sequence[Rollout], of_teacher: bool = False) -> Batch:
    """What the policy, or the teacher, reads to score the rollouts."""
    prompts = [(rollout.teacher_prompt if of_teacher else None) or rollout.prompt for rollout in rollouts]
    return encoder.batch(prompts, [rollout.response.token_ids for rollout in rollouts])


def score(policy: nn.Module, encoder: Encoder, config: RLSDConfig, rollouts: Sequence[Rollout]) -> None:
    """Give rollouts the log-probs of the policy that sampled them."""
    for part in by_length(rollouts, config.per_device_train_batch_size, Rollout.length):
        with inference(policy):
            log_prob = policy(_log_prob, config, batch_for(encoder, part))
        for rollout, values in zip(part, log_prob.split([rollout.length() for rollout in part]), strict=True):
            rollout.old_log_prob = values


def _log_prob(model: nn.Module, config: RLSDConfig, batch: Batch) -> Tensor:
    student = response_side(model, batch)
    return call(config.head, "token_log_prob", student, None, batch.response_ids, config.temperature).log_prob


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run(RLSDConfig, train, __doc__, argv)


if __name__ == "__main__":
    main()
