"""What every holder of key-encryption keys does; a test module inherits it and gives the fixtures `ring` and `again`.

`again` is a function that opens the same keys once more, as a restarted process would.
"""

from __future__ import annotations

import pytest

from cortex_common.errors import CorruptError, NotFoundError, PreconditionError
from cortex_common.security.keyring import RestingKey, made_s

SECRET = bytes(range(32))


class KeyEncryptionConformance:
    """The suite."""

    def test_there_is_a_key_from_the_beginning_and_its_id_says_when_it_was_made(self, ring, clock):
        assert ring.ids == (ring.current,)
        assert made_s(ring.current) == pytest.approx(clock.wall_s(), abs=0.01)

    def test_what_is_wrapped_opens_after_a_restart(self, ring, again):
        resting = ring.wrap(SECRET, b"for job 1")
        assert SECRET not in resting.wrapped
        assert resting.kek_id == ring.current
        assert again().unwrap(resting, b"for job 1") == SECRET

    def test_the_same_secret_never_rests_as_the_same_bytes(self, ring):
        assert ring.wrap(SECRET, b"c") != ring.wrap(SECRET, b"c")

    def test_another_context_or_a_changed_byte_opens_nothing(self, ring):
        resting = ring.wrap(SECRET, b"for job 1")
        with pytest.raises(CorruptError, match="of another context"):
            ring.unwrap(resting, b"for job 2")
        for place in range(len(resting.wrapped)):
            spoilt = bytearray(resting.wrapped)
            spoilt[place] ^= 1
            with pytest.raises(CorruptError):
                ring.unwrap(RestingKey(resting.kek_id, bytes(spoilt)), b"for job 1")
        for length in range(0, len(resting.wrapped), 7):
            with pytest.raises(CorruptError):
                ring.unwrap(RestingKey(resting.kek_id, resting.wrapped[:length]), b"for job 1")
        assert ring.unwrap(resting, b"for job 1") == SECRET

    def test_a_key_that_is_not_there_is_named(self, ring):
        with pytest.raises(NotFoundError, match="kek-nobody"):
            ring.unwrap(RestingKey("kek-nobody", bytes(60)), b"c")
        with pytest.raises(NotFoundError, match="kek-nobody"):
            ring.erase("kek-nobody")

    def test_a_new_key_wraps_and_the_old_one_still_opens_until_it_is_erased(self, ring, again):
        old = ring.wrap(SECRET, b"c")
        made = ring.rotate()
        assert ring.ids == (old.kek_id, made)
        assert ring.current == again().current == made
        new = ring.wrap(SECRET, b"c")
        assert new.kek_id == made
        assert again().unwrap(old, b"c") == again().unwrap(new, b"c") == SECRET
        with pytest.raises(CorruptError):
            ring.unwrap(RestingKey(made, old.wrapped), b"c")
        ring.erase(old.kek_id)
        for holder in (ring, again()):
            assert holder.ids == (made,)
            with pytest.raises(NotFoundError):
                holder.unwrap(old, b"c")
            assert holder.unwrap(new, b"c") == SECRET

    def test_the_key_in_use_is_not_erased(self, ring):
        with pytest.raises(PreconditionError, match="in use"):
            ring.erase(ring.current)

    def test_a_clock_that_was_set_back_does_not_bring_an_old_key_back(self, ring, again, clock):
        first = ring.current
        clock.jump_wall(-3600)
        made = ring.rotate()
        assert ring.ids == (first, made)
        assert again().current == made
