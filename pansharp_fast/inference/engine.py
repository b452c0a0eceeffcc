"""Sharpening of a pair tile by tile: registration and statistics of the whole scene first, then tiles in any order."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import classical
from ..data.grid import RATIO
from ..data.observation import AUTO_STEPS, observe, resample
from ..data.registration import Registration, Source, measure
from ..options import FRAMES, expect
from .placed import Means, Placed
from .sharpener import Sharpener
from .tiles import MULTIPLE, Span, plan

#: Side of the blocks of the first pass, in PAN pixels, and how many of them are read at most, spread over the scene.
BLOCK, MAX_BLOCKS = 1024, 49
#: Side of the windows by which the noise of a residual is told, in PAN pixels, and how many there are each way.
SAMPLE, SAMPLES = 512, 3
#: Scenes of more PAN pixels give every second row and column to the statistics at PAN's resolution.
DENSE = 1 << 22
#: Largest values below this share of the peak are those of another scale, as reflectance is.
DARK = 0.05
#: Relative deviation from a network's ratio that resampling MS may make up for.
RATIO_TOLERANCE = 0.05


@dataclass
class Job:
    """A registered pair and how its result is to lie and agree with MS.

    Attributes:
        source: the pair.
        bands: numbers of the bands to sharpen, from 1, as `source.read_ms` takes them.
        registration: of these bands, a batch of one.
        gains: their MTF at MS's Nyquist frequency.
        pan_gain: that of PAN's own filter.
        frame: "pan", or "ms": each band back where its own MS band lies.
        back_projection: steps, or "auto".
        left: of each tile, [3, C]: sum of squares of MS less the result as the sensor would see it, sum of MS, number.
        largest: largest value with data seen so far.
    """

    source: Source
    bands: Sequence[int]
    registration: Registration
    gains: Sequence[float]
    pan_gain: float
    frame: str = "pan"
    back_projection: int | str = "auto"
    left: list[Tensor] = field(default_factory=list)
    largest: float = 0.0

    def place(self, window: tuple[int, int, int, int], means: Means | None = None) -> Placed:
        """PAN rows and columns of a window (top, left, height, width), and MS on them."""
        return Placed(self.source, self.registration, self.bands, self.gains, window, means)

    def left_share(self) -> float:
        """Root mean square of what is left of MS over the mean of MS, mean over bands; NaN where nothing was seen."""
        if not self.left:
            return math.nan
        squares, total, count = torch.stack(self.left).sum(0)
        return float(((squares / count).sqrt() / (total / count).abs()).mean())


def _span(row: Span, column: Span) -> tuple[int, int, int, int]:
    return row.read_start, column.read_start, row.read_stop - row.read_start, column.read_stop - column.read_start


def _finish(
    job: Job,
    placed: Placed,
    image: Tensor,
    row: Span,
    column: Span,
    steps: int | str,
    floors: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Back-projection and frame; the part that is written, [C, H, W] and its validity."""
    image = placed.back_project(image, steps, floors)
    usable, left = placed.usable, placed.ms - placed.observe(image)
    for axis, written in ((2, row.written), (3, column.written)):
        place = placed.phase[axis - 2] + placed.ratio[axis - 2] * torch.arange(left.shape[axis])
        inside = (place >= written.start) & (place < written.stop)
        usable = usable & (inside[:, None] if axis == 2 else inside)
    squares = torch.where(usable, left, 0).double().square().sum((0, 2, 3))
    total = torch.where(usable, placed.ms, 0).double().sum((0, 2, 3))
    job.left.append(torch.stack([squares, total, usable.sum((0, 2, 3)).double()]))
    job.largest = max(job.largest, placed.largest)
    if job.frame == "ms":
        image, valid = placed.to_ms_frame(image), placed.valid_in_ms_frame()
    else:
        valid = placed.valid
    return image[0, :, row.written, column.written], valid[row.written, column.written]


