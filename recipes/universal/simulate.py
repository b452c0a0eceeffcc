"""Pretended acquisitions for the `universal` weights, from openly licensed imagery, packed as the network sees them.

    python recipes/universal/simulate.py OPEN_IMAGERY OUT_FOLDER [--scenes N] [--jobs N]
    python recipes/universal/simulate.py OPEN_IMAGERY --report
    python recipes/universal/simulate.py OPEN_IMAGERY --pack FILE.npz

The last one puts the images into one file of some 40 MB (JPEG, pairs as they are), to be given instead of
OPEN_IMAGERY where that folder, or rasterio, is not at hand.

A scene is a few images of one place and year that share one pretended sensor: virtual bands, PAN's response, sharpness,
MTFs and wrong guesses of them, radiometry, noise, displacement. The truth lies where PAN lies; MS is displaced, band by
band and on half of the scenes by smooth fields too, and registered with the errors that registration leaves. Shards
appear one by one and are never made twice, so that a stopped run goes on where it was. The seed fixes every file.
Whole cities are held out: Bishop and Eureka for validation, Riverside for the test.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import math
import multiprocessing
import operator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pansharp_fast.classical import Statistics
from pansharp_fast.data.observation import back_project, blur, move, mtf_sigma, observe
from pansharp_fast.models.universal import Inputs, Units, network_inputs, scene_statistics

VALID, TEST = ("bishop", "eureka"), ("riverside",)
#: Wavelengths of the source images' bands, micrometres.
SOURCE = np.array([0.46, 0.55, 0.65, 0.84])
PATCH = 64
SEED = 2026
#: In place of OPEN_IMAGERY: noise, to rehearse with.
NOISE = Path("noise")
#: Splits for validation at displacements left by registration, PAN pixels.
DISPLACED = {"still": 0.0, "near": 0.3, "far": 1.0}
#: Registration's errors in PAN pixels at ratio 4, of all bands together and of each: (share, standard deviation along
#: each axis). `register` on 45 of these scenes, 84 to 256 pixels wide, was wrong by .05, .14, .30, .51 at 25, 50, 75,
#: 90 % (along an axis), most of it common to the bands; scenes as large as files are get less.
COMMON_ERRORS = ((0.5, 0.05), (0.35, 0.15), (0.15, 0.35))
ERRORS = ((0.6, 0.05), (0.3, 0.13), (0.1, 0.35))


@dataclasses.dataclass
class Scene:
    """Images [K, ...] of one pretended sensor; `d` is what registration found, `gains` what is assumed."""

    pan: Tensor
    ms: Tensor
    gt: Tensor
    ratio: int
    phase: float
    d: Tensor
    gains: list[float]
    kind: str

    @property
    def grid(self) -> dict:
        return {"gains": self.gains, "ratio": self.ratio, "phase": self.phase, "d": self.d}

    def statistics(self) -> Statistics:
        """Of all images together."""
        parts = zip(self.pan.split(1), self.ms.split(1), strict=True)
        return functools.reduce(operator.add, (scene_statistics(*part, **self.grid) for part in parts))

    def inputs(self) -> tuple[Inputs, Tensor]:
        """What the network sees, and what it should give."""
        statistics = self.statistics()
        inputs, units = network_inputs(self.pan, self.ms, statistics, **self.grid), Units.of(statistics)
        mean, std = (x[..., None, None] for x in (units.ms_mean, units.ms_std))
        target = (((self.gt - mean) / std).float() - inputs.up) / inputs.unit
        return inputs, target


def read(path: Path) -> Tensor:
    import rasterio

    with rasterio.open(path) as source:
        return torch.from_numpy(source.read().astype(np.float32))


def groups(imagery: Path, split: str) -> list[list[Tensor]]:
    """Images [4, 256, 256] in [0, 1], as lists of one place and year."""
    places: dict[str, list[Tensor]] = {}
    if imagery == NOISE:
        return [[torch.rand(4, 256, 256, generator=torch.Generator().manual_seed(1))]]
    if imagery.is_file():
        with np.load(imagery) as packed:
            for key in packed.files:
                if key.startswith(f"{split}/") and key.endswith("/ends"):
                    files = np.split(packed[key.replace("ends", "bytes")], packed[key][:-1])
                    places[key] = [_unjpeg(*pair) for pair in zip(files[::2], files[1::2], strict=True)]
        return list(places.values())
    for path in sorted((imagery / "naip_urban_california").glob("*.tif")):
        place = path.stem.rsplit("_", 1)[0]
        held = "valid" if place.startswith(VALID) else "test" if place.startswith(TEST) else "train"
        if held == split:
            places.setdefault(place, []).append(read(path) / 255)
    if split == "train":
        for folder in ("naip_virginia", "naip_north_dakota_5m", "sentinel2_spain"):
            for path in sorted((imagery / folder).glob("*.tif")):
                image = read(path)
                image = image / (255.0 if image.max() <= 255 else float(np.quantile(image, 0.999)))
                h, w = image.shape[1:]
                places[path.stem] = [
                    image[:, y : y + 256, x : x + 256].clamp(0, 1)
                    for y in range(0, h - 255, 256)
                    for x in range(0, w - 255, 256)
                ]
    return [place for place in places.values() if place]


def _jpeg(image: Tensor, quality: int) -> list[bytes]:
    """An image [4, H, W] in [0, 1] as two files: green, red and near infrared; blue."""
    values = (image * 255).round().byte().permute(1, 2, 0).numpy()
    files = []
    for chosen in (values[..., 1:], values[..., 0]):
        file = io.BytesIO()
        Image.fromarray(chosen).save(file, "JPEG", quality=quality, **({"subsampling": 0} if chosen.ndim == 3 else {}))
        files.append(file.getvalue())
    return files


def _unjpeg(*files: np.ndarray) -> Tensor:
    three, one = (np.asarray(Image.open(io.BytesIO(file.tobytes()))) for file in files)
    return torch.from_numpy(np.concatenate([one[None], three.transpose(2, 0, 1)])).float() / 255


def pack(imagery: Path, file: Path, quality: int) -> None:
    """Everything that the other commands read, in one file."""
    content: dict[str, np.ndarray] = {}
    for split in ("train", "valid"):
        for number, place in enumerate(groups(imagery, split)):
            files = [part for image in place for part in _jpeg(image, quality)]
            content[f"{split}/{number}/ends"] = np.cumsum([len(part) for part in files])
            content[f"{split}/{number}/bytes"] = np.frombuffer(b"".join(files), np.uint8)
    for name in PAIRS:
        for kind, image in zip(("pan", "ms"), pair_images(imagery, name), strict=True):
            content[f"pair/{name}_{kind}"] = image.numpy().astype(np.uint16)
    part = file.with_suffix(".part")
    with open(part, "wb") as out:
        np.savez_compressed(out, **content)
    part.rename(file)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def pair_images(imagery: Path, name: str) -> tuple[Tensor, Tensor]:
    """PAN [1, H, W] and MS [C, h, w] of one of `PAIRS`."""
    if imagery.is_file():
        with np.load(imagery) as packed:
            return tuple(torch.from_numpy(packed[f"pair/{name}_{kind}"].astype(np.float32)) for kind in ("pan", "ms"))
    if imagery == NOISE:
        generator = torch.Generator().manual_seed(1)
        return tuple(2000 * torch.rand(*shape, generator=generator) for shape in ((1, 720, 720), (8, 180, 180)))
    stem = PAIRS[name][0]
    return tuple(read(imagery / f"{stem}_{kind}.tif") for kind in ("pan", "ms"))


def log_uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None) -> np.ndarray:
    return np.exp(rng.uniform(math.log(low), math.log(high), size))


def optics(x: Tensor, gains: np.ndarray, scale: float, size: tuple[int, int]) -> Tensor:
    """[K, C, H, W] as seen by pixels `scale` times as large, with these gains at their Nyquist frequency."""
    if scale > 1:
        return observe(x, size, gains=[float(g) for g in gains], ratio=scale)
    bands = [blur(x[:, i : i + 1], mtf_sigma(float(g), 1)) for i, g in enumerate(gains)]
    return torch.cat(bands, 1)[..., : size[0], : size[1]]


def warp(x: Tensor, field: Tensor) -> Tensor:
    """[K, C, H, W] moved by smooth fields [K, C, 4, 4, 2] of knots, in pixels."""
    k, c, h, w = x.shape
    knots = field.flatten(0, 1).movedim(-1, 1)
    move = F.interpolate(knots, (h, w), mode="bicubic", align_corners=True).movedim(1, -1)
    axes = (torch.arange(length, device=x.device) for length in (h, w))
    base = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    place = (base - move + 0.5) / torch.tensor([h, w], device=x.device) * 2 - 1
    flat = F.grid_sample(x.flatten(0, 1)[:, None], place.flip(-1), "bicubic", "border", align_corners=False)
    return flat.view(k, c, h, w)


def responses(rng: np.random.Generator, wavelengths: np.ndarray, width: float, loose: float) -> np.ndarray:
    """[n, 4] positive weights of the source's bands for bands at these wavelengths."""
    near = np.exp(-0.5 * ((wavelengths[:, None] - SOURCE) / width) ** 2) + 1e-6
    near /= near.sum(1, keepdims=True)
    mixed = (1 - loose) * near + loose * rng.dirichlet(np.ones(4), len(wavelengths))
    return mixed / mixed.sum(1, keepdims=True)


