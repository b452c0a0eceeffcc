"""Sharpening of arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.grid import Both, both_ratios, check_pair, default_phase, fit_ratio
from ..data.registration import REACH, Arrays, Registration
from ..data.sensors import Sensor, gains_of, get_sensor
from . import engine as engines
from .sharpener import Sharpener, SharpeningModel
from .tiles import Span, blend

if TYPE_CHECKING:
    from ..diffusion import Sampling

Array = TypeVar("Array", np.ndarray, Tensor)


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`: rounded and held inside its range where that is an integer type."""
    if dtype.is_floating_point:
        return values.to(dtype)
    limits = torch.iinfo(dtype)
    return values.double().round().clamp(limits.min, limits.max).to(dtype)


def sharpen(
    pan: Array,
    ms: Array,
    *,
    method: str | None = None,
    weights: str | Path | SharpeningModel | None = None,
    ratio: Both | None = None,
    phase: Both | None = None,
    frame: str = "pan",
    register: str | Path | Registration = "auto",
    reach: float = REACH,
    back_projection: int | str = "auto",
    sensor: str | Sensor = "default",
    mtf: Sequence[float] | None = None,
    band_weights: Sequence[float] | None = None,
    nodata: float | None = None,
    peak: float = 2047,
    tile: int | None = None,
    overlap: int | None = None,
    device: str | torch.device | None = None,
    precision: str = "float32",
    sampling: Sampling | None = None,
) -> Array:
    """Sharpen multispectral images with their panchromatic ones, in memory.

    Args:
        pan: [B,1,H,W] NumPy array or tensor, real numbers of any linear scale. A masked array's mask says what is void.
        ms: [B,C,h,w], likewise; the ratio H / h lies between 1.5 and 16.
        method: classical method, "auto" (which is also what None means without weights) or a name of
            `pansharp_fast.classical.METHODS`.
        weights: instead of a method: name of shipped weights, a checkpoint file, or a model.
        ratio: PAN pixels per MS pixel, one number or (rows, columns); None follows from the sizes.
        phase: PAN index of the first MS pixel's centre; None means aligned pixel areas, (ratio - 1) / 2, as in
            GeoTIFFs. PanCollection and toolbox arrays have ratio / 2.
        frame: "pan": everything where PAN shows it. "ms": each band back where its own MS band lies.
        register: "auto" measures each band's displacement against PAN (`pansharp_fast.register`), "off" takes MS as it
            lies, a `Registration` or a JSON file with one is used as it is.
        reach: MS pixels within which "auto" looks, up to 16.
        back_projection: full steps, or "auto": what real images bear (none for networks).
        sensor: name or `Sensor`, for the MTF.
        mtf: gains at MS's Nyquist frequency, one or one a band, over the sensor's.
        band_weights: of method brovey; None is 1/C each.
        nodata: value that means "no data" in pan and ms, NaN included; void pixels of the result hold it too.
        peak: largest digital number of the sensor, for networks that want it: 2047 for 11 bits, 1023 for 10.
        tile: PAN pixels that are computed at once, a side, a multiple of 16; None chooses.
        overlap: PAN pixels that a tile reaches beyond its core on each side, a multiple of 16; None chooses.
        device: where a network runs; None takes the tensors' own, and for NumPy arrays CUDA if there is any.
        precision: of a network, one of `pansharp_fast.options.PRECISIONS`.
        sampling: how a diffusion model samples.

    Returns:
        [B,C,H,W], of the kind, the dtype and (tensors) the device of ms; integers are rounded and clipped. A masked
        array where pan or ms is one. A pixel is void unless PAN and every band at the place that belongs there hold
        data.

    Raises:
        TypeError: pan and ms are not both NumPy arrays or both tensors, or are complex or boolean.
        ValueError: shapes or the ratio are none of the above, the weights want other ones, a value that is not void is
            NaN or infinite, or an option is out of its range.
        OSError: a file with a registration cannot be read.
    """
    values = dict(locals())
    del values["pan"], values["ms"]
    return _sharpen(pan, ms, **values)[0]


def sharpen_with_uncertainty(
    pan: Array,
    ms: Array,
    *,
    weights: str | Path | SharpeningModel,
    **options: Any,
) -> tuple[Array, Array]:
    """As `sharpen`, with a diffusion model's uncertainty [B,C,H,W] in digital numbers, float32, not calibrated.

    What it is depends on model and number of samples, see `pansharp_fast.diffusion.sharpen_by_sampling`: a teacher's
    standard deviation, that of the samples, or of a student's single sample the drift of its estimates.

    Args:
        pan: see `sharpen`.
        ms: see `sharpen`.
        weights: those of a diffusion model.
        options: further arguments of `sharpen`.

    Raises:
        TypeError, ValueError: as `sharpen`; also where the weights are those of a model that does not sample.
    """
    image, uncertainty = _sharpen(pan, ms, weights=weights, uncertainty=True, **options)
    return image, uncertainty


