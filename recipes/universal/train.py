"""Train `universal` on packed scenes: resumable, a checkpoint every so often, the moving average validated.

    python recipes/universal/train.py PACKED RUN --steps N
    python recipes/universal/train.py IMAGES.npz RUN --minutes M --device cuda --maps 512 --rate 3e-3 --every 30

PACKED is a folder of scenes from `simulate.py`; those that appear while it runs are taken in. IMAGES.npz, made by
`simulate.py --pack`, is simulated here, on the device, as training goes on: what fits a GPU.
The learning rate follows a cosine over --steps, or over --minutes of training in all; a run that was stopped goes on by
the same command.
RUN/last.pt holds everything; RUN/universal.safetensors the moving average of the weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simulate
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pansharp_fast.models import load_model, save_model
from pansharp_fast.models.universal import Inputs, Universal, UniversalConfig

FIELDS = ("details", "bands", "pan", "facts", "target")
#: Splits beside "train"; those that are missing are not validated on.
HELD_OUT = ("valid", "pair", "still", "near", "far")


def high(x: Tensor) -> Tensor:
    return x - F.avg_pool2d(x, 9, 1, 4, count_include_pad=False)


def slopes(rows: dict[str, Tensor]) -> Tensor:
    """[n] slopes of patches' true detail on that of BT-H after one step of back-projection, all bands together."""
    details, true = rows["details"], high(rows["target"].float())
    found = high(details[:, :, 0].float() + details[:, :, -1].float())
    return (found * true).sum((1, 2, 3)) / (found * found).sum((1, 2, 3)).clamp_min(1e-6)


class Shards:
    """Patches in memory, grouped by band count, in half precision on the device.

    They are drawn with a weight exp(tilt * slope), which moves the distribution of slopes without making other data.
    """

    #: Bands of patches that are kept; beyond them new ones take the place of the oldest of their group.
    room = 1 << 62

    def __init__(self, folder: Path, split: str, device: torch.device, tilt: float = 0.0) -> None:
        self.folder, self.split, self.device, self.tilt = folder, split, device, tilt
        self.cursors: dict[int, int] = {}
        self.read = set[Path]()
        self.groups: dict[int, dict[str, Tensor]] = {}  # with room at the end
        self.counts: dict[int, int] = {}
        self.slopes: dict[int, np.ndarray] = {}
        self._reader = ThreadPoolExecutor(1)
        self._coming = None
        self.load()

    def load(self, wait: bool = True) -> int:
        """Take in shards that appeared since; their number. Without `wait` those that have been read meanwhile."""
        taken = 0
        while self._coming is None or wait or self._coming.done():
            if self._coming is not None:
                for rows in self._coming.result():
                    self._append(rows)
                    taken += 1
            fresh = [path for path in sorted(self.folder.glob(f"{self.split}-*.npz")) if path not in self.read][:50]
            self.read.update(fresh)
            self._coming = self._reader.submit(self._files, fresh) if fresh else None
            if self._coming is None:
                break
        return taken

    @staticmethod
    def _files(paths: list[Path]) -> list[dict[str, Tensor]]:
        rows = []
        for path in paths:
            with np.load(path) as data:
                rows.append({name: torch.from_numpy(data[name]) for name in FIELDS})
        return rows

    def _append(self, rows: dict[str, Tensor]) -> None:
        bands = rows["details"].shape[1]
        rows = {name: value.to(self.device) for name, value in rows.items()}
        found = slopes(rows).cpu().numpy() if self.tilt else np.ones(len(rows["target"]))
        count, new = self.counts.get(bands, 0), len(found)
        group = self.groups.setdefault(bands, {name: value[:0] for name, value in rows.items()})
        if sum(each * number for each, number in self.counts.items()) > self.room and count >= new:
            start = self.cursors.get(bands, 0)
            start = 0 if start + new > count else start
            self.cursors[bands] = start + new
        else:
            start, self.counts[bands] = count, count + new
            self.slopes[bands] = np.concatenate([self.slopes.get(bands, np.empty(0)), found])
        for name, value in rows.items():
            if len(group[name]) < start + new:
                longer = value.new_empty(max(2 * count, start + new), *value.shape[1:])
                longer[:count] = group[name][:count]
                group[name] = longer
            group[name][start : start + new] = value
        self.slopes[bands][start : start + new] = found

    def weights(self, bands: int) -> np.ndarray:
        return np.exp(self.tilt * (np.clip(self.slopes[bands], 0.6, 1.5) - 1))

    def batch(self, rng: np.random.Generator, maps: int) -> tuple[Inputs, Tensor]:
        """About `maps` bands in all, of images of one band count, turned and mirrored."""
        weights = {bands: self.weights(bands) for bands in self.groups}
        totals = np.array([weight.sum() for weight in weights.values()])
        bands = list(weights)[rng.choice(len(totals), p=totals / totals.sum())]
        size = max(2, round(maps / max(bands, 2)))
        ends = np.cumsum(weights[bands])
        chosen = np.searchsorted(ends, rng.random(size) * ends[-1]).clip(max=len(ends) - 1)
        index = torch.from_numpy(chosen).to(self.device)
        return unpack({name: values[index] for name, values in self.groups[bands].items()}, *rng.integers(0, 2, 3))

    def all(self, size: int = 16):
        for bands, group in self.groups.items():
            for start in range(0, self.counts[bands], size):
                stop = min(start + size, self.counts[bands])
                yield unpack({name: values[start:stop] for name, values in group.items()})


