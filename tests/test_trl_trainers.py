"""SSDTrainer, the self-distillation trainers and the swapped head, against TRL's own losses and dense formulas."""

import oracles
import pytest
import tiny
import torch
from conftest import no_kernel
from trl_runs import SMALL, apart, questions, reward, samples, trained

pytest.importorskip("trl")
from closeness import LOG_PROB_BOUND
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental import sdft, sdpo
from trl.kernels import ChunkedLogProbFunction

from sdkernels.integrations.trl import SDFTTrainer, SDPOTrainer, SSDConfig, SSDTrainer, use_fused_head
from sdkernels.integrations.trl.head import OUTPUTS, FusedHead

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
TRUNCATION = {"train_temperature": 1.6, "train_top_k": 20, "train_top_p": 0.9}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fused_head():
    use_fused_head()
    yield
    use_fused_head(False)


def recorded(trainer_class):
    """A trainer that keeps the batches, the numbers of their tokens, and the weights of that time."""

    class Recorded(trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.seen = [*getattr(self, "seen", []), (dict(inputs), num_items_in_batch, weights)]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    return Recorded


def test_ssd_of_samples_is_supervised_fine_tuning(model, tmp_path):
    hosts = trained(SFTTrainer, SFTConfig, model, tmp_path, samples())
    mine = trained(SSDTrainer, SSDConfig, model, tmp_path, samples())
    assert mine.losses == hosts.losses
    assert apart(mine.gradients, hosts.gradients) == 0


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_the_expectation_is_ssd_in_float64(peft_config, padding_free, model, tmp_path):
    """Loss and gradients of three steps of two batches each, the base the model as it was."""
    more = (
        {"padding_free": True, "max_length": None, "model_init_kwargs": {"attn_implementation": "eager"}}
        if padding_free
        else {}
    )
    trainer = trained(
        recorded(SSDTrainer), SSDConfig, model, tmp_path, samples(), objective="expected", max_grad_norm=0.0,
        peft_config=peft_config, **TRUNCATION, **more,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    if peft_config is not None:
        from peft import get_peft_model

        student = get_peft_model(student, LORA)
    for step in range(3):
        student.zero_grad()
        total = 0.0
        for batch, tokens, weights in trainer.seen[2 * step : 2 * step + 2]:
            student.load_state_dict(weights)
            inputs = {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}
            mask = batch["labels"][:, 1:] != -100
            with torch.no_grad():
                other = base(**inputs).logits[:, :-1]
            logits = student(**inputs).logits[:, :-1]
            inside = oracles.support(other, 1.6, top_k=20, top_p=0.9, keep=mask).must
            log_q = oracles.log_softmax(other, 1.6, mask, inside=inside)
            terms = oracles.ssd(logits, log_q, 1.6, mask)
            total += float(terms.cross_entropy[mask].sum() / tokens)
            upstream = torch.where(mask, 1.0 / tokens, 0.0)
            logits.backward(oracles.ssd_gradient(logits, log_q, 1.6, {"cross_entropy": upstream}, mask).gradient)
        assert trainer.losses[step] == pytest.approx(total, rel=1e-5)
        dense = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        assert apart(trainer.gradients[step : step + 1], [dense]) < 5e-5
    row = trainer.state.log_history[0]
    parts = ("support_compression", "within_support_reshaping", "base_alignment", "constant")
    assert sum(row[f"ssd/{name}"] for name in parts) == pytest.approx(row["ssd/cross_entropy"], abs=5e-5)
    assert row["ssd/cross_entropy"] == pytest.approx(trainer.losses[0], rel=0.1)  # a mean of batches' means
    assert 1 <= row["ssd/support_size"] <= 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mean"}, "objective must be sampled or expected, got 'mean'"),
        ({"train_top_k": 20}, "train_top_k is of the base, which objective='sampled' does without, got 20"),
        ({"objective": "expected", "loss_type": "dft"}, "loss_type must be nll, got 'dft'"),
    ],
)
def test_options_of_ssd_that_cannot_work(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SSDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_losses_beside_the_expectation_are_refused(model, tmp_path):
    config = SSDConfig(output_dir=str(tmp_path), **SMALL, objective="expected", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="has no place for label_smoothing_factor"):
        SSDTrainer(str(model), config, train_dataset=samples())


def test_the_base_is_the_model_as_it_was_given(model, tmp_path):
    moved = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        moved.lm_head.weight.add_(torch.randn_like(moved.lm_head.weight))
    trainer = trained(SSDTrainer, SSDConfig, moved, tmp_path, samples(), objective="expected", max_steps=1)
    assert abs(trainer.state.log_history[0]["ssd/base_alignment"]) < 1e-5


MODES = {
    "forward KL": {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    "reverse KL": {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    "JSD": {"distillation_mode": "full_logits", "distillation_alpha": 0.3},
    "top_k": {"distillation_mode": "topk_logits", "distillation_topk": 9, "distillation_alpha": 0.5},
    "top_k and a tail": {
        "distillation_mode": "topk_logits", "distillation_topk": 9, "distillation_add_tail": True,
        "distillation_alpha": 1.0, "num_iterations": 2, "distillation_is_clip": 1.1,
    },
    "sampled token": {
        "distillation_mode": "sampled_token", "distillation_alpha": 1.0, "num_iterations": 2,
        "distillation_is_clip": 1.1,
    },
}  # fmt: skip


def agree(mine, hosts):
    assert mine.losses == pytest.approx(hosts.losses, rel=2e-5, abs=2e-6)
    assert apart(mine.gradients, hosts.gradients) < 5e-5
    name = "self_distillation/distillation_loss"
    logged = [[row[name] for row in run.state.log_history if name in row] for run in (mine, hosts)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kind", ["live", "ema"])
def test_self_distillation_is_trls(options, kind, model, tmp_path):
    """Losses, gradients and metrics of three steps of TRL's SDFTTrainer."""
    given = {"teacher_model_kind": kind, "num_generations": 2, "num_loss_tokens_to_skip": 2, "max_completion_length": 8,
             "temperature": 0.8, "teacher_update_rate": 0.5}  # fmt: skip
    runs = [trained(cls, sdft.SDFTConfig, model, tmp_path, questions(), **given | options)
            for cls in (SDFTTrainer, sdft.SDFTTrainer)]  # fmt: skip
    agree(*runs)


@pytest.mark.parametrize("kind", ["live", "base"])
def test_sdpo_leaves_rows_out_that_have_nothing_to_learn_from(kind, model, tmp_path):
    """Without feedback and without a successful rollout there is no demonstration."""
    given = {"success_reward_threshold": 0.5, "teacher_model_kind": kind, **MODES["JSD"]}
    runs = [trained(cls, sdpo.SDPOConfig, model, tmp_path, questions(), [reward], **given)
            for cls in (SDPOTrainer, sdpo.SDPOTrainer)]  # fmt: skip
    agree(*runs)


def test_self_distillation_under_autocast_has_one_teacher(model, tmp_path):
    given = {
        "num_generations": 2,
        "max_completion_length": 8,
        "teacher_model_kind": "base",
        "bf16": True,
        "max_steps": 1,
    }
    runs = [trained(cls, sdft.SDFTConfig, model, tmp_path, questions(), **given | MODES["forward KL"])
            for cls in (SDFTTrainer, sdft.SDFTTrainer)]  # fmt: skip
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"distillation_mode": "topk_logits", "distillation_topk": None},
            "'topk_logits' needs distillation_topk, got None",
        ),
        ({"distillation_mode": "logits"}, "distillation_mode must be one of sampled_token, .*, got 'logits'"),
        ({"distillation_mode": "full_logits", "distillation_alpha": 1.5}, r"distillation_alpha must be in \[0, 1\]"),
    ],
)
def test_options_of_self_distillation_that_cannot_work(options, message, model, tmp_path):
    config = sdft.SDFTConfig(output_dir=str(tmp_path), **SMALL, num_generations=2, **options)
    with pytest.raises(ValueError, match=message):
        SDFTTrainer(str(model), args=config, train_dataset=questions())


