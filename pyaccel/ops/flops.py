"""FLOP formulas for `torch.utils.flop_counter` (an operator without one counts 0, silently).

A multiplication, addition, subtraction, comparison and a reset count one each: LIF forward 4 a neuron-step (leak, add,
compare, reset); backward 4 to recompute and 8 to walk back; normalisation adds 2 forward (and 3 for the statistics)
and 9 backward; STDB 4 forward and 4 backward (the exponential counts one). The encoder does no floating-point arithmetic worth counting: one product a pixel.
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


# Integer products count as torch counts float ones: 2 a multiply-accumulate. Moving codes is no arithmetic.
@register_flop_formula(torch.ops.pyaccel.quantized_linear)
def _linear_flops(activations, weights, activation_bits, weight_bits, length, out_shape=None, **kwargs) -> int:
    return 2 * activations[0] * weights[0] * length


@register_flop_formula(torch.ops.pyaccel.quantized_conv2d)
def _conv2d_flops(codes, weights, activation_bits, weight_bits, kernel, stride, padding, dilation, groups, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(out_shape[0]) * (codes[1] // groups) * math.prod(kernel)


@register_flop_formula(torch.ops.pyaccel.dequantize_sums)
def _dequantize_flops(p, *shapes, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(p)


_formula("quantize_codes", 0, 4)
_formula("pack_codes", 0, 0)
_formula("unpack_codes", 0, 0)