class ClassicalEngine:
    """A classical method over a pair.

    Args:
        job: the pair.
        method: "auto" or a name of `classical.METHODS`.
        band_weights: of brovey.

    Attributes:
        name: of the method.
        bands, channels: number of bands of the result.

    Raises:
        ValueError: no such method, weights that do not fit, or no pixel that holds data in PAN and in all bands.
    """

    #: Tile and overlap unless asked otherwise, in PAN pixels at ratio 4.
    tile_size, overlap = 1024, 64
    uncertainty_kind = ""

    def __init__(self, job: Job, method: str = "auto", band_weights: Sequence[float] | None = None) -> None:
        self.job, self.method = job, classical.check_method(method)
        self.band_weights = None if band_weights is None else list(band_weights)
        if self.band_weights is not None and (self.method != "brovey" or len(self.band_weights) != len(job.bands)):
            raise ValueError(
                f"band_weights: expected {len(job.bands)} numbers for method brovey, got {self.band_weights} "
                f"for {self.method}"
            )
        self.name = self.method
        self.bands = self.channels = len(job.bands)
        self.statistics, self.means = first_pass(job, self.method)
        self.floors = self._noise_floors() if job.back_projection == "auto" else None

    def _fuse(self, placed: Placed) -> Tensor:
        return classical.apply(self.method, piece_of(placed, self.method), self.statistics, self.band_weights)

    def _noise_floors(self) -> list[Tensor]:
        """Noise floor of the residual at each step of back-projection: median over windows spread over the scene."""
        source, found = self.job.source, []
        starts = [
            sorted({round(k * max(length - SAMPLE, 0) / (SAMPLES - 1)) for k in range(SAMPLES)})
            for length in (source.height, source.width)
        ]
        for top, left in itertools.product(*starts):
            window = (top, left, min(SAMPLE, source.height - top), min(SAMPLE, source.width - left))
            placed = self.job.place(window, self.means)
            if float(placed.valid.float().mean()) > 0.25:
                floors: list[Tensor] = []
                placed.back_project(self._fuse(placed), "auto", floors)
                found.append(torch.stack(floors))
        if not found:  # nothing to tell noise by: no back-projection
            return [torch.full((1, self.bands, 1, 1), torch.inf)] * AUTO_STEPS
        return list(torch.stack(found).median(0).values)

    def finish(self) -> None:
        """Nothing is left to say after the last tile."""

    def tile(self, row: Span, column: Span) -> tuple[Tensor | None, Tensor]:
        """Result [C, H, W] of what a tile writes and where it holds data [H, W]; None where it does nowhere."""
        job, placed = self.job, self.job.place(_span(row, column), self.means)
        if not bool(placed.valid[row.written, column.written].any()) and job.frame == "pan":
            return None, torch.zeros(row.stop - row.start, column.stop - column.start, dtype=torch.bool)
        return _finish(job, placed, self._fuse(placed), row, column, job.back_projection, self.floors)


def piece_of(placed: Placed, method: str) -> classical.Piece:
    """What a classical method looks at."""
    up = placed.up(gdal=method == "brovey")
    low = placed.low_pan() if method in classical.NEED_LOW else None
    return classical.Piece(placed.pan, up, low)


def _blocks(height: int, width: int) -> Iterator[tuple[int, int]]:
    """First rows and columns of the blocks of the first pass."""
    counts = [math.ceil(length / BLOCK) for length in (height, width)]
    used = list(counts)
    while used[0] * used[1] > MAX_BLOCKS:
        used[int(used[1] > used[0])] -= 1
    axes = [
        [round(k * (count - 1) / max(take - 1, 1)) * BLOCK for k in range(take)]
        for count, take in zip(counts, used, strict=True)
    ]
    yield from ((top, left) for top in axes[0] for left in axes[1])


