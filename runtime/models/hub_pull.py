"""A model of the Hugging Face hub into the hub's own cache.

A connection that breaks is taken up where it stopped. A pull that is stopped keeps the files that are
complete: the hub's library never continues a file that another process began.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

from .hub_cache import HUB_FILES, is_revision, remove_leftovers
from .pull_report import PullError, PullReport, check_room


def pull_from_hub(name: str, revision: str | None, report: PullReport) -> Path:
    """Bring the files of a hub model that are missing in the cache, and return its folder.

    Raises:
        PullError: it does not exist, cannot be fetched, or there is no room for it.
        KeyboardInterrupt: at once; threads of the download may go on until the process ends.
    """
    if revision is not None and not is_revision(revision):
        raise PullError(f"{name} has no revision {revision!r}")
    report.say(f"fetching {name} from the hub")
    remove_leftovers(name)
    folder = Path(_interruptible(lambda: _download(name, revision, report)))
    if not folder.is_dir():
        raise PullError(f"{name} has no config.json, nor any other file of a model")
    return folder


def _download(name: str, revision: str | None, report: PullReport) -> str:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    download = cast(Any, huggingface_hub.snapshot_download)
    options: dict[str, Any] = {"revision": revision, "allow_patterns": HUB_FILES}
    try:
        try:
            files: list[Any] = download(name, **options, dry_run=True, tqdm_class=_Bar)
        except DryRunError:
            files = []  # Off line, or refused: the download itself knows what to make of that.
        total = sum(file.file_size or 0 for file in files)
        missing = sum(file.file_size or 0 for file in files if file.will_download)
        check_room(missing, _free_bytes(Path(constants.HF_HUB_CACHE)))

        def on_bytes(count: int) -> None:
            report.progress("fetching", min(total - missing + count, total), total)

        on_bytes(0)
        bar = type("Bar", (_Bar,), {"on_bytes": staticmethod(on_bytes)})
        return download(name, **options, tqdm_class=bar)
    except PullError:
        raise
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
        raise PullError(
            f"{name} could not be downloaded ({type(error).__name__}: {reason})",
            f"{name} could not be downloaded; files that are complete stay, so try again",
        ) from None


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class _Bar:
    """What the hub's library takes for a progress bar, as far as it uses one.

    It has three: for bytes from the network, for bytes on the disk, and for files.
    """

    def __init__(self, *_: object, **options: Any) -> None:
        self.n, self.total = options.get("initial") or 0, options.get("total") or 0
        self._counts_bytes = options.get("unit") == "B"
        self.format_dict: dict[str, Any] = {}

    @staticmethod
    def on_bytes(_: int) -> None:
        """Take a number of bytes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, count: int | float | None = 1) -> None:
        self.n += int(count or 0)
        if self._counts_bytes:
            self.on_bytes(self.n)

    def _ignore(self, *_: object, **__: object) -> None:
        return

    close = refresh = set_description = set_description_str = set_postfix_str = _ignore


def _interruptible(work: Callable[[], str]) -> str:
    """Return what `work` returns. It runs on a thread, so that Ctrl-C need not wait for the network."""
    outcome: list[str | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
