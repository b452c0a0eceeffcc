"""A model that stands in for a network: bicubic MS plus PAN's detail through random 3x3 convolutions."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LocalModel(nn.Module):
    """Depends on PAN within 8 pixels and on MS within 3; every output is finite and follows the input's scale."""

    #: Where the first MS pixel's centre lies on PAN's grid: `F.interpolate` aligns pixel areas.
    phase = 1.5

    def __init__(self, bands: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(bands=bands)
        generator = torch.Generator().manual_seed(3)
        self.kernel = nn.Parameter(torch.randn(bands, 1, 3, 3, generator=generator), requires_grad=False)
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def sharpen(self, pan: Tensor, ms: Tensor, peak: float) -> Tensor:
        self.calls.append((tuple(pan.shape), tuple(ms.shape)))
        detail = pan - F.avg_pool2d(F.pad(pan, (7, 7, 7, 7), mode="replicate"), 15, stride=1)
        detail = F.conv2d(F.pad(detail, (1, 1, 1, 1), mode="replicate"), self.kernel)
        return F.interpolate(ms, scale_factor=4, mode="bicubic") + 0.2 * detail
