"""The crossbar kernels of CUDA without a GPU: the block ladder runs on the CPU in shuffled order under sanitizers; the .cu
files compile for sm_80 and sm_90 without a spill or a stack frame."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_block_ladder_on_the_cpu(tmp_path):
    program = tmp_path / "block"
    flags = "-std=c++20 -O1 -g -Wall -Wextra -Wconversion -Werror -fsanitize=address,undefined".split()
    source = CSRC / "tests" / "crossbar_block_test.cpp"
    built = subprocess.run(["g++", *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name, kernels", [("matrix_cuda.cu", 4), ("matmul_cuda.cu", 4)])
def test_no_spills(tmp_path, name, kernels, architecture):
    flags = f"-std=c++20 -O3 -fmad=false -arch={architecture} -Xptxas -v --Werror=all-warnings -c".split()
    built = subprocess.run(
        ["nvcc", *flags, str(CSRC / "crossbar" / name), "-o", str(tmp_path / "object.o")], capture_output=True, text=True
    )
    text = built.stdout + built.stderr
    assert built.returncode == 0, text
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(found) == kernels and all(set(numbers) == {"0"} for numbers in found), text
