"""The testbeds: what the code verifier finds, what the corpus and the tokenizer hold, what the arithmetic asks."""

import ast
import random
import re

import pytest
import torch
from conftest import no_kernel

from trainers import arithmetic, muon, stdlib_code
from trainers.code_verifier import verify
from trainers.verifiers import exact

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
FAULTLESS = [
    ("def f(a):", "\n    return a"),
    ("def f(a):", "\n    if a:\n        x = 1\n    else:\n        x = 2\n    return x"),
    ("def f(a):", "\n    return os.path.join(a)"),
    ("def f(a):", "\n    return [a for a in a if a]"),
    ("def f(a):", "\n    return lambda: a"),
    ("def f(a):", "\n\n    def g(x):\n        return x + a\n    return g"),
    (
        "def f(a):",
        "\n    try:\n        x = a()\n    except OSError as e:\n        raise ValueError from e\n    return x",
    ),
    ("def f(a):", "\n    while True:\n        if a:\n            break\n    return a"),
    ("def f(a):", "\n    with a as b:\n        return b.x"),
    ("def f(a):", "\n    yield a"),
    ("def f(a):", "\n    x, y = a\n    return y"),
    ("def f(a):", "\n    import os.path as q\n    return q.join(a)"),
    ("def f(a):", "\n    if (n := a.b) > 1:\n        return n\n    return 0"),
    ("def f(self, _x, *args, **kw):", "\n    self.g(*args, **kw)"),
]
FAULTS = [
    ("def f(a):", "\n    pass", "nothing added"),
    ("def f(a):", "\n    return b", "undefined name"),
    ("def f(a, b):", "\n    return a", "unused parameter"),
    ("def f(a):", "\n    x = 1\n    return a", "unused variable"),
    ("def f(a):", "\n    if a:\n        x = 1\n    return x", "undefined name"),
    ("def f(a):", "\n    if a:\n        return 1", "returns a value on some paths only"),
    ("def f(a):", "\n    for i in a:\n        print(i)\n    return i", "undefined name"),
    ("def f(a):", "\n    while True:\n        a += 1", "endless loop"),
    ("def f(a):", "\n    return len(a, a)", "len()"),
    ("def f(a):", "\n    return os.path.joinx(a)", "no such attribute"),
    ("def f(a):", "\n    return ''.jon(a)", "no such attribute"),
    ("def f(a):", "\n    a", "statement without effect"),
    ("def f(a):", "\n    a == a", "statement without effect"),
    ("def f(a):", "\n    return a == a", "compared with itself"),
    ("def f(a):", "\n\n    def g(x):\n        return a\n    return g", "unused parameter"),
    ("def f(a):", "\n    try:\n        x = a()\n    except OSError:\n        pass\n    return x", "undefined name"),
    ("def f(a):", "\n    return a\n    return a", "unreachable statement"),
    ("def f(a):", "\n    return a\nprint(1)", "not one function"),
    ("def f(a):", "\n    a = a", "assigned to itself"),
    ("def f(a):", "\n    a.b = 1\n    a.b = 1", "repeated statement"),
    ("def f(a):", "\n    x = a\n    x += 1", "unused variable"),
    ("def f(a):", "\n    if True:\n        return a", "constant condition"),
    ("def f(a):", "\n    del a\n    return a", "undefined name"),
    ("def f(a):", "\n    return a.b(", "syntax"),
]


@pytest.mark.parametrize(("prompt", "response"), FAULTLESS)
def test_a_function_without_a_fault_passes(prompt, response):
    assert verify(response, prompt) == (1.0, "", "")


@pytest.mark.parametrize(("prompt", "response", "fault"), FAULTS)
def test_the_first_fault_is_named(prompt, response, fault):
    verdict = verify(response, prompt)
    assert verdict.reward == 0
    assert verdict.feedback.startswith(fault)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Sources like the standard library's."""
    folder = tmp_path_factory.mktemp("library")
    functions = [
        f'def add_{i}(first, second: int = {i}):\n    """Adds."""\n    total = first + second\n    return total\n'
        for i in range(80)
    ]
    (folder / "adders.py").write_text("\n".join(functions))
    (folder / "others.py").write_text(
        "def long(x):\n    return 'a very long string indeed', x\n\n"
        "class C:\n    @staticmethod\n    def undefined(self):\n        return nowhere\n"
    )
    (folder / "test").mkdir()
    (folder / "test" / "excluded.py").write_text("def excluded(x):\n    return x\n")
    (folder / "broken.py").write_text("def broken(:")
    return stdlib_code.read_functions(folder)


def test_functions_are_normalised_and_self_contained(library):
    assert "def add_3(first, second=3):\n    total = first + second\n    return total" in library
    assert "def long(x):\n    return ('...', x)" in library
    assert len(library) == 81


def test_no_signature_is_in_two_parts(library):
    parts = stdlib_code.split(library)
    heads = [{text.split("\n")[0] for text in texts} for texts in parts.values()]
    assert sum(map(len, heads)) == len(set.union(*heads)) == 81
    assert len(parts["pretrain"]) > len(parts["prompts"]) > 0 < len(parts["eval"])


