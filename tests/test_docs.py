"""What the documents say exists, exists; what they say runs, runs."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import no_kernel

import sdkernels
from benchmarks import tables

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCUMENTS}
EXECUTED = ("README.md", "docs/rlsd.md", "docs/ssd.md", "docs/linear.md")  # the other guides have tests of their own
FOREIGN = {"torch.distributed.run", "pip", "venv", "verl.trainer.main_ppo", "sphinx"}


def fenced(text, language):
    """The blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands():
    """Every command line of a document that starts a program of this project: document, program, options."""
    for name, text in TEXTS.items():
        blocks = "\n".join(fenced(text, "bash") + fenced(text, "text")).replace("\\\n", " ")
        inline = re.findall(r"`([^`\n]*python[^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in [*blocks.splitlines(), *inline]:
            words = shlex.split(line, comments=True)
            starts = [at for at, word in enumerate(words) if Path(word).name in ("python", "torchrun")]
            for at in starts[:1]:
                rest = words[at + 1 :]
                program = next((word for word in rest if "/" in word or "." in word), None)
                if program:
                    tail = rest[rest.index(program) + 1 :]
                    options = [word.partition("=")[0] for word in tail if word.startswith("--")]
                    yield name, program, tuple(options)


@pytest.mark.parametrize("name", TEXTS)
def test_paths_named_in_a_document_exist(name):
    text, folder = TEXTS[name], (ROOT / name).parent
    linked = re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(r"\{include\} (\S+)", text)
    named = re.findall(r"(?<![\w/])((?:sdkernels|csrc|tests|benchmarks|trainers|docs)/[\w/.*-]*\w)", text)
    missing = {path for path in linked if not (folder / path).exists()}
    missing |= {path for path in named if not list(ROOT.glob(path))}
    assert not missing


def test_anchors_that_links_name_exist():
    def anchors(text):
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = [
        (name, path, anchor)
        for name, text in TEXTS.items()
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text)
    ]
    assert links
    for name, path, anchor in links:
        target = ROOT / name if not path else (ROOT / name).parent / path
        assert anchor in anchors(target.read_text()), f"{name}: {path}#{anchor}"


def test_make_verbs_named_in_documents_exist():
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {verb for text in TEXTS.values() for verb in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)}
    assert named
    assert named <= verbs


def test_programs_named_in_documents_exist_and_have_the_options():
    found = [(name, program, options) for name, program, options in commands() if program not in FOREIGN]
    assert len(found) > 15
    for name, program, options in found:
        if program.endswith(".py"):
            source = ROOT / program
        else:
            spec = importlib.util.find_spec(program)
            assert spec, f"{name}: no module {program}"
            source = Path(spec.origin)
        assert source.exists(), f"{name}: no {program}"
        if not source.is_relative_to(ROOT) or "site-packages" in source.parts:
            continue  # a host's
        known = "".join(path.read_text() for path in source.parent.glob("*.py"))
        for option in options:
            field = option.removeprefix("--").removeprefix("no_")
            assert re.search(rf"(?:{re.escape(option)}\b|\b{re.escape(field)}: )", known), f"{name}: {program} {option}"


def test_definitions_that_documents_link_to_are_there():
    links = [
        (name, label, path)
        for name, text in TEXTS.items()
        for label, path in re.findall(r"\[`([A-Za-z_]\w*)`\]\(([^)]+\.py)\)", text)
    ]
    assert len(links) > 100
    for name, label, path in links:
        source = ((ROOT / name).parent / path).read_text()
        assert re.search(rf"^\s*(?:def|class) {label}\b|^{label}\b.* = ", source, re.MULTILINE), f"{name}: {label}"


def test_the_api_has_every_public_name():
    named = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", TEXTS["docs/api.md"], re.MULTILINE)
    assert sorted(named) == sorted(sdkernels.__all__)


def test_tables_are_those_of_the_results():
    marked = 0
    for path in tables.DOCUMENTS:
        text = path.read_text()
        assert tables.rewritten(text) == text, f"{path.name}: run `make tables`"
        marked += sum(f"<!-- table: {name} -->" in text for name in tables.TABLES)
    assert marked >= len(tables.TABLES) - 1


@no_kernel
@pytest.mark.parametrize("name", EXECUTED)
def test_the_examples_run(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = fenced(TEXTS[name], "python")
    namespace = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    assert len(blocks) >= 2
    gradients = [namespace[x].grad for x in ("student_logits", "student_hidden") if x in namespace]
    assert all(x is not None and x.abs().sum() > 0 for x in gradients)
