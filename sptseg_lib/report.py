"""One self-contained page about a run: scores, steps with their times, figures, links to the executed notebooks."""

import json
import math
import os
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev

import nbformat
from jinja2 import Environment, StrictUndefined

SCORES = {"pAcc": "pAcc", "mIoU_seen": "mIoU(S)", "mIoU_unseen": "mIoU(U)", "hIoU": "hIoU"}
PARTS = {  # metrics.json has these for data sets whose split names its stuff
    f"{part}_{key}": f"{part}, {label}"
    for part in ("things", "stuff")
    for key, label in {"seen": "mIoU(S)", "unseen": "mIoU(U)", **SCORES}.items()
}
EXPERIMENT = ("method", "setting", "dataset", "split", "gamma")  # runs that agree in these differ by their seed alone


def read_metrics(path: Path) -> list[dict]:
    """The runs in a metrics.json.

    Raises: ValueError when the file is not JSON of the form {"runs": [{...}, ...]}.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        if not all(isinstance(run, dict) for run in runs):
            raise TypeError("a run is not a table of scores")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} cannot be read as {{"runs": [...]}} ({type(error).__name__}: {error}). '
            "The report would have no scores; run 06_evaluate again."
        ) from None
    return runs


def seed_table(runs: list[dict]) -> list[dict]:
    """Mean and sample standard deviation of every score, for experiments that were run with two seeds or more."""
    experiments: dict[tuple, list[dict]] = {}
    for run in runs:
        experiments.setdefault(tuple(run.get(key) for key in EXPERIMENT), []).append(run)
    rows = []
    for values, group in experiments.items():
        if len(group) < 2:
            continue
        row = dict(zip(EXPERIMENT, values, strict=True), seeds=len(group))
        for key in SCORES:
            scores = [run[key] for run in group if _is_number(run.get(key))]
            row[key] = f"{fmean(scores):.1f} ± {stdev(scores):.1f}" if len(scores) > 1 else "–"
        rows.append(row)
    return rows


def figures(notebook: Path) -> list[dict]:
    """PNG outputs (base64) of the code cells tagged `report`, each with its cell's `caption` metadata, if any."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [
        {"png": "".join(output.data["image/png"].split()), "caption": cell.metadata.get("caption", "")}
        for cell in cells
        if cell.cell_type == "code" and "report" in cell.metadata.get("tags", [])
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


def write_report(run_dir: Path, title: str, parameters: dict, steps: list[dict], hardware: str) -> Path:
    """Write <run_dir>/report.html from metrics.json (where there is one) and the executed notebooks.

    Each step is {"id", "notebook", "parameters", "file" (its executed notebook in run_dir), "seconds"}.
    Raises: ValueError for a metrics.json of another form.
    """
    metrics = run_dir / "metrics.json"
    runs = read_metrics(metrics) if metrics.exists() else []
    reported = [run for run in runs if run.get("reported", True)]  # the others are the sweep over γ
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(score=_score, clock=clock, compact=_compact)
    html = page.from_string(PAGE).render(
        title=title,
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        parameters=parameters,
        hardware=hardware,
        runs=reported,
        sweep=runs if len(reported) < len(runs) else [],
        scores=SCORES,
        names=_telling(reported),
        sweep_names=_telling(runs),
        parts={key: label for key, label in PARTS.items() if any(key in run for run in reported)},
        seed_rows=seed_table(reported),
        steps=steps,
        figures=[{**figure, "step": step} for step in steps for figure in figures(run_dir / step["file"])],
    )
    path = run_dir / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)
    return path


def _telling(runs: list[dict]) -> list[str]:
    """Columns that tell the runs apart: always method and setting, the others where they differ."""
    return [key for key in EXPERIMENT if key in ("method", "setting") or len({run.get(key) for run in runs}) > 1]


