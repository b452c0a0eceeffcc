"""frequency_attention at the sizes of U-Know-DiffPAN's teacher: 64 channels, 8 heads; the FFTs alone beside it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from pansharp_fast import reference
from pansharp_fast.ops import frequency_attention
from pansharp_fast.ops.frequency_attention import OPERATOR
from pansharp_fast.reference.frequency_attention import polar, self_conjugate

from .registry import Case, Run, column, kernels, register

CHANNELS, HEADS = 64, 8
DEPTH = CHANNELS // HEADS
#: (what, batch, side)
SIZES = [("256² PAN", 1, 256), ("512² PAN", 1, 512), ("32 patches of 64²", 32, 64)]


@register("frequency_attention")
def cases(device: torch.device) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for (what, batch, side), dtype in [(size, dtype) for size in SIZES for dtype in dtypes]:
        *inputs, gradient = (torch.randn(batch, CHANNELS, side, side, device=device).to(dtype) for _ in range(4))
        plain = partial(reference.frequency_attention, num_heads=HEADS)
        functions: dict[str, Any] = {"reference": plain, "torch.compile": torch.compile(plain)}
        for backend in kernels(OPERATOR, inputs):
            functions[backend] = partial(frequency_attention, num_heads=HEADS, backend=backend)
        torch.compiler.reset()
        size = gradient.numel() * gradient.element_size()
        pixels = batch * CHANNELS * side * side
        for work, tensors, transforms, products in (("forward", 4, 4, 2), ("forward+backward", 11, 11, 10)):
            columns = {name: column(function, inputs, [gradient], work) for name, function in functions.items()}
            columns["FFTs alone"] = _transforms(inputs[0].float(), transforms)
            yield Case(
                operator="frequency_attention",
                size=f"{what} [{batch}, {CHANNELS}, {side}, {side}]",
                dtype=dtype,
                work=work,
                columns=columns,
                # Softmaxes of sums over the whole image are steep: rounding of the logits comes through.
                tolerance=3e-2,
                traffic=size * tensors,
                # Both parts, over half the frequencies: Gram and product; the backward does that again and twice more.
                flops=pixels // 2 * DEPTH * 2 * 2 * products,
                ungated={"FFTs alone": f"{transforms} transforms of this size and nothing else"},
            )
    for what, batch, side in SIZES:
        yield from _passes(what, batch, side, device)


def _passes(what: str, batch: int, side: int, device: torch.device) -> Iterator[Case]:
    """The two passes between the transforms, which move two spectra each."""
    shape = (batch, CHANNELS, side, side // 2 + 1)
    spectra = [torch.randn(*shape, 2, device=device) for _ in range(3)]
    attention = torch.softmax(torch.randn(batch, HEADS, 2, DEPTH, DEPTH, device=device), -1)
    real = self_conjugate(side, side, device)

    def parts(spectrum: torch.Tensor) -> list[torch.Tensor]:
        both = polar(torch.view_as_complex(spectrum), real)
        return [part.view(batch, HEADS, DEPTH, -1) for part in both]

    def gram(q: torch.Tensor, k: torch.Tensor, *_: Any) -> torch.Tensor:
        pairs = zip(parts(q), parts(k), strict=True)
        return torch.stack([query @ key.transpose(-1, -2) for query, key in pairs], 2)

    def apply(v: torch.Tensor, attention: torch.Tensor, *_: Any) -> None:
        mixed = [attention[:, :, index] @ part for index, part in enumerate(parts(v))]
        v.copy_(torch.view_as_real(torch.polar(*mixed)).view(v.shape))

    for name, plain in (("gram", gram), ("apply", apply)):
        ways: dict[str, Any] = {"reference": plain}
        for backend in kernels(OPERATOR, spectra):
            home: Any = torch.ops.pansharp_fast
            if backend == "triton":
                home = importlib.import_module("pansharp_fast.kernels.frequency_attention")
            ways[backend] = getattr(home, f"frequency_attention_{name}")

        def run(way: Any, name: str = name, v: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
            if name == "gram":
                return [way(*spectra[:2], HEADS, side)]
            way(v, attention, HEADS, side)  # in place: only the first call, which is compared, starts from spectra[2]
            return [v]

        yield Case(
            operator="frequency_attention",
            size=f"{name} alone, {what} {list(shape)}",
            dtype=torch.float32,
            work="forward",
            columns={key: partial(run, way, v=spectra[2].clone()) for key, way in ways.items()},
            tolerance=1e-4,
            traffic=2 * spectra[0].numel() * 4,
            flops=2 * DEPTH * spectra[0].numel(),  # amplitudes and phases
        )


def _transforms(x: torch.Tensor, count: int) -> Run:
    def run() -> Sequence[torch.Tensor]:
        return [torch.fft.rfft2(x, norm="ortho").real for _ in range(count)][-1:]

    return run
