"""The measures of this package in one table: what evaluation, reports, demonstration and command line know of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Sensor
from ..data.grid import Both, both
from ..data.observation import upsample
from . import detail, full, reduced
from ._common import BLOCK, displacement, prepare


@dataclass(frozen=True)
class Result:
    """A fused image and what it is measured against, [1, C, H, W] in digital numbers.

    Attributes:
        fused: at reduced resolution where `gt` lies; at full resolution in PAN's frame.
        pan: [1, 1, H, W].
        ms: [1, C, h, w].
        sensor: for the MTF.
        peak: largest digital number.
        ratio: PAN pixels per MS pixel.
        phase: PAN index of the first MS pixel's centre.
        gt: ground truth, at reduced resolution.
        cut: border left out at reduced resolution, as the toolbox counts it.
        d: displacement of the bands against PAN, [C, 2] or [1, C, 2]; None is none.
        reference: registered GSA without back-projection in PAN's frame, for mottle and halo.
    """

    fused: torch.Tensor
    pan: torch.Tensor
    ms: torch.Tensor
    sensor: Sensor
    peak: float
    ratio: Both
    phase: Both
    gt: torch.Tensor | None = None
    cut: int = 0
    d: Any = None
    reference: torch.Tensor | None = None

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused image and ground truth."""
        if self.gt is None:
            raise ValueError("gt: expected a ground truth for a measure at reduced resolution, got none")
        return self.fused, self.gt

    @property
    def scale(self) -> float:
        """One number for the ratio."""
        rows, columns = both(self.ratio)
        return math.sqrt(rows * columns)

    @functools.cached_property
    def border(self) -> int:
        """Pixels at the border in which displaced bands or filters have seen no data."""
        moved = displacement(self.d)
        return math.ceil(self.scale + (0 if moved is None else float(moved.abs().max())))

    @functools.cached_property
    def registered_ms(self) -> torch.Tensor:
        """MS upsampled into PAN's frame."""
        size = (self.fused.shape[2], self.fused.shape[3])
        return upsample(self.ms.double(), size, ratio=self.ratio, phase=self.phase, d=displacement(self.d))

    @functools.cached_property
    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fused image, MS and PAN cut to whole blocks, for measures that take nothing else."""
        rows, columns = (int(ratio) for ratio in both(self.ratio))
        height, width = (length // BLOCK * BLOCK for length in self.fused.shape[2:])
        ms = self.ms[..., : height // rows, : width // columns]
        return self.fused[..., :height, :width], ms, self.pan[..., :height, :width]

    def _textbook_alone(self) -> bool:
        """Whether the textbook's measures are defined: they want one ratio, a power of two."""
        rows, columns = both(self.ratio)
        return rows == columns and rows in (2, 4, 8, 16)

    @functools.cached_property
    def d_lambda_k(self) -> torch.Tensor:
        fused, ms, _ = self._blocks
        return full.d_lambda_k(fused, ms, self.sensor, self.ratio) if self._textbook_alone() else _undefined(fused)

    @functools.cached_property
    def d_lambda_k_registered(self) -> torch.Tensor:
        known: dict[str, Any] = {"phase": self.phase, "d": self.d, "cut": self.border}
        return full.d_lambda_k(self.fused, self.ms, self.sensor, self.ratio, **known)

    @functools.cached_property
    def d_s(self) -> torch.Tensor:
        fused, ms, pan = self._blocks
        return full.d_s(fused, ms, pan, self.ratio) if self._textbook_alone() else _undefined(fused)

    @functools.cached_property
    def d_s_registered(self) -> torch.Tensor:
        fused, ms, pan = self._blocks
        return full.d_s(fused, ms, pan, self.ratio, phase=self.phase, d=self.d)

    @functools.cached_property
    def d_lambda(self) -> torch.Tensor:
        fused, ms, _ = self._blocks
        return full.d_lambda(fused, ms, int(self.scale)) if self._textbook_alone() else _undefined(fused)

    def flaw(self, measure: Callable[..., torch.Tensor]) -> torch.Tensor:
        """`detail.mottle` or `detail.halo`."""
        if self.reference is None:
            raise ValueError("reference: expected registered GSA for mottle and halo, got none")
        return measure(self.fused, self.reference, self.registered_ms, self.pan, self.scale, self.border)


def _undefined(image: torch.Tensor) -> torch.Tensor:
    return image.new_full((len(image),), torch.nan, dtype=torch.float64)


