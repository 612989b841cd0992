"""Tiny models with random weights, and prompts with rewards that vary, for tests of the trainers."""

import json
import string
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = [
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def tokenizer():
    """One token per printable character."""
    symbols = [*SPECIAL, *string.printable[:96]]
    built = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    built.decoder = decoders.Fuse()
    built.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_model(directory: Path, family: str = "qwen3", **changes) -> Path:
    """A model of the family and its tokenizer, or processor, in `directory`."""
    torch.manual_seed(0)
    words = tokenizer()
    ids = {"vocab_size": len(words), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    text = SIZES | ids | {"tie_word_embeddings": False, "initializer_range": 0.2} | changes
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**text))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**text))
    elif family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**text, **experts))
    else:
        model = _qwen3_vl(text, words)
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def _qwen3_vl(text, words):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    ids = {name: words.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Qwen3VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **ids)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    return model


def vision_processor():
    """Qwen3-VL's processor with its image half only: its video half needs torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    class ImageProcessor(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

        def save_pretrained(self, directory):
            self.tokenizer.save_pretrained(directory)

    size = {"shortest_edge": 256, "longest_edge": 1024}
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)
    return ImageProcessor(images, tokenizer(), None, CHAT_TEMPLATE)


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count=16):
    """Prompts of different lengths, two solutions each."""
    return [
        {"prompt": f"Say {'very ' * (i % 4)}{i}:", "reference": str(i), "solutions": [f"it is {i}", f"{i}, I say"]}
        for i in range(count)
    ]


# A verifier whose rewards depend on the response alone and vary within a group.
VERIFIER = """
def reward(response, reference):
    return float(sum(map(ord, response)) % 3 == 0)
"""
