"""What the documents say exists, exists; what they say runs, runs."""

import re
from pathlib import Path

import pytest
from conftest import no_kernel

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_named_in_a_document_exist(document):
    text = document.read_text()
    linked = re.findall(r"\]\((?!http)([^)#]+)", text)
    named = re.findall(r"\b((?:sdkernels|csrc|tests|benchmarks|trainers)/[\w/.*-]*\w)", text)
    missing = {path for path in linked if not (document.parent / path).exists()}
    missing |= {path for path in named if not list(ROOT.glob(path))}
    assert not missing


def test_make_verbs_named_in_documents_exist():
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        verb for path in DOCUMENTS for verb in re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert named
    assert named <= verbs


@no_kernel
def test_the_readme_examples_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert len(blocks) >= 3
    assert namespace["student_logits"].grad.abs().sum() > 0
