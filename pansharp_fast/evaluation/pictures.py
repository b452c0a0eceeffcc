"""Pictures of a scene: natural colours stretched alike for every method, one enlarged part, error maps."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import interp23
from ..files import atomic
from .scenes import Scene

#: Side of the enlarged part, in pixels.
ZOOM = 64
#: Shown percentiles of the reference.
STRETCH = (1, 99)


def slug(label: str) -> str:
    """`label` as part of a file name."""
    return re.sub(r"[^\w.-]", "_", label)


def path(stem: Path, label: str, kind: str) -> Path:
    """File of picture `kind` (rgb, zoom, error) of method `label`."""
    return stem.with_name(f"{stem.name}-{slug(label)}-{kind}.png")


def exist(stem: Path, label: str) -> bool:
    """Whether the pictures of a method are there."""
    return path(stem, label, "rgb").exists() and path(stem, label, "zoom").exists()


def _limits(image: torch.Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = np.nanpercentile(image.numpy(), STRETCH, axis=(1, 2), keepdims=True)
    return low, np.maximum(high, low + 1e-9)


def _save(file: Path, image: NDArray[np.float64], colours: str | None = None) -> None:
    """[3, H, W] or [H, W] with values 0..1 as PNG, through a colour table where one is named; whole or not at all."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    image = np.nan_to_num(image).clip(0, 1)
    if image.ndim == 2:
        pixels = colormaps[colours or "gray"](image)[..., :3]
    else:
        pixels = np.moveaxis(image, 0, -1)
    with atomic(file) as part:
        imsave(part, np.ascontiguousarray((pixels * 255).round().astype(np.uint8)), format="png")


def _window(scene: Scene) -> tuple[slice, slice]:
    """Where PAN varies most: the part worth enlarging."""
    pan = scene.pan[0, 0]
    height, width = (min(ZOOM, n) for n in pan.shape)
    tiles = pan.unfold(0, height, max(1, height // 2)).unfold(1, width, max(1, width // 2))
    spread = tiles.std((-1, -2)).nan_to_num()
    row, column = divmod(int(spread.argmax()), spread.shape[1])
    top, left = row * max(1, height // 2), column * max(1, width // 2)
    return slice(top, top + height), slice(left, left + width)


def _colours(image: torch.Tensor, rgb: tuple[int, int, int]) -> torch.Tensor:
    """[3, H, W] of an image [1, C, H, W]; one or two bands are shown in grey."""
    return image[0, list(rgb)] if image.shape[1] > max(rgb) else image[0, :1].expand(3, -1, -1)


def reference(stem: Path, scene: Scene, rgb: tuple[int, int, int]) -> None:
    """PAN, MS (pixels repeated) and ground truth of a scene."""
    rows, columns = _window(scene)
    pan = scene.pan[0].expand(3, -1, -1)
    ms = _colours(scene.ms, rgb).repeat_interleave(4, 1).repeat_interleave(4, 2)
    shown = [("PAN", pan, pan), ("MS", ms, _target(scene, rgb))]
    if scene.gt is not None:
        shown.append(("GT", _target(scene, rgb), _target(scene, rgb)))
    for label, image, against in shown:
        low, high = _limits(against)
        stretched = (image.numpy() - low) / (high - low)
        _save(path(stem, label, "zoom"), stretched[:, rows, columns])
        _save(path(stem, label, "rgb"), stretched)


def _target(scene: Scene, rgb: tuple[int, int, int]) -> torch.Tensor:
    """What the stretch is taken from: ground truth, else upsampled MS."""
    return _colours(interp23(scene.ms) if scene.gt is None else scene.gt, rgb)


def result(stem: Path, label: str, fused: torch.Tensor, scene: Scene, rgb: tuple[int, int, int]) -> None:
    """Pictures of a method's result [1, C, H, W], stretched as the reference is.

    Error maps show the mean of |fused - gt| over bands; their white is the 99th percentile of the interpolated image's.
    """
    rows, columns = _window(scene)
    low, high = _limits(_target(scene, rgb))
    stretched = (_colours(fused, rgb).numpy() - low) / (high - low)
    if scene.gt is not None:
        plain = (interp23(scene.ms) - scene.gt).abs().mean(1)[0]
        top = max(float(np.nanpercentile(plain.numpy(), 99)), 1e-9)
        _save(path(stem, label, "error"), (fused - scene.gt).abs().mean(1)[0].numpy() / top, "magma")
    _save(path(stem, label, "zoom"), stretched[:, rows, columns])
    _save(path(stem, label, "rgb"), stretched)
