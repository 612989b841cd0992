"""The verl integration on verl's FSDP2 engine: one process, torchrun, Ray; and its privileged teacher."""

import asyncio
import os
import re
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import EAGER_FACTOR, assert_same_bits, assert_within, epsilon
from conftest import INTERPRETED

os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_cpu"
if INTERPRETED:
    pytest.skip("says nothing of a kernel", allow_module_level=True)
pytest.importorskip("verl")

import tiny
import torch.distributed as dist
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils import padding
from verl.workers.utils.losses import ppo_loss
from verl_cases import (
    RESPONSES,
    RLSD,
    ROWS,
    assert_history,
    chat_ids,
    dense_history,
    errors,
    response_log_probs,
    rlsd,
    rollouts,
    stack,
    trainer_batch,
    verl_config,
)
from verl_worker import (
    ENVIRONMENT,
    STEPS,
    TEMPERATURE,
    Worker,
    actor_config,
    python,
    train,
    train_data,
    worker_config,
    worker_of,
)

from sdkernels.integrations.prompts import privileged_prompt
from sdkernels.integrations.verl import (
    RLSDLossConfig,
    privileged_log_probs,
    privileged_prompt_ids,
    score_privileged,
)


@pytest.fixture(scope="module")
def one_process():
    """A process group of one, which verl's workers find."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": "29500", **ENVIRONMENT}.items():  # fmt: skip
            patch.setenv(name, value)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied"])
def path(request, tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def own_head(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def history_of(path, batch, backend, loss):
    return train(worker_of(path, backend, loss), train_data(batch))


@pytest.mark.parametrize("backend", [None, "sdkernels"], ids=["unfused", "sdkernels"])
def test_three_steps_with_lam_0_are_verls_grpo(path, backend, one_process):
    batch = rollouts(path)
    truth = dense_history(path, batch, 0.0)
    host, _ = history_of(path, batch, None, partial(ppo_loss, config=actor_config()))
    ours, _ = history_of(path, batch, backend, rlsd(lam=0.0))
    assert_history(ours, host)
    for mine, theirs in zip(errors(ours, truth), errors(host, truth), strict=True):
        assert mine <= EAGER_FACTOR * theirs + 4 * epsilon(torch.float32)


@pytest.mark.parametrize("backend", [None, "sdkernels"], ids=["unfused", "sdkernels"])
def test_three_steps_with_lam_are_the_dense_computation(path, backend, one_process):
    batch = rollouts(path)
    ours, metrics = history_of(path, batch, backend, rlsd(lam=0.5))
    assert_history(ours, dense_history(path, batch, 0.5))
    assert {"rlsd/lam", "rlsd/information_gain_abs", "actor/pg_clipfrac", "distillation/loss"} <= set(metrics)
    with pytest.raises(AssertionError):  # so that the teacher is seen to matter
        assert_history(ours, dense_history(path, batch, 0.0))


# ---- several processes ----


@pytest.fixture(scope="module")
def alone(own_head, one_process):
    """What one process gets."""
    batch = rollouts(own_head)
    worker = worker_of(own_head, "sdkernels")
    inferred = worker.infer_batch(train_data(batch, compute_loss=False))["log_probs"]
    return batch, list(inferred.unbind()), history_of(own_head, batch, "sdkernels", rlsd(lam=0.5))[0]


def test_under_torchrun_two_processes_train_as_one(own_head, alone, tmp_path):
    batch, log_probs, history = alone
    job = {"path": own_head, "backend": "sdkernels", "loss": rlsd(lam=0.5), "batch": batch, "out": str(tmp_path)}
    torch.save(job, tmp_path / "job.pt")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    modules = "verl_cpu,sdkernels.integrations.verl.trainer"
    python(*torchrun, "verl_worker.py", str(tmp_path / "job.pt"), VERL_USE_EXTERNAL_MODULES=modules)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for rank in ranks:
        assert_history(rank["history"], history)
        assert rank["trainer"] == "RLSDTrainer"  # as the guide's command line has it
    found = [x for rank in ranks for x in rank["log_probs"]]
    for mine, theirs in zip(found, log_probs, strict=True):
        assert_within(mine[:-1], theirs[:-1].double(), 2e-5)


def test_under_ray_two_actors_train_and_score_as_one(own_head, alone):
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    batch, log_probs, history = alone
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
             runtime_env={"env_vars": ENVIRONMENT})  # fmt: skip
    try:
        actor = RayClassWithInitArgs(cls=ray.remote(Worker), config=worker_config(own_head, "sdkernels"))
        group = RayWorkerGroup(RayResourcePool([2], use_gpu=False, max_colocate_count=1), actor)
        group.reset()
        group.set_loss_fn(rlsd(lam=0.5))
        infer = lambda data: group.infer_batch(data).get()  # noqa: E731
        for mine, theirs in zip(infer(train_data(batch, compute_loss=False))["log_probs"].unbind(), log_probs,
                                strict=True):  # fmt: skip
            assert_within(mine[:-1], theirs[:-1].double(), 2e-5)
        scored = score(batch, infer)["teacher_logprobs"]
        trained = []
        for _ in range(STEPS):
            metrics = tu.get(group.train_batch(train_data(batch)).get(), "metrics")
            trained.append({"loss": metrics["loss"], **group.kept()[0]})
    finally:
        ray.shutdown()
    assert_history(trained, history)
    worker = worker_of(own_head, "sdkernels")
    assert_within(scored.values(), score(batch, worker.infer_batch)["teacher_logprobs"].values().double(), 2e-5)


# ---- the privileged teacher ----


def score(batch, infer, jagged=True):
    return score_privileged(trainer_batch(batch, jagged), tiny.tokenizer(), infer, temperature=TEMPERATURE)


@pytest.fixture(scope="module", params=[None, "sdkernels"], ids=["unfused", "sdkernels"])
def worker(request, own_head, one_process):
    return worker_of(own_head, request.param)


def of_responses(scored, batch):
    """As the loss reads them."""
    data = train_data({name: batch[name] for name in ("prompts", "responses", "input_ids", "response_mask")})
    return padding.no_padding_2_padding(scored, data)


def test_with_the_students_prompt_the_teacher_is_the_student(worker, own_head):
    batch = rollouts(own_head)
    student = worker.infer_batch(train_data(batch, compute_loss=False))["log_probs"]
    prompts = [x.tolist() for x in batch["prompts"]]
    teacher = privileged_log_probs(trainer_batch(batch), prompts, worker.infer_batch, TEMPERATURE)
    found = of_responses(teacher["teacher_logprobs"], batch)
    assert found.shape == (ROWS, max(RESPONSES), 1)
    assert_same_bits(found[..., 0], of_responses(student, batch), "the teacher's log-probs")
    assert_same_bits(of_responses(teacher["teacher_ids"], batch)[..., 0], stack(batch["responses"]), "their tokens")


def test_the_teacher_reads_the_privileged_prompt(worker, own_head):
    batch, words = rollouts(own_head), tiny.tokenizer()
    text = words.decode(privileged_prompt_ids(words, batch["raw_prompt"][3], batch["extra_info"][3]))
    assert text.startswith("<|im_start|>user Say 3:")
    assert "it is 3" in text
    assert text.endswith("<|im_end|><|im_start|>assistant ")
    chats = [privileged_prompt(chat, extra["privileged"])
             for chat, extra in zip(batch["raw_prompt"], batch["extra_info"], strict=True)]  # fmt: skip
    truth = response_log_probs(own_head, [chat_ids(chat) for chat in chats], batch["responses"])
    found = of_responses(score(batch, worker.infer_batch)["teacher_logprobs"], batch)[..., 0]
    assert_within(found, truth, 2e-5)
    own = response_log_probs(own_head, batch["prompts"], batch["responses"])
    assert (truth - own).abs().mean() > 0.01


def test_a_padded_batch_gets_the_same_teacher(worker, own_head):
    batch = rollouts(own_head)
    jagged, data = score(batch, worker.infer_batch), trainer_batch(batch, False)
    data.update(score(batch, worker.infer_batch, jagged=False))
    widest = max(map(len, batch["prompts"]))
    assert data["teacher_logprobs"].shape == data["teacher_ids"].shape == (ROWS, widest + max(RESPONSES), 1)
    data["input_ids"] = torch.cat([data["prompts"], data["responses"]], 1)
    data["response_mask"] = data["attention_mask"][:, widest:]
    data["position_ids"] = data["attention_mask"].cumsum(1)
    unpadded = padding.left_right_2_no_padding(data)
    for name in ("teacher_logprobs", "teacher_ids"):
        assert_same_bits(unpadded[name].values(), jagged[name].values(), name)


def test_what_cannot_be_scored_is_refused(worker, own_head):
    batch = rollouts(own_head)
    data, prompts = trainer_batch(batch), [x.tolist() for x in batch["prompts"]]
    with pytest.raises(ValueError, match=r"prompt_ids must be 8 prompts of at least one token, got 7 of lengths"):
        privileged_log_probs(data, prompts[1:], worker.infer_batch)
    with pytest.raises(ValueError, match=r"got 8 of lengths \[0"):
        privileged_log_probs(data, [[], *prompts[1:]], worker.infer_batch)
    with pytest.raises(KeyError, match=r"extra_info has no 'solution' for the teacher to read, only \['index', 'priv"):
        score_privileged(data, tiny.tokenizer(), worker.infer_batch, key="solution")
    images = tu.get_tensordict({"multi_modal_inputs": [{"pixel_values": 1}] + [{}] * (ROWS - 1)})
    with pytest.raises(ValueError, match="scores text, the batch has multi_modal_inputs"):
        privileged_log_probs(data.update(images), prompts, worker.infer_batch)


# ---- the teacher in verl's own trainer: `sdkernels.integrations.verl.trainer` ----


class Store:
    """TransferQueue's fields of rows by key, without its processes."""

    def __init__(self, keys, fields):
        self.keys, self.fields = keys, fields

    def kv_batch_get(self, keys, partition_id, select_fields):
        assert keys == self.keys
        return self.fields.select(*select_fields)

    def kv_batch_put(self, keys, partition_id, fields):
        assert keys == self.keys
        self.fields.update(fields)
        return KVBatchMeta(keys=keys, partition_id=partition_id, tags=[{}] * len(keys), fields=list(self.fields.keys()))


