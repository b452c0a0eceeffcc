"""3x3 convolutions of residual blocks: group norm, SiLU, convolution, bias and residual, at inference.

The reference calls PyTorch's operators one after another; its convolution is oneDNN's on the CPU and cuDNN's on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pansharp_fast.ops import conv3x3, group_norm_factors
from pansharp_fast.ops.convolution import OPERATOR

from .registry import Case, column, kernels, register

#: (what, channels, outputs, side)
SIZES = (
    ("PAN-Crafter, 256² PAN", 128, 128, 256),
    ("PAN-Crafter's decoder, 256² PAN", 256, 128, 256),
    ("PAN-Crafter at 1/4, 256² PAN", 128, 128, 64),
    ("U-Know-DiffPAN, 256² PAN", 32, 32, 256),
)
GROUPS = 32


@register("conv3x3")
def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for what, channels, outputs, side in SIZES:
            torch.manual_seed(0)
            maps = [torch.randn(1, count, side, side, device=device) for count in (channels, outputs)]
            x, residual = (each.to(dtype).contiguous(memory_format=torch.channels_last) for each in maps)
            weight = (torch.randn(outputs, channels, 3, 3, device=device) / (9 * channels) ** 0.5).to(dtype)
            bias = torch.randn(outputs, device=device)

            def on(backend: str, x=x, weight=weight, bias=bias, residual=residual) -> Callable[[], torch.Tensor]:
                def block() -> torch.Tensor:
                    scale, shift = group_norm_factors(x, GROUPS, backend=backend)
                    return conv3x3(
                        x, weight, bias, scale=scale, shift=shift, silu=True, residual=residual, backend=backend
                    )

                return block

            torch.compiler.reset()
            ways = {"reference": on("reference"), "torch.compile": torch.compile(on("reference"))}
            ways |= {backend: on(backend) for backend in kernels(OPERATOR, [x, weight])}
            yield Case(
                operator="conv3x3",
                size=f"{what} [1, {channels}, {side}, {side}] to {outputs}",
                dtype=dtype,
                work="forward",
                columns={name: column(way, [], [], "forward") for name, way in ways.items()},
                tolerance=1e-5 if dtype == torch.float32 else 1e-2,
                traffic=(x.numel() + 2 * residual.numel() + weight.numel()) * x.element_size(),
                flops=2 * 9 * channels * outputs * side * side,
            )
