"""`universal`: one set of weights for any bands and ratios; a gate among classical estimates plus a residual.

PAN-Crafter's parts (ICCV 2025, arXiv 2505.23367) in another frame: bands are a batch with shared weights, and a trunk
at a quarter of PAN's resolution, with one CM3A block, sees PAN and a summary of the bands that ignores their order.
Everything is computed in standardised units of the scene, so that neither the scale nor the offset of PAN or of a band
matters. A fresh network gives BT-H on registered bands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import classical
from ..data.grid import Both, both, both_ratios, check_pair, default_phase
from ..data.observation import observe, resample, upsample
from ..nn.cm3a import CM3A
from ..nn.convolution import Conv3x3, LayerNorm, mlp
from ..options import check_fields

#: Planes of `Inputs.details`, BT-H first; the last one is what one step of back-projection changes in BT-H.
DETAILS = ("BT-H", "MTF-GLP-HPM-H", "MTF-GLP-FS", "GLP with local slopes", "back-projection")
#: Bands and ratios that the weights are meant for.
MAX_BANDS, RATIOS = 16, (1.9, 8.1)
#: Numbers of a band that hold for the whole scene, see `Inputs.facts`.
FACTS = 6
#: MTF of PAN at MS's Nyquist frequency where PAN is compared with MS as it stands; the toolbox's default.
PAN_GAIN = 0.15
#: Standard deviation, in MS pixels, of the windows of local slopes; pull of local slopes to the scene's.
_WINDOW, _PULL = 2.0, 0.05
#: The intensity of haze lies at least so many standard deviations below the mean.
_HAZE = 0.5
#: Least intensity above haze that detail is divided by, in standard deviations of the intensity.
_FLOOR = 0.05


@dataclasses.dataclass(frozen=True)
class Units:
    """A scene's statistics as the network uses them: everything standardised; float64, one row an image.

    Attributes:
        ms_mean, ms_std: [B, C], of the registered MS bands.
        pan_mean, pan_std: [B, 1], of PAN at MS's resolution.
        detail: [B, 1], root mean square of what PAN holds beyond MS's resolution, over pan_std.
        weights: [B, C], regression of PAN on registered bands.
        spread: [B, 1], standard deviation of the regression's value: its correlation with PAN.
        haze: [B, C], smallest value of each band. haze_pan: [B, 1], the regression's value there.
        slope, correlation: [B, C], of each band on PAN as that band's sensor sees it.
        blurred: [B, C], standard deviation of PAN as that band's sensor sees it.
    """

    ms_mean: Tensor
    ms_std: Tensor
    pan_mean: Tensor
    pan_std: Tensor
    detail: Tensor
    weights: Tensor
    spread: Tensor
    haze: Tensor
    haze_pan: Tensor
    slope: Tensor
    correlation: Tensor
    blurred: Tensor

    @classmethod
    def of(cls, statistics: classical.Statistics) -> Units:
        """Of statistics that hold PAN as each band sees it, such as those of method mtf-glp-fs.

        Raises:
            ValueError: they do not.
        """
        c, low, high = statistics.bands, statistics.low, statistics.high
        if high.mean.shape[1] != 2 * c + 1:
            raise ValueError(f"statistics: expected PAN as each of {c} bands sees it among them, got none")

        def deviations(moments: classical.Moments) -> Tensor:
            variance = moments.covariance.diagonal(dim1=1, dim2=2)
            return torch.where(variance > 1e-20 * moments.mean**2, variance.clamp_min(0), 0).sqrt()

        mean, std = low.mean, deviations(low)
        ms_std, pan_std = std[:, :c], std[:, c:]
        weights = statistics.intensity[0][..., 0, 0] * ms_std / _filled(pan_std)
        correlations = low.covariance[:, :c, :c] / (_filled(ms_std)[:, :, None] * _filled(ms_std)[:, None])
        spread = (weights * (correlations @ weights[..., None])[..., 0]).sum(1, keepdim=True).clamp_min(0).sqrt()
        haze = (statistics.haze.double() - mean[:, :c]) / _filled(ms_std)
        fine, shared = deviations(high), high.covariance[:, :c, c + 1 :].diagonal(dim1=1, dim2=2)
        blurred = fine[:, c + 1 :] / _filled(pan_std)
        slope = shared / _filled(ms_std) / _filled(pan_std) / _filled(blurred**2)
        return cls(
            ms_mean=mean[:, :c],
            ms_std=ms_std,
            pan_mean=mean[:, c:],
            pan_std=pan_std,
            detail=((fine[:, c : c + 1] / _filled(pan_std)) ** 2 - 1).clamp_min(1e-4).sqrt(),
            weights=weights,
            spread=spread,
            haze=haze,
            # Weights may be negative: then the bands' smallest values together can lie above real intensities.
            haze_pan=torch.minimum((weights * haze).sum(1, keepdim=True), -_HAZE * spread),
            slope=slope,
            correlation=(slope * blurred).clamp(-1, 1),
            blurred=blurred,
        )

    def to(self, device: torch.device) -> Units:
        """On that device."""
        return Units(**{field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the network sees, all in units of the scene.

    Attributes:
        details: [B, C, 5, H, W], what each of `DETAILS` adds to up-sampled MS, over the scene's detail.
        bands: [B, C, 3, H/2, W/2], the band, the local slope of the band on PAN and their local correlation.
        pan: [B, 2, H, W], PAN, and PAN less the intensity made of MS bands.
        facts: [B, C, 6], log2 of the ratio, logarithm of the assumed MTF gain, correlation of band and PAN, of
            intensity and PAN, depth of the haze (logarithm), PAN's detail (logarithm).
        up: [B, C, H, W], up-sampled registered MS, standardised.
        unit: [B, 1, 1, 1], the scene's detail in standardised units.
    """

    details: Tensor
    bands: Tensor
    pan: Tensor
    facts: Tensor
    up: Tensor
    unit: Tensor