def stored(batch, worker):
    """A batch in the store, and the actors that compute log-probs of what is in it or of what they are handed."""
    fields = train_data({name: batch[name] for name in ("prompts", "responses", "input_ids", "response_mask")})
    fields = fields.update(trainer_batch(batch).select("raw_prompt", "extra_info"))
    fields = fields.update(tu.get_tensordict({"multi_modal_inputs": [{}] * ROWS}))  # as agent loops leave it of text
    store = Store([f"row {i}" for i in range(ROWS)], fields)

    def compute_log_prob(data):
        if not isinstance(data, KVBatchMeta):
            return worker.infer_batch(data)
        scored = worker.infer_batch(train_data(batch, compute_loss=False))
        return store.kv_batch_put(data.keys, data.partition_id, scored.select("log_probs", "entropy"))

    return store, SimpleNamespace(compute_log_prob=compute_log_prob)


def test_the_trainer_asks_the_actor_as_the_teacher(worker, own_head, monkeypatch):
    from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base

    from sdkernels.integrations.verl import trainer

    batch = rollouts(own_head)
    store, actors = stored(batch, worker)
    monkeypatch.setattr(trainer_base, "tq", store)
    monkeypatch.setattr(trainer, "transfer_queue", store)
    made = object.__new__(get_trainer_cls("rlsd"))  # it would start verl's servers
    assert type(made) is trainer.RLSDTrainer
    rollout = "actor_rollout_ref.rollout"
    made.config = verl_config(*RLSD, f"{rollout}.temperature={TEMPERATURE}", f"{rollout}.calculate_log_probs=False")
    made.tokenizer, made.actor_rollout_wg, made.rlsd = tiny.tokenizer(), actors, RLSDLossConfig()
    meta, metrics = KVBatchMeta(keys=store.keys, partition_id="train", tags=[{}] * ROWS), {}
    assert made._compute_old_log_prob(meta, metrics).keys == store.keys
    assert metrics["actor/entropy"] > 0
    expected = score(batch, worker.infer_batch)
    for name in ("teacher_logprobs", "teacher_ids"):
        assert_same_bits(store.fields[name].values(), expected[name].values(), name)
    own = response_log_probs(own_head, batch["prompts"], batch["responses"])
    assert_within(stack(store.fields["old_log_probs"].unbind()), own, 2e-5)


