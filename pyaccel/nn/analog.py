"""Layers whose products run on analog crossbars: `AnalogLinear`, `AnalogConv2d`, and the mapping behind them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyaccel import ops
from pyaccel.hardware import CrossbarConfig
from pyaccel.hardware.mapping import conductances, from_tiles, gain, program, to_tiles
from pyaccel.nn.state import refuse_recomputation

HALF = (torch.float16, torch.bfloat16)


def stream_of(name: str, kind: str) -> int:
    """The Philox stream of a module's draws: CRC-32 of its qualified name and of what is drawn."""
    return zlib.crc32(f"{name}/{kind}".encode())


def effective_arrays(weight: Tensor, config: CrossbarConfig, *, chip: int, stream: int) -> Tensor:
    """What the arrays of chip number `chip` make of a weight `[K, C]`: `[S, A, K, C]`, in units of the weight.

    The weight becomes conductances, the conductances vary and stick, the wires act (`ops.crossbar_matrix`, one call for
    all tiles), and the gain is given back as `config.calibration` says. S slices add up; array 0 minus array 1 (A = 2),
    or the one array with its dummy column subtracted. Differentiable in `weight`, exactly through the wires.
    """
    g, factor = conductances(weight, config)
    cells = program(to_tiles(g, config), config, chip=chip, stream=stream)
    wired = ops.crossbar_matrix(cells, **config.resistances())
    arrays = from_tiles(wired, factor, tuple(weight.shape), config)
    if config.calibration in ("layer_gain", "column_gain"):
        slope = gain(_combined(arrays).detach(), weight.detach(), config.calibration == "column_gain")
        arrays = arrays / slope
    return arrays


def _combined(arrays: Tensor) -> Tensor:
    """`[S, A, K, C]` to the one matrix that an ideal readout sees."""
    return (arrays[:, 0] - arrays[:, 1] if arrays.shape[1] == 2 else arrays[:, 0]).sum(0)


def effective_weight(weight: Tensor, config: CrossbarConfig, *, chip: int, stream: int = 0) -> Tensor:
    """The matrix `[K, C]` by which chip number `chip` multiplies, wanted `weight` `[K, C]`: see `effective_arrays`."""
    return _combined(effective_arrays(weight, config, chip=chip, stream=stream))


class _StraightThrough(torch.autograd.Function):
    """Forward: what the weight was mapped to. Backward: the gradient of the combined mapped weight, unchanged."""

    @staticmethod
    def forward(ctx, weight, mapped):
        ctx.of_arrays = mapped.dim() == 4 and weight.dim() == 2
        return mapped.view_as(mapped)

    @staticmethod
    def backward(ctx, grad):
        # Of arrays [S, A, K, C]: every slice, and its positive array, has the gradient of the combined weight.
        return grad[0, 0] if ctx.of_arrays else grad, None


@dataclass
class _Mapped:
    weight: Tensor  # the tensor that was mapped, at this version of its contents
    version: int
    arrays: Tensor  # [S, A, K, C]
    effective: Tensor  # in the layout of the weight


