"""Train `universal` on packed scenes: resumable, a checkpoint every few minutes, the moving average validated.

    python recipes/universal/train.py PACKED RUN --steps N [--minutes M]

The learning rate follows a cosine over --steps; a run that was stopped goes on by the same command.
RUN/last.pt holds everything; RUN/universal.safetensors the moving average of the weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pansharp_fast.models import load_model, save_model
from pansharp_fast.models.universal import Inputs, Universal, UniversalConfig

FIELDS = ("details", "bands", "pan", "facts", "target")


def high(x: Tensor) -> Tensor:
    return x - F.avg_pool2d(x, 9, 1, 4, count_include_pad=False)


def slope(details: np.ndarray, target: np.ndarray) -> float:
    """Slope of the true detail of a patch on that of BT-H after one step of back-projection, all bands together."""
    estimate = torch.from_numpy(details[:, 0]).float() + torch.from_numpy(details[:, -1]).float()
    found, true = high(estimate[None]), high(torch.from_numpy(target).float()[None])
    return float((found * true).sum() / (found * found).sum().clamp_min(1e-6))


class Shards:
    """Patches in memory, grouped by band count.

    They are drawn with a weight exp(tilt * slope), which moves the distribution of slopes without making other data.
    """

    def __init__(self, folder: Path, split: str, tilt: float = 0.0) -> None:
        self.folder, self.split, self.tilt, self.read = folder, split, tilt, set[Path]()
        self.groups: dict[int, dict[str, list[np.ndarray]]] = {}
        self.slopes: dict[int, list[float]] = {}
        self.load()

    def load(self) -> int:
        """Read shards that appeared since; their number."""
        fresh = [path for path in sorted(self.folder.glob(f"{self.split}-*.npz")) if path not in self.read]
        for path in fresh:
            self.read.add(path)
            with np.load(path) as data:
                rows = {name: data[name] for name in FIELDS}
                group = self.groups.setdefault(rows["details"].shape[1], {name: [] for name in FIELDS})
                for name in FIELDS:
                    group[name].extend(rows[name])
                if self.tilt:
                    found = [slope(*pair) for pair in zip(rows["details"], rows["target"], strict=True)]
                    self.slopes.setdefault(rows["details"].shape[1], []).extend(found)
        return len(fresh)

    def weights(self, bands: int) -> np.ndarray:
        count = len(self.groups[bands]["target"])
        return np.exp(self.tilt * (np.clip(self.slopes[bands], 0.6, 1.5) - 1)) if self.tilt else np.ones(count)

    def batch(self, rng: np.random.Generator, maps: int) -> tuple[Inputs, Tensor]:
        """About `maps` bands in all, of images of one band count, turned and mirrored."""
        weights = {bands: self.weights(bands) for bands in self.groups}
        totals = np.array([weight.sum() for weight in weights.values()])
        bands = list(weights)[rng.choice(len(totals), p=totals / totals.sum())]
        group, weight = self.groups[bands], weights[bands]
        size = max(2, round(maps / max(bands, 2)))
        chosen = rng.choice(len(weight), size, p=weight / weight.sum())
        return unpack({name: np.stack([group[name][i] for i in chosen]) for name in FIELDS}, *rng.integers(0, 2, 3))

    def all(self, size: int = 16):
        for group in self.groups.values():
            for start in range(0, len(group["target"]), size):
                yield unpack({name: np.stack(group[name][start : start + size]) for name in FIELDS})


def unpack(rows: dict[str, np.ndarray], flip_y: int = 0, flip_x: int = 0, transpose: int = 0) -> tuple[Inputs, Tensor]:
    flips = [axis for axis, flip in ((-2, flip_y), (-1, flip_x)) if flip]

    def turned(name: str) -> Tensor:
        x = torch.from_numpy(rows[name]).float()
        if name == "facts":
            return x
        x = x.flip(flips) if flips else x
        return (x.transpose(-1, -2) if transpose else x).contiguous()

    details, bands, pan, facts, target = (turned(name) for name in FIELDS)
    zero = target.new_zeros(1)
    return Inputs(details, bands, pan, facts, zero, zero), target


def loss_of(out: Tensor, target: Tensor, epsilon: float = 0.2) -> Tensor:
    """Charbonnier in units of the scene's detail, of values and, for sharpness, of differences between neighbours."""

    def charbonnier(x: Tensor) -> Tensor:
        return (x * x + epsilon**2).sqrt().mean() - epsilon

    # Where the scene is far outside what its statistics say (a few bright roofs), the size of the step is bounded.
    error = (out - target).clamp(-50, 50)
    steps = charbonnier(error.diff(dim=-1)) + charbonnier(error.diff(dim=-2))
    return charbonnier(error) + 0.25 * steps


