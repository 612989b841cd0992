"""TRL trainers on tiny models: what each optimizer step saw and did."""

import copy
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
from datasets import Dataset
from transformers import TrainerCallback

SMALL = {
    "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}  # fmt: skip
ONLINE = SMALL | {"num_generations": 4, "max_completion_length": 8}


def reward(completions, **columns):
    """Varies within a group and depends on the completion alone."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [float(sum(map(ord, text)) % 3 == 0) for text in texts]


def questions(count=16):
    return Dataset.from_list(
        [{"prompt": row["prompt"], "privileged_context": row["reference"]} for row in tiny.rows(count)]
    )


def samples(count=16):
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["solutions"][0]} for row in tiny.rows(count)])


class Steps(TrainerCallback):
    """The gradients of each optimizer step, clipped as they are used."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trained(trainer_class, config_class, model, directory, dataset, rewards=(), resume=None, **options):
    """A trainer after its steps, with `gradients` of each and `losses` logged."""
    peft_config, settings = (
        options.pop("peft_config", None),
        (ONLINE if rewards or "num_generations" in options else SMALL),
    )
    config = config_class(output_dir=str(directory), **settings | options)
    steps = Steps()
    more = {"peft_config": peft_config} if peft_config is not None else {}
    trainer = trainer_class(
        str(model) if isinstance(model, Path) else model,
        *((list(rewards),) if rewards else ()),
        args=config,
        train_dataset=dataset,
        callbacks=[steps],
        **more,
    )
    trainer.start = copy.deepcopy(trainer.model.state_dict())
    trainer.train(resume_from_checkpoint=resume)
    trainer.gradients = steps.gradients
    trainer.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return trainer


def apart(found, expected):
    """The largest relative distance between gradients of two runs, step by step, each as one vector."""
    assert len(found) == len(expected) > 0
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        assert sorted(mine) == sorted(theirs)
        flat = [torch.cat([x[name].double().flatten() for name in sorted(x)]) for x in (mine, theirs)]
        worst = max(worst, float((flat[0] - flat[1]).norm() / flat[1].norm()))
    return worst
