"""Certificates that openssl has made, and replaces, as a company's own authority would: nothing of ours signs."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.channel import open_channel
from cortex_common.security.certificates import certificate_of
from tests.integration.platform.conftest import ServeExample
from tests.integration.platform.test_mutual_tls import heartbeat, server_serial
from tests.programs import located

OPENSSL = located("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")
DAYS = "2"


class Openssl:
    """A root and the authority below it that signs certificates; EC keys of P-384, as companies like them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        folder.mkdir()
        self._run("req", "-x509", "-nodes", *_key("root"), *_subject("root"), "-days", DAYS, "-out", "root.crt")
        self.renew_issuer()

    def renew_issuer(self) -> None:
        """Have another authority sign from now on, below the same root."""
        self._count += 1
        usage = "basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\n"
        self._sign(f"issuer-{self._count}", "root", usage)

    def issue(self, role: Role, name: str, out: Path) -> TlsFiles:
        """A certificate for a node, in place of the one that is there."""
        self._count += 1
        issuer = max(self._folder.glob("issuer-*.crt"), key=lambda path: int(path.stem.split("-")[1])).stem
        leaf = f"leaf-{self._count}"
        names = f"URI:spiffe://cortex/{role.value}/{name},DNS:{role.server_name},IP:127.0.0.1"
        usage = "basicConstraints=critical,CA:false\nextendedKeyUsage=serverAuth,clientAuth\n"
        self._sign(leaf, issuer, f"{usage}subjectAltName={names}\n")
        files = TlsFiles(out / "ca.pem", out / "tls.crt", out / "tls.key")
        out.mkdir(exist_ok=True)
        for path, parts in (
            (files.ca, ["root.crt"]),
            (files.key, [f"{leaf}.key"]),
            (files.certificate, [f"{leaf}.crt", f"{issuer}.crt"]),
        ):
            draft = path.with_suffix(".new")
            draft.write_text("".join((self._folder / part).read_text() for part in parts))
            draft.replace(path)
        return files

    def _sign(self, name: str, issuer: str, extensions: str) -> None:
        (self._folder / f"{name}.ext").write_text(extensions)
        self._run("req", "-new", "-nodes", *_key(name), *_subject(name), "-out", f"{name}.csr")
        signer = ("-CA", f"{issuer}.crt", "-CAkey", f"{issuer}.key", "-CAcreateserial", "-days", DAYS)
        self._run("x509", "-req", "-in", f"{name}.csr", *signer, "-extfile", f"{name}.ext", "-out", f"{name}.crt")

    def _run(self, *arguments: str) -> None:
        subprocess.run([str(OPENSSL), *arguments], cwd=self._folder, check=True, capture_output=True, timeout=60)


def _key(name: str) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-keyout", f"{name}.key")


def _subject(name: str) -> tuple[str, str]:
    return ("-subj", f"/O=Acme/CN={name}")


async def test_certificates_of_another_authority_are_taken_up_when_they_are_replaced(
    serve_example: ServeExample, tmp_path: Path
) -> None:
    acme = Openssl(tmp_path / "acme")
    server = acme.issue(Role.DISCOVERY, "d1", tmp_path / "d1")
    client = acme.issue(Role.WORKER, "w-12", tmp_path / "w1")
    async with (
        serve_example(tls=server) as served,
        open_channel(served.address, client, Role.DISCOVERY) as channel,
    ):
        shown = []
        for turn in range(3):
            assert await heartbeat(channel) == len("w-12")
            shown.append(await asyncio.to_thread(server_serial, served.running.port, client))
            assert shown[-1] == certificate_of(server).serial
            assert channel.serial == turn
            acme.renew_issuer()
            acme.issue(Role.DISCOVERY, "d1", tmp_path / "d1")
            acme.issue(Role.WORKER, "w-12", tmp_path / "w1")
            channel.refresh()
        assert len(set(shown)) == 3