class Materials:
    """Smooth random functions of a pixel's colour: what a band holds beyond a mixture of the source's bands.

    Ground of one colour gets one value, so that a band's own content has edges where the image has them.
    """

    COUNT = 12

    def __init__(self, rng: np.random.Generator) -> None:
        self.directions = torch.from_numpy(
            rng.normal(0, 1, (self.COUNT, 3)) * log_uniform(rng, 1, 4, self.COUNT)[:, None]
        )
        self.phases = torch.from_numpy(rng.uniform(0, 2 * math.pi, self.COUNT))

    def __call__(self, x: Tensor) -> Tensor:
        """[K, COUNT, H, W] of images [K, 4, H, W] in [0, 1]; each of about unit variance over colours."""
        blue, green, red, nir = x.split(1, 1)
        colour = torch.cat(
            [(nir - red) / (nir + red + 0.05), 2 * (blue - red) / (blue + red + 0.05), 2 * (green + red).sqrt()], 1
        )
        angle = torch.einsum("nc,kchw->knhw", self.directions.to(colour), colour)
        return math.sqrt(2) * torch.cos(angle + self.phases.to(colour).view(-1, 1, 1))


def mixture(x: Tensor, materials: Tensor, weights: np.ndarray, effects: np.ndarray, power: np.ndarray) -> Tensor:
    """Bands [K, n, H, W] of images [K, 4, H, W]: positive mixtures, bent by `materials` and by brightness."""
    linear, bend = (
        torch.einsum("nb,kbhw->knhw", torch.from_numpy(a).to(b), b) for a, b in ((weights, x), (effects, materials))
    )
    return (linear * bend.clamp(-1.5, 1).exp()).clamp_min(1e-4) ** torch.from_numpy(power).to(x).view(-1, 1, 1)


