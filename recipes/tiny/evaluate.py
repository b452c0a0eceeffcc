"""How good weights are at reduced resolution, against classical methods: a Markdown table of means over images.

    python recipes/tiny/evaluate.py WEIGHTS FILE.h5:PEAK [FILE.h5:PEAK ...]

"Brovey" gets PAN with the mean and the standard deviation of the bands' mean, so that its radiometry does not decide.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from pansharp_fast.baselines import brovey, bt_h, exp, gsa, mtf_glp_hpm
from pansharp_fast.data.hdf5 import PanCollection
from pansharp_fast.metrics import ergas, psnr, sam
from pansharp_fast.models import load_model


def matched_brovey(pan: torch.Tensor, ms: torch.Tensor) -> torch.Tensor:
    intensity = exp(pan, ms).mean(1, keepdim=True)
    mean, std = (lambda x: x.mean((2, 3), keepdim=True)), (lambda x: x.std((2, 3), keepdim=True))
    return brovey((pan - mean(pan)) * (std(intensity) / std(pan)) + mean(intensity), ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("files", nargs="+", metavar="FILE:PEAK")
    arguments = parser.parse_args()
    model = load_model(arguments.weights)
    methods: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "23-tap interpolation": exp,
        "Brovey": matched_brovey,
        "GSA": gsa,
        "MTF-GLP-HPM": mtf_glp_hpm,
        "BT-H": bt_h,
        "**ours**": lambda pan, ms: model.sharpen(pan, ms, 1.0),
    }
    print("| file | images | method | PSNR dB | SAM degrees | ERGAS |\n|---|---|---|---|---|---|")
    for item in arguments.files:
        path, peak = item.rsplit(":", 1)
        data = PanCollection(path, peak=float(peak))
        totals = {name: torch.zeros(3, dtype=torch.float64) for name in methods}
        for sample in (data[index] for index in range(len(data))):
            pan, ms, gt = (sample[name][None] for name in ("pan", "ms", "gt"))
            for name, method in methods.items():
                fused = method(pan.float(), ms.float())
                totals[name] += torch.cat([psnr(fused, gt, 1.0), sam(fused, gt), ergas(fused, gt)])
        for name, total in totals.items():
            values = " | ".join(f"{value:.3f}" for value in (total / len(data)).tolist())
            print(f"| {Path(path).stem} | {len(data)} | {name} | {values} |", flush=True)


if __name__ == "__main__":
    main()
