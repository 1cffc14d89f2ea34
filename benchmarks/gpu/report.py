"""Figures of a run on a GPU: printed as tables, and kept in one document that is written after every part."""

import json
import os
import platform
import statistics
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.sides.measures import Figures


class Report:
    """The document of one run; without a folder it is only printed."""

    def __init__(
        self, command: str, model: dict[str, Any], folder: Path | None, name: str = "gpu_engine"
    ) -> None:
        self._folder = folder
        self._name = name
        self._document: dict[str, Any] = {
            "command": command,
            "machine": _machine(),
            "model": model,
            "parts": {},
            "notes": [],
        }

    def add(self, part: str, figures: Figures) -> None:
        """Print and keep the figures of a part."""
        rows = {name: _summary(values) for name, values in figures.items()}
        width = max(map(len, rows), default=0)
        print(f"\n{part}\n{'':{width}} {'median':>11} {'min':>11} {'max':>11} rounds")
        for name, row in rows.items():
            values = " ".join(f"{row[kind]:11.3f}" for kind in ("median", "min", "max"))
            print(f"{name:{width}} {values} {row['rounds']:6.0f}", flush=True)
        self._document["parts"][part] = rows
        self._write()

    def note(self, text: str) -> None:
        """Print and keep a sentence, such as why there are no figures."""
        print(f"\n{text}", flush=True)
        self._document["notes"].append(text)
        self._write()

    def _write(self) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{self._name}.json").write_text(json.dumps(self._document, indent=2) + "\n")


def _summary(values: list[float]) -> dict[str, float]:
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in figures.items()} | {"rounds": len(values)}


def _machine() -> dict[str, Any]:
    gpu = None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "gpu": gpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("mlx", "mlx-lm", "transformers")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
