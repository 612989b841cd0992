"""benchmarks/repro_fork_lock.py: the published numbers of SSD's fork/lock machine, on a coarser grid than its own."""

import pytest
import torch
from conftest import INTERPRETED

from benchmarks import repro_fork_lock as program
from sdkernels import truncated_log_softmax

pytestmark = pytest.mark.skipif(INTERPRETED, reason="float64, which no kernel runs")


@pytest.fixture(autouse=True)
def _coarser(monkeypatch):
    """`best` refines it."""
    monkeypatch.setattr(program, "TEMPERATURES", torch.arange(0.1, 4.0, 0.02, dtype=torch.float64))


def machines():
    teacher = program.base_logits()
    return teacher, truncated_log_softmax(teacher, **program.TRAIN)


def off():
    """How many published numbers were compared, and those that do not agree."""
    numbers = [row for section in program.compare(*machines()) for row in section]
    return sum(row[2] != "" for row in numbers), [row[0] for row in numbers if not program.agrees(row)]


def test_the_published_optima_supports_and_entropies():
    teacher, student = machines()
    for logits, success, temperature in ((teacher, 8.3, 0.639), (student, 13.8, 2.091)):
        found, at = program.best(logits, 0.80)
        assert 100 * found == pytest.approx(success, abs=0.05)
        assert at == pytest.approx(temperature, abs=0.01)
    assert (student > -torch.inf).sum(-1).tolist() == [4, 5, 2]  # root, fork, lock
    bits = -(teacher.exp() * teacher).sum(-1) / torch.tensor(2.0).log()
    assert bits[1:].tolist() == pytest.approx([2.81, 1.61], abs=0.005)


def test_success_is_the_way_through_root_fork_and_locks():
    teacher, _ = machines()
    at = torch.ones(1, dtype=torch.float64)
    root, fork, lock = (row.tolist() for row in program.decode(teacher, at, 0.80)[0])
    assert [sum(map(bool, row)) for row in (root, fork, lock)] == [4, 5, 2]
    wanted = (root[0] + root[1]) * fork[0] * lock[0] ** 3
    assert float(program.success(teacher, at, 0.80)) == pytest.approx(wanted, rel=1e-14)


def test_every_published_number_agrees():
    assert off() == (28, [])


@pytest.mark.parametrize(("ratio", "agree"), [(0.45, False), (0.5, True), (0.55, False)])
def test_what_is_printed_of_the_fork_and_a_tail_of_one_half_would_do(ratio, agree, monkeypatch):
    """Our fifth token, .144, is then the tail's first; other tails are seen to be off."""
    root, fork, lock = program.HEADS
    monkeypatch.setattr(program, "HEADS", (root, fork[:4], lock))
    monkeypatch.setattr(program, "RATIOS", (program.RATIOS[0], ratio, program.RATIOS[2]))
    names = off()[1]
    assert (names == []) == agree
    assert ("teacher: best success" in names) != agree
