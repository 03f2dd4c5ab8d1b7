"""`pyaccel doctor`: what is installed, which kernels run and give the right answer, and what costs speed here."""

from __future__ import annotations

import importlib.metadata
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyaccel import extension, ops, reference
from pyaccel.recipes.environment import environment, usable_cores

OK, HINT, BROKEN = "ok", "hint", "BROKEN"
# Optional packages, and the extra that brings each.
OPTIONAL = {
    "jsonargparse": "cli", "tqdm": "cli", "matplotlib": "plot", "pillow": "images", "mlxtend": "demo",
    "scikit-learn": "demo", "tensorboard": "log", "pytest-benchmark": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of the examination. state: "ok", "hint" (works, could be better) or "BROKEN"."""

    name: str
    state: str
    text: str


def examine() -> list[Check]:
    """Everything `pyaccel doctor` prints. CUDA is not initialised where there is none."""
    facts = environment()
    found = [
        Check("versions", OK, ", ".join(f"{name} {facts[name]}" for name in ("pyaccel", "python", "torch", "numpy"))),
        Check("machine", OK, f"{facts['processor']}, {facts['cores']} usable cores, {facts['system']}"),
        *_compiled(),
        *_cuda(),
        *_threads(),
    ]
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        found += [live_check(name, device) for name in KERNELS]
    return [*found, _optional()]


def print_checks(checks: list[Check]) -> int:
    """Print them; the exit code: 1 if something is broken, else 0."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.state:6}  {check.name.ljust(width)}  {check.text}")
    broken = [check.name for check in checks if check.state == BROKEN]
    print(f"broken: {', '.join(broken)}" if broken else "nothing is broken")
    return 1 if broken else 0


def _compiled() -> list[Check]:
    if extension._C is None:
        return [
            Check("kernels", BROKEN, f"{extension.missing}; the plain-torch reference runs instead, many times slower")
        ]
    built = extension._C.build_info()
    text = f"{built['isa']} in force, {built['best_isa']} is the best here; compiler {built['compiler']}"
    forced = os.environ.get("PYACCEL_ISA")
    if built["isa"] != built["best_isa"]:
        text += f"; PYACCEL_ISA={forced} forces it: unset it for speed" if forced else ""
        return [Check("kernels", HINT, text)]
    return [Check("kernels", OK, text)]


def _cuda() -> list[Check]:
    built = None if extension._C is None else extension._C.build_info()["cuda"]
    ours = f"kernels built for CUDA {built}" if built else "kernels built without CUDA"
    theirs = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
    if not torch.cuda.is_available():
        driver = (
            "an NVIDIA driver is loaded"
            if Path("/proc/driver/nvidia/version").exists()
            else "no NVIDIA driver is loaded"
        )
        state = HINT if driver.startswith("an ") or built and not torch.version.cuda else OK
        hint = (
            "; install a torch with CUDA to use the GPU" if driver.startswith("an ") and not torch.version.cuda else ""
        )
        return [Check("CUDA", state, f"{ours}, {theirs}, {driver}{hint}")]
    devices = ", ".join(
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    )
    if not built:
        return [Check("CUDA", HINT, f"{devices}, but {ours}: rebuild with nvcc in reach and PYACCEL_CUDA=on")]
    return [Check("CUDA", OK, f"{ours}, {theirs}; {devices}")]


