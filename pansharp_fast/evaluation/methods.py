"""Methods by name: the textbook's, registered ones, networks; what each is, for records, and how to run it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..baselines import BASELINES
from ..classical import METHODS, fuse
from .scenes import Scene

if TYPE_CHECKING:
    from ..diffusion import Sampling

#: Classical methods as tables call them, by the name that `sharpen` knows.
TITLES = {title.lower(): title for title in BASELINES}
_NAME = re.compile(r"(?P<registered>registered )?(?P<name>.+?)(?: *\+ *(?P<steps>\d+|auto))?")


@dataclass(frozen=True)
class Method:
    """One way to sharpen.

    Attributes:
        name: of a classical method, or label of a network's weights.
        registered: whether the bands are laid on PAN first.
        steps: of back-projection, or "auto"; None is the method as it is: no step.
        network: the model, None for classical methods.
        options: further arguments of `pansharp_fast.sharpen` for the network.
        digest: what identifies the network.
        file: that of its weights.
    """

    name: str
    registered: bool = False
    steps: int | str | None = None
    network: Any = field(default=None, compare=False)
    options: Any = field(default_factory=dict, compare=False)
    digest: str = ""
    file: Path | None = field(default=None, compare=False)

    @property
    def textbook(self) -> bool:
        """Whether this is the toolbox's own: its filters, its phase, nothing registered or projected back."""
        return self.network is None and not self.registered and self.steps is None

    @property
    def label(self) -> str:
        """As tables call it."""
        steps = "" if self.steps is None else f" + {self.steps}"
        return ("registered " if self.registered else "") + TITLES.get(self.name, self.name) + steps

    def identity(self, frame: str, phase: tuple[float, float], ratio: int) -> str:
        """All that a result depends on besides the data."""
        if self.textbook:
            frame, phase = "textbook", (ratio / 2, ratio / 2)
        return (
            f"{self.label} {self.digest or __version__} register={'auto' if self.registered else 'off'} "
            f"back_projection={self.steps or 0} frame={frame} phase={phase[0]:g},{phase[1]:g}"
        )

    def run(self, scene: Scene, frame: str) -> tuple[torch.Tensor, float]:
        """Result [1, C, H, W] in float64, and seconds, those of the registration included."""
        seconds = 0.0
        registration: Any = "off"
        if self.registered:
            registration, seconds = scene.registration
        start = time.perf_counter()
        fused = self._run(scene, frame, registration).cpu().double()
        return fused, seconds + time.perf_counter() - start

    def _run(self, scene: Scene, frame: str, registration: Any) -> torch.Tensor:
        from ..inference import sharpen

        known: dict[str, Any] = {"sensor": scene.sensor, "ratio": scene.ratio}
        if self.textbook and scene.ratio & (scene.ratio - 1) == 0:
            return BASELINES[TITLES[self.name]](scene.pan, scene.ms, **known)
        if self.textbook:  # the toolbox has no filters for such ratios
            return fuse(self.name, scene.pan, scene.ms, phase=scene.ratio / 2, **known)
        which: dict[str, Any] = (
            {"method": self.name} if self.network is None else {"weights": self.network, **self.options}
        )
        # float64 in and out: nothing is rounded beyond float32.
        return sharpen(
            scene.pan,
            scene.ms,
            **which,
            **known,
            phase=scene.phase,
            frame=frame,
            register=registration,
            back_projection=self.steps or 0,
        )


def parse(
    names: Sequence[str], bands: int, options: dict[str, Any], sampling: Sampling | None = None
) -> dict[str, Method]:
    """Label -> method, of names such as "bt-h", "registered bt-h + auto", "tiny" or "registered runs/best.safetensors".

    Args:
        names: `[registered ]NAME[ + N|auto]`, NAME a classical method, shipped weights or a checkpoint file. A
            classical method's name alone is the textbook's.
        bands: MS bands that networks must have.
        options: of networks: device, precision, peak.
        sampling: how diffusion models sample; None is `Sampling()`.

    Raises:
        ValueError: a name is none of these, or two files have one label; sampling without a diffusion model.
    """
    found: dict[str, Method] = {}
    networks: dict[str, Method] = {}
    for text in names:
        match = _NAME.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"methods: expected [registered ]NAME[ + STEPS], got {text!r}")
        name, steps = match["name"], match["steps"]
        if name.lower() in METHODS:
            method = Method(name.lower())
        else:
            method = networks[name] = networks.get(name) or _network(name, bands, options, sampling)
        method = dataclasses.replace(
            method, registered=match["registered"] is not None, steps=int(steps) if steps and steps != "auto" else steps
        )
        if found.get(method.label, method) != method:
            raise ValueError(f"weights: expected files of different names, got {method.label} twice")
        found[method.label] = method
    if sampling is not None and not any("sampling" in method.options for method in networks.values()):
        raise ValueError("steps, sampler, samples, seed: expected a diffusion model to use them, got none")
    return found


def _network(name: str, bands: int, options: dict[str, Any], sampling: Sampling | None) -> Method:
    from ..models import FSAStudent, FSATeacher, load_model
    from ..models.checkpoint import CheckpointError, find_weights

    try:
        path = find_weights(name)
    except CheckpointError as error:
        raise ValueError(f"{error}, or a method of {', '.join(METHODS)}") from None
    model = load_model(path, bands=bands)
    digest = f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]} {options['precision']}"
    options = dict(options)
    if isinstance(model, FSAStudent | FSATeacher):
        from ..diffusion import Sampling

        options["sampling"] = sampling or Sampling()
        values = dataclasses.asdict(options["sampling"])
        digest += "".join(f" {key}={values[key]}" for key in ("steps", "sampler", "samples", "seed"))
    return Method(path.stem, network=model, options=options, digest=digest, file=path)


def off_and_auto(methods: Sequence[Method]) -> list[Method]:
    """Each method without registration and with it, none twice."""
    both = [dataclasses.replace(m, registered=registered) for m in methods for registered in (False, True)]
    return list({method.label: method for method in both}.values())