def _sharpen(
    pan: Array,
    ms: Array,
    *,
    method: str | None = None,
    weights: Any = None,
    ratio: Both | None = None,
    phase: Both | None = None,
    frame: str = "pan",
    register: str | Path | Registration = "auto",
    reach: float = REACH,
    back_projection: int | str = "auto",
    sensor: str | Sensor = "default",
    mtf: Sequence[float] | None = None,
    band_weights: Sequence[float] | None = None,
    nodata: float | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    device: Any = None,
    **network: Any,
) -> list[Array]:
    """Image of the dtype of ms and, where asked for, its uncertainty."""
    pan_values, pan_void = _input("pan", pan, nodata)
    ms_values, ms_void = _input("ms", ms, nodata)
    if isinstance(pan, Tensor) != isinstance(ms, Tensor):
        kinds = f"{type(pan).__name__} and {type(ms).__name__}"
        raise TypeError(f"pan and ms: expected two NumPy arrays or two tensors, got {kinds}")
    engines.check_frame(frame)
    steps = engines.check_steps(back_projection)
    check_pair(pan_values, ms_values, ratio=None)
    if ratio is None:
        ratio = fit_ratio(pan_values.shape[2:], ms_values.shape[2:])
    ratios = both_ratios(ratio)
    phases = default_phase(phase, ratios)
    known = get_sensor(sensor)
    count = ms_values.shape[1]
    gains = known.gains(count) if mtf is None else gains_of(known, mtf, count)
    if isinstance(ms, Tensor) and device is None:
        device = ms.device
    if weights is not None:
        weights = Sharpener(weights, device=device, **network)
        network = {}
    bands = range(1, count + 1)
    results, voids = [], []
    for index in range(len(ms_values)):
        source = Arrays(pan_values[index], ms_values[index], ~pan_void[index, 0], ~ms_void[index], ratios, phases)
        found = register
        if isinstance(register, Registration):
            if len(register.d) not in (1, len(ms_values)):
                raise ValueError(f"register: expected a batch of {len(ms_values)}, got {len(register.d)}")
            found = register.image(index if len(register.d) > 1 else 0)
        registration = engines.find_registration(found, source, bands, bands, gains, reach)
        job = engines.Job(source, bands, registration, gains, known.mtf_pan, frame, steps)
        engine = engines.make_engine(job, method=method, weights=weights, band_weights=band_weights, **network)
        image, valid = _run(engine, tile, overlap)
        results.append(image)
        voids.append(~valid)
    size = pan_values.shape[2:]
    out = torch.stack(results) if results else torch.zeros(0, count, *size)
    void = torch.stack(voids) if voids else torch.zeros(0, *size, dtype=torch.bool)
    void = void[:, None].expand(-1, count, -1, -1)
    return [_output(part, void, pan, ms, nodata, number == 0) for number, part in enumerate(out.split(count, 1))]


def _input(name: str, values: Any, nodata: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Values float32, finite, and where they are void."""
    if isinstance(values, Tensor):
        if values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers or real numbers, got {values.dtype}")
        tensor = values.detach().cpu()
        array = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    elif isinstance(values, np.ndarray):
        if values.dtype.kind not in "iuf":
            raise TypeError(f"{name}: expected integers or real numbers, got {values.dtype}")
        array = np.asarray(np.ma.getdata(values))
    else:
        raise TypeError(f"pan and ms: expected two NumPy arrays or two tensors, got {name} {type(values).__name__}")
    void = np.broadcast_to(np.ma.getmaskarray(values), array.shape).copy() if np.ma.isMaskedArray(values) else None
    if void is None:
        void = np.zeros(array.shape, np.bool_)
    if nodata is not None:
        void |= np.isnan(array) if np.isnan(nodata) else array == nodata
    if array.dtype.kind == "f" and not np.isfinite(array[~void]).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity (nodata=nan takes NaN as no data)")
    with np.errstate(over="ignore"):
        return np.where(void, 0, array).astype(np.float32), void


def _output(values: Tensor, void: Tensor, pan: Any, ms: Any, nodata: float | None, image: bool) -> Any:
    """Of the kind and, for the image, the dtype of ms."""
    if isinstance(ms, Tensor):
        out = to_dtype(values, ms.dtype) if image else values
        if nodata is not None and bool(void.any()):
            out = torch.where(void, torch.tensor(nodata).to(out.dtype), out)
        return out.to(ms.device)
    dtype = ms.dtype.newbyteorder("=") if image else np.dtype(np.float32)
    if dtype.kind == "f":
        array = values.numpy().astype(dtype)
    else:
        limits = np.iinfo(dtype)
        array = values.double().numpy().round().clip(limits.min, limits.max).astype(dtype)
    if nodata is not None and bool(void.any()):
        array[void.numpy()] = nodata if image else np.nan
    if np.ma.isMaskedArray(pan) or np.ma.isMaskedArray(ms):
        fill = ms.fill_value if np.ma.isMaskedArray(ms) and image else None
        return np.ma.masked_array(array, void.numpy(), fill_value=fill)
    return array


def _run(engine: engines.Engine, tile: int | None, overlap: int | None) -> tuple[Tensor, Tensor]:
    """Whole result [channels, H, W] and where it holds data [H, W]."""
    source = engine.job.source
    rows, columns = engines.spans(engine, *engines.options(engine, tile, overlap))
    out = torch.zeros(engine.channels, source.height, source.width)
    held = torch.zeros(source.height, source.width, dtype=torch.bool)

    def compute(row: Span, column: Span) -> Tensor:
        values, valid = engine.tile(row, column)
        held[row.start : row.stop, column.start : column.stop] = valid
        return torch.zeros(engine.channels, *valid.shape) if values is None else values

    for top, left, piece in blend(rows, columns, compute):
        out[:, top : top + piece.shape[-2], left : left + piece.shape[-1]] = piece
    engine.finish()
    return out, held
