"""`import pyaccel` is light and quiet."""

from __future__ import annotations

HEAVY = "torchvision matplotlib jsonargparse PIL sklearn mlxtend tqdm tensorboard scipy pandas"


SCRIPT = f"""
import os, sys, warnings
warnings.simplefilter("error")
import torch

def state():
    return torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state().sum().item()

modules, before = set(sys.modules), state()
import pyaccel

assert not torch.cuda.is_initialized(), "CUDA was initialised"
heavy = {{name.split(".")[0] for name in set(sys.modules) - modules}} & set({HEAVY!r}.split())
assert not heavy, heavy
assert state() == before, "a global of torch changed"
assert pyaccel.__version__ and pyaccel.ops.lif and pyaccel.reference.lif

from pyaccel import extension
if extension._C is not None and os.path.exists("/proc/self/maps"):
    for n in (1, 2):  # the kernels find the OpenMP runtime that torch has loaded: one pool, governed by torch
        torch.set_num_threads(n)
        assert extension._C.build_info()["threads"] == n
    with open("/proc/self/maps") as maps:
        pools = {{line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}}
    assert len(pools) == 1, pools
"""


def test_import_is_light_changes_nothing_and_shares_the_thread_pool_of_torch(run_python):
    done = run_python(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_the_compiled_module_has_the_version_of_the_package():
    import pyaccel
    from pyaccel import extension

    if extension._C is not None:
        info = extension._C.build_info()
        assert info["version"] == pyaccel.__version__
        assert {"compiler", "cuda", "best_isa", "isa", "threads"} <= set(info)
