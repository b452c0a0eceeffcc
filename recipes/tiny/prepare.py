"""Simulated training data for the shipped `tiny` weights, from openly licensed aerial and Sentinel-2 images.

    python recipes/tiny/prepare.py OPEN_IMAGERY OUT_FOLDER

Writes train.h5, valid.h5 and test.h5 in the PanCollection layout (gt, ms, pan; peak 2047). Every image is turned into
several pretended acquisitions: ground resolution, sharpness, spectral mixture of PAN, radiometry, noise and the shift
between PAN and MS are drawn at random, widely, so that the network meets sensors as different as possible. The seed
fixes every file. Whole cities are held out: Bishop and Eureka for validation, Riverside for the test.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import h5py
import numpy as np
import rasterio
import torch

PEAK = 2047
RATIO = 4
VALID_CITIES = ("bishop", "eureka")
TEST_CITIES = ("riverside",)
PAD = 24  # mirrored pixels around an image before its Fourier transform


def uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None) -> np.ndarray:
    return rng.uniform(low, high, size)


def log_uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None) -> np.ndarray:
    return np.exp(rng.uniform(math.log(low), math.log(high), size))


def transfer(shape: tuple[int, int], gains: np.ndarray, ratio: float, shifts: np.ndarray) -> torch.Tensor:
    """[n, H, W//2+1] Gaussians with gain `gains[i]` at frequency 1/(2 ratio), and a shift in pixels."""
    fy = torch.fft.fftfreq(shape[0], dtype=torch.float64)[:, None]
    fx = torch.fft.rfftfreq(shape[1], dtype=torch.float64)[None, :]
    gains = torch.from_numpy(np.atleast_1d(gains).astype(np.float64))[:, None, None]
    shifts = torch.from_numpy(np.atleast_2d(shifts).astype(np.float64))[:, :, None, None]
    gauss = torch.exp(torch.log(gains) * (fy**2 + fx**2) * (2 * ratio) ** 2)
    phase = -2 * math.pi * (fy * shifts[:, 0] + fx * shifts[:, 1])
    return torch.polar(gauss, phase.expand_as(gauss)).to(torch.complex64)


def blur(image: torch.Tensor, gains: np.ndarray, ratio: float, shifts: np.ndarray) -> torch.Tensor:
    """Filter [n, H, W] with mirrored borders."""
    padded = torch.nn.functional.pad(image[None], (PAD,) * 4, mode="reflect")[0]
    spectrum = torch.fft.rfft2(padded) * transfer(padded.shape[-2:], gains, ratio, shifts)
    return torch.fft.irfft2(spectrum, s=padded.shape[-2:])[:, PAD:-PAD, PAD:-PAD]


def acquire(
    image: torch.Tensor, rng: np.random.Generator, scale: int, corrected_share: float = 0.4, plain_share: float = 0.15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One pretended acquisition of `image` [4, H, W] in [0, 1]: gt [4, h, w], ms [4, h/4, w/4], pan [h, w], 11 bits.

    `scale` is the coarsening of the ground resolution: h is about H / scale. Two shares of the acquisitions differ in
    kind: corrected for haze (dark floor near 0, long bright tail), and plain (reduced without a low-pass filter, with
    pixel areas aligned, PAN as sharp as it comes).
    """
    corrected, plain = rng.random() < corrected_share, rng.random() < plain_share

    # Scene radiance: undo an unknown tone curve of the producer.
    image = image ** float(uniform(rng, 1.4, 3.0) if corrected else uniform(rng, 0.8, 2.0))
    bands = image.shape[0]

    # PAN's spectral response: a positive mixture, with a part that no linear mixture of the bands explains.
    weights = rng.dirichlet([1.2, 1.6, 1.6, 1.2])
    pan = torch.einsum("b,bhw->hw", torch.from_numpy(weights).float(), image)
    red, nir = image[2], image[3]
    index = (nir - red) / (nir + red + 0.05)
    hue = (image[0] - red) / (image[0] + red + 0.05)
    a, b, c = rng.normal(0, 0.15, 3)
    pan = pan * (1 + a * index + b * hue) + float(c) * pan * (pan - pan.mean())

    # Optics: sharpness of PAN and MS at the output's Nyquist frequency, shifts in output pixels.
    base = uniform(rng, 0.08, 0.6) if rng.random() < 0.85 else uniform(rng, 0.01, 0.08)
    gt_gains = np.clip(base * log_uniform(rng, 0.8, 1.25, bands), 0.005, 0.95)
    pan_gain = np.clip(base * log_uniform(rng, 0.5, 3.0), 0.05, 0.9)
    if plain:
        gt_gains, pan_gain = np.clip(gt_gains, 0.005, 0.3), uniform(rng, 0.8, 0.999)
    gt_shift = rng.normal(0, 0.04, (bands, 2))
    kind = rng.random()
    if kind < 0.25:
        pan_shift = np.zeros(2)
    elif kind < 0.85:
        pan_shift = rng.normal(0, 0.5, 2)
    else:
        pan_shift = uniform(rng, -2.5, 2.5, 2)
    height = image.shape[1] // (scale * RATIO) * RATIO
    width = image.shape[2] // (scale * RATIO) * RATIO
    centre = (scale - 1) / 2  # of the first output pixel, in source pixels
    gt = blur(image, gt_gains, scale, gt_shift * scale - centre)[:, ::scale, ::scale][:, :height, :width]
    pan = blur(pan[None], pan_gain, scale, pan_shift * scale - centre)[0, ::scale, ::scale][:height, :width]

    # Radiometry: contrast and dark level (haze) of each band, as a share of the peak.
    contrast = log_uniform(rng, 0.02, 0.2) if corrected else log_uniform(rng, 0.012, 0.12)
    band_gain = log_uniform(rng, 0.6, 1.7, bands)
    if not corrected:
        band_gain[0] *= uniform(rng, 0.4, 1.1)  # haze flattens blue
    spread = gt.std(dim=(1, 2)).mean().clamp_min(0.01)
    gain = torch.from_numpy(contrast * band_gain).float()[:, None, None] / spread
    darkest, brightest = (0.002, 0.03) if corrected else (0.01, 0.28)
    dark = uniform(rng, darkest, brightest) * log_uniform(rng, 0.6, 1.6, bands)
    dark = torch.from_numpy(dark).float()[:, None, None]
    floor = torch.quantile(gt.flatten(1)[:, ::7], 0.02, dim=1)[:, None, None]
    gt = dark + (gt - floor) * gain
    pan_contrast = contrast * (log_uniform(rng, 0.5, 1.4) if corrected else log_uniform(rng, 0.35, 1.8))
    pan_floor = torch.quantile(pan.flatten()[::7], 0.02)
    pan = uniform(rng, darkest, brightest) + (pan - pan_floor) * (pan_contrast / pan.std().clamp_min(0.005))

    # Noise: read-out and photon parts; the reference image is a measurement too.
    noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
    read, photon = uniform(rng, 0, 0.0007), uniform(rng, 0, 0.002)
    for target in (gt, pan):
        sigma = torch.sqrt(read**2 + photon**2 * target.clamp_min(0)) * float(uniform(rng, 0.2, 1.2))
        target += sigma * torch.randn(target.shape, generator=noise)
    gt = (gt * PEAK).round().clamp(0, PEAK)
    pan = (pan * PEAK).round().clamp(0, PEAK)

    # Wald's protocol: low-resolution bands by the sensor's transfer function, then every fourth pixel from the third.
    ms_gains = np.clip(uniform(rng, 0.2, 0.4) * log_uniform(rng, 0.85, 1.18, bands), 0.15, 0.45)
    if plain:
        ms_gains = uniform(rng, 0.55, 0.95) * np.ones(bands)
    # Aligned areas: the low-resolution pixel lies around 1.5, not 2.
    ms = blur(gt, ms_gains, RATIO, np.full((bands, 2), 0.5 * plain))[:, 2::RATIO, 2::RATIO]
    return gt.numpy(), ms.numpy(), pan.numpy()


def read(path: Path) -> torch.Tensor:
    """[4, H, W] float32 in [0, 1]."""
    with rasterio.open(path) as source:
        image = source.read().astype(np.float32)
    top = 255.0 if image.max() <= 255 else float(np.quantile(image, 0.999))
    return torch.from_numpy(image / top).clamp(0, 1)


def crops(rng: np.random.Generator, size: int, count: int, triple: tuple[np.ndarray, ...]) -> list[tuple]:
    gt, ms, pan = triple
    found = []
    for _ in range(count):
        y, x = (int(rng.integers(0, (extent - size) // RATIO + 1)) for extent in pan.shape)
        low, high = (
            np.s_[..., y : y + size // RATIO, x : x + size // RATIO],
            np.s_[..., y * RATIO : y * RATIO + size, x * RATIO : x * RATIO + size],
        )
        found.append((gt[high], ms[low], pan[None][high]))
    return found


def write(path: Path, samples: list[tuple]) -> None:
    with h5py.File(path, "w") as file:
        for name, index, dtype in (("gt", 0, np.uint16), ("ms", 1, np.float32), ("pan", 2, np.uint16)):
            file[name] = np.stack([sample[index] for sample in samples]).astype(dtype)
        file.attrs.update(max_value=PEAK, ratio=RATIO, sensor="simulated", how="recipes/tiny/prepare.py")
    print(f"{path}: {len(samples)} samples")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("imagery", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=12, help="acquisitions of each training image")
    parser.add_argument("--corrected", type=float, default=0.4, help="share of acquisitions corrected for haze")
    parser.add_argument("--plain", type=float, default=0.15, help="share of plain acquisitions")
    parser.add_argument("--seed", type=int, default=2025)
    arguments = parser.parse_args()
    kinds = arguments.corrected, arguments.plain
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)

    chips = sorted((arguments.imagery / "naip_urban_california").glob("*.tif"))
    others = sorted(
        path
        for folder in ("naip_virginia", "naip_stactools", "naip_north_dakota_5m", "sentinel2_spain")
        for path in (arguments.imagery / folder).glob("*.tif")
    )
    held_out = {"valid": VALID_CITIES, "test": TEST_CITIES}
    for split, cities in held_out.items():
        rng = np.random.default_rng([arguments.seed, len(split)])
        samples = []
        for path in chips:
            if path.name.startswith(cities):
                scale = 1 + int(rng.random() < 0.5)
                samples += crops(rng, 128, 1, acquire(read(path), rng, scale, *kinds))
        write(arguments.out / f"{split}.h5", samples)

    rng = np.random.default_rng([arguments.seed, 0])
    training = [path for path in chips if not path.name.startswith((*VALID_CITIES, *TEST_CITIES))]
    samples = []
    for path in training + others:
        image = read(path)
        area = min(image.shape[1] * image.shape[2] / 256**2, 8)
        for _ in range(arguments.rounds):
            scale = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3])) if min(image.shape[1:]) >= 192 else 1
            count = max(1, round({1: 6, 2: 3, 3: 2}[scale] * area))
            # 68 pixels: training on all orientations leaves 64 of them (data.flip_rotate).
            samples += crops(rng, 68, count, acquire(image, rng, scale, *kinds))
    order = rng.permutation(len(samples))
    write(arguments.out / "train.h5", [samples[i] for i in order])


if __name__ == "__main__":
    main()
