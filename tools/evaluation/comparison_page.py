"""A comparison as tables: for the terminal, as Markdown, and as one HTML file with interval plots. Not a verb."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rich.table import Table

from .comparison import LEVEL, Comparison, Difference, Evaluation, left_out, lower_is_better
from .published import ALIASES, FAULTS, GENERAL_FAULTS, TABLE_1, TABLE_9, TABLE_9_TASKS, TASKS, column_of, score_text
from .results import is_fraction

MARKS = {"better": "▲ better", "worse": "▼ worse", "": ""}
COLOURS = {"better": "#1b7f4b", "worse": "#b3261e", "": "#666666"}  # of intervals
FAULTY = "†"  # stands at a published number with known faults
NONE = "–"
# of the plot, in pixels: a line's height, the names' width, the plot's width
LINE, NAMES, WIDTH = 24, 300, 420
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.better { color: #1b7f4b; } td.worse { color: #b3261e; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #222; }
"""


@dataclass
class Grid:
    """A table of text; `classes` (of each row, "better", "worse" or "") colour the last cell."""

    title: str
    header: list[str]
    rows: list[list[str]]
    classes: list[str]


def grids(comparison: Comparison, paper: bool) -> list[Grid]:
    """The scores; the differences, where there are several models; with `paper` Table 9."""
    found = [scores_grid(comparison, paper)]
    if comparison.differences:
        found.append(differences_grid(comparison.differences))
    if paper:
        rows = [[model, *map(score_text, scores)] for model, scores in TABLE_9.items()]
        title = "Published, Table 9 (%): mathematics and question answering"
        found.append(
            Grid(
                title,
                ["", *(f"{task}{FAULTY if task in FAULTS else ''}" for task in TABLE_9_TASKS)],
                rows,
                [""] * len(rows),
            )
        )
    return found


def scores_grid(comparison: Comparison, paper: bool) -> Grid:
    """A row a model and a column a task; with `paper` also the rows and tasks of Table 1."""
    columns = list(comparison.columns)
    header = ["model", *(_column_name(task, metric) for task, metric in columns)]
    rows = [
        [_model_name(one), *(score_cell(one, task, metric) for task, metric in columns)]
        for one in comparison.evaluations
    ]
    if paper:
        shown = [column_of(task) for task, _ in columns]
        more = [task for task in TASKS if task not in shown]
        header += [f"{task}, %" for task in more]
        rows = [[*row, *[NONE] * len(more)] for row in rows]
        for published in TABLE_1:
            cells = [
                f"{score_text(published.scores[task])}{FAULTY if task in FAULTS else ''}" if task else NONE
                for task in [*shown, *more]
            ]
            rows.append([f"published: {published.model} ({published.size}, {published.type})", *cells])
    return Grid("Scores ± standard error (examples)", header, rows, [""] * len(rows))


def _column_name(task: str, metric: str) -> str:
    unit = ", %" if is_fraction(metric) else ""
    return f"{task} ({metric}{unit}{', lower is better' if lower_is_better(metric) else ''})"


def _model_name(one: Evaluation) -> str:
    """The label, the model, and its kind where that is not diffusion."""
    model = str(one.content.get("model", ""))
    name = one.label if not model or model == one.label else f"{one.label}: {model}"
    return f"{name} (AR)" if one.content.get("kind") == "autoregressive" else name


def number(value: float, metric: str, sign: str = "") -> str:
    """A score or a difference: shares in percent with one decimal, others with four."""
    return f"{100 * value:{sign}.1f}" if is_fraction(metric) else f"{value:{sign}.4f}"


def score_cell(one: Evaluation, task: str, metric: str) -> str:
    """Such as 31.0 ± 2.0 (200)."""
    found = one.score(task, metric)
    if found is None:
        return NONE
    value, stderr, n = found
    spread = "" if stderr is None else f" ± {number(stderr, metric)}"
    return f"{number(value, metric)}{spread}" + ("" if n is None else f" ({n})")


def differences_grid(differences: Sequence[Difference]) -> Grid:
    """A row a task and later model."""
    rows = [
        [
            d.task, d.metric + (", points" if is_fraction(d.metric) else ""), d.later, d.first,
            number(d.value, d.metric, "+"), f"{number(d.low, d.metric, '+')} to {number(d.high, d.metric, '+')}",
            str(d.n), MARKS[d.verdict],
        ]
        for d in differences
    ]  # fmt: skip
    header = ["task", "metric", "model", "less", "difference", f"{LEVEL:.0%} interval", "examples", "verdict"]
    return Grid("Differences on the examples of both models", header, rows, [d.verdict for d in differences])


def remarks(comparison: Comparison, paper: bool) -> list[str]:
    """Sentences below the tables: how to read them, what was left out, and the faults of published numbers."""
    found = []
    if comparison.differences:
        found.append(
            "Intervals are of a paired bootstrap: examples are resampled, each with both models' results. A verdict "
            f"stands where the interval leaves out 0. Each interval holds with {LEVEL:.0%} by itself, so of twenty "
            "comparisons of equal models about one has a verdict."
        )
    found += left_out(comparison.differences) + comparison.notes
    if paper:
        tasks = list(dict.fromkeys([*(ALIASES.get(task, task) for task, _ in comparison.columns), *TASKS]))
        found.append(
            "Published rows are Table 1 of arXiv 2410.17891, in percent; rocstories has ROUGE-1/2/L. Numbers with "
            f"{FAULTY} have known faults:"
        )
        faults = dict.fromkeys(fault for task in tasks for fault in FAULTS.get(task, ()))
        for fault in faults:
            concerned = ", ".join(task for task in tasks if fault in FAULTS.get(task, ()))
            found.append(f"{FAULTY} {concerned}: {fault}")
        found += [f"{FAULTY} all tasks: {fault}" for fault in GENERAL_FAULTS]
    return found


