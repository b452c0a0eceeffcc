"""3x3 convolutions of the diffusion networks, which are most of their arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._backends import requested

#: From these sizes on Winograd's fewer multiplications outweigh its transforms.
_CHANNELS, _PIXELS = 24, 64 * 64


class Conv3x3(nn.Conv2d):
    """3x3 convolution with a border of zeros and stride 1.

    At inference in float32 on the CPU large maps go through NNPACK's Winograd kernels, as PyTorch ships them: half
    the time of its direct kernels or less, with a rounding error of 1e-5 of the largest value instead of 1e-6.
    `torch.backends.nnpack.set_flags(False)` and the backend "reference" keep the direct kernels.
    """

    def __init__(self, channels: int, out: int, bias: bool = True) -> None:
        super().__init__(channels, out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self._winograd(x):
            return torch._nnpack_spatial_convolution(x, self.weight, self.bias, 1)
        return super().forward(x)

    def _winograd(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and min(self.in_channels, self.out_channels) >= _CHANNELS
            and x.shape[0] > 0
            and x.shape[-2] * x.shape[-1] >= _PIXELS
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and requested()[0] != "reference"
            and torch._C._get_nnpack_enabled()
            and torch._nnpack_available()
        )
