"""Batches as verl lays them out, its loss functions, and the dense computation that tests of verl compare with."""

import copy
from functools import partial

import oracles
import tiny
import torch
from hydra import compose, initialize_config_module
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.distillation import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.workers.config import DistillationConfig
from verl_worker import LR, STEPS, TEMPERATURE, actor_config, jagged

from sdkernels.integrations.verl import RLSDLossConfig

PROMPTS, RESPONSES = [3, 5, 4, 8, 3, 6, 7, 5], [4, 9, 6, 5, 7, 8, 4, 6]
ROWS = len(PROMPTS)
RLSD = [
    "distillation.distillation_loss._target_=sdkernels.integrations.verl.RLSDLossConfig",
    "distillation.distillation_loss.loss_mode=rlsd",
    "distillation.distillation_loss.use_task_rewards=false",
]
DP_SIZE, BATCH_TOKENS = 2, 100  # of which the micro-batches here are a part


def rlsd(config=None, **options):
    """verl's loss function with RLSD in it, as its worker builds it; lam stays, unless options say otherwise."""
    distillation = DistillationConfig(distillation_loss=RLSDLossConfig(**{"decay_steps": 0, **options}))
    return partial(distillation_ppo_loss, config=config or actor_config(), distillation_config=distillation)


def verl_config(*overrides):
    """verl's own configuration with overrides, as its command line takes them."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", list(overrides))


def stack(rows):
    """Rows of different lengths as one tensor, zeros behind."""
    return pad_sequence(list(rows), batch_first=True)


def padded_prompts(prompts, responses):
    """Prompts padded on the left, and the attention mask that goes with them, as in verl's DataProto."""
    widest, longest = (max(map(len, x)) for x in (prompts, responses))
    left = torch.stack([pad(x, (widest - len(x), 0)) for x in prompts])
    seen = [pad(torch.ones(len(p) + len(r), dtype=torch.long), (widest - len(p), longest - len(r)))
            for p, r in zip(prompts, responses, strict=True)]  # fmt: skip
    return {"prompts": left, "attention_mask": torch.stack(seen)}


def micro_batch(seed, is_jagged=True, without=()):
    """-> log-probs and entropies of a model, and the micro-batch: r and w on all sides of their clips."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    log_probs = [normal(p + r) * 0.5 - 2 for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    new = [x[p - 1 : -1] for x, p in zip(log_probs, PROMPTS, strict=True)]
    batch = {
        "prompts": [torch.ones(p, dtype=torch.long) for p in PROMPTS],
        "responses": [torch.ones(r, dtype=torch.long) for r in RESPONSES],
        "response_mask": [(torch.rand(r, generator=g) < 0.8).long() for r in RESPONSES],
        "old_log_probs": [x + 0.4 * normal(len(x)) for x in new],
        "advantages": [normal(1) * (i > 0) * torch.ones(r) for i, r in enumerate(RESPONSES)],
        "ref_log_prob": [x + 0.3 * normal(len(x)) for x in new],
        "rollout_is_weights": [torch.rand(r, generator=g) for r in RESPONSES],
        "teacher_logprobs": [(x + 0.4 * normal(len(x)))[:, None] for x in log_probs],
    }
    entropy = normal(sum(PROMPTS + RESPONSES)).abs()
    batch = {name: values for name, values in batch.items() if name not in without}
    tensors = {"teacher_logprobs": jagged(batch["teacher_logprobs"])}
    if not is_jagged:
        tensors |= padded_prompts(batch["prompts"], batch["responses"])
    for name in batch.keys() - tensors.keys():
        tensors[name] = jagged(batch[name]) if is_jagged else stack(batch[name])
    options = {"dp_size": DP_SIZE, "global_batch_size": 3 * ROWS, "batch_num_tokens": BATCH_TOKENS}
    return [x.requires_grad_() for x in (torch.cat(log_probs), entropy)], tu.get_tensordict(tensors, options)


def run(loss, leaves, data):
    """-> a loss function's value, its gradients of log-probs and entropies, and its metrics."""
    offsets = torch.tensor([0, *(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True))]).cumsum(0)
    outputs = [torch.nested.nested_tensor_from_jagged(x, offsets) for x in leaves]
    model_output = dict(zip(("log_probs", "entropy"), outputs, strict=True))
    value, metrics = loss(model_output=model_output, data=data)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), gradients, metrics


