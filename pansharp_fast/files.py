"""Writing of files: aside, then in one move to their place; and nothing over an input or another output."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Name = str | os.PathLike[str]


@contextlib.contextmanager
def atomic(path: Name) -> Iterator[Path]:
    """Yields a path to write to; at the end of the block the file there appears at `path`, whole and on the disk.

    If the block fails, `path` stays as it was and nothing is left behind. A link at `path` stays a link: what it
    points at is replaced.
    """
    with work_folder(path) as folder:
        part = folder / Path(path).name
        yield part
        move(part, path)


@contextlib.contextmanager
def work_folder(path: Name, prefix: str = ".write-") -> Iterator[Path]:
    """A hidden folder `prefix`* beside the file at `path` (where a link there leads), gone after the block."""
    folder = Path(os.path.realpath(path)).parent
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name:
        yield Path(name)


def move(part: Path, path: Name) -> None:
    """Put the file `part` on the disk and then in the place of `path`, on the same file system, through links."""
    target = os.path.realpath(path)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
        handle = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_target(name: str, path: Name, overwrite: bool) -> None:
    """Raise OSError unless a file may be written at `path`; `name` is what the message calls it."""
    path = Path(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: expected an existing folder, got {folder}")
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file name, got the folder {path}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{name}: expected a new file, got existing {path} (overwrite replaces it)")


def check_distinct(outputs: Mapping[str, Name | None], inputs: Mapping[str, Iterable[Name]]) -> None:
    """Refuse outputs that are an input or each other, under whatever name.

    Args:
        outputs: files to be written, by what messages call them; None is none. Files that GDAL would read together
            with one (`OUT.tif.ovr` with `OUT.tif`) go with it.
        inputs: files that are read, by what messages call them.

    Raises:
        ValueError: two of them are one file: the same path, a link, or another name of it.
    """
    targets = {name: Path(path) for name, path in outputs.items() if path is not None}
    for number, (name, path) in enumerate(targets.items()):
        for source, files in inputs.items():
            for file in files:
                if _same(path, Path(file)):
                    raise ValueError(f"{name}: expected another file than the input, got {path}, a file of {source}")
        for other, second in list(targets.items())[:number]:
            if _same(path, second) or _same(second, path):
                raise ValueError(f"{name}: expected another file than {other}, got {path}")


def check_folder(name: str, folder: Name, files: Iterable[str], inputs: Mapping[str, Iterable[Name]]) -> None:
    """`check_distinct` for `files` that will be written into `folder`, which messages call `name`.

    Raises:
        ValueError: one of them is an input.
    """
    check_distinct({f"{name}: {file}": Path(folder) / file for file in files}, inputs)


def _same(output: Path, other: Path) -> bool:
    """Whether `other` is `output`, or a file beside it whose name begins with its name and a dot."""
    if output.exists() and other.exists() and output.samefile(other):
        return True
    one, two = (Path(os.path.realpath(path)) for path in (output, other))
    return one.parent == two.parent and (two.name == one.name or two.name.startswith(f"{one.name}."))
