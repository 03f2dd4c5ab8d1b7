"""The compiled module, or the reason why it is not there. `import pyaccel` works either way; see `ops.library`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

_C: ModuleType | None
missing: str | None = None
try:
    from pyaccel import _C  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    if "PYACCEL_ISA" in str(error):  # a wish that cannot be met is an error, not a reason to run something else
        raise
    _C = None
    missing = f"the compiled module pyaccel._C could not be imported ({error})"
    if (Path(__file__).parents[1] / "csrc").is_dir():
        missing += (
            "; this is the source folder, not the installed package: use the `pyaccel` command or another "
            "working folder, or build the module in place with `make build`"
        )


def has_cuda() -> bool:
    """Whether CUDA kernels were built in."""
    return _C is not None and _C.build_info()["cuda"] is not None
