"""Two-dimensional discrete and stationary wavelet transforms with the names and conventions of PyWavelets.

All six public functions are made of two operator halves, `wavelet_fwd` (one level of analysis) and `wavelet_bwd` (its
exact transpose, which with the time-reversed reconstruction filters is the inverse transform). Each is the other's
gradient, so derivatives of any order stay on the same kernels. `wavelet_bands_fwd` is `wavelet_fwd` with the bands in
tensors of their own: each lives as long as it is used, and gradients of the bands need not be joined.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..reference import wavelet as reference
from . import _library
from ._backends import FLOATING, Operator, Sample, Support, cast, plainly, register, select, traced_as_constant

MODES = reference.MODES
#: One level of coefficients: (cH, cV, cD), or the same three stacked [..., 3, H', W'].
Details = Any

# ---- Operator halves -------------------------------------------------------------------------------------------------


def _output_size(n: int, taps: Sequence[float], mode: int, dilation: int) -> int:
    return reference.geometry(n, len(taps) // 2, MODES[mode], dilation)[2]


def _band_shape(x, taps_y, taps_x, mode_y, mode_x, dilation):  # type: ignore[no-untyped-def]
    height = _output_size(x.shape[1], taps_y, mode_y, dilation)
    width = _output_size(x.shape[2], taps_x, mode_x, dilation)
    return x.shape[0], height, width


def _fwd_fake(x, *level):  # type: ignore[no-untyped-def]
    planes, height, width = _band_shape(x, *level)
    return x.new_empty(planes, 4, height, width)


def _bands_fwd_fake(x, *level):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(_band_shape(x, *level)) for _ in range(4))


def _bwd_fake(a, h, v, d, taps_y, taps_x, mode_y, mode_x, dilation, height, width):  # type: ignore[no-untyped-def]
    return a.new_empty(a.shape[0], height, width)


class Level(NamedTuple):
    """What the two operator halves share: taps (low, then high pass) and border mode of both axes, tap spacing."""

    taps_y: list[float]
    taps_x: list[float]
    mode_y: int
    mode_x: int
    dilation: int = 1

    @property
    def modes(self) -> tuple[str, str]:
        return MODES[self.mode_y], MODES[self.mode_x]

    @property
    def options(self) -> dict[str, Any]:
        """What the backends' checks look at."""
        longest = max(len(self.taps_y), len(self.taps_x)) // 2
        return {"mode": self.modes, "taps": longest, "dilation": self.dilation}


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.level = Level(*inputs[1:])
    ctx.size = inputs[0].shape[1:]


def _fwd_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return _bands_fwd_backward(ctx, *grad.unbind(1))


def _bands_fwd_backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    return _library.call("wavelet_bwd", ctx.backend, *grads, *ctx.level, *ctx.size), *[None] * 5


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.level = Level(*inputs[4:9])


def _bwd_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return *_library.call("wavelet_bands_fwd", ctx.backend, grad, *ctx.level), *[None] * 7


_FILTERS = "float[] taps_y, float[] taps_x, int mode_y, int mode_x, int dilation"
_library.define(
    "wavelet_fwd",
    f"(Tensor x, {_FILTERS}) -> Tensor",
    fake=_fwd_fake,
    triton_module="wavelet",
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
_library.define(
    "wavelet_bands_fwd",
    f"(Tensor x, {_FILTERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_bands_fwd_fake,
    triton_module="wavelet",
    setup_context=_fwd_setup,
    backward=_bands_fwd_backward,
)
_library.define(
    "wavelet_bwd",
    f"(Tensor a, Tensor h, Tensor v, Tensor d, {_FILTERS}, SymInt height, SymInt width) -> Tensor",
    fake=_bwd_fake,
    triton_module="wavelet",
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)


def _selfcheck(backend: str, device: torch.device) -> None:
    """Compare one small transform of each kind with the reference; raises where they differ."""
    exact = torch.sin(torch.arange(2 * 12 * 14, dtype=torch.float64)).view(2, 12, 14)
    x = exact.to(device, torch.float32)

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-5, atol=1e-5)

    for wavelet, mode, dilation in (("haar", "symmetric", 1), ("db3", "reflect", 1), ("haar", "stationary", 2)):
        taps = _filters(wavelet, "dec")
        level = Level(taps, taps, MODES.index(mode), MODES.index(mode), dilation)
        y = _analysis(exact, level, "reference")
        compare(_analysis(x, level, backend), y)
        compare(torch.stack(_bands_of(x, level, backend), 1), y)
        bands = y.to(device, torch.float32).unbind(1)
        compare(
            _synthesis(bands, level, x.shape[1:], backend), _synthesis(y.unbind(1), level, x.shape[1:], "reference")
        )


