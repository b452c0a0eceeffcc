"""Evaluation: the numbers are the metrics' own, runs go on where they stopped, nothing undefined hides in a mean."""

import csv
import json
import re
import statistics

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pansharp_fast import metrics
from pansharp_fast.baselines import BASELINES, exp, gsa
from pansharp_fast.cli import main
from pansharp_fast.data import degrade, get_sensor
from pansharp_fast.data.observation import blur, move, observe
from pansharp_fast.data.registration import register
from pansharp_fast.diffusion import Sampling
from pansharp_fast.evaluation import evaluate
from pansharp_fast.evaluation.published import CONTRADICTED, PUBLISHED, recognise
from pansharp_fast.evaluation.run import SHIFTS
from pansharp_fast.inference import sharpen
from pansharp_fast.models import FSAConfig, FSAStudent
from pansharp_fast.models.checkpoint import find_weights, save_model
from pansharp_fast.models.pancrafter import PANCrafter, preset


def scenes(count: int, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(pan [N,1,4s,4s], ms [N,4,s,s]) of smooth random textures whose bands share their detail."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(size=(count, 1, 4 * side, 4 * side)))
    detail = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    bands = 400 + torch.arange(4).view(1, 4, 1, 1) * 60 + detail * torch.tensor([300, 400, 500, 350.0]).view(1, 4, 1, 1)
    bands = bands.clamp(20, 1500).round()
    return bands.mean(1, keepdim=True), degrade(bands, bands[:, :1], "QB")[0]


@pytest.fixture(scope="module")
def rr(tmp_path_factory):
    """A PanCollection file with ground truth: three scenes of 64 x 64 pixels."""
    pan, gt = scenes(3)
    ms, low = degrade(gt, pan, "QB")
    path = tmp_path_factory.mktemp("data") / "rr.h5"
    with h5py.File(path, "w") as file:
        file["gt"], file["ms"], file["pan"] = gt.numpy(), ms.numpy(), low.numpy()
    return path, gt, ms, low


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "little.safetensors"
    save_model(path, PANCrafter(preset("tiny", bands=4)))
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = FSAStudent(FSAConfig.preset("tiny", bands=4, teacher=False))
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_model(path, model)
    return path


OPTIONS = {"sensor": "QB", "cut": 6, "pictures_of": 1}


def values(results, protocol="reduced"):
    """Records without times: {(scene, shift, method): values}."""
    return {
        (r["scene"], tuple(r["shift"]), r["method"]): r["values"]
        for r in results["scenes"]
        if r["protocol"] == protocol
    }


def test_values_are_the_metrics(rr, tmp_path):
    path, gt, ms, pan = rr
    found = evaluate(tmp_path, data=path, baselines=["EXP", "GSA"], **OPTIONS)
    for name, method in (("EXP", exp), ("GSA", gsa)):
        fused = method(pan, ms, "QB")
        expected = {
            "PSNR": metrics.psnr(fused, gt, 2047, 6),
            "SSIM": metrics.ssim(fused, gt, 2047, 6),
            "SAM": metrics.sam(fused, gt, 6),
            "ERGAS": metrics.ergas(fused, gt, cut=6),
            "SCC": metrics.scc(fused, gt, 6),
            "Q": metrics.q(fused, gt, 6),
            "Q2n": metrics.q2n(fused, gt, 6),
        }
        for measure, each in expected.items():
            cell = found["summary"]["reduced"][name][measure]
            assert cell["mean"] == pytest.approx(statistics.fmean(each.tolist()), rel=1e-9)
            assert cell["std"] == pytest.approx(statistics.stdev(each.tolist()), rel=1e-6)
            assert (cell["defined"], cell["scenes"]) == (3, 3)


def test_files(rr, tmp_path):
    found = evaluate(tmp_path, data=rr[0], baselines=list(BASELINES), **OPTIONS)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    with open(tmp_path / "scenes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(BASELINES)
    mean = statistics.fmean(float(row["ERGAS"]) for row in rows if row["method"] == "BT-H")
    assert mean == pytest.approx(found["summary"]["reduced"]["BT-H"]["ERGAS"]["mean"], rel=1e-12)
    table = (tmp_path / "summary.md").read_text()
    assert f"{mean:.3f} ± " in table
    assert "Q4 ↑" in table
    page = (tmp_path / "report.html").read_text()
    assert f"{mean:.3f} ± " in page
    assert "<dt>peak</dt><dd>2047</dd>" in page
    # Nothing outside the page is needed, and the one scene asked for is shown: PAN, MS, GT and each method.
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(sources) == 3 * 2 + len(BASELINES) * 3
    best = min(BASELINES, key=lambda name: found["summary"]["reduced"][name]["ERGAS"]["mean"])
    cell = found["summary"]["reduced"][best]["ERGAS"]
    assert f"<td class=best>{cell['mean']:.3f} ± {cell['std']:.3f}</td>" in page


def test_interrupted_run_goes_on(rr, tmp_path, monkeypatch):
    whole = evaluate(tmp_path / "whole", data=rr[0], baselines=["EXP", "GSA"], **OPTIONS)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "cut", data=rr[0], baselines=["EXP", "GSA"], progress=stop, **OPTIONS)
    with open(tmp_path / "cut" / "records.jsonl", "a") as file:
        file.write('{"protocol": "redu')  # killed while writing
    calls = []
    monkeypatch.setitem(BASELINES, "GSA", lambda pan, ms, **known: calls.append(1) or gsa(pan, ms, **known))
    again = evaluate(tmp_path / "cut", data=rr[0], baselines=["EXP", "GSA"], **OPTIONS)
    assert len(calls) == 1  # two of three scenes were there
    assert values(again) == values(whole)
    assert again["summary"] == whole["summary"]


def test_methods_can_join_later(rr, tmp_path, weights):
    evaluate(tmp_path, data=rr[0], baselines=["EXP"], **OPTIONS)
    before = (tmp_path / "records.jsonl").read_text()
    found = evaluate(tmp_path, data=rr[0], baselines=["EXP"], weights=[str(weights)], **OPTIONS)
    after = (tmp_path / "records.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 6
    # A fresh network gives back its upsampled input, bicubic here, which is near the 23-tap one.
    network, plain = (found["summary"]["reduced"][name]["ERGAS"]["mean"] for name in ("little", "EXP"))
    assert network == pytest.approx(plain, rel=0.3)
    only = evaluate(tmp_path, data=rr[0], baselines=["GSA"], **OPTIONS)
    assert list(only["summary"]["reduced"]) == ["GSA"]  # what was not asked for is not reported


def test_diffusion_models_sample_as_told(rr, tmp_path, student):
    path, gt, ms, pan = rr
    options = OPTIONS | {"data": path, "weights": [str(student)], "baselines": [], "max_scenes": 1}
    sampling = Sampling(steps=2, samples=2, seed=3, sampler="dpm++")
    found = evaluate(tmp_path, sampling=sampling, **options)
    fused = sharpen(pan[:1], ms[:1], weights=str(student), peak=2047, sampling=sampling, register="off", phase=2)
    expected = float(metrics.ergas(fused, gt[:1], cut=6))
    record = next(iter(values(found).values()))
    assert record["ERGAS"] == pytest.approx(expected, rel=1e-6)
    other = evaluate(tmp_path, sampling=Sampling(steps=1), **options)  # no result of another way is taken for it
    assert next(iter(values(other).values()))["ERGAS"] != record["ERGAS"]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


def test_other_settings_are_refused(rr, tmp_path):
    evaluate(tmp_path, data=rr[0], **OPTIONS)
    with pytest.raises(ValueError, match="out: expected a new folder or results of the same settings, got others in"):
        evaluate(tmp_path, data=rr[0], **OPTIONS | {"cut": 0})
    found = evaluate(tmp_path, data=rr[0], overwrite=True, **OPTIONS | {"cut": 0})
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == len(found["scenes"]) == 3


def test_undefined_scenes_are_named(rr, tmp_path):
    path = tmp_path / "zero.h5"
    with h5py.File(rr[0]) as source, h5py.File(path, "w") as file:
        for name in ("gt", "ms", "pan"):
            file[name] = source[name][:]
            file[name][1] = 0
    found = evaluate(tmp_path / "out", data=path, **OPTIONS)
    cell = found["summary"]["reduced"]["EXP"]["SAM"]
    assert (cell["defined"], cell["scenes"]) == (2, 3)
    others = [r["values"]["SAM"] for r in found["scenes"] if r["scene"] != "001"]
    assert cell["mean"] == statistics.fmean(others)
    line = "reduced: SAM of EXP is undefined or infinite in 1 of 3 scenes, which its mean leaves out: 001"
    assert line in found["undefined"]
    for file in ("summary.md", "report.html"):
        text = (tmp_path / "out" / file).read_text()
        assert line in text
        assert "(2 of 3 scenes)" in text
    result = CliRunner().invoke(
        main, ["evaluate", "--data", str(path), "--sensor", "QB", "--cut", "6", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0
    assert f"Warning: {line}" in result.stderr


def test_full_resolution(rr, tmp_path):
    path, _, ms, pan = rr
    found = evaluate(tmp_path, data=path, protocols=["full"], baselines=["GSA"], **OPTIONS)
    fused = gsa(pan, ms, "QB")
    for measure, each in {
        "D_lambda_K": metrics.d_lambda_k(fused, ms, "QB"),
        "D_s": metrics.d_s(fused, ms, pan),
        "HQNR": metrics.hqnr(fused, ms, pan, "QB"),
        "D_lambda": metrics.d_lambda(fused, ms),
        "QNR": metrics.qnr(fused, ms, pan),
    }.items():
        mean = found["summary"]["full"]["GSA"][measure]["mean"]
        assert mean == pytest.approx(statistics.fmean(each.tolist()), rel=1e-9)
    assert not (tmp_path / "pictures" / "full-000-GSA-error.png").exists()  # there is nothing to compare with


def test_shift_test(rr, tmp_path):
    found = evaluate(tmp_path, data=rr[0], baselines=["EXP", "GSA"], shift_scenes=2, **OPTIONS)
    for direction in "xy":
        distances, plain = zip(*found["shift"]["EXP"]["ERGAS"][direction], strict=True)
        assert distances == SHIFTS
        assert len(set(plain)) == 1  # takes nothing from PAN
        ergas = [value for _, value in found["shift"]["GSA"]["ERGAS"][direction]]
        assert ergas[0] < plain[0]
        assert ergas[-1] > 1.2 * ergas[0]
    assert list(found["summary"]["reduced"]) == ["EXP", "GSA"]  # registered ones were measured for the shifts alone
    at_rest = statistics.fmean(values(found)[name, (0, 0), "GSA"]["ERGAS"] for name in ("000", "001"))
    assert found["shift"]["GSA"]["ERGAS"]["x"][0][1] == pytest.approx(at_rest, rel=1e-12)
    assert found["shift"]["EXP"]["sharpness"]["x"][0][1] < 1
    assert (tmp_path / "shift.png").read_bytes().startswith(b"\x89PNG")
    assert "Shift test" in (tmp_path / "report.html").read_text()


@pytest.fixture
def pair(tmp_path):
    """A PAN and an MS GeoTIFF of 512 x 512 and 128 x 128 pixels whose last corner holds no data."""
    rasterio = pytest.importorskip("rasterio")
    pan, ms = scenes(1, 128)
    pan[..., -100:, -100:], ms[..., -25:, -25:] = 0, 0
    for name, image, size in (("pan", pan, 1), ("ms", ms, 4)):
        height, width = image.shape[-2:]
        profile = {"driver": "GTiff", "dtype": "uint16", "nodata": 0, "crs": "EPSG:32631"}
        transform = rasterio.Affine(size, 0, 500000, 0, -size, 5000000)
        with rasterio.open(
            tmp_path / f"{name}.tif",
            "w",
            height=height,
            width=width,
            count=image.shape[1],
            transform=transform,
            **profile,
        ) as file:
            file.write(image[0].numpy().round().astype("uint16"))
    return {"pan": tmp_path / "pan.tif", "ms": tmp_path / "ms.tif"}


def test_rasters_are_cropped_and_crops_without_data_left_out(pair, tmp_path):
    found = evaluate(tmp_path / "out", **pair, crop=256, baselines=["EXP", "GSA"], **OPTIONS)
    names = ["row 0 column 0", "row 0 column 256", "row 256 column 0"]
    for protocol in ("reduced", "full"):
        assert [name for name, _, method in values(found, protocol) if method == "GSA"] == names
    cells = {name: found["summary"]["reduced"][name]["ERGAS"]["mean"] for name in ("EXP", "GSA")}
    assert cells["GSA"] < cells["EXP"]
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(pair["ms"]) as file:
        gt = torch.from_numpy(file.read().astype("float64"))[None, :, 64:128, :64]
    with rasterio.open(pair["pan"]) as file:
        pan = torch.from_numpy(file.read().astype("float64"))[None, :, 256:512, :256]
    ms, low = degrade(gt, pan, "QB")
    expected = float(metrics.ergas(gsa(low, ms, "QB"), gt, cut=6))
    assert values(found)["row 256 column 0", (0, 0), "GSA"]["ERGAS"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data, pan, ms: expected either data or both pan and ms"),
        ({"pan": "a", "data": "b"}, "data, pan, ms: expected either data or both pan and ms"),
        ({"sensor": "WV3"}, "sensor WV3: expected 8 bands, got 4"),
        ({"baselines": []}, "weights, baselines, methods: expected at least one method, got none"),
        ({"baselines": ["PCA"]}, "baselines: expected all or some of EXP, .*, got 'PCA'"),
        ({"protocols": ["both"]}, "protocols: expected some of reduced, full, got 'both'"),
        ({"published": "WV9"}, "published: expected none or one of WV3, GF2, QB, WV2, got 'WV9'"),
        ({"weights": ["no-such"]}, "weights: expected a file or one of .*, or a method of exp, brovey,"),
        ({"methods": ["registered nothing + 2"]}, "weights: expected a file or one of .*, got 'nothing'"),
        ({"bands": ["blue", "ultraviolet"]}, "bands: expected some of blue, green, red, NIR or numbers from 1"),
        ({"bands": [5]}, "bands: expected some of blue, .*, got 5"),
        ({"sampling": Sampling(steps=2)}, "steps, sampler, samples, seed: expected a diffusion model to use them"),
    ],
)
def test_bad_arguments(rr, tmp_path, options, message):
    data = {} if options in ({}, {"pan": "a", "data": "b"}) else {"data": rr[0]}
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", **{**OPTIONS, **data, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ms": (2, 4, 16, 16)}, r"data: expected data sets ms and pan, got \['ms'\]"),
        ({"ms": (2, 4, 16, 16), "pan": (2, 1, 33, 32)}, r"data: pan: expected \(2, 1, 32, 32\) to fit ms"),
        ({"ms": (2, 4, 16, 16), "pan": (2, 1, 16, 16)}, r"data: pan: expected \(2, 1, 64, 64\) to fit ms"),
        ({"ms": (0, 4, 16, 16), "pan": (0, 1, 64, 64)}, r"data: ms: expected \[N, C, h, w\], none of them 0"),
    ],
)
def test_bad_files(tmp_path, sizes, message):
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        for name, shape in sizes.items():
            file[name] = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", data=tmp_path / "bad.h5", **OPTIONS)


