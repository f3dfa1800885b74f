"""Tokens: shown once, stored hashed, counted at once, refused when wrong."""

from __future__ import annotations

import json
import stat
import threading
from datetime import timedelta

import pytest

from cortex_common.buckets import Allowance
from cortex_common.errors import (
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from cortex_common.security.audit import read_log
from cortex_common.security.audit_check import check_log
from cortex_common.security.tokens import Principal, Scope, TokenStore
from services.gateway.access import Access, Limits


@pytest.fixture
def store(tmp_path, clock):
    return TokenStore(tmp_path / "state" / "tokens.json", clock)


def test_a_token_is_verified_as_whose_it_is(store):
    token = store.create("alice", ["read", "submit"])
    prefix, token_id, secret = token.split("_", 2)
    assert prefix == "ctx"
    assert len(secret) >= 43  # 256 bits
    assert store.verify(token) == Principal(token_id, "alice", frozenset({Scope.READ, Scope.SUBMIT}))


def test_neither_file_holds_the_secret_and_only_the_owner_reads_them(store, tmp_path):
    secret = store.create("alice", ["read"]).split("_", 2)[2]
    files = [path for path in (tmp_path / "state").iterdir() if path.is_file()]
    assert {path.name for path in files} == {"tokens.json", "tokens.json.pepper", "tokens.json.lock"}
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert secret not in path.read_text()


@pytest.mark.parametrize("token", ["", "ctx", "ctx__", "ctx_a", "ctx_a_", "xtc_a_b", "Bearer x", "ctx_\u00e9_\u00e9"])
def test_malformed_tokens_are_refused(store, token):
    store.create("alice", ["read"])
    with pytest.raises(UnauthenticatedError):
        store.verify(token)


def test_a_token_with_one_character_changed_is_refused(store):
    token = store.create("alice", ["read"])
    for index in range(4, len(token)):
        changed = "B" if token[index] == "A" else "A"
        with pytest.raises(UnauthenticatedError):
            store.verify(token[:index] + changed + token[index + 1 :])


def test_before_the_first_token_every_token_is_refused(store):
    with pytest.raises(UnauthenticatedError, match="unknown"):
        store.verify("ctx_a_b")
    assert store.list() == ()


async def test_a_token_ends_with_its_life(store, clock):
    token = store.create("alice", ["read"], timedelta(hours=1))
    await clock.advance(3599.0)
    assert store.verify(token).name == "alice"
    await clock.advance(1.0)
    with pytest.raises(UnauthenticatedError, match="'alice' expired at 2023-11-14T23:13:20"):
        store.verify(token)


def test_what_another_process_makes_or_revokes_counts_at_once(store, tmp_path, clock):
    other = TokenStore(tmp_path / "state" / "tokens.json", clock)
    first = other.create("alice", ["read"])
    assert store.verify(first).name == "alice"
    second = other.create("bob", ["read"])
    assert store.verify(second).name == "bob"
    other.revoke(first.split("_")[1])
    with pytest.raises(UnauthenticatedError, match="revoked"):
        store.verify(first)
    assert [record.name for record in store.list()] == ["bob"]


def test_tokens_made_at_the_same_time_are_all_kept(tmp_path, clock):
    path = tmp_path / "tokens.json"
    threads = [
        threading.Thread(target=lambda name=f"user-{index}": TokenStore(path, clock).create(name, ["read"]))
        for index in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(TokenStore(path, clock).list()) == 12


def test_a_token_of_another_server_is_refused_even_with_a_copied_file(store, tmp_path, clock):
    token = store.create("alice", ["read"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tokens.json").write_bytes((tmp_path / "state" / "tokens.json").read_bytes())
    (elsewhere / "tokens.json.pepper").write_text("00" * 32)
    with pytest.raises(UnauthenticatedError):
        TokenStore(elsewhere / "tokens.json", clock).verify(token)


def test_revoking_an_unknown_token_says_so(store):
    with pytest.raises(NotFoundError, match="'nope'"):
        store.revoke("nope")


def test_all_mistakes_in_a_new_token_are_told_at_once(store):
    with pytest.raises(InvalidArgumentError) as caught:
        store.create("two words", ["read", "write"], timedelta(0))
    assert [violation.path for violation in caught.value.violations] == ["name", "scopes", "life"]
    with pytest.raises(InvalidArgumentError, match="none given"):
        store.create("alice", [])


def test_a_changed_letter_in_the_file_is_found(store, tmp_path):
    token = store.create("alice", ["read"])
    path = tmp_path / "state" / "tokens.json"
    path.write_text(path.read_text().replace('"read"', '"admin"'))
    with pytest.raises(UnavailableError, match="it was changed since it was written"):
        store.verify(token)


def test_a_file_from_before_there_was_a_check_is_read(store, tmp_path):
    token = store.create("alice", ["read"])
    path = tmp_path / "state" / "tokens.json"
    document = json.loads(path.read_text())
    del document["check"]
    path.write_text(json.dumps(document, indent=2))
    assert store.verify(token).name == "alice"
    store.revoke(token.split("_")[1])
    assert "check" in json.loads(path.read_text())


@pytest.mark.parametrize("content", ["{", '{"tokens": [{}]}', '{"token": []}'])
def test_a_damaged_file_is_named(store, tmp_path, content):
    store.create("alice", ["read"])
    (tmp_path / "state" / "tokens.json").write_text(content)
    with pytest.raises(UnavailableError, match=r"tokens\.json"):
        store.verify("ctx_a_b")


def test_scopes_hold_what_they_say():
    admin = Principal("1", "root", frozenset({Scope.ADMIN}))
    assert [scope for scope in Scope if admin.may(scope)] == [Scope.READ, Scope.SUBMIT, Scope.ADMIN]
    reader = Principal("2", "ann", frozenset({Scope.READ}))
    assert [scope for scope in Scope if reader.may(scope)] == [Scope.READ]
    with pytest.raises(ForbiddenError, match="token 'ann' has the scopes read; this needs submit"):
        reader.require(Scope.SUBMIT)


def test_a_file_with_the_scope_that_is_gone_is_read(store, tmp_path):
    tokens = [store.create("alice", [scope]) for scope in ("read", "submit")]
    path = tmp_path / "state" / "tokens.json"
    content = json.loads(path.read_text())
    del content["check"]
    for record, scopes in zip(content["tokens"], (["node", "read"], ["node"]), strict=True):
        record["scopes"] = scopes
    path.write_text(json.dumps(content))
    assert [store.verify(token).scopes for token in tokens] == [frozenset({Scope.READ}), frozenset()]
    with pytest.raises(InvalidArgumentError, match="'node' given; allowed: read, submit, admin"):
        store.create("alice", ["node"])


def test_the_file_is_plain_json(store, tmp_path):
    store.create("alice", ["read"], timedelta(days=1))
    (record,) = json.loads((tmp_path / "state" / "tokens.json").read_text())["tokens"]
    assert set(record) == {"id", "name", "org", "scopes", "hash", "created_at", "expires_at"}


def test_when_a_token_was_last_used_is_kept(store, clock):
    token, unused = store.create("alice", ["read"]), store.create("bob", ["read"])
    assert store.last_used() == {}
    store.verify(token)
    clock.jump_wall(60)
    store.verify(token)
    store.save_use()
    token_id = token.split("_")[1]
    assert {name: at.timestamp() for name, at in store.last_used().items()} == {token_id: int(clock.wall_s())}
    store.revoke(token_id)
    store.verify(unused)
    store.save_use()
    assert set(store.last_used()) == {unused.split("_")[1]}, "who is gone is forgotten"


def test_a_bad_token_is_no_use(store, tmp_path):
    token = store.create("alice", ["read"])
    with pytest.raises(UnauthenticatedError):
        store.verify(token[:-1] + "!")
    store.save_use()
    assert store.last_used() == {}


def test_changes_of_tokens_are_in_an_audit_log_without_the_tokens(store):
    token = store.create("alice", ["read"], org="acme")
    token_id = token.split("_")[1]
    store.revoke(token_id)
    made, gone = read_log(store.audit_directory)
    assert (made["what"], made["about"]) == ("token create", f"token_id={token_id} name=alice org=acme scopes=read")
    assert (gone["what"], gone["about"]) == ("token revoke", f"token_id={token_id}")
    assert check_log(store.audit_directory).problems == []
    kept = b"".join(path.read_bytes() for path in store.audit_directory.parent.rglob("*") if path.is_file())
    assert token.encode() not in kept
    assert token.split("_", 2)[2].encode() not in kept


async def test_where_the_last_use_cannot_be_written_tokens_still_count(store, tmp_path, clock):
    """As in Kubernetes, where the token file is a Secret: a read-only folder."""
    token = store.create("alice", ["read"])
    (tmp_path / "state" / "tokens.json.used.new").mkdir()
    access = Access(store, None, Limits(Allowance(10, 10), Allowance(1, 1)), clock)
    await access.principal(token, "peer")
    with pytest.raises(OSError, match=r"used\.new"):
        store.save_use()
    assert (await access.principal(token, "peer")).name == "alice"
    await access.save_use()
    (tmp_path / "state" / "tokens.json.used.new").rmdir()
    await access.principal(token, "peer")
    await access.save_use()
    assert set(store.last_used()) == {token.split("_")[1]}


def test_files_that_were_made_anew_count_at_once_with_their_pepper(store, tmp_path, clock):
    assert store.verify(store.create("alice", ["read"])).name == "alice"
    for path in (tmp_path / "state").glob("tokens.json*"):
        if path.is_file():
            path.unlink()
    token = TokenStore(tmp_path / "state" / "tokens.json", clock).create("bob", ["read"])
    assert store.verify(token).name == "bob"


async def test_a_token_that_was_good_is_refused_once_it_is_not(store, clock):
    allowance = Allowance(per_s=100, burst=100)
    access = Access(store, None, Limits(allowance, allowance), clock)
    kept = store.create("ann", ["read"])
    lasting, short = [
        await access.principal(token, "192.0.2.1")
        for token in (kept, store.create("bob", ["read"], timedelta(hours=1)))
    ]
    access.require_still(lasting)
    access.require_still(short)
    await clock.advance(3600)
    with pytest.raises(UnauthenticatedError, match="'bob' has expired"):
        access.require_still(short)
    access.require_still(lasting)
    store.revoke(lasting.token_id)
    with pytest.raises(UnauthenticatedError, match="'ann' was revoked"):
        access.require_still(lasting)
    elsewhere = Principal("oidc:12", "eve", frozenset({Scope.READ}), "default", clock.wall_s() + 60)
    access.require_still(elsewhere)
    await clock.advance(60)
    with pytest.raises(UnauthenticatedError, match="'eve' has expired"):
        access.require_still(elsewhere)
