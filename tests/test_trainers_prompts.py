"""From examples to what a model reads: templates, images, privileged prompts, and the places that score a response."""

import numpy as np
import pytest
import torch
from conftest import no_kernel
from PIL import Image
from tiny import save_model, tokenizer, vision_processor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from trainers.config import TrainerConfig
from trainers.data import Example
from trainers.generation import Response
from trainers.policy import response_side
from trainers.processes import device
from trainers.prompts import PRIVILEGED_TEMPLATES, Encoder, Prompt, by_length, privileged, stack_media
from trainers.rollouts import Rollout
from trainers.teacher import privileges
from trainers.verifiers import Verdict

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "1+1"}]
IMAGE = {"type": "image"}


def example(prompt, images=(), source="a.jsonl:1"):
    return Example(prompt, "2", (), "exact", tuple(images), source)


def encoder(processor=None, **options):
    return Encoder(processor or tokenizer(), TrainerConfig(testbed="arithmetic", **options))


def image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def text_of(prompt):
    return tokenizer().decode(prompt.token_ids)


def test_plain_text_has_no_turn_for_a_system_prompt():
    with pytest.raises(ValueError, match=r"a.jsonl:1: system_prompt is for chats"):
        encoder(tokenizer(), system_prompt="S")(example("1+1"))


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("1+1", {}, "1+1"),
        ("1+1", {"as_chat": True}, "<|im_start|>user 1+1<|im_end|>"),
        ("1+1", {"as_chat": True, "system_prompt": "S"},
         "<|im_start|>system S<|im_end|><|im_start|>user 1+1<|im_end|>"),
        (CHAT[:1], {}, "<|im_start|>user Hi<|im_end|>"),
        (CHAT[:1], {"as_chat": True}, "<|im_start|>user Hi<|im_end|>"),
        (CHAT, {"system_prompt": "S"}, "<|im_start|>system S<|im_end|><|im_start|>user Hi<|im_end|>"
         "<|im_start|>assistant Yes?<|im_end|><|im_start|>user 1+1<|im_end|>"),
        ([{"role": "system", "content": "T"}, *CHAT[:1]], {"system_prompt": "S"},
         "<|im_start|>system T<|im_end|><|im_start|>user Hi<|im_end|>"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {},
         "<|im_start|>user ab<|im_end|>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("processor", [tokenizer, vision_processor])
def test_a_prompt_is_what_its_template_says(processor, prompt, options, expected):
    encoded = encoder(processor(), **options)(example(prompt))
    is_chat = not isinstance(prompt, str) or "as_chat" in options
    assert text_of(encoded) == expected + ("<|im_start|>assistant " if is_chat else "")
    assert all(value.shape == (1, len(encoded.token_ids)) for value in encoded.media.values())


def test_encoding_does_not_change_the_example():
    given = example([*CHAT], [image(32, 32)])
    encoder(vision_processor(), system_prompt="S")(given)
    assert given.prompt == CHAT


@pytest.mark.parametrize("prompt", ["1+1", CHAT, [{"role": "user", "content": [{"type": "text", "text": "1+1"}]}]])
@pytest.mark.parametrize("sizes", [[(32, 32)], [(32, 16), (16, 48)]])
def test_images_come_first_in_the_last_users_turn(tmp_path, prompt, sizes):
    images = [image(*size, seed) for seed, size in enumerate(sizes)]
    encoded = encoder(vision_processor())(example(prompt, images))
    patches = [width * height // 64 for width, height in sizes]
    shown = "".join(f"<|vision_start|>{'<|image_pad|>' * (count // 4)}<|vision_end|>" for count in patches)
    assert text_of(encoded).endswith(f"<|im_start|>user {shown}1+1<|im_end|><|im_start|>assistant ")
    assert encoded.media["image_grid_thw"].tolist() == [[1, height // 8, width // 8] for width, height in sizes]
    assert len(encoded.media["pixel_values"]) == sum(patches)
    assert "attention_mask" not in encoded.media

    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, picture in zip(paths, images, strict=True):
        picture.save(path)
    from_files = encoder(vision_processor())(example(prompt, map(str, paths)))
    assert from_files.token_ids == encoded.token_ids
    torch.testing.assert_close(from_files.media, encoded.media, rtol=0, atol=0)


@pytest.mark.parametrize("prompt", ["1+1", CHAT])
def test_a_text_model_refuses_images_by_row(prompt):
    with pytest.raises(ValueError, match=r"a.jsonl:7 has images"):
        encoder()(example(prompt, [image(32, 32)], source="a.jsonl:7"))


@pytest.mark.parametrize(
    ("rewards", "of_rollouts"),
    [
        ([1.0, 0.0, 1.0, 1.0], ["cd", "acd", "ad", "ac"]),  # the right ones but its own
        ([0.0, 0.5, 0.25, 0.0], ["b", "", "b", "b"]),
        ([0.0, 0.0, 0.0, 0.0], ["", "", "", ""]),
    ],
)
def test_what_a_teacher_may_be_told(rewards, of_rollouts):
    problem = Example("1+1", 2, ("two", "1+1=2"), "exact", (), "a.jsonl:1")
    group = [
        Rollout(problem, None, Response([1], True), text, Verdict(reward, "" if reward == 1 else f"not {text}"))
        for text, reward in zip("abcd", rewards, strict=True)
    ]
    for rollout, others, reward in zip(group, of_rollouts, rewards, strict=True):
        assert privileges("answer", rollout, group) == ["2"]
        assert privileges("solution", rollout, group) == ["two", "1+1=2"]
        assert privileges("rollout", rollout, group) == list(others)
        assert privileges("feedback", rollout, group) == ([] if reward == 1 else [f"not {rollout.text}"])


@pytest.mark.parametrize("kind", sorted(PRIVILEGED_TEMPLATES))
def test_privileged_prompts_hold_the_prompt_and_what_is_told(kind):
    told = privileged(example("What is 1+1?"), kind, "two")
    assert told.prompt.startswith("What is 1+1?\n\n")
    assert ("\ntwo\n" in told.prompt) != (": two\n" in told.prompt)
    assert told == example(told.prompt)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("1+1", "(2) 1+1"),
        (CHAT, [*CHAT[:2], {"role": "user", "content": "(2) 1+1"}]),
        ([{"role": "user", "content": [IMAGE, {"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "1+1"}]}],
         [{"role": "user", "content": [IMAGE, {"type": "text", "text": "a"}, IMAGE,
                                       {"type": "text", "text": "(2) 1+1"}]}]),
        ([{"role": "user", "content": [{"type": "text", "text": "1+1", "more": 0}, IMAGE], "name": "x"}],
         [{"role": "user", "content": [{"type": "text", "text": "(2) 1+1", "more": 0}, IMAGE], "name": "x"}]),
    ],
)  # fmt: skip
def test_only_the_last_text_of_the_last_turn_is_filled_in(prompt, expected):
    before = repr(prompt)
    assert privileged(example(prompt), "answer", "2", "({privileged}) {prompt}") == example(expected)
    assert repr(prompt) == before


@pytest.mark.parametrize("text", ["{prompt}", "{privileged}", "{x} {} }{ {0!r}", r"\1 \g<0>", "%s"])
def test_braces_in_a_prompt_or_in_what_is_told_stay(text):
    template = "{privileged}|{prompt}|{other}|{prompt}|{}"
    assert privileged(example(text), "answer", "2", template).prompt == f"2|{text}|{{other}}|{text}|{{}}"
    assert privileged(example("1+1"), "answer", text, template).prompt == f"{text}|1+1|{{other}}|1+1|{{}}"


def test_a_turn_without_text_is_refused_by_row():
    with pytest.raises(ValueError, match=r"a.jsonl:1: .*no text"):
        privileged(example([{"role": "user", "content": [IMAGE]}]), "answer", "2")


def test_prompts_that_are_too_long_are_left_out_and_said():
    said = []
    examples = [example("x" * length, source=f"a.jsonl:{i}") for i, length in enumerate([3, 9, 4, 1, 5], 1)]
    kept = encoder().short_enough(examples, 4, said.append)
    assert [e.source for e in kept] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert said == ["2 of 5 prompts have more than 4 tokens: a.jsonl:2, a.jsonl:5"]


def test_at_most_ten_of_those_left_out_are_named():
    said = []
    encoder().short_enough([example("x" * i, source=f"r{i}") for i in range(1, 31)], 2, said.append)
    assert said == [f"28 of 30 prompts have more than 2 tokens: {', '.join(f'r{i}' for i in range(3, 13))}"]


@pytest.mark.parametrize("limit", [None, 9])
def test_nothing_is_said_where_all_are_short_enough(limit):
    examples = [example("x" * length) for length in (3, 9)]
    assert list(encoder().short_enough(examples, limit, pytest.fail)) == examples


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"no prompt has at most 2 tokens.*max_prompt_length"):
        encoder().short_enough([example("xyz")], 2, lambda text: None)


def tokens(*counts):
    """Lists of so many tokens, all different."""
    whole = iter(range(7, 103))
    return [[next(whole) for _ in range(count)] for count in counts]


def test_predicts_are_the_places_before_each_response_token():
    prompts, responses = tokens(3, 5, 1, 2), tokens(4, 1, 6, 0)
    batch = encoder().batch([Prompt(p, {}) for p in prompts], responses)
    read = [p + r for p, r in zip(prompts, responses, strict=True)]
    assert batch.input_ids.shape == batch.attention_mask.shape == (4, 7)
    assert [row[mask == 1].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)] == read
    assert batch.attention_mask.tolist() == [[1] * len(r) + [0] * (7 - len(r)) for r in read]
    predicts, following = [], []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for i, token in enumerate(response):
            predicts.append(row * 7 + len(prompt) + i - 1)
            following.append(token)
    assert batch.predicts.tolist() == predicts
    assert batch.response_ids.tolist() == following
    assert batch.response_ids.dtype == batch.input_ids.dtype == torch.int64


def test_as_many_responses_as_prompts():
    with pytest.raises(ValueError, match="shorter"):
        encoder().batch([Prompt([1, 2], {}), Prompt([3], {})], [[4]])


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen3_moe", "qwen3_vl"])
def family(request, tmp_path_factory):
    """A model, its encoder and examples of different lengths, with images where it reads them."""
    directory = save_model(tmp_path_factory.mktemp(request.param), request.param)
    vision = request.param == "qwen3_vl"
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(directory).to(device())
    examples = [example(text) for text in ("1+1", "a longer prompt than that", "?")]
    examples += [example(CHAT)]
    if vision:
        examples += [example("one", [image(32, 32)]), example("two", [image(32, 16, 1), image(16, 48, 2)])]
        examples += [example(CHAT, [image(48, 32, 3)])]
    return model.eval(), encoder(vision_processor() if vision else None), examples


@pytest.mark.parametrize("order", ["as they are", "reversed"])
@torch.no_grad()
def test_hidden_states_of_a_batch_are_those_of_each_sequence_alone(family, order):
    model, encode, examples = family
    examples = examples if order == "as they are" else examples[::-1]
    prompts = [encode(e) for e in examples]
    responses = tokens(*(3 + 5 * i % 7 for i in range(len(prompts))))
    together = response_side(model, encode.batch(prompts, responses)).hidden.split([len(r) for r in responses])
    for prompt, response, found in zip(prompts, responses, together, strict=True):
        media = stack_media([prompt], len(prompt.token_ids + response), left=False)
        ids = torch.tensor([prompt.token_ids + response], device=device())
        hidden = model.base_model(input_ids=ids, **media).last_hidden_state
        expected = hidden[0, len(prompt.token_ids) - 1 : -1]
        # float32 in another order of summation, through a few dozen operations; a wrong place or image is off by ~1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("left", [False, True])
def test_media_are_padded_like_their_prompts(left):
    types = [torch.tensor([[1, 1, 0]]), torch.tensor([[1]])]
    pixels = [torch.ones(4, 6), torch.full((8, 6), 2.0)]
    prompts = [Prompt(tokens(n)[0], {"types": t, "pixels": p}) for n, t, p in zip((3, 1), types, pixels, strict=True)]
    media = stack_media([prompts[0], Prompt(tokens(2)[0], {}), prompts[1]], 5, left)
    assert torch.equal(media["pixels"].cpu(), torch.cat(pixels))
    rows = [[0, 0, 1, 1, 0], [0] * 5, [0, 0, 0, 0, 1]] if left else [[1, 1, 0, 0, 0], [0] * 5, [1, 0, 0, 0, 0]]
    assert media["types"].tolist() == rows


def test_text_alone_has_no_media():
    assert stack_media([Prompt([1], {}), Prompt([1, 2], {})], 2, left=True) == {}


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 7), (0, 2)])
def test_by_length_puts_like_lengths_together(count, size):
    items = [(7 * i % 10, i) for i in range(count)]
    parts = by_length(items, size, lambda item: item[0])
    assert [item for part in parts for item in part] == sorted(items)
    assert [len(part) for part in parts] == [size] * (count // size) + [count % size] * (count % size > 0)


def test_by_length_keeps_the_order_of_equal_lengths():
    assert by_length(["bb", "a", "dd", "cc"], 2, len) == [["a", "bb"], ["dd", "cc"]]
