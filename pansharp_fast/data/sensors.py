"""One table of sensors: gains of the modulation transfer function, range of values, bands and their colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Sensor:
    """What the package knows about a sensor.

    Attributes:
        name: canonical name, a key of `SENSORS`.
        mtf_ms: gain of the MTF at the Nyquist frequency of the MS grid, one per band; one value serves any band count.
        mtf_pan: the same gain of the PAN band.
        bit_depth: bits of a digital number.
        band_names: names of the MS bands in file order; empty where the order is unknown.
        rgb: 0-based indices of the bands shown as red, green, blue.

    Gains are those of the DLPan toolbox (G. Vivone et al., IEEE GRSM 2021); it knows no GaoFen-2 and takes its default.
    """

    name: str
    mtf_ms: tuple[float, ...]
    mtf_pan: float
    bit_depth: int
    band_names: tuple[str, ...]
    rgb: tuple[int, int, int]

    @property
    def peak(self) -> int:
        """Largest digital number, the data range of PSNR and SSIM and the divisor of normalisation."""
        return 2**self.bit_depth - 1

    @property
    def bands(self) -> int | None:
        """Number of MS bands, or None where any number will do."""
        return len(self.band_names) or None

    def gains(self, bands: int) -> tuple[float, ...]:
        """MTF gains of `bands` MS bands.

        Raises:
            ValueError: the sensor has another number of bands.
        """
        if len(self.mtf_ms) == 1:
            return self.mtf_ms * bands
        if len(self.mtf_ms) != bands:
            raise ValueError(f"sensor {self.name}: expected {len(self.mtf_ms)} bands, got {bands}")
        return self.mtf_ms

    def numbers(self, bands: Sequence[int | str]) -> list[int]:
        """Numbers, from 1, of some MS bands.

        Args:
            bands: numbers from 1, or names of `band_names` (case does not matter).

        Raises:
            ValueError: a band is none of the sensor's, or none is named.
        """
        names = [name.lower() for name in self.band_names]
        found = []
        for band in bands:
            if isinstance(band, str) and band.lower() in names:
                found.append(names.index(band.lower()) + 1)
            elif isinstance(band, int) and band >= 1 and (not names or band <= len(names)):
                found.append(band)
            else:
                known = f"some of {', '.join(self.band_names)} or numbers from 1" if names else "numbers from 1"
                raise ValueError(f"bands: expected {known}, got {band!r}")
        if not found:
            raise ValueError("bands: expected at least one, got none")
        return found

    def select(self, bands: Sequence[int | str]) -> Sensor:
        """This sensor with some of its MS bands, in that order; `bands` and errors as in `numbers`."""
        chosen = [number - 1 for number in self.numbers(bands)]
        shown = [chosen.index(k) for k in self.rgb if k in chosen]
        return replace(
            self,
            mtf_ms=self.mtf_ms if len(self.mtf_ms) == 1 else tuple(self.mtf_ms[k] for k in chosen),
            band_names=tuple(self.band_names[k] for k in chosen) if self.band_names else (),
            rgb=(shown[0], shown[1], shown[2]) if len(shown) == 3 else (0, 0, 0),
        )


_BGRN = ("blue", "green", "red", "NIR")
_WV = ("coastal", "blue", "green", "yellow", "red", "red edge", "NIR1", "NIR2")

#: Canonical name -> sensor.
SENSORS: dict[str, Sensor] = {
    sensor.name: sensor
    for sensor in (
        Sensor("WV2", (0.35,) * 7 + (0.27,), 0.11, 11, _WV, (4, 2, 1)),
        Sensor("WV3", (0.325, 0.355, 0.36, 0.35, 0.365, 0.36, 0.335, 0.315), 0.14, 11, _WV, (4, 2, 1)),
        Sensor("WV4", (0.23,) * 4, 0.16, 11, _BGRN, (2, 1, 0)),
        Sensor("QB", (0.34, 0.32, 0.30, 0.22), 0.15, 11, _BGRN, (2, 1, 0)),
        Sensor("GF2", (0.30,) * 4, 0.15, 10, _BGRN, (2, 1, 0)),
        Sensor("IKONOS", (0.26, 0.28, 0.29, 0.28), 0.17, 11, _BGRN, (2, 1, 0)),
        Sensor("GeoEye1", (0.23,) * 4, 0.16, 11, _BGRN, (2, 1, 0)),
        Sensor("default", (0.30,), 0.15, 16, (), (0, 1, 2)),
    )
}

_ALIASES = {
    "worldview2": "WV2",
    "worldview3": "WV3",
    "worldview4": "WV4",
    "quickbird": "QB",
    "quickbird2": "QB",
    "gaofen2": "GF2",
    "ik": "IKONOS",
    "ge1": "GeoEye1",
    "none": "default",
    "unknown": "default",
} | {name.lower(): name for name in SENSORS}


def get_sensor(sensor: str | Sensor) -> Sensor:
    """The sensor of that name; case, spaces, hyphens and underscores do not matter ("WorldView-3" is WV3).

    Raises:
        ValueError: no such sensor.
    """
    if isinstance(sensor, Sensor):
        return sensor
    key = _ALIASES.get(re.sub(r"[\s_-]", "", sensor).lower())
    if key is None:
        raise ValueError(f"sensor: expected one of {', '.join(SENSORS)}, got {sensor!r}")
    return SENSORS[key]


def gains_of(sensor: Sensor, mtf: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """MTF gains of all bands of a pair: those given, else the sensor's; their mean where it has another number.

    Raises:
        ValueError: another number of gains is given, or one is not between 0 and 1.
    """
    if mtf is not None:
        values = tuple(float(value) for value in mtf)
        if len(values) not in (1, count) or not all(0 < value < 1 for value in values):
            raise ValueError(f"mtf: expected 1 or {count} gains between 0 and 1, got {values}")
        return values * count if len(values) == 1 else values
    own = sensor.mtf_ms
    return own if len(own) == count else (sum(own) / len(own),) * count


#: How products name a sensor in their metadata (GDAL's IMAGERY domain, the provider's own tags) -> key of `SENSORS`.
_IN_METADATA = {
    r"\bWV0?2\b|WORLD-?VIEW-?0?2": "WV2",
    r"\bWV0?3\b|WORLD-?VIEW-?0?3": "WV3",
    r"\bWV0?4\b|WORLD-?VIEW-?0?4": "WV4",
    r"\bQB0?2\b|QUICK-?BIRD": "QB",
    r"\bGE0?1\b|GEO-?EYE-?0?1": "GeoEye1",
    r"\bIKONOS": "IKONOS",
    r"\bGF-?0?2\b|GAO-?FEN-?0?2": "GF2",
}


def sensor_in(*datasets: Any) -> str:
    """Name of the sensor that the metadata of open rasters name, "default" where they name none of `SENSORS`."""
    for dataset in datasets:
        for domain in ("IMAGERY", None):
            for key, value in dataset.tags(ns=domain).items():
                if re.search("SAT|SENSOR|PLATFORM|INSTRUMENT|MISSION", key.upper()):
                    for pattern, name in _IN_METADATA.items():
                        if re.search(pattern, str(value).upper()):
                            return name
    return "default"