def first_pass(job: Job, method: str) -> tuple[classical.Statistics, Means]:
    """Statistics of the scene over pixels that hold data, block by block in a fixed order, and its means.

    Raises:
        ValueError: no MS pixel, with what the sensor sees round it, holds data in PAN and in all bands.
    """
    source, found, seen = job.source, [], False
    sums = torch.zeros(1 + len(job.bands), 2, dtype=torch.float64)
    margin = [math.ceil(8 * ratio) for ratio in source.ratio]
    every = 1 if source.height * source.width <= DENSE else 2
    for top, left in _blocks(source.height, source.width):
        # A margin around the block, but nothing beyond PAN's border, which repeats there.
        start, stop, inside = [], [], []
        for axis, (begin, length) in enumerate(((top, source.height), (left, source.width))):
            end = min(begin + BLOCK, length)
            start.append(max(0, begin - margin[axis]))
            stop.append(min(length, end + margin[axis]))
            inside.append((begin - start[axis], end - start[axis]))
        placed = job.place((start[0], start[1], stop[0] - start[0], stop[1] - start[1]))
        inner = (slice(*inside[0], every), slice(*inside[1], every))
        valid = placed.valid[inner]
        for number, (values, mask) in enumerate(
            [(placed.pan[0, 0], placed.pan_valid), *zip(placed.ms[0], placed.ms_valid, strict=True)]
        ):
            sums[number] += torch.stack([torch.where(mask, values, 0).double().sum(), mask.sum().double()])
        if not bool(valid.any()):
            continue
        seen = True
        piece = piece_of(placed, method)
        part = classical.Piece(
            piece.pan[..., inner[0], inner[1]],
            piece.up[..., inner[0], inner[1]],
            None if piece.low is None else piece.low[..., inner[0], inner[1]],
        )
        # MS pixels whose centres lie in the block.
        first, size = [], []
        for axis, (begin, end) in enumerate(inside):
            low = math.ceil((begin - placed.phase[axis]) / placed.ratio[axis])
            first.append(low)
            size.append(math.ceil((end - placed.phase[axis]) / placed.ratio[axis]) - low)
        phase = tuple(placed.phase[axis] + placed.ratio[axis] * first[axis] for axis in (0, 1))
        count = (max(size[0], 0), max(size[1], 0))
        places = torch.tensor(first) + placed.d / torch.tensor(placed.ratio)
        registered = resample(placed.ms, count, places, 1)
        pan_low = observe(placed.pan, count, gains=[job.pan_gain], ratio=placed.ratio, phase=phase)
        cover = placed.pan_valid.float()[None, None]
        usable = observe(cover, count, gains=[job.pan_gain], ratio=placed.ratio, phase=phase) > 0.99
        for band, (y, x) in enumerate(places.tolist()):
            for corner in itertools.product((math.floor(y), math.ceil(y)), (math.floor(x), math.ceil(x))):
                usable = usable & _shifted(placed.ms_valid[band], corner, count)
        own = placed.ms_valid[None, :, first[0] : first[0] + count[0], first[1] : first[1] + count[1]]
        original = placed.ms[..., first[0] : first[0] + count[0], first[1] : first[1] + count[1]]
        if not bool(own.flatten(2).any(2).all()) or not bool(usable.any()):
            continue
        found.append(classical.statistics(part, registered, pan_low, original, (usable, valid[None, None], own)))
    if not found:
        what = "an MS pixel whose surroundings hold data in both" if seen else "a pixel that holds data in both"
        raise ValueError(f"PAN and MS: expected {what}, got none")
    total = functools.reduce(operator.add, found)
    means = (sums[:, 0] / sums[:, 1].clamp_min(1)).float()
    return total, Means(means[:1], means[1:])


