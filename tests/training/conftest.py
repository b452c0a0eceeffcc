"""A small PanCollection pair of files and the settings of a short run."""

import h5py
import numpy as np
import pytest
import torch

from pansharp_fast.data.mtf import decimate, mtf_filter


def write(path, count, seed):
    """Smooth random scenes whose bands show one structure and whose PAN is the mean of the bands."""
    rng = np.random.default_rng(seed)
    structure = mtf_filter(torch.from_numpy(rng.normal(size=(count, 1, 36, 36))), ratio=4)
    gain, offset = (torch.from_numpy(rng.uniform(low, high, (count, 4, 1, 1))) for low, high in ((0.5, 1), (600, 900)))
    gt = offset + 3000 * gain * structure
    with h5py.File(path, "w") as file:
        file["gt"] = gt.round().numpy().clip(0, 2047).astype(np.uint16)
        file["ms"] = decimate(mtf_filter(gt, "QB")).numpy()
        file["pan"] = gt.mean(1, keepdim=True).numpy()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write(folder / "train.h5", 10, 1)
    write(folder / "valid.h5", 3, 2)
    return {"train": str(folder / "train.h5"), "valid": str(folder / "valid.h5")}


@pytest.fixture
def settings(files):
    """Ten steps of two epochs and a half."""
    return {
        **files, "sensor": "QB", "device": "cpu", "preset": "tiny", "steps": 10, "batch_size": 4, "lr": 2e-3,
        "warmup": 2, "precision": "float32", "log_every": 1, "valid_every": 4, "save_every": 3, "ema": 0.8,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums are then cut the same way in this process and in those that tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