def errors(rng: np.random.Generator, bands: int, ratio: int, fixed: float | None = None) -> np.ndarray:
    """[C, 2] PAN pixels by which registration is wrong, drawn, or `fixed` in some direction."""
    if fixed is not None:
        angle = rng.uniform(0, 2 * math.pi, bands)
        return fixed * np.stack([np.sin(angle), np.cos(angle)], 1)
    wrong = np.zeros((bands, 2))
    for (shares, deviations), count in ((np.array(COMMON_ERRORS).T, 1), (np.array(ERRORS).T, bands)):
        wrong = wrong + rng.normal(0, 1, (count, 2)) * deviations[rng.choice(len(shares), count, p=shares)][:, None]
    return wrong * ratio / 4


def wavelengths_of(rng: np.random.Generator, bands: int) -> np.ndarray:
    usual = {
        3: [0.47, 0.55, 0.65],
        4: [0.48, 0.55, 0.66, 0.83],
        8: [0.425, 0.48, 0.545, 0.605, 0.66, 0.725, 0.83, 0.95],
    }
    if bands in usual and rng.random() < 0.7:
        return np.array(usual[bands]) + rng.normal(0, 0.008, bands)
    return np.sort(rng.uniform(0.42, 0.95, bands))


def acquire(images: Tensor, rng: np.random.Generator, bands: int, ratio: int, wrong: float | None = None) -> Scene:
    """One pretended acquisition of images [K, 4, S, S] in [0, 1]."""
    side = images.shape[-1]
    scales, step = (1.0, 1.5, 2.0, 2.5, 3.0), math.lcm(ratio, 4)
    allowed = [s for s in scales if side / s >= max(80, 14 * ratio)]
    scale = float(rng.choice(allowed))
    height = int(side / scale) // step * step
    size = (height, height)

    # Spectra. A tone curve of the producer is undone by an unknown power.
    x = images ** float(rng.uniform(0.8, 2.4))
    wavelengths = wavelengths_of(rng, bands)
    loose = float(rng.choice([0.0, 0.1, 0.2]))
    materials = Materials(rng)
    seen = materials(x)
    # Functions of the wavelength: neighbouring bands are bent alike.
    strength = float(log_uniform(rng, 0.04, 0.4)) / math.sqrt(Materials.COUNT)
    place = (wavelengths - 0.65) / 0.2
    waves = rng.normal(0, 1, (3, Materials.COUNT)) * np.array([0.6, 0.6, 0.4])[:, None]
    effects = strength * (
        np.stack([np.ones(bands), place, place**2 - 1], 1) @ waves + rng.normal(0, 0.3, (bands, Materials.COUNT))
    )
    power = log_uniform(rng, 0.75, 1.33, bands)
    spectral = mixture(x, seen, responses(rng, wavelengths, 0.06, loose), effects, power)
    ends = [(0.45, 0.8), (0.45, 0.9), (0.5, 0.68), (0.4, 0.75)][rng.choice(4, p=[0.45, 0.3, 0.1, 0.15])]
    span = np.linspace(*ends, 8)
    weight = (responses(rng, span, 0.06, 0.0) * rng.uniform(0.3, 1, 8)[:, None]).sum(0, keepdims=True)
    weight = weight / weight.sum() * 0.85 + 0.15 * rng.dirichlet(np.ones(4))
    grey = mixture(
        x, seen, weight, strength * rng.normal(0, 0.6, (1, Materials.COUNT)), log_uniform(rng, 0.75, 1.33, 1)
    )

    # Sharpness: response at the result's Nyquist frequency; PAN's relative to that of the truth.
    base = rng.uniform(0.1, 0.7)
    relative = float(log_uniform(rng, 0.15, 1.0))
    gains = np.clip(base * log_uniform(rng, 0.85, 1.18, bands), 0.02, 0.9)
    gt = optics(spectral, gains, scale, size)
    reduced = scale > 1 and rng.random() < 0.6
    if reduced:  # PAN reduced from a finer one, as Wald's protocol does: the truth holds aliasing that PAN does not
        finer = grey[..., : round(height * scale), : round(height * scale)]
        pan = F.interpolate(blur(finer, float(rng.uniform(0.4, 1.0)) * scale), size, mode="bicubic", antialias=True)
    else:
        pan = optics(grey, np.clip([base * relative], 0.01, 0.95), scale, size)

    # Radiometry: contrasts, and the darkest pixels' height above 0 in standard deviations (haze).
    haze = float(log_uniform(rng, 0.05, 3))
    for image, count in ((gt, bands), (pan, 1)):
        low = torch.quantile(image.transpose(0, 1).flatten(1)[:, ::13], 0.002, dim=1).view(-1, 1, 1)
        std = image.transpose(0, 1).flatten(1).std(1).clamp_min(1e-4).view(-1, 1, 1)
        lift = torch.from_numpy(haze * log_uniform(rng, 0.5, 2, count)).to(image).view(-1, 1, 1)
        image.sub_(low).div_(std).add_(lift)
    if rng.random() < 0.1:
        for image in (gt, pan):
            image.clamp_(max=float(torch.quantile(image.flatten()[::17], 0.995)))

    sharpness = "reduced" if reduced else f"{relative:.2f} as sharp"
    return degrade(pan, gt, rng, ratio, sharpness, wrong)