def test_self_distillation_with_lora_is_trls(model, tmp_path):
    given = {"num_generations": 2, "max_completion_length": 8, "peft_config": LORA, "teacher_model_kind": "base"}
    runs = [trained(cls, sdft.SDFTConfig, model, tmp_path, questions(), **given | MODES["JSD"])
            for cls in (SDFTTrainer, sdft.SDFTTrainer)]  # fmt: skip
    agree(*runs)


def test_sdpo_is_trls(model, tmp_path):
    given = {"success_reward_threshold": 0.5, "include_environment_feedback": True}
    runs = [trained(cls, sdpo.SDPOConfig, model, tmp_path, questions(), [reward], **given | MODES["top_k"])
            for cls in (SDPOTrainer, sdpo.SDPOTrainer)]  # fmt: skip
    agree(*runs)
    with pytest.raises(ValueError, match="distillation_weight must be 1"):
        trained(SDPOTrainer, sdpo.SDPOConfig, model, tmp_path, questions(), [reward], distillation_weight=0.5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("outputs", [("entropy",), OUTPUTS])
def test_the_swapped_head_gives_what_trls_gives(outputs, softcap):
    hidden, weight, bias = torch.randn(9, 16), torch.randn(301, 16), torch.randn(301)
    targets = torch.randint(301, (9,))
    targets[0] = (hidden @ weight.T + bias)[0].argmax()
    results = []
    for function in (FusedHead, ChunkedLogProbFunction):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        found = function.apply(*leaves, targets, 0.7, 128, softcap, 0.9, outputs)
        upstream = torch.linspace(-1, 1, 9)
        ((found[0] + 0.3 * found[1]) * upstream).sum().backward()
        results.append((found, [x.grad for x in leaves]))
    (mine, my_gradients), (hosts, their_gradients) = results
    assert bool(mine[4][0]) is True if "is_top1" in outputs else mine[4] is None
    for found, expected in zip(mine, hosts, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == expected.dtype
            assert torch.allclose(found.double(), expected.double(), atol=LOG_PROB_BOUND)
    for found, expected in zip(my_gradients, their_gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_trls_trainers_learn_the_same_with_the_swapped_head(trainer, model, tmp_path, request):
    pairs = samples().map(lambda row: {"chosen": row["completion"], "rejected": "no"}, remove_columns=["completion"])
    classes = {"SFT": (SFTTrainer, SFTConfig, samples()), "DPO": (DPOTrainer, DPOConfig, pairs)}[trainer]
    hosts = trained(*classes[:2], model, tmp_path, classes[2])
    request.getfixturevalue("fused_head")
    mine = trained(*classes[:2], model, tmp_path, classes[2])
    assert mine.losses == pytest.approx(hosts.losses, rel=1e-5)
    assert apart(mine.gradients, hosts.gradients) < 2e-5
    for theirs, row in zip(hosts.state.log_history[:3], mine.state.log_history[:3], strict=True):
        for name in ("entropy", "mean_token_accuracy", "logits/chosen"):
            if name in theirs:
                assert row[name] == pytest.approx(theirs[name], rel=1e-4)
