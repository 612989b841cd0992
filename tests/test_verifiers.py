"""`trainers.verifiers`: the built-in verifiers, users' own, and the pool with what goes wrong in it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import no_kernel

from trainers import verifiers
from trainers.verifiers import Verdict, VerifierPool, exact, final_answer, load_verifier, numeric, python

pytestmark = no_kernel

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")
OWN = """
import os, signal, sys, time
from dataclasses import dataclass
from trainers.verifiers import Verdict

@dataclass
class Scale:
    value: "float" = 0.5

def half(response, reference): return Scale().value
def right(response, reference): return response == reference
def explained(response, reference): return Verdict(0.25, "nearly")
def nothing(response, reference): return None
def infinite(response, reference): return float("inf")
class Unsayable(Exception):
    def __str__(self): raise ValueError
def fails(response, reference): raise KeyError("gold")
def leaves(response, reference): sys.exit(3)
def interrupts(response, reference): raise KeyboardInterrupt
def unsayable(response, reference): raise Unsayable
def hangs(response, reference): time.sleep(600)
def hangs_in_c(response, reference): sum(iter(int, 1))
def dies(response, reference): os.kill(os.getpid(), signal.SIGKILL)
def ends(response, reference): os._exit(int(reference))
def slow(response, reference): time.sleep(0.2); return True
def where(response, reference): return Verdict(1.0, " ".join(sorted({"torch", "transformers"} & set(sys.modules))))
def pid(response, reference): return os.getpid()
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return lambda function: f"{path}:{function}"


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(workers=2, timeout=2.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("42", "42"),
        ("  two\n words ", "two\n words"),
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{ 2 } #### 3", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"a set { and \boxed{7}", "7"),
        (r"\boxed{7} and, cut off, \boxed{\frac{8}{", "7"),
        (r"} \boxed {7}", "7"),
        (r"\boxed{}", ""),
        ("x\n#### 42\n", "42"),
        ("Answer: 41\nAnswer: 42\nbye", "42"),
        ("The answer is 42.", "42"),
        ("The ANSWER is: 3.5.", "3.5"),
        ("**Answer:** 42", "42"),
        ("**Final answer: 42**", "42"),
        ("The answer is unclear. #### 42", "42"),
        ("#### 42\nAnswer:\n", "42"),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


def test_final_answer_of_a_long_response():
    start = time.monotonic()
    assert final_answer(r"\boxed{" * 50_000 + "}") == ""
    assert final_answer("Answer:" * 50_000 + " 3") == "3"
    assert time.monotonic() - start < 1


def test_exact():
    assert exact(r"\boxed{new   York }", "new York") == Verdict(1.0)
    assert exact("#### 7", 7) == Verdict(1.0)
    assert exact("0.5", "1/2") == Verdict(0.0, "expected 1/2, got 0.5")
    assert exact(r"\boxed{}", "3") == Verdict(0.0, "expected 3, got no answer")
    assert len(exact("x" * 10_000, "3").feedback) < 600


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("#### 0.5", "1/2"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"The answer is $\frac{1}{2}$.", r"50\%"),
        (r"\boxed{50\%}", "1/2"),
        ("Answer: 50%", 0.5),
        (r"\boxed{1,234}", "1234"),
        ("#### 1234", "1,234"),
        ("#### $18", "18"),
        (r"\boxed{\$18}", 18),
        ("so it is 42 apples", "42"),
        (r"\boxed{42 \text{ cm}}", "42"),
        ("**7**", "7"),
        ("Answer: 0.001", 1e-3),
        ("Answer: 1e-5", 1e-5),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2"),
        (r"\boxed{2\sqrt{3}}", "2*sqrt(3)"),
        (r"\boxed{8}", "2**3"),
        (r"\boxed{(1, 2)}", "$(1,2)$"),
    ],
)
def test_numeric_equal(response, reference):
    assert numeric(response, reference) == Verdict(1.0)


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("#### 0.33", "1/3"),
        ("#### -5", "5"),
        ("Answer: 1", 1e-3),
        (r"\boxed{2}", "sqrt(2)"),
        (r"\boxed{(2, 1)}", "(1,2)"),
        ("#### 5", r"50\%"),
    ],
)
def test_numeric_different(response, reference):
    assert numeric(response, reference) == Verdict(0.0, f"expected {reference}, got {final_answer(response)}")


