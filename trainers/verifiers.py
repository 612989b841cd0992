"""Verifiers, which give a response its reward, and a pool of processes that runs them on a batch.

A verifier is a function of a response and a reference. Three are built in, and a user's own is named by where it is:
`package.module:function` or `path/to/file.py:function`, with f(response, reference) -> float | bool | Verdict.
Nothing here imports torch, so a worker of the pool starts in about 0.1 s.
"""

import functools
import importlib.util
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from trainers import sandbox

TEST_SECONDS = 5.0  # for each run of the verifier `python`; a pool's timeout is for all of a response
SHOWN_CHARACTERS = 500  # of each text that a feedback or a failure quotes

MARKER = re.compile(r"####|\banswer\**[ \t]*:\**|\banswer[ \t]+is\b:?", re.IGNORECASE)
CODE = re.compile(r"```python[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
LATEX_ENVIRONMENT = re.compile(r"(?<!\\)\$|\\[(\[]|\\boxed")
FUNCTION = re.compile(r"\\[a-zA-Z]+(?:\{[a-zA-Z ]*\})?|sqrt")
WORD = re.compile(r"[a-zA-Z]{3}")
EXPONENT = re.compile(r"(?<=[\d.])[eE]([+-]?\d+)")


class Verdict(NamedTuple):
    """What a verifier says of one response."""

    reward: float
    feedback: str = ""  # what a model could learn from
    failure: str = ""  # why there is no verdict, when the verifier raised or took too long; the reward is then 0


Verifier = Callable[[str, Any], Verdict]


def final_answer(response: str) -> str:
    r"""What the last closed \boxed{} holds; without one what follows the last "####", "Answer:" or "answer is" on its
    line, less a final period; without any the whole response."""
    opened: list[int] = []  # for each open brace where what it holds begins, negative if it is no box's
    last, boxed = -1, ""
    for brace in re.finditer(r"\\boxed\s*\{|\\.|[{}]", response, re.DOTALL):
        if brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(-1 if brace[0] == "{" else brace.end())
        elif brace[0] == "}" and opened and (start := opened.pop()) > last:
            last, boxed = start, response[start : brace.start()]
    if last >= 0:
        return boxed.strip()
    for marker in reversed(list(MARKER.finditer(response))):
        if answer := response[marker.end() :].partition("\n")[0].strip("* \t\r"):
            return answer.removesuffix(".")
    return response.strip()


def exact(response: str, reference: object) -> Verdict:
    """1 if the final answer is the reference, runs of whitespace aside."""
    answer, expected = (" ".join(text.split()) for text in (final_answer(response), str(reference)))
    return _compared(answer == expected, expected, answer)


def numeric(response: str, reference: object) -> Verdict:
    """1 if math-verify finds the final answer equal to the reference, a number or an expression, plain or in LaTeX.

    For the main thread of a process, where alone math-verify's own time limits work. Raises ImportError without
    math-verify, and ValueError for a reference that holds no expression.
    """
    _require_math_verify()
    from math_verify import verify

    expected = _expressions(str(reference), prose=False)
    if not expected:
        raise ValueError(f"the reference must be a number or an expression, maybe in $, got {_short(str(reference))!r}")
    answer = final_answer(response)
    found = _expressions(answer)
    return _compared(verify(expected, found), str(reference), answer if found else "")


def _expressions(text: str, prose: bool = True) -> list[Any]:
    """What math-verify reads in a text. Of one with words it reads numbers only, or nothing without `prose`."""
    from math_verify import parse

    text = EXPONENT.sub(r"\\cdot 10^{\1}", text)  # 1e-3, which it reads as 1
    if not LATEX_ENVIRONMENT.search(text):
        if not WORD.search(FUNCTION.sub("", text)):
            text = f"${text.strip('* ').replace('**', '^')}$"
        elif not prose:
            return []
    return parse(text, fallback_mode="no_fallback")


def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("the verifier 'numeric' needs math-verify: pip install math-verify")


def python(response: str, reference: str | Sequence[dict[str, str]]) -> Verdict:
    """1 if the last ```python block, or the response if it has none, passes every test in the sandbox.

    The reference is Python that raises where the code is wrong, such as asserts, run in the code's namespace; or what
    the code must print, [{"input": stdin, "output": stdout}, ...], whitespace at the ends of lines aside.
    """
    blocks = CODE.findall(response)
    code = blocks[-1] if blocks else response
    if isinstance(reference, str):
        result = sandbox.run(code, tests=reference, timeout=TEST_SECONDS)
        return Verdict(float(result.ok), result.error)
    if not reference:
        raise ValueError("the reference must have at least one test")
    for test in reference:
        result = sandbox.run(code, stdin=test["input"], timeout=TEST_SECONDS)
        verdict = _compared(_lines(result.stdout) == _lines(test["output"]), repr(test["output"]), repr(result.stdout))
        if result.exit_code != 0:  # a program that exits with 0 early may do so: its output is the test
            verdict = Verdict(0.0, result.error)
        if verdict.feedback:
            return verdict._replace(feedback=f"input {_short(test['input'])!r}: {verdict.feedback}")
    return Verdict(1.0)


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _compared(equal: bool, expected: str, answer: str) -> Verdict:
    return Verdict(1.0) if equal else Verdict(0.0, f"expected {_short(expected)}, got {_short(answer) or 'no answer'}")


BUILT_IN: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "python": python}


