"""`recycle_memory` and `release_memory`, in processes of their own: they change the allocator of a whole process."""

from __future__ import annotations

import platform

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import resource, torch
import pyaccel
torch.set_num_threads(1)
x = torch.ones(100, 400_000)  # 160 MB

def faults(n=3):
    first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        pyaccel.ops.lif(x)[0][0, 0].item()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first) / n
"""


def numbers(done) -> list[float]:
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="a setting of glibc")
def test_recycled_memory_is_not_touched_for_the_first_time_again(run_python):
    script = (
        FAULTS
        + """
faults(1)
before = faults()
took = pyaccel.recycle_memory()
faults(8)  # the heap grows for a few calls until every block has found its place, and now and then for one more
print(before, int(took), sorted(faults(1) for _ in range(9))[4])
"""
    )
    # without huge pages, so that a page fault stands for 4 KiB
    before, took, after = numbers(run_python(script, GLIBC_TUNABLES="glibc.malloc.hugetlb=0", THP_MEM_ALLOC_ENABLE="0"))
    assert took == 1
    assert before > 20 and after <= before / 10


@pytest.mark.skipif(not GLIBC, reason="a setting of glibc")
def test_release_gives_the_peak_back(run_python):
    script = (
        FAULTS
        + """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6

pyaccel.recycle_memory()
faults(2)
held = resident()
released = pyaccel.release_memory()
print(held, int(released), resident())
"""
    )
    held, released, after = numbers(run_python(script))
    assert released == 1 and held - after > 120


def test_results_are_the_same(run_python):
    script = """
import torch, pyaccel
x = torch.randn(4, 3_000_000, generator=torch.Generator().manual_seed(0))
first = pyaccel.ops.lif(x)[0].clone()
pyaccel.recycle_memory()
for _ in range(3):
    again = pyaccel.ops.lif(x)[0]
print(int(torch.equal(first, again)))
"""
    assert numbers(run_python(script)) == [1.0]


def test_without_the_compiled_module_it_says_no(run_python):
    script = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "pyaccel._C":
            raise ImportError("blocked for the test")

sys.meta_path.insert(0, Blocked())
import pyaccel
print(int(pyaccel.recycle_memory()), int(pyaccel.release_memory()))
"""
    assert numbers(run_python(script)) == [0.0, 0.0]


def test_public_names():
    import pyaccel

    assert {"recycle_memory", "release_memory"} <= set(pyaccel.__all__)