class _Analog:
    """What both layers share: the chip, and the mapped arrays, made anew when the weight has changed.

    A change is seen by the weight's version counter (optimizer steps, load_state_dict, in-place operations); after
    writing through `weight.data`, which torch does not count, call `remap()`.
    """

    def _prepare(self, config: CrossbarConfig, chip: int, name: str) -> None:
        if not isinstance(config, CrossbarConfig):
            raise TypeError(f"{type(self).__name__}: config must be a hardware.CrossbarConfig, got {type(config).__name__}")
        self.config, self.chip, self.qualified_name = config, chip, name
        self.passes = 0  # with read noise every pass draws anew: its number is added to the stream
        self.measuring = False  # see surgery.calibrate_converters
        self.register_buffer("adc_range", None)
        self._mapped: _Mapped | None = None

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as `[K, C]`, rows in the order of the tiles."""
        raise NotImplementedError

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`."""
        raise NotImplementedError

    def remap(self) -> None:
        """Forget the mapped arrays: the next pass maps the weight again."""
        self._mapped = None

    def _apply(self, fn, recurse=True):
        self.remap()  # .to(), .half(), .cuda() exchange the data of a parameter, which its version does not count
        return super()._apply(fn, recurse)

    def _map(self) -> Tensor:
        """The arrays, in float32 also for weights of half types: those would lose what wires do to them."""
        weight = self.weight.float() if self.weight.dtype in HALF else self.weight
        stream = stream_of(self.qualified_name, "variation")
        return effective_arrays(self.to_matrix(weight), self.config, chip=self.chip, stream=stream)

    def _through_solver(self) -> bool:
        return self.config.gradient == "solver" and torch.is_grad_enabled() and self.weight.requires_grad

    def _kept(self) -> _Mapped:
        weight, kept = self.weight, self._mapped
        if kept is None or kept.weight is not weight or kept.version != weight._version:
            with torch.inference_mode(False), torch.no_grad():
                arrays = self._map()
                effective = self.from_matrix(_combined(arrays)).to(weight.dtype).contiguous()
            self._mapped = kept = _Mapped(weight, weight._version, arrays, effective)
        return kept

    def effective_weight(self) -> Tensor:
        """The weight that the chip computes with (without converters), in the layout of `weight`, with its gradient."""
        if self._through_solver():
            return self.from_matrix(_combined(self._map())).to(self.weight.dtype)
        mapped = self._kept().effective
        return _StraightThrough.apply(self.weight, mapped) if torch.is_grad_enabled() else mapped

    def _product(self, x: Tensor) -> Tensor:
        """`x [..., K]`, in the order of the tiles' rows, through tiles and converters, and the bias: `[..., C]`."""
        config = self.config
        if self._through_solver():
            arrays = self._map()
        else:
            arrays = _StraightThrough.apply(self.to_matrix(self.weight), self._kept().arrays)
        half = x.dtype if x.dtype in HALF else None  # under autocast, or in a model of a half type
        x = x.to(arrays.dtype)
        if self.measuring:
            self._measure(x, arrays)
        per_siemens = 0.0
        if config.read_noise:
            refuse_recomputation(self, "the pass draws its read noise anew; leave it outside the block")
            per_siemens = float(self.weight.detach().abs().amax()) / (config.g_max - config.g_min)
        total: Tensor | float = 0.0
        for index, (positive, *negative) in enumerate(arrays.unbind(0)):
            total = total + ops.crossbar_matmul(
                x, positive, *negative, tile=config.rows, read=config.read,
                dac_bits=config.dac_bits, adc_bits=config.adc_bits, adc_range=self._adc_range(index),
                read_noise=config.read_noise * per_siemens, seed=self.chip,
                stream=(stream_of(self.qualified_name, f"read{index}") + self.passes) % (1 << 32),
            )  # fmt: skip
        self.passes += 1
        total = total if self.bias is None else total + self.bias
        return total if half is None else total.to(half)

    def _adc_range(self, index: int) -> Tensor | float | None:
        if self.config.adc_bits is None or self.config.adc_range is not None:
            return self.config.adc_range
        if self.adc_range is None:
            raise ValueError(
                f"{type(self).__name__} {self.qualified_name!r}: its ADC has no range yet; set CrossbarConfig.adc_range, or "
                "measure it with surgery.calibrate_converters(model, batches)"
            )
        return self.adc_range[index]

    def _measure(self, x: Tensor, arrays: Tensor) -> None:
        options = dict(tile=self.config.rows, read=self.config.read)
        found = torch.stack([ops.adc_range(x, *slice_.unbind(0), **options) for slice_ in arrays.detach().unbind(0)])
        self.adc_range = found if self.adc_range is None else torch.maximum(self.adc_range, found)

    def get_extra_state(self) -> dict:
        return {"passes": self.passes}

    def set_extra_state(self, state: dict) -> None:
        self.passes = state["passes"]

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        saved = state_dict.get(f"{prefix}adc_range")
        if saved is not None and self.adc_range is None:  # a buffer that is None takes no value by itself
            self.adc_range = torch.empty_like(saved, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chip={self.chip}, {self.config.label()}"


class AnalogLinear(_Analog, nn.Linear):
    """`nn.Linear` on crossbars: inputs drive rows, outputs are columns; the bias is digital.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
        config: the chip's numbers.
        chip: seed of what differs between chips (variation, stuck cells, noise).
        name: qualified name in the model; with the chip it fixes every draw.

    `weight` stays the software weight; the chip multiplies by `effective_weight()`. Without converters a pass costs one
    ordinary linear layer; the mapping is made once and again after each change of the weight. Half types, in a model or
    under autocast: mapped, and with converters also multiplied, in float32; the output has the type of the input.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, config: CrossbarConfig, chip: int = 0, name: str = "",
        device=None, dtype=None,
    ):  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._prepare(config, chip, name)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def forward(self, x: Tensor) -> Tensor:
        if not self.config.converts:
            return functional.linear(x, self.effective_weight(), self.bias)
        return self._product(x)


class AnalogConv2d(_Analog, nn.Conv2d):
    """`nn.Conv2d` on crossbars: every output pixel is a product of its patch, `C_in kh kw` rows; the bias is digital.

    Args:
        in_channels .. bias: as `nn.Conv2d`; groups must be 1, padding zeros.
        config, chip, name: as in `AnalogLinear`. `config.row_order` decides which weights share a tile: "channel"
            (channel, then kernel position) or "position" (kernel position, then channel).

    Without converters a pass costs one ordinary convolution; with them the patches are unfolded.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0, dilation=1, groups: int = 1,
        bias: bool = True, *, config: CrossbarConfig, chip: int = 0, name: str = "", device=None, dtype=None,
    ):  # fmt: skip
        if groups != 1:
            raise ValueError(f"AnalogConv2d: groups must be 1, got {groups}; a grouped convolution is several crossbars")
        if isinstance(padding, str):
            raise ValueError(f"AnalogConv2d: padding must be a number or a pair, got {padding!r}")
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias, device=device, dtype=dtype
        )
        self._prepare(config, chip, name)

    def to_matrix(self, weight: Tensor) -> Tensor:
        if self.config.row_order == "position":
            weight = weight.permute(0, 2, 3, 1)
        return weight.flatten(1).T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        if self.config.row_order == "position":
            return matrix.T.unflatten(1, (*self.kernel_size, self.in_channels)).permute(0, 3, 1, 2)
        return matrix.T.unflatten(1, (self.in_channels, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        if not self.config.converts:
            return functional.conv2d(x, self.effective_weight(), self.bias, self.stride, self.padding, self.dilation)
        patches = functional.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        if self.config.row_order == "position":
            patches = patches.unflatten(1, (self.in_channels, -1)).transpose(1, 2).flatten(1, 2)
        y = self._product(patches.mT)
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[-2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        ]
        return y.mT.unflatten(-1, sizes)
