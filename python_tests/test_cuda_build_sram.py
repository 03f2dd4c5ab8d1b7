"""The CUDA kernels of failing memory without a GPU: their source on the simulator against the CPU kernels, bit for bit, and
what ptxas says about them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
REGISTERS = 64
POSITIONS = 264  # bytes of local memory: the words that Floyd's method has chosen, indexed at run time


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_on_the_simulator(tmp_path):
    flags = ["-std=c++20", "-O1", "-fopenmp", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-psabi"]
    level = ["-DPYACCEL_ISA=baseline", "-DPYACCEL_VECTOR_BYTES=16", f"-I{CSRC / 'tests' / 'cuda_sim'}"]
    sources = [CSRC / "tests" / "sram_cuda_sim_test.cpp", *sorted((CSRC / "sram").glob("*_cpu.cpp")), CSRC / "core" / "scratch.cpp"]
    program = tmp_path / "test"
    subprocess.run(["g++", *flags, *level, *map(str, sources), "-o", str(program)], check=True, timeout=600)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_spills_and_few_registers(tmp_path, architecture):
    command = ["nvcc", "-std=c++20", f"-arch={architecture}", "-O3", "-fmad=false", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra,-Wconversion,-Werror", "-c", str(CSRC / "sram" / "sram_cuda.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "sram.o")], capture_output=True, text=True, timeout=600)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == 16  # flip: 2 dense, 2 sparse; noise: dense, sparse and gradient for 4 types
    assert all(int(stores) == int(loads) == 0 and int(frame) <= POSITIONS for frame, stores, loads in frames), report
    assert all(int(used) <= REGISTERS for used in re.findall(r"Used (\d+) registers", report)), report
