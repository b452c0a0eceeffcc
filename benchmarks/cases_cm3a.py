"""cm3a at the sizes of PAN-Crafter: 128 channels, 8 heads, window 3, maps of 1/2 to 1/8 of the PAN image.

A batch of 8 at 512² PAN is for GPUs: the reference expands it to more than 24 GB.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from pansharp_fast import reference
from pansharp_fast.ops import cm3a
from pansharp_fast.ops.cm3a import OPERATOR

from .registry import Case, Run, column, kernels, register

CHANNELS, HEADS, WINDOW = 128, 8, 3
DIM, COUNT = CHANNELS // HEADS, WINDOW**2
DTYPES = torch.float32, torch.bfloat16
#: (what, batch, side of the map, learned neighbours, channels last)
CPU_SIZES = [
    ("256² PAN at 1/2", 1, 128, True, False),
    ("256² PAN at 1/2, channels last", 1, 128, True, True),
    ("256² PAN at 1/2, exact shift", 1, 128, False, False),
    ("256² PAN at 1/2, batch 8", 8, 128, True, False),
    ("256² PAN at 1/8", 1, 32, True, False),
    ("512² PAN at 1/2", 1, 256, True, False),
    ("512² PAN at 1/2, batch 8", 8, 256, True, False),
    ("96 patches of 64² at 1/2", 96, 32, True, False),
]
#: Pixels of a CPU case with a backward: of more the compiled reference takes 26 GB.
CPU_PIXELS = 2**18
GPU_SIZES = [
    ("256² PAN at 1/2, batch 1", 1, 128, True, False),
    ("256² PAN at 1/2, batch 8", 8, 128, True, False),
    ("512² PAN at 1/2, batch 1", 1, 256, True, False),
    ("512² PAN at 1/2, batch 8", 8, 256, True, False),
    ("512² PAN at 1/2, batch 8, channels last", 8, 256, True, True),
    ("512² PAN at 1/2, batch 8, exact shift", 8, 256, False, False),
    ("96 patches of 64² at 1/2", 96, 32, True, False),
]


#: (work, tensors read and written, products of values with the neighbours of values): the backward reads 5 inputs and
#: 2 gradients and writes 5; it does the forward's two products again and four more.
WORKS = (("forward", 7, 2), ("backward", 12, 6), ("forward+backward", 19, 8))


def _product(batch: int, side: int, learned: bool) -> int:
    """Operations of one product, per pixel, head and modality D J J, or D J for the exact shift."""
    return batch * side * side * HEADS * 2 * 2 * DIM * COUNT * (COUNT + 1 if learned else 1)


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
    for (what, batch, side, learned, channels_last), dtype in itertools.product(sizes, DTYPES):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        maps = [torch.randn(batch, CHANNELS, side, side, device=device).to(dtype) for _ in range(7)]
        maps = [x.contiguous(memory_format=layout) for x in maps]
        factor = []
        if learned:
            factor = [torch.randn(DIM, COUNT, WINDOW, WINDOW, device=device) / WINDOW]
            factor.append(torch.randn(DIM, COUNT, device=device))
            factor = [x.to(dtype) for x in factor]
        inputs, gradients = [*maps[:5], *factor], maps[5:]
        options = {"num_heads": HEADS, "window": WINDOW}
        plain = partial(reference.cm3a, **options)
        functions: dict[str, Any] = {"reference": plain, "torch.compile": torch.compile(plain)}
        for backend in kernels(OPERATOR, inputs[:5]):
            functions[backend] = partial(cm3a, backend=backend, **options)
        torch.compiler.reset()
        size = maps[0].numel() * maps[0].element_size()
        too_big = device.type == "cpu" and batch * side**2 > CPU_PIXELS
        for work, tensors, products in WORKS[:1] if too_big else WORKS:
            columns = {name: column(function, inputs, gradients, work) for name, function in functions.items()}
            natten = _natten(inputs) if device.type == "cuda" and not learned and work == "forward" else None
            if natten is not None:
                columns["NATTEN"] = natten
            yield Case(
                operator="cm3a",
                size=f"{what} [{batch}, {CHANNELS}, {side}, {side}]",
                dtype=dtype,
                work=work,
                columns=columns,
                tolerance=1e-4 if dtype == torch.float32 else 3e-2,
                traffic=size * tensors,
                flops=products * _product(batch, side, learned),
                ungated={"NATTEN": "moves windows inwards at borders instead of padding with zeros"},
            )