def _filled(values: Tensor) -> Tensor:
    """Values to divide by: 1 where a scene is flat."""
    return torch.where(values > 0, values, 1)


def _per_band(values: Tensor, x: Tensor) -> Tensor:
    return values[..., None, None].to(x)


def scene_statistics(
    pan: Tensor,
    ms: Tensor,
    *,
    gains: Sequence[float],
    ratio: Both,
    phase: Both | None = None,
    d: Tensor | None = None,
) -> classical.Statistics:
    """Statistics of whole images in memory.

    Args:
        pan: [B, 1, H, W] in digital numbers of any real dtype.
        ms: [B, C, h, w].
        gains: MTF of each band at its Nyquist frequency.
        ratio, phase, d: of the grids and the bands, see `data.observation`.
    """
    pan, ms = pan.double(), ms.double()
    ratios, large, small = both_ratios(ratio), (pan.shape[2], pan.shape[3]), (ms.shape[2], ms.shape[3])
    grid: dict[str, Any] = {"ratio": ratios, "phase": default_phase(phase, ratios)}
    piece = classical.Piece(pan, upsample(ms, large, **grid, d=d), classical.low_pan(pan, gains, small, **grid))
    registered = resample(ms, small, None if d is None else d / d.new_tensor(ratios), 1)
    return classical.statistics(piece, registered, classical.low_pan(pan, [PAN_GAIN], small, **grid, back=False), ms)


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian means of [B, C, h, w]; at the border over what there is."""
    reach = math.ceil(3 * _WINDOW)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) / _WINDOW) ** 2)

    def sums(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]
        flat = F.conv2d(flat, taps.view(1, 1, -1, 1), padding=(reach, 0))
        return F.conv2d(flat, taps.view(1, 1, 1, -1), padding=(0, reach)).view(x.shape)

    return sums(x) / sums(torch.ones_like(x[:1, :1]))


def network_inputs(
    pan: Tensor,
    ms: Tensor,
    statistics: classical.Statistics,
    *,
    gains: Sequence[float],
    ratio: Both,
    phase: Both | None = None,
    d: Tensor | None = None,
) -> Inputs:
    """Classical estimates and guides of registered pairs, in float32.

    Args:
        pan: [B, 1, H, W] in digital numbers, H and W even.
        ms: [B, C, h, w].
        statistics: of the whole scenes with PAN as each band sees it; one for all images or one an image.
        gains, ratio, phase, d: as `scene_statistics`.
    """
    s, large, small = Units.of(statistics).to(pan.device), (pan.shape[2], pan.shape[3]), (ms.shape[2], ms.shape[3])
    bands = ms.shape[1]
    grid: dict[str, Any] = {"ratio": ratio, "phase": phase, "d": d}

    def standard(x: Tensor, centre: Tensor, unit: Tensor) -> Tensor:
        return ((x.double() - _per_band(centre, centre)) / _per_band(_filled(unit), unit)).float()

    z, p = standard(ms, s.ms_mean, s.ms_std), standard(pan, s.pan_mean, s.pan_std)
    up = upsample(z, large, **grid)
    seen = observe(p.expand(-1, bands, -1, -1), small, gains=gains, **grid)
    low = upsample(seen, large, **grid)
    weights, haze, spread = (_per_band(x, up) for x in (s.weights, s.haze, s.spread))

    # BT-H: haze-corrected Brovey, PAN matched to the intensity.
    intensity, haze_pan = (weights * up).sum(1, keepdim=True), _per_band(s.haze_pan, up)
    above = torch.maximum(intensity - haze_pan, _FLOOR * _filled(spread))
    bt_h = (up - haze) * (((p * spread - haze_pan) / above).clamp(0, 5) - 1)
    # The same modulation, by PAN as the band's sensor sees it.
    blurred = _per_band(_filled(s.blurred), up)
    hpm = (up - haze) * (((p / blurred - haze) / (low / blurred - haze).clamp_min(_FLOOR)).clamp(0, 5) - 1)
    fs = _per_band(s.slope, up) * (p - low)
    # Slopes of the band on PAN in Gaussian windows.
    mean_z, mean_p = _window_mean(z), _window_mean(seen)
    variance = (_window_mean(seen * seen) - mean_p**2).clamp_min(0)
    covariance = _window_mean(seen * z) - mean_p * mean_z
    whole = _PULL * _per_band(s.blurred**2, z)
    slope = (covariance + _per_band(s.slope, z) * whole) / (variance + whole).clamp_min(1e-6)
    own = (_window_mean(z * z) - mean_z**2).clamp_min(0)
    correlation = covariance / ((variance + whole) * (own + _PULL)).clamp_min(1e-12).sqrt()
    guides = upsample(torch.cat([slope, correlation], 1), large, ratio=ratio, phase=phase, d=_twice(d))
    local, correlation = guides.chunk(2, 1)
    glp = local * (p - low)
    back = upsample(z - observe(up + bt_h, small, gains=gains, **grid), large, **grid)

    unit = _per_band(s.detail, up)
    details = torch.stack([bt_h, hpm, fs, glp, back], 2) / unit[:, :, None]
    guides = torch.stack([up, local, correlation], 2)
    facts = torch.stack(
        [
            torch.full_like(s.slope, math.log2(both(ratio)[0]) - 2),
            torch.as_tensor(gains, dtype=s.slope.dtype, device=s.slope.device).log().expand_as(s.slope) + 1.2,
            s.correlation,
            s.spread.expand_as(s.slope),
            (-s.haze).clamp_min(1e-3).log(),
            s.detail.log().expand_as(s.slope),
        ],
        2,
    )
    return Inputs(
        details=details,
        bands=F.avg_pool2d(guides.flatten(1, 2), 2).unflatten(1, (bands, 3)),
        pan=torch.cat([p, p * spread - intensity], 1),
        facts=facts.float().expand(len(pan), -1, -1),
        up=up,
        unit=unit,
    )


def _twice(d: Tensor | None) -> Tensor | None:
    return None if d is None else torch.cat([d, d], -2)


@dataclasses.dataclass(frozen=True)
class UniversalConfig:
    """Everything that decides the network's shape; stored in checkpoints.

    Attributes:
        band_width: channels of a band's features, at half of PAN's resolution.
        trunk_width: channels of the trunk, at a quarter.
        depth: residual blocks before and after the trunk's CM3A block.
        band_depth: residual blocks of each band's own, before its features meet the others'.
        num_heads: of CM3A.
        attention: whether there is a CM3A block.
        bands: None: any number.
    """

    band_width: int = 32
    trunk_width: int = 64
    depth: tuple[int, int] = (1, 2)
    band_depth: int = 0
    num_heads: int = 4
    attention: bool = True
    bands: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", tuple(self.depth))  # JSON gives lists
        if self.bands is not None:
            raise ValueError(f"bands: expected None (any number), got {self.bands}")
        sizes = dict.fromkeys(("band_width", "trunk_width", "num_heads"), (1, 16384))
        check_fields(self, depth=(0, 64), band_depth=(0, 64), **sizes)
        if len(self.depth) != 2:
            raise ValueError(f"depth: expected two numbers of blocks, got {self.depth}")
        if self.trunk_width % self.num_heads:
            raise ValueError(f"trunk_width: expected a multiple of num_heads {self.num_heads}, got {self.trunk_width}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML."""
        return {**dataclasses.asdict(self), "depth": list(self.depth)}


