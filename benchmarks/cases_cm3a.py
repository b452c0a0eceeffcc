"""cm3a at the sizes of PAN-Crafter: 128 channels, 8 heads, window 3, maps of 1/2 to 1/8 of the PAN image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pansharp_fast import reference
from pansharp_fast.ops import cm3a
from pansharp_fast.ops._backends import candidates, reasons
from pansharp_fast.ops.cm3a import OPERATOR

from .registry import Case, Run, register

CHANNELS, HEADS, WINDOW = 128, 8, 3
DIM, COUNT = CHANNELS // HEADS, WINDOW**2
#: (what, batch, side of the map, learned neighbours, channels last)
CPU_SIZES = [
    ("256² PAN at 1/2", 1, 128, True, False),
    ("256² PAN at 1/2, channels last", 1, 128, True, True),
    ("256² PAN at 1/2, exact shift", 1, 128, False, False),
    ("256² PAN at 1/8", 1, 32, True, False),
    ("512² PAN at 1/2", 1, 256, True, False),
    ("96 patches of 64² at 1/4", 96, 16, True, False),
]
GPU_SIZES = [
    ("256² PAN at 1/2, batch 1", 1, 128, True, False),
    ("256² PAN at 1/2, batch 8", 8, 128, True, False),
    ("512² PAN at 1/2, batch 1", 1, 256, True, False),
    ("512² PAN at 1/2, batch 8", 8, 256, True, False),
    ("512² PAN at 1/2, batch 8, channels last", 8, 256, True, True),
    ("512² PAN at 1/2, batch 8, exact shift", 8, 256, False, False),
    ("96 patches of 64² at 1/2", 96, 32, True, False),
]


def _flops(batch: int, side: int, learned: bool, backward: bool) -> int:
    """Per pixel, head and modality: D*J*J for logits and as much for values; the backward does it six times."""
    unit = 2 * DIM * COUNT * (COUNT + 1 if learned else 1)
    return batch * side * side * HEADS * 2 * unit * (2 + 6 * backward)


def _natten(inputs: Sequence[torch.Tensor]) -> Run | None:
    """NATTEN's neighbourhood attention on both modalities, where it is installed."""
    try:
        from natten import na2d
    except ImportError:
        return None
    heads_last = [x.unflatten(1, (HEADS, DIM)).permute(0, 3, 4, 1, 2).contiguous() for x in inputs[:5]]
    q, k_pan, v_pan, k_ms, v_ms = heads_last
    return lambda: [na2d(q, k_pan, v_pan, kernel_size=WINDOW), na2d(q, k_ms, v_ms, kernel_size=WINDOW)]


@register("cm3a")
def cases(device: torch.device) -> Iterator[Case]:
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    for (what, batch, side, learned, channels_last), dtype in [(s, d) for s in sizes for d in _dtypes()]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        maps = [torch.randn(batch, CHANNELS, side, side, device=device).to(dtype) for _ in range(7)]
        maps = [x.contiguous(memory_format=layout) for x in maps]
        factor = []
        if learned:
            factor = [torch.randn(DIM, COUNT, WINDOW, WINDOW, device=device) / WINDOW]
            factor.append(torch.randn(DIM, COUNT, device=device))
            factor = [x.to(dtype) for x in factor]
        inputs, gradients = [*maps[:5], *factor], maps[5:]
        functions: dict[str, Any] = {"reference": reference.cm3a, "torch.compile": torch.compile(reference.cm3a)}
        for backend in candidates(device.type)[:-1]:
            if not reasons(OPERATOR, backend, inputs[:5]):
                functions[backend] = _on(backend)
        torch.compiler.reset()
        size = maps[0].numel() * maps[0].element_size()
        for backward in (False, True):
            columns = {name: _column(function, inputs, gradients, backward) for name, function in functions.items()}
            natten = _natten(inputs) if device.type == "cuda" and not learned and not backward else None
            if natten is not None:
                columns["NATTEN"] = natten
            yield Case(
                operator="cm3a",
                size=f"{what} [{batch}, {CHANNELS}, {side}, {side}]",
                dtype=dtype,
                work="forward+backward" if backward else "forward",
                columns=columns,
                tolerance=1e-4 if dtype == torch.float32 else 3e-2,
                traffic=size * (7 + 12 * backward),  # backward: reads 5 inputs and 2 gradients, writes 5
                flops=_flops(batch, side, learned, backward),
                ungated={"NATTEN": "moves windows inwards at borders instead of padding with zeros"},
            )


def _dtypes() -> tuple[torch.dtype, ...]:
    return torch.float32, torch.bfloat16


def _on(backend: str) -> Any:
    return lambda *inputs, **options: cm3a(*inputs, backend=backend, **options)


def _column(function: Any, inputs: list[torch.Tensor], gradients: list[torch.Tensor], backward: bool) -> Run:
    if not backward:

        def forward() -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return function(*inputs, num_heads=HEADS, window=WINDOW)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]

    def both() -> Sequence[torch.Tensor]:
        outputs = function(*leaves, num_heads=HEADS, window=WINDOW)
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]

    return both