@pytest.mark.parametrize("response", ["", "I do not know", r"\boxed{}", r"\boxed{\frac{1}"])
def test_numeric_without_an_answer(response):
    assert numeric(response, "3").feedback == "expected 3, got no answer"


@pytest.mark.parametrize("reference", ["", "three apples", "3 apples", r"\frac{1", None])
def test_numeric_reference(reference):
    with pytest.raises(ValueError, match="the reference must be a number or an expression"):
        numeric("3", reference)


def test_numeric_needs_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    load_verifier.cache_clear()
    for call in (lambda: numeric("1", "1"), lambda: load_verifier("numeric")):
        with pytest.raises(ImportError, match="pip install math-verify"):
            call()


@linux
@pytest.mark.parametrize(
    "response",
    [
        "def f(x):\n    return x + 1",
        "Text.\n```python\ndef f(x):\n    return 0\n```\nNo:\n```python\ndef f(x):\n    return x + 1\n```\nDone.",
        "```python\ndef f(x):\n    return x + 1  # cut off",
        "1. So\n   ```python\nf = lambda x: x + 1\n   ```",
    ],
)
def test_python_asserts(response):
    assert python(response, "assert f(1) == 2\nassert f(2) == 3") == Verdict(1.0)


@linux
def test_python_asserts_fail():
    verdict = python("def f(x):\n    return 2", "assert f(1) == 2\nassert f(2) == 3")
    assert verdict.reward == 0
    assert verdict.feedback.endswith("AssertionError")
    assert "assert f(2) == 3" in verdict.feedback
    assert python("import sys; sys.exit(0)", "assert False").reward == 0


@linux
def test_python_prints():
    code = "```python\nn = int(input())\nprint(n, ' ')\nprint(n * n)\nraise SystemExit\n```"
    tests = [{"input": "2\n", "output": "2\n4"}, {"input": "3", "output": "3\n9\n\n"}]
    assert python(code, tests) == Verdict(1.0)
    verdict = python(code, [*tests, {"input": "4", "output": "4\n17"}])
    assert verdict == Verdict(0.0, r"input '4': expected '4\n17', got '4  \n16\n'")
    verdict = python("print(1)\n1 / 0", [{"input": "", "output": "1"}])
    assert verdict.reward == 0
    assert "ZeroDivisionError" in verdict.feedback
    with pytest.raises(ValueError, match="at least one test"):
        python(code, [])


@linux
def test_python_in_time(monkeypatch):
    monkeypatch.setattr(verifiers, "TEST_SECONDS", 0.5)
    assert python("while True: pass", "") == Verdict(0.0, "took longer than 0.5 s")
    tests = [{"input": "", "output": ""}]
    assert python("while True: pass", tests) == Verdict(0.0, "input '': took longer than 0.5 s")


@pytest.mark.parametrize("name", ["exakt", "", ":f", "module:", "own.py"])
def test_unknown_verifier(name):
    with pytest.raises(ValueError, match="must be one of exact, numeric, python, package"):
        load_verifier(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module:f", "cannot import 'no.such.module'"),
        ("no/such/file.py:f", "there is no file 'no/such/file.py'"),
        ("trainers.verifiers:g", "trainers.verifiers has no function 'g'"),
        ("trainers.verifiers:MARKER", "has no function 'MARKER'"),
    ],
)
def test_verifier_that_is_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        load_verifier(name)
    with VerifierPool(1, 1.0) as pool, pytest.raises(ValueError, match=message):
        pool(["exact", name], ["", ""], ["", ""])


