"""Sampling: what a response depends on, its distribution, where it ends, and what vLLM is asked and given."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import no_kernel
from ranks import results_of
from safetensors.torch import load_file
from tiny import save_model, tokenizer, vision_processor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainers import generation
from trainers.config import TrainerConfig
from trainers.data import Example, seed_of
from trainers.generation import Draft, Generator, Response, Sampling, SeededSampler, Waste
from trainers.policy import Policy, wrapped
from trainers.processes import device
from trainers.prompts import Encoder, Prompt

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
EOS, OTHER = 0, 42
WORDS = tokenizer()
TEXTS = [f"Say {'very ' * (i % 5)}{i}:" for i in range(20)]
PROMPTS = [Prompt(WORDS(text)["input_ids"], {}) for text in TEXTS]
SEEDS = [seed_of("test", i) for i in range(len(PROMPTS))]
SETTINGS = [Sampling(), Sampling(0.0), Sampling(0.7, 10), Sampling(1.5, 0, 0.8), Sampling(2.0, 40, 0.9)]


def generator(processor=WORDS, **options):
    options = {"max_completion_length": 8} | options
    return Generator(TrainerConfig(testbed="arithmetic", **options), processor)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = save_model(tmp_path_factory.mktemp("model"), initializer_range=0.3)
    return Policy(AutoModelForCausalLM.from_pretrained(directory).to(device()), bf16=False)


@pytest.fixture
def configured(policy, monkeypatch):
    """Changes the generation_config that the model comes with."""

    def configured(**changes):
        settings = GenerationConfig(**{"eos_token_id": EOS, "pad_token_id": EOS} | changes)
        monkeypatch.setattr(policy.model, "generation_config", settings)

    return configured


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_response_depends_on_prompt_and_seed_only(policy, sampling, size):
    """Not on the batch, its padding or the order; greedy responses not on the seed either."""
    expected = generator()(policy, PROMPTS, SEEDS, sampling)
    order = sorted(range(len(PROMPTS)), key=lambda i: SEEDS[i])[:13]
    seeds = [SEEDS[i] if sampling.temperature else 0 for i in order]
    found = generator(per_device_generation_batch_size=size)(policy, [PROMPTS[i] for i in order], seeds, sampling)
    assert found == [expected[i] for i in order]


def test_other_seeds_give_other_responses(policy):
    found = generator()(policy, PROMPTS[:1] * 50, range(50), Sampling())
    assert len({tuple(response.token_ids) for response in found}) > 40


def test_a_shorter_limit_cuts_the_same_response(policy):
    long, short = (generator(max_completion_length=n)(policy, PROMPTS, SEEDS, Sampling()) for n in (8, 3))
    assert [r.token_ids[:3] for r in long] == [r.token_ids for r in short]


class Impatient(Waste):
    """Ends a batch after every step."""

    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(input_ids, scores, **kwargs) | True


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.7, 10, 0.9)], ids=str)
def test_a_response_does_not_depend_on_when_its_batch_was_left(policy, configured, sampling, monkeypatch):
    configured(eos_token_id=list(range(20)))
    expected = generator()(policy, PROMPTS, SEEDS, sampling)
    assert len({len(response.token_ids) for response in expected}) > 2
    monkeypatch.setattr(generation, "Waste", Impatient)
    for size in (1, 3, 64):
        assert generator(per_device_generation_batch_size=size)(policy, PROMPTS, SEEDS, sampling) == expected


def test_rows_that_have_ended_are_left_behind(policy, configured, monkeypatch):
    """No more than twice the tokens that had to be read, where one response of 64 takes 200 and all others 1 or 2."""
    configured(eos_token_id=list(range(1, 103)))
    work, forward = [], policy.model.forward

    def counted(input_ids=None, **arguments):
        work.append(input_ids.numel())
        return forward(input_ids=input_ids, **arguments)

    monkeypatch.setattr(policy.model, "forward", counted)
    monkeypatch.setattr(generation, "SeededSampler", Scripted)
    found = generator(max_completion_length=200, per_device_generation_batch_size=64)(
        policy, PROMPTS[:1] * 64, range(64), Sampling()
    )
    assert [len(response.token_ids) for response in found] == [200, *(1 + i % 2 for i in range(1, 64))]
    prompts, responses = 64 * len(PROMPTS[0].token_ids), sum(len(response.token_ids) for response in found)
    assert sum(work) <= 2 * (prompts + responses)


class Scripted(SeededSampler):
    """By its seed row 0 never ends, others after 1 or 2 tokens."""

    def __init__(self, drafts, *arguments):
        super().__init__(drafts, *arguments)
        self.drafts = drafts

    def __call__(self, input_ids, scores):
        at = (self.positions[:, 0] + input_ids.shape[1]).tolist()
        ends = [draft.seed > 0 and place >= draft.seed % 2 for draft, place in zip(self.drafts, at, strict=True)]
        chosen = torch.tensor([[OTHER if end else EOS] for end in ends], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def pictured_prompts():
    """Of text alone, then with one image and two."""
    from PIL import Image

    encode = Encoder(vision_processor(), TrainerConfig(testbed="arithmetic"))
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16 * (1 + i % 3), 32, 3), dtype=np.uint8))
        for i in range(3)
    ]
    shown = [(), (), pictures[:1], pictures[1:]]
    return encode, [encode(Example(TEXTS[i], "", (), "exact", tuple(images), "")) for i, images in enumerate(shown)]


def sharded_responses(rank, directory):
    """Of rank 0 to text, of rank 1 to images, from a model that FSDP2 shards."""
    generation.Waste = Impatient
    encode, prompts = pictured_prompts()
    config = TrainerConfig(testbed="arithmetic", fsdp=True, max_completion_length=4 + 4 * rank)
    model = AutoModelForImageTextToText.from_pretrained(directory).to(device())
    places = range(2 * rank, 2 * rank + 2)
    sample = Generator(config, encode.tokenizer)
    found = sample(wrapped(model, config), [prompts[i] for i in places], [SEEDS[i] for i in places], Sampling())
    return [tuple(response) for response in found]


def test_processes_that_shard_a_model_need_not_sample_alike(tmp_path):
    """One has ended while the other goes on, and has no use for the vision tower."""
    directory = save_model(tmp_path / "model", "qwen3_vl")
    policy = Policy(AutoModelForImageTextToText.from_pretrained(directory).to(device()), bf16=False)
    encode, prompts = pictured_prompts()
    expected = []
    for length, places in ((4, slice(2)), (8, slice(2, 4))):
        sample = generator(encode.tokenizer, max_completion_length=length)
        expected += map(tuple, sample(policy, prompts[places], SEEDS[places], Sampling()))
    assert len(expected[0][0]) < max(len(token_ids) for token_ids, _ in expected[2:])
    assert results_of(sharded_responses, 2, str(directory)) == [expected[:2], expected[2:]]


@pytest.mark.parametrize("training", [True, False])
def test_a_policy_that_trains_goes_on_training(policy, training):
    policy.train(training)
    generator()(policy, PROMPTS[:3], SEEDS[:3], Sampling())
    assert policy.training is training


def seeded(seeds, sampling, width=5, max_tokens=1):
    return SeededSampler([Draft(PROMPTS[0], seed) for seed in seeds], sampling, width, max_tokens)


def truncated(logits, sampling):
    """q in float64, by transformers' own warpers."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []
    return LogitsProcessorList(warpers)(None, logits.double()[None])[0].softmax(-1)


