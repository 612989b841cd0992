"""Whether an installed wheel works: ``python -I tests/smoke.py README.md``, where there is no source and no compiler.

Its C++ kernels must be there and agree with plain PyTorch, and README's examples must run. `make package` calls it.
"""

import re
import sys
from pathlib import Path

import sdkernels
from sdkernels.info import info


def main(readme: Path) -> None:
    """Check and run all."""
    package = Path(sdkernels.__file__).parent
    assert "site-packages" in package.parts, f"not the wheel's: {package}"
    assert (package / "py.typed").exists()
    found = info()["cpu"]
    assert found["float32, bfloat16, float16"].startswith("C++"), found
    assert found["self-test"] == "passed", found
    blocks = re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(readme), "exec"), namespace)
    print(f"{found['float32, bfloat16, float16']}, {len(blocks)} examples: works")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