@functools.cache
def load_verifier(name: str) -> Verifier:
    """The verifier of that name, or a ValueError; a user's own is made to return a Verdict."""
    if name == "numeric":
        _require_math_verify()
    if name in BUILT_IN:
        return BUILT_IN[name]
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        forms = ", ".join([*BUILT_IN, "package.module:function", "path/to/file.py:function"])
        raise ValueError(f"a verifier must be one of {forms}; got {name!r}")
    function = getattr(_module(source), attribute, None)
    if not callable(function):
        raise ValueError(f"{source} has no function {attribute!r}")

    @functools.wraps(function)
    def verifier(response: str, reference: Any) -> Verdict:
        value = function(response, reference)
        reward, *texts = value if isinstance(value, Verdict) else (value,)
        if not math.isfinite(reward):
            raise ValueError(f"the reward must be finite, got {reward}")
        return Verdict(float(reward), *map(str, texts))

    return verifier


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise ValueError(f"cannot import {source!r}: {error}") from error
    spec = importlib.util.spec_from_file_location(source, source)
    if spec is None or spec.loader is None or not Path(source).is_file():
        raise ValueError(f"there is no file {source!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[source] = module  # dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return module


class VerifierPool(AbstractContextManager["VerifierPool"]):
    """Processes that verify a batch, until the end of a `with`; what raises, hangs or dies costs only its response.

    A worker that takes longer than `timeout` seconds for one response is killed, and another one started.
    """

    def __init__(self, workers: int, timeout: float) -> None:
        self._timeout = timeout
        # SIGTERM ends a worker even in C code: pebble's handler in Python would wait, and all other workers with it.
        self._pool = ProcessPool(
            workers, initializer=signal.signal, initargs=(signal.SIGTERM, signal.SIG_DFL), context=_Context()
        )

    def __exit__(self, *exception: object) -> None:
        self._pool.stop()
        self._pool.join()

    def __call__(self, names: Sequence[str], responses: Sequence[str], references: Sequence[Any]) -> list[Verdict]:
        """The verdict of each verifier on its response, in order; a verifier that cannot be loaded raises here."""
        found = {name: _found(name) for name in dict.fromkeys(names)}
        futures = [
            self._pool.schedule(_verify, args=(found[name], response, reference), timeout=self._timeout)
            for name, response, reference in zip(names, responses, references, strict=True)
        ]
        return [self._outcome(future) for future in futures]

    def _outcome(self, future: "ProcessFuture[Verdict]") -> Verdict:
        try:
            return future.result()
        except TimeoutError:
            return Verdict(0.0, failure=f"took longer than {self._timeout:g} s")
        except ProcessExpired as error:
            return Verdict(0.0, failure=f"ended its process with exit code {error.exitcode}")


def _found(name: str) -> str:
    """A name for workers, whose directory may be another, of a verifier that this process can load."""
    load_verifier(name)
    source, _, attribute = name.rpartition(":")
    return f"{Path(source).resolve()}:{attribute}" if source.endswith(".py") else name


def _verify(name: str, response: str, reference: Any) -> Verdict:
    """What a worker does."""
    try:
        return load_verifier(name)(response, reference)
    except BaseException as error:  # whatever it is: KeyboardInterrupt, one that cannot be printed
        try:
            said = _short(str(error))
        except Exception:
            said = "without a message"
        return Verdict(0.0, failure=f"raised {type(error).__name__}: {said}")


class _Context(SpawnContext):
    """Starts processes without the `__main__` of their parent, a trainer with torch or a script without a guard."""

    starting = threading.Lock()

    class Process(SpawnProcess):
        def start(self) -> None:
            main = sys.modules["__main__"]
            with _Context.starting:
                spec, main.__spec__ = main.__spec__, ModuleSpec("__main__", None)  # multiprocessing skips this name
                try:
                    super().start()
                finally:
                    main.__spec__ = spec
