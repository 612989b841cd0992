"""Settings of the whole suite. The same tests run on the CPU (csrc), under TRITON_INTERPRET=1, and on a GPU."""

import functools
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and not INTERPRETED else [])
no_kernel = pytest.mark.skipif(INTERPRETED, reason="says nothing of a kernel that it does not say of csrc")

settings.register_profile(
    "sdkernels",
    deadline=None,
    max_examples=8 if INTERPRETED else 60,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("long", settings.get_profile("sdkernels"), max_examples=int(os.environ.get("EXAMPLES", 3000)))
settings.load_profile("sdkernels")  # unless --hypothesis-profile says otherwise


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in .*:RuntimeWarning")  # the interpreter's numpy
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.*:DeprecationWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, default=1, help="of each test's cases run every so many, from the first on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    step, seen, left_out = config.getoption("--sample"), Counter(), []
    for item in items:
        test = item.nodeid.partition("[")[0]
        if seen[test] % step:
            left_out.append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left_out)
    out = set(left_out)
    items[:] = [item for item in items if item not in out]


def pytest_report_header() -> str:
    cpu = "the Triton interpreter" if INTERPRETED else "csrc"
    return f"sdkernels: {cpu} on the CPU; devices {', '.join(DEVICES)}"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def one_thread():
    """For models that are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _poisoned(allocate):
    """`allocate`, but what sdkernels gets from it holds NaN (integers: their least value) until it is written."""

    def poisoned(*arguments, **options):
        tensor = allocate(*arguments, **options)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("sdkernels"):
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
        return tensor

    return poisoned


@pytest.fixture(autouse=True, scope="session")
def _interpreter_rounds_bfloat16_as_gpus_do():
    """Triton's interpreter cuts the digits off that float32 has beyond bfloat16; a GPU rounds to nearest even."""
    if not INTERPRETED:
        yield
        return
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) == (float32, bfloat16):
            return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (bfloat16, float32):
            return values.astype(np.uint32) << 16
        return convert(values, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield


@pytest.fixture(autouse=True, scope="session")
def _interpreter_patches_the_language_once_a_launch():
    """Triton's interpreter patches triton.language at each call of a device function: most of its time."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patched, patch_lang = set(), interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__

    def launched(self, *arguments, **options):
        patched.clear()
        return launch(self, *arguments, **options)

    def patch_once(function):
        languages = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if languages in patched:
            return None  # a device function drops it; only the launch restores
        patched.add(languages)
        return patch_lang(function)

    slowly = interpreter._get_np_dtype  # which fills a dictionary of 18 each time
    of_scalar = functools.cache(slowly)

    def numpy_dtype(dtype):
        return slowly(dtype) if isinstance(dtype.scalar, tl.pointer_type) else of_scalar(dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield


@pytest.fixture(autouse=True, scope="session")
def _poison_empty():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoned(torch.empty))
        patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        yield