def test_own_verifiers(own):
    assert load_verifier("exact") is exact
    assert load_verifier("trainers.verifiers:exact")("1", "1") == Verdict(1.0)
    assert load_verifier(own("half"))("", "") == Verdict(0.5)
    assert load_verifier(own("right"))("a", "a") == Verdict(1.0)
    assert load_verifier(own("explained"))("", "") == Verdict(0.25, "nearly")
    with pytest.raises(TypeError):
        load_verifier(own("nothing"))("", "")
    with pytest.raises(ValueError, match="must be finite, got inf"):
        load_verifier(own("infinite"))("", "")


def test_pool():
    names = ["exact", "numeric"] * 4
    responses = [f"#### {i}" for i in range(8)]
    references = ["0", "1", "2", "3", "x", "5.0", "6", "", "8", "8"]
    with VerifierPool(workers=2, timeout=60.0) as pool:
        verdicts = pool([*names, "exact", "exact"], [*responses, "#### 9", r"\boxed{8}"], references)
        assert pool([], [], []) == []
        with pytest.raises(ValueError, match="zip"):
            pool(["exact"], ["1", "2"], ["1"])
    assert [v.reward for v in verdicts] == [1, 1, 1, 1, 0, 1, 1, 0, 0, 1]
    assert [i for i, v in enumerate(verdicts) if v.failure] == [7]
    assert verdicts[7].failure.startswith("raised ValueError: the reference must be a number or an expression")
    assert verdicts[4].feedback == "expected x, got 4"


def test_pool_keeps_its_processes(own):
    with VerifierPool(2, 60.0) as pool:
        pids = {v.reward for _ in range(3) for v in pool([own("pid")] * 20, [""] * 20, [""] * 20)}
    assert 1 <= len(pids) <= 2


def test_failures_cost_only_their_response(pool, own):
    bad = {
        own("fails"): "raised KeyError: 'gold'",
        own("leaves"): "raised SystemExit: 3",
        own("interrupts"): "raised KeyboardInterrupt: ",
        own("unsayable"): "raised Unsayable: without a message",
        own("nothing"): "raised TypeError: must be real number, not NoneType",
        own("hangs"): "took longer than 2 s",
        own("hangs_in_c"): "took longer than 2 s",
        own("dies"): "ended its process with exit code -9",
        own("ends"): "ended its process with exit code 5",
    }
    names, failures = [], []
    for name, failure in bad.items():
        names += [name, "exact", own("slow")]
        failures += [failure, "", ""]
    start = time.monotonic()
    verdicts = pool(names, ["5"] * len(names), ["5"] * len(names))
    assert time.monotonic() - start < 10
    assert [v.failure for v in verdicts] == failures
    assert [v.reward for v in verdicts] == [0.0, 1.0, 1.0] * len(bad)


@linux
def test_a_hanging_program_dies_with_its_worker(pool, tmp_path):
    marker = tmp_path / "pid"
    code = f"import os, time\nopen({str(marker)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    assert pool(["python"], [code], [""])[0].failure == "took longer than 2 s"
    process = Path("/proc", marker.read_text())
    deadline = time.monotonic() + 5
    while process.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_import_neither_torch_nor_the_main_module(own, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.chdir("/")
from trainers.verifiers import VerifierPool
sys.modules["torch"] = sys
print("main", __spec__)
with VerifierPool(1, 5.0) as pool:  # without a guard
    print(pool([{own("where")!r}], [""], [""]), __spec__)
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == f"main None\n{[Verdict(1.0)]} None\n"


def test_a_path_is_relative_to_the_callers_directory(pool, own, monkeypatch):
    path = Path(own("half").rpartition(":")[0])
    monkeypatch.chdir(path.parent)
    assert pool(["own.py:half"], [""], [""]) == [Verdict(0.5)]


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_worker_is_left(own, interrupted):
    pool = VerifierPool(2, 60.0)
    with pytest.raises(KeyboardInterrupt) if interrupted else pytest.raises(ZeroDivisionError), pool:
        pids = [int(v.reward) for v in pool([own("pid")] * 20, [""] * 20, [""] * 20)]
        if not interrupted:
            raise ZeroDivisionError
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        pool([own("hangs_in_c"), own("hangs")], ["", ""], ["", ""])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
