"""How images are shown to the eye: which bands, and one stretch for previews, reports, training logs and the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: Percentiles of a band that are shown black and full.
STRETCH = (2, 98)
#: Exponent that lifts dark tones.
GAMMA = 0.7


def natural_colours(names: Sequence[str | None]) -> tuple[int, int, int]:
    """Bands, counted from 0, to show as red, green and blue.

    Args:
        names: one a band, "" or None where it has none. Without red, green and blue among them the usual order of 4
            or 8 bands is taken.
    """
    known = [(name or "").strip().lower() for name in names]
    if {"red", "green", "blue"} <= set(known):
        return known.index("red"), known.index("green"), known.index("blue")
    if len(known) >= 8:
        return 4, 2, 1
    return (2, 1, 0) if len(known) >= 3 else (0, 0, 0)


def limits(image: NDArray[np.floating], valid: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The values of each band that are shown black and full, [2, C]; images to be compared share them.

    Args:
        image: [C, H, W]; NaN does not count.
        valid: [H, W], the pixels that count; None is all.
    """
    pixels = image.reshape(len(image), -1) if valid is None else image[:, valid]
    if not pixels.size or np.isnan(pixels).all():
        return np.array([[0.0] * len(image), [1.0] * len(image)])
    return np.nanpercentile(pixels, STRETCH, axis=1)


def stretch(
    image: NDArray[np.floating], shown: NDArray[np.float64], valid: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """[C, H, W] with values 0 to 1, `shown` [2, C] from `limits` at both ends; pixels without data are black."""
    low, high = shown[..., None, None]
    scaled = ((image - low) / np.maximum(high - low, 1e-6)).clip(0, 1) ** GAMMA
    return np.nan_to_num(scaled if valid is None else np.where(valid, scaled, 0))


def enlarge(image: NDArray[np.floating], factor: int) -> NDArray[np.floating]:
    """[C, H, W] with every pixel repeated, nothing interpolated: [C, factor * H, factor * W]."""
    return image.repeat(factor, 1).repeat(factor, 2)


def write(path: str | Path, image: NDArray[np.floating]) -> None:
    """Write [3, H, W] (or [1, H, W], grey) with values 0 to 1; PNG unless the suffix says JPEG."""
    from matplotlib.image import imsave

    pixels = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
    kind = "jpg" if Path(path).suffix.lower() in (".jpg", ".jpeg") else "png"
    imsave(path, np.ascontiguousarray((pixels * 255).round().astype(np.uint8)), format=kind)