#: Taps that the CUDA kernels take: the longest filter of PyWavelets has 102.
_MOST_CUDA_TAPS = 104


def _check_cuda(*tensors: torch.Tensor, taps: int = 2, dilation: int = 1, **_: Any) -> list[str]:
    found = []
    if taps > _MOST_CUDA_TAPS:
        found.append(f"wavelet: expected at most {_MOST_CUDA_TAPS} taps, got {taps}")
    if any(n % dilation for n in tensors[0].shape[-2:]):
        found.append(f"data: expected multiples of the tap spacing {dilation}, got {tuple(tensors[0].shape)}")
    return found


def _check_triton(*_: torch.Tensor, mode: Any = "symmetric", **__: Any) -> list[str]:
    return [
        f"mode: expected a border of single samples, got {each}"
        for each in dict.fromkeys(_pair("mode", mode))
        if each in ("smooth", "antireflect")
    ]


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Analysis (stacked and not) and synthesis of every border mode, of short and long filters, and dilated."""
    generator = torch.Generator().manual_seed(0)
    cases = [("db2", "bior1.3", "symmetric", 1, (2, 5, 8)), ("haar", "haar", "stationary", 2, (1, 4, 6))]
    cases += [("db2", "db2", mode, 1, (1, 7, 10)) for mode in MODES]
    cases += [("haar", "haar", mode, 1, (2, 33, 70)) for mode in MODES]
    cases += [("db4", "bior4.4", mode, 1, (1, 19, 130)) for mode in MODES]
    cases += [("db3", "db2", "stationary", 4, (2, 8, 40)), ("dmey", "dmey", "reflect", 1, (1, 6, 10))]
    for wavelet, second, mode, dilation, (planes, height, width) in cases:
        index = MODES.index(mode)
        level = Level(_filters(wavelet, "dec"), _filters(second, "dec"), index, index, dilation)
        size = (planes, height, width)
        x = torch.randn(size, generator=generator).to(device, dtype)
        shape = _band_shape(x, *level)
        bands = tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
        name = f"{wavelet} {second} {mode} {dilation}"
        yield Sample(
            f"analysis {name}", lambda x, backend, level=level: (_analysis(x, level, backend),), (x,), level.options
        )
        yield Sample(
            f"synthesis {name}",
            lambda *bands, backend, level=level, size=size: (_synthesis(bands, level, size[1:], backend),),
            bands,
            level.options,
        )
        yield Sample(f"bands {name}", lambda x, backend, level=level: _bands_of(x, level, backend), (x,), level.options)


OPERATOR = register(
    Operator(
        "wavelet",
        support={
            "cuda": Support(("cuda",), FLOATING, _check_cuda),
            "triton": Support(("cuda", "xpu"), FLOATING, _check_triton),
            "cpu": Support(("cpu",), FLOATING),
            "reference": Support(("cpu", "cuda", "xpu", "mps", "meta"), FLOATING),
        },
        selfcheck=_selfcheck,
        samples=_samples,
    )
)


def _analysis(x: torch.Tensor, level: Level, backend: str | None = None) -> torch.Tensor:
    """[N, H, W] -> [N, 4, H', W'] on the chosen backend."""
    chosen = select(OPERATOR, [x], backend, **level.options)
    if chosen == "reference":
        with plainly(x):
            return reference.analysis(x, level.taps_y, level.taps_x, *level.modes, level.dilation)
    return _library.call("wavelet_fwd", chosen, x, *level)


def _bands_of(x: torch.Tensor, level: Level, backend: str | None = None) -> tuple[torch.Tensor, ...]:
    """`_analysis` with a tensor [N, H', W'] for each band; from 32 MiB a band on, those share memory on the CPU."""
    chosen = select(OPERATOR, [x], backend, **level.options)
    # glibc maps blocks of 32 MiB and more anew at every call; the system clears one such block faster than four.
    if chosen == "reference" or (chosen == "cpu" and math.prod(_band_shape(x, *level)) * x.element_size() >= 32 << 20):
        return _analysis(x, level, chosen).unbind(1)
    return tuple(_library.call("wavelet_bands_fwd", chosen, x, *level))


def _synthesis(
    bands: Sequence[torch.Tensor], level: Level, size: Sequence[int], backend: str | None = None
) -> torch.Tensor:
    """Four bands [N, H', W'] -> [N, *size], the transpose of `_analysis`."""
    chosen = select(OPERATOR, bands, backend, **level.options)
    if chosen == "reference":
        with plainly(bands[0]):
            return reference.synthesis(bands, level.taps_y, level.taps_x, *level.modes, level.dilation, *size)
    return _library.call("wavelet_bwd", chosen, *bands, *level, *size)


# ---- Arguments -------------------------------------------------------------------------------------------------------


@traced_as_constant
def _filters(wavelet: Any, bank: str) -> list[float]:
    """Low-pass then high-pass taps of the analysis ("dec") or time-reversed synthesis ("rec") filters, unscaled."""
    return list(_named_filters(wavelet, bank) if isinstance(wavelet, str) else _bank(wavelet, bank))


@functools.cache
def _named_filters(name: str, bank: str) -> tuple[float, ...]:
    import pywt

    try:
        return _bank(pywt.Wavelet(name), bank)
    except ValueError:
        raise ValueError(f"wavelet: expected a name of pywt.wavelist(kind='discrete'), got {name!r}") from None


def _bank(wavelet: Any, bank: str) -> tuple[float, ...]:
    import pywt

    if not isinstance(wavelet, pywt.Wavelet):
        raise TypeError(f"wavelet: expected a name or a pywt.Wavelet, got {type(wavelet).__name__}")
    if bank == "dec":
        low, high = wavelet.dec_lo, wavelet.dec_hi
    else:
        low, high = wavelet.rec_lo[::-1], wavelet.rec_hi[::-1]
    if len(low) != len(high) or len(low) % 2:
        raise ValueError(f"wavelet: expected filters of one even length, got {len(low)} and {len(high)}")
    return (*low, *high)


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """`value` for both axes, or one per axis."""
    if isinstance(value, (tuple, list)):
        if len(value) not in (1, 2):
            raise ValueError(f"{name}: expected one or two, got {len(value)}")
        return value[0], value[-1]
    return value, value


def _both_filters(wavelet: Any, bank: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    first, second = (_filters(each, bank) for each in _pair("wavelet", wavelet))
    if scale == 1.0:
        return first, second
    return [scale * tap for tap in first], [scale * tap for tap in second]


def _both_modes(mode: Any) -> tuple[int, int]:
    first, second = (_mode_index(each) for each in _pair("mode", mode))
    return first, second


@traced_as_constant
def _mode_index(mode: Any) -> int:
    """Place in `MODES` of a border mode, by whatever PyWavelets takes: name, older name ("per"), `pywt.Modes`."""
    if mode in MODES[:-1]:
        return MODES.index(mode)
    import pywt

    try:
        number = pywt.Modes.from_object(mode)
    except (TypeError, ValueError):
        raise ValueError(f"mode: expected one of {MODES[:-1]} or of pywt.Modes, got {mode!r}") from None
    return next(index for index, name in enumerate(MODES) if getattr(pywt.Modes, name) == number)


def _both_axes(axes: Sequence[int], dim: int, stack: bool) -> tuple[int, int]:
    """The two axes counted from the end."""
    if len(axes) != 2 or not all(-dim <= axis < dim for axis in axes):
        raise ValueError(f"axes: expected two axes of a {dim}-dimensional tensor, got {tuple(axes)}")
    first, second = (axis - dim if axis >= 0 else axis for axis in axes)
    if first == second:
        raise ValueError(f"axes: expected two different axes, got {tuple(axes)}")
    if stack and (first, second) != (-2, -1):
        raise ValueError(f"axes: expected (-2, -1) with stack=True, got {tuple(axes)}")
    return first, second


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating point dtype, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{name}: expected [..., H, W], got {x.ndim} dimensions")


def _to_last(x: torch.Tensor, axes: tuple[int, int]) -> torch.Tensor:
    return x if axes == (-2, -1) else x.movedim(axes, (-2, -1))


def _from_last(x: torch.Tensor, axes: tuple[int, int]) -> torch.Tensor:
    return x if axes == (-2, -1) else x.movedim((-2, -1), axes)


def _planes(x: torch.Tensor) -> torch.Tensor:
    """[..., H, W] -> [N, H, W], a view wherever the leading dimensions allow one."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _split(details: Details, name: str = "coeffs") -> list[torch.Tensor | None]:
    """Three detail bands from a tuple or a stacked tensor [..., 3, H', W']."""
    if isinstance(details, torch.Tensor):
        if details.ndim < 3 or details.shape[-3] != 3:
            raise ValueError(f"{name}: expected three details [..., 3, H, W], got shape {tuple(details.shape)}")
        return list(details.unbind(-3))
    if not isinstance(details, (tuple, list)) or len(details) != 3:
        raise ValueError(f"{name}: expected three details (cH, cV, cD), got {type(details).__name__}")
    return list(details)


