"""Fashion-MNIST: where it may be, how it is had, and its unpacked copy in the cache (memory-mapped bytes).

Looked for in this order: the cache, the folder in FASHION_MNIST_DIR, the Debian package's folder, the Debian package
itself (downloaded and unpacked without root), the dataset's public home. What is read is checked against digests.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortex_common.data.idx import read_idx
from cortex_common.errors import CorruptError, CortexError, NotFoundError

Array = NDArray[Any]
Say = Callable[[str], None]

HOMES = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")

# IDX file, array in the cache, SHA-256 of the values.
# pragma: allowlist nextline secret
_FILES = (
    ("train-images-idx3-ubyte.gz", "train-x.npy", "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012"),
    ("train-labels-idx1-ubyte.gz", "train-y.npy", "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"),
    ("t10k-images-idx3-ubyte.gz", "test-x.npy", "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a"),
    ("t10k-labels-idx1-ubyte.gz", "test-y.npy", "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"),
)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/cortex`, by default `~/.cache/cortex`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cortex"


def is_present(cache_dir: Path) -> bool:
    """Whether it can be read without fetching."""
    return _is_unpacked(cache_dir) or any(_has_files(folder) for folder in _local_folders(cache_dir))


def read(part: str, cache_dir: Path) -> tuple[Array, NDArray[np.int64]]:
    """Images (N, 28, 28) as memory-mapped bytes, and labels.

    Args:
        part: train | test.
        cache_dir: Shared by all processes of a machine.

    Raises:
        NotFoundError: it is not on this machine.
        CorruptError: a file is damaged.
    """
    if not _is_unpacked(cache_dir):
        _unpack_local(cache_dir)
    folder = _folder(cache_dir)
    images = np.load(folder / f"{part}-x.npy", mmap_mode="r", allow_pickle=False)
    return images, np.load(folder / f"{part}-y.npy", allow_pickle=False).astype(np.int64)


def fetch(cache_dir: Path, say: Say = lambda _: None, homes: tuple[str, ...] = HOMES) -> None:
    """Make it readable from the cache, by whatever way works.

    Args:
        cache_dir: Created when missing.
        say: Told what is being done.
        homes: Base addresses to download from.

    Raises:
        NotFoundError: no way worked; says why each did not.
    """
    with _locked(cache_dir):
        if _is_unpacked(cache_dir):
            return
        ways: list[tuple[str, Callable[[], None]]] = [
            (str(folder), partial(_unpack, folder, cache_dir))
            for folder in _local_folders(cache_dir)
            if _has_files(folder)
        ]
        ways.append((f"Debian package {DEBIAN_PACKAGE}", partial(_from_debian, cache_dir)))
        ways += [(home, partial(_download, home, cache_dir)) for home in homes]
        failures = []
        for name, way in ways:
            say(f"fashion-mnist: trying {name}")
            try:
                return way()
            except (CortexError, OSError, subprocess.SubprocessError) as error:
                failures.append(f"  {name}: {error}")
    raise NotFoundError(
        "fashion-mnist cannot be had here; tried\n" + "\n".join(failures) + "\n"
        f"Put its four IDX files into {_folder(cache_dir)}, or use the built-in dataset digits."
    )


def _folder(cache_dir: Path) -> Path:
    return cache_dir / "fashion-mnist"


def _local_folders(cache_dir: Path) -> list[Path]:
    named = os.environ.get("FASHION_MNIST_DIR")
    return [_folder(cache_dir), *([Path(named)] if named else []), DEBIAN_DIR]


def _is_unpacked(cache_dir: Path) -> bool:
    return all((_folder(cache_dir) / array).is_file() for _, array, _ in _FILES)


def _has_files(folder: Path) -> bool:
    return all((folder / file).is_file() for file, _, _ in _FILES)


@contextmanager
def _locked(cache_dir: Path) -> Iterator[None]:
    """Hold the cache's lock: processes that start together fetch once."""
    _folder(cache_dir).mkdir(parents=True, exist_ok=True)
    with (_folder(cache_dir) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack_local(cache_dir: Path) -> None:
    source = next((folder for folder in _local_folders(cache_dir) if _has_files(folder)), None)
    if source is None:
        raise NotFoundError(
            f"fashion-mnist is not on this machine; `cortex data fetch fashion-mnist` fetches it into {cache_dir}"
        )
    with _locked(cache_dir):
        if not _is_unpacked(cache_dir):
            _unpack(source, cache_dir)


def _unpack(source: Path, cache_dir: Path) -> None:
    """Decode the IDX files, check them, store them as arrays: each appears whole or not at all."""
    for file, name, digest in _FILES:
        values = read_idx(source / file)
        if hashlib.sha256(values.tobytes()).hexdigest() != digest:
            raise CorruptError(f"{source / file}: is not Fashion-MNIST (its values have another SHA-256)")
        _store(_folder(cache_dir) / name, values)


def _store(path: Path, values: Array) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
        try:
            np.save(stream, values, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
            Path(stream.name).chmod(0o644)
            Path(stream.name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(stream.name).unlink()
            raise


def _from_debian(cache_dir: Path) -> None:
    """Download the package as an ordinary user and unpack it beside the cache; nothing is installed."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NotFoundError("apt-get and dpkg-deb are not here")
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        _run(["apt-get", "download", DEBIAN_PACKAGE], folder)
        package = next(Path(folder).glob(f"{DEBIAN_PACKAGE}_*.deb"), None)
        if package is None:
            raise NotFoundError("apt-get downloaded nothing")
        _run(["dpkg-deb", "-x", str(package), "unpacked"], folder)
        _unpack(Path(folder) / "unpacked" / DEBIAN_DIR.relative_to("/"), cache_dir)


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NotFoundError(f"{command[0]} failed: {lines[-1]}")


def _download(home: str, cache_dir: Path) -> None:
    import httpx  # slow to import, and seldom needed

    with tempfile.TemporaryDirectory(dir=cache_dir) as folder, httpx.Client(timeout=20) as client:
        try:
            for file, _, _ in _FILES:
                with client.stream("GET", f"{home}/{file}", follow_redirects=True) as response:
                    response.raise_for_status()
                    with (Path(folder) / file).open("wb") as stream:
                        for piece in response.iter_bytes():
                            stream.write(piece)
        except httpx.HTTPError as error:
            raise NotFoundError(f"download failed: {error}") from error
        _unpack(Path(folder), cache_dir)
