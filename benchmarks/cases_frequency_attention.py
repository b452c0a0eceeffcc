"""frequency_attention at the sizes of U-Know-DiffPAN's teacher: 64 channels, 8 heads; the FFTs alone beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pansharp_fast import reference
from pansharp_fast.ops import frequency_attention
from pansharp_fast.ops._backends import candidates, reasons
from pansharp_fast.ops.frequency_attention import OPERATOR

from .registry import Case, Run, register

CHANNELS, HEADS = 64, 8
DEPTH = CHANNELS // HEADS
#: (what, batch, side)
SIZES = [("256² PAN", 1, 256), ("512² PAN", 1, 512), ("32 patches of 64²", 32, 64)]


@register("frequency_attention")
def cases(device: torch.device) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for (what, batch, side), dtype in [(size, dtype) for size in SIZES for dtype in dtypes]:
        *inputs, gradient = (torch.randn(batch, CHANNELS, side, side, device=device).to(dtype) for _ in range(4))
        functions: dict[str, Any] = {
            "reference": reference.frequency_attention,
            "torch.compile": torch.compile(reference.frequency_attention),
        }
        for backend in candidates(device.type)[:-1]:
            if not reasons(OPERATOR, backend, inputs):
                functions[backend] = _on(backend)
        torch.compiler.reset()
        size = gradient.numel() * gradient.element_size()
        pixels = batch * CHANNELS * side * side
        for backward in (False, True):
            columns = {name: _column(function, inputs, gradient, backward) for name, function in functions.items()}
            transforms = 11 if backward else 4
            columns["FFTs alone"] = _transforms(inputs[0].float(), transforms)
            yield Case(
                operator="frequency_attention",
                size=f"{what} [{batch}, {CHANNELS}, {side}, {side}]",
                dtype=dtype,
                work="forward+backward" if backward else "forward",
                columns=columns,
                # Softmaxes of sums over the whole image are steep: rounding of the logits comes through.
                tolerance=3e-2,
                traffic=size * (4 + 7 * backward),
                # Both parts, over half the frequencies: Gram and product; the backward does that again and twice more.
                flops=pixels // 2 * DEPTH * 2 * 2 * (2 + 8 * backward),
                ungated={"FFTs alone": f"{transforms} transforms of this size and nothing else"},
            )


def _on(backend: str) -> Any:
    return lambda *inputs, **options: frequency_attention(*inputs, backend=backend, **options)


def _transforms(x: torch.Tensor, count: int) -> Run:
    def run() -> Sequence[torch.Tensor]:
        return [torch.fft.rfft2(x, norm="ortho").real for _ in range(count)][-1:]

    return run


def _column(function: Any, inputs: list[torch.Tensor], gradient: torch.Tensor, backward: bool) -> Run:
    if not backward:

        def forward() -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return [function(*inputs, num_heads=HEADS)]

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]

    def both() -> Sequence[torch.Tensor]:
        output = function(*leaves, num_heads=HEADS)
        return [output, *torch.autograd.grad(output, leaves, gradient)]

    return both
