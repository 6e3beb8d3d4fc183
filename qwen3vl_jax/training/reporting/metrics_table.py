"""metrics.csv and its like: one row a step, cut back to the checkpoint when a run resumes; curves.png."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.storage.remote_files import Growing

STEP = "step"
_PANELS = (  # title, columns of metrics.csv, columns of evaluation.csv
    ("loss", ("loss", "vision_loss", "balance_loss"), ("loss",)),
    ("accuracy", ("accuracy",), ("accuracy", "exact")),  # and evaluate.metric
    ("learning rate", ("lr",), ()),
    ("gradient norm", ("grad_norm",), ()),
    ("tokens/s", ("tokens_per_s",), ()),
    ("fill", ("fill", "vision_fill"), ()),
)


class Table:
    """A CSV file with a row a step. Rows are on their way to the disk when `write` returns.

    A remote one is written whole, at most every Growing.EVERY seconds and by `sync`.
    """

    def __init__(self, path: Path, first: int = 0):
        """first: the step a run goes on from; rows after it, and a torn last one, are taken out."""
        self._path = path
        rows = [row for row in read_table(path) if int(row[STEP]) <= first]
        self._columns = list(rows[0]) if rows else []
        self.steps = {int(row[STEP]) for row in rows}
        self._open(rows)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the row of a step; a column that was not there before is empty in earlier rows."""
        row = {STEP: str(step), **{name: format_number(value) for name, value in values.items()}}
        self.steps.add(step)
        if new := [name for name in row if name not in self._columns]:
            self.sync()
            rows = read_table(self._path)
            self._columns += new
            self.close()
            self._open([*rows, row])
        else:
            self._file.write(self._text([row]))

    def _open(self, rows: list[dict[str, str]]) -> None:
        head = ",".join(self._columns) + "\n" if self._columns else ""
        self._file = Growing(self._path, head + self._text(rows))

    def sync(self) -> None:
        """Puts all rows where others can read them."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _text(self, rows: list[dict[str, str]]) -> str:
        out = io.StringIO()
        csv.DictWriter(out, self._columns, lineterminator="\n").writerows(rows)
        return out.getvalue()


def read_table(path: Path) -> list[dict[str, str]]:
    """The whole rows of a table, as written; none for a file that is not there."""
    if not path.is_file():
        return []
    text = path.read_text()
    # What follows the last line's end was being written.
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole), restval="")
    return [row for row in rows if (row.get(STEP) or "").isdecimal()]


def format_number(value: Any) -> str:
    """A number so that float32 comes back exactly; numbers of an array with blanks between them."""
    if value is None:
        return ""
    if isinstance(value, (str, int)):
        return str(value)
    if getattr(value, "ndim", 0):
        return " ".join(f"{x:.4g}" for x in value.reshape(-1).tolist())
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else f"{number:.9g}"


def draw_curves(metrics: Path, evaluation: Path, out: Path) -> None:
    """Draws both tables into a PNG; nothing is drawn where metrics.csv has no row."""
    trained, evaluated = read_table(metrics), read_table(evaluation)
    if not trained:
        return
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    others = [n for n in (evaluated or [{}])[0] if n not in (STEP, "loss", "accuracy", "exact")]
    with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3, "font.size": 9}):
        figure = Figure(figsize=(12, 6), layout="constrained")
        # No window, no global state.
        FigureCanvasAgg(figure)
        for axes, (title, names, held_out) in zip(figure.subplots(2, 3).flat, _PANELS):
            axes.set_title(title)
            axes.set_xlabel(STEP)
            style = ".-" if len(trained) < 50 else "-"
            lines = [(trained, name, name, style) for name in names]
            lines += [(evaluated, name, f"evaluation {name}", "o--") for name in held_out]
            if title == "accuracy":
                lines += [(evaluated, name, name, "o--") for name in others]
            for rows, name, label, style in lines:
                points = [(int(row[STEP]), float(row[name])) for row in rows if row.get(name)]
                if points:
                    axes.plot(*zip(*points), style, label=label, linewidth=1, markersize=3)
            if len(axes.lines) > 1:
                axes.legend()
            if title == "gradient norm" and all(float(r["grad_norm"]) > 0 for r in trained):
                axes.set_yscale("log")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=110, format="png")
        out.write_bytes(drawn.getvalue())