def _bands(coeffs: Any) -> tuple[list[torch.Tensor], torch.Size]:
    """Four bands [N, H', W'] and their common shape from (cA, (cH, cV, cD)) or a stacked tensor; None means zeros."""
    if isinstance(coeffs, torch.Tensor):
        if coeffs.ndim < 3 or coeffs.shape[-3] != 4:
            raise ValueError(f"coeffs: expected [..., 4, H, W], got shape {tuple(coeffs.shape)}")
        found: list[torch.Tensor | None] = list(coeffs.unbind(-3))
    elif isinstance(coeffs, (tuple, list)) and len(coeffs) == 2:
        found = [coeffs[0], *_split(coeffs[1])]
    else:
        raise ValueError(f"coeffs: expected (cA, (cH, cV, cD)) or [..., 4, H, W], got {type(coeffs).__name__}")
    given = [band for band in found if band is not None]
    if not given:
        raise ValueError("coeffs: expected at least one band, got None only")
    for band in given:
        _check_tensor("coeffs", band)
    given = cast(given, widest=True)
    for band in given:
        if band.shape != given[0].shape or band.dtype != given[0].dtype:
            raise ValueError(
                f"coeffs: expected bands of one shape and dtype, got {tuple(given[0].shape)} {given[0].dtype} and "
                f"{tuple(band.shape)} {band.dtype}"
            )
    shape = given[0].shape
    zero = given[0].new_zeros(()).expand(shape) if len(given) < 4 else None
    rest = iter(given)
    return [_planes(zero if band is None else next(rest)) for band in found], shape  # type: ignore[arg-type]