def sampled(sampler, logits):
    """Which token is left of each row."""
    rows = len(sampler.uniforms)
    left = sampler(torch.zeros(rows, 5, dtype=torch.int64), logits.expand(rows, -1).to(device()))
    assert ((left > -torch.inf).sum(-1) == 1).all()
    return left.argmax(-1).cpu()


STOCHASTIC = [s for s in SETTINGS if s.temperature] + [Sampling(0.3, 5, 0.99)]


@pytest.mark.parametrize("sampling", STOCHASTIC, ids=str)
def test_even_uniform_numbers_give_every_token_its_share(sampling):
    """The inverse CDF takes a number in [0, 1) to each token as often as q says, to a count: no chance in it."""
    logits, count = torch.randn(50), 20_000
    sampler = seeded([0] * count, sampling)
    sampler.uniforms = ((torch.arange(count) + 0.5) / count)[:, None].to(device())
    expected = count * truncated(logits, sampling)
    found = torch.bincount(sampled(sampler, logits), minlength=50)
    # a float32 log q is off by some eps32, and so is a uniform number
    assert (found - expected).abs().max() <= 1 + count * 100 * torch.finfo(torch.float32).eps
    assert found[expected == 0].sum() == 0


def chance_bound(found, expected):
    """Chernoff: a binomial share p has count * KL(share, p) >= x by chance with probability at most 2 exp(-x)."""
    count, share = found.sum(), found.double() / found.sum()
    kl = torch.special.xlogy(share, share / expected) + torch.special.xlogy(1 - share, (1 - share) / (1 - expected))
    return count * torch.where((expected > 0) & (expected < 1), kl, 0.0).max(), math.log(2 * len(expected) / 1e-6)