class Simulated(Shards):
    """Scenes made here, one at each `load`; held-out ones all at the start."""

    room = 80_000

    def __init__(
        self, images: Path, split: str, device: torch.device, tilt: float, seed: int, shanghai: float, first: int
    ) -> None:
        self.options = images, split, seed, shanghai, first
        super().__init__(images, split, device, tilt)

    def load(self, wait: bool = True) -> int:
        images, split, seed, shanghai, first = self.options
        count = 1 if self.read or split == "train" else first
        for _ in range(count):
            number = len(self.read)
            many = 16 if split == "train" else 4
            self._append(simulate.simulated(images, split, number, seed, shanghai, self.device, many))
            self.read.add(Path(str(number)))
        return count


def unpack(rows: dict[str, Tensor], flip_y: int = 0, flip_x: int = 0, transpose: int = 0) -> tuple[Inputs, Tensor]:
    flips = [axis for axis, flip in ((-2, flip_y), (-1, flip_x)) if flip]

    def turned(name: str) -> Tensor:
        x = rows[name].float()
        if name == "facts":
            return x
        x = x.flip(flips) if flips else x
        return (x.transpose(-1, -2) if transpose else x).contiguous()

    details, bands, pan, facts, target = (turned(name) for name in FIELDS)
    zero = target.new_zeros(1)
    return Inputs(details, bands, pan, facts, zero, zero), target


