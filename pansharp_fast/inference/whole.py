"""Sharpening of a whole scene, tile by tile, from files to a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
import torch
from torch import Tensor

from ..data.rasters import RasterPair
from ..data.registration import REACH, Registration
from ..data.sensors import Sensor, gains_of, get_sensor, sensor_in
from ..data.sources import check_local
from ..files import atomic
from ..options import DTYPES, expect
from . import engine as engines
from . import tiles
from .output import BLOCK, Output, check_outputs, choose_nodata
from .sharpener import SharpeningModel

if TYPE_CHECKING:
    from ..diffusion import Sampling

#: GDAL's cache of blocks, MiB: holds the rows of blocks that a row of tiles reads, without growing with the scene.
CACHE_MIB = 160


@dataclass(frozen=True)
class Summary:
    """What `sharpen_scene` did.

    Attributes:
        height: rows of the output.
        width: its columns.
        bands: its bands.
        dtype: its pixel type.
        nodata: the value that it declares, or None.
        valid: share of its pixels that hold data.
        resampled: whether MS was resampled to lie along PAN's rows and columns.
        largest: largest digital number among the inputs' valid pixels that were seen.
        seconds: wall time.
        method: the classical method, or what the weights are those of.
        registration: of the sharpened bands.
        left: root mean square of MS less the result as the sensor would see it, over the mean of MS; mean over bands.
        clipped: share of values with data that the pixel type could not hold.
        notes: sentences on what was assumed.
    """

    height: int
    width: int
    bands: int
    dtype: str
    nodata: float | None
    valid: float
    resampled: bool
    largest: float
    seconds: float
    method: str
    registration: Registration
    left: float
    clipped: float
    notes: tuple[str, ...]

    def text(self, name: str | Path) -> str:
        """One line about the scene written to `name`."""
        megapixels = self.height * self.width / 1e6
        parts = [
            f"{name}: {self.height} x {self.width}, {self.bands} bands {self.dtype}, {self.method}",
            *([f"{100 * self.valid:.1f} % hold data"] if self.valid < 1 else []),
            self.registration.text(),
            f"{100 * self.left:.2f} % of MS left over",
            *([f"{100 * self.clipped:.3f} % clipped to {self.dtype}"] if self.clipped else []),
            *self.notes,
            f"{self.seconds:.1f} s, {self.seconds / megapixels:.2f} s per megapixel",
        ]
        return "; ".join(parts)


def sharpen_scene(
    pan: str | Path,
    ms: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    weights: str | Path | SharpeningModel | None = None,
    phase: float | tuple[float, float] | None = None,
    frame: str = "pan",
    register: str | Path | Registration = "auto",
    save_registration: str | Path | None = None,
    shift: Sequence[float] | None = None,
    reach: float = REACH,
    back_projection: int | str = "auto",
    sensor: str | Sensor | None = None,
    mtf: Sequence[float] | None = None,
    band_weights: Sequence[float] | None = None,
    peak: float = 2047,
    bands: Sequence[int] | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    dtype: str | None = None,
    nodata: float | None = None,
    cog: bool = False,
    creation_options: Mapping[str, str] | None = None,
    overwrite: bool = False,
    local_only: bool = False,
    device: str | torch.device | None = None,
    precision: str = "float32",
    preview: str | Path | None = None,
    architecture: str | None = None,
    sampling: Sampling | None = None,
    uncertainty: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Sharpen a scene; memory is that of one tile plus a thin band of results along a row of tiles.

    Args:
        pan: raster with one band, by path or any name that GDAL takes; see `data.rasters.RasterPair`.
        ms: raster with the MS bands, likewise; the ratio is between 1.5 and 16.
        out: GeoTIFF to write, on PAN's grid. It appears when it is complete.
        method: see `pansharp_fast.sharpen`.
        weights: see `pansharp_fast.sharpen`.
        phase: distance in PAN pixels from the centre of the first PAN pixel in an MS pixel's area to where that MS
            pixel was sampled; None is the area's middle.
        frame: see `pansharp_fast.sharpen`.
        register: see `pansharp_fast.sharpen`; the bands' median is taken over all image bands of the file.
        save_registration: JSON file to write with the registration used.
        shift: (dy, dx) in PAN pixels by which MS lies off PAN, down and right positive, instead of `register`.
        reach: MS pixels within which to look for a displacement.
        back_projection: see `pansharp_fast.sharpen`.
        sensor: name or `Sensor`, for the MTF; None is what the file's metadata name, else a gain of .3.
        mtf: gains at MS's Nyquist frequency, one or one for each image band, over the sensor's.
        band_weights: of method brovey.
        peak: largest digital number of the sensor, for networks that want it.
        bands: MS bands to use, from 1; None is all that are not masks.
        tile: PAN pixels computed at once, a side, a multiple of 16; None chooses.
        overlap: PAN pixels that a tile reaches beyond its core, a multiple of 16; None chooses.
        dtype: one of `options.DTYPES`; None is that of MS.
        nodata: value without data where a file declares none, and what the output declares.
        cog: write a Cloud Optimized GeoTIFF.
        creation_options: for GDAL's driver, such as {"COMPRESS": "ZSTD"}.
        overwrite: replace existing files.
        local_only: refuse sources that are not local files.
        device: of a network, see `pansharp_fast.options.device`.
        precision: of a network, one of `pansharp_fast.options.PRECISIONS`.
        preview: PNG or JPEG of the result to write as well.
        architecture: name that the weights' architecture must have.
        sampling: how a diffusion model samples.
        uncertainty: float32 GeoTIFF of a diffusion model's uncertainty to write as well, in digital numbers. It is not
            calibrated; the tag PANSHARP_UNCERTAINTY says what it is made of.
        progress: called with (tiles done, tiles in all) after each tile.

    Returns:
        What was done.

    Raises:
        OSError: a file cannot be read or written, or exists.
        ValueError: the rasters do not fit together, or the weights; no pixel holds data in both; or an option is out
            of its range. Nothing is left at `out` then.
    """
    start = time.perf_counter()
    out, preview = Path(out), None if preview is None else Path(preview)
    uncertainty = None if uncertainty is None else Path(uncertainty)
    saved = None if save_registration is None else Path(save_registration)
    engines.check_frame(frame)
    steps = engines.check_steps(back_projection)
    if tile is not None:
        tiles.check(tile, 0 if overlap is None else overlap)
    elif overlap is not None:
        tiles.check(max(engines.ClassicalEngine.tile_size, 2 * overlap + tiles.MULTIPLE), overlap)
    if dtype is not None:
        expect("dtype", dtype, DTYPES)
    if shift is not None and register != "auto":
        raise ValueError("shift: expected none beside a registration of its own")
    if local_only:
        check_local("PAN", pan)
        check_local("MS", ms)
    creation_options = dict(creation_options or {})
    inputs = {"PAN": pan, "MS": ms}
    inputs |= {"weights": weights} if isinstance(weights, str | Path) else {}
    inputs |= {"registration": register} if register not in ("auto", "off") and isinstance(register, str | Path) else {}
    check_outputs(
        {"OUT": out, "uncertainty": uncertainty, "preview": preview, "save_registration": saved},
        inputs,
        overwrite=overwrite,
        cog=cog,
        creation_options=creation_options,
    )
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MIB), RasterPair(pan, ms, bands=bands, nodata=nodata, phase=phase) as pair:
        known = get_sensor(sensor_in(pair.ms_file, pair.pan_file) if sensor is None else sensor)
        gains = gains_of(known, mtf, len(pair.image_bands))
        if shift is not None:
            register = Registration.given(shift, len(pair.bands))
        registration = engines.find_registration(register, pair, pair.image_bands, pair.bands, gains, reach)
        chosen = [gains[pair.image_bands.index(band)] for band in pair.bands]
        job = engines.Job(pair, pair.bands, registration, chosen, known.mtf_pan, frame, steps)
        engine = engines.make_engine(
            job,
            method=method,
            weights=weights,
            band_weights=band_weights,
            architecture=architecture,
            peak=peak,
            device=device,
            precision=precision,
            sampling=sampling,
            uncertainty=uncertainty is not None,
        )
        pixel = np.dtype(dtype or pair.ms_file.dtypes[pair.bands[0] - 1])
        value = choose_nodata(pair, pixel, nodata, registration.applied)
        side, reached = engines.options(engine, tile, overlap)
        rows, columns = engines.spans(engine, side, reached)
        core = side - 2 * reached
        block = max(size for size in range(16, BLOCK + 1, 16) if core % size == 0)
        done, held, clipped = 0, 0, 0
        valid = torch.empty(0)  # of the latest tile
        limits = None if pixel.kind == "f" else np.iinfo(pixel)

        def compute(row: tiles.Span, column: tiles.Span) -> Tensor:
            nonlocal done, valid
            result, valid = engine.tile(row, column)
            done += 1
            if progress is not None:
                progress(done, len(rows) * len(columns))
            return torch.zeros(engine.channels, *valid.shape) if result is None else result

        with contextlib.ExitStack() as stack:
            tags = {"PANSHARP_METHOD": engine.name, "PANSHARP_REGISTRATION": registration.to_json()}
            options: dict[str, Any] = {
                "block": block,
                "cog": cog,
                "creation_options": creation_options,
                "tags": {**tags, "PANSHARP_FRAME": frame, "PANSHARP_BACK_PROJECTION": str(steps)},
            }
            outputs = [stack.enter_context(Output(out, pair, dtype=pixel, nodata=value, preview=preview, **options))]
            if uncertainty is not None:
                void = None if value is None else np.nan
                kind = np.dtype("float32")
                options["tags"] = {**options["tags"], "PANSHARP_UNCERTAINTY": engine.uncertainty_kind}
                outputs.append(
                    stack.enter_context(Output(uncertainty, pair, dtype=kind, nodata=void, preview=None, **options))
                )
            for top, left, piece in tiles.blend(rows, columns, compute):
                holds = valid[: piece.shape[1], : piece.shape[2]]
                held += int(holds.sum())
                if limits is not None:
                    outside = (piece[: engine.bands] < limits.min - 0.5) | (piece[: engine.bands] > limits.max + 0.5)
                    clipped += int((outside & holds).sum())
                for output, values in zip(outputs, piece.split(engine.bands), strict=True):
                    output.write(top, left, values.numpy(), holds.numpy())
            if not held:
                raise ValueError(f"PAN and MS: expected a pixel that holds data in both, got none in {pan} and {ms}")
            for output in outputs:
                output.finish()
            engine.finish()
            if saved is not None:
                with atomic(saved) as part:
                    registration.to_json(part)
        return Summary(
            height=pair.height,
            width=pair.width,
            bands=len(pair.bands),
            dtype=pixel.name,
            nodata=value,
            valid=held / (pair.height * pair.width),
            resampled=pair.warped,
            largest=job.largest,
            seconds=time.perf_counter() - start,
            method=engine.name,
            registration=registration,
            left=job.left_share(),
            clipped=clipped / max(held * engine.bands, 1),
            notes=tuple(pair.notes),
        )