def _shifted(valid: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    rows = torch.arange(corner[0], corner[0] + size[0]).clamp(0, valid.shape[0] - 1)
    columns = torch.arange(corner[1], corner[1] + size[1]).clamp(0, valid.shape[1] - 1)
    return valid[rows][:, columns]


class NetworkEngine:
    """A network over a pair: it gets the registered bands on a grid of its own ratio and phase.

    Args:
        job: the pair. "auto" back-projection is none: a network's result is taken as it is.
        sharpener: the network.

    Raises:
        ValueError: the ratio or the number of bands is not the network's.
    """

    tile_size, overlap = 512, 64

    def __init__(self, job: Job, sharpener: Sharpener) -> None:
        self.job, self.sharpener = job, sharpener
        self.name = str(getattr(sharpener.model, "architecture", type(sharpener.model).__name__))
        self.bands, self.channels = sharpener.bands, sharpener.channels
        self.uncertainty_kind = sharpener.uncertainty_kind
        if len(job.bands) != self.bands:
            notes = "".join(f"; {note}" for note in getattr(job.source, "notes", ()))
            raise ValueError(
                f"MS: expected {self.bands} bands, as the weights have, got {len(job.bands)} (choose some with bands)"
                f"{notes}"
            )
        if any(abs(ratio / RATIO - 1) > RATIO_TOLERANCE for ratio in job.source.ratio):
            rows, columns = job.source.ratio
            raise ValueError(
                f"ratio: expected MS pixels {RATIO} times the size of PAN's, as the weights want, got {rows:.4g} x "
                f"{columns:.4g} (method bt-h takes any ratio)"
            )
        self.phase = float(getattr(sharpener.model, "phase", RATIO / 2))

    def finish(self) -> None:
        """After the last tile: warn where the values that were seen do not suit the peak."""
        largest, peak = self.job.largest, self.sharpener.peak
        if largest > peak:
            text = f"at least the largest value {largest:g}, got {peak:g}"
        elif 0 < largest < DARK * peak:
            text = f"the sensor's largest value, got {peak:g}, {peak / largest:.0f} times the largest of the images"
        else:
            return
        warnings.warn(f"peak: expected {text}; networks want the sensor's own", stacklevel=3)

    def tile(self, row: Span, column: Span) -> tuple[Tensor | None, Tensor]:
        """As `ClassicalEngine.tile`; channels beyond the bands are the uncertainty."""
        job = self.job
        top, left, height, width = _span(row, column)
        placed = job.place((top, left, -(-height // RATIO) * RATIO, -(-width // RATIO) * RATIO))
        if not bool(placed.valid[row.written, column.written].any()) and job.frame == "pan":
            return None, torch.zeros(row.stop - row.start, column.stop - column.start, dtype=torch.bool)
        ms = placed.up(every=RATIO, first=self.phase)
        result = self.sharpener(placed.pan, ms, (top, left)).cpu()
        steps = 0 if job.back_projection == "auto" else job.back_projection
        image, valid = _finish(job, placed, result[:, : self.bands], row, column, steps)
        if self.channels > self.bands:
            more = result[:, self.bands :]
            more = placed.to_ms_frame(more) if job.frame == "ms" else more
            image = torch.cat([image, more[0, :, row.written, column.written]])
        return image, valid


class RegisteredEngine:
    """A network that takes any bands, ratio and phase with the scene's statistics (`sharpen_registered`) over a pair.

    Args:
        job: the pair. "auto" back-projection is none: a network's result is taken as it is.
        sharpener: the network.

    Raises:
        ValueError: more bands or another ratio than the network takes.
    """

    tile_size = 512

    def __init__(self, job: Job, sharpener: Sharpener) -> None:
        model = sharpener.model
        self.job, self.sharpener, self.name, self.uncertainty_kind = job, sharpener, str(model.architecture), ""
        self.bands = self.channels = len(job.bands)
        self.overlap = math.ceil(model.reach / 16) * 16
        model.check(self.bands, job.source.ratio)
        self.statistics, self.means = first_pass(job, "mtf-glp-fs")

    def finish(self) -> None:
        """Nothing is left to say after the last tile: these networks know no peak."""

    def tile(self, row: Span, column: Span) -> tuple[Tensor | None, Tensor]:
        """As `ClassicalEngine.tile`."""
        job, placed = self.job, self.job.place(_span(row, column), self.means)
        if not bool(placed.valid[row.written, column.written].any()) and job.frame == "pan":
            return None, torch.zeros(row.stop - row.start, column.stop - column.start, dtype=torch.bool)
        grid: dict[str, Any] = {"ratio": placed.ratio, "phase": placed.phase, "d": placed.d}
        ms = placed.ms
        if placed.bend is not None:  # straightened first, on a grid of MS's own spacing
            ms, grid = placed.up(every=placed.ratio[0]), {"ratio": placed.ratio[0], "phase": 0.0}
        image = self.sharpener.registered(placed.pan, ms, **grid, gains=placed.gains, statistics=self.statistics)
        steps = 0 if job.back_projection == "auto" else job.back_projection
        return _finish(job, placed, image.cpu(), row, column, steps)


Engine = ClassicalEngine | NetworkEngine | RegisteredEngine


def options(engine: Any, tile: int | None, overlap: int | None) -> tuple[int, int]:
    """Tile and overlap: those asked for, else the engine's own, the overlap wide enough for large MS pixels."""
    if tile is None:
        tile = engine.tile_size
    if overlap is None:
        reach = engine.overlap * max(1.0, max(engine.job.source.ratio) / RATIO)
        overlap = min(math.ceil(reach / 16) * 16, max(0, (tile // 2 - 1) // 16 * 16))
    return tile, overlap


def spans(engine: Any, tile: int, overlap: int) -> tuple[list[Span], list[Span]]:
    """Tiles along rows and columns; in MS's frame they read further by what the bands are moved."""
    job, far = engine.job, torch.zeros(2)
    if job.frame == "ms":
        far = job.registration.d.abs().amax((0, 1))
        if job.registration.field is not None:
            far = far + job.registration.field.abs().amax((0, 2, 3))
    found = []
    for length, move in zip((job.source.height, job.source.width), far.tolist(), strict=True):
        more = math.ceil(move / MULTIPLE) * MULTIPLE
        found.append(
            [
                replace(span, read_start=max(0, span.read_start - more), read_stop=min(length, span.read_stop + more))
                for span in plan(length, tile, overlap)
            ]
        )
    return found[0], found[1]


def find_registration(
    register: str | Path | Registration,
    source: Source,
    image_bands: Sequence[int],
    bands: Sequence[int],
    gains: Sequence[float],
    reach: float,
) -> Registration:
    """Registration of the chosen `bands`, measured over all `image_bands` where "auto" asks for that.

    Args:
        register: "auto", "off", a registration of all bands or of the chosen ones, or a file with one.

    Raises:
        OSError: no such file.
        ValueError: it is none of these, or of another number of bands.
    """
    chosen = [list(image_bands).index(band) for band in bands]
    if isinstance(register, str) and register == "off":
        return Registration.given((0.0, 0.0), len(bands))
    if isinstance(register, str) and register == "auto":
        return measure(source, gains, bands=image_bands, reach=reach).select(chosen)
    found = register if isinstance(register, Registration) else Registration.from_json(register)
    count = found.d.shape[1]
    if count == len(bands):
        return found
    if count != len(image_bands):
        raise ValueError(f"registration: expected {len(bands)} bands, got {count}")
    return found.select(chosen)


def check_frame(frame: str) -> None:
    """Raise ValueError unless `frame` is one."""
    expect("frame", frame, FRAMES)


def check_steps(steps: int | str) -> int | str:
    """The back-projection meant by `steps`: "auto", or a number as one or as text.

    Raises:
        ValueError: it is none.
    """
    if steps == "auto":
        return "auto"
    try:
        count = int(steps)
    except (TypeError, ValueError):
        count = -1
    if count < 0 or float(steps) != count:
        raise ValueError(f"back_projection: expected auto or a number from 0, got {steps!r}")
    return count


def make_engine(
    job: Job,
    *,
    method: str | None,
    weights: Any,
    band_weights: Sequence[float] | None = None,
    architecture: str | None = None,
    **options: Any,
) -> Engine:
    """The engine that method or weights name; without either, method "auto".

    Raises:
        ValueError: both are given, or as the engines.
    """
    if weights is None and architecture is None:
        asked = [name for name in ("sampling", "uncertainty") if options.get(name)]
        if asked:
            raise ValueError(f"{' and '.join(asked)}: expected weights of uknow-student or uknow-teacher, got none")
        return ClassicalEngine(job, method or "auto", band_weights)
    if method is not None:
        raise ValueError(f"method: expected none beside weights or model, got {method!r}")
    if band_weights is not None:
        raise ValueError("band_weights: expected none beside weights or model")
    if not isinstance(weights, Sharpener):
        weights = Sharpener("tiny" if weights is None else weights, architecture=architecture, **options)
    return (RegisteredEngine if weights.takes_registered else NetworkEngine)(job, weights)