def test_the_trainer_gives_the_actor_the_loss(monkeypatch):
    from sdkernels.integrations.verl import trainer

    given = []
    actors = SimpleNamespace(set_loss_fn=given.append)
    monkeypatch.setattr(
        trainer.PPOTrainerSync, "_setup", lambda self: setattr(self, "actor_rollout_wg", actors), raising=False
    )
    made = object.__new__(trainer.RLSDTrainer)
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2"
    made.config = verl_config(*RLSD, "+distillation.distillation_loss.lam=0.25", micro)
    made._setup()
    (loss,) = given
    assert loss.keywords["distillation_config"].distillation_loss.lam == 0.25
    assert loss.keywords["config"].clip_ratio_c == 3.0
    made.config = verl_config()
    with pytest.raises(TypeError, match=r"_target_=sdkernels.integrations.verl.RLSDLossConfig, got a Distillation"):
        made._setup()
    made.config = verl_config(*RLSD, "distillation.enabled=true",
                              "distillation.teacher_models.teacher_model.model_path=x")  # fmt: skip
    with pytest.raises(ValueError, match=r"distillation.enabled must be False with trainer_mode=rlsd"):
        made._setup()


@pytest.mark.parametrize("template", ["{prompt} ({privileged})", "{privileged}{prompt}"])
def test_a_teacher_server_reads_the_privileged_prompt(template):
    from sdkernels.integrations.verl import trainer

    words = tiny.tokenizer()
    made = object.__new__(trainer.PrivilegedTeacher)
    made.distillation_enabled, made.tokenizer, made.teacher_key = True, words, "data_source"
    made.rlsd, made.config = RLSDLossConfig(privileged_template=template), verl_config()
    asked = []

    async def compute_teacher_logprobs_single(sequence_ids, **_):
        asked.append(sequence_ids)
        following = torch.tensor([*sequence_ids[1:], 0])[:, None]  # an index speaks of the next token
        return following, -following.float()

    made.teacher_server_manager = SimpleNamespace(compute_teacher_logprobs_single=compute_teacher_logprobs_single)
    chat, response = [{"role": "user", "content": "Say 3:"}], [40, 41, 42, 43]
    prompt = chat_ids(chat).tolist()
    row = {"raw_prompt": chat, "extra_info": {"privileged": "three"}}
    output = SimpleNamespace(multi_modal_data=None, mm_processor_kwargs=None, extra_fields={})
    asyncio.run(made._compute_teacher_logprobs(output, prompt, response, False, row))
    assert words.decode(asked[0]).count("three") == 1
    assert asked[0][-len(response) :] == response
    found = output.extra_fields["teacher_logprobs"]
    assert found.shape == output.extra_fields["teacher_ids"].shape == (len(prompt) + len(response), 1)
    assert (-found[len(prompt) - 1 : -1, 0]).tolist() == response
    output.multi_modal_data = {"images": ["a picture"]}
    with pytest.raises(ValueError, match="the privileged prompt is text, this one has images, video or audio"):
        asyncio.run(made._compute_teacher_logprobs(output, prompt, response, False, row))
    validation = SimpleNamespace(extra_fields={})
    asyncio.run(made._compute_teacher_logprobs(validation, prompt, response, True, row))
    assert not validation.extra_fields