def _check_size(x: torch.Tensor, modes: tuple[str, str]) -> None:
    for axis, mode in zip((-2, -1), modes, strict=True):
        least = 2 if mode in ("reflect", "antireflect") else 1
        if x.shape[axis] < least:
            raise ValueError(
                f"data: expected at least {least} samples along a transformed axis for mode {mode}, "
                f"got shape {tuple(x.shape)}"
            )


# ---- Discrete wavelet transform --------------------------------------------------------------------------------------


def _one_level(x: torch.Tensor, level: Level, stack: bool, backend: str | None) -> tuple[torch.Tensor, Any]:
    """One level of [..., H, W]: what is decomposed next [..., H', W'], and all bands [..., 4, H', W'] or the tuple."""
    _check_size(x, level.modes)
    leading = x.shape[:-2]
    if stack:
        y = _analysis(_planes(x), level, backend)
        y = y.view(*leading, *y.shape[1:])
        return y.select(-3, 0), y
    bands = [band.view(*leading, *band.shape[1:]) for band in _bands_of(_planes(x), level, backend)]
    return bands[0], bands


def dwt2(
    data: torch.Tensor,
    wavelet: Any,
    mode: Any = "symmetric",
    axes: Sequence[int] = (-2, -1),
    *,
    stack: bool = False,
    backend: str | None = None,
) -> Any:
    """One level of the two-dimensional discrete wavelet transform, as `pywt.dwt2`.

    Args:
        data: [..., H, W], float32, float64, bfloat16 or float16 (half types accumulate in float32); any strides.
        wavelet: name of a discrete wavelet of PyWavelets, a `pywt.Wavelet`, or a pair of those, one per axis.
        mode: border mode of PyWavelets, by name or as `pywt.Modes`, or a pair, one per axis.
        axes: the two axes to transform; wavelets and modes given as pairs follow their order.
        stack: return one tensor [..., 4, H', W'] holding cA, cH, cV, cD instead; free of copies.
        backend: cuda, triton, cpu or reference; None chooses.

    Returns:
        (cA, (cH, cV, cD)), each [..., H', W'] with H' = (H + L - 1) // 2 for filters of L taps, or (H + 1) // 2 in mode
        "periodization".

    Raises:
        ValueError, TypeError: an argument is not as described, or an axis is too short for the mode.
        BackendError: `backend` cannot run this call.
    """
    _check_tensor("data", data)
    at = _both_axes(axes, data.ndim, stack)
    _, y = _one_level(_to_last(data, at), Level(*_both_filters(wavelet, "dec"), *_both_modes(mode)), stack, backend)
    if stack:
        return y
    a, h, v, d = (_from_last(band, at) for band in y)
    return a, (h, v, d)


