"""`mlx-sidecar pull`, `import`, `list`, `rm` and `inspect`."""

import argparse
import os
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sidecar.config.settings import default_home

from .progress import print_json, report_for, size

if TYPE_CHECKING:
    from ..models.inventory import Installed
    from ..models.store import ModelStore

_INTERRUPTED = 130
_SHORT_COMMIT = 8


def add_commands(commands: Any) -> None:
    """Add what brings models onto this machine, shows them, and removes them."""
    pull = commands.add_parser("pull", help="bring a model onto this machine")
    pull.add_argument("model", help="a known name such as smollm2-135m, or a hub id such as owner/model")
    pull.add_argument("--revision", help="branch, tag or commit of a hub model")
    # For a parent that may die: its end of our input closes then.
    pull.add_argument("--until-input-ends", action="store_true", help=argparse.SUPPRESS)
    load = commands.add_parser("import", help="make a model out of a GGUF file")
    load.add_argument("file", type=Path, help="the .gguf file")
    load.add_argument("name", help="what to call the model")
    show = commands.add_parser("list", help="list the models on this machine")
    remove = commands.add_parser("rm", help="remove a model that was pulled or imported")
    remove.add_argument("model", help="its name, or its hub id")
    remove.add_argument("--revision", help="only this branch, tag or commit of a hub model")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    inspect = commands.add_parser("inspect", help="show what a model is, and whether it can be loaded")
    inspect.add_argument("model", help="its name, its hub id, or its folder")
    inspect.add_argument("--revision", help="branch, tag or commit of a hub model")
    for command, run in (
        (pull, _bring),
        (load, _bring),
        (show, _list),
        (remove, _remove),
        (inspect, _inspect),
    ):
        command.add_argument("--json", action="store_true", help="print JSON, an object a line")
        command.set_defaults(run=run)


def _store() -> "ModelStore":
    from ..models.store import ModelStore

    return ModelStore(default_home(os.environ))


def _bring(arguments: argparse.Namespace) -> int:
    from ..models.pull import import_file, pull
    from ..models.pull_report import PullError
    from ..models.tie import end_with_input

    if getattr(arguments, "until_input_ends", False):
        end_with_input()
    report = report_for(as_json=arguments.json)
    try:
        if arguments.command == "pull":
            pulled = pull(arguments.model, _store(), report, arguments.revision)
        else:
            pulled = import_file(arguments.file, arguments.name, _store(), report)
    except PullError as error:
        report.close()
        return _fail(arguments, "pull_failed", error.problem, str(error))
    except KeyboardInterrupt:
        report.close()
        sys.stderr.write(
            "\nmlx-sidecar: stopped; files that are complete stay, and the next pull goes on from there\n"
        )
        sys.stderr.flush()
        # Threads may still be waiting for the network, and the interpreter would wait for them.
        os._exit(_INTERRUPTED)
    report.close()
    if arguments.json:
        revision = {} if pulled.revision is None else {"revision": pulled.revision}
        print_json({"result": {"model": pulled.model, "bytes": pulled.nbytes} | revision})
    else:
        sys.stdout.write(f"{pulled.folder}\n")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from ..models.inventory import installed

    models = list(installed(_store()))
    if arguments.json:
        for model in models:
            print_json(_member_names(asdict(model)))
        return 0
    rows = [("MODEL", "REVISION", "SIZE", "ARCHITECTURE", "DTYPE", "LAST USED", "LOADABLE")]
    rows += [_row(model) for model in models]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    return 0


def _row(model: "Installed") -> tuple[str, ...]:
    commit = (model.commit or "")[:_SHORT_COMMIT]
    revision = f"{commit} ({', '.join(model.refs)})" if model.refs else commit
    used = datetime.fromtimestamp(model.used_at).astimezone().strftime("%Y-%m-%d")
    facts = (model.architecture or "-", model.dtype or "-")
    return (model.model, revision or "-", size(model.nbytes), *facts, used, model.problem or "yes")


def _remove(arguments: argparse.Namespace) -> int:
    from ..models.inventory import remove, to_remove

    store = _store()
    models = to_remove(arguments.model, arguments.revision, store)
    if not models:
        revision = f" in revision {arguments.revision}" if arguments.revision else ""
        problem = (
            f"neither the store nor the hub's cache has {arguments.model}{revision}; see 'mlx-sidecar list'"
        )
        return _fail(arguments, "model_not_found", problem)
    if not arguments.yes and not _agrees(models, arguments):
        return _fail(arguments, "cancelled", "nothing was removed; --yes removes without a question")
    try:
        freed = remove(models, store)
    except OSError as error:
        return _fail(arguments, "internal_error", "its files could not be removed", str(error))
    if arguments.json:
        print_json({"result": {"model": arguments.model, "freedBytes": freed}})
    else:
        sys.stdout.write(f"removed {arguments.model}, {size(freed)}\n")
    return 0


def _agrees(models: "list[Installed]", arguments: argparse.Namespace) -> bool:
    if arguments.json or not sys.stdin.isatty():
        return False
    total = sum(model.nbytes for model in models)
    what = arguments.model if len(models) == 1 else f"{len(models)} revisions of {arguments.model}"
    sys.stderr.write(f"remove {what}, {size(total)}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _inspect(arguments: argparse.Namespace) -> int:
    from mlx_sidecar.protocol.errors import SidecarError

    from ..models.folder_facts import folder_facts
    from ..models.sources import find_model

    model = arguments.model
    if Path(model).is_dir() and _store().find(model) is None:
        model = str(Path(model).absolute())
    try:
        folder = find_model(model, _store(), arguments.revision)
        facts = folder_facts(arguments.model, folder)
    except SidecarError as error:
        return _fail(arguments, error.kind, error.message)
    except OSError as error:
        return _fail(arguments, "invalid_model", "its files cannot be read", str(error))
    if arguments.json:
        print_json({"result": {"model": arguments.model} | _member_names(asdict(facts))})
        return 0
    rows = [("model", arguments.model), ("folder", str(folder))]
    rows += [(name.replace("_", " "), _shown(name, value)) for name, value in asdict(facts).items()]
    for name, value in [*rows, ("checks", "passed")]:
        sys.stdout.write(f"{name:<20}{value}\n")
    return 0


def _shown(name: str, value: object) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return size(value) if isinstance(value, int) and "bytes" in name else str(value)


def _member_names(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts under the names of the protocol, without what is unknown."""
    return {_camel(name): _plain(value) for name, value in facts.items() if value is not None}


def _camel(name: str) -> str:
    first, *others = name.replace("nbytes", "bytes").split("_")
    return first + "".join(map(str.title, others))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _fail(arguments: argparse.Namespace, kind: str, problem: str, reason: str | None = None) -> int:
    if arguments.json:
        print_json({"error": {"kind": kind, "message": problem}})
    sys.stderr.write(f"mlx-sidecar: {reason or problem}\n")
    return 1
