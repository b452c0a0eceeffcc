"""The classical methods as the field's toolbox computes them, to compare with: each named in `BASELINES`.

All take `pan` [B, 1, ratio*h, ratio*w] and `ms` [B, C, h, w], floating point, in digital numbers (or any linear scale),
and return [B, C, ratio*h, ratio*w] in the dtype of `ms`; they compute in float64. MS is up-sampled by `interp23` (phase
ratio / 2), filters are the toolbox's, nothing is registered: the formulas are those of `classical`. Means, variances
and regressions are taken over each whole image, so results depend on its extent. Shapes that do not fit raise
ValueError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from . import classical
from .data import Sensor, decimate, get_sensor, interp23, mtf_filter, mtf_kernel
from .data.grid import check_pair


def _textbook(
    method: str,
    pan: torch.Tensor,
    ms: torch.Tensor,
    sensor: str | Sensor = "default",
    ratio: int = 4,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    check_pair(pan, ms, ratio=ratio)
    sensor = get_sensor(sensor)
    wide, original = pan.double(), ms.double()
    piece = classical.Piece(wide, interp23(original, ratio))
    if method in classical.NEED_LOW:
        gains = sensor.gains(ms.shape[1])
        seen = mtf_filter(wide.expand(-1, len(gains), -1, -1), sensor, ratio)
        piece.low = interp23(decimate(seen, ratio), ratio)
        piece.gain = mtf_kernel(gains, ratio).to(wide.device).sum((1, 2)).view(-1, 1, 1)
    own = mtf_filter(wide, sensor, ratio, pan=True)
    found = classical.statistics(piece, original, decimate(own, ratio), original)
    if method == "mtf-glp-hpm":  # the toolbox takes this one deviation before decimation
        found.pan_spread = own.var((2, 3), keepdim=True)
    return classical.apply(method, piece, found, weights).to(ms.dtype)


def _named(method: str) -> Callable[..., torch.Tensor]:
    formula = classical.METHODS[method]
    function = functools.partial(_textbook, method)
    function.__doc__ = formula.__doc__
    return function


exp, brovey, gsa, bt_h, mtf_glp_hpm, mtf_glp_fs, mtf_glp_hpm_r = map(_named, classical.METHODS)

#: Name -> function(pan, ms, sensor="default", ratio=4).
BASELINES: dict[str, Callable[..., torch.Tensor]] = {
    "EXP": exp,
    "Brovey": brovey,
    "GSA": gsa,
    "MTF-GLP-HPM": mtf_glp_hpm,
    "MTF-GLP-FS": mtf_glp_fs,
    "MTF-GLP-HPM-R": mtf_glp_hpm_r,
    "BT-H": bt_h,
}