@pytest.mark.parametrize("sampling", STOCHASTIC, ids=str)
@pytest.mark.parametrize("position", [0, 3])
def test_seeds_draw_from_the_distribution(sampling, position):
    """20,000 seeds; a right sampler fails with probability below 1e-6, over the choice of seeds."""
    logits = torch.randn(50)
    sampler = seeded([seed_of(i) for i in range(20_000)], sampling, width=5 - position, max_tokens=4)
    found, expected = torch.bincount(sampled(sampler, logits), minlength=50), truncated(logits, sampling)
    deviation, bound = chance_bound(found, expected)
    assert deviation <= bound
    assert found[expected == 0].sum() == 0


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.3, 30, 0.9)], ids=str)
@torch.no_grad()
def test_a_models_responses_have_its_distribution(policy, sampling):
    """As above, through generate: a right sampler fails with probability below 1e-6."""
    prompt = PROMPTS[3]
    ids = torch.tensor([prompt.token_ids], device=device())
    expected = truncated(policy.model.eval()(ids).logits[0, -1].cpu(), sampling)
    one = generator(max_completion_length=1, per_device_generation_batch_size=4096)
    responses = one(policy, [prompt] * 20_000, [seed_of("one", i) for i in range(20_000)], sampling)
    assert all(len(response.token_ids) == 1 for response in responses)
    found = torch.bincount(torch.tensor([response.token_ids[0] for response in responses]), minlength=len(expected))
    deviation, bound = chance_bound(found, expected)
    assert deviation <= bound
    assert found[expected == 0].sum() == 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])  # the least and the largest that torch.rand draws
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}], ids=str)
def test_the_ends_of_the_unit_interval_are_tokens_of_the_support(uniform, filters):
    """Also where rounding leaves the masses of a row a little short of 1."""
    logits = torch.randn(200, 5000, device=device())
    logits[:, [0, 1, -2, -1]] = -torch.inf
    sampler = seeded(range(200), Sampling(**filters))
    sampler.uniforms.fill_(uniform)
    chosen = sampler(torch.zeros(200, 5, dtype=torch.int64), logits).argmax(-1, keepdim=True)
    assert (logits.gather(1, chosen) >= logits.topk(filters.get("top_k", 4996)).values[:, -1:]).all()


def test_each_position_has_its_own_number():
    sampler = seeded([0], Sampling(), max_tokens=3)
    sampler.uniforms[:] = torch.tensor([0.55, 0.05, 0.95])
    reads = (torch.zeros(1, 5 + i, dtype=torch.int64) for i in range(3))
    assert [int(sampler(ids, torch.zeros(1, 10, device=device())).argmax()) for ids in reads] == [5, 0, 9]