def loss_of(out: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """Charbonnier in units of the scene's detail, of values and, for sharpness, of differences between neighbours."""

    def charbonnier(x: Tensor) -> Tensor:
        return (x * x + epsilon**2).sqrt().mean() - epsilon

    # Where the scene is far outside what its statistics say (a few bright roofs), the size of the step is bounded.
    error = (out - target).clamp(-50, 50)
    steps = charbonnier(error.diff(dim=-1)) + charbonnier(error.diff(dim=-2))
    return charbonnier(error) + 0.25 * steps


class PanMode(nn.Module):
    """PAN-Crafter's other mode, in training only: PAN's detail from the trunk that sees MS alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(width, 16, 1)

    def forward(self, model: Universal, inputs: Inputs, epsilon: float) -> Tensor:
        out = F.pixel_shuffle(self.head(model.pan_features(inputs)), 4)
        pan = inputs.pan[:, :1]
        return loss_of(out.float(), pan - F.avg_pool2d(pan, 9, 1, 4, count_include_pad=False), epsilon)


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
    parser.add_argument("packed", type=Path, help="folder of scenes, or file of images to simulate them from")
    parser.add_argument("run", type=Path)
    parser.add_argument("--scene-every", type=int, default=6, help="steps from one simulated scene to the next")
    parser.add_argument("--shanghai", type=float, default=0.0, help="share of simulated scenes from that pair")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--minutes", type=float, help="of training in all, over several runs of this command")
    parser.add_argument("--stop", type=int, default=1 << 62, help="stop after this step")
    parser.add_argument("--every", type=float, default=180, help="seconds from one checkpoint to the next")
    parser.add_argument("--wait", type=int, default=1, help="training scenes to wait for at the start")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--maps", type=int, default=32, help="bands of a batch, all images together")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.998, help="of the moving average")
    parser.add_argument("--epsilon", type=float, default=0.4, help="of the loss: errors far above it count linearly")
    parser.add_argument("--tilt", type=float, default=0.0, help="preference for patches whose truth holds more detail")
    parser.add_argument("--init", type=Path, help="weights to start from: a file or a name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--band-depth", type=int, default=0)
    parser.add_argument("--no-attention", action="store_true")
    parser.add_argument("--pan-mode", type=float, default=0.0, help="weight of the loss of PAN-Crafter's PAN mode")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    arguments.run.mkdir(parents=True, exist_ok=True)
    last = arguments.run / "last.pt"

    model = Universal(UniversalConfig(attention=not arguments.no_attention, band_depth=arguments.band_depth))
    if arguments.init:
        model.load_state_dict(load_model(arguments.init).state_dict())
    model = model.to(device)
    average = copy.deepcopy(model)
    pan_mode = PanMode(model.config.trunk_width).to(device) if arguments.pan_mode else None
    parameters = [*model.parameters(), *(pan_mode.parameters() if pan_mode is not None else [])]
    optimizer = torch.optim.AdamW(
        parameters, lr=arguments.rate, weight_decay=1e-4, betas=(0.9, 0.98), fused=device.type == "cuda"
    )
    step, trained = 0, 0.0
    if last.exists():
        state = torch.load(last, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        if pan_mode is not None:
            pan_mode.load_state_dict(state["pan_mode"])
        step, trained = state["step"], state["seconds"]
        print(f"goes on from step {step}", flush=True)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "pan_mode": pan_mode.state_dict() if pan_mode is not None else None,
            "step": step,
            "seconds": trained,
        }
        torch.save(state, last.with_suffix(".part"))
        last.with_suffix(".part").rename(last)
        facts = {"step": step, "steps": arguments.steps, "seconds": round(trained)}
        save_model(arguments.run / "universal.safetensors", average.eval(), facts)

    def scenes(split: str, tilt: float = 0.0, first: int = 16) -> Shards:
        if arguments.packed.is_dir():
            return Shards(arguments.packed, split, device, tilt)
        return Simulated(arguments.packed, split, device, tilt, simulate.SEED + step, arguments.shanghai, first)

    train = scenes("train", arguments.tilt)
    while len(train.read) < arguments.wait:
        if arguments.packed.is_dir():
            time.sleep(1)
        train.load()
    if arguments.tilt:
        found, weights = (
            np.concatenate(x) for x in zip(*((train.slopes[b], train.weights(b)) for b in train.groups), strict=True)
        )
        order = np.argsort(found)
        place = np.searchsorted(np.cumsum(weights[order]) / weights.sum(), [0.1, 0.5, 0.9])
        print("slopes as drawn, 10, 50, 90 %:", " ".join(f"{found[order][i]:.2f}" for i in place), flush=True)
    began, step = step, 0  # held-out scenes are the same in every run
    held_out = {split: scenes(split, first=40 if split == "valid" else 16) for split in HELD_OUT}
    step = began
    total, seen, turn, started, saved, spoken = torch.zeros((), device=device), 0, 0, trained, trained, step
    clock = time.monotonic()

    def progress() -> float:
        return step / arguments.steps if arguments.steps else trained / (60 * arguments.minutes)

    while progress() < 1 and step < arguments.stop:
        rng = np.random.default_rng([arguments.seed, step])
        rate = arguments.rate * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * progress())) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, target = train.batch(rng, arguments.maps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model(inputs).float(), target, arguments.epsilon)
            if pan_mode is not None:
                loss = loss + arguments.pan_mode * pan_mode(model, inputs, arguments.epsilon)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        keep = min(arguments.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        total, seen = total + loss.detach(), seen + 1
        if isinstance(train, Simulated) and seen % arguments.scene_every == 0:
            train.load()
        if seen % 50 == 0:
            mean = float(total) / 50  # waits for the device, so that `trained` counts what it did
            total.zero_()
            if step - spoken >= (500 if device.type == "cuda" else 50):
                print(f"step {step}  {trained:.0f} s  loss {mean:.4f}  rate {rate:.5f}", flush=True)
                spoken = step
            if device.type == "cuda" and not isinstance(train, Simulated):
                train.load(wait=False)
        now = time.monotonic()
        trained, clock = trained + now - clock, now
        done = progress() >= 1 or step >= arguments.stop
        if trained - saved > arguments.every or done:
            save()
            train.load(wait=device.type != "cuda")
            saved, turn = trained, turn + 1
            if turn % 3 and not done:
                continue
            print(f"step {step}  minutes {(saved - started) / 60:.1f}  scenes {len(train.read)}", flush=True)
            for split, shards in held_out.items():
                if shards.groups:
                    scores = "  ".join(f"{name} {value:.4f}" for name, value in validate(average, shards).items())
                    print(f"    {split}: {scores}", flush=True)
            clock = time.monotonic()  # validation is not training


if __name__ == "__main__":
    main()
