"""Tables and the page: what was measured, as JSON, CSV, Markdown and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic
from ..metrics.measures import MEASURES
from ..pictures import STRETCH
from . import pictures
from .published import CONTRADICTED, PUBLISHED

TITLES = {"reduced": "Reduced resolution (against ground truth)", "full": "Full resolution (no reference)"}

DEFINITIONS = """\
Measures follow the DLPan toolbox (SAM, ERGAS, SCC, Q, Q2n, D_lambda_K, D_s, HQNR, and D_lambda and QNR of the \
original QNR); PSNR pools one error over all bands; SSIM uses a Gaussian window, sigma 1.5. The textbook's measures at \
full resolution know of no displacement between PAN and MS; those called registered, consistency, mottle and halo are \
taken with the displacement that was measured. Values are computed in float64 from unrounded, unclipped results. Each \
cell: mean of the scenes' values ± sample standard deviation (N-1). Bold: best of its column as printed. Seconds: the \
median of a scene, registration included, on the machine named below. A method's name alone means the textbook's."""


def _legend(found: Mapping[str, Any]) -> str:
    """What the measures of the tables are, in a line each."""
    used = dict.fromkeys(m for cells in found["summary"].values() for row in cells.values() for m in row)
    return "; ".join(f"{name(m, found['bands'])}: {MEASURES[m].meaning}" for m in used) + "."


def _cell(values: Sequence[float | None]) -> dict[str, Any]:
    defined = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(defined) if defined else None,
        "std": statistics.stdev(defined) if len(defined) > 1 else None,
        "defined": len(defined),
        "scenes": len(values),
    }


def results(
    records: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    settings: Mapping[str, Any],
    bands: int,
    published: Mapping[str, str | None],
    recognised: bool,
) -> dict[str, Any]:
    """Everything the files say, from a run's records.

    published: protocol -> data set of `PUBLISHED` to compare with, "none" or None. recognised: whether the data has the
    sensor, number and size of scenes of that data set.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    seconds: dict[str, dict[str, float]] = {}
    undefined = []
    for protocol in TITLES:
        for method in methods:
            mine = [r for r in records if r["protocol"] == protocol and r["method"] == method]
            if not mine:
                continue
            cells = {measure: _cell([r["values"][measure] for r in mine]) for measure in mine[0]["values"]}
            summary.setdefault(protocol, {})[method] = cells
            seconds.setdefault(protocol, {})[method] = statistics.median(r["seconds"] for r in mine)
            for measure, cell in cells.items():
                if cell["defined"] < cell["scenes"]:
                    left_out = [r["scene"] for r in mine if r["values"][measure] is None]
                    undefined.append(
                        f"{protocol}: {measure} of {method} is undefined or infinite in {len(left_out)} of "
                        f"{cell['scenes']} scenes, which its mean leaves out: {', '.join(left_out)}"
                    )
    curves: dict[str, dict[str, dict[str, list[list[float | None]]]]] = {}
    for method in dict.fromkeys(r["method"] for r in records if r["protocol"] == "shift"):
        mine = [r for r in records if r["protocol"] == "shift" and r["method"] == method]
        for measure in mine[0]["values"] if mine else ():
            for axis, other in ((0, 1), (1, 0)):
                line = []
                for distance in sorted({r["shift"][axis] for r in mine}):
                    values = [r for r in mine if r["shift"][axis] == distance and r["shift"][other] == 0]
                    line.append([distance, _cell([r["values"][measure] for r in values])["mean"]])
                curves.setdefault(method, {}).setdefault(measure, {})["yx"[axis]] = line
    return {
        "settings": dict(settings),
        "bands": bands,
        "summary": summary,
        "seconds": seconds,
        "undefined": undefined,
        "shift": curves,
        "published": {protocol: name for protocol, name in published.items() if name not in (None, "none")},
        "published recognised": recognised,
        "scenes": list(records),
    }


def name(measure: str, bands: int) -> str:
    """Heading of a measure: Q2n of 8 bands is Q8."""
    return f"Q{1 << (bands - 1).bit_length()}" if measure == "Q2n" else measure


def _heading(measure: str, bands: int) -> str:
    return MEASURES[measure].heading.replace(measure, name(measure, bands), 1)


