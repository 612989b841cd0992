"""benchmarks/repro_information_gap.py: its claims hold, it writes them, and it fails where one does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="float64, which no kernel runs")
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "repro_information_gap.py"


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def test_every_claim_holds(tmp_path):
    found = run(SCRIPT, "--json", tmp_path / "gap.json", "--plot", tmp_path / "gap.png")
    assert found.returncode == 0, found.stderr
    written = json.loads((tmp_path / "gap.json").read_text())
    assert len(written["claims"]) > 20
    assert all(claim["found"] <= claim["allowed"] for claim in written["claims"])
    by_step, floor = written["by_step"], sum(written["floor"].values()) / 4
    assert by_step["loss"][0] > 2 * floor > 0.5
    assert by_step["loss"][-1] == pytest.approx(floor, abs=1e-12)
    assert by_step["given_r"][-1] < 1e-3 * floor
    assert by_step["signal"][-1] < 1e-12 < by_step["noise"][-1]
    assert torch.tensor(by_step["one_drawn_r"]).min() > 0
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_a_claim_that_fails_is_named_and_fails_the_script():
    """A library whose floor is a tenth of a millionth off."""
    code = (
        "import sys; sys.argv = ['gap']\n"
        "from benchmarks import repro_information_gap as gap\n"
        "exact = gap.sdkernels.opsd_decomposition\n"
        "def off(*arguments):\n"
        "    terms = exact(*arguments)\n"
        "    return terms._replace(mutual_information=terms.mutual_information + 1e-7)\n"
        "gap.sdkernels.opsd_decomposition, gap.STEPS, gap.SHOWN = off, 30, (0, 30)\n"
        "sys.exit(gap.main())\n"
    )
    found = run("-c", code)
    assert found.returncode == 1
    assert "does not hold: |total - marginal_kl - mutual_information|" in found.stderr
