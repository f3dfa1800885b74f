"""`cortex data seal` on a person's own arrays, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cortex.cli.main import main
from cortex.cli.sealing import _say_cut
from cortex.shipping import Cut, check_shards, read_manifest
from cortex_common.errors import CorruptError
from cortex_common.security.signing import SigningKey

INPUTS = np.arange(60, dtype=np.float32).reshape(10, 6)
LABELS = np.arange(10) % 3


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    SigningKey.create(tmp_path / "ann.key")
    np.savez(tmp_path / "ward.npz", x=INPUTS, y=LABELS)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "x.npy", INPUTS)
    np.save(tmp_path / "arrays" / "y.npy", LABELS)
    return tmp_path


def seal(source: str, *options: str, name: str = "ward") -> int:
    return main(["data", "seal", name, source, "--shards", "3", "--key", "ann.key", *options])


@pytest.mark.parametrize("source", ["ward.npz", "arrays"])
def test_arrays_become_shards_with_a_manifest_and_a_key_apart(
    here: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert seal(source, "--classes", "4", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    sealed = read_manifest(here / "ward.sealed")
    check_shards(here / "ward.sealed", sealed)
    assert told == {"reference": sealed.reference, "folder": "ward.sealed", "data_key": "ward.datakey"}
    facts = sealed.manifest
    assert (facts.examples, facts.classes, facts.input_shape, len(facts.shards)) == (10, 4, (6,), 3)
    assert (here / "ward.datakey").stat().st_mode & 0o777 == 0o600
    assert json.loads((here / "ward.datakey").read_text())["dataset"] == sealed.reference


def test_a_shard_that_is_missing_or_cut_is_found_before_anything_is_sent(here: Path) -> None:
    assert seal("ward.npz") == 0
    folder = here / "ward.sealed"
    told, path = read_manifest(folder), folder / "0001.shard"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"0001\.shard has \d+ bytes; the manifest tells of \d+"):
        check_shards(folder, told)
    path.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        check_shards(folder, told)


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("nowhere", (), "neither an .npz file, nor a folder, nor a name"),
        ("ward.npz", ("--shards", "11"), "10 examples cannot be dealt to 11"),
        ("ward.npz", ("--data-key", "ann.key"), "a key is never overwritten"),
        ("ward.npz", ("--output", "arrays"), "is not empty"),
    ],
)
def test_what_cannot_be_sealed_is_told(
    here: Path, source: str, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert seal(source, *options) == 1
    assert told in capsys.readouterr().err


def test_a_name_that_no_job_could_use_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seal("ward.npz", "--output", "out", "--data-key", "k", name="Ward 7") == 1
    assert "name" in capsys.readouterr().err
    assert not (here / "k").exists()


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("connection lost", "eu-1: shard 3: connection lost, going on at 12.6 of 4,294.9 MB\n"),
        ("", "eu-1: shard 3: going on at 12.6 of 4,294.9 MB\n"),
    ],
)
def test_an_upload_that_goes_on_says_where(reason: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    _say_cut("eu-1", Cut(3, 12_582_912, 4_294_901_760, reason))
    assert capsys.readouterr().err == told
