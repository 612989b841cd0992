"""The teacher of an RLSDTrainer: its weights as TRL's SDPOTrainer keeps them, its prompts, its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from trl.data_utils import prepare_multimodal_messages
from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer
from trl.experimental.sdpo.teacher_sync import PEFTAdapterEMACallback
from trl.trainer.utils import pad

from sdkernels.integrations.prompts import privileged_prompt
from sdkernels.integrations.trl.forward import MEDIA_PER_TOKEN, HiddenStates, without_dropout

FILE = "teacher.safetensors"


class PrivilegedTeacher(HiddenStates):
    """A GRPOTrainer with a teacher: `_teacher_log_prob` of its batches, and weights that survive a checkpoint.

    `args.teacher_model_kind`, `teacher_update_rate` and `teacher_sync_steps` say whose weights it has.
    """

    _setup_teacher_model = SDPOTrainer._setup_teacher_model
    _use_peft_ema_teacher_adapter = SDPOTrainer._use_peft_ema_teacher_adapter
    _get_teacher_context_for_self_distillation = SDPOTrainer._get_teacher_context_for_self_distillation

    def _make_teacher(self) -> None:
        """TRL's teacher, with the policy's weights of now rather than those on disk or an adapter of zeros.

        (Under FSDP and DeepSpeed a copy has those on disk.)
        """
        self._setup_teacher_model()
        shadow, model = self._shadow, self.model
        if shadow is not None:
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            shadow._initialize_teacher_adapter()
            weights = get_peft_model_state_dict(model)
            shadow.shadow_weights = {name: value.detach().clone() for name, value in weights.items()}
            set_peft_model_state_dict(model, shadow.shadow_weights, adapter_name=shadow.teacher_adapter_name)
        elif self.teacher_model is not model and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.accelerator.unwrap_model(self.teacher_model).load_state_dict(model.state_dict())

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not self.args.rlsd_lambda:
            return output
        ids, _, media = self._tokenize_prompts([self._teacher_prompt(row) for row in inputs])
        rows = [torch.tensor(row) for row in ids]
        sides = {
            "prompt_ids": pad(rows, self._tokenizer.pad_token_id, "left"),
            "prompt_mask": pad([torch.ones_like(row) for row in rows], 0, "left"),
        }
        for name in MEDIA_PER_TOKEN:
            if name in media:
                sides[name] = pad([torch.as_tensor(row).flatten() for row in media[name]], 0, "left")
        device = output["completion_ids"].device
        return output | {f"teacher_{name}": value.to(device) for name, value in sides.items()}

    def _teacher_prompt(self, row: dict[str, Any]) -> Any:
        given = row.get("teacher_prompt")
        if given is None and row.get("privileged_context") is None:
            raise ValueError(f"RLSD needs a column teacher_prompt or privileged_context, got {', '.join(sorted(row))}")
        prompt = row["prompt"] if given is None else given
        images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
        if images:
            prompt = prepare_multimodal_messages(prompt, images=images)
        if given is not None:
            return prompt
        return privileged_prompt(prompt, str(row["privileged_context"]), self.args.teacher_prompt_template)

    def _teacher_log_prob(self, inputs: dict[str, Any]) -> Tensor:
        """log P_T of the completions, (B, T), by the teacher's weights of now."""
        own = {name: inputs[f"teacher_{name}"] for name in ("prompt_ids", "prompt_mask")}
        for name in MEDIA_PER_TOKEN:
            if (types := inputs.get(f"teacher_{name}")) is not None:
                own[name] = torch.cat((types, torch.zeros_like(inputs["completion_ids"])), dim=1)
        with torch.no_grad(), without_dropout(self.teacher_model), self._get_teacher_context_for_self_distillation():
            return self._run(self.teacher_model, inputs | own, self._scores).log_prob

    @property
    def _shadow(self) -> PEFTAdapterEMACallback | None:
        """What keeps the teacher's adapter, if it is one."""
        callbacks = self.callback_handler.callbacks
        return next((each for each in callbacks if isinstance(each, PEFTAdapterEMACallback)), None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.teacher_model_kind != "ema" or self._shadow is not None:  # adapters are saved with the model
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(self.teacher_model, options=options)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()},
                      folder / FILE)  # fmt: skip

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.args.teacher_model_kind != "ema":
            return
        path, shadow = Path(checkpoint) / FILE, self._shadow
        model = self.accelerator.unwrap_model(self.model)
        if not (path.exists() if shadow is None else shadow.teacher_adapter_name in model.peft_config):
            raise FileNotFoundError(f"{path}: the checkpoint has no teacher of teacher_model_kind='ema'")
        if shadow is None:
            weights: Any = load_file(path)
            set_model_state_dict(self.teacher_model, weights, options=StateDictOptions(full_state_dict=True))
            return
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(model, adapter_name=shadow.teacher_adapter_name)
        shadow.shadow_weights = {name: value.detach().clone() for name, value in weights.items()}
        shadow._initialized = True