def _threads() -> list[Check]:
    threads, cores = torch.get_num_threads(), usable_cores()
    found = [Check("threads", OK if threads <= cores else HINT, f"{threads} for {cores} usable cores"
                   + ("" if threads <= cores else ": more threads than cores; set OMP_NUM_THREADS"))]  # fmt: skip
    pools = openmp_libraries()
    if pools is None:
        found.append(Check("OpenMP", OK, "which libraries are loaded cannot be seen on this system"))
    elif extension._C is not None and len(pools) != 1:
        text = (
            f"expected one OpenMP library shared by torch and the kernels, found {', '.join(pools) or 'none'}: two "
            "thread pools compete for the cores. Reinstall pyaccel with the compiler of this system, and import torch "
            "before other packages"
        )
        found.append(Check("OpenMP", BROKEN, text))
    else:
        found.append(Check("OpenMP", OK, f"one thread pool, shared with torch ({', '.join(pools) or 'none loaded'})"))
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        text = (
            "on a machine shared with other work set OMP_WAIT_POLICY=passive: waiting threads that spin made 30 "
            "training steps on a busy 2-core machine take 7.2 s instead of 0.45 s"
        )
        found.append(Check("OMP_WAIT_POLICY", HINT, text))
    return found


def openmp_libraries(maps: str | os.PathLike = "/proc/self/maps") -> list[str] | None:
    """The OpenMP run-time libraries loaded into this process, or None where the system does not tell."""
    try:
        text = Path(maps).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    paths = {match.group() for match in re.finditer(r"/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*", text)}
    return sorted({os.path.realpath(path) for path in paths})


# --------------------------------------------------------------------------------------------------------- live kernels


def _lif(side, current: Tensor) -> dict[str, Tensor]:
    return dict(zip(("spikes", "membrane"), side.lif(current, leak=0.9), strict=True))


def _bntt_lif(side, current: Tensor) -> dict[str, Tensor]:
    gain = torch.ones(current.shape[0], current.shape[2], device=current.device)
    # Given statistics: without a reduction before them, spikes must agree to the last one.
    out = side.bntt_lif(current, gain, leak=0.9, mean=torch.zeros_like(gain), var=torch.ones_like(gain))
    return {"spikes": out[0], "membrane": out[1]}


def _encode(side, current: Tensor) -> dict[str, Tensor]:
    return {"spikes": side.poisson_encode(current[0], 4, seed=7)}


KERNELS: dict[str, Callable] = {"lif": _lif, "bntt_lif": _bntt_lif, "poisson_encode": _encode}


def live_check(name: str, device: str) -> Check:
    """Run a tiny forward and backward pass of one operator, and compare both with the plain-torch reference."""
    label = f"{name} on {device}"
    current = 2 * torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(1)) - 0.5
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the fallback's own; it is told below
            got, wanted = (_with_gradient(KERNELS[name], side, current.to(device)) for side in (ops, reference))
    except Exception as error:  # whatever it is, the other checks go on
        first = (str(error).splitlines() or [""])[0]  # pybind11 goes on with every value of every tensor
        return Check(label, BROKEN, f"{type(error).__name__}: {first[:200]}")
    for what, value in got.items():
        if not torch.allclose(value, wanted[what], rtol=1e-5, atol=1e-6):
            worst = float((value - wanted[what]).abs().max())
            return Check(label, BROKEN, f"its {what} differs from the reference by up to {worst:.2g}")
    if not _has_kernel(device):
        return Check(label, HINT, "no kernel in this build: the plain-torch reference runs, many times slower")
    return Check(label, OK, "live, and agrees with the reference")


def _with_gradient(kernel: Callable, side, current: Tensor) -> dict[str, Tensor]:
    current = current.clone().requires_grad_()
    out = kernel(side, current)
    sum((o * torch.linspace(0, 1, o.numel(), device=o.device).reshape(o.shape)).sum() for o in out.values()).backward()
    return {**{name: value.detach() for name, value in out.items()}, "gradient": current.grad}


def _has_kernel(device: str) -> bool:
    return extension._C is not None and (device == "cpu" or extension.has_cuda())


def _optional() -> Check:
    present, absent = [], []
    for package, extra in OPTIONAL.items():
        try:
            present.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(f'{package} (pip install "pyaccel[{extra}]")')
    missing = f"; not installed: {', '.join(absent)}" if absent else ""
    return Check("optional packages", OK, ", ".join(present) + missing)
