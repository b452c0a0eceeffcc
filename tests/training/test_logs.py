"""CSV files across interruptions, and the picture."""

import torch

from pansharp_fast.training.logs import _CsvLog, preview


def test_rows_that_run_again_are_dropped(tmp_path):
    path = tmp_path / "log.csv"
    log = _CsvLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5})
    log.close()
    with open(path, "a") as file:
        file.write("4")  # a kill in the middle of a row
    _CsvLog(path, 2).close()
    assert path.read_text().splitlines() == ["step,loss", "1,0.5", "2,0.5"]
    log = _CsvLog(path, 2)
    log.write({"step": 3, "loss": 0.25, "sam": 0.1})  # other settings: a new column
    log.write({"step": 4, "loss": 0.25, "sam": 0.1})
    log.close()
    assert path.read_text().splitlines() == ["step,loss,sam", "1,0.5,", "2,0.5,", "3,0.25,0.1", "4,0.25,0.1"]
    _CsvLog(path, 0).close()
    assert path.read_text() == ""


def test_preview_stretches_all_three_by_the_reference():
    gt = torch.linspace(0, 1, 100).view(1, 10, 10).repeat(4, 1, 1)[:, :8, :8] * 0.2 + 0.4
    ms, fused = gt[:, 2::4, 2::4], gt - 1
    picture = preview((ms, fused, gt), (2, 1, 0))
    assert picture.shape == (3, 8, 24)
    assert float(picture[:, :, 8:16].max()) == 0  # far below the reference's range
    assert float(picture[:, :, 16:].min()) == 0
    assert float(picture[:, :, 16:].max()) == 1
    torch.testing.assert_close(picture[:, 0, 0], picture[:, 2, 18])
