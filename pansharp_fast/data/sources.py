"""Which files a raster's name stands for: a path, or any other name that GDAL takes."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

try:
    from rasterio._path import _parse_path
except ImportError:  # rasterio before 1.4
    from rasterio.path import _parse_path

#: GDAL's file systems that stay on this machine.
_LOCAL = ("/vsizip/", "/vsitar/", "/vsi7z/", "/vsirar/", "/vsigzip/", "/vsisparse/", "/vsicached?file=", "/vsisubfile/")
#: Drivers that fetch, whatever file they are given.
_REMOTE = {"DAAS", "EEDA", "EEDAI", "GTI", "HTTP", "OGCAPI", "PLMOSAIC", "STACIT", "STACTA", "WCS", "WMS", "WMTS"}
#: A VRT is read whole to see what it is made of; longer ones are none.
_LONGEST = 1 << 26


def source_files(name: str | os.PathLike[str]) -> set[Path]:
    """Local files that a raster is read from: its own, those beside it, the sources of a VRT, an archive."""
    files: set[Path] = set()
    names, seen = [str(name)], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _local_path(name)
        text = _text(name, path)
        if text is not None and "<VRTDataset" in text:
            with contextlib.suppress(ElementTree.ParseError):
                names += _vrt_sources(text, path)
        # Whoever reads the raster reports what is wrong with it.
        with contextlib.suppress(RasterioError, OSError, ValueError), _quiet(), rasterio.open(name) as dataset:
            files |= {found for other in dataset.files if (found := _local_path(other)) is not None}
        if path is not None:
            files.add(path)
    return files


def check_local(name: str, source: str | os.PathLike[str]) -> None:
    """Refuse a raster that needs a network or runs code: a URL, a remote file system or service, also in a VRT.

    Args:
        name: what messages call it.
        source: path or other name that GDAL takes.

    Raises:
        ValueError: it is not made of local files alone.
    """
    reason = _remote(str(source))
    if reason is not None:
        raise ValueError(f"{name}: expected local files, got {reason} (local_only)")


def _drivers() -> set[str]:
    with rasterio.Env() as env:
        return set(env.drivers())


def _remote(name: str) -> str | None:
    """What is not local about a source, if anything is."""
    names, seen = [name], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _local_path(name)
        text = _text(name, path)
        if text is None:
            if path is None:
                return name
            try:
                with _quiet(), DatasetReader(_parse_path(name), driver=sorted(_drivers() - _REMOTE)):
                    continue
            except (RasterioError, OSError, ValueError):
                return f"{name}, which no local driver reads"
        if "<VRTDataset" not in text:
            return f"{name}, a description of a source elsewhere"
        if re.search(r"<PixelFunctionLanguage>\s*python", text, re.IGNORECASE):
            return f"{name}, which runs Python code"
        try:
            names += _vrt_sources(text, path)
        except ElementTree.ParseError:
            return f"{name}, a damaged VRT"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _local_path(name: str) -> Path | None:
    """The file on this machine that a name is about: itself, the archive around it, what follows a driver's name."""
    rest = name.removeprefix("file://")
    rest = re.sub(r"^(zip|tar|gzip|vrt)(\+file)?://", "", rest)
    while rest.startswith(_LOCAL):
        prefix = next(prefix for prefix in _LOCAL if rest.startswith(prefix))
        rest = rest[len(prefix) :]
        if prefix == "/vsisubfile/":
            rest = rest.partition(",")[2]
        rest = rest.removeprefix("{")
    if Path(rest).exists() and not rest.startswith("/vsi"):
        return Path(rest)
    if re.search(r"/vsi\w+[/?]", rest) or re.search(r'(?<!")://', rest) or rest.lstrip().startswith("<"):
        return None
    candidates = [rest, *re.findall(r'"([^"]+)"', rest)]
    candidates += [rest[match.end() :] for match in re.finditer(r"[:,]", rest)]
    candidates += [re.split(r"[?!}]", candidate)[0] for candidate in candidates]
    for candidate in candidates:
        path = Path(candidate)
        for place in (path, *path.parents):
            if place.is_file() or (place == path and place.is_dir() and candidate):
                return place
    return None


def _text(name: str, path: Path | None) -> str | None:
    """The XML or JSON that a source consists of, None for a raster proper."""
    if name.lstrip().startswith("<"):
        return name
    if path is None or not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(1024)  # GDAL looks for its words anywhere in there
        if b"<VRTDataset" not in head and not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<", b"{")):
            return None
        file.seek(0)
        return file.read(_LONGEST).decode("utf-8", "replace")


def _vrt_sources(text: str, path: Path | None) -> list[str]:
    sources = []
    for element in ElementTree.fromstring(text).iter():
        if element.tag in ("SourceFilename", "SourceDataset", "GeolocationDataset") and element.text:
            relative = element.get("relativeToVRT", element.get("relativetoVRT")) == "1" and path is not None
            sources.append(str(path.parent / element.text) if relative and path is not None else element.text)
    return sources