def _text(cell: Mapping[str, Any], measure: str) -> str:
    if cell["mean"] is None:
        return f"undefined ({cell['scenes']} scenes)"
    digits = MEASURES[measure].digits
    spread = f" ± {cell['std']:.{digits}f}" if cell["std"] is not None else ""
    partial = f" ({cell['defined']} of {cell['scenes']} scenes)" if cell["defined"] < cell["scenes"] else ""
    return f"{cell['mean']:.{digits}f}{spread}{partial}"


Rows = list[list[tuple[str, bool]]]  # (text, whether it is the best of its column)


def _best(column: Mapping[str, float | None], measure: str) -> set[str]:
    """Rows that share the best value as printed; none where there is nothing to choose from."""
    larger, digits = MEASURES[measure].larger, MEASURES[measure].digits
    values = {key: round(value, digits) for key, value in column.items() if value is not None}
    if larger is None or len(values) < 2:
        return set()
    best = max(values.values()) if larger else min(values.values())
    return {key for key, value in values.items() if value == best}


def _summary_table(found: Mapping[str, Any], protocol: str) -> tuple[list[str], Rows]:
    cells = found["summary"][protocol]
    measures = list(next(iter(cells.values())))
    header = ["method", *(_heading(measure, found["bands"]) for measure in measures), "seconds"]
    best = {m: _best({method: row[m]["mean"] for method, row in cells.items()}, m) for m in measures}
    rows: Rows = []
    for method, row in cells.items():
        texts = [(_text(row[measure], measure), method in best[measure]) for measure in measures]
        rows.append([(method, False), *texts, (f"{found['seconds'][protocol][method]:.2f}", False)])
    return header, rows


def _published_table(found: Mapping[str, Any], dataset: str) -> tuple[list[str], Rows]:
    """Printed rows, then those of this run, in the measures that the papers give."""
    printed = PUBLISHED[dataset].rows
    measures = [measure for measure in MEASURES if any(measure in row for row in printed.values())]
    ours: dict[str, dict[str, float | None]] = {}
    for protocol, known in found["published"].items():
        if known == dataset:
            for method, cells in found["summary"][protocol].items():
                mine = {m: cells[m]["mean"] for m in measures if m in cells}
                ours.setdefault(f"{method} (this run)", {}).update(mine)
    rows: Rows = []
    everything: dict[str, Mapping[str, float | None]] = {**printed, **ours}
    for method, values in everything.items():
        line = [(method, False)]
        for measure in measures:
            value = values.get(measure)
            text = "–" if value is None else f"{value:.3f}"
            other = CONTRADICTED.get((dataset, method, measure))
            line.append((text if other is None else f"{text} / {other:.3f} (!)", False))
        rows.append(line)
    return ["method", *(_heading(measure, found["bands"]) for measure in measures)], rows


def _published_notes(found: Mapping[str, Any], dataset: str) -> list[str]:
    entry = PUBLISHED[dataset]
    if found["published recognised"]:
        why = "This data has the sensor, number and size of scenes of PanCollection's test set; no more is checked."
    else:
        why = (
            "Compared on request: this data has another sensor, number or size of scenes than PanCollection's test set."
        )
    return [f"Printed in: {'; '.join(entry.sources)}. Those methods were not run here.", why, *entry.notes]


def _markdown_table(header: Sequence[str], rows: Rows) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [[f"**{text}**" if best else text for text, best in row] for row in rows]
    return ["| " + " | ".join(map(_markdown, line)) + " |" for line in lines] + [""]


def _markdown(text: str) -> str:
    """Names of files and scenes as Markdown that shows them: no HTML, no table cells, no emphasis of theirs."""
    return html.escape(text, quote=False).replace("|", "\\|")