def _idwt(coeffs: Any, level: Level, backend: str | None) -> torch.Tensor:
    """(cA, (cH, cV, cD)) or [..., 4, H', W'] -> [..., H, W]."""
    bands, shape = _bands(coeffs)
    size, border = [], []
    for count, taps, mode in zip(shape[-2:], (level.taps_y, level.taps_x), level.modes, strict=True):
        periodic = mode == "periodization"
        length = len(taps) // 2
        size.append(2 * count if periodic else 2 * count - length + 2)
        # Other inverses need no border: they are the transpose of an analysis that sees zeros outside.
        border.append(MODES.index("periodization" if periodic else "zero"))
        if size[-1] < 1 or count < 1:
            raise ValueError(f"coeffs: expected at least {length // 2} coefficients along an axis, got {count}")
    x = _synthesis(bands, Level(level.taps_y, level.taps_x, *border), size, backend)
    return x.view(*shape[:-2], *size)


def idwt2(
    coeffs: Any,
    wavelet: Any,
    mode: Any = "symmetric",
    axes: Sequence[int] = (-2, -1),
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Inverse of `dwt2`, as `pywt.idwt2`.

    Args:
        coeffs: (cA, (cH, cV, cD)), where None stands for zeros, or a stacked tensor [..., 4, H', W']. Under autocast
            bands may differ in dtype, here and in the other inverses: the widest is computed in.
        wavelet, mode, axes, backend: as in `dwt2`.

    Returns:
        [..., 2 H' - L + 2, 2 W' - L + 2] (2 H' and 2 W' in mode "periodization"): one sample more than the data of
        `dwt2` had along an axis of odd length.

    Raises:
        ValueError, TypeError: an argument is not as described, or there are too few coefficients for the filter.
        BackendError: `backend` cannot run this call.
    """
    inverse = Level(*_both_filters(wavelet, "rec"), *_both_modes(mode))
    if isinstance(coeffs, torch.Tensor):
        _both_axes(axes, max(coeffs.ndim, 2), True)
        return _idwt(coeffs, inverse, backend)
    if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 2:
        raise ValueError(f"coeffs: expected (cA, (cH, cV, cD)) or [..., 4, H, W], got {type(coeffs).__name__}")
    bands = [coeffs[0], *_split(coeffs[1])]
    dim = next((band.ndim for band in bands if band is not None), 2)
    at = _both_axes(axes, dim, False)
    a, *details = (None if band is None else _to_last(band, at) for band in bands)
    return _from_last(_idwt((a, details), inverse, backend), at)


def _max_level(size: int, length: int) -> int:
    """Levels until the filter is longer than the approximation: `pywt.dwt_max_level`."""
    return max(0, (size // (length - 1)).bit_length() - 1)


def wavedec2(
    data: torch.Tensor,
    wavelet: Any,
    mode: Any = "symmetric",
    level: int | None = None,
    axes: Sequence[int] = (-2, -1),
    *,
    stack: bool = False,
    backend: str | None = None,
) -> list[Any]:
    """Discrete wavelet transform of several levels, as `pywt.wavedec2`.

    Args:
        data, wavelet, mode, axes, backend: as in `dwt2`.
        level: number of levels, at least 0; None takes as many as keep the filter inside the approximation.
        stack: return the details of a level as one tensor [..., 3, H', W'].

    Returns:
        [cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1)], coarsest level first.

    Raises:
        ValueError, TypeError: an argument is not as described, or an axis is too short for the mode.
        BackendError: `backend` cannot run this call.
    """
    _check_tensor("data", data)
    at = _both_axes(axes, data.ndim, stack)
    one = Level(*_both_filters(wavelet, "dec"), *_both_modes(mode))
    approximation = _to_last(data, at)
    height, width = approximation.shape[-2:]
    most = min(_max_level(height, len(one.taps_y) // 2), _max_level(width, len(one.taps_x) // 2))
    if level is None:
        level = most
    if level < 0:
        raise ValueError(f"level: expected at least 0, got {level}")
    if level > most:
        warnings.warn(f"level: {level} is more than {most}: borders reach all coefficients", stacklevel=2)
    found: list[Any] = []
    for _ in range(level):
        approximation, y = _one_level(approximation, one, stack, backend)
        found.append(y.narrow(-3, 1, 3) if stack else tuple(_from_last(band, at) for band in y[1:]))
    return [_from_last(approximation, at), *found[::-1]]


def waverec2(
    coeffs: Sequence[Any],
    wavelet: Any,
    mode: Any = "symmetric",
    axes: Sequence[int] = (-2, -1),
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Inverse of `wavedec2`, as `pywt.waverec2`.

    Args:
        coeffs: [cA_n, details_n, ..., details_1]; details are (cH, cV, cD), where None stands for zeros, or stacked
            [..., 3, H', W'].
        wavelet, mode, axes, backend: as in `dwt2`.

    Returns:
        [..., H, W], with one sample more than the data had along an axis of odd length.

    Raises:
        ValueError, TypeError: an argument is not as described, or bands of a level differ in shape.
        BackendError: `backend` cannot run this call.
    """
    if not isinstance(coeffs, (tuple, list)) or not coeffs:
        raise ValueError(f"coeffs: expected [cA, details, ...], got {type(coeffs).__name__} without a cA")
    _check_tensor("coeffs", coeffs[0])
    at = _both_axes(axes, coeffs[0].ndim, any(isinstance(details, torch.Tensor) for details in coeffs[1:]))
    inverse = Level(*_both_filters(wavelet, "rec"), *_both_modes(mode))
    x = _to_last(coeffs[0], at)
    for details in coeffs[1:]:
        bands = [None if band is None else _to_last(band, at) for band in _split(details)]
        like = next((band for band in bands if band is not None), None)
        if like is not None:
            # The level below was of odd length: the inverse of this one has a sample too many.
            height, width = (n - 1 if n == m + 1 else n for n, m in zip(x.shape[-2:], like.shape[-2:], strict=True))
            x = x[..., :height, :width]
        x = _idwt((x, bands), inverse, backend)
    return _from_last(x, at)


