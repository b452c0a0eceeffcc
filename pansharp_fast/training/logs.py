"""Where a training run writes: CSV files, TensorBoard, a progress bar, a picture of the first validation sample."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import pictures
from .config import TrainConfig

logger = logging.getLogger("pansharp_fast")


class _CsvLog:
    """Appends rows to a CSV file; on resuming, rows of steps that will run again are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        if path.exists() and step > 0:
            with open(path, newline="", encoding="utf-8") as file:
                # A kill may have cut the last row short.
                whole = (row for row in csv.DictReader(file) if None not in row.values())
                self._rows = [row for row in whole if int(row["step"]) <= step]
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed by close)
        if self._rows:
            self._begin(list(self._rows[0]))

    def _begin(self, columns: list[str]) -> None:
        """Write everything so far under these columns."""
        self._columns = columns
        self._file.seek(0)
        self._file.truncate()
        self._writer = csv.DictWriter(self._file, columns, extrasaction="ignore")
        self._writer.writeheader()
        self._writer.writerows(self._rows)
        self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if list(row) != self._columns:  # the first row, or one after resuming with other settings
            self._begin(list(row))
        else:
            self._writer.writerow(row)
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def preview(images: tuple[Tensor, Tensor, Tensor], rgb: tuple[int, int, int]) -> Tensor:
    """MS (nearest neighbour), result and reference [C, H, W] side by side: [3, H, 3 W] in [0, 1], stretched alike."""
    ms, fused, gt = (image.float().cpu()[list(rgb)] for image in images)
    ms = ms.repeat_interleave(gt.shape[1] // ms.shape[1], 1).repeat_interleave(gt.shape[2] // ms.shape[2], 2)
    shown = pictures.limits(gt.numpy())
    return torch.from_numpy(pictures.stretch(torch.cat([ms, fused, gt], 2).numpy(), shown)).float()


class Logs:
    """The logs of one run in `folder`; `step` is where the run starts or continues."""

    def __init__(self, folder: Path, config: TrainConfig, step: int, progress: bool) -> None:
        self.folder = folder
        self.training_csv = _CsvLog(folder / "log.csv", step)
        self.valid_csv = _CsvLog(folder / "valid.csv", step)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: SummaryWriter | None = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if step else None
            )
        except ImportError:
            logger.info("tensorboard is not installed: no TensorBoard log")
            self.board = None
        self.bar = None
        if progress:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
            )
            self.task = self.bar.add_task("steps", total=config.steps, completed=step, rate="", status="")
            self.bar.start()
        self.loss, self.measure = "", ""

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self.bar is not None:
            speed = self.bar.tasks[self.task].speed
            rate = f"{speed:.2f} steps/s" if speed else ""
            self.bar.update(self.task, completed=step, rate=rate, status=f"{self.loss} {self.measure}")

    def training(self, step: int, scalars: dict[str, float], rate: float) -> None:
        """Scalars of step `step` and its learning rate."""
        self.training_csv.write({"step": step, "lr": rate, **scalars})
        self.loss = f"loss {scalars['loss']:.4g}"
        if self.board is not None:
            for name, value in {"lr": rate, **scalars}.items():
                self.board.add_scalar(f"train/{name}", value, step)

    def validation(
        self, step: int, measures: dict[str, float], images: tuple[Tensor, Tensor, Tensor], rgb: tuple[int, int, int]
    ) -> None:
        """Measures and the first sample (ms, result, reference) of the validation after `step`."""
        self.valid_csv.write({"step": step, **measures})
        self.measure = " ".join(f"{name} {value:.3f}" for name, value in measures.items())
        picture = preview(images, rgb)
        try:
            from matplotlib.image import imsave

            imsave(self.folder / "valid.png", picture.permute(1, 2, 0).numpy())
        except ImportError:
            logger.info("matplotlib is not installed: no valid.png")
        if self.board is not None:
            for name, value in measures.items():
                self.board.add_scalar(f"valid/{name}", value, step)
            self.board.add_image("valid/ms_result_reference", picture, step)

    def close(self) -> None:
        """Finish the files."""
        if self.bar is not None:
            self.bar.stop()
        self.training_csv.close()
        self.valid_csv.close()
        if self.board is not None:
            self.board.close()