def tables(found: Mapping[str, Any]) -> str:
    """The tables of means for a terminal."""
    parts = []
    for protocol in found["summary"]:
        header, rows = _summary_table(found, protocol)
        lines = [list(header), *([text + "*" * best for text, best in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        parts.append(TITLES[protocol])
        for first, *rest in lines:
            cells = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
            parts.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(parts)


def markdown(found: Mapping[str, Any]) -> str:
    """The tables for reading and pasting."""
    settings = found["settings"]
    lines = [
        f"# Evaluation: {_markdown(_subject(settings))}",
        "",
        f"Sensor {settings['sensor']}, peak {settings['peak']:g}.",
        "",
    ]
    lines += [line for text in found["undefined"] for line in (f"> **Undefined:** {_markdown(text)}", "")]
    for protocol in found["summary"]:
        lines += [f"## {TITLES[protocol]}", "", *_markdown_table(*_summary_table(found, protocol))]
    for dataset in dict.fromkeys(found["published"].values()):
        lines += [f"## Published numbers, {dataset}", "", *_markdown_table(*_published_table(found, dataset))]
        lines += [line for note in _published_notes(found, dataset) for line in (f"- {note}",)] + [""]
    if found["shift"]:
        lines += ["## Shift test", "", *_markdown_table(*_shift_table(found)), SHIFT_NOTE, ""]
    lines += [DEFINITIONS, "", _legend(found), "", "## Settings", ""]
    return "\n".join([*lines, *(f"- {key}: {_markdown(_setting(value))}" for key, value in settings.items()), ""])


SHIFT_NOTE = """\
PAN's content is moved by a known distance, in pixels of the PAN that methods see, to the right (x) or down (y): \
before the pair is reduced, or, where the data has its own ground truth, as it is. Sharpness is the mean gradient of \
the result over that of the ground truth: 1 is as sharp, below is blurred. Each method is shown as it is and with its \
bands registered."""


def _shift_table(found: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """ERGAS and sharpness by distance, mean of both directions."""
    methods = found["shift"]
    distances = [distance for distance, _ in next(iter(methods.values()))["ERGAS"]["x"]]
    rows: Rows = []
    for measure in ("ERGAS", "sharpness"):
        for method, curves in methods.items():
            texts = []
            for x, y in zip(curves[measure]["x"], curves[measure]["y"], strict=True):
                both = [value for value in (x[1], y[1]) if value is not None]
                texts.append((f"{statistics.fmean(both):.3f}" if both else "undefined", False))
            rows.append([(f"{measure}, {method}", False), *texts])
    return ["shift of PAN in pixels", *(f"{distance:g}" for distance in distances)], rows


def _plot(found: Mapping[str, Any], target: Path) -> None:
    """Curves of the shift test: full lines for x, dashed for y."""
    from matplotlib.figure import Figure

    methods = found["shift"]
    measures = list(next(iter(methods.values())))
    columns = min(3, len(measures))
    figure = Figure(figsize=(4.2 * columns, 3.2 * math.ceil(len(measures) / columns)), layout="constrained")
    axes = figure.subplots(math.ceil(len(measures) / columns), columns, squeeze=False).flatten()
    for axis, measure in zip(axes, measures, strict=False):
        for number, (method, curves) in enumerate(methods.items()):
            for direction, style in (("x", "-"), ("y", "--")):
                x, y = zip(*curves[measure][direction], strict=True)
                values = [math.nan if value is None else value for value in y]
                label = method if direction == "x" else None
                axis.plot(x, values, style, color=f"C{number}", marker="o", markersize=3, label=label)
        axis.set_title(
            _heading(measure, found["bands"]).replace(" ↑", ", more is better").replace(" ↓", ", less is better")
        )
        axis.set_xlabel("shift of PAN in pixels (full line: x, dashed: y)", fontsize=8)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=9)
    for axis in axes[len(measures) :]:
        axis.set_visible(False)
    figure.savefig(target, dpi=110)


def _subject(settings: Mapping[str, Any]) -> str:
    files = [settings[key]["file"] for key in ("data", "pan", "ms") if isinstance(settings.get(key), dict)]
    return ", ".join(Path(file).name for file in files)


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:1280px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{margin-top:2.2rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
th,td{padding:.25rem .6rem;border-bottom:1px solid #e5e5e5;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{background:#f6f6f6}
.best{font-weight:700}.warn{background:#fff3cd;border-left:4px solid #e0a800;padding:.5rem .8rem;margin:.5rem 0}
.note{color:#555;font-size:13px}
.grid{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:232px}
figcaption{font-weight:600;font-size:13px;margin-bottom:3px}
figure img{display:block;width:232px;margin-bottom:4px;image-rendering:pixelated}
.plot{max-width:100%}dl{display:grid;grid-template-columns:max-content auto;gap:.1rem 1rem;font-size:13px}
dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere}
"""


def _html_table(header: Sequence[str], rows: Rows) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = ""
    for row in rows:
        cells = (f"<td{' class=best' if best else ''}>{html.escape(text)}</td>" for text, best in row)
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _image(file: Path, alt: str, css: str = "") -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img{css} alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _gallery(folder: Path, found: Mapping[str, Any]) -> str:
    parts = []
    for protocol in found["summary"]:
        names = list(dict.fromkeys(r["scene"] for r in found["scenes"] if r["protocol"] == protocol))
        for index, scene in enumerate(names):
            stem = folder / "pictures" / f"{protocol}-{index:03d}"
            figures = ""
            for label in ("PAN", "MS", "GT", *found["summary"][protocol]):
                kinds = [kind for kind in ("rgb", "zoom", "error") if pictures.path(stem, label, kind).exists()]
                if kinds:
                    images = "".join(_image(pictures.path(stem, label, kind), f"{label} {kind}") for kind in kinds)
                    figures += f"<figure><figcaption>{html.escape(label)}</figcaption>{images}</figure>\n"
            if figures:
                parts.append(
                    f"<h3>{html.escape(protocol)}, scene {html.escape(scene)}</h3><div class=grid>{figures}</div>"
                )
    if not parts:
        return ""
    low, high = STRETCH
    legend = (
        f"Natural colours by sensor, percentiles {low} to {high} of the reference (ground truth, or MS) for "
        f"all; below them the {pictures.ZOOM} x {pictures.ZOOM} pixels in which PAN varies most; below these |result - "
        "ground truth|, mean over bands, black 0, white the 99th percentile of the interpolated image's error."
    )
    return f"<h2>Pictures</h2><p class=note>{legend}</p>{''.join(parts)}"


def page(folder: Path, found: Mapping[str, Any]) -> str:
    """One HTML page with everything inside."""
    settings = found["settings"]
    subject = html.escape(_subject(settings))
    parts = [
        f"<h1>Evaluation: {subject}</h1>",
        f"<p>Sensor {html.escape(settings['sensor'])}, peak {settings['peak']:g}.</p>",
    ]
    parts += [f'<p class="warn"><b>Undefined:</b> {html.escape(text)}</p>' for text in found["undefined"]]
    for protocol in found["summary"]:
        parts += [f"<h2>{TITLES[protocol]}</h2>", _html_table(*_summary_table(found, protocol))]
    parts += [f'<p class="note">{html.escape(text)}</p>' for text in (DEFINITIONS, _legend(found))]
    for dataset in dict.fromkeys(found["published"].values()):
        parts += [f"<h2>Published numbers, {dataset}</h2>", _html_table(*_published_table(found, dataset))]
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in _published_notes(found, dataset)]
    if found["shift"]:
        parts += ["<h2>Shift test</h2>", _image(folder / "shift.png", "curves of the shift test", ' class="plot"')]
        parts += [_html_table(*_shift_table(found)), f'<p class="note">{html.escape(SHIFT_NOTE)}</p>']
    parts.append(_gallery(folder, found))
    for protocol in found["summary"]:
        parts.append(
            f"<details><summary>Every scene, {protocol} resolution</summary>{_scenes(found, protocol)}</details>"
        )
    entries = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(_setting(v))}</dd>" for key, v in settings.items())
    parts.append(f"<h2>Settings</h2><dl>{''.join(entries)}</dl>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation: {subject}</title>'
    )
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _scenes(found: Mapping[str, Any], protocol: str) -> str:
    records = [r for r in found["scenes"] if r["protocol"] == protocol]
    measures = list(records[0]["values"])
    rows: Rows = []
    for record in records:
        cells = [record["values"][measure] for measure in measures]
        texts = ["undefined" if v is None else MEASURES[m].text(v) for m, v in zip(measures, cells, strict=True)]
        rows.append([(f"{record['scene']}, {record['method']}", False), *((text, False) for text in texts)])
    return _html_table(["scene, method", *(_heading(measure, found["bands"]) for measure in measures)], rows)


def _write(target: Path, text: str) -> None:
    with atomic(target) as part:
        part.write_text(text, encoding="utf-8")


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """results.json, scenes.csv, summary.md and report.html (and shift.png) in `folder`."""
    _write(folder / "results.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    measures = [measure for measure in MEASURES if any(measure in r["values"] for r in found["scenes"])]
    with atomic(folder / "scenes.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["protocol", "scene", "shift_y", "shift_x", "method", "seconds", *measures])
        for r in found["scenes"]:
            values = ("" if r["values"].get(m) is None else repr(r["values"][m]) for m in measures)
            table.writerow([r["protocol"], r["scene"], *r["shift"], r["method"], f"{r['seconds']:.4f}", *values])
    if found["shift"]:
        _plot(found, folder / "shift.png")
    _write(folder / "summary.md", markdown(found))
    _write(folder / "report.html", page(folder, found))