# ---- Stationary wavelet transform ------------------------------------------------------------------------------------

_STATIONARY = (MODES.index("stationary"),) * 2


def swt2(
    data: torch.Tensor,
    wavelet: Any,
    level: int,
    start_level: int = 0,
    axes: Sequence[int] = (-2, -1),
    trim_approx: bool = False,
    norm: bool = False,
    *,
    stack: bool = False,
    backend: str | None = None,
) -> list[Any]:
    """Stationary (undecimated, a trous) wavelet transform of several levels, as `pywt.swt2`.

    Args:
        data, wavelet, axes, backend: as in `dwt2`.
        level: number of levels, at least 0.
        start_level: levels taken as already done: tap spacing starts at 2 ** start_level.
        trim_approx: keep the approximation of the last level only.
        norm: filters divided by sqrt(2), so that orthogonal wavelets with `trim_approx` keep the energy of the data.
        stack: return each level as one tensor [..., 4, H, W] (or [..., 3, H, W] with `trim_approx`).

    Returns:
        [(cA_n, (cH_n, cV_n, cD_n)), ..., (cA_1, (cH_1, cV_1, cD_1))], coarsest level first, or with `trim_approx`
        [cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1)]; every band has the shape of `data`.

    Raises:
        ValueError, TypeError: an argument is not as described; both axes must be multiples of
            2 ** (level + start_level).
        BackendError: `backend` cannot run this call.
    """
    _check_tensor("data", data)
    at = _both_axes(axes, data.ndim, stack)
    taps = _both_filters(wavelet, "dec", math.sqrt(0.5) if norm else 1.0)
    if level < 0 or start_level < 0:
        raise ValueError(f"level, start_level: expected at least 0, got {level}, {start_level}")
    approximation = _to_last(data, at)
    multiple = 2 ** (level + start_level) if level else 1
    if any(n % multiple or n == 0 for n in approximation.shape[-2:]):
        raise ValueError(
            f"data: expected multiples of {multiple} along both axes for level {level}, got {tuple(data.shape)}"
        )
    found: list[Any] = []
    for step in range(start_level, start_level + level):
        approximation, y = _one_level(approximation, Level(*taps, *_STATIONARY, 2**step), stack, backend)
        if stack:
            found.append(y.narrow(-3, 1, 3) if trim_approx else y)
        else:
            level_details = tuple(_from_last(band, at) for band in y[1:])
            found.append(level_details if trim_approx else (_from_last(approximation, at), level_details))
    found.reverse()
    return [_from_last(approximation, at), *found] if trim_approx else found


