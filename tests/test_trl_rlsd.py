"""RLSDTrainer: GRPOTrainer's loss at lam = 0, RLSD's formulas elsewhere, its teachers, and what TRL users expect."""

import copy
import sys

import oracles
import pytest
import tiny
import torch
from conftest import no_kernel
from trl_runs import ONLINE, apart, questions, reward, trained

pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, TrlParser

from sdkernels.integrations.trl import RLSDConfig, RLSDTrainer

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]

# Losses of one call, and losses that are GRPOTrainer's own code.
ONE_CALL = {
    "dapo": {},
    "grpo, two iterations": {"loss_type": "grpo", "num_iterations": 2},
    "bnpo, a reference": {"loss_type": "bnpo", "beta": 0.1, "num_iterations": 2, "use_bias_correction_kl": False},
    "dr_grpo, two-sided": {"loss_type": "dr_grpo", "delta": 1.5, "num_iterations": 2, "epsilon_high": 0.28},
}
HOSTS = {
    "cispo": {"loss_type": "cispo", "num_iterations": 2},
    "dapo, a reference": {"beta": 0.1, "num_iterations": 2},
    "sequences": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "entropy": {"entropy_coef": 0.01, "top_entropy_quantile": 0.5},
}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def rlsd(model, directory, dataset=None, **options):
    return trained(RLSDTrainer, RLSDConfig, model, directory, dataset or questions(), [reward], **options)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("options", (ONE_CALL | HOSTS).values(), ids=[*ONE_CALL, *HOSTS])
def test_without_evidence_it_is_the_hosts_grpo(options, model, tmp_path):
    """Over three optimizer steps: losses, gradients, and what is logged."""
    hosts = trained(GRPOTrainer, GRPOConfig, model, tmp_path, questions(), [reward], **options)
    mine = rlsd(model, tmp_path, rlsd_lambda=0.0, **options)
    assert mine._is_one_call == (options in ONE_CALL.values())
    assert mine.losses == pytest.approx(hosts.losses, abs=2e-6)
    assert apart(mine.gradients, hosts.gradients) < 2e-5
    for theirs, row in zip(hosts.state.log_history, mine.state.log_history, strict=True):
        for name in theirs.keys() - {
            "step_time",
            "train_runtime",
            "train_samples_per_second",
            "train_steps_per_second",
        }:
            assert row[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo"])
def test_evaluation_is_the_hosts(loss_type, model, tmp_path):
    options = {"max_steps": 1, "loss_type": loss_type, "per_device_eval_batch_size": 8}
    found = []
    for classes, more in (((GRPOTrainer, GRPOConfig), {}), ((RLSDTrainer, RLSDConfig), {"rlsd_lambda": 0.0})):
        trainer = trained(*classes, model, tmp_path, questions(), [reward], **options, **more)
        torch.manual_seed(0)
        found.append(trainer.evaluate(questions(2)))
    hosts, mine = found
    for name in ("eval_loss", "eval_entropy", "eval_reward"):
        assert mine[name] == pytest.approx(hosts[name], abs=1e-5)


def recorded(trainer_class):
    """A trainer that keeps the batches it made losses of, the losses, and the weights of that time."""

    class Recorded(trainer_class):
        def _compute_loss(self, model, inputs):
            weights = copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.teacher_model.state_dict())
            loss = super()._compute_loss(model, inputs)
            self.seen = [*getattr(self, "seen", []), (inputs, loss.detach(), *weights)]
            return loss

    return Recorded


