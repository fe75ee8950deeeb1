"""The numbers of the Triton kernels with no GPU: in a process of its own, as Triton reads TRITON_INTERPRET once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import kernels.dispatch

TESTS = Path(__file__).parent
FILES = [TESTS / f"test_{name}.py" for name in ("operations", "rotary", "attention", "extremes")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not kernels.dispatch.HAS_TRITON, reason="needs triton")
def test_triton_kernels_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *map(str, FILES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # more threads only get into the way
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0 and passed and int(passed[1]) > 100, result.stdout[-8000:] + result.stderr[-2000:]
