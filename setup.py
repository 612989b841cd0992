"""Builds csrc for the CPU when torch and a compiler are there; without them the package still installs.

Install with ``pip install -e . --no-build-isolation``: an isolated build would not see the torch you have.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    print("sdkernels: torch is not importable while building; the CPU kernels are left out.", file=sys.stderr)
    options = {}
else:

    class BuildIfItCompiles(BuildExtension):
        """Without a compiler that works the package installs all the same."""

        def run(self):
            """Build, or say why not."""
            try:
                super().run()
            except Exception as error:
                print(f"sdkernels: the CPU kernels do not compile and are left out: {error}", file=sys.stderr)

    # Hidden symbols and the oldest supported torch: one wheel serves every torch from 2.11 and every Python from 3.11.
    flags = [
        "-O3",
        "-std=c++17",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
        "-g0",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
        *os.environ.get("CXXFLAGS", "").split(),  # once more and last, so that they win: sanitizers want -O1 -g
    ]
    sources = ["binding.cpp", *sorted(path.relative_to("csrc").as_posix() for path in Path("csrc/cpu").glob("*.cpp"))]
    extension = CppExtension(
        "sdkernels._C",
        [f"csrc/{source}" for source in sources],
        depends=sorted(path.as_posix() for path in Path("csrc").rglob("*.h")),
        extra_compile_args=flags,
        py_limited_api=True,
        optional=True,
    )
    options = {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildIfItCompiles.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }

setup(**options)
