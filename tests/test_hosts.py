"""What integrations check of their hosts, and the prompt and the head that they share."""

import re
import tomllib

import pytest
import tiny
import torch
from conftest import no_kernel
from programs import ROOT
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from sdkernels import linear_token_log_prob, token_log_prob
from sdkernels.integrations.hosts import check_host
from sdkernels.integrations.prompts import privileged_prompt
from sdkernels.integrations.transformers import add_from_hidden, lm_head

pytestmark = no_kernel


@pytest.mark.parametrize(
    ("distribution", "hooks", "message"),
    [
        ("no-such-host", {}, "no-such-host is not installed: pip install 'host>=1' (tested with 1.2)"),
        ("safetensors", {"safetensors:gone": ""}, "has no safetensors.gone"),
        ("safetensors", {"safetensors.gone:x": ""}, "has no safetensors.gone.x"),
        ("safetensors", {"safetensors.torch:save_file": "tensors, path"},
         "has safetensors.torch.save_file(tensors, filename, metadata), not (tensors, path); sdkernels was tested with "
         "safetensors 1.2"),
    ],
)  # fmt: skip
def test_a_host_with_other_hooks_is_refused_in_one_line(distribution, hooks, message):
    with pytest.raises(ImportError, match=re.escape(message)) as caught:
        check_host(distribution, "1.2", "host>=1", hooks)
    assert "\n" not in str(caught.value)
    check_host("safetensors", "1.2", "host>=1", {"safetensors.torch:save_file": "tensors, filename"})


def test_what_a_check_tells_to_install_is_in_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {requirement for extra in extras.values() for requirement in extra}
    sources = [path.read_text() for path in (ROOT / "sdkernels/integrations").rglob("*.py")]
    told = [found for text in sources for found in re.findall(r'check_host\(\s*"[\w-]+", "[^"]+", "([^"]+)"', text)]
    assert {re.split("[<>=]", each)[0] for each in told} == {"transformers", "trl", "verl", "ms-swift"}
    assert set(told) <= known


def test_a_privileged_prompt():
    template = "{prompt} [{privileged}]"
    assert privileged_prompt("a {privileged} b", "{prompt}", template) == "a {privileged} b [{prompt}]"
    system, image = {"role": "system", "content": "s"}, {"type": "image"}
    chat = [system, {"role": "user", "content": [image, {"type": "text", "text": "q"}]}]
    assert privileged_prompt(chat, "7", template) == [
        system, {"role": "user", "content": [image, {"type": "text", "text": "q [7]"}]}
    ]  # fmt: skip
    assert chat[1]["content"][1]["text"] == "q"
    with pytest.raises(ValueError, match="has no text to put privileged information into"):
        privileged_prompt([{"role": "user", "content": [image]}], "7", template)
    with pytest.raises(ValueError, match=r"must hold \{prompt\} and \{privileged\}, got '\{prompt\}'"):
        privileged_prompt("q", "7", "{prompt}")


def models(tmp_path):
    """A plain head, one whose logits are capped, and one whose logits are scaled."""
    sizes = tiny.SIZES | {"vocab_size": 103, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    yield AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "model"))
    yield Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.3, query_pre_attn_scalar=16))
    yield GraniteForCausalLM(GraniteConfig(**{n: x for n, x in sizes.items() if n != "head_dim"}, logits_scaling=8.0))


def test_the_models_logits_are_those_of_its_head(tmp_path):
    for model in models(tmp_path):
        ids = torch.randint(1, 90, (2, 7))
        add_from_hidden(model)
        add_from_hidden(model)  # once more changes nothing

        def score(hidden, head, ids=ids):
            return linear_token_log_prob(hidden, head.weight, ids, **head.options)

        found = model(input_ids=ids, from_hidden=score)
        expected = token_log_prob(model(input_ids=ids).logits, ids)
        assert torch.allclose(found.log_prob, expected.log_prob, atol=2e-5), type(model).__name__
        found.log_prob.sum().backward()
        mine = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected.log_prob.sum().backward()
        for parameter, gradient in zip(model.parameters(), mine, strict=True):
            assert torch.allclose(gradient, parameter.grad, atol=1e-4)


def test_a_head_that_is_no_linear_layer_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "model"))
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="the LM head is a Sequential, not a Linear"):
        lm_head(model)