def _sharpness(result: Result) -> torch.Tensor:
    strengths = [reduced.gradient(x)[..., 1:-1, 1:-1].mean((1, 2, 3)) for x in prepare(*result.pair, result.cut)]
    return strengths[0] / strengths[1]


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        name: as tables head it.
        unit: "" where it has none.
        larger: whether larger is better; None where 1 is the ideal.
        digits: decimals worth printing.
        function: its value [B] for a `Result`.
        meaning: a line for readers.
    """

    name: str
    unit: str
    larger: bool | None
    digits: int
    function: Callable[[Result], torch.Tensor]
    meaning: str

    @property
    def heading(self) -> str:
        """Name, unit and direction."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.larger]
        return self.name + (f" [{self.unit}]" if self.unit else "") + arrow

    def text(self, value: float) -> str:
        """`value` with the decimals worth printing."""
        return f"{value:.{self.digits}f}"


#: Name -> measure, in the order of the tables.
MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        # Against ground truth.
        Measure("PSNR", "dB", True, 3, lambda r: reduced.psnr(*r.pair, r.peak, r.cut), "one error over all bands"),
        Measure("SSIM", "", True, 4, lambda r: reduced.ssim(*r.pair, r.peak, r.cut), "Gaussian window, sigma 1.5"),
        Measure("SAM", "°", False, 3, lambda r: reduced.sam(*r.pair, r.cut), "spectral angle"),
        Measure(
            "ERGAS", "", False, 3, lambda r: reduced.ergas(*r.pair, r.scale, r.cut), "relative error over the bands"
        ),
        Measure("SCC", "", True, 4, lambda r: reduced.scc(*r.pair, r.cut), "correlation of Sobel gradients"),
        Measure("Q", "", True, 4, lambda r: reduced.q(*r.pair, r.cut), "universal quality index, sliding windows"),
        Measure("Q2n", "", True, 4, lambda r: reduced.q2n(*r.pair, r.cut), "hypercomplex quality index, blocks"),
        Measure("sharpness", "", None, 4, _sharpness, "mean gradient over the ground truth's"),
        # Without.
        Measure(
            "Laplacian correlation",
            "",
            True,
            4,
            lambda r: detail.laplacian_correlation(r.fused, r.pan, r.border),
            "of each band's Laplacian with PAN's",
        ),
        Measure(
            "Laplacian energy",
            "",
            None,
            3,
            lambda r: detail.laplacian_energy(r.fused, r.pan, r.border),
            "deviation of a band's Laplacian over the band's, beside PAN's",
        ),
        Measure(
            "D_lambda_K registered",
            "",
            False,
            4,
            lambda r: r.d_lambda_k_registered,
            "D_lambda_K in MS's frame, at MS's phase",
        ),
        Measure("D_s registered", "", False, 4, lambda r: r.d_s_registered, "D_s against MS brought into PAN's frame"),
        Measure(
            "HQNR registered",
            "",
            True,
            4,
            lambda r: (1 - r.d_lambda_k_registered) * (1 - r.d_s_registered),
            "(1 - D_lambda_K)(1 - D_s) of these two",
        ),
        Measure(
            "consistency",
            "",
            False,
            4,
            lambda r: full.consistency(
                r.fused,
                r.ms,
                r.sensor,
                r.ratio,
                phase=r.phase,
                d=r.d,
                cut=math.ceil(r.border / r.scale),
            ),
            "what is left of MS, over its deviation",
        ),
        Measure("mottle", "", False, 3, lambda r: r.flaw(detail.mottle), "colour mottle over registered GSA's"),
        Measure("halo", "", False, 3, lambda r: r.flaw(detail.halo), "coloured halos over registered GSA's"),
        Measure("D_lambda_K", "", False, 4, lambda r: r.d_lambda_k, "spectral distortion of Khan, textbook"),
        Measure("D_s", "", False, 4, lambda r: r.d_s, "spatial distortion, textbook"),
        Measure("HQNR", "", True, 4, lambda r: (1 - r.d_lambda_k) * (1 - r.d_s), "(1 - D_lambda_K)(1 - D_s), textbook"),
        Measure("D_lambda", "", False, 4, lambda r: r.d_lambda, "spectral distortion of the original QNR"),
        Measure("QNR", "", True, 4, lambda r: (1 - r.d_lambda) * (1 - r.d_s), "(1 - D_lambda)(1 - D_s)"),
    )
}

#: What each protocol measures.
REDUCED = ("PSNR", "SSIM", "SAM", "ERGAS", "SCC", "Q", "Q2n")
SHIFTED = ("PSNR", "SAM", "ERGAS", "SCC", "Q2n", "sharpness")
FULL = (
    "Laplacian correlation",
    "Laplacian energy",
    "D_lambda_K registered",
    "D_s registered",
    "HQNR registered",
    "consistency",
    "mottle",
    "halo",
    "D_lambda_K",
    "D_s",
    "HQNR",
    "D_lambda",
    "QNR",
)
