"""Quantised layers: fake-quantised while gradients flow, exact integer kernels over packed weights in inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.ops import checks, quantizers
from pyaccel.reference.qmac import BITS


def container_of(bits: int) -> int:
    """The width that codes of `bits` bits are stored in: the next of 1, 2, 4, 8, 16."""
    return next(width for width in BITS if width >= bits)


class _Quantized:
    """What the two layers share. Mixed into `nn.Linear` and `nn.Conv2d`, which hold the full-precision weight.

    Activations: unsigned codes over [0, activation_max], the exponential moving average (`momentum`) of the largest
    input seen in training, frozen in evaluation: a range that followed the test input would be a hidden defence.
    Inputs below 0 become 0, so a layer belongs behind a ReLU, or on images in [0, 1].
    """

    def _set_up(self, weight_bits: int, activation_bits: int, quantizer: str, momentum: float) -> None:
        name = type(self).__name__
        self.weight_bits = checks.whole(name, "weight_bits", weight_bits, 2 if quantizer == "signed_zero" else 1, 16)
        self.activation_bits = checks.whole(name, "activation_bits", activation_bits, 1, 16)
        checks.choice(name, "quantizer", quantizer, quantizers.WEIGHT_QUANTIZERS)
        self.quantizer = quantizer
        if not 0 <= momentum < 1:
            raise ValueError(f"{name}: momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self.register_buffer("activation_max", torch.zeros(()))
        self._packed: tuple | None = None

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        seen = x.detach().amax().clamp_min(1e-12).to(self.activation_max)
        mean = torch.lerp(seen, self.activation_max, self.momentum)
        self.activation_max.copy_(torch.where(self.activation_max > 0, mean, seen))

    def grid(self) -> quantizers.Grid:
        """What the codes of the weight mean now."""
        return quantizers.weight_grid(self.weight, self.weight_bits, self.quantizer)

    def weight_codes(self) -> Tensor:
        """The weight as codes `[outputs, K]`, uint8 (int32 in a 16-bit container)."""
        codes = quantizers.codes_of(self.weight, self.grid()).flatten(1)
        return codes.to(torch.int32 if container_of(self.weight_bits) == 16 else torch.uint8)

    def packed(self) -> tuple[Tensor, float, float, float]:
        """Packed weight words, activation scale, and the factors of P and Q; made once for the weight as it is."""
        key = (self.weight._version, self.weight.data_ptr(), self.activation_max._version, self.weight.device)
        if self._packed is None or self._packed[0] != key:
            largest = self.activation_max.float()
            if not largest.item() > 0:
                raise ValueError(
                    f"{type(self).__name__}: no activation range yet; run some batches in training mode (or set activation_max)"
                )
            grid = self.grid()
            scale = (largest / ((1 << self.activation_bits) - 1)).item()
            words = ops.pack_codes(self.weight_codes(), container_of(self.weight_bits))
            self._packed = (key, (words, scale, scale * grid.scale.item(), scale * grid.offset.item()))
        return self._packed[1]

    def _fake(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight on their levels, differentiable."""
        activation = quantizers.quantize_range(x, self.activation_max, self.activation_bits)
        return activation, quantizers.fake_quantize(self.weight, self.grid())

    def _integers(self, x: Tensor) -> bool:
        """Whether the integer kernels run: in evaluation, unless a gradient with respect to the input is wanted."""
        return not self.training and not (torch.is_grad_enabled() and x.requires_grad)

    def train(self, mode: bool = True):
        self._packed = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        kind = "" if self.quantizer == "symmetric" else f", quantizer={self.quantizer!r}"
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, activation_bits={self.activation_bits}{kind}"

    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.detach().float()


