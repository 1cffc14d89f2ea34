"""`mlx-sidecar pull` and `mlx-sidecar import`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from mlx_sidecar.config.settings import default_home


def add_commands(commands: Any) -> None:
    """Add what brings models onto this machine."""
    pull = commands.add_parser("pull", help="bring a model onto this machine")
    pull.add_argument("model", help="a known name such as smollm2-135m, or a hub id such as owner/model")
    pull.add_argument("--revision", help="branch, tag or commit of a hub model")
    load = commands.add_parser("import", help="make a model out of a GGUF file")
    load.add_argument("file", type=Path, help="the .gguf file")
    load.add_argument("name", help="what to call the model")
    for bringer in (pull, load):
        bringer.set_defaults(run=_bring)


def _bring(arguments: argparse.Namespace) -> int:
    from ..models.pull import PullError, import_file, pull
    from ..models.store import ModelStore

    def report(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    store = ModelStore(default_home(os.environ))
    try:
        if arguments.command == "pull":
            folder = pull(arguments.model, store, report, arguments.revision)
        else:
            folder = import_file(arguments.file, arguments.name, store, report)
    except PullError as error:
        report(f"mlx-sidecar: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0