def policy(path):
    """The model in float64, by transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")


def response_logits(model, prompts, responses):
    """(B, T, V) of padded responses, every row alone."""
    hidden = [model.model(input_ids=torch.cat([p, r])[None]).last_hidden_state[0, len(p) - 1 : -1]
              for p, r in zip(prompts, responses, strict=True)]  # fmt: skip
    return model.lm_head(stack(hidden))  # not by `forward`, which verl replaces in the class


def response_log_probs(path, prompts, responses):
    """(B, T) in float64, 0 where padded."""
    lengths = torch.tensor([len(x) for x in responses])
    with torch.no_grad():
        logits = response_logits(policy(path), prompts, responses)
    keep = lengths[:, None] > torch.arange(lengths.max())
    return oracles.token_log_prob(logits, stack(responses), TEMPERATURE, keep).log_prob


def chat_ids(chat):
    words = tiny.tokenizer()
    return torch.tensor(words.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def rollouts(path):
    """Conversations, their responses, and log-probs near the policy's: clips of ratio and evidence bind."""
    g = torch.Generator().manual_seed(5)
    chats = [[{"role": "user", "content": f"Say {'very ' * (i % 3)}{i}:"}] for i in range(ROWS)]
    prompts = [chat_ids(chat) for chat in chats]
    responses = [torch.randint(7, 100, (n,), generator=g) for n in RESPONSES]
    near = response_log_probs(path, prompts, responses).float()
    old, judged = ([x[:n] + 0.3 * torch.randn(n, generator=g) for x, n in zip(near, RESPONSES, strict=True)]
                   for _ in range(2))  # fmt: skip
    return {
        "prompts": prompts,
        "responses": responses,
        "input_ids": [torch.cat(pair) for pair in zip(prompts, responses, strict=True)],
        "response_mask": [(torch.arange(n) % 4 != 2).long() for n in RESPONSES],  # 0 as at a tool's tokens
        "advantages": [torch.randn(1, generator=g) * torch.ones(n) for n in RESPONSES],
        "old_log_probs": old,
        "teacher_logprobs": [pad(x, (len(p) - 1, 1))[:, None] for x, p in zip(judged, prompts, strict=True)],
        "raw_prompt": chats,
        "extra_info": [{"privileged": f"it is {i}", "index": i} for i in range(ROWS)],
    }


def trainer_batch(batch, is_jagged=True):
    """What verl's trainer holds before the teacher is asked: jagged in v1, padded in a DataProto."""
    tensors = {name: jagged(batch[name]) for name in ("prompts", "responses")}
    if not is_jagged:
        tensors = padded_prompts(batch["prompts"], batch["responses"]) | {"responses": stack(batch["responses"])}
    return tu.get_tensordict(tensors | {name: batch[name] for name in ("raw_prompt", "extra_info")})


def dense_history(path, batch, lam):
    """`train` in float64: transformers' logits, the oracle's gradient of them, plain SGD."""
    model, prompts, responses = policy(path), batch["prompts"], batch["responses"]
    teacher = stack([x[len(p) - 1 : -1, 0] for x, p in zip(batch["teacher_logprobs"], prompts, strict=True)])
    advantages, old, mask = (stack(batch[name]) for name in ("advantages", "old_log_probs", "response_mask"))
    history = []
    for _ in range(STEPS):
        model.zero_grad()
        logits = response_logits(model, prompts, responses)
        truth = oracles.rlsd_loss(
            logits, teacher, stack(responses), advantages, old, lam=lam, temperature=TEMPERATURE, mask=mask,
            epsilon_low=0.2, epsilon_high=0.28, dual_clip=2.0,
        )  # fmt: skip
        logits.backward(truth.gradient)
        gradient = {name: x.grad.clone() for name, x in model.named_parameters()}
        with torch.no_grad():
            for x in model.parameters():
                x -= LR * x.grad
        values = copy.deepcopy({name: x.detach() for name, x in model.named_parameters()})
        history.append({"loss": truth.loss.item(), "gradient": gradient, "parameter": values})
    return history


def errors(history, truth):
    """Of each step's loss, of all its gradients and of all its parameters, relative."""
    norm = lambda x: torch.stack([y.norm() for y in x.values()]).norm()  # noqa: E731
    for mine, true in zip(history, truth, strict=True):
        yield abs(mine["loss"] - true["loss"]) / abs(true["loss"])
        for what in ("gradient", "parameter"):
            assert mine[what].keys() == true[what].keys()
            difference = {name: x.double() - true[what][name] for name, x in mine[what].items()}
            yield float(norm(difference) / norm(true[what]))


def assert_history(history, truth, allowed=2e-5):
    """All of these are within what float32 leaves after three steps, while the model moves."""
    found = list(errors(history, truth))
    assert max(found) <= allowed, found
    first, last = (x["parameter"]["model.embed_tokens.weight"].double() for x in (truth[0], truth[-1]))
    assert (last - first).norm() > 100 * allowed * first.norm(), "it has hardly moved"