class QuantLinear(_Quantized, nn.Linear):
    """`nn.Linear` with quantised weight and input (quanos, sections 4 and 7).

    Training, and evaluation where the input requires grad (attacks): fake quantisation, straight-through gradients.
    Other evaluation: `ops.quantized_linear` on weights packed once, equal to the fake-quantised layer up to the rounding
    of the latter's sums; its output carries no gradient.

    Args:
        weight_bits, activation_bits: 1..16, the nominal widths; codes live in the next of 1, 2, 4, 8, 16 bits.
        quantizer: "symmetric" (no zero code!), "signed_zero" or "affine", see `ops.weight_grid`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, weight_bits: int = 8, activation_bits: int = 8,
        quantizer: str = "symmetric", momentum: float = 0.99, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_up(weight_bits, activation_bits, quantizer, momentum)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._follow(x)
        if not self._integers(x):
            activation, weight = self._fake(x)
            return F.linear(activation, weight, self.bias)
        words, scale, p_scale, q_scale = self.packed()
        width = container_of(self.activation_bits)
        codes = ops.quantize_codes(x.float().reshape(-1, self.in_features), scale, self.activation_bits)
        p, q = ops.quantized_linear(
            ops.pack_codes(codes, width), words, activation_bits=width, weight_bits=container_of(self.weight_bits),
            length=self.in_features,
        )  # fmt: skip
        y = ops.dequantize_sums(p, q, p_scale=p_scale, q_scale=q_scale, bias=self._bias())
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)


class QuantConv2d(_Quantized, nn.Conv2d):
    """`nn.Conv2d` with quantised weight and input: as `QuantLinear`, by `ops.quantized_conv2d`.

    Padding must be given in numbers and with zeros (code 0): other modes raise ValueError.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True, *,
        weight_bits: int = 8, activation_bits: int = 8, quantizer: str = "symmetric", momentum: float = 0.99,
        padding_mode: str = "zeros", device=None, dtype=None,
    ):  # fmt: skip
        if isinstance(padding, str) or padding_mode != "zeros":
            raise ValueError(f"QuantConv2d: padding must be numbers and zeros, got padding={padding!r}, padding_mode={padding_mode!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )  # fmt: skip
        self._set_up(weight_bits, activation_bits, quantizer, momentum)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._follow(x)
        geometry = dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        if not self._integers(x):
            activation, weight = self._fake(x)
            return F.conv2d(activation, weight, self.bias, **geometry)
        words, scale, p_scale, q_scale = self.packed()
        width = container_of(self.activation_bits)
        codes = ops.quantize_codes(x.float(), scale, self.activation_bits)
        p, q = ops.quantized_conv2d(
            codes, words, activation_bits=width, weight_bits=container_of(self.weight_bits), kernel_size=self.kernel_size, **geometry
        )  # fmt: skip
        return ops.dequantize_sums(p, q, p_scale=p_scale, q_scale=q_scale, bias=self._bias()).to(x.dtype)


# ---- packed on disk
def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` with each quantised weight as packed int32 words `NAME.weight_words` and `NAME.weight_grid`
    (scale, offset; float32): what safetensors stores in bits / 32 of the space of float32."""
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, _Quantized)}
    dropped = {_join(name, "weight") for name in quantized}
    state = {key: value.detach().clone() for key, value in model.state_dict().items() if key not in dropped}
    for name, module in quantized.items():
        grid = module.grid()
        state[_join(name, "weight_words")] = ops.pack_codes(module.weight_codes(), container_of(module.weight_bits))
        state[_join(name, "weight_grid")] = torch.stack([grid.scale, grid.offset])
    return state


@torch.no_grad()
def load_packed_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `packed_state` gave into a model of the same structure and widths. Weights become their levels.

    Raises:
        ValueError: a key is missing, left over, or of another shape (the message names it).
    """
    state, plain = dict(state), {}
    for name, module in model.named_modules():
        if not isinstance(module, _Quantized):
            continue
        for part in ("weight_words", "weight_grid"):
            if _join(name, part) not in state:
                raise ValueError(f"load_packed_state: {_join(name, part)} is missing; was this state made by packed_state?")
        words, (scale, offset) = state.pop(_join(name, "weight_words")), state.pop(_join(name, "weight_grid")).unbind()
        width, length = container_of(module.weight_bits), module.weight[0].numel()
        try:
            codes = ops.unpack_codes(words, width, length)
        except ValueError as error:
            raise ValueError(f"load_packed_state: {_join(name, 'weight_words')} does not fit {module.weight_bits} bits: {error}") from None
        if codes.shape[0] != module.weight.shape[0]:
            raise ValueError(f"load_packed_state: {_join(name, 'weight_words')} has {codes.shape[0]} rows, the layer {module.weight.shape[0]}")
        plain[_join(name, "weight")] = (codes.to(torch.float32) * scale + offset).reshape(module.weight.shape)
    try:
        model.load_state_dict({**state, **plain})
    except RuntimeError as error:
        raise ValueError(f"load_packed_state: {error}") from None


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
