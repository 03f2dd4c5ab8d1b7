"""FLOP formulas for `torch.utils.flop_counter` (an operator without one counts 0, silently).

A multiplication, addition, subtraction, comparison and a reset count one each: LIF forward 4 a neuron-step (leak, add,
compare, reset); backward 4 to recompute and 8 to walk back; normalisation adds 2 forward (and 3 for the statistics)
and 9 backward; STDB 4 forward and 4 backward (the exponential counts one). The encoder does no floating-point arithmetic worth counting: one product a pixel.
A crossbar tile M x N, M >= N, takes M N (N + M) / 2 multiply-adds, two operations each; its gradient repeats them and adds
two products of N x N with N x M a row. The tiled product counts as the GEMM that it is, twice where arrays are read apart.
"""

from __future__ import annotations

import math

from torch.utils.flop_counter import register_flop_formula

import torch


def _formula(name: str, current_position: int, per_element: int) -> None:
    @register_flop_formula(getattr(torch.ops.pyaccel, name))
    def flops(*shapes, out_shape=None, **kwargs) -> int:
        return per_element * math.prod(shapes[current_position])


_formula("lif", 0, 4)
_formula("lif_backward", 2, 12)
_formula("bntt_lif", 0, 4 + 5)
_formula("bntt_lif_backward", 2, 12 + 9)
_formula("lif_packed", 0, 4)
_formula("bntt_lif_packed", 0, 4 + 5)
_formula("bntt_statistics", 0, 3)
_formula("stdb_lif", 0, 4)
_formula("stdb_lif_backward", 0, 4)
_formula("poisson_encode", 0, 1)


def _ladder(conductance: torch.Size) -> tuple[int, int]:
    tiles, (short, long) = math.prod(conductance[:-2]), sorted(conductance[-2:])
    return tiles * long * short * (short + long), tiles * 4 * long * long * short * short


@register_flop_formula(torch.ops.pyaccel.crossbar_matrix)
def _crossbar_matrix(conductance, *rest, out_shape=None, **kwargs) -> int:
    return _ladder(conductance)[0]


@register_flop_formula(torch.ops.pyaccel.crossbar_matrix_backward)
def _crossbar_matrix_backward(grad, conductance, *rest, out_shape=None, **kwargs) -> int:
    return sum(_ladder(conductance))


@register_flop_formula(torch.ops.pyaccel.crossbar_matmul)
def _crossbar_matmul(x, positive, negative, dac_range, adc_range, key, tile, apart, *rest, out_shape=None, **kwargs) -> int:
    return 2 * (2 if apart else 1) * math.prod(x) * positive[1]
