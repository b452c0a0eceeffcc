"""The resampling steps of sharpening: a tile up-sampled, observed and blurred, and the windows of registration."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pansharp_fast.data.observation import blur, observe, resample, upsample
from pansharp_fast.ops import use_backend
from pansharp_fast.ops.resample import OPERATOR

from .registry import Case, column, kernels, register

TILE, RATIO = 1024, 4
#: Samples to each side of an output sample: of the interpolation, and of a Gaussian of 2 pixels.
TAPS = 22, 18


@register("resample")
def cases(device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    small, large = TILE // RATIO, (TILE, TILE)
    ms, x = torch.rand(1, 4, small, small, device=device), torch.rand(1, 4, *large, device=device)
    windows, wide = torch.rand(36, 4, 128, 128, device=device), torch.rand(36, 4, 88, 88, device=device)
    d = torch.tensor([[1.3, -0.7], [1.2, -0.6], [1.4, 0.3], [1.1, 0.0]], dtype=torch.float64)
    interpolation, gaussian = TAPS
    # (what, work, tensor, sums along H and along W, each of so many taps)
    works: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], torch.Tensor, int, int]] = [
        ("up-sampling a tile", lambda x: upsample(x, large, ratio=RATIO, d=d), ms, TILE * small, TILE * TILE),
        (
            "a tile as the sensor sees it",
            lambda x: observe(x, (small, small), gains=[0.3] * 4, ratio=RATIO, d=d),
            x,
            small * TILE,
            small * small,
        ),
        ("blurring a tile", lambda x: blur(x, 2.0), x, TILE * TILE, TILE * TILE),
        ("displacing windows", lambda x: resample(x, (128, 128), 12 + d, 0.5), wide, 128 * 88, 128 * 128),
        ("blurring windows", lambda x: blur(x, 2.0), windows, 128 * 128, 128 * 128),
    ]
    for what, work, tensor, down, across in works:

        def on(backend: str, work=work, tensor=tensor) -> Callable[[], torch.Tensor]:
            def run() -> torch.Tensor:
                with use_backend(backend):
                    return work(tensor)

            return run

        result = work(tensor)
        taps = gaussian if "blur" in what or "sensor" in what else interpolation
        yield Case(
            operator="resample",
            size=f"{what} {list(tensor.shape)} to {list(result.shape)}",
            dtype=torch.float32,
            work="forward",
            columns={name: column(on(name), [], [], "forward") for name in ("reference", *kernels(OPERATOR, [tensor]))},
            tolerance=1e-6,
            traffic=(tensor.numel() + result.numel()) * tensor.element_size(),
            flops=2 * taps * tensor.shape[0] * tensor.shape[1] * (down + across),
        )
