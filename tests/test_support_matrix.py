"""The table of README.md that says what works where is what works."""

import aot
import pytest
import support_matrix
from conftest import no_kernel

from benchmarks.tables import ROOT

pytestmark = no_kernel


def test_every_public_function_on_logits_or_log_probs_is_in_it():
    aside = {"lambda_schedule", "rlsd_metrics", "effective_temperature", "save_support", "load_support"}
    public = {name for name in support_matrix.sdkernels.__all__ if name.islower()} - aside
    assert {name for name in public if not name.startswith("linear_")} == set(support_matrix.CALLS)
    assert {name[len("linear_") :] for name in public if name.startswith("linear_")} == set(support_matrix.LINEAR_CALLS)


def test_the_readme_has_it():
    readme = (ROOT / "README.md").read_text()
    assert support_matrix.written(readme) == readme, "run `make tables`"
    assert "wrong" not in str(support_matrix.rows())


@pytest.mark.parametrize("target", ["gfx942"])
def test_what_is_launched_compiles_for(target):
    target = aot.TARGETS[target]
    launches = [launch for name in support_matrix.CALLS for launch in support_matrix.launches(name, target.warp_size)]
    kernels = {launch[0].fn.__name__: launch for launch in launches}
    assert len(kernels) > 10
    for launch in kernels.values():
        assert aot.compile_launch(*launch, target).asm["amdgcn"]