def terminal_table(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left")
    for i, name in enumerate(grid.header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in grid.rows:
        table.add_row(*row)
    return table


def markdown(tables: Sequence[Grid], sentences: Sequence[str]) -> str:
    """The page without its title. What Markdown or HTML would read as their own is escaped."""

    def plain(text: str) -> str:
        escaped = "".join(f"\\{c}" if c in "\\|*_`[]#" else c for c in text)
        return escape(escaped, quote=False).replace("\n", " ")

    lines = []
    for grid in tables:
        lines += [f"## {plain(grid.title)}", "", "| " + " | ".join(map(plain, grid.header)) + " |"]
        lines.append("|" + " --- |" * len(grid.header))
        lines += ["| " + " | ".join(map(plain, row)) + " |" for row in grid.rows] + [""]
    return "\n".join([*lines, *(f"- {plain(sentence)}" for sentence in sentences)]) + "\n"


def html(tables: Sequence[Grid], sentences: Sequence[str], comparison: Comparison) -> str:
    """The page's body and head: needs no other file, and all text is escaped."""
    parts = [f'<meta charset="utf-8"><title>Comparison</title><style>{STYLE}</style>', "<h1>Comparison</h1>"]
    plots = interval_plots(comparison)
    for i, grid in enumerate(tables):
        parts.append(f"<h2>{escape(grid.title)}</h2>")
        parts.append("<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in grid.header) + "</tr>")
        for row, kind in zip(grid.rows, grid.classes, strict=True):
            cells = [f"<td>{escape(cell)}</td>" for cell in row[:-1]]
            parts.append(f'<tr>{"".join(cells)}<td class="{kind}">{escape(row[-1])}</td></tr>')
        parts.append("</table>")
        if i == (1 if comparison.differences else 0):
            parts += plots
    parts.append("<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>")
    return '<html lang="en">\n' + "\n".join(parts) + "\n</html>\n"


@dataclass(frozen=True)
class Interval:
    """One line of a plot."""

    name: str
    low: float
    value: float
    high: float
    colour: str


def interval_plots(comparison: Comparison) -> list[str]:
    """SVGs of the differences, or of one model's scores; a plot for shares, and one for each other metric."""
    groups: dict[str, list[Interval]] = {}
    if comparison.differences:
        for d in comparison.differences:
            scale = 100 if is_fraction(d.metric) else 1
            line = Interval(
                f"{d.task}: {d.later}", scale * d.low, scale * d.value, scale * d.high, COLOURS[d.verdict]
            )  # fmt: skip
            groups.setdefault(_unit(d.metric, "difference"), []).append(line)
    else:
        for one in comparison.evaluations:
            for task, metric in comparison.columns:
                found = one.score(task, metric)
                if found is not None:
                    scale = 100 if is_fraction(metric) else 1
                    spread = 1.96 * (found[1] or 0.0)
                    ends = (scale * (found[0] - spread), scale * found[0], scale * (found[0] + spread))
                    line = Interval(f"{task}: {one.label}", *ends, COLOURS[""])
                    groups.setdefault(_unit(metric, "score"), []).append(line)
    return [interval_plot(lines, title, zero=bool(comparison.differences)) for title, lines in groups.items()]


def _unit(metric: str, what: str) -> str:
    return f"{what} in percentage points" if is_fraction(metric) else f"{what} of {metric}"


def interval_plot(lines: Sequence[Interval], title: str, zero: bool) -> str:
    """An SVG with a dot and its interval a line; `zero` draws a line at 0."""
    low = min(line.low for line in lines)
    high = max(line.high for line in lines)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    span = (high - low) or 1.0
    height = LINE * (len(lines) + 2)

    def x(value: float) -> float:
        return NAMES + 10 + (value - low) / span * WIDTH

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {NAMES + WIDTH + 90} {height}" '
        f'width="{NAMES + WIDTH + 90}" role="img"><title>{escape(title)}</title>'
    ]
    if zero:
        parts.append(f'<line x1="{x(0):.1f}" y1="4" x2="{x(0):.1f}" y2="{height - 40}" stroke="#999999"/>')
    for i, line in enumerate(lines):
        y = LINE * i + 16
        name = line.name if len(line.name) <= 45 else f"{line.name[:44]}…"
        parts.append(
            f'<text x="{NAMES}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
            f'<line x1="{x(line.low):.1f}" y1="{y}" x2="{x(line.high):.1f}" y2="{y}" stroke="{line.colour}" '
            f'stroke-width="3"/><circle cx="{x(line.value):.1f}" cy="{y}" r="5" fill="{line.colour}">'
            f"<title>{escape(line.name)}: {line.value:.4g}, {line.low:.4g} to {line.high:.4g}</title></circle>"
        )
    for value in sorted({low, high, 0.0} if zero else {low, high}):
        parts.append(f'<text x="{x(value):.1f}" y="{height - 24}" text-anchor="middle">{value:.3g}</text>')
    parts.append(f'<text x="{NAMES + 10 + WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(title)}</text>')
    return "".join([*parts, "</svg>"])
