"""The CUDA kernels of the quantised products without a GPU: their phases run on the CPU, nvcc compiles them unspilled."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# Registers a thread: what the resident blocks of each launch leave (__launch_bounds__ in the sources).
REGISTERS = {"pack": 64, "unpack": 64, "quantize": 64, "dequantize": 64, "signed": 64, "row_sums": 128, "patch_sums": 128,
             "product": 128, "stream": 128}  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_phases_of_the_products(tmp_path):
    program = tmp_path / "tiles"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    subprocess.run(["g++", *flags, str(CSRC / "tests" / "qmac_tiles_test.cpp"), "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", ["codes_cuda.cu", "product_cuda.cu", "stream_cuda.cu"])
def test_nvcc_compiles_without_a_spill(source, architecture, tmp_path):
    command = ["nvcc", "-std=c++20", f"-arch={architecture}", "-O3", "-fmad=false", "-Xptxas", "-v", "-Werror", "all-warnings",
               "-Xcompiler=-Wall,-Wextra", "-c", str(CSRC / "qmac" / source), "-o", str(tmp_path / "out.o")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '\S*?\d([a-z_]+)_kernel\S*' .*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
        r"loads.*?Used (\d+) registers", done.stdout + done.stderr, re.DOTALL,
    )  # fmt: skip
    assert kernels
    for name, frame, stores, loads, registers in kernels:
        assert (frame, stores, loads) == ("0", "0", "0"), name
        assert int(registers) <= REGISTERS[name], (name, registers)