def test_a_line_break_with_its_indentation_is_one_token(library):
    tokenizer = stdlib_code.build_tokenizer(library)
    for text in [*library, "a\n\nb", "if x:\n        y\n" + " " * 32 + "z"]:
        assert tokenizer.decode(tokenizer.encode(text)[1:]) == text
    assert tokenizer.tokenize("a:\n        b") == [*tokenizer.tokenize("a:"), "<2>", "b"]
    assert tokenizer.encode("x")[0] == tokenizer.eos_token_id


def test_prompts_leave_a_name_to_be_used():
    (first, second) = stdlib_code.cuts("def add(first, second):\n    total = first + second\n    return total")
    assert first.prompt == "def add(first, second):"
    assert second.prompt == "def add(first, second):\n    total = first + second"
    assert verify(first.answer, first.prompt).reward == verify(second.answer, second.prompt).reward == 1


def test_renaming_keeps_a_function_what_it_is():
    text = "def f(self, first, *rest):\n    for item in rest:\n        first += item\n    return self.g(first)"
    renamed = stdlib_code.rename(text, ["alpha", "beta", "gamma"], random.Random(0))
    assert verify(renamed, "").reward == 1
    new = stdlib_code.variables(renamed)
    assert set(new) <= {"alpha", "beta", "gamma"}
    assert len(new) == 3
    for name, old in zip(["first", "rest", "item"], ["A", "B", "C"], strict=True):
        text = re.sub(rf"\b{name}\b", old, text)
    arguments = ast.parse(renamed).body[0]
    names = [arguments.args.args[1].arg, arguments.args.vararg.arg, arguments.body[0].target.id]
    for name, old in zip(names, ["A", "B", "C"], strict=True):
        renamed = re.sub(rf"\b{name}\b", old, renamed)
    assert renamed == text


def test_batches_hold_every_function_of_each_epoch(library):
    tokenizer = stdlib_code.build_tokenizer(library)
    made = stdlib_code.plan(library, tokenizer, random.Random(0))
    for token_ids, labels in made:
        kept = labels != stdlib_code.IGNORED
        assert torch.equal(token_ids[kept], labels[kept])
        assert (token_ids[~kept] == tokenizer.pad_token_id).all()
        assert token_ids.numel() <= stdlib_code.BATCH_TOKENS
    assert sum(len(token_ids) for token_ids, _ in made) == stdlib_code.EPOCHS * len(library)


def test_arithmetic_has_six_right_traces():
    problem = arithmetic.problem_of("Q37+18+25=")
    assert problem == (37, 18, 25)
    assert "18+25=43;43+37=80;####80" in problem.traces()
    assert len(problem.traces()) == 6
    assert all(exact(trace, problem.answer).reward == 1 for trace in problem.traces())
    assert exact("18+25=44;44+37=81;####81", problem.answer).reward == 0
    tokenizer = arithmetic.build_tokenizer()
    for trace in problem.traces():
        assert len(tokenizer.encode(trace + arithmetic.EOS)) <= arithmetic.MAX_RESPONSE_TOKENS
        assert tokenizer.decode(tokenizer.encode(trace)) == trace


def test_problems_are_different_and_reproducible():
    drawn = arithmetic.draw_problems(5000, random.Random(1))
    assert len(set(drawn)) == 5000
    assert drawn == arithmetic.draw_problems(5000, random.Random(1))
    assert {number for problem in drawn for number in problem} == set(range(10, 50))


def test_half_of_the_hinted_traces_are_followed():
    tokenizer = arithmetic.build_tokenizer()
    token_ids, labels = next(arithmetic.batches(tokenizer, (0.0, 0.0, 1.0), random.Random(0), size=2000))
    followed = 0
    for row, label in zip(token_ids, labels, strict=True):
        hint, rest = tokenizer.decode(row, skip_special_tokens=True).removeprefix("H").split("|")
        prompt, response = re.fullmatch(r"(Q[\d+]+=)(.*)", rest).groups()
        traces = arithmetic.problem_of(prompt).traces()
        assert hint in traces
        assert response in traces
        assert tokenizer.decode(label[label != arithmetic.IGNORED]) == response + arithmetic.EOS
        followed += hint == response
    assert followed / 2000 == pytest.approx(0.5 + 0.5 / 6, abs=0.06)  # five standard deviations


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 4, 9), (2, 9, 4)])
def test_muon_orthogonalises(shape):
    """Singular vectors stay, singular values are taken to about 1."""
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    a, b, c = muon.COEFFICIENTS
    x = s / s.norm(dim=1, keepdim=True)
    for _ in range(muon.STEPS):
        x = a * x + b * x**3 + c * x**5
    found = muon.orthogonalised(matrices)
    assert torch.allclose(found, u @ torch.diag_embed(x) @ v, rtol=0, atol=1e-10)


def test_muon_is_pytorchs():
    """Which rounds to bfloat16 in each iteration."""
    ours, theirs = (torch.nn.Linear(8, 5, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    optimizers = (
        muon.Muon(ours.parameters(), 0.01),
        torch.optim.Muon(theirs.parameters(), 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        gradient = torch.randn(5, 8)
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            module.weight.grad = gradient.clone()
            optimizer.step()
    moved, expected = ours.weight - start, theirs.weight - start
    assert (moved - expected).norm() <= 15 * 2**-8 * expected.norm()  # 15 roundings: 5 iterations of 3 products