# ---- published numbers -----------------------------------------------------------------------------------------------


def test_test_sets_are_recognised_by_what_they_are():
    assert recognise("WV3", "reduced", 20, 256) == "WV3"
    assert recognise("QB", "full", 20, 512) == "QB"
    assert recognise("WV3", "reduced", 19, 256) is None
    assert recognise("WV3", "full", 20, 256) is None
    assert recognise("IKONOS", "reduced", 20, 256) is None


def test_published_numbers_are_plausible():
    """A slip of a column in the tables would leave these bounds."""
    bounds = {"HQNR": (0.79, 0.97), "D_s": (0.01, 0.11), "D_lambda_K": (0.01, 0.05), "SCC": (0.87, 1), "Q2n": (0.9, 1)}
    bounds |= {"PSNR": (26, 46), "SSIM": (0.96, 0.99), "SAM": (0.5, 10.2), "ERGAS": (0.5, 5.8)}
    for entry in PUBLISHED.values():
        for row in entry.rows.values():
            for measure, value in row.items():
                assert bounds[measure][0] <= value <= bounds[measure][1]
            if {"HQNR", "D_s", "D_lambda_K"} <= set(row):
                assert row["HQNR"] == pytest.approx((1 - row["D_s"]) * (1 - row["D_lambda_K"]), abs=2.5e-3)


