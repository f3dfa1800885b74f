"""High-water marks: what is older is refused, and nothing that a kill or a power cut leaves is."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex_common.errors import CorruptError, OverloadedError
from cortex_common.security.marks import HighWaterMarks, MarkedFile


def file_of(root: Path, name: str = "state.json") -> MarkedFile:
    """The file as a process that has just started knows it."""
    return MarkedFile(root / name, HighWaterMarks(root), name)


def ledger(root: Path) -> Path:
    return root / "marks"


def plain(facts: dict[str, object] | None) -> dict[str, object] | None:
    return facts and {key: value for key, value in facts.items() if key not in ("version", "code")}


def test_an_older_file_is_refused_and_the_message_says_what_to_do(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    assert file.read() is None
    file.write({"who": "ann"})
    older = file.path.read_bytes()
    file.write({"who": "bob"})
    assert plain(file_of(tmp_path).read()) == {"who": "bob"}
    file.path.write_bytes(older)
    for each in (file, file_of(tmp_path)):
        with pytest.raises(CorruptError) as caught:
            each.read()
        assert caught.value.message == (
            "it is an older one put back: version 1, but 2 was written here; put back the newest, or, if this one is "
            f"meant, stop the service and remove {ledger(tmp_path)}: then everything beside it is taken as it is"
        )


def test_a_file_that_is_gone_is_missed_unless_it_was_removed(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    file.write({"a": 1})
    file.path.unlink()
    with pytest.raises(CorruptError, match="it is gone, but version 1 was written here"):
        file_of(tmp_path).read()
    file.write({"a": 2})
    file.remove()
    assert file_of(tmp_path).read() is None


def test_an_operator_accepts_what_is_there_by_removing_the_marks(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    file.write({"a": 1})
    older = file.path.read_bytes()
    file.write({"a": 2})
    file.path.write_bytes(older)
    ledger(tmp_path).unlink()
    again = file_of(tmp_path)
    assert plain(again.read()) == {"a": 1}
    # Start after start, and under marks again once it is written.
    assert plain(file_of(tmp_path).read()) == {"a": 1}
    file_of(tmp_path).write({"a": 3})
    file.path.write_bytes(older)
    with pytest.raises(CorruptError, match="it was not written here"):
        file_of(tmp_path).read()


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_marks_lost_in_a_power_cut_lock_nobody_out(tmp_path: Path, kept: int) -> None:
    file = file_of(tmp_path)
    pages = [ledger(tmp_path).read_bytes()]
    for number in range(3):
        file.write({"a": number})
        pages.append(ledger(tmp_path).read_bytes())
    ledger(tmp_path).write_bytes(pages[kept])
    assert plain(file_of(tmp_path).read()) == {"a": 2}
    # What was read is marked again.
    assert ledger(tmp_path).read_bytes() == pages[-1]


@pytest.mark.parametrize("length", range(4096, 4096 + 33))
def test_a_torn_mark_is_none(tmp_path: Path, length: int) -> None:
    file = file_of(tmp_path)
    file.write({"a": 1})
    whole = ledger(tmp_path).read_bytes()
    for torn in (whole[:length], whole[:length].ljust(len(whole), b"\0")):
        ledger(tmp_path).write_bytes(torn)
        assert plain(file_of(tmp_path).read()) == {"a": 1}
        assert ledger(tmp_path).read_bytes()[:4096] == whole[:4096]
    other = file_of(tmp_path, "other.json")
    other.write({"b": 1})
    assert plain(file_of(tmp_path).read()) == {"a": 1}
    assert plain(file_of(tmp_path, "other.json").read()) == {"b": 1}


@pytest.mark.parametrize("at", [0, 8, 39, 40, 71])
def test_damaged_marks_are_set_aside_and_made_anew(tmp_path: Path, at: int) -> None:
    file_of(tmp_path).write({"a": 1})
    data = bytearray(ledger(tmp_path).read_bytes())
    data[at] ^= 1
    ledger(tmp_path).write_bytes(data)
    again = file_of(tmp_path)
    assert (tmp_path / "marks.damaged").read_bytes() == data
    assert plain(again.read()) == {"a": 1}


def test_a_file_of_another_name_or_another_place_is_refused(tmp_path: Path) -> None:
    here, there = file_of(tmp_path / "here"), file_of(tmp_path / "there")
    beside = MarkedFile(here.path.with_name("beside.json"), here.marks, "beside.json")
    for _ in range(3):
        there.write({"a": 1})
    here.write({"a": 1})
    beside.write({"a": 1})
    for other in (there, beside):
        here.path.write_bytes(other.path.read_bytes())
        with pytest.raises(CorruptError, match="it was not written here"):
            here.read()


def test_a_file_from_before_there_were_marks_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b'{"a": 1}')
    file = file_of(tmp_path)
    assert plain(file.read()) == {"a": 1}
    file.write({"a": 2})
    file.path.write_bytes(b'{"a": 1}')
    with pytest.raises(CorruptError, match="version 0, but 1 was written here"):
        file_of(tmp_path).read()


def test_a_write_that_fails_raises_no_mark(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    file.write({"a": 1})

    def full(path: Path, data: bytes) -> None:
        raise OverloadedError(f"{path}: no room for {len(data)} bytes")

    with pytest.raises(OverloadedError):
        file.write({"a": 2}, full)
    assert plain(file_of(tmp_path).read()) == {"a": 1}
    file.write({"a": 3})
    assert plain(file_of(tmp_path).read()) == {"a": 3}


def test_slots_of_forgotten_files_are_used_again(tmp_path: Path) -> None:
    kept = file_of(tmp_path, "kept.json")
    kept.write({"a": 0})
    marks = HighWaterMarks(tmp_path)
    for number in range(100):
        one = MarkedFile(tmp_path / f"{number}.json", marks, f"{number}.json")
        one.write({"n": number})
        if number >= 5:
            marks.forget(f"{number - 5}.json")
    assert ledger(tmp_path).stat().st_size == 4096 + 7 * 32
    assert plain(file_of(tmp_path, "kept.json").read()) == {"a": 0}
    HighWaterMarks(tmp_path).require_unknown("94.json")
    with pytest.raises(CorruptError):
        HighWaterMarks(tmp_path).require_unknown("95.json")


def test_marks_that_cannot_be_written_fail_nobody(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    file.write({"a": 1})
    ledger(tmp_path).unlink()
    file.write({"a": 2})
    assert plain(file.read()) == plain(file_of(tmp_path).read()) == {"a": 2}
