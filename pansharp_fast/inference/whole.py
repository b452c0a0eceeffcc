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

from ..data.sources import check_local
from ..options import DTYPES, expect
from . import tiles
from .arrays import Sharpener, SharpeningModel
from .output import BLOCK, Output, check_outputs, choose_nodata
from .scenes import Scene

if TYPE_CHECKING:
    from ..diffusion import Sampling

#: GDAL's cache of blocks, MiB: holds the rows of blocks that a row of tiles reads, without growing with the scene.
CACHE_MIB = 256


@dataclass(frozen=True)
class Summary:
    """What `sharpen_scene` did.

    height, width, bands, dtype, nodata: of the output. valid: share of its pixels that hold data. resampled: whether
    MS was resampled to fit PAN's grid. largest: largest digital number among the inputs. seconds: wall time.
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

    def text(self, name: str | Path) -> str:
        """One line about the scene written to `name`."""
        megapixels = self.height * self.width / 1e6
        parts = [
            f"{name}: {self.height} x {self.width}, {self.bands} bands {self.dtype}",
            *([f"{100 * self.valid:.1f} % hold data"] if self.valid < 1 else []),
            *(["MS resampled to PAN's grid"] if self.resampled else []),
            f"{self.seconds:.1f} s, {self.seconds / megapixels:.2f} s per megapixel",
        ]
        return "; ".join(parts)


def sharpen_scene(
    pan: str | Path,
    ms: str | Path,
    out: str | Path,
    *,
    weights: str | Path | SharpeningModel = "tiny",
    peak: float = 2047,
    bands: Sequence[int] | None = None,
    tile: int = 512,
    overlap: int = 64,
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
        pan, ms, bands, nodata: see `Scene`; nodata is also what the output declares.
        out: GeoTIFF to write, on PAN's grid. It appears when it is complete.
        weights, peak, device, precision: see `pansharp_fast.sharpen`.
        tile, overlap: PAN pixels, multiples of 16; see `tiles.plan`.
        dtype: one of `options.DTYPES`; None is that of MS.
        cog: write a Cloud Optimized GeoTIFF.
        creation_options: for GDAL's driver, such as {"COMPRESS": "ZSTD"}.
        overwrite: replace existing files.
        local_only: refuse sources that are not local files.
        preview: PNG or JPEG of the result to write as well.
        architecture, sampling: see `Sharpener`.
        uncertainty: float32 GeoTIFF of a diffusion model's uncertainty to write as well, in digital numbers.
        progress: called with (tiles done, tiles in all) after each tile.

    Raises:
        OSError: a file cannot be read or written, or exists.
        ValueError: the rasters do not fit together, the weights or not each other; no pixel holds data in both; or an
            option is out of its range. Nothing is left at `out` then.
    """
    start = time.perf_counter()
    out, preview = Path(out), None if preview is None else Path(preview)
    uncertainty = None if uncertainty is None else Path(uncertainty)
    tiles.check(tile, overlap)
    if dtype is not None:
        expect("dtype", dtype, DTYPES)
    if local_only:
        check_local("PAN", pan)
        check_local("MS", ms)
    creation_options = dict(creation_options or {})
    check_outputs(
        {"OUT": out, "uncertainty": uncertainty, "preview": preview},
        {"PAN": pan, "MS": ms, **({"weights": weights} if isinstance(weights, str | Path) else {})},
        overwrite=overwrite,
        cog=cog,
        creation_options=creation_options,
    )
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MIB), Scene(pan, ms, bands=bands, nodata=nodata) as scene:
        sharpener = Sharpener(
            weights,
            peak=peak,
            device=device,
            precision=precision,
            architecture=architecture,
            sampling=sampling,
            uncertainty=uncertainty is not None,
        )
        if len(scene.bands) != sharpener.bands:
            raise ValueError(
                f"MS: expected {sharpener.bands} bands, as the weights have, got {len(scene.bands)} in {ms} "
                "(choose some with bands)"
            )
        pixel = np.dtype(dtype or scene.ms_file.dtypes[scene.bands[0] - 1])
        value = choose_nodata(scene, pixel, nodata)
        rows, columns = tiles.plan(scene.height, tile, overlap), tiles.plan(scene.width, tile, overlap)
        core = tile - 2 * overlap
        block = max(side for side in range(16, BLOCK + 1, 16) if core % side == 0)
        done, held, largest = 0, 0, 0.0
        valid = torch.empty(0)  # of the latest tile

        def compute(row: tiles.Span, column: tiles.Span) -> Tensor:
            nonlocal done, largest, valid
            inputs = scene.read(row, column)
            shape = row.stop - row.start, column.stop - column.start
            if inputs is None:
                result, valid = torch.zeros(sharpener.channels, *shape), torch.zeros(shape, dtype=torch.bool)
            else:
                pan_tile, ms_tile, valid = inputs
                largest = max(largest, float(pan_tile.max()), float(ms_tile.max()))
                origin = row.read_start, column.read_start
                result = sharpener(pan_tile, ms_tile, origin)[0, :, row.written, column.written].cpu()
            done += 1
            if progress is not None:
                progress(done, len(rows) * len(columns))
            return result

        with contextlib.ExitStack() as stack:
            options: dict[str, Any] = {"block": block, "cog": cog, "creation_options": creation_options}
            outputs = [stack.enter_context(Output(out, scene, dtype=pixel, nodata=value, preview=preview, **options))]
            if uncertainty is not None:
                void = None if value is None else np.nan
                kind = np.dtype("float32")
                outputs.append(
                    stack.enter_context(Output(uncertainty, scene, dtype=kind, nodata=void, preview=None, **options))
                )
            for top, left, piece in tiles.blend(rows, columns, compute):
                holds = valid[: piece.shape[1], : piece.shape[2]]
                held += int(holds.sum())
                for output, values in zip(outputs, piece.split(sharpener.bands), strict=True):
                    output.write(top, left, values.numpy(), holds.numpy())
            if not held:
                raise ValueError(f"PAN and MS: expected a pixel that holds data in both, got none in {pan} and {ms}")
            for output in outputs:
                output.finish()
        return Summary(
            height=scene.height,
            width=scene.width,
            bands=len(scene.bands),
            dtype=pixel.name,
            nodata=value,
            valid=held / (scene.height * scene.width),
            resampled=scene.resampled,
            largest=largest,
            seconds=time.perf_counter() - start,
        )
