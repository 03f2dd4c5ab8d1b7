"""`crossbar_matrix`: what resistive wires make of the conductances of a crossbar tile, exactly and differentiably."""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.ops import checks
from pyaccel.ops.library import register

# Ladder states that all threads together keep for the gradients of their tiles (256 x 256: 140 MiB a tile in float32);
# where that is not enough, they are computed twice, block by block.
HISTORY_BYTES = 1 << 30


def crossbar_matrix(
    conductance: Tensor, *, r_driver: float, r_wire_row: float, r_wire_col: float, r_sense: float
) -> Tensor:
    """Effective conductance of crossbar tiles with resistive drivers, wires and sense amplifiers, exact (linear devices).

    Row i of a tile is driven by V[i] through `r_driver`, column j ends in `r_sense` at virtual ground, neighbouring
    nodes of a row (column) wire are `r_wire_row` (`r_wire_col`) apart. With node voltages u (rows) and w (columns)::

        g[i,j] (u[i,j] - w[i,j]) + (u[i,j] - u[i,j-1]) / r_wire_row + (u[i,j] - u[i,j+1]) / r_wire_row = 0
        g[i,j] (w[i,j] - u[i,j]) + (w[i,j] - w[i-1,j]) / r_wire_col + (w[i,j] - w[i+1,j]) / r_wire_col = 0

    (driver and sense at the ends) the output currents are `I[j] = sum_i V[i] effective[i,j]` (2008.11298; solved by the
    ladder of docs/crossbar.md). No
    wire segment precedes the first or follows the last node: add it to `r_driver`, `r_sense` if there is one
    (`hardware.CrossbarConfig` does). Every resistance may be 0, every conductance too.

    Args:
        conductance: `[..., M, N]` siemens, float32 or float64, finite and >= 0. Leading dimensions: a batch of tiles.
        r_driver, r_wire_row, r_wire_col, r_sense: ohm, finite, >= 0.

    Returns:
        `[..., M, N]` siemens. float64: below 1e-11 relative while resistance times conductance of a column stays below
        1e5 (real tiles: 10), growing with it beyond. float32: 5e-6 relative for entries above 1e-3 of the tile's
        largest, 1e-6 of the largest everywhere. The gradient is exact (reverse mode; no second derivative).

    Raises:
        TypeError, ValueError: what was expected and what came; a negative or NaN conductance by its place; a tile too
        ill-conditioned for float64. On CUDA the last two are not looked for on the host, which would wait for the GPU:
        such a tile comes back as NaN.
    """
    op = "crossbar_matrix"
    tiles(op, conductance)
    ohm = [
        _ohm(op, name, value)
        for name, value in (
            ("r_driver", r_driver), ("r_wire_row", r_wire_row), ("r_wire_col", r_wire_col), ("r_sense", r_sense),
        )
    ]  # fmt: skip
    return _crossbar_matrix(conductance, *ohm)


def tiles(op: str, conductance: object) -> None:
    """`conductance` is a float32 or float64 tensor of tiles."""
    if not isinstance(conductance, Tensor):
        raise TypeError(f"{op}: conductance must be a torch.Tensor [..., M, N], got {checks.shape_of(conductance)}")
    if conductance.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: conductance must be float32 or float64 (siemens are small: half types lose them), got "
            f"{conductance.dtype}; convert it with .float()"
        )
    if conductance.dim() < 2:
        raise ValueError(f"{op}: conductance must be [..., M, N], got {checks.shape_of(conductance)}")


def _ohm(op: str, name: str, value: object) -> float:
    value = checks.number(op, name, value)
    if value < 0:
        raise ValueError(f"{op}: {name} must be at least 0 ohm, got {value:g}")
    return value


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:]).contiguous()


def _scratch(tiles: Tensor, ohm: tuple[float, ...], gradient: bool) -> Tensor | None:
    size = extension._C.crossbar.scratch_bytes(tiles, ohm, gradient)
    return tiles.new_empty(size, dtype=torch.uint8) if size else None


def _kernel(conductance, *ohm):
    out = torch.empty_like(conductance, memory_format=torch.contiguous_format)
    if out.numel():
        flat = _flat(conductance)
        extension._C.crossbar.matrix(flat, ohm, out.view_as(flat), _scratch(flat, ohm, False))
    return out


def _fake(conductance, *ohm):
    return torch.empty_like(conductance, memory_format=torch.contiguous_format)


def _keywords(ohm) -> dict:
    return dict(zip(("r_driver", "r_wire_row", "r_wire_col", "r_sense"), ohm, strict=True))


def _fallback(conductance, *ohm):
    return _fake(conductance).copy_(reference.crossbar_matrix(conductance, **_keywords(ohm)))


def _setup_context(ctx, inputs, output):
    conductance, *ctx.ohm = inputs
    ctx.save_for_backward(conductance)


def _backward(ctx, grad):
    return _crossbar_matrix_backward(grad, *ctx.saved_tensors, *ctx.ohm), None, None, None, None


def _backward_kernel(grad, conductance, *ohm):
    out = _fake(conductance)
    if out.numel():
        flat = _flat(conductance)
        history = HISTORY_BYTES // min(len(flat), torch.get_num_threads())
        extension._C.crossbar.matrix_gradient(flat, ohm, _flat(grad), out.view_as(flat), history, _scratch(flat, ohm, True))
    return out


def _backward_fake(grad, conductance, *ohm):
    return _fake(conductance)


def _backward_fallback(grad, conductance, *ohm):
    with torch.enable_grad():
        leaf = conductance.detach().requires_grad_()
        effective = reference.crossbar_matrix(leaf, **_keywords(ohm))
        (found,) = torch.autograd.grad(effective, leaf, grad)
    return _fake(conductance).copy_(found)


_OHM = "float r_driver, float r_wire_row, float r_wire_col, float r_sense"
_crossbar_matrix_backward = register(
    f"crossbar_matrix_backward(Tensor grad, Tensor conductance, {_OHM}) -> Tensor",
    kernel=_backward_kernel,
    fake=_backward_fake,
    fallback=_backward_fallback,
)
_crossbar_matrix = register(
    f"crossbar_matrix(Tensor conductance, {_OHM}) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    fallback=_fallback,
    setup_context=_setup_context,
    backward=_backward,
)
