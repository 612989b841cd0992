"""Where verl's PPO trainer (v1) gets a privileged teacher from: the actor itself, or verl's teacher servers.

Nothing imports this but the user who chooses one of them: VERL_USE_EXTERNAL_MODULES=sdkernels.integrations.verl.trainer
with trainer.v1.trainer_mode=rlsd, or rollout.agent.agent_loop_manager_class. docs/verl.md says when which.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
import transfer_queue
from torch.nn.functional import pad
from verl.experimental.agent_loop import AgentLoopWorker
from verl.trainer.distillation import distillation_ppo_loss
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, AgentLoopWorkerTQ, PPOTrainerSync, register_trainer
from verl.utils.config import omega_conf_to_dataclass

from sdkernels.integrations.hosts import check_host
from sdkernels.integrations.verl.loss import RLSDLossConfig
from sdkernels.integrations.verl.teacher import privileged_prompt_ids, score_privileged

check_host("verl", "0.9.1", "verl>=0.9,<0.10", {
    "verl.trainer.distillation:distillation_ppo_loss": "config, distillation_config, model_output, data",
    "verl.trainer.ppo.v1:PPOTrainerSync._setup": "self",
    "verl.trainer.ppo.v1:PPOTrainerSync._compute_old_log_prob": "self, batch, metrics",
    "verl.experimental.agent_loop:AgentLoopWorker._compute_teacher_logprobs":
        "self, output, prompt_ids, response_ids, validate, sample_kwargs",
})  # fmt: skip


def _rlsd_options(config: Any) -> tuple[Any, RLSDLossConfig]:
    """`distillation` of verl's whole config, and RLSD's part of it."""
    distillation = omega_conf_to_dataclass(config.distillation)
    options = distillation.distillation_loss
    if not isinstance(options, RLSDLossConfig):
        raise TypeError("set distillation.distillation_loss._target_=sdkernels.integrations.verl.RLSDLossConfig, "
                        f"got a {type(options).__name__}")  # fmt: skip
    return distillation, options


@register_trainer("rlsd")
class RLSDTrainer(PPOTrainerSync):
    """verl's synchronous trainer; the teacher is the actor with its weights of the step, on privileged prompts.

    distillation.enabled stays False: it would start teacher servers, of which there are none.
    """

    def _setup(self) -> None:
        distillation, self.rlsd = _rlsd_options(self.config)
        if distillation.enabled:
            raise ValueError("distillation.enabled must be False with trainer_mode=rlsd: the actor is the teacher, and "
                             "verl would start servers for another")  # fmt: skip
        super()._setup()
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        loss = partial(distillation_ppo_loss, config=actor, distillation_config=distillation)
        self.actor_rollout_wg.set_loss_fn(loss)

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """The actor's log-probs on its own prompts, as verl computes them, and then on the teacher's."""
        batch = super()._compute_old_log_prob(batch, metrics)
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        fields = ["prompts", "responses", "raw_prompt", "extra_info", "multi_modal_inputs"]
        teacher = score_privileged(
            transfer_queue.kv_batch_get(**where, select_fields=fields),
            self.tokenizer,
            self.actor_rollout_wg.compute_log_prob,
            key=self.rlsd.privileged_key,
            template=self.rlsd.privileged_template,
            temperature=self.config.actor_rollout_ref.rollout.temperature,
            chat_template_kwargs=self.config.data.get("apply_chat_template_kwargs", {}),
        )
        transfer_queue.kv_batch_put(**where, fields=teacher)
        return batch


class PrivilegedTeacher(AgentLoopWorker):
    """An agent loop worker whose teacher server reads the privileged prompt: a frozen teacher, or a larger one."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _, self.rlsd = _rlsd_options(config)
        temperature = config.actor_rollout_ref.rollout.temperature
        if temperature != 1:
            raise ValueError(f"verl's teacher servers score at temperature 1, rollout.temperature is {temperature}")

    async def _compute_teacher_logprobs(
        self, output: Any, prompt_ids: list[int], response_ids: list[int], validate: bool,
        sample_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """As verl's, on the privileged prompt, the response then moved back to where the student's is."""
        if not self.distillation_enabled or validate:
            return
        if any((output.multi_modal_data or {}).values()):
            raise ValueError("the privileged prompt is text, this one has images, video or audio")
        row = sample_kwargs or {}
        ids = privileged_prompt_ids(
            self.tokenizer, row["raw_prompt"], row["extra_info"], self.rlsd.privileged_key,
            self.rlsd.privileged_template, self.config.data.get("apply_chat_template_kwargs", {}),
        )  # fmt: skip
        await super()._compute_teacher_logprobs(output, ids, response_ids, validate, sample_kwargs)
        for name in ("teacher_ids", "teacher_logprobs"):  # (prompt + response, 1); what is padded or cut is the prompt
            output.extra_fields[name] = pad(output.extra_fields[name], (0, 0, len(prompt_ids) - len(ids), 0))


class PrivilegedAgentLoopManager(AgentLoopManagerTQ):
    """verl's agent loop manager with `PrivilegedTeacher` workers: `rollout.agent.agent_loop_manager_class`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = AgentLoopWorkerTQ.__ray_metadata__.modified_class  # what ray.remote wrapped
        self.agent_loop_workers_class = ray.remote(type("PrivilegedWorker", (PrivilegedTeacher, plain), {}))
