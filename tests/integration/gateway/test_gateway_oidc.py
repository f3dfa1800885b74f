"""Tokens of an OpenID Connect issuer, through the real gateway, against a real issuer over HTTP."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from cortex_common.errors import CortexError, ForbiddenError, UnauthenticatedError, UnavailableError
from cortex_common.security.tokens import Scope
from services.gateway.oidc import OidcVerifier
from services.gateway.settings import OidcSettings
from tests.fakes import ManualClock
from tests.integration.gateway.conftest import Gateway, TlsOf
from tests.integration.gateway.issuer import ALGORITHMS, AUDIENCE, Issuer, issuer, new_key

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:EdDSA is deprecated"),  # as a name; issuers sign by it still
]
SCOPES = {"cortex:read": ["read"], "cortex:submit": ["read", "submit"], "staff": ["admin"]}


@pytest.fixture(scope="module")
def idp():
    with issuer() as made:
        yield made


def settings_for(idp: Issuer, **changes) -> OidcSettings:
    values = {"issuer": idp.url, "audience": AUDIENCE, "algorithms": list(ALGORITHMS), "scopes": SCOPES}
    return OidcSettings(**(values | {"org_claim": "tenant", "name_claim": "preferred_username"} | changes))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(idp: Issuer, tls_of: TlsOf, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    limits = {"bad_tokens_burst": 1000.0}
    async with Gateway(tls_of, folder).running(oidc=settings_for(idp), **limits) as running:
        yield running


async def ask(gateway: Gateway, token: str, path: str = "/api/v1/jobs") -> httpx.Response:
    return await gateway.http.get(path, headers={"Authorization": f"Bearer {token}"})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_who_signed_in_elsewhere_gets_in_with_name_and_organisation(
    gateway: Gateway, idp: Issuer, algorithm: str
) -> None:
    gateway.reset()
    token = idp.token(algorithm, preferred_username="alice", tenant="acme")
    assert (await ask(gateway, token)).status_code == 200
    assert (gateway.jobs.principals, gateway.jobs.orgs) == (["alice"], ["acme"])


async def test_a_token_of_cortex_counts_beside_them(gateway: Gateway) -> None:
    assert (await gateway.http.get("/api/v1/jobs")).status_code == 200


async def test_claims_give_scopes_and_nothing_more(gateway: Gateway, idp: Issuer) -> None:
    reader = {"Authorization": f"Bearer {idp.token(tenant='acme')}"}
    assert (await gateway.http.post("/api/v1/jobs/job-1/cancel", headers=reader)).status_code == 403
    submitter = {"Authorization": f"Bearer {idp.token(tenant='acme', scope=['other', 'cortex:submit'])}"}
    assert (await gateway.http.post("/api/v1/jobs/job-1/cancel", headers=submitter)).status_code == 200
    nobody = await ask(gateway, idp.token(tenant="acme", scope="profile email"))
    assert (nobody.status_code, "gives no scope" in nobody.json()["detail"]) == (403, True)


async def test_a_name_that_is_none_is_made_up_from_the_subject(gateway: Gateway, idp: Issuer) -> None:
    gateway.reset()
    await ask(gateway, idp.token(tenant="acme", preferred_username="a b\n"))
    assert gateway.jobs.principals[0].startswith("oidc-")


NONE, KEYED = b'{"alg":"none","kid":"ES256-1"}', b'{"alg":"HS256","kid":"RS256-1"}'


def _coded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def _unsigned(idp: Issuer) -> str:
    claims = idp.claims(tenant="acme", scope="staff")
    return ".".join((_coded(NONE), _coded(json.dumps(claims).encode()), ""))


def _signed_with_the_public_key(idp: Issuer) -> str:
    """The old trick: the public key, which everybody has, as the secret of a keyed hash."""
    signed = ".".join((_coded(KEYED), _coded(json.dumps(idp.claims(tenant="acme")).encode())))
    secret = idp.keys["RS256"].as_pem(private=False)
    return f"{signed}.{_coded(hmac.digest(secret, signed.encode(), 'sha256'))}"


def _changed(idp: Issuer) -> str:
    head, _, signature = idp.token(tenant="acme").split(".")
    return f"{head}.{_coded(json.dumps(idp.claims(tenant='acme', scope='staff')).encode())}.{signature}"


BAD = {
    "no signature": _unsigned,
    "keyed by the public key": _signed_with_the_public_key,
    "changed": _changed,
    "of a stranger's key": lambda idp: idp.token(key=new_key("ES256", "ES256-1"), tenant="acme"),
    "of an unknown key": lambda idp: idp.token(key=new_key("ES256", "unknown"), tenant="acme"),
    "of a key of another kind": lambda idp: idp.token("ES256", head={"kid": "RS256-1"}, tenant="acme"),
    "of no named key": lambda idp: idp.token(head={"kid": None}, tenant="acme"),
    "with demands": lambda idp: idp.token(tenant="acme").replace(
        idp.token(tenant="acme").split(".")[0],
        _coded(b'{"alg":"ES256","kid":"ES256-1","crit":["x"],"x":1}'),
    ),
    "of another issuer": lambda idp: idp.token(tenant="acme", iss="http://127.0.0.1:1"),
    "for another service": lambda idp: idp.token(tenant="acme", aud="billing"),
    "for nobody": lambda idp: idp.token(tenant="acme", aud=None),
    "expired": lambda idp: idp.token(tenant="acme", iat=1, exp=2),
    "without end": lambda idp: idp.token(tenant="acme", exp=None),
    "without start": lambda idp: idp.token(tenant="acme", iat=None),
    "of somebody unnamed": lambda idp: idp.token(tenant="acme", sub=None),
    "too long a life": lambda idp: idp.token(tenant="acme", exp=idp.claims()["iat"] + 3601),
    "not valid yet": lambda idp: idp.token(tenant="acme", nbf=idp.claims()["iat"] + 300),
    "from the future": lambda idp: idp.token(
        tenant="acme", iat=idp.claims()["iat"] + 300, exp=idp.claims()["iat"] + 600
    ),
    "no text": lambda idp: "x.y.z",
    "endless": lambda idp: idp.token(tenant="acme", much="x" * 10_000),
}


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_token_is_refused(gateway: Gateway, idp: Issuer, kind: str) -> None:
    gateway.reset()
    answer = await ask(gateway, BAD[kind](idp))
    assert answer.status_code == 401, answer.text
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert gateway.jobs.calls == []


async def test_a_token_without_an_organisation_is_refused(gateway: Gateway, idp: Issuer) -> None:
    for tenant in (None, 7, "no name!", ["acme", "other"]):
        answer = await ask(gateway, idp.token(tenant=tenant))
        assert (answer.status_code, "names no organisation" in answer.json()["detail"]) == (403, True)


# --- the issuer's keys, with time in the test's hand ------------------------------------------------------------------


@pytest.fixture
def own_idp():
    with issuer() as made:
        yield made


def now_clock() -> ManualClock:
    import time

    return ManualClock(wall_s=time.time())


async def refused(verifier: OidcVerifier, token: str) -> CortexError:
    with pytest.raises(CortexError) as caught:
        await verifier.verify(token)
    return caught.value


async def test_keys_are_fetched_once_and_new_ones_are_found(own_idp: Issuer) -> None:
    clock = now_clock()
    verifier = OidcVerifier(settings_for(own_idp, org_claim=None), clock)
    for _ in range(3):
        await verifier.verify(own_idp.token())
    assert own_idp.called.count("/jwks") == 1
    await clock.advance(11)
    own_idp.keys["ES256"] = new_key("ES256", "ES256-2")
    await verifier.verify(own_idp.token())
    assert own_idp.called.count("/jwks") == 2


async def test_guessed_key_ids_do_not_make_the_gateway_ask_again_and_again(own_idp: Issuer) -> None:
    clock = now_clock()
    verifier = OidcVerifier(settings_for(own_idp), clock)
    for number in range(20):
        assert isinstance(
            await refused(verifier, own_idp.token(key=new_key("ES256", f"guess-{number}"))), UnauthenticatedError
        )
    assert own_idp.called.count("/jwks") == 1


async def test_a_key_taken_back_counts_no_longer(own_idp: Issuer) -> None:
    clock = now_clock()
    verifier = OidcVerifier(settings_for(own_idp, org_claim=None), clock)
    old = own_idp.token()
    await verifier.verify(old)
    own_idp.keys["ES256"] = new_key("ES256", "ES256-2")
    await clock.advance(599)
    own_idp.keys.pop("ES256")
    await clock.advance(2)
    assert "no key" in (await refused(verifier, old)).message


async def test_an_issuer_that_is_away_is_done_without_for_an_hour(own_idp: Issuer) -> None:
    clock = now_clock()
    settings = settings_for(own_idp, org_claim=None, max_life_s=1e6)
    verifier = OidcVerifier(settings, clock)
    token = own_idp.token(exp=own_idp.claims()["iat"] + 100_000)
    own_idp.is_away = True
    assert isinstance(await refused(verifier, token), UnavailableError)
    own_idp.is_away = False
    assert isinstance(await refused(verifier, token), UnavailableError), "not asked again within a second"
    await clock.advance(1.1)
    await verifier.verify(token)
    own_idp.is_away = True
    await clock.advance(3500)
    assert (await verifier.verify(token)).scopes == {Scope.READ}
    await clock.advance(200)
    assert isinstance(await refused(verifier, token), UnavailableError)


async def test_who_calls_itself_another_or_answers_without_end_is_not_believed(own_idp: Issuer) -> None:
    for change in ({"name_in_document": "https://elsewhere.example"}, {"padding": "x" * 300_000}):
        vars(own_idp).update(change)
        verifier = OidcVerifier(settings_for(own_idp), now_clock())
        assert isinstance(await refused(verifier, own_idp.token()), UnavailableError)


async def test_only_mapped_organisations_and_allowed_algorithms_count(own_idp: Issuer) -> None:
    strict = settings_for(own_idp, orgs={"t-1": "acme"}, algorithms=["EdDSA"])
    verifier = OidcVerifier(strict, now_clock())
    assert (await verifier.verify(own_idp.token("EdDSA", tenant="t-1"))).org == "acme"
    assert isinstance(await refused(verifier, own_idp.token("EdDSA", tenant="acme")), ForbiddenError)
    assert "allowed: EdDSA" in (await refused(verifier, own_idp.token("ES256", tenant="t-1"))).message


@pytest.mark.parametrize("url", ["http://idp.example", "ftp://127.0.0.1", "idp.example", "http://127.0.0.1.example"])
async def test_an_issuer_without_https_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValueError, match="allowed: https://"):
        OidcSettings(issuer=url, audience="a")
