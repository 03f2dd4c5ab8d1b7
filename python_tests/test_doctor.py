from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pyaccel import doctor, extension, ops
from pyaccel.doctor import BROKEN, HINT, OK, Check, examine, live_check, openmp_libraries, print_checks


def state(checks, name):
    return next(check for check in checks if check.name == name)


def doctor_process(**environment):
    """The command in a process of its own: other tests load packages that bring a second OpenMP library."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", "pyaccel", "doctor"], capture_output=True, text=True, env=environment)


def test_this_machine_is_sound_and_every_kernel_is_live():
    if extension._C is None:
        pytest.skip("no compiled module")
    found = doctor_process()
    assert found.returncode == 0 and found.stderr == "", found.stdout + found.stderr
    assert found.stdout.endswith("nothing is broken\n") and f"torch {torch.__version__}" in found.stdout
    lines = [line.split(maxsplit=1) for line in found.stdout.splitlines()]
    for name in ("lif", "bntt_lif", "poisson_encode"):
        (line,) = (text for _, text in lines if text.startswith(f"{name} on cpu "))
        assert line.endswith("live, and agrees with the reference")
    assert "one thread pool, shared with torch (/" in found.stdout


def test_a_wrong_kernel_is_found(monkeypatch):
    right = ops.lif

    def one_spike_too_many(current, **options):
        spikes, membrane = right(current, **options)
        spikes = spikes + torch.nn.functional.one_hot(torch.tensor(5), spikes.numel()).reshape(spikes.shape)
        return spikes, membrane

    monkeypatch.setattr(ops, "lif", one_spike_too_many)
    found = live_check("lif", "cpu")
    assert found.state == BROKEN and found.text == "its spikes differs from the reference by up to 1"


def test_a_wrong_gradient_is_found(monkeypatch):
    right = ops.lif
    monkeypatch.setattr(ops, "lif", lambda current, **options: right(current, surrogate_scale=0.6, **options))
    found = live_check("lif", "cpu")
    assert found.state == BROKEN and found.text.startswith("its gradient differs")


def test_a_kernel_that_fails_is_told(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("no such instruction\ntensor([1, 2, 3])")

    monkeypatch.setattr(ops, "poisson_encode", fail)
    found = live_check("poisson_encode", "cpu")
    assert (found.state, found.text) == (BROKEN, "RuntimeError: no such instruction")
    assert print_checks([found, Check("threads", OK, "2")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "broken: poisson_encode on cpu"


def test_without_the_compiled_module(monkeypatch):
    monkeypatch.setattr(extension, "_C", None)
    monkeypatch.setattr(extension, "missing", "the compiled module pyaccel._C could not be imported (a reason)")
    kernels = state(examine(), "kernels")
    assert kernels.state == BROKEN and "(a reason)" in kernels.text and "reference runs instead" in kernels.text


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (["7f00-7f01 r-xp 00000000 00:00 1 /a/libgomp.so.1", "7f01-7f02 r--p 00000000 00:00 1 /a/libgomp.so.1"], 1),
        (
            [
                "7f00-7f01 r-xp 00000000 00:00 1 /a/torch.libs/libgomp-24e2ab19.so.1.0.0",
                "7 r 0 0 2 /usr/lib/libgomp.so.1",
            ],
            2,
        ),
        (["7f00-7f01 r-xp 00000000 00:00 1 /a/libiomp5.so", "7f00-7f01 r-xp 00000000 00:00 1 /a/libomp.so"], 2),
        (
            ["7f00-7f01 r-xp 00000000 00:00 1 /a/libcompiler.so", "7f00-7f01 r-xp 00000000 00:00 1 /a/libomptarget.so"],
            0,
        ),
    ],
)
def test_openmp_libraries_are_counted_once_each(lines, count, tmp_path):
    (tmp_path / "maps").write_text("\n".join(lines) + "\n")
    assert len(openmp_libraries(tmp_path / "maps")) == count
    assert openmp_libraries(tmp_path / "none") is None


def test_two_thread_pools_are_a_fault(monkeypatch):
    if extension._C is None:
        pytest.skip("no compiled module")
    monkeypatch.setattr(doctor, "openmp_libraries", lambda: ["/a/libgomp.so.1", "/b/libgomp.so.1"])
    found = state(examine(), "OpenMP")
    assert found.state == BROKEN and "two thread pools compete" in found.text


def test_hints_are_no_faults():
    assert print_checks([Check("x", HINT, "could be better")]) == 0


def test_a_forced_instruction_set_and_waiting_threads_are_hints():
    if extension._C is None or extension._C.build_info()["best_isa"] == "baseline":
        pytest.skip("nothing to force")
    found = doctor_process(PYACCEL_ISA="baseline", OMP_WAIT_POLICY="passive")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "hint    kernels" in found.stdout and "PYACCEL_ISA=baseline forces it" in found.stdout
    assert "OMP_WAIT_POLICY" not in found.stdout
