"""Pictures of a scene: natural colours stretched alike for every method, one enlarged part, error maps."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .. import pictures as shared
from ..data.observation import upsample
from ..files import atomic
from .scenes import Scene

#: Side of the enlarged part, in pixels.
ZOOM = 64


def slug(label: str) -> str:
    """`label` as part of a file name."""
    return re.sub(r"[^\w.-]", "_", label)


def path(stem: Path, label: str, kind: str) -> Path:
    """File of picture `kind` (rgb, zoom, error) of method `label`."""
    return stem.with_name(f"{stem.name}-{slug(label)}-{kind}.png")


def exist(stem: Path, label: str) -> bool:
    """Whether the pictures of a method are there."""
    return path(stem, label, "rgb").exists() and path(stem, label, "zoom").exists()


def _save(file: Path, image: NDArray[np.floating]) -> None:
    """As `pictures.write`, whole or not at all."""
    with atomic(file) as part:
        shared.write(part, image)


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
    height, width = scene.pan.shape[2:]
    rows = (
        torch.arange(height).float().sub(scene.phase[0]).div(scene.ratio).round().long().clamp(0, scene.ms.shape[2] - 1)
    )
    columns = torch.arange(width).float().sub(scene.phase[1]).div(scene.ratio).round().long()
    ms = _colours(scene.ms, rgb)[:, rows][..., columns.clamp(0, scene.ms.shape[3] - 1)].numpy()
    pan = scene.pan[0].numpy()
    shown = [("PAN", pan, shared.limits(pan)), ("MS", ms, _limits(scene, rgb))]
    if scene.gt is not None:
        shown.append(("GT", _colours(scene.gt, rgb).numpy(), _limits(scene, rgb)))
    for label, image, ends in shown:
        _show(stem, label, shared.stretch(image, ends), scene)


def _limits(scene: Scene, rgb: tuple[int, int, int]) -> NDArray[np.float64]:
    """The stretch of everything that a scene shows: that of its ground truth, else of MS."""
    return shared.limits(_colours(scene.ms if scene.gt is None else scene.gt, rgb).numpy())


def _show(stem: Path, label: str, image: NDArray[np.float64], scene: Scene) -> None:
    """A stretched picture and its enlarged part."""
    rows, columns = _window(scene)
    _save(path(stem, label, "zoom"), image[:, rows, columns])
    _save(path(stem, label, "rgb"), image)


def result(stem: Path, label: str, fused: torch.Tensor, scene: Scene, rgb: tuple[int, int, int]) -> None:
    """Pictures of a method's result [1, C, H, W], stretched as the reference is.

    Error maps show the mean of |fused - gt| over bands; their white is the 99th percentile of the interpolated image's.
    """
    if scene.gt is not None:
        from matplotlib import colormaps

        plain = upsample(scene.ms, (scene.gt.shape[2], scene.gt.shape[3]), ratio=scene.ratio, phase=scene.phase)
        error, usual = ((image - scene.gt).abs().mean(1)[0].numpy() for image in (fused, plain))
        top = max(float(np.nanpercentile(usual, 99)), 1e-9)
        _save(path(stem, label, "error"), np.moveaxis(colormaps["magma"](np.nan_to_num(error / top))[..., :3], -1, 0))
    _show(stem, label, shared.stretch(_colours(fused, rgb).numpy(), _limits(scene, rgb)), scene)
