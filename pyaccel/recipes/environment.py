"""What a figure depends on besides its configuration: versions, processor, threads, instruction set, device."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import numpy as np
import torch

from pyaccel import extension
from pyaccel.version import __version__


def environment(device: str | torch.device = "cpu") -> dict[str, str | int | None]:
    """Plain values for a report. `device`: the one that computed; its name is asked for only if it is a GPU."""
    built = extension._C.build_info() if extension._C is not None else {}
    device = torch.device(device)
    return {
        "pyaccel": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
        "processor": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "kernels": built.get("isa", "none: the plain-torch reference"),
        "kernels_cuda": built.get("cuda"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def processor() -> str:
    """The model name of the processor, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use, which containers and `taskset` make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