@torch.no_grad()
def validate(model: Universal, shards: Shards) -> dict[str, float]:
    """Root mean square errors over BT-H's and over BT-H's after one step of back-projection, means over patches."""
    model.eval()
    ratios: dict[str, list[Tensor]] = {"over BT-H": [], "over BT-H + 1": [], "slope": []}
    for inputs, target in shards.all():
        out, bt_h, back = model(inputs), inputs.details[:, :, 0], inputs.details[:, :, -1]

        def error(x: Tensor, target: Tensor = target) -> Tensor:
            return ((x - target) ** 2).mean((2, 3)).sqrt()

        ratios["over BT-H"].append((error(out) / error(bt_h)).flatten())
        ratios["over BT-H + 1"].append((error(out) / error(bt_h + back)).flatten())
        ratios["slope"].append(((out * target).mean((2, 3)) / (out * out).mean((2, 3))).flatten())
    model.train()
    return {
        name: float(torch.cat(values).log().mean().exp() if name != "slope" else torch.cat(values).median())
        for name, values in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--stop", type=int, default=1 << 62, help="stop after this step")
    parser.add_argument("--maps", type=int, default=32, help="bands of a batch, all images together")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.998, help="of the moving average")
    parser.add_argument("--tilt", type=float, default=2.5, help="preference for patches whose truth holds more detail")
    parser.add_argument("--init", type=Path, help="weights to start from, such as recipes/universal/start.safetensors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-attention", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.run.mkdir(parents=True, exist_ok=True)
    last = arguments.run / "last.pt"

    model = Universal(UniversalConfig(attention=not arguments.no_attention))
    if arguments.init:
        model.load_state_dict(load_model(arguments.init).state_dict())
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=1e-4, betas=(0.9, 0.98))
    step, started = 0, time.monotonic()
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"goes on from step {step}", flush=True)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        }
        torch.save(state, last.with_suffix(".part"))
        last.with_suffix(".part").rename(last)
        save_model(arguments.run / "universal.safetensors", average.eval(), {"step": step, "steps": arguments.steps})

    train = Shards(arguments.packed, "train", arguments.tilt)
    if arguments.tilt:
        found, weights = (
            np.concatenate(x) for x in zip(*((train.slopes[b], train.weights(b)) for b in train.groups), strict=True)
        )
        order = np.argsort(found)
        place = np.searchsorted(np.cumsum(weights[order]) / weights.sum(), [0.1, 0.5, 0.9])
        print("slopes as drawn, 10, 50, 90 %:", " ".join(f"{found[order][i]:.2f}" for i in place), flush=True)
    held_out = {"simulated": Shards(arguments.packed, "valid"), "pair": Shards(arguments.packed, "pair")}
    total, seen, turn, saved = 0.0, 0, 0, time.monotonic()
    end = min(arguments.steps, arguments.stop)
    while step < end and time.monotonic() - started < 60 * arguments.minutes:
        rng = np.random.default_rng([arguments.seed, step])
        rate = arguments.rate * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / arguments.steps)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, target = train.batch(rng, arguments.maps)
        loss = loss_of(model(inputs), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(arguments.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        total, seen = total + float(loss.detach()), seen + 1
        if step % 50 == 0:
            print(f"step {step}  loss {total / seen:.4f}  rate {rate:.5f}", flush=True)
            total, seen = 0.0, 0
        if time.monotonic() - saved > 180 or step == end:
            save()
            saved, turn, new = time.monotonic(), turn + 1, train.load()
            if turn % 3 and step < end:
                continue
            print(f"step {step}  minutes {(saved - started) / 60:.1f}  new shards {new}", flush=True)
            for split, shards in held_out.items():
                scores = "  ".join(f"{name} {value:.4f}" for name, value in validate(average, shards).items())
                print(f"    {split}: {scores}", flush=True)
    if step < end:
        save()


if __name__ == "__main__":
    main()
