"""Wavelet transforms against the ways in which people do them today.

ptwt and pytorch_wavelets take part where they are installed.
On the CPU a result of 32 MiB or more is fresh memory at every call, and page faults are much of every column's time;
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment shows the transforms themselves.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import conv2d

from pansharp_fast.ops import iswt2, swt2, wavedec2, waverec2
from pansharp_fast.ops.wavelet import OPERATOR, _filters
from pansharp_fast.reference.wavelet import extension, geometry

from .registry import Case, Run, kernels, register

MODE = "symmetric"
SHAPES = ((4, 32, 256, 256), (1, 1, 4096, 4096))
#: (wavelet, levels, shape)
DECOMPOSITIONS = tuple(itertools.product(("haar", "db2", "db4", "bior4.4"), (1, 3), SHAPES))
STATIONARY = tuple(itertools.product(("haar",), (1, 3), SHAPES))


def flat(coeffs: Any) -> list[torch.Tensor]:
    """All bands of nested coefficients, in order."""
    if isinstance(coeffs, (list, tuple)):
        return [leaf for each in coeffs for leaf in flat(each)]
    return [torch.as_tensor(coeffs)]


def _conv_decomposition(wavelet: str, levels: int) -> Any:
    """The usual formulation: pad by indexing, then one strided convolution with four outer products."""
    taps = torch.tensor(_filters(wavelet, "dec")).view(2, -1)
    length = taps.shape[1]
    kernels = torch.stack([torch.outer(taps[y], taps[x]) for x in (0, 1) for y in (0, 1)]).flip(1, 2)[:, None]

    def index(n: int, device: torch.device) -> torch.Tensor:
        count = geometry(n, length, MODE)[2]
        return extension(torch.arange(2 - length, 2 * count), n, MODE).argmax(1).to(device)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        weight = kernels.to(x)
        for _ in range(levels):
            if length > 2 or x.shape[-1] % 2 or x.shape[-2] % 2:
                x = x[..., index(x.shape[-2], x.device), :][..., index(x.shape[-1], x.device)]
            y = conv2d(x.flatten(0, -3)[:, None], weight, stride=2)
            y = y.view(*x.shape[:-2], *y.shape[1:])
            found = [*y[..., 1:, :, :].unbind(-3), *found]
            x = y[..., 0, :, :]
        return [x, *found]

    return run


def _case(size: str, columns: dict[str, Run], x: torch.Tensor, moved: int) -> Case:
    return Case(
        operator="wavelet",
        size=f"{size} {list(x.shape)}",
        dtype=x.dtype,
        work="forward",
        columns=columns,
        tolerance=1e-5,
        traffic=moved * x.element_size(),
        flops=0,
    )


def _decompositions(device: torch.device) -> Iterator[Case]:
    import pywt

    for wavelet, levels, shape in DECOMPOSITIONS:
        x = torch.randn(shape, device=device)
        columns: dict[str, Run] = {}

        def ours(backend: str, x: torch.Tensor = x, wavelet: str = wavelet, levels: int = levels) -> Run:
            return lambda: flat(wavedec2(x, wavelet, MODE, levels, backend=backend))

        convolve = _conv_decomposition(wavelet, levels)
        columns["reference"] = ours("reference")
        columns["conv2d"] = lambda f=convolve, x=x: f(x)
        torch.compiler.reset()
        compiled = torch.compile(convolve)
        columns["conv2d, torch.compile"] = lambda f=compiled, x=x: f(x)
        if importlib.util.find_spec("ptwt") is not None:
            import ptwt

            columns["ptwt"] = lambda x=x, w=wavelet, n=levels: flat(ptwt.wavedec2(x, w, mode=MODE, level=n))
        if importlib.util.find_spec("pytorch_wavelets") is not None:
            columns["pytorch_wavelets"] = _pytorch_wavelets(x, wavelet, levels)
        if device.type == "cpu":
            columns["PyWavelets"] = lambda x=x, w=wavelet, n=levels: flat(pywt.wavedec2(x.numpy(), w, MODE, n))
        for backend in kernels(OPERATOR, [x], mode=MODE):
            columns[backend] = ours(backend)
        moved = sum(band.numel() for band in flat(wavedec2(x, wavelet, MODE, levels))) + x.numel()
        yield _case(f"{wavelet} DWT, {levels} level{'s' * (levels > 1)},", columns, x, moved)
        if levels == 1:
            coeffs = wavedec2(x, wavelet, MODE, 1)
            inverse: dict[str, Run] = {
                "reference": lambda c=coeffs, w=wavelet: [waverec2(c, w, MODE, backend="reference")]
            }
            if "ptwt" in columns:
                inverse["ptwt"] = lambda c=coeffs, w=wavelet: [ptwt.waverec2((c[0], _details(c[1])), w)]
            if device.type == "cpu":
                arrays = [coeffs[0].numpy(), tuple(band.numpy() for band in coeffs[1])]
                inverse["PyWavelets"] = lambda c=arrays, w=wavelet: flat(pywt.waverec2(c, w, MODE))
            for backend in kernels(OPERATOR, [x], mode=MODE):
                inverse[backend] = lambda c=coeffs, w=wavelet, b=backend: [waverec2(c, w, MODE, backend=b)]
            yield _case(f"{wavelet} inverse DWT, 1 level,", inverse, x, moved)


def _details(bands: Sequence[torch.Tensor]) -> Any:
    from ptwt.constants import WaveletDetailTuple2d

    return WaveletDetailTuple2d(*bands)


def _pytorch_wavelets(x: torch.Tensor, wavelet: str, levels: int) -> Run:
    from pytorch_wavelets import DWTForward

    transform = DWTForward(J=levels, wave=wavelet, mode=MODE).to(x.device)

    def run() -> list[torch.Tensor]:
        low, high = transform(x)
        return [low, *(band for bands in reversed(high) for band in bands.unbind(2))]

    return run


def _stationary(device: torch.device) -> Iterator[Case]:
    import pywt

    for wavelet, levels, shape in STATIONARY:
        x = torch.randn(shape, device=device)
        columns: dict[str, Run] = {
            "reference": lambda x=x, w=wavelet, n=levels: flat(swt2(x, w, n, backend="reference")),
        }
        if device.type == "cpu":
            columns["PyWavelets"] = lambda x=x, w=wavelet, n=levels: flat(pywt.swt2(x.numpy(), w, n))
        for backend in kernels(OPERATOR, [x], mode=MODE):
            columns[backend] = lambda x=x, w=wavelet, n=levels, b=backend: flat(swt2(x, w, n, backend=b))
        yield _case(f"{wavelet} SWT, {levels} level{'s' * (levels > 1)},", columns, x, 5 * levels * x.numel())
        if levels == 1:
            coeffs = swt2(x, wavelet, 1)
            inverse: dict[str, Run] = {"reference": lambda c=coeffs, w=wavelet: [iswt2(c, w, backend="reference")]}
            for backend in kernels(OPERATOR, [x], mode=MODE):
                inverse[backend] = lambda c=coeffs, w=wavelet, b=backend: [iswt2(c, w, backend=b)]
            yield _case(f"{wavelet} inverse SWT, 1 level,", inverse, x, 5 * x.numel())


@register("wavelet")
def cases(device: torch.device) -> Iterator[Case]:
    """Float32, decomposition and reconstruction."""
    kept = " (memory kept)" if os.environ.get("MALLOC_MMAP_THRESHOLD_") else ""
    for each in itertools.chain(_decompositions(device), _stationary(device)):
        yield replace(each, size=each.size + kept)
