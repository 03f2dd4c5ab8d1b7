"""What can be said about the CUDA kernels without a GPU: index arithmetic proven on the CPU, kernels run on a serial
simulator, and nvcc compiles every file without a spill and within the registers that its launch counts on."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "neuron").glob("*_cuda.cu"))
STRICT = ["-std=c++20", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
SIMULATED = [
    *STRICT, "-Wno-unknown-pragmas", "-Wno-missing-field-initializers", "-O1", "-ffp-contract=off",
    f"-I{CSRC / 'tests' / 'cuda_sim'}",
]  # fmt: skip

# Registers a thread, the most that the resident blocks of each launch leave (see __launch_bounds__ in the sources).
REGISTERS = {
    "lif_forward_kernel": 85,
    "lif_backward_kernel": 128,
    "bntt_statistics_kernel": 64,
    "bntt_coefficients_kernel": 64,
    "bntt_scan_kernel": 85,
    "bntt_backward_kernel": 168,
    "bntt_finish_sums_kernel": 64,
    "bntt_finish_learned_kernel": 64,
    "stdb_forward_kernel": 64,
    "stdb_backward_kernel": 96,
    "encode_kernel": 64,
    "encode_colour_kernel": 80,
    "pack_kernel": 48,
    "unpack_kernel": 48,
}

gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def build_and_run(source: str, flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / Path(source).stem
    subprocess.run(["g++", *flags, str(CSRC / "tests" / source), "-o", str(program)], check=True, timeout=600)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=600)


@gxx
def test_index_arithmetic(tmp_path):
    done = build_and_run("index_test.cpp", [*STRICT, "-O2"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"[1-9]\d{6,} visits, 0 failures", done.stdout), done.stdout


@gxx
def test_kernels_on_the_simulator(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        sources = ("cuda_sim_test.cpp", "cuda_sim_bntt_test.cpp")
        for done in pool.map(lambda source: build_and_run(source, SIMULATED, tmp_path), sources):
            assert done.returncode == 0, done.stderr
            assert re.search(r": [1-9]\d{2,} launches, 0 failures", done.stdout), done.stdout


@gxx
@pytest.mark.slow
@pytest.mark.parametrize("source", ["cuda_sim_test.cpp", "cuda_sim_bntt_test.cpp"])
def test_kernels_on_the_simulator_sanitized(source, tmp_path):
    done = build_and_run(source, [*SIMULATED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], tmp_path)
    assert done.returncode == 0, done.stderr


def compile_cuda(source: Path, folder: Path) -> str:
    """What ptxas says about the kernels of one file."""
    command = [
        "nvcc", "-std=c++20", "-arch=sm_90", "-O3", "-fmad=false", "-Xptxas", "-v", "-Werror", "all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Wconversion,-Werror", "-c", str(source), "-o", str(folder / f"{source.stem}.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def kernels_of(report: str) -> list[tuple[str, int, int]]:
    """(name, registers, bytes of stack frame and spills) of every kernel in a ptxas report."""
    found = []
    for part in report.split("Compiling entry function")[1:]:
        name = re.search(r"([a-z][a-z_]*_kernel)", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert name and memory and registers, f"the report of ptxas is not understood: {part[:300]}"
        found.append((name[1], int(registers[1]), sum(map(int, memory.groups()))))
    return found


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        longest_first = sorted(SOURCES, key=lambda s: "back" not in s.stem and "lif" not in s.stem)
        return dict(zip((s.stem for s in longest_first), pool.map(lambda s: compile_cuda(s, folder), longest_first)))


@nvcc
@pytest.mark.parametrize("source", [s.stem for s in SOURCES])
def test_no_spills_and_few_registers(source, reports):
    kernels = kernels_of(reports[source])
    assert kernels
    for name, registers, spilled in kernels:
        assert spilled == 0, f"{source}: {name} spills {spilled} bytes"
        assert registers <= REGISTERS[name], f"{source}: {name} takes {registers} registers, its launch allows {REGISTERS[name]}"


@nvcc
def test_a_spill_is_seen(tmp_path):
    source = tmp_path / "control.cu"
    source.write_text(
        "__global__ void __launch_bounds__(64) indexed_kernel(float* p, int n) {\n"
        "  float local[64];\n"
        "  for (int i = 0; i < 64; ++i) local[i * n % 64] = p[i];\n"
        "  for (int i = 0; i < 64; ++i) p[i] = local[(i + n) % 64];\n"
        "}\n"
    )
    [(name, _, spilled)] = kernels_of(compile_cuda(source, tmp_path))
    assert name == "indexed_kernel" and spilled > 0