def clock(seconds: float) -> str:
    """Seconds as a reader says them: 8 s, 4 min 05 s, 2 h 03 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _score(value) -> str:
    return f"{value:.1f}" if _is_number(value) else "–"


def _compact(values: dict) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "–"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2330; background: #fff; max-width: 60rem;
       margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.note { color: #556; font-size: .9rem; margin: .2rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid #e2e5ec; text-align: left; vertical-align: top; }
th { color: #556; font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; margin: 1.2rem 0 .4rem; }
figure { margin: 1.4rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #556; font-size: .9rem; }
a { color: #0b57a4; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ when }} · {{ hardware }}</p>
<p class="note">Parameters: {{ parameters | compact }}</p>

{% if runs %}
<h2>Scores</h2>
<div class="wide"><table>
<tr>{% for name in names %}<th>{{ name }}</th>{% endfor %}<th class="number">seed</th>
{% for label in scores.values() %}<th class="number">{{ label }}</th>{% endfor %}
<th class="number">images/s</th></tr>
{% for run in runs %}
<tr>{% for name in names %}<td>{{ run.get(name, "–") }}</td>{% endfor %}
<td class="number">{{ run.get("seed", "–") }}</td>
{% for key in scores %}<td class="number">{{ run.get(key) | score }}</td>{% endfor %}
<td class="number">{{ run.get("images_per_second") | score }}</td></tr>
{% endfor %}
</table></div>
<p class="note">Per cent. S: seen classes. U: unseen classes, which have no pixel labels in training (but do in the
supervised setting). hIoU: the harmonic mean of both.</p>
{% endif %}
{% if parts %}
<h2>Things and stuff apart</h2>
<div class="wide"><table>
<tr>{% for name in names %}<th>{{ name }}</th>{% endfor %}<th class="number">seed</th>
{% for label in parts.values() %}<th class="number">{{ label }}</th>{% endfor %}</tr>
{% for run in runs %}
<tr>{% for name in names %}<td>{{ run.get(name, "–") }}</td>{% endfor %}
<td class="number">{{ run.get("seed", "–") }}</td>
{% for key in parts %}<td class="number">{{ run.get(key) | score }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% if sweep %}
<details><summary>Every shift γ of the seen classes</summary>
<div class="wide"><table>
<tr>{% for name in sweep_names %}<th>{{ name }}</th>{% endfor %}<th class="number">seed</th>
{% for label in scores.values() %}<th class="number">{{ label }}</th>{% endfor %}</tr>
{% for run in sweep %}
<tr>{% for name in sweep_names %}<td>{{ run.get(name, "–") }}</td>{% endfor %}
<td class="number">{{ run.get("seed", "–") }}</td>
{% for key in scores %}<td class="number">{{ run.get(key) | score }}</td>{% endfor %}</tr>
{% endfor %}
</table></div></details>
{% endif %}
{% if seed_rows %}
<h2>Several seeds: mean ± standard deviation</h2>
<div class="wide"><table>
<tr>{% for name in names %}<th>{{ name }}</th>{% endfor %}<th class="number">seeds</th>
{% for label in scores.values() %}<th class="number">{{ label }}</th>{% endfor %}</tr>
{% for row in seed_rows %}
<tr>{% for name in names %}<td>{{ row[name] }}</td>{% endfor %}<td class="number">{{ row.seeds }}</td>
{% for key in scores %}<td class="number">{{ row[key] }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}

<h2>Steps</h2>
<div class="wide"><table>
<tr><th>step</th><th>executed notebook</th><th>its parameters</th><th class="number">time</th></tr>
{% for step in steps %}
<tr><td>{{ step.id }}</td><td><a href="{{ step.file }}">{{ step.notebook }}</a></td>
<td>{{ step.parameters | compact }}</td><td class="number">{{ step.seconds | clock }}</td></tr>
{% endfor %}
</table></div>

{% if figures %}
<h2>Figures</h2>
{% for figure in figures %}
<figure><img alt="{{ figure.caption or 'Figure from step ' ~ figure.step.id }}"
 src="data:image/png;base64,{{ figure.png }}">
<figcaption>{{ figure.caption }} <a href="{{ figure.step.file }}">{{ figure.step.id }}</a></figcaption></figure>
{% endfor %}
{% endif %}
</body>
</html>
"""
