"""`sdkernels.leakage`: means of a decomposition against plain formulas in float64, and the tool on a file."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import FLOAT64_BOUND, assert_within
from conftest import INTERPRETED, no_kernel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdkernels import OPSDTerms, opsd_decomposition
from sdkernels.leakage import Leakage, estimate_leakage, main, plot_leakage, read_batch

ROOT = Path(__file__).parent.parent


def some_terms(*shape, dtype=torch.float64, device="cpu"):
    marginal_kl, information = (torch.rand(shape, dtype=torch.float64).to(dtype).to(device) for _ in range(2))
    return OPSDTerms(marginal_kl + information, marginal_kl, information)


def check(found, terms, mask):
    """Token by token, in Python's own arithmetic."""
    rows = [torch.atleast_2d(x.double()).tolist() for x in terms]
    keep = torch.ones(terms.total.shape) if mask is None else mask
    places = [(b, t) for b, row in enumerate(torch.atleast_2d(keep).tolist()) for t, x in enumerate(row) if x]

    def mean(values, of):
        return math.fsum(values[b][t] for b, t in of) / len(of) if of else 0.0

    columns = [[(b, t) for b, t in places if t == position] for position in range(keep.shape[-1])]
    total, marginal_kl, information = (mean(x, places) for x in rows)
    truth = Leakage(
        total, marginal_kl, information, information / total if total else 0.0,
        [mean(rows[0], of) for of in columns], [mean(rows[2], of) for of in columns], [len(of) for of in columns],
    )  # fmt: skip
    for name, expected in truth._asdict().items():
        value = getattr(found, name)
        assert value.dtype == (torch.int64 if name == "tokens" else torch.float64)
        assert_within(value.cpu(), torch.tensor(expected, dtype=torch.float64), FLOAT64_BOUND, name)


@given(st.data())
def test_any_shape_and_mask(data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=2), "shape")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    terms = some_terms(*shape, dtype=data.draw(st.sampled_from([torch.float64, torch.float32]), "dtype"))
    mask = data.draw(st.sampled_from([None, torch.rand(shape) < 0.6, (torch.rand(shape) < 0.6) * 2.0]), "mask")
    check(estimate_leakage(terms, mask), terms, mask)


def test_of_a_decomposition(device):
    student, teachers = torch.randn(2, 7, 11, device=device), torch.randn(3, 2, 7, 11, device=device)
    mask = torch.rand(2, 7, device=device) < 0.7
    terms = opsd_decomposition(student, teachers, mask=mask)
    found = estimate_leakage(terms, mask)
    check(found, terms, mask)
    assert_within(found.total, found.marginal_kl + found.mutual_information, 5e-5, "Theorem 1")
    assert 0 < found.share < 1


def test_a_teacher_that_r_does_not_move_leaks_nothing_and_a_student_that_fits_leaves_only_the_leak():
    teacher = torch.randn(2, 5, 11, dtype=torch.float64)
    still = estimate_leakage(opsd_decomposition(torch.zeros_like(teacher), teacher.expand(4, -1, -1, -1)))
    assert abs(float(still.share)) < FLOAT64_BOUND
    moved = torch.randn(4, 2, 5, 11, dtype=torch.float64)
    fitted = estimate_leakage(opsd_decomposition(moved.softmax(-1).mean(0).log(), moved))
    assert abs(float(fitted.share) - 1) < FLOAT64_BOUND


def test_few_samples_of_r_estimate_low_by_the_divergence_of_their_mean():
    """Every pair of samples of three equally likely r."""
    p = (torch.randn(3, 11, dtype=torch.float64) * 2).softmax(-1)

    def information(samples):
        return estimate_leakage(
            opsd_decomposition(torch.zeros(1, 11).double(), samples.log().unsqueeze(1))
        ).mutual_information

    def divergence(a, b):
        return (a * (a / b).log()).sum()

    pairs = [p[list(pair)] for pair in itertools.product(range(3), repeat=2)]
    short = torch.stack([divergence(pair.mean(0), p.mean(0)) for pair in pairs]).mean()
    assert_within(torch.stack([information(pair) for pair in pairs]).mean() + short, information(p), FLOAT64_BOUND)
    assert short > 0.1


def test_without_a_kept_token_everything_is_zero():
    for shape, mask in (((2, 3), torch.zeros(2, 3)), ((0, 3), None), ((2, 0), None), ((0,), None)):
        found = estimate_leakage(some_terms(*shape), mask)
        assert all((x == 0).all() for x in found)
        assert found.tokens.shape == shape[-1:]


def test_infinite_and_undefined_terms_are_not_hidden_unless_masked():
    terms = some_terms(2, 3)
    for name in ("total", "marginal_kl"):
        getattr(terms, name)[0, 1] = torch.inf
    found = estimate_leakage(terms)
    assert found.total == found.marginal_kl == found.total_by_position[1] == torch.inf
    assert found.share == 0
    assert found.mutual_information.isfinite()
    assert found.total_by_position[[0, 2]].isfinite().all()
    terms.mutual_information[0, 1] = torch.nan
    found = estimate_leakage(terms)
    assert found.mutual_information.isnan()
    assert found.share.isnan()
    mask = torch.ones(2, 3)
    mask[0, 1] = 0
    check(estimate_leakage(terms, mask), OPSDTerms(*(x.nan_to_num(0, 0) for x in terms)), mask)