def test_positions_and_seeds_draw_independently():
    """Correlations of 200,000 pairs of uniform numbers: beyond 0.02, 9 standard deviations, below 1e-15 by chance."""
    uniforms = seeded([seed_of(i) for i in range(50_001)], Sampling(), max_tokens=5).uniforms.double().cpu().numpy()
    pairs = (uniforms[:, :-1], uniforms[:, 1:]), (uniforms[:-1], uniforms[1:])
    assert all(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02 for a, b in pairs)


def test_greedy_is_transformers_greedy(policy, configured):
    configured()
    found = generator()(policy, PROMPTS, SEEDS, Sampling(0.0))
    for prompt, response in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt.token_ids], device=device())
        whole = policy.model.eval().generate(ids, do_sample=False, max_new_tokens=8)
        assert response.token_ids == whole[0, len(prompt.token_ids) :].tolist()


def test_greedy_is_the_largest_logit():
    for logits in torch.randn(30, 50):
        assert sampled(seeded([0, 1], Sampling(0.0)), logits).tolist() == [logits.argmax()] * 2


def cut(response, eos):
    """What is left of a response where these tokens end it."""
    ends = [i for i, token in enumerate(response.token_ids) if token in eos]
    return Response(response.token_ids[: ends[0] + 1], True) if ends else Response(response.token_ids, False)


@pytest.mark.parametrize("eos", [[EOS], [EOS, OTHER], [OTHER, 50, 60], list(range(40, 103))])
def test_a_response_ends_with_the_first_eos(policy, configured, eos):
    configured(eos_token_id=10**6)  # never sampled
    whole = generator()(policy, PROMPTS * 5, range(100), Sampling())
    assert not any(response.finished for response in whole)
    configured(eos_token_id=eos)
    found = generator()(policy, PROMPTS * 5, range(100), Sampling())
    assert found == [cut(response, eos) for response in whole]
    assert any(response.finished for response in found)


def test_without_an_eos_of_its_own_the_model_ends_with_the_tokenizers(policy, configured):
    configured(eos_token_id=EOS)
    expected = generator()(policy, PROMPTS, SEEDS, Sampling())
    configured(eos_token_id=None)
    assert generator()(policy, PROMPTS, SEEDS, Sampling()) == expected


def test_an_eos_as_the_last_token_allowed_is_an_end(policy, configured):
    configured(eos_token_id=list(range(103)))
    found = generator(max_completion_length=1)(policy, PROMPTS, SEEDS, Sampling())
    assert all(response.finished and len(response.token_ids) == 1 for response in found)


@pytest.mark.parametrize("changes", [
    {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"top_k": 1, "do_sample": True}, {"num_beams": 3},
    {"temperature": 0.1, "top_p": 0.1, "min_p": 0.5, "do_sample": True}, {"suppress_tokens": list(range(20, 90))},
    {"bad_words_ids": [[i] for i in range(20, 90)]}, {"min_new_tokens": 8}, {"forced_eos_token_id": 0},
    {"exponential_decay_length_penalty": (1, 3.0)}, {"max_length": 4}, {"guidance_scale": 2.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0)], ids=str)
def test_the_models_own_decoding_settings_do_not_count(policy, configured, changes, sampling):
    configured()
    expected = generator()(policy, PROMPTS, SEEDS, sampling)
    configured(**changes)
    own = policy.model.generation_config
    assert generator()(policy, PROMPTS, SEEDS, sampling) == expected
    assert policy.model.generation_config is own
    assert own.to_diff_dict().items() >= changes.items()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0)], ids=str)
@pytest.mark.parametrize("waste", [Waste, Impatient])
def test_images_do_not_depend_on_their_batch(tmp_path, sampling, waste, monkeypatch):
    model = AutoModelForImageTextToText.from_pretrained(save_model(tmp_path, "qwen3_vl")).to(device())
    encode, prompts = pictured_prompts()
    one, many = (generator(encode.tokenizer, per_device_generation_batch_size=size) for size in (1, 8))
    alone = one(Policy(model, False), prompts * 2, range(8), sampling)
    monkeypatch.setattr(generation, "Waste", waste)
    assert many(Policy(model, False), prompts * 2, range(8), sampling) == alone


