"""Wavelet transforms as modules; they hold no parameters and return stacked bands, which cost no copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops.wavelet import dwt2, idwt2, iswt2, swt2, wavedec2, waverec2


class DWT2d(nn.Module):
    """Discrete wavelet transform of the last two axes.

    Args:
        wavelet, mode: as in `pansharp_fast.ops.dwt2`.
        level: None for one level in one tensor; a number for the list of `wavedec2` with stacked details.
    """

    def __init__(self, wavelet: Any = "haar", mode: Any = "symmetric", level: int | None = None) -> None:
        super().__init__()
        self.wavelet, self.mode, self.level = wavelet, mode, level

    def forward(self, x: Tensor) -> Any:
        """[..., H, W] -> [..., 4, H', W'], or [cA_n, [..., 3, H_n, W_n], ..., [..., 3, H_1, W_1]] with `level`.

        Within a network, `flatten(1, 2)` makes [B, 4 C, H', W'] of the former without a copy.
        """
        if self.level is None:
            return dwt2(x, self.wavelet, self.mode, stack=True)
        return wavedec2(x, self.wavelet, self.mode, self.level, stack=True)

    def extra_repr(self) -> str:
        return f"{self.wavelet!r}, mode={self.mode!r}, level={self.level}"


class IDWT2d(nn.Module):
    """Inverse of `DWT2d`: takes a stacked tensor, (cA, (cH, cV, cD)), or the list of `wavedec2`."""

    def __init__(self, wavelet: Any = "haar", mode: Any = "symmetric") -> None:
        super().__init__()
        self.wavelet, self.mode = wavelet, mode

    def forward(self, coeffs: Tensor | Sequence[Any]) -> Tensor:
        """-> [..., H, W], with one sample more along axes whose length was odd."""
        if isinstance(coeffs, list):
            return waverec2(coeffs, self.wavelet, self.mode)
        return idwt2(coeffs, self.wavelet, self.mode)

    def extra_repr(self) -> str:
        return f"{self.wavelet!r}, mode={self.mode!r}"


class SWT2d(nn.Module):
    """Stationary wavelet transform of the last two axes.

    Args:
        wavelet, norm, trim_approx: as in `pansharp_fast.ops.swt2`.
        level: None for one level in one tensor; a number for the list of `swt2` with stacked bands.
    """

    def __init__(
        self, wavelet: Any = "haar", level: int | None = None, trim_approx: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        self.wavelet, self.level, self.trim_approx, self.norm = wavelet, level, trim_approx, norm

    def forward(self, x: Tensor) -> Any:
        """[..., H, W] -> [..., 4, H, W], or the list of levels, coarsest first, with `level`."""
        if self.level is None:
            return swt2(x, self.wavelet, 1, norm=self.norm, stack=True)[0]
        return swt2(x, self.wavelet, self.level, trim_approx=self.trim_approx, norm=self.norm, stack=True)

    def extra_repr(self) -> str:
        return f"{self.wavelet!r}, level={self.level}, trim_approx={self.trim_approx}, norm={self.norm}"


class ISWT2d(nn.Module):
    """Inverse of `SWT2d`."""

    def __init__(self, wavelet: Any = "haar", norm: bool = False) -> None:
        super().__init__()
        self.wavelet, self.norm = wavelet, norm

    def forward(self, coeffs: Tensor | Sequence[Any]) -> Tensor:
        """One level [..., 4, H, W], or a list of levels -> [..., H, W]."""
        return iswt2([coeffs] if isinstance(coeffs, Tensor) else coeffs, self.wavelet, self.norm)

    def extra_repr(self) -> str:
        return f"{self.wavelet!r}, norm={self.norm}"