class _Block(nn.Module):
    """Two 3x3 convolutions on [B, C, H, W], added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Conv3x3(width, width), Conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class _Attention(nn.Module):
    """CM3A between PAN's and the bands' features, and an MLP, on layer-normed features (PAN-Crafter, eq. 7 to 12)."""

    #: Channels of PAN's and of the bands' condition.
    CONDITION = 8

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        n = self.CONDITION
        self.norm, self.norm_mlp = LayerNorm(width), LayerNorm(width)
        self.attention = CM3A(
            width, num_heads, pan_channel=n, ms_channel=n, pan_ks=1, ms_ks=1, neighbours="shift", pan_detail=True
        )
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, ms: Tensor, lpan: Tensor, pan: Tensor, mode: float = 1.0) -> Tensor:
        x_pan, x_ms = self.attention(self.norm(x), ms, lpan, pan, x.new_full((len(x),), mode))
        x = x + x_pan + x_ms
        return x + mlp(self.first, self.second, self.norm_mlp(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Universal(nn.Module):
    """The network; `sharpen_registered` takes and gives images, `forward` works in units of the scene."""

    architecture: ClassVar[str] = "universal"
    config_class: ClassVar[type] = UniversalConfig
    #: Sizes of PAN that the network itself takes are multiples of this.
    multiple: ClassVar[int] = 4

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__()
        self.config = config
        b, t, n = config.band_width, config.trunk_width, _Attention.CONDITION
        self.band_facts, self.trunk_facts = nn.Linear(FACTS, b), nn.Linear(FACTS, t)
        # Details at half resolution; the band's guides; PAN, its misfit, and the bands' mean.
        self.encode = Conv3x3(4 * len(DETAILS) + 3 + 3, b)
        self.alone = nn.Sequential(*(_Block(b) for _ in range(config.band_depth)))
        self.from_bands = nn.Conv2d(2 * b, t, 2, stride=2)
        self.from_pan = Conv3x3(32, t)
        self.before = nn.Sequential(*(_Block(t) for _ in range(config.depth[0])))
        self.after = nn.Sequential(*(_Block(t) for _ in range(config.depth[1])))
        if config.attention:
            self.ms_condition, self.pan_condition = nn.Conv2d(2 * b, n, 2, stride=2), nn.Conv2d(16, n, 1)
            self.attend = _Attention(t, config.num_heads)
        self.to_bands = nn.ConvTranspose2d(t, 2 * b, 2, stride=2)
        self.decode = Conv3x3(b, b)
        #: For each of a half-resolution pixel's four PAN pixels: a gate for each detail, and the residual.
        self.head = nn.Conv2d(b, 4 * (len(DETAILS) + 1), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _encode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Features [B·C, band_width, H/2, W/2] of the bands, and PAN's planes [B, 32, H/4, W/4]."""
        details, bands, pan = (torch.asinh(x) for x in (inputs.details, inputs.bands, inputs.pan))
        count = details.shape[1]
        shared = torch.cat([F.avg_pool2d(pan, 2), bands[:, :, 0].mean(1, keepdim=True)], 1)
        x = torch.cat(
            [
                F.pixel_unshuffle(details.flatten(0, 1), 2),
                bands.flatten(0, 1),
                shared[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1),
            ],
            1,
        ).contiguous(memory_format=torch.channels_last)
        x = F.silu(self.encode(x) + self.band_facts(inputs.facts).flatten(0, 1)[:, :, None, None])
        return self.alone(x), F.pixel_unshuffle(pan, 4)

    def _trunk(self, x: Tensor, quarter_pan: Tensor, facts: Tensor, pan_mode: bool = False) -> Tensor:
        """Features [B, trunk_width, H/4, W/4] of PAN and of the bands together."""
        grouped = x.unflatten(0, facts.shape[:2])
        summary = torch.cat([grouped.mean(1), grouped.amax(1)], 1)
        low_pan = F.avg_pool2d(quarter_pan[:, :16].mean(1, keepdim=True), 3, 1, 1, count_include_pad=False)
        low_pan = low_pan.expand(-1, 16, -1, -1)
        if pan_mode:
            quarter_pan = torch.cat([low_pan, torch.zeros_like(low_pan)], 1)
        trunk = self.from_bands(summary) + self.from_pan(quarter_pan)
        trunk = trunk + self.trunk_facts(facts.mean(1))[:, :, None, None]
        trunk = self.before(trunk)
        if self.config.attention:
            conditions = self.pan_condition(low_pan), self.pan_condition(quarter_pan[:, :16])
            trunk = self.attend(trunk, self.ms_condition(summary), *conditions, mode=float(not pan_mode))
        return F.silu(self.after(trunk))

    def forward(self, inputs: Inputs) -> Tensor:
        """Detail [B, C, H, W] to be added to up-sampled MS, in units of the scene's detail."""
        batch, count = inputs.details.shape[:2]
        x, quarter_pan = self._encode(inputs)
        trunk = self._trunk(x, quarter_pan, inputs.facts)
        scale, shift = self.to_bands(trunk)[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1).chunk(2, 1)
        x = torch.addcmul(x + shift, x, scale)
        x = F.silu(x + self.decode(F.silu(x)))
        out = F.pixel_shuffle(self.head(x), 2).unflatten(0, (batch, count))
        gates, residual = out[:, :, :-1], out[:, :, -1]
        return inputs.details[:, :, 0] + (gates * inputs.details).sum(2) + residual

    def pan_features(self, inputs: Inputs) -> Tensor:
        """PAN mode, in training only: the trunk's features where PAN's detail is kept from it.

        The bands' details hold PAN's, so they are left out too: what the trunk learns of PAN comes from MS.
        """
        blank = dataclasses.replace(inputs, details=torch.zeros_like(inputs.details), pan=torch.zeros_like(inputs.pan))
        x, _ = self._encode(blank)
        low = F.interpolate(F.avg_pool2d(inputs.pan, 8), scale_factor=8, mode="bilinear")
        return self._trunk(x, F.pixel_unshuffle(low, 4), inputs.facts, pan_mode=True)

    @staticmethod
    def check(bands: int, ratio: Both) -> None:
        """Raise ValueError unless so many bands and this ratio are of the kind that the network learns from."""
        if bands > MAX_BANDS:
            raise ValueError(f"MS: expected up to {MAX_BANDS} bands, as the weights take, got {bands}")
        if not all(RATIOS[0] <= value <= RATIOS[1] for value in both(ratio)):
            raise ValueError(
                f"ratio: expected MS pixels {RATIOS[0]:g} to {RATIOS[1]:g} times the size of PAN's, as the weights "
                f"take, got {both(ratio)[0]:.4g} x {both(ratio)[1]:.4g} (method bt-h takes any ratio)"
            )

    @property
    def reach(self) -> int:
        """PAN pixels around a result that decide it, at ratio 4, but for the far tails of interpolation."""
        blocks = 4 * (1 + 2 * sum(self.config.depth) + (2 if self.config.attention else 0)) + 4 * self.config.band_depth
        return 4 * (-(-(blocks + 8 + 4 * 8) // 4))

    @torch.no_grad()
    def sharpen_registered(
        self,
        pan: Tensor,
        ms: Tensor,
        *,
        ratio: Both,
        phase: Both | None = None,
        d: Tensor | None = None,
        gains: Sequence[float],
        statistics: classical.Statistics | None = None,
    ) -> Tensor:
        """Sharpen images in digital numbers, whatever their scale.

        Args:
            pan: [B, 1, H, W], any real dtype; on the model's device.
            ms: [B, C, h, w].
            ratio, phase, d: of the grids and the bands, see `data.observation`.
            gains: assumed MTF of each band at its Nyquist frequency.
            statistics: of the whole scenes that these are parts of, with PAN as each band sees it (as for method
                mtf-glp-fs); None: of these images.

        Returns:
            [B, C, H, W] float32 in PAN's frame, unrounded and unclipped.

        Raises:
            ValueError: shapes, ratio or gains that do not fit, or statistics of another kind.
        """
        check_pair(pan, ms, ratio=None)
        grid: dict[str, Any] = {"gains": gains, "ratio": ratio, "phase": phase, "d": d}
        if statistics is None:
            statistics = scene_statistics(pan, ms, **grid)
        h, w = pan.shape[2:]
        padded = F.pad(pan.double(), (0, -w % self.multiple, 0, -h % self.multiple), mode="replicate")
        inputs = network_inputs(padded, ms, statistics, **grid)
        units, z = Units.of(statistics), (inputs.up + self(inputs) * inputs.unit)[:, :, :h, :w].double()
        return (z * _per_band(units.ms_std, z) + _per_band(units.ms_mean, z)).float()
