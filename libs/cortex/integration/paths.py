"""Files and folders that a `config.yaml` names: whether they can be used, before anything has begun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

from cortex.integration.settings import ManagerSettings
from cortex_common.errors import InvalidArgumentError, Violation


def check_paths(settings: ManagerSettings) -> None:
    """Make the folders that are written to, and see that the others are there.

    Raises:
        InvalidArgumentError: every one that cannot be used, with its key and why.
    """
    if violations := [*_folders(settings), *_files(settings)]:
        raise InvalidArgumentError.of("CortexManager settings", violations)


def _folders(settings: ManagerSettings) -> Iterator[Violation]:
    folders = {
        "state_dir": settings.node_dir,
        "training.checkpoint_dir": settings.training.checkpoint_dir,
        "monitoring.tensorboard_dir": settings.monitoring.tensorboard_dir,
    }
    for key, path in folders.items():
        if path is None:
            continue
        try:
            path.expanduser().mkdir(mode=0o700 if key == "state_dir" else 0o777, parents=True, exist_ok=True)
            with TemporaryFile(dir=path.expanduser()):
                pass
        except OSError as error:
            yield Violation(key, f"{path} cannot be written to: {error.strerror or error}; allowed: a folder of yours")


def _files(settings: ManagerSettings) -> Iterator[Violation]:
    files: dict[str, Path | None] = {
        "training.init_from": settings.training.init_from,
        "network.ca": settings.network.ca,
    }
    for key, path in files.items():
        if path is not None and not path.expanduser().is_file():
            yield Violation(key, f"{path} given; there is no such file")
