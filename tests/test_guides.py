"""The guides of transformers and TRL: their blocks run in order, on a tiny model, for a step."""

import json
import re

import pytest
import tiny
from conftest import no_kernel
from programs import ROOT

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
ANSWERS = {"3 + 4": "7", "5 + 4": "9", "2 + 2": "4", "1 + 2": "3"}
QUICK = 'use_cpu=True, bf16=False, max_steps=1, report_to=[], per_device_train_batch_size=2, save_strategy="no"'


def run(guide, directory, monkeypatch, replaced):
    """Every python block, with what cannot run on a laptop in a second put in other words."""
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny.save_model(directory / "model")
    text = (ROOT / "docs" / guide).read_text()
    for name in re.findall(r"[\w-]+\.yaml", text):
        (directory / name).write_text(
            re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1] + "use_cpu: true\nbf16: false\n"
        )
    completions = [{"prompt": f"{sum_} = ", "completion": answer} for sum_, answer in ANSWERS.items()]
    tiny.write_rows(directory / "samples.jsonl", completions)
    lines = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    rows = [json.loads(line) for line in lines[1].splitlines()] if lines else []
    tiny.write_rows(directory / "rows.jsonl", rows * 4)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace = {}
    for block in blocks:
        block = block.replace("Qwen/Qwen3-0.6B", str(model))
        for written, quick in replaced.items():
            block = block.replace(written, quick)
        exec(compile(block, guide, "exec"), namespace)
    return blocks, namespace


def test_transformers(tmp_path, monkeypatch):
    replaced = {'"runs/ssd", report_to=[]': f'"runs/ssd", {QUICK}'}
    blocks, names = run("transformers.md", tmp_path, monkeypatch, replaced)
    assert len(blocks) == 6
    assert names["trainer"].state.global_step == 1
    assert names["hidden"].grad.abs().sum() > 0


def test_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    replaced = {
        f'output_dir="runs/{name}"': f'output_dir="runs/{name}", {QUICK}{more}'
        for name, more in (("rlsd", ""), ("ssd", ""), ("sdft", ", num_generations=2, max_completion_length=8"))
    } | {"num_generations=8, max_completion_length=1024": "num_generations=2, max_completion_length=8"}
    blocks, names = run("trl.md", tmp_path, monkeypatch, replaced)
    assert len(blocks) == 5
    assert names["trainer"].state.global_step == 1
    names["use_fused_head"](False)
