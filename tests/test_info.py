import json
import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETED, no_kernel

from sdkernels import info
from sdkernels.rows import implementations


def test_it_says_what_serves_rows():
    found = info.info()
    assert found["cpu"]["float64"] == "plain PyTorch"
    served = found["cpu"]["float32, bfloat16, float16"]
    assert served == "Triton, interpreted" if INTERPRETED else served.startswith("C++ (")
    assert found["cpu"]["self-test"] == "passed"
    assert found["versions"]["torch"].startswith(torch.__version__)
    assert ("environment" in found) == any(name in info.os.environ for name in info.VARIABLES)


@no_kernel
def test_it_says_that_the_kernels_are_missing_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr(implementations, "compiled", lambda: info.warnings.warn("no C++", stacklevel=1))
    served = info.info()["cpu"]["float32, bfloat16, float16"]
    assert served == "plain PyTorch: the C++ kernels were not built"
    assert not recwarn


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(lambda x: x + 1e-3, "failed: the gradient is off by 1.0e-03"), (lambda x: 1 / 0, "failed: ZeroDivisionError")],
)
def test_the_self_test_can_fail(wrong, said, monkeypatch):
    right = info.gradient
    broken = lambda device, dtype: (wrong if dtype == torch.float32 else lambda x: x)(right(device, dtype))  # noqa: E731
    monkeypatch.setattr(info, "gradient", broken)
    assert info.self_test(torch.device("cpu")).startswith(said)


@no_kernel
def test_it_prints_for_people_and_for_programs():
    command = [sys.executable, "-m", "sdkernels.info"]
    printed, as_json = (
        subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout
        for more in ([], ["--json"])
    )
    for group, values in json.loads(as_json).items():
        assert group in printed.splitlines()
        assert all(name in printed for name in values)
