"""The numbers of an analog crossbar: devices, wires, terminals, converters, and the layout of a layer on tiles."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

SCHEMES = ("differential", "offset")
ROW_ORDERS = ("channel", "position")
PADDINGS = ("g_min", "absent")
CALIBRATIONS = ("none", "layer_gain", "column_gain", "bn_reestimate")
GRADIENTS = ("straight_through", "solver")


@dataclass(frozen=True)
class CrossbarConfig:
    """A crossbar chip for `surgery.to_crossbars`. The defaults follow 2008.11298 (docs/crossbar.md, "Sources").

    Source marks: [G] given in a later paper of the same group (Bhattacharjee et al., GLSVLSI 2023); [R] remembered of
    2008.11298, not verified, so these are *our* constants; [O] our choice.

    Devices and wires:
        rows, columns: cells of a tile (M, N). [R] 64; the paper uses 16, 32, 64.
        r_min, r_max: device resistance, ohm, of the largest and of a zero weight (R_ON, R_OFF). [R] 20e3, 200e3;
            ratio [G].
        r_driver, r_sense: ohm, before the first cell of a row, behind the last of a column. [G] 1e3.
        r_wire_row, r_wire_col: ohm a cell pitch. 5 and 10: the pair is [G], which is which [R].
        first_segment, last_segment: a wire segment also lies between driver and first cell, last cell and sense.
            [O] no.
    Cells, in the order in which they act:
        levels: conductance levels, evenly spaced from G_min to G_max; None: continuous. [O]
        variation: sigma/mu of the Gaussian device variation G (1 + variation n), >= 0. [R] 0.10 in the paper;
            default 0.
        stuck_on, stuck_off: probability that a cell sits at G_max, at G_min, whatever was programmed. [O] 0.
    Layout:
        scheme: "differential" (two arrays, G_min + (G_max - G_min) max(+-W, 0)/w_max) or "offset" (one array around the
            middle conductance, minus one dummy column a tile, which takes its place beside the N columns). [O]
        interleave: positive and negative columns alternate in one tile (half the outputs a tile); differential only.
            [O]
        padding: cells that fill the last tile: "g_min" (they exist, their rows stay at 0 V) or "absent" (G = 0). [O]
        row_order: rows of a convolution: "channel" (channel, then kernel position; torch's order) or "position". [O]
        weight_bits, slice_bits: with both, |W| is quantised to weight_bits and cut into slices of slice_bits, one array
            each, added digitally; slice_bits divides weight_bits. None: one analog cell a weight. [O]
    Converters (see `ops.crossbar_matmul`):
        dac_bits, adc_bits: None: ideal. adc_range: full scale of a partial sum in units of input times weight; None:
            calibrated from data (`surgery.calibrate_converters`). read: "pair" or "apart".
        read_noise: standard deviation of a read in siemens (current noise over read voltage).
    Around it:
        calibration: how the gain that the terminals cost is given back: "none"; "layer_gain", one factor a layer (the
            least-squares gain of the effective on the wanted weights); "column_gain", one a column; "bn_reestimate": no
            factor, batch-norm statistics measured anew (`surgery.reestimate_batchnorm`). [O]: the paper's is unknown.
        gradient: of the software weights in training: "straight_through", or "solver" (through the wires, exactly).
    """

    rows: int = 64
    columns: int = 64
    r_min: float = 20e3
    r_max: float = 200e3
    r_driver: float = 1e3
    r_wire_row: float = 5.0
    r_wire_col: float = 10.0
    r_sense: float = 1e3
    first_segment: bool = False
    last_segment: bool = False
    levels: int | None = None
    variation: float = 0.0
    stuck_on: float = 0.0
    stuck_off: float = 0.0
    scheme: str = "differential"
    interleave: bool = False
    padding: str = "g_min"
    row_order: str = "channel"
    weight_bits: int | None = None
    slice_bits: int | None = None
    dac_bits: int | None = None
    adc_bits: int | None = None
    adc_range: float | None = None
    read: str = "pair"
    read_noise: float = 0.0
    calibration: str = "layer_gain"
    gradient: str = "straight_through"

    def __post_init__(self):
        for name, known in (
            ("scheme", SCHEMES), ("row_order", ROW_ORDERS), ("padding", PADDINGS), ("calibration", CALIBRATIONS),
            ("gradient", GRADIENTS), ("read", ("pair", "apart")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"CrossbarConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("rows", "columns"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("r_driver", "r_wire_row", "r_wire_col", "r_sense", "variation", "read_noise"):
            value = getattr(self, name)
            _require(self, name, math.isfinite(value) and value >= 0, "finite and at least 0")
        _require(self, "r_min", 0 < self.r_min < self.r_max, f"above 0 and below r_max = {self.r_max:g}")
        _require(self, "r_max", math.isfinite(self.r_max), "finite")
        for name in ("stuck_on", "stuck_off"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "a probability")
        _require(self, "stuck_off", self.stuck_on + self.stuck_off <= 1, "at most 1 - stuck_on")
        _require(self, "levels", self.levels is None or self.levels >= 2, "None or at least 2")
        if self.interleave and (self.scheme != "differential" or self.columns % 2):
            raise ValueError("CrossbarConfig: interleave needs scheme='differential' and an even number of columns")
        if self.scheme == "offset" and self.read == "apart":
            raise ValueError("CrossbarConfig: scheme='offset' has one array; read='apart' needs scheme='differential'")
        if (self.weight_bits is None) != (self.slice_bits is None):
            raise ValueError("CrossbarConfig: weight_bits and slice_bits go together")
        if self.slice_bits is not None:
            good = 1 <= self.slice_bits <= self.weight_bits <= 16 and self.weight_bits % self.slice_bits == 0
            _require(self, "slice_bits", good, f"a divisor of weight_bits = {self.weight_bits}, at most 16")
            if self.scheme != "differential" or self.gradient == "solver":
                raise ValueError("CrossbarConfig: slices need scheme='differential' and gradient='straight_through'")

    @property
    def g_min(self) -> float:
        """Siemens: 1 / r_max, the conductance of a zero weight."""
        return 1 / self.r_max

    @property
    def g_max(self) -> float:
        """Siemens: 1 / r_min, the conductance of the largest weight."""
        return 1 / self.r_min

    @property
    def slices(self) -> int:
        return 1 if self.slice_bits is None else self.weight_bits // self.slice_bits

    @property
    def converts(self) -> bool:
        """Whether a layer needs the tiled product; without converters and noise it is an ordinary one."""
        return bool(self.dac_bits or self.adc_bits or self.read_noise)

    def resistances(self) -> dict[str, float]:
        """The arguments of `ops.crossbar_matrix`: first and last wire segment are part of the terminals."""
        return dict(
            r_driver=self.r_driver + (self.r_wire_row if self.first_segment else 0.0),
            r_wire_row=self.r_wire_row,
            r_wire_col=self.r_wire_col,
            r_sense=self.r_sense + (self.r_wire_col if self.last_segment else 0.0),
        )

    def ideal(self) -> CrossbarConfig:
        """The same layout with ideal wires, terminals, cells and converters: mapped models equal the software ones."""
        return dataclasses.replace(
            self, r_driver=0.0, r_wire_row=0.0, r_wire_col=0.0, r_sense=0.0, levels=None, variation=0.0, stuck_on=0.0,
            stuck_off=0.0, weight_bits=None, slice_bits=None, dac_bits=None, adc_bits=None, read_noise=0.0,
        )  # fmt: skip

    def label(self) -> str:
        """What a result on this chip must name: every field that is not at its default, tile and calibration always."""
        always = f"{self.rows}x{self.columns} {self.scheme} {self.calibration}"
        hidden = {"rows", "columns", "scheme", "calibration"}
        rest = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name not in hidden and getattr(self, f.name) != f.default
        ]
        return " ".join([always, *rest])


def _require(config: CrossbarConfig, name: str, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"CrossbarConfig: {name} must be {wanted}, got {getattr(config, name)}")