def test_contradiction_is_shown(rr, tmp_path):
    assert CONTRADICTED == {("GF2", "PAN-Crafter", "ERGAS"): 0.552}
    found = evaluate(tmp_path, data=rr[0], published="GF2", **OPTIONS)
    assert found["published"] == {"reduced": "GF2"}
    for file in ("summary.md", "report.html"):
        text = (tmp_path / file).read_text()
        assert "0.522 / 0.552 (!)" in text
        assert "neither is confirmed" in text
        assert "Compared on request" in text
        assert "EXP (this run)" in text
    plain = evaluate(tmp_path, data=rr[0], **OPTIONS)
    assert plain["published"] == {}  # a set of another size is not compared unless asked


# ---- command line ----------------------------------------------------------------------------------------------------


def test_command(rr, tmp_path, weights):
    arguments = ["--data", str(rr[0]), "--sensor", "QB", "--weights", str(weights), "--baselines", "all", "--cut", "6"]
    result = CliRunner().invoke(main, ["evaluate", *arguments, "--pictures", "0", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["summary"]["reduced"]) == [*BASELINES, "little"]
    assert f"{found['summary']['reduced']['little']['SAM']['mean']:.3f} ± " in result.stdout
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in result.stdout


def test_command_with_a_diffusion_model(rr, tmp_path, student):
    arguments = ["--data", str(rr[0]), "--sensor", "QB", "--weights", str(student), "--cut", "6", "--max-scenes", "1"]
    arguments += ["--steps", "2", "--samples", "2", "--sampler", "dpm++", "--seed", "3", "--baselines", "none"]
    result = CliRunner().invoke(main, ["evaluate", *arguments, "--pictures", "0", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    [identity] = json.loads((tmp_path / "results.json").read_text())["settings"]["methods"].values()
    assert "steps=2 sampler=dpm++ samples=2 seed=3" in identity


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sensor", "QB", "--data", "x.h5", "--steps", "501"], 1, "Error: steps: expected 1 to 500"),
        (["--sensor", "QB", "--data", "x.h5", "--sampler", "euler"], 2, "'euler' is not one of"),
        (["--sensor", "QB", "--baselines", "PCA"], 2, "expected all, none or some of EXP,Brovey,GSA,"),
        (["--sensor", "QB"], 1, "Error: data, pan, ms: expected either data or both pan and ms"),
        (["--sensor", "nothing", "--data", "x.h5"], 1, "Error: sensor: expected one of"),
        (["--sensor", "QB", "--data", "x.h5"], 1, "Error: "),
    ],
)
def test_command_fails_in_one_line(tmp_path, arguments, code, message):
    result = CliRunner().invoke(main, ["evaluate", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_file_of_the_report_is_an_input(rr, tmp_path):
    data = tmp_path / "results.json"
    data.write_bytes(rr[0].read_bytes())
    with pytest.raises(ValueError, match=r"out: results.json: expected another file than the input, got .* of data"):
        evaluate(tmp_path, data=data, baselines=["EXP"], **OPTIONS)
    assert data.read_bytes() == rr[0].read_bytes()
    assert list(tmp_path.iterdir()) == [data]


def test_weights_are_loaded_once_and_a_folder_of_their_name_hides_nothing(rr, tmp_path, monkeypatch):
    from pansharp_fast.models import checkpoint

    loads = []
    read = checkpoint.read_checkpoint
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path: loads.append(path) or read(path))
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    found = evaluate("out", data=rr[0], weights=["tiny"], baselines=[], max_scenes=1, **OPTIONS | {"pictures_of": 0})
    assert list(found["summary"]["reduced"]) == ["tiny"]
    assert len(loads) == 1


def test_sensor_is_the_one_that_the_file_names(rr, tmp_path):
    path = tmp_path / "named.h5"
    with h5py.File(rr[0]) as source, h5py.File(path, "w") as file:
        for name in ("gt", "ms", "pan"):
            file[name] = source[name][:1]
        file.attrs["sensor"] = "QuickBird"
    options = {"cut": 6, "pictures_of": 0}
    named = evaluate(tmp_path / "named", data=path, **options)
    assert (named["settings"]["sensor"], named["settings"]["peak"]) == ("QB", 2047)
    unnamed = evaluate(tmp_path / "unnamed", data=rr[0], **options)
    assert (unnamed["settings"]["sensor"], unnamed["settings"]["peak"]) == ("default", 65535)
    with h5py.File(path, "a") as file:
        file.attrs["sensor"] = "WV3"  # of eight bands
    misnamed = evaluate(tmp_path / "misnamed", data=path, **options)
    assert misnamed["settings"]["sensor"] == "default"


def test_local_files_alone(pair, tmp_path):
    with pytest.raises(ValueError, match=r"MS: expected local files, got .*\(local_only\)"):
        evaluate(tmp_path / "out", pan=pair["pan"], ms="/vsicurl/http://localhost:9/ms.tif", local_only=True)
    assert not (tmp_path / "out").exists()
    arguments = ["evaluate", "--local-only", "--pan", "/vsicurl/http://localhost:9/a.tif", "--ms", str(pair["ms"])]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "PAN: expected local files" in result.output


def test_sensor_is_the_one_that_rasters_name(pair, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(pair["ms"], "r+") as file:
        file.update_tags(SATID="QB02")
    found = evaluate(tmp_path / "out", **pair, crop=256, max_scenes=1, protocols=["reduced"], cut=6, pictures_of=0)
    assert (found["settings"]["sensor"], found["settings"]["peak"]) == ("QB", 2047)


def test_page_escapes_names(tmp_path, rr):
    """A scene, a file or a method may be called anything."""
    evil = "<script>alert(1)</script>|&.h5".replace("/", "\N{DIVISION SLASH}")
    path = tmp_path / evil
    path.write_bytes(rr[0].read_bytes())
    weights = tmp_path / "<b>x</b>.safetensors".replace("/", "\N{DIVISION SLASH}")
    weights.write_bytes(find_weights("tiny").read_bytes())
    evaluate(tmp_path / "out", data=path, weights=[str(weights)], max_scenes=1, **OPTIONS)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "<b>x" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;x" in page
    table = (tmp_path / "out" / "summary.md").read_text()
    assert "<script" not in table
    assert "<b>x" not in table


# ---- registered methods, other ratios, other phases ------------------------------------------------------------------


D = torch.tensor([[1.4, -2.0], [1.2, -1.7], [1.3, -1.9], [0.4, -0.9]])


def displaced(ratio, phase, side=48, seed=7):
    """(pan, ms, gt) [2, ...]: gt in MS's frame, bands displaced against PAN by D, MS by the model of observation."""
    rng = torch.Generator().manual_seed(seed)
    detail = blur(torch.rand(2, 1, ratio * side, ratio * side, generator=rng, dtype=torch.float64), 1.2)
    slow = blur(torch.rand(2, 4, ratio * side, ratio * side, generator=rng, dtype=torch.float64), 6.0)
    scene = 200 + 3000 * (detail - detail.mean() + 0.6 * (slow - slow.mean())) + 500
    gains = get_sensor("QB").gains(4)
    ms = observe(scene, (side, side), gains=gains, ratio=ratio, phase=phase, d=D)
    return scene.mean(1, keepdim=True), ms, move(scene, D)


@pytest.mark.parametrize(("ratio", "phase"), [(4, None), (4, 1.5), (2, None), (3, 1.0), (8, (3.5, 4.0))])
def test_registered_methods_at_any_ratio_and_phase(tmp_path, ratio, phase):
    pan, ms, gt = displaced(ratio, ratio / 2 if phase is None else phase)
    path = tmp_path / "displaced.h5"
    with h5py.File(path, "w") as file:
        file["gt"], file["ms"], file["pan"] = gt.numpy(), ms.numpy(), pan.numpy()
        file.attrs["sensor"] = "QB"
        if phase is not None:
            file.attrs["phase"] = phase
    names = ["bt-h", "registered bt-h", "registered BT-H+2", "registered bt-h + auto"]
    found = evaluate(tmp_path / "out", data=path, methods=names, baselines=[], cut=2 * ratio, pictures_of=0)
    cells = found["summary"]["reduced"]
    assert list(cells) == ["BT-H", "registered BT-H", "registered BT-H + 2", "registered BT-H + auto"]
    ergas = {name: cell["ERGAS"]["mean"] for name, cell in cells.items()}
    assert ergas["registered BT-H + 2"] < 0.75 * ergas["BT-H"]
    assert ergas["registered BT-H + 2"] <= ergas["registered BT-H + auto"] <= ergas["registered BT-H"]
    identities = found["settings"]["methods"]
    assert len(set(identities.values())) == 4
    both = (ratio / 2,) * 2 if phase is None else tuple(np.broadcast_to(phase, 2))
    assert identities["registered BT-H + auto"].endswith(
        f"register=auto back_projection=auto frame=ms phase={both[0]:g},{both[1]:g}"
    )
    assert "register=off back_projection=0 frame=textbook" in identities["BT-H"]


def test_registered_methods_stay_what_they_are_under_shifts(tmp_path):
    pan, ms, gt = displaced(4, 2, side=64)
    path = tmp_path / "displaced.h5"
    with h5py.File(path, "w") as file:
        file["gt"], file["ms"], file["pan"] = gt[:1].numpy(), ms[:1].numpy(), pan[:1].numpy()
    options = {"data": path, "sensor": "QB", "cut": 16, "pictures_of": 0, "shift_scenes": 1}
    curves = evaluate(tmp_path / "out", baselines=["BT-H"], **options)["shift"]
    assert list(curves) == ["BT-H", "registered BT-H"]
    for direction in "xy":
        off, auto = (dict(map(tuple, curves[name]["ERGAS"][direction])) for name in curves)
        for distance in SHIFTS[: SHIFTS.index(3.0) + 1]:
            assert auto[distance] < 1.05 * auto[0.0]
        assert max(off[distance] for distance in SHIFTS) > 1.5 * auto[0.0]


def test_full_resolution_registered(tmp_path):
    pan, ms, _ = displaced(4, 2)
    path = tmp_path / "full.h5"
    with h5py.File(path, "w") as file:
        file["ms"], file["pan"] = ms.numpy(), pan.numpy()
    names = ["registered bt-h", "registered bt-h + 2", "registered gsa"]
    found = evaluate(tmp_path / "out", data=path, sensor="QB", methods=names, baselines=["BT-H"], pictures_of=0)
    mean = {m: {k: cell["mean"] for k, cell in row.items()} for m, row in found["summary"]["full"].items()}
    assert mean["registered GSA"]["mottle"] == pytest.approx(1, abs=1e-6)
    assert mean["registered GSA"]["halo"] == pytest.approx(1, abs=1e-6)
    for measure in ("D_lambda_K registered", "consistency"):
        assert mean["registered BT-H + 2"][measure] < mean["registered BT-H"][measure] < mean["BT-H"][measure]
    fused = sharpen(pan[:1], ms[:1], method="bt-h", sensor="QB", phase=2, back_projection=2)
    d = register(pan[:1], ms[:1], sensor="QB", phase=2).d
    expected = float(metrics.d_s(fused, ms[:1], pan[:1], phase=2, d=d))
    record = values(found, "full")["000", (0, 0), "registered BT-H + 2"]
    assert record["D_s registered"] == pytest.approx(expected, rel=1e-6)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<th>D_s registered ↓</th>" in page
    assert "<th>D_s ↓</th>" in page
    assert "mottle: colour mottle over registered GSA&#x27;s; halo: " in page


@pytest.mark.parametrize("ratio", [2, 3, 6])
def test_rasters_of_other_ratios_and_offsets(tmp_path, ratio):
    """MS half a PAN pixel off, as Landsat's is: whole crops, the phase of the georeferencing."""
    rasterio = pytest.importorskip("rasterio")
    pan, ms, _ = displaced(ratio, ratio / 2 - 1, side=72)
    for name, image, size, origin in (("pan", pan, 1, (0, 0)), ("ms", ms, ratio, (-0.5, -0.5))):
        transform = rasterio.Affine(size, 0, 500000 + origin[1], 0, -size, 5000000 - origin[0])
        with rasterio.open(
            tmp_path / f"{name}.tif",
            "w",
            driver="GTiff",
            dtype="float32",
            count=image.shape[1],
            height=image.shape[2],
            width=image.shape[3],
            transform=transform,
            crs="EPSG:32631",
        ) as file:
            file.write(image[0].numpy().astype("float32"))
    options = {"pan": tmp_path / "pan.tif", "ms": tmp_path / "ms.tif", "sensor": "QB", "cut": 4, "pictures_of": 1}
    found = evaluate(tmp_path / "out", methods=["registered bt-h + 2"], baselines=["BT-H"], **options)
    reduced, full = (found["summary"][protocol] for protocol in ("reduced", "full"))
    assert reduced["registered BT-H + 2"]["ERGAS"]["mean"] < reduced["BT-H"]["ERGAS"]["mean"]
    assert full["registered BT-H + 2"]["D_lambda_K registered"]["mean"] < 0.05
    record = next(r for r in found["scenes"] if r["protocol"] == "full" and "registered" in r["method"])
    # A crop starts at the first whole MS pixel that lies near PAN's own pixels.
    assert record["identity"].endswith(f"phase={ratio / 2 - 1:g},{ratio / 2 - 1:g}")
    if ratio & (ratio - 1):
        assert full["BT-H"]["D_s"]["mean"] is None  # the toolbox has no filters for this ratio


def test_bands_by_name_or_number(rr, tmp_path):
    path, gt, ms, pan = rr
    options = OPTIONS | {"baselines": ["GSA"], "max_scenes": 1, "pictures_of": 0}
    named = evaluate(tmp_path / "named", data=path, bands=["nir", "Red"], **options)
    numbered = evaluate(tmp_path / "numbered", data=path, bands=[4, 3], **options)
    assert values(named) == values(numbered)
    part = get_sensor("QB").select([4, 3])
    expected = float(metrics.ergas(gsa(pan[:1], ms[:1, [3, 2]], part), gt[:1, [3, 2]], cut=6))
    assert next(iter(values(named).values()))["ERGAS"] == pytest.approx(expected, rel=1e-9)
    arguments = ["--data", str(path), "--sensor", "QB", "--bands", "NIR,3", "--baselines", "none", "--cut", "6"]
    arguments += ["--methods", "gsa, registered gsa + 1", "--pictures", "0", "--out", str(tmp_path / "line")]
    result = CliRunner().invoke(main, ["evaluate", *arguments, "--max-scenes", "1"])
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "line" / "results.json").read_text())
    assert list(line["summary"]["reduced"]) == ["GSA", "registered GSA + 1"]
    assert line["summary"]["reduced"]["GSA"]["ERGAS"]["mean"] == pytest.approx(expected, rel=1e-9)