def iswt2(
    coeffs: Sequence[Any],
    wavelet: Any,
    norm: bool = False,
    axes: Sequence[int] = (-2, -1),
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Inverse of `swt2`, as `pywt.iswt2`: the mean of the inverses of all decimated transforms that it contains.

    Args:
        coeffs: result of `swt2` with start_level 0, stacked or not; without `trim_approx` only the coarsest
            approximation is read.
        wavelet, axes, backend: as in `dwt2`.
        norm: as it was in `swt2`.

    Returns:
        [..., H, W].

    Raises:
        ValueError, TypeError: an argument is not as described, or bands of a level differ in shape.
        BackendError: `backend` cannot run this call.
    """
    if not isinstance(coeffs, (tuple, list)) or not coeffs:
        raise ValueError(f"coeffs: expected a list of levels, got {type(coeffs).__name__} without levels")
    trimmed = not _full_level(coeffs[-1])
    stacked = isinstance(coeffs[-1], torch.Tensor) and not (trimmed and len(coeffs) == 1)
    x = coeffs[0] if trimmed else _approximation(coeffs[0])
    levels = list(coeffs[1:]) if trimmed else [_details(level) for level in coeffs]
    _check_tensor("coeffs", x)
    at = _both_axes(axes, x.ndim, stacked)
    # Mean over the two phases of each axis: half a transpose per axis.
    taps = _both_filters(wavelet, "rec", math.sqrt(0.5) if norm else 0.5)
    x = _to_last(x, at)
    for step, details in zip(reversed(range(len(levels))), levels, strict=True):
        bands = [None if band is None else _to_last(band, at) for band in _split(details)]
        four, shape = _bands((x, bands))
        x = _synthesis(four, Level(*taps, *_STATIONARY, 2**step), shape[-2:], backend).view(shape)
    return _from_last(x, at)


def _full_level(level: Any) -> bool:
    """Whether a level of `iswt2`'s argument carries its own approximation."""
    if isinstance(level, torch.Tensor):
        return level.ndim > 2 and level.shape[-3] == 4
    return isinstance(level, (tuple, list)) and len(level) == 2


def _approximation(level: Any) -> torch.Tensor:
    return level.select(-3, 0) if isinstance(level, torch.Tensor) else level[0]


def _details(level: Any) -> Details:
    return level.narrow(-3, 1, 3) if isinstance(level, torch.Tensor) else level[1]