def degrade(
    pan: Tensor, gt: Tensor, rng: np.random.Generator, ratio: int, sharpness: str, wrong: float | None = None
) -> Scene:
    """MS of the truth [K, C, H, W] as a sensor sees it: displaced, through its MTF, noisy; PAN [K, 1, H, W] too.

    Registration's errors are drawn, or `wrong` PAN pixels in some direction.
    """
    noise = torch.Generator(gt.device).manual_seed(int(rng.integers(2**62)))
    bands, height, width = gt.shape[1:]
    # Displaced, on half of the scenes by smooth fields too.
    phase = ratio / 2 if rng.random() < 0.5 else (ratio - 1) / 2
    part = ratio / 4
    common = rng.normal(0, 0.8, 2) * part
    d = common + rng.normal(0, 1, (bands, 2)) * part * float(rng.choice([0.05, 0.2, 0.5]))
    seen, deviation = gt, float(rng.choice([0, 0, 0.3, 0.6])) * part
    if deviation > 0:
        k = len(gt)
        field = rng.normal(0, deviation, (k, 1, 4, 4, 2)) + rng.normal(0, deviation / 3, (k, bands, 4, 4, 2))
        seen = warp(gt, torch.from_numpy(field).to(gt))
    mtf = np.clip(rng.uniform(0.22, 0.4) * log_uniform(rng, 0.88, 1.13, bands), 0.2, 0.45)
    low_size = (height // ratio, width // ratio)
    true = torch.from_numpy(d)
    ms = observe(seen, low_size, gains=[float(g) for g in mtf], ratio=ratio, phase=phase, d=true)
    found = true + torch.from_numpy(errors(rng, bands, ratio, wrong))
    assumed = (
        np.full(bands, 0.3) if rng.random() < 0.35 else np.clip(mtf * log_uniform(rng, 0.9, 1.1, bands), 0.2, 0.45)
    )

    # Noise and bits.
    for image in (ms, pan):
        strength = float(rng.uniform(0, 0.02)) * (2 if rng.random() < 0.15 else 1)
        image.add_(
            strength
            * image.std((0, 2, 3), keepdim=True)
            * torch.randn(image.shape, generator=noise, device=image.device)
        )
    if rng.random() < 0.75:
        levels = float(log_uniform(rng, 12, 2000))  # digital numbers a standard deviation
        for image in (ms, pan):
            step = image.std((0, 2, 3), keepdim=True).clamp_min(1e-9) / levels
            image.copy_((image / step).round() * step)
    kind = f"{bands} bands, ratio {ratio}, PAN {sharpness}, warp {deviation:.2f}"
    return Scene(pan, ms, gt, ratio, phase, found, [float(g) for g in assumed], kind)


def draw(rng: np.random.Generator) -> tuple[int, int]:
    """Bands and ratio of a scene."""
    bands = int(rng.choice([1, 2, 3, 4, 5, 6, 8, 12], p=[0.03, 0.04, 0.13, 0.45, 0.06, 0.06, 0.2, 0.03]))
    ratio = int(rng.choice([2, 3, 4, 5, 6, 8], p=[0.1, 0.07, 0.65, 0.06, 0.07, 0.05]))
    return bands, ratio


#: Pairs of PAN and MS: files, ratio, and displacement of the bands in PAN pixels, pixel areas aligned, as
#: `pansharp_fast.register` measures it.
PAIRS = {
    "landsat": ("landsat8_pairs/landsat8_a", 2, [(-0.91, -0.35)] * 4),
    "shanghai": (
        "spacenet_wv3_shanghai/shanghai_img1920",
        4,
        [(-2.87, -0.07), (-2.72, 0.17), (-2.61, 0.19), (-2.95, -0.09)]
        + [(-2.35, 0.22), (-2.61, 0.02), (-2.44, 0.17), (-2.79, 0.1)],
    ),
}


def pair_scene(
    imagery: Path,
    name: str,
    rng: np.random.Generator,
    bands: list[int] | None,
    ratio: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    images: int = 4,
) -> Scene:
    """A real pair at reduced resolution: MS is the truth, moved to where PAN lies; PAN is reduced to its grid."""
    _, finer, displacement = PAIRS[name]
    pan, ms = (image[None].to(device).double() for image in _pair_images(imagery, name))
    d = torch.tensor(displacement)
    if bands is not None:
        ms, d = ms[:, bands], d[bands]
    centre = d.median(0).values
    gain = float(rng.uniform(0.5, 0.7))  # as sharp as antialiased cubic reduction
    pan = observe(pan, (ms.shape[2], ms.shape[3]), gains=[gain], ratio=finer, d=centre[None])
    gt = move(ms, (centre - d) / finer).float()
    side = min(160, *gt.shape[2:]) // math.lcm(ratio, 4) * math.lcm(ratio, 4)
    corners = [[int(rng.integers(4, extent - side - 3)) for extent in gt.shape[2:]] for _ in range(images)]

    def windows(x: Tensor) -> Tensor:
        return torch.cat([x[..., y : y + side, x0 : x0 + side] for y, x0 in corners])

    return degrade(windows(pan.float()), windows(gt), rng, ratio, f"{name}, PAN's gain {gain:.2f}")


def make_scene(
    places: list[list[Tensor]], rng: np.random.Generator, images: int = 4, wrong: float | None = None, **fixed: int
) -> Scene:
    bands, ratio = draw(rng)
    sizes = np.array([len(place) for place in places], dtype=float)
    place = places[rng.choice(len(places), p=sizes / sizes.sum())]
    chosen = rng.choice(len(place), min(images, len(place)), replace=False)
    with torch.no_grad():
        return acquire(
            torch.stack([place[i] for i in chosen]), rng, fixed.get("bands", bands), fixed.get("ratio", ratio), wrong
        )


def patches(scene: Scene, rng: np.random.Generator, share: float = 1.0) -> dict[str, Tensor]:
    """Crops of PATCH pixels of everything the training needs, in half precision."""
    inputs, target = scene.inputs()
    h, w = scene.pan.shape[2:]
    count = max(1, round(share * (h / PATCH) * (w / PATCH)))
    rows: dict[str, list[Tensor]] = {"details": [], "bands": [], "pan": [], "facts": [], "target": []}
    for image in range(len(scene.pan)):
        for _ in range(count):
            y, x = (4 * int(rng.integers(0, (extent - PATCH) // 4 + 1)) for extent in (h, w))
            whole = np.s_[image, ..., y : y + PATCH, x : x + PATCH]
            half = np.s_[image, ..., y // 2 : (y + PATCH) // 2, x // 2 : (x + PATCH) // 2]
            for name, value in (
                ("details", inputs.details[whole]),
                ("bands", inputs.bands[half]),
                ("pan", inputs.pan[whole]),
                ("facts", inputs.facts[image]),
                ("target", target[whole]),
            ):
                rows[name].append(value)
    return {name: torch.stack(values).clamp(-1e4, 1e4).half() for name, values in rows.items()}


_pair_images = functools.cache(pair_images)


@functools.cache
def _places(imagery: Path, split: str, device: torch.device) -> list[list[Tensor]]:
    return [[image.to(device) for image in place] for place in groups(imagery, split)]


def simulated(
    imagery: Path,
    split: str,
    number: int,
    seed: int,
    shanghai: float = 0.0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    images: int = 4,
) -> dict[str, Tensor]:
    """Patches of scene `number` of a split, of up to so many images; the same each time on one kind of device."""
    # Scenes of the same number are the same at each of the displacements that stand in the splits' names.
    wrong = DISPLACED.get(split)
    rng = np.random.default_rng([seed, {"train": 0, "valid": 1, "pair": 3}.get(split, 4), number])
    share = rng.random()
    with torch.no_grad():
        if split == "pair" or (split == "train" and share < shanghai):
            chosen = [None, [1, 2, 4, 6], [4, 2, 1]][rng.choice(3, p=[0.5, 0.4, 0.1])]
            ratio = int(rng.choice([2, 3, 4], p=[0.1, 0.1, 0.8]))
            scene = pair_scene(imagery, "shanghai", rng, chosen, ratio, device, images)
        elif split == "train" and share > 0.98:
            ratio = int(rng.choice([2, 3, 4], p=[0.5, 0.1, 0.4]))
            scene = pair_scene(imagery, "landsat", rng, None, ratio, device, images)
        else:
            places = _places(imagery, "train" if split == "train" else "valid", device)
            scene = make_scene(places, rng, images, wrong)
        return patches(scene, rng, 0.5 if split == "train" else 0.25)


def make_shard(job: tuple[Path, Path, str, int, int, float]) -> None:
    """Patches of a scene in a file."""
    imagery, out, split, number, *rest = job
    torch.set_num_threads(1)
    done = out / f"{split}-{number:04d}.npz"
    if done.exists():
        return
    rows = simulated(imagery, split, number, *rest)
    part = done.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez(file, **{name: values.numpy() for name, values in rows.items()})
    part.rename(done)


def high(x: Tensor) -> Tensor:
    return x - blur(x, 2.0)


def slopes(scene: Scene) -> tuple[list[float], list[float]]:
    """Slope and correlation, band by band, of true detail on that of registered BT-H + 2."""
    inputs, _ = scene.inputs()
    units = Units.of(scene.statistics())
    mean, std = (x[..., None, None] for x in (units.ms_mean, units.ms_std))
    estimate = (inputs.up + inputs.details[:, :, 0] * inputs.unit).double() * std + mean
    estimate = back_project(estimate, scene.ms.double(), **scene.grid, steps=2)
    found, true = (high(x.double())[..., 8:-8, 8:-8].transpose(0, 1).flatten(1) for x in (estimate, scene.gt))
    cross, energy = (found * true).mean(1), (found * found).mean(1)
    return (cross / energy).tolist(), (cross / (energy * (true * true).mean(1)).sqrt()).tolist()


def report(imagery: Path, seed: int, scenes: int = 60) -> None:
    """The simulated distribution beside real files'."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 9])
    places = groups(imagery, "train")
    found, correlation = [], []
    for _ in range(scenes):
        a, b = slopes(make_scene(places, rng, images=2, bands=4, ratio=4))
        found += a
        correlation += b
    levels = [2, 10, 25, 50, 75, 90, 98]
    print("| true detail on that of registered BT-H + 2 | " + " | ".join(f"{q} %" for q in levels) + " |")
    print("|---" * (len(levels) + 1) + "|")
    for name, values in (("slope", found), ("correlation", correlation)):
        print(f"| {name}, simulated | " + " | ".join(f"{v:.2f}" for v in np.percentile(values, levels)) + " |")
    print("Real files' slopes: QuickBird .6-.9, GaoFen-2 .8-1.07, IKONOS .8-1.24, WorldView-3 1.02-1.21,")
    print("WorldView-2 .92-1.36; correlations: .82-.88, .91-.94, .83-.89, .86-.93, .78-.94.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("imagery", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--scenes", type=int, default=1200, help="training scenes")
    parser.add_argument("--held-out", type=int, default=40, help="scenes to validate on")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--shanghai",
        type=float,
        default=0.0,
        help="share of training scenes from the WorldView-3 pair (CC BY-SA 4.0); with 1 nothing else is made",
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--report", action="store_true", help="print the simulated distribution and stop")
    parser.add_argument("--pack", type=Path, help="put the images into this file and stop")
    parser.add_argument("--quality", type=int, default=95, help="of the packed images' JPEG")
    arguments = parser.parse_args()
    if arguments.pack:
        pack(arguments.imagery, arguments.pack, arguments.quality)
        return
    if arguments.report:
        report(arguments.imagery, arguments.seed)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    few = math.ceil(0.4 * arguments.held_out)
    counts = {"valid": arguments.held_out, "pair": few, **dict.fromkeys(DISPLACED, few), "train": arguments.scenes}
    jobs = [
        (arguments.imagery, arguments.out, split, i, arguments.seed, arguments.shanghai)
        for split, count in counts.items()
        for i in range(count)
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for i, _ in enumerate(pool.imap(make_shard, jobs), 1):
            if i % 20 == 0:
                print(f"{i} of {len(jobs)} scenes", flush=True)


if __name__ == "__main__":
    main()
