"""Wavelet transforms on every backend against PyWavelets, and the algebra that they must obey."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pansharp_fast.ops import dwt2, idwt2
from pansharp_fast.ops._backends import reasons
from pansharp_fast.ops.wavelet import MODES, OPERATOR

ALL_MODES = MODES[:-1]
WAVELETS = pywt.wavelist(kind="discrete")
SHORT = [name for name in WAVELETS if pywt.Wavelet(name).dec_len <= 12]
SIZES = [1, 2, 3, 5, 6, 7, 16, 31, 63, 64, 65, 130]


def _usable(backend: str) -> bool:
    return not reasons(OPERATOR, backend, [torch.zeros(1)], mode="zero")


BACKENDS = [name for name in OPERATOR.support if _usable(name)]
backends = pytest.mark.parametrize("backend", BACKENDS)


def _covered(backend: str, *modes: str) -> bool:
    return not reasons(OPERATOR, backend, [torch.zeros(1)], mode=modes)


def _close(actual: torch.Tensor, expected: Any, scale: float | None = None) -> None:
    expected = torch.as_tensor(np.asarray(expected))
    assert actual.shape == expected.shape
    if expected.numel():
        # The filter tables themselves are exact to about 1e-12 only: cancelling sums show it.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * max(1.0, float(expected.abs().max())))


def _nested(coeffs: Any) -> Any:
    """PyWavelets' nested arrays as nested tensors."""
    if isinstance(coeffs, (list, tuple)):
        return type(coeffs)(_nested(each) for each in coeffs)
    return torch.from_numpy(np.ascontiguousarray(coeffs))


def _flat(coeffs: Any) -> list[Any]:
    if isinstance(coeffs, (list, tuple)):
        return [leaf for each in coeffs for leaf in _flat(each)]
    return [coeffs]


def _all_close(actual: Any, expected: Any) -> None:
    actual, expected = _flat(actual), _flat(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        _close(a, e)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@backends
@settings(max_examples=60, deadline=None)
@given(
    wavelet=st.sampled_from(WAVELETS),
    mode=st.sampled_from(ALL_MODES),
    height=st.sampled_from(SIZES),
    width=st.sampled_from(SIZES),
    seed=st.integers(0, 99),
)
def test_dwt2_is_pywavelets(backend: str, wavelet: str, mode: str, height: int, width: int, seed: int) -> None:
    if not _covered(backend, mode, mode) or (mode.endswith("reflect") and min(height, width) < 2):
        return
    x = _random(2, height, width, seed=seed)
    expected = pywt.dwt2(x.numpy(), wavelet, mode)
    _all_close(dwt2(x, wavelet, mode, backend=backend), expected)
    _close(idwt2(_nested(expected), wavelet, mode, backend=backend), pywt.idwt2(expected, wavelet, mode))