def dense_logits(network, prompt_ids, prompt_mask, batch):
    ids = torch.cat((prompt_ids, batch["completion_ids"]), 1)
    mask = torch.cat((prompt_mask, batch["completion_mask"]), 1)
    length = batch["completion_ids"].shape[1]
    return network(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("evidence_from", ["current", "old"])
def test_with_evidence_it_is_rlsd_in_float64(loss_type, evidence_from, model, tmp_path):
    """The loss and the gradient of all weights, from logits in memory and the formulas typed anew."""
    temperature = 0.7
    trainer = trained(
        recorded(RLSDTrainer), RLSDConfig, model, tmp_path, questions(), [reward], rlsd_lambda=0.5, num_iterations=2,
        rlsd_clip_range=0.3, rlsd_clip_range_high=0.6, loss_type=loss_type, temperature=temperature,
        gradient_accumulation_steps=1, max_grad_norm=0.0, rlsd_evidence_from=evidence_from, teacher_sync_steps=2,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    assert len(trainer.seen) == 3
    for step, (batch, loss, student, teacher) in enumerate(trainer.seen):
        network.load_state_dict(teacher)
        with torch.no_grad():
            other = dense_logits(network, batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], batch)
        network.load_state_dict(student)
        network.zero_grad()
        logits = dense_logits(network, batch["prompt_ids"], batch["prompt_mask"], batch)
        lam = 0.5 - 0.01 * step
        options = {"temperature": temperature, "mask": batch["completion_mask"], "evidence_from": evidence_from}
        weighing = {"clip_range": (0.3, 0.6), "lam": lam}
        ids, old = batch["completion_ids"], batch.get("old_per_token_logps")
        reduction = "seq-mean-token-mean" if loss_type == "grpo" else "token-mean"
        truth = oracles.rlsd_loss(
            logits, other, ids, batch["advantages"], old, reduction=reduction, **options, **weighing
        )
        if loss_type == "cispo":
            log_prob = (logits / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            ratio = (log_prob - (log_prob if old is None else old.double())).exp().clamp(max=trainer.epsilon_high)
            wanted = (-ratio.detach() * truth.advantage * log_prob * batch["completion_mask"]).sum()
            wanted = wanted / batch["completion_mask"].sum()
            wanted.backward()
        else:
            wanted = truth.loss
            logits.backward(truth.gradient)
        assert loss.item() == pytest.approx(wanted.item(), abs=2e-6)
        dense = {name: parameter.grad for name, parameter in network.named_parameters()}
        assert apart(trainer.gradients[step : step + 1], [dense]) < 5e-5


def test_a_teacher_that_reads_the_students_prompt_has_no_evidence(model, tmp_path):
    rows = Dataset.from_list([{"prompt": row["prompt"], "teacher_prompt": row["prompt"]} for row in questions()])
    trainer = rlsd(model, tmp_path, rows, teacher_model_kind="live")
    assert max(logged(trainer, "rlsd/information_gain_abs")) < 1e-5
    assert max(logged(trainer, "rlsd/evidence_clipped_above")) == 0


def other_weights(model, peft_config):
    """What is in the directory, moved; under LoRA with adapters that are not new."""
    torch.manual_seed(1)
    moved = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        moved.lm_head.weight.add_(torch.randn_like(moved.lm_head.weight))
    return get_peft_model(moved, peft_config) if peft_config else moved


@pytest.mark.parametrize("kind", ["base", "ema"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_a_teacher_starts_from_the_policys_weights(kind, peft_config, model, tmp_path):
    """Not from those on disk, nor from an empty adapter; and it has no dropout."""
    rows = Dataset.from_list([{"prompt": row["prompt"], "teacher_prompt": row["prompt"]} for row in questions()])
    if peft_config and kind == "ema":
        peft_config = LoraConfig(**LORA.to_dict() | {"init_lora_weights": False, "lora_dropout": 0.0})
    trainer = rlsd(other_weights(model, peft_config), tmp_path, rows, teacher_model_kind=kind, max_steps=1)
    assert max(logged(trainer, "rlsd/information_gain_abs")) < 1e-5


def test_truncated_completions_keep_the_others_advantages(model, tmp_path):
    """As many tokens as sequences, all in one of them: advantages are of sequences all the same."""
    batch = {
        "prompt_ids": torch.tensor([[8, 9], [8, 9]]), "prompt_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_ids": torch.tensor([[10, 11], [12, 13]]), "completion_mask": torch.tensor([[1, 1], [0, 0]]),
        "advantages": torch.tensor([1.0, -1.0]), "num_items_in_batch": torch.tensor(2.0),
    }  # fmt: skip
    for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo"):
        losses = []
        for classes, more in (((GRPOTrainer, GRPOConfig), {}), ((RLSDTrainer, RLSDConfig), {"rlsd_lambda": 0.0})):
            config = classes[1](output_dir=str(tmp_path), **ONLINE, loss_type=loss_type, **more)
            trainer = classes[0](str(model), reward, args=config, train_dataset=questions())
            trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
            losses.append(trainer._compute_loss(trainer.model.train(), dict(batch)).item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert abs(losses[0]) > 0.01


def test_the_head_in_float32_under_autocast(model, tmp_path):
    options = {"bf16": True, "cast_lm_head_to_fp32": True, "max_steps": 1}
    hosts = trained(GRPOTrainer, GRPOConfig, model, tmp_path, questions(), [reward], **options)
    mine = rlsd(model, tmp_path, rlsd_lambda=0.0, **options)
    assert logged(mine, "entropy") == pytest.approx(logged(hosts, "entropy"), rel=1e-5)
    assert apart(mine.gradients, hosts.gradients) < 1e-3


def test_a_chats_teacher_reads_its_last_turn(model, tmp_path):
    chats = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "privileged_context": row["privileged_context"]}
        for row in questions()
    ]
    trainer = trained(
        recorded(RLSDTrainer), RLSDConfig, model, tmp_path, Dataset.from_list(chats), [reward], max_steps=1,
        teacher_prompt_template="{prompt} ({privileged})",
    )  # fmt: skip
    batch = trainer.seen[0][0]
    words = tiny.tokenizer()
    student, teacher = (words.batch_decode(batch[name], skip_special_tokens=True)
                        for name in ("prompt_ids", "teacher_prompt_ids"))  # fmt: skip
    answers = {f"user {row['prompt']}": row["privileged_context"] for row in questions()}
    for mine, theirs in zip(student, teacher, strict=True):
        question = mine.removesuffix("assistant ")
        assert theirs == f"{question} ({answers[question]})assistant "


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_whose_weights_the_teacher_has(kind, peft_config, model, tmp_path):
    """Four steps with a copy that takes the policy's weights every second one, by the teacher's log-probs."""
    trainer = trained(
        recorded(RLSDTrainer), RLSDConfig, model, tmp_path, questions(), [reward], teacher_model_kind=kind,
        teacher_sync_steps=2, gradient_accumulation_steps=1, peft_config=peft_config, max_steps=4,
        rlsd_lambda_decay_steps=0,
    )  # fmt: skip
    adapted = peft_config is not None
    batch = trainer.seen[0][0]
    mine = [trainer._teacher_log_prob(batch)]
    for weights in (trainer.start, trainer.model.state_dict()):  # the first step's, and the last one's
        plain = AutoModelForCausalLM.from_pretrained(model)
        if adapted:
            plain = get_peft_model(plain, LORA)
        plain.load_state_dict({name: x for name, x in weights.items() if ".teacher." not in name})
        with torch.no_grad():
            logits = dense_logits(plain, batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], batch)
        mine.append(oracles.token_log_prob(logits, batch["completion_ids"], mask=batch["completion_mask"]).log_prob)
    found, first, last = mine
    assert (first - last).abs().max() > 1e-2
    assert torch.allclose(found.double(), first if kind == "base" else last, atol=2e-4)


def test_accumulated_gradients_are_those_of_a_large_batch(model, tmp_path):
    options = {"num_generations": 8, "max_grad_norm": 0.0}
    whole = rlsd(model, tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    parts = rlsd(model, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert apart(parts.gradients, whole.gradients) < 1e-4


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_a_resumed_run_ends_where_the_other_does(peft_config, model, tmp_path):
    """With the teacher that moved: it is in the checkpoint."""
    options = {"teacher_update_rate": 0.5, "teacher_sync_steps": 1, "max_steps": 4, "peft_config": peft_config,
               "gradient_accumulation_steps": 1}  # fmt: skip
    whole = rlsd(model, tmp_path / "whole", **options)
    rlsd(model, tmp_path / "parts", save_strategy="steps", save_steps=2, **options | {"max_steps": 2})
    rest = rlsd(model, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-2"), **options)
    assert rest.losses[-2:] == pytest.approx(whole.losses[-2:], abs=1e-6)
    found, expected = rest.model.state_dict(), whole.model.state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


def test_a_checkpoint_without_the_teacher_is_refused(model, tmp_path):
    rlsd(model, tmp_path, save_strategy="steps", save_steps=2, max_steps=2, teacher_model_kind="live")
    with pytest.raises(FileNotFoundError, match="has no teacher of teacher_model_kind='ema'"):
        rlsd(model, tmp_path, resume=str(tmp_path / "checkpoint-2"))


def test_options_from_yaml_and_the_command_line(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "rlsd.yaml").write_text("rlsd_lambda: 0.25\nteacher_model_kind: live\nlog_completions: true\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", f"{tmp_path}/rlsd.yaml", "--rlsd_clip_range", "0.4",
                                      "--output_dir", str(tmp_path), "--use_cpu", "true"])  # fmt: skip
    (config,) = TrlParser(RLSDConfig).parse_args_and_config()
    assert (config.rlsd_lambda, config.rlsd_clip_range, config.teacher_model_kind) == (0.25, 0.4, "live")
    trainer = rlsd(model, tmp_path, max_steps=1, log_completions=True)
    assert trainer.state.global_step == 1
    assert list((tmp_path / "completions").glob("*.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rlsd_lambda": 1.5}, r"rlsd_lambda and its schedule: peak must be"),
        ({"rlsd_clip_range": -0.1}, r"rlsd_clip_range or rlsd_apply_to: clip_range must be"),
        ({"rlsd_apply_to": "none"}, r"rlsd_apply_to: apply_to must be"),
        ({"rlsd_evidence_from": "both"}, r"rlsd_evidence_from must be one of current, old, got 'both'"),
        ({"teacher_model_kind": "frozen"}, r"teacher_model_kind must be one of live, base, ema, got 'frozen'"),
        (
            {"teacher_prompt_template": "{prompt}"},
            r"teacher_prompt_template: .* must hold \{prompt\} and \{privileged\}",
        ),
    ],
)
def test_options_that_cannot_work(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RLSDConfig(output_dir=str(tmp_path), **ONLINE | options)


def test_what_it_refuses(model, tmp_path):
    with pytest.raises(TypeError, match="args must be an RLSDConfig, got GRPOConfig"):
        RLSDTrainer(str(model), reward, args=GRPOConfig(output_dir=str(tmp_path), **ONLINE))
    with pytest.raises(ValueError, match="column teacher_prompt or privileged_context, got prompt"):
        rlsd(model, tmp_path, questions().select_columns(["prompt"]))


def test_the_teacher_is_in_the_checkpoint(model, tmp_path):
    trainer = rlsd(model, tmp_path, save_strategy="steps", save_steps=3, teacher_sync_steps=1)
    saved = load_file(tmp_path / "checkpoint-3" / "teacher.safetensors")
    for name, value in trainer.teacher_model.state_dict().items():
        assert torch.equal(saved[name], value)


def images(count=8):
    """Chats with a picture each; the teacher's is the same one, after more words."""
    from PIL import Image

    return Dataset.from_list([
        {
            "prompt": [{"role": "user", "content": f"Say {i}:"}], "privileged_context": str(i),
            "image": Image.new("RGB", (16, 16 + 16 * (i % 2)), (20 * i, 0, 0)),
        }
        for i in range(count)
    ])  # fmt: skip


@pytest.mark.parametrize("same", [False, True])
def test_a_teacher_sees_the_students_images(same, tmp_path, monkeypatch):
    model = tiny.save_model(tmp_path / "model", "qwen3_vl")
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *args, **kwargs: tiny.vision_processor())
    rows = images()
    if same:
        rows = rows.map(lambda row: {"teacher_prompt": row["prompt"]})
    options = {"teacher_model_kind": "live", "max_steps": 2}
    trainer = rlsd(model, tmp_path, rows, **options)
    gain = max(logged(trainer, "rlsd/information_gain_abs"))
    assert gain < 1e-5 if same else gain > 1e-2
    if not same:
        hosts = trained(GRPOTrainer, GRPOConfig, model, tmp_path, rows, [reward], max_steps=2)
        mine = rlsd(model, tmp_path, rows, rlsd_lambda=0.0, **options)
        assert apart(mine.gradients, hosts.gradients) < 2e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_other_families(family, tmp_path):
    model = tiny.save_model(tmp_path / "model", family)
    hosts = trained(GRPOTrainer, GRPOConfig, model, tmp_path, questions(), [reward])
    mine = rlsd(model, tmp_path, rlsd_lambda=0.0)
    assert apart(mine.gradients, hosts.gradients) < 2e-5
    assert max(logged(rlsd(model, tmp_path, max_steps=1), "rlsd/information_gain_abs")) > 1e-2
