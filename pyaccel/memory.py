"""Output memory on the CPU: what a training loop frees, its next step should get back."""

from __future__ import annotations

from pyaccel import extension


def recycle_memory() -> bool:
    """Let the C allocator of this process keep and reuse large blocks; returns whether it took effect (glibc only).

    By default glibc maps every block above 32 MiB anew and unmaps it when freed, so that each step of a training loop
    touches fresh pages: at 100 MB a tensor that costs several times what the kernels cost. Afterwards every large CPU
    tensor of the process, torch's own included, comes from recycled memory; the process holds on to its peak until
    `release_memory()`. `pyaccel run` calls this; a library user decides. CUDA has torch's caching allocator already.
    """
    return extension._C is not None and extension._C.recycle_memory()


def release_memory() -> bool:
    """Give freed memory back to the system now; returns whether there was any (glibc only)."""
    return extension._C is not None and extension._C.release_memory()
