"""How a measurement is summed up, printed and kept."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def publish(name: str, command: str, unit: str, figures: Mapping[str, Sequence[float]]) -> None:
    """Print a table of median, min and max for each figure and write `results/<name>.json`."""
    width = max(len(figure) for figure in figures)
    print(f"\n{name} ({unit}, {len(next(iter(figures.values())))} rounds; {command})")
    print(f"{'':{width}}  {'median':>9} {'min':>9} {'max':>9}")
    rows = {figure: _summary(values) for figure, values in figures.items()}
    for figure, row in rows.items():
        print(f"{figure:{width}}  {row['median']:9.2f} {row['min']:9.2f} {row['max']:9.2f}")
    RESULTS.mkdir(exist_ok=True)
    document = {"command": command, "unit": unit, "machine": _machine(), "figures": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def _summary(values: Sequence[float]) -> dict[str, float]:
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in figures.items()}


def _machine() -> dict[str, str | int | None]:
    import os

    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlxLm": version("mlx-lm"),
    }
