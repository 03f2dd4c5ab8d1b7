"""The compiled module. Private: `pyaccel.ops` checks arguments, allocates outputs and is what users call."""

from typing import Any

def build_info() -> dict[str, Any]:
    """version, compiler, cuda (None or "toolkit, architectures"), best_isa, isa, threads."""

def force_isa(level: str) -> None:
    """baseline, avx2 or avx512; ValueError for what this processor lacks."""

def describe(tensor: Any) -> str:
    """dtype, shape, strides and device of a tensor as a kernel sees them."""

def recycle_memory() -> bool:
    """glibc keeps large freed blocks; False where the C library has no such setting."""

def release_memory() -> bool:
    """Freed memory goes back to the system."""

class neuron:
    """Kernels of the neuron family (csrc/neuron/neuron.h). Outputs are allocated by the caller."""

    @staticmethod
    def lif_forward(*args: Any) -> None: ...
    @staticmethod
    def lif_backward(*args: Any) -> None: ...
    @staticmethod
    def bntt_scratch_bytes(*args: Any) -> int: ...
    @staticmethod
    def bntt_packs_in_place(*args: Any) -> bool: ...
    @staticmethod
    def bntt_statistics(*args: Any) -> None: ...
    @staticmethod
    def bntt_forward(*args: Any) -> None: ...
    @staticmethod
    def bntt_backward(*args: Any) -> None: ...
    @staticmethod
    def stdb_forward(*args: Any) -> None: ...
    @staticmethod
    def stdb_backward(*args: Any) -> None: ...
    @staticmethod
    def pack(*args: Any) -> bool: ...
    @staticmethod
    def unpack(*args: Any) -> None: ...
    @staticmethod
    def encode(*args: Any) -> None: ...

class sram:
    """Kernels of the sram family (csrc/sram/sram.h)."""

    class Plan:
        """Thresholds and binomial tables of one set of probabilities: (threshold, log2 of the block, counts) a bit."""

        def __init__(self, sparse: bool, planes: list[tuple[int, int, Any]]) -> None: ...

    @staticmethod
    def flip(*args: Any) -> None: ...
    @staticmethod
    def noise(*args: Any) -> None: ...
    @staticmethod
    def noise_backward(*args: Any) -> None: ...
    @staticmethod
    def raw_philox(*args: Any) -> tuple[int, int, int, int]: ...
    @staticmethod
    def additions(n: int) -> int: ...

class crossbar:
    """Kernels of the crossbar family (csrc/crossbar/crossbar.h). Outputs are allocated by the caller."""

    @staticmethod
    def scratch_bytes(*args: Any) -> int: ...
    @staticmethod
    def matrix(*args: Any) -> None: ...
    @staticmethod
    def matrix_gradient(*args: Any) -> None: ...
    @staticmethod
    def matmul(*args: Any) -> None: ...
    @staticmethod
    def quantize(*args: Any) -> None: ...
    @staticmethod
    def normal(*args: Any) -> None: ...