@pytest.mark.parametrize(
    ("terms", "mask", "error", "message"),
    [
        ((1, 2, 3), None, TypeError, "terms must be OPSDTerms, got tuple"),
        (OPSDTerms(1, 2, 3), None, TypeError, r"terms.total must be a torch.Tensor, got int"),
        (OPSDTerms(*torch.ones(3, 2, dtype=torch.int64)), None, TypeError, "terms.total must be a floating tensor"),
        (OPSDTerms(*torch.ones(3)), None, ValueError, r"terms must have shape \(B, T\) or \(N,\), got \(\)"),
        (OPSDTerms(*torch.ones(3, 1, 2, 2)), None, ValueError, r"terms must have shape .* got \(1, 2, 2\)"),
        (OPSDTerms(torch.ones(3), torch.ones(3), torch.ones(4)), None, ValueError, r"terms.mutual_information must"),
        (OPSDTerms(*torch.ones(3, 2, 2)), torch.ones(2), ValueError, r"mask must have one value per token"),
    ],
)  # fmt: skip
def test_errors(terms, mask, error, message):
    with pytest.raises(error, match=message):
        estimate_leakage(terms, mask)


def batch(path, **other):
    tensors = {
        "student_logits": torch.randn(2, 40, 11),
        "teacher_logits": torch.randn(3, 2, 40, 11),
        "mask": (torch.rand(2, 40) < 0.8).int(),
        **other,
    }
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    return tensors


@no_kernel
@pytest.mark.parametrize("mask", [{}, {"mask": None}], ids=["mask", "no mask"])
def test_a_file_is_its_decomposition(mask, tmp_path):
    tensors = batch(tmp_path / "batch.safetensors", **mask)
    student, teachers, mask = tensors.values()
    expected = estimate_leakage(opsd_decomposition(student, teachers, temperature=0.7, mask=mask), mask)
    found, samples = read_batch(tmp_path / "batch.safetensors", 0.7)
    assert samples == 3
    for x, y in zip(found, expected, strict=True):
        assert_within(x, y, 1e-12)


@no_kernel
def test_the_tool_prints_and_writes(tmp_path):
    path = tmp_path / "batch.safetensors"
    student = torch.zeros(2, 40, 11)
    student[0, 5, 3] = -torch.inf
    batch(path, student_logits=student, mask=(torch.arange(40) < 37).int().expand(2, -1).contiguous())
    found, _ = read_batch(path, 2.0)
    options = ["--temperature", "2", "--plot", tmp_path / "out.png", "--json", tmp_path / "out.json"]
    command = [sys.executable, "-m", "sdkernels.leakage", path, *options]
    quiet = {"PYTHONWARNINGS": "ignore::RuntimeWarning"} if INTERPRETED else {}  # the interpreter's numpy
    tool = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **quiet})
    assert (tool.returncode, tool.stderr) == (0, "")
    lines = tool.stdout.splitlines()
    assert lines[0].split() == ["total", "inf", "nats", "per", "token"]
    assert lines[2].split()[:2] == ["mutual_information", f"{found.mutual_information:.6f}"]
    assert lines[4].split() == ["kept", "tokens", "74"]
    assert (
        lines[5]
        == f"samples of r                   3, so mutual_information is estimated low, at most {math.log(3):.4f}"
    )
    assert lines[8].split()[:4] == ["0", "to", "2", "6"]
    assert lines[-1].split() == ["39", "to", "39", "0", "0.000000", "0.000000"]
    assert len(lines) == 8 + 14
    written = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert written["samples"] == 3
    assert written["total"] == written["total_by_position"][5] == "inf"
    assert written["mutual_information_by_position"] == found.mutual_information_by_position.tolist()
    assert written["tokens"] == [2] * 37 + [0] * 3
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("tensors", "arguments", "message"),
    [
        ({"teacher_logits": None}, [], "must hold student_logits, teacher_logits and perhaps mask, got mask, student"),
        ({"student_logits": torch.zeros(40, 11)}, [], "student_logits must have shape (B, T, V), got (40, 11)"),
        ({"teacher_logits": torch.zeros(2, 40, 11)}, [], "teacher_logits must have shape (R, ..., V)"),
        ({"teacher_logits": torch.zeros(1, 2, 40, 11)}, [], "teacher_logits must hold at least 2 samples of r"),
        ({"mask": torch.ones(40)}, [], "mask must have one value per token, shape (2, 40), got (40,)"),
        ({}, ["--temperature", "0"], "temperature must be finite and > 0, got 0.0"),
    ],
)
def test_the_tool_says_what_is_wrong_with_a_file(tensors, arguments, message, tmp_path, monkeypatch, capsys):
    batch(tmp_path / "batch.safetensors", **tensors)
    monkeypatch.setattr(sys, "argv", ["leakage", str(tmp_path / "batch.safetensors"), *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


def test_the_tool_says_what_is_no_file_of_tensors(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("hello")
    for name, message in (("none", "No such file"), ("text", "header")):
        monkeypatch.setattr(sys, "argv", ["leakage", str(tmp_path / name)])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert message in capsys.readouterr().err


def test_a_figure_of_nothing_and_of_what_is_not_finite(tmp_path):
    terms = some_terms(2, 3)
    terms.total[:, 1] = torch.inf
    for name, found in (("a.png", estimate_leakage(terms)), ("b.png", estimate_leakage(terms, torch.zeros(2, 3)))):
        plot_leakage(found, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0