def test_the_agent_loop_manager_has_privileged_workers():
    from sdkernels.integrations.verl import trainer

    manager = trainer.PrivilegedAgentLoopManager(verl_config(), None)
    worker = manager.agent_loop_workers_class.__ray_metadata__.modified_class
    assert issubclass(worker, trainer.PrivilegedTeacher)
    assert worker.generate_sequences.__qualname__ == "AgentLoopWorkerTQ.generate_sequences"
    assert worker._compute_teacher_logprobs.__qualname__ == "PrivilegedTeacher._compute_teacher_logprobs"


# ---- the guide ----


def test_the_guides_snippets_run(worker, own_head):
    text = (Path(__file__).parents[1] / "docs" / "verl.md").read_text()
    commands = [shlex.split(x.replace("\\\n", " ")) for x in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    runs = [x[x.index("verl.trainer.main_ppo") + 1 :] for x in commands if "verl.trainer.main_ppo" in x]
    assert len(runs) == 2
    for overrides in runs:
        config = verl_config(*overrides)
        if not config.distillation.enabled:
            assert config.trainer.v1.trainer_mode == "rlsd"
        distillation = omega_conf_to_dataclass(config.distillation)
        assert isinstance(distillation.distillation_loss, RLSDLossConfig)
    worker.set_loss_fn(None)
    data = rollouts(own_head)
    names = {
        "batch": trainer_batch(data), "tokenizer": tiny.tokenizer(), "worker": worker, "train_data": train_data(data),
        "actor_config": actor_config(),
    }  # fmt: skip
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "docs/verl.md", "exec"), names)
    assert names["metrics"]["rlsd/lam"] is not None
