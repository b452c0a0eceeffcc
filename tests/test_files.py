"""Files appear whole or not at all, and never over an input or another output."""

import os
from pathlib import Path

import pytest

from pansharp_fast.files import atomic, check_distinct, check_target


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end(tmp_path):
    target = tmp_path / "new.bin"
    with atomic(target) as part:
        part.write_bytes(b"one")
        assert part.parent.parent == tmp_path
        assert not target.exists()
    assert target.read_bytes() == b"one"
    with atomic(target) as part:
        part.write_bytes(b"two")
        assert target.read_bytes() == b"one"
    assert target.read_bytes() == b"two"
    assert names(tmp_path) == ["new.bin"]
    mode, mask = target.stat().st_mode & 0o777, os.umask(0)
    os.umask(mask)
    assert mode == 0o666 & ~mask


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "old.bin"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic(target) as part:
            part.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["old.bin"]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "none.bin"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("existing", [True, False])
def test_a_link_stays_a_link(tmp_path, existing):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.bin", tmp_path / "link.bin"
    if existing:
        real.write_bytes(b"old")
    link.symlink_to(real)
    with atomic(link) as part:
        part.write_bytes(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert names(tmp_path) == ["elsewhere", "link.bin"]
    assert names(tmp_path / "elsewhere") == ["real.bin"]


def test_targets(tmp_path):
    check_target("OUT", tmp_path / "new.bin", False)
    (tmp_path / "old.bin").touch()
    check_target("OUT", tmp_path / "old.bin", True)
    (tmp_path / "lost.bin").symlink_to(tmp_path / "nowhere" / "file.bin")
    for path, error, message in (
        (tmp_path / "old.bin", FileExistsError, "OUT: expected a new file, got existing"),
        (tmp_path, IsADirectoryError, "OUT: expected a file name, got the folder"),
        (tmp_path / "nowhere" / "x.bin", FileNotFoundError, "OUT: expected an existing folder, got"),
        (tmp_path / "lost.bin", FileNotFoundError, "OUT: expected an existing folder, got"),
    ):
        with pytest.raises(error, match=message):
            check_target("OUT", path, False)


def test_one_file_under_two_names(tmp_path, monkeypatch):
    source = tmp_path / "in.tif"
    source.touch()
    (tmp_path / "soft.tif").symlink_to(source)
    (tmp_path / "hard.tif").hardlink_to(source)
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    ways = ["in.tif", source, "./in.tif", f"../{tmp_path.name}/in.tif", "soft.tif", "hard.tif", "folder/in.tif"]
    for way in ways:
        with pytest.raises(ValueError, match=r"OUT: expected another file than the input, got .*, a file of PAN"):
            check_distinct({"OUT": way}, {"PAN": [source]})
        with pytest.raises(ValueError, match="preview: expected another file than OUT, got"):
            check_distinct({"OUT": source, "preview": way}, {})
    with pytest.raises(ValueError, match=r"preview: expected another file than OUT, got new.tif"):
        check_distinct({"OUT": tmp_path / "new.tif", "uncertainty": None, "preview": "new.tif"}, {})
    for first, second in (("out.tif", "out.tif.ovr"), ("out.tif.msk", "out.tif")):
        with pytest.raises(ValueError, match="preview: expected another file than OUT, got"):
            check_distinct({"OUT": first, "preview": second}, {})
    with pytest.raises(ValueError, match="OUT: expected another file than the input"):
        check_distinct({"OUT": "out.tif"}, {"MS": ["ms.tif", "out.tif.msk"]})
    check_distinct({"OUT": "out.tif", "preview": "out.png"}, {"PAN": [source], "MS": ["out.tiff"]})