class Engine:
    """What the trainers use of vllm.LLM; a response tells its prompt and its request."""

    made = None

    def __init__(self, **options):
        Engine.made, self.options, self.events, self.weights = self, options, [], {}
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights):
        self.events.append("weights")
        self.weights = {name: value.clone() for name, value in weights}

    def reset_prefix_cache(self):
        self.events.append("reset")

    def generate(self, prompts, sampling_params, use_tqdm):
        self.events.append("generate")
        self.prompts, self.params = prompts, sampling_params
        return [
            SimpleNamespace(outputs=[SimpleNamespace(
                token_ids=(*prompt["prompt_token_ids"], params.seed),
                finish_reason="length" if params.seed % 2 else "stop",
            )])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]  # fmt: skip


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace))


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "qwen3_vl"])
def test_vllm_gets_the_policys_weights_as_a_checkpoint_names_them(vllm, tmp_path, family):
    auto = AutoModelForImageTextToText if family == "qwen3_vl" else AutoModelForCausalLM
    policy = Policy(auto.from_pretrained(save_model(tmp_path / "model", family)), bf16=False)
    sample = generator(use_vllm=True)
    for step in range(2):
        sample(policy, PROMPTS, SEEDS, Sampling())
        policy.model.save_pretrained(tmp_path / str(step))
        expected = load_file(tmp_path / str(step) / "model.safetensors")
        assert Engine.made.weights.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in Engine.made.weights.items())
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(1.0)
    # what vLLM remembers of a prompt was computed with the last weights
    assert Engine.made.events == ["weights", "reset", "generate"] * 2


@pytest.mark.parametrize(("sampling", "asked"), [
    (Sampling(), (1.0, 0, 1.0)), (Sampling(0.0), (0.0, 0, 1.0)),
    (Sampling(1.6, 20, 0.8), (1.6, 20, 0.8)),
], ids=str)  # fmt: skip
def test_vllm_is_asked_per_prompt_and_answers_in_order(vllm, policy, sampling, asked):
    found = generator(use_vllm=True)(policy, PROMPTS, SEEDS, sampling)
    assert [prompt["prompt_token_ids"] for prompt in Engine.made.prompts] == [prompt.token_ids for prompt in PROMPTS]
    assert [params.seed for params in Engine.made.params] == SEEDS
    for params in Engine.made.params:
        assert (params.temperature, params.top_k, params.top_p) == asked
        assert params.max_tokens == 8
    assert found == [Response([*p.token_ids, s], s % 2 == 0) for p, s in zip(PROMPTS, SEEDS, strict=True)]


@pytest.mark.parametrize(("options", "dtype"), [
    ({}, "float32"), ({"bf16": True}, "bfloat16"), ({"dtype": "bfloat16"}, "bfloat16"),
], ids=str)  # fmt: skip
def test_vllm_is_made_for_the_run(vllm, options, dtype):
    generator(use_vllm=True, model_name_or_path="m", seed=5, vllm_gpu_memory_utilization=0.2, **options)
    expected = {"model": "m", "dtype": dtype, "gpu_memory_utilization": 0.2, "seed": 5}
    assert Engine.made.options.items() >= expected.items()


def test_vllm_refuses_adapters(vllm):
    with pytest.raises(ValueError, match=r"use_vllm.*lora_r"):
        generator(use_vllm=True, lora_r=4)


def test_vllm_refuses_images(vllm, policy):
    with pytest.raises(ValueError, match=r"use_vllm.*images"):
        generator(use_vllm=True)(
            policy, [PROMPTS[0], Prompt([1], {"pixel_values": torch.ones(4, 6)})], [0, 1], Sampling()
        )


def test_without_vllm_installed_use_vllm_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vllm"):
        generator(use_vllm=True)
