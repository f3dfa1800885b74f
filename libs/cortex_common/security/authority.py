"""The network's certificate authority: roots and the issuing authorities below them, which replace themselves."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from cortex_common.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, PreconditionError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.security.certificates import fingerprint_of, read_file, write_tls
from cortex_common.security.issuing import (
    CLOCK_SKEW,
    Key,
    authority_certificate,
    leaf_certificate,
    load_key,
    make_request,
    new_authority_key,
    private_pem,
    public_pem,
    requested_key,
    write_files,
)

LEAF_LIFE = dt.timedelta(hours=24)
ISSUING_LIFE = dt.timedelta(days=90)
ROOT_LIFE = dt.timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Lives:
    """How long certificates hold. Issuing authorities and roots are replaced at half of their lives.

    Raises:
        InvalidArgumentError: a leaf could outlive the second half of an authority's life.
    """

    leaf: dt.timedelta = LEAF_LIFE
    issuing: dt.timedelta = ISSUING_LIFE
    root: dt.timedelta = ROOT_LIFE

    def __post_init__(self) -> None:
        """Refuse lives under which a certificate in use would have an authority that has ended."""
        if not dt.timedelta(0) < 2 * self.leaf <= self.issuing <= self.root:
            raise InvalidArgumentError(
                f"certificate lives {self.leaf}, {self.issuing}, {self.root} given; "
                "allowed: twice the leaf's up to the issuing authority's, and that up to the root's"
            )


@dataclass(frozen=True, slots=True)
class _Pair:
    """One generation of a root or an issuing authority: `<kind>-<number>.crt` and `.key`."""

    certificate: Path

    @property
    def key(self) -> Path:
        return self.certificate.with_suffix(".key")

    @property
    def number(self) -> int:
        return int(self.certificate.stem.rpartition("-")[2])

    def load(self) -> x509.Certificate:
        """Its certificate.

        Raises:
            InvalidArgumentError: the file holds none.
        """
        pem = read_file(self.certificate, "authority certificate")
        try:
            return x509.load_pem_x509_certificate(pem)
        except ValueError as error:
            raise InvalidArgumentError(f"{self.certificate} is not a certificate: {error}") from error

    def signer(self) -> tuple[x509.Certificate, Key]:
        """Certificate and key; both are needed to sign."""
        return self.load(), load_key(read_file(self.key, "authority key"), str(self.key))


@dataclass(frozen=True, slots=True)
class Authority:
    """The network's certificate authority, kept in a directory: roots, and the issuing authority that signs for nodes.

    `ca.pem` holds every root that is still good, to hand out; the keys (0600) are to be guarded. Nodes show their leaf,
    the issuing authority, and for a root that is new its cross-signature by the one before, so that whoever knows only
    the older root trusts them too.
    """

    network: str
    directory: Path

    @property
    def ca(self) -> Path:
        """The roots every node trusts."""
        return self.directory / "ca.pem"

    @property
    def key(self) -> Path:
        """Private key of the newest root, mode 0600. May be kept elsewhere: then nobody but its keeper can rotate."""
        return self._newest("root").key

    @property
    def bundle(self) -> bytes:
        """The roots every node trusts, as PEM."""
        return read_file(self.ca, "authority certificate")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the newest root's certificate."""
        return fingerprint_of(self._newest("root").load())

    @property
    def every_root(self) -> bytes:
        """The roots every node trusts, and those that have ended: what was signed in their time is checked by them."""
        return self.bundle + b"".join(path.read_bytes() for path in sorted(self.directory.glob("ended-[0-9]*.crt")))

    @classmethod
    def create(cls, network: str, directory: Path, lives: Lives | None = None) -> Authority:
        """Make a new authority for `network` in `directory`.

        Raises:
            AlreadyExistsError: there is one already.
            InvalidArgumentError: the network's name is not allowed.
        """
        Identity(network, Role.OPERATOR, NodeName("authority"))  # refuses a bad network name
        authority = cls(network, directory)
        if authority.ca.exists() or authority._generations("root"):
            raise AlreadyExistsError(f"{directory} already holds a certificate authority")
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority.rotate(lives or Lives())
        return authority

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """The authority kept in `directory`.

        Raises:
            NotFoundError: there is none.
            InvalidArgumentError: `ca.pem` is no Cortex authority.
        """
        pem = read_file(directory / "ca.pem", "authority certificate")
        try:
            names = x509.load_pem_x509_certificate(pem).subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        except ValueError as error:
            raise InvalidArgumentError(f"{directory / 'ca.pem'} is not a certificate: {error}") from error
        if len(names) != 1:
            raise InvalidArgumentError(f"{directory / 'ca.pem'} is not a Cortex authority: it names no network")
        return cls(str(names[0].value), directory)

    @classmethod
    def open(cls, network: str, directory: Path, lives: Lives | None = None) -> Authority:
        """The authority in `directory`, made if there is none, brought to today's form if it is older.

        While the root's key is kept elsewhere nothing is replaced: what is due goes on until it ends.

        Raises:
            PreconditionError: it is another network's, or nothing can be signed without the root's key.
        """
        authority = cls(network, directory)
        legacy = directory / "ca.key"
        if authority.ca.exists() and cls.load(directory).network != network:
            raise PreconditionError(f"{directory} holds the authority of network {cls.load(directory).network!r}")
        if legacy.exists() and authority.ca.exists() and not authority._generations("root"):
            # One self-signed authority, as first versions made it: it stays trusted, and signs nothing more.
            write_files([(directory / "root-0000.crt", authority.bundle, 0o644)])
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            authority.rotate(lives or Lives())
        except PreconditionError:
            if not authority._can_sign(_now()):
                raise
        legacy.unlink(missing_ok=True)
        return authority

    def issue(self, identity: Identity, hosts: Sequence[str], out: Path, life: dt.timedelta = LEAF_LIFE) -> TlsFiles:
        """Write a key and a certificate for `identity` into the folder `out`, next to a copy of the roots.

        Args:
            identity: Whose certificate; its network must be the authority's.
            hosts: DNS names and IP addresses the node's server may be reached at.
            out: Folder for `ca.pem`, `tls.crt`, `tls.key`; files there are replaced.
            life: From now until it expires; the start is set 5 minutes back for slow clocks.

        Raises:
            InvalidArgumentError: the identity belongs to another network.
        """
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        files = TlsFiles(out / "ca.pem", out / "tls.crt", out / "tls.key")
        self.issue_into(files, identity, hosts, life)
        return files

    def issue_into(self, files: TlsFiles, identity: Identity, hosts: Sequence[str], life: dt.timedelta) -> None:
        """`issue`, into files of any name."""
        key, request = make_request(identity.name)
        write_tls(files, self.bundle, self.sign(request, identity, hosts, life), key)

    def sign(self, request: bytes, identity: Identity, hosts: Sequence[str], life: dt.timedelta = LEAF_LIFE) -> bytes:
        """A certificate for the key in a request, with the authorities up to a root, as PEM.

        Args:
            request: PKCS #10, PEM; only its key counts.
            identity: Whose certificate; the caller has made sure that the sender is it.
            hosts: DNS names and IP addresses the node's server may be reached at.
            life: From now until it expires.

        Raises:
            InvalidArgumentError: the identity belongs to another network; request or hosts are not allowed.
        """
        if identity.network != self.network:
            raise InvalidArgumentError(f"{identity.uri} is not in this authority's network {self.network!r}")
        issuing = self._newest("issuing")
        leaf = leaf_certificate(identity, hosts, requested_key(request), issuing.signer(), life, _now())
        return public_pem(leaf) + b"".join(path.read_bytes() for path in self._above(issuing))

    def rotate(self, lives: Lives, now: dt.datetime | None = None, *, force: str = "") -> tuple[str, ...]:
        """Make what is missing or in the second half of its life anew, and forget what has ended.

        Every step may be the last before a crash: a key without certificate is passed over, and made again.

        Args:
            lives: Of what is made.
            now: The time; now by default.
            force: `root` or `issuing` (the root's rotation includes the issuing authority's): whatever its age.

        Returns:
            What was made: `root`, `issuing`.

        Raises:
            PreconditionError: the root's key is not here, and it is time to use it.
        """
        now, made = now or _now(), []
        root = self._newest_or_none("root")
        if root is None or not root.number or force == "root" or _is_due(root.load(), now):
            root = self._new_root(root, lives, now)
            made.append("root")
        issuing = self._newest_or_none("issuing")
        if issuing is None or made or force or _is_due(issuing.load(), now) or not self._is_by(issuing, root):
            self._new_issuing(issuing, root, lives, now)
            made.append("issuing")
        self._forget(now)
        roots = [pair for pair in self._generations("root") if pair.load().not_valid_after_utc > now]
        newest_first = sorted(roots, key=lambda pair: -pair.number)
        bundle = b"".join(pair.certificate.read_bytes() for pair in newest_first)
        # Compared: whoever made the roots may have been killed before this file was written.
        if bundle and (not self.ca.exists() or self.bundle != bundle):
            write_files([(self.ca, bundle, 0o644)])
        return tuple(made)

    def next_rotation(self) -> dt.datetime:
        """When `rotate` will have something to do."""
        return min(_middle(self._newest(kind).load()) for kind in ("root", "issuing"))

    def _can_sign(self, now: dt.datetime) -> bool:
        """Whether there is an issuing authority that has not ended, and its key."""
        issuing = self._newest_or_none("issuing")
        return issuing is not None and issuing.key.exists() and issuing.load().not_valid_after_utc > now

    def _new_root(self, before: _Pair | None, lives: Lives, now: dt.datetime) -> _Pair:
        key, made = new_authority_key(), _Pair(self.directory / f"root-{(before.number if before else 0) + 1:04}.crt")
        certificate = authority_certificate(self.network, "root", key, None, now + lives.root, now)
        files = [(made.key, private_pem(key), 0o600)]
        if before is not None and before.number:
            cross = authority_certificate(self.network, "root", key, self._root_signer(before), now + lives.root, now)
            files.append((self._cross(made.number), public_pem(cross), 0o644))
        write_files([*files, (made.certificate, public_pem(certificate), 0o644)])
        if before is not None:
            before.key.unlink(missing_ok=True)
        return made

    def _new_issuing(self, before: _Pair | None, root: _Pair, lives: Lives, now: dt.datetime) -> None:
        number = (before.number if before else 0) + 1
        key, made = new_authority_key(), _Pair(self.directory / f"issuing-{number:04}.crt")
        signer = self._root_signer(root)
        certificate = authority_certificate(self.network, "issuing", key, signer, now + lives.issuing, now)
        write_files([(made.key, private_pem(key), 0o600), (made.certificate, public_pem(certificate), 0o644)])
        if before is not None:
            before.key.unlink(missing_ok=True)

    def _root_signer(self, root: _Pair) -> tuple[x509.Certificate, Key]:
        if not root.key.exists():
            raise PreconditionError(
                f"{root.key} is not here: put it there for the time of `cortex node rotate`, which needs it"
            )
        return root.signer()

    def _above(self, issuing: _Pair) -> list[Path]:
        """Files of the authorities a node shows beside its leaf."""
        cross = self._cross(self._newest("root").number)
        return [issuing.certificate, *([cross] if cross.exists() else [])]

    def _is_by(self, issuing: _Pair, root: _Pair) -> bool:
        return issuing.load().issuer == root.load().subject

    def _forget(self, now: dt.datetime) -> None:
        """Remove what has ended but for the newest. Of a root the certificate is kept."""
        ended = [
            pair
            for kind in ("root", "issuing")
            for pair in self._generations(kind)[:-1]
            if pair.load().not_valid_after_utc <= now
        ]
        for pair in ended:
            pair.key.unlink(missing_ok=True)
            if not pair.certificate.name.startswith("root-"):
                pair.certificate.unlink(missing_ok=True)
                continue
            # The root after it is vouched for by one that has ended.
            self._cross(pair.number + 1).unlink(missing_ok=True)
            pair.certificate.rename(self.directory / f"ended-{pair.number:04}.crt")

    def _cross(self, number: int) -> Path:
        """The cross-signature of root `number` by the one before it."""
        return self.directory / f"cross-{number:04}.crt"

    def _generations(self, kind: str) -> list[_Pair]:
        return [_Pair(path) for path in sorted(self.directory.glob(f"{kind}-[0-9]*.crt"))]

    def _newest_or_none(self, kind: str) -> _Pair | None:
        pairs = self._generations(kind)
        return pairs[-1] if pairs else None

    def _newest(self, kind: str) -> _Pair:
        pair = self._newest_or_none(kind)
        if pair is None:
            raise NotFoundError(f"no {kind} authority in {self.directory}")
        return pair


def _is_due(certificate: x509.Certificate, now: dt.datetime) -> bool:
    return now >= _middle(certificate)


def _middle(certificate: x509.Certificate) -> dt.datetime:
    """Half of a life, which began a skew later than the certificate says."""
    begins = certificate.not_valid_before_utc + CLOCK_SKEW
    return begins + (certificate.not_valid_after_utc - begins) / 2


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
