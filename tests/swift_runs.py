"""Runs of ms-swift's GRPO on a tiny model in this process, with all that a loss depends on; and that loss, densely."""

import copy
import json
from contextlib import contextmanager
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
ROLLOUTS = 4  # of a prompt
SMALL = {
    "model_type": "qwen3", "template": "qwen3", "use_hf": True, "check_model": False,  # or it asks a hub three times
    "use_vllm": False, "torch_dtype": "float32", "num_generations": ROLLOUTS, "per_device_train_batch_size": ROLLOUTS,
    "gradient_accumulation_steps": 1, "max_completion_length": 8, "save_strategy": "no", "eval_strategy": "no",
    "logging_steps": 1, "report_to": "none", "dataset_num_proc": 1, "dataloader_num_workers": 0,
}  # fmt: skip
REWARDS = """
from swift.rewards import ORM, orms


class Letters(ORM):
    def __call__(self, completions, **columns):
        return [sum(map(ord, text)) % 100 / 100 for text in completions]


orms["letters"] = Letters
"""


def options(**given):
    """A command line of `swift rlhf`."""
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def write_model(directory):
    """A tiny Qwen3 that does not end its responses, as ms-swift cannot take an empty one, and likes 7 and 9."""
    tiny.save_model(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 3
        model.lm_head.weight[: len(tiny.SPECIAL), 0] = -4
        model.lm_head.weight[tiny.tokenizer().convert_tokens_to_ids(["7", "9"]), 0] = 0.7
    model.save_pretrained(directory)
    return directory


def write_rows(directory, count=8):
    """Prompts of different lengths; in rlsd.jsonl with the same for a teacher, who reads the answer."""
    prompts = [f"Say {'very ' * (i % 3)}{i}:" for i in range(count)]
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    tiny.write_rows(directory / "grpo.jsonl", rows)
    teachers = [{"teacher_prompt": f"{prompt} The answer is {i}."} for i, prompt in enumerate(prompts)]
    tiny.write_rows(directory / "rlsd.jsonl", [a | b for a, b in zip(rows, teachers, strict=True)])


@contextmanager
def recording(steps):
    """Append to `steps` what each optimiser step of a GRPO run depends on, and what came of it."""
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

    host = {name: getattr(GRPOTrainer, name) for name in
            ("_postprocess_batch", "_collate_teacher_opsd_batch", "compute_loss", "training_step")}  # fmt: skip
    teachers, rewards = [], []

    def collate_teacher(self, *arguments):
        found = host["_collate_teacher_opsd_batch"](self, *arguments)
        teachers.append(copy.deepcopy(found))
        return found

    def postprocess(self, samples, batches):
        rewards.extend(self._rewards_per_func.sum(1).view(-1, ROLLOUTS).tolist())
        host["_postprocess_batch"](self, samples, batches)

    def compute_loss(self, model, inputs, *arguments, **named):
        step = SimpleNamespace(
            inputs=copy.deepcopy(inputs["model_inputs"]), batch=copy.deepcopy(inputs["grpo_batch"]),
            rewards=rewards[len(steps)], teacher=teachers[len(steps)] if teachers else None,
            weights={name: weight.detach().clone() for name, weight in model.named_parameters()},
            temperature=self.temperature,
        )  # fmt: skip
        steps.append(step)
        loss = host["compute_loss"](self, model, inputs, *arguments, **named)
        step.loss = loss.item()
        return loss

    def training_step(self, model, *arguments):
        result = host["training_step"](self, model, *arguments)
        steps[-1].gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        return result

    with pytest.MonkeyPatch.context() as patch:
        for name, function in zip(host, (postprocess, collate_teacher, compute_loss, training_step), strict=True):
            patch.setattr(GRPOTrainer, name, function)
        yield


def steps_of(directory, dataset, **given):
    """The steps of one run in this process: one generation for all of them, so that ratios leave 1."""
    from swift import rlhf_main

    (directory / "rewards.py").write_text(REWARDS)
    steps = []
    count = 3
    run = SMALL | {
        "rlhf_type": "grpo", "model": directory / "model", "dataset": directory / dataset, "max_steps": count,
        "steps_per_generation": count, "reward_funcs": "letters", "external_plugins": directory / "rewards.py",
        "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.03, "max_grad_norm": 1000,
        "tuner_type": "full", "beta": 0, "output_dir": directory / "out",
    } | given  # fmt: skip
    with recording(steps):
        rlhf_main(options(**run))
    assert len(steps) == count
    return steps


def dense_log_prob(directory, weights, inputs, keep, temperature):
    """Log-probs of the last `keep` tokens by a model with these weights, head and softmax in float64; and the model."""
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(directory / "model"))
    model.load_state_dict(weights)
    names = ("input_ids", "attention_mask", "position_ids")
    hidden = model.model(**{name: inputs[name] for name in names if name in inputs}).last_hidden_state
    logits = hidden[:, -(keep + 1) : -1].double() @ model.lm_head.weight.double().T / temperature
    return logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -keep:, None])[..., 0], model


def dense_step(directory, first, step, lam, clip_range):
    """Loss, gradients, ratios and evidence weights of a step from its inputs, and from the weights that sampled.

    Advantages are the rewards' group-normalised, as ms-swift has them, and weighed by the evidence of the policy that
    sampled; the loss is the mean over sequences of their tokens' mean.
    """
    keep, mask = step.batch.logits_to_keep, step.batch.completion_mask.bool()
    with torch.no_grad():
        old, _ = dense_log_prob(directory, first.weights, step.inputs, keep, step.temperature)
        teacher_inputs, teacher_batch = step.teacher
        theirs, _ = dense_log_prob(directory, first.weights, teacher_inputs, teacher_batch.logits_to_keep,
                                   step.temperature)  # fmt: skip
    teacher = torch.zeros_like(old)
    teacher[mask] = theirs[teacher_batch.completion_mask.bool()]
    rewards = torch.tensor(step.rewards, dtype=torch.float64)
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).unsqueeze(-1).expand_as(old)
    weighed = oracles.evidence(old, teacher, advantages, clip_range=clip_range, lam=lam, keep=mask)
    log_prob, model = dense_log_prob(directory, step.weights, step.inputs, keep, step.temperature)
    loss = oracles.policy_loss(log_prob.detach(), weighed.advantage, mask, old, reduction="seq-mean-token-mean")
    (log_prob * loss.slope).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return SimpleNamespace(loss=loss.loss.item(), gradients=gradients, ratio=loss.ratio[mask],
                           weight=weighed.weight[mask])  # fmt: skip


def assert_same_step(found, expected, tolerance):
    """Losses to `tolerance`; gradients each to that share of its norm, and 5e-7 of the norm of all.

    The latter because attention's are small differences of what flows back from the head.
    """
    assert found.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name].double() - gradient.double()).norm()
        assert error <= tolerance * gradient.norm() + 5e-7 * whole, f"{name}: {error / gradient.norm():.2g}"


def logged(output):
    """The steps that a run wrote down."""
    (path,) = output.rglob("logging.jsonl")
    return [row for line in path.read_text().splitlines() if "loss" in (row := json.loads(line))]
