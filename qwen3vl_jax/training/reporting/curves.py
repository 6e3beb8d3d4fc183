"""curves.png: what a run's tables say, drawn."""

from __future__ import annotations

import io
from pathlib import Path

from qwen3vl_jax.training.reporting.metrics_table import STEP, read_table

_PANELS = (  # title, columns of metrics.csv, columns of evaluation.csv
    ("loss", ("loss", "vision_loss", "balance_loss"), ("loss",)),
    ("accuracy", ("accuracy",), ("accuracy", "exact")),
    ("learning rate", ("lr",), ()),
    ("gradient norm", ("grad_norm",), ()),
    ("tokens/s", ("tokens_per_s",), ()),
    ("fill", ("fill", "vision_fill"), ()),
)


def draw_curves(metrics: Path, evaluation: Path, out: Path) -> None:
    """Draws both tables into a PNG; nothing is drawn where metrics.csv has no row."""
    trained, evaluated = read_table(metrics), read_table(evaluation)
    if not trained:
        return
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3, "font.size": 9}):
        figure = Figure(figsize=(12, 6), layout="constrained")
        FigureCanvasAgg(figure)  # no window, no global state
        for axes, (title, names, held_out) in zip(figure.subplots(2, 3).flat, _PANELS):
            axes.set_title(title)
            axes.set_xlabel(STEP)
            for name in names:
                _line(axes, trained, name, name, ".-" if len(trained) < 50 else "-")
            for name in held_out:
                _line(axes, evaluated, name, f"evaluation {name}", "o--")
            if len(axes.lines) > 1:
                axes.legend()
            if title == "gradient norm" and all(float(r["grad_norm"]) > 0 for r in trained):
                axes.set_yscale("log")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=110, format="png")
        out.write_bytes(drawn.getvalue())


def _line(axes, rows: list[dict[str, str]], name: str, label: str, style: str) -> None:
    points = [(int(row[STEP]), float(row[name])) for row in rows if row.get(name)]
    if points:
        axes.plot(*zip(*points), style, label=label, linewidth=1, markersize=3)
