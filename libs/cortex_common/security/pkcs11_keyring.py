"""Key-encryption keys in a hardware module, through PKCS#11: they are made there, and never leave it.

Any module will do that has AES-GCM (CKM_AES_GCM); SoftHSM is one in software. Secrets are sent to the module to be
wrapped and opened; so a copy of the database and of every disk of the coordinator opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, NotFoundError, PreconditionError, UnavailableError
from cortex_common.security.keyring import KEK_PREFIX, RestingKey, new_kek_id

_Result = TypeVar("_Result")
_NONCE_BYTES = 12
_TAG_BITS = 128


class Pkcs11Keyring:
    """Implements KeyEncryption over one token of a PKCS#11 module; makes a first key where there is none.

    A module that has answered once and does not any more is away: UnavailableError, until it does again.

    Keys are AES-256 secret keys with labels `kek-…`, sensitive and not extractable. The newest label is the current
    one.
    """

    def __init__(self, module: Path, token: str, pin_file: Path, clock: Clock) -> None:
        """Log in.

        Args:
            module: The library that the module's maker ships.
            token: Label of the token in it.
            pin_file: Holds the user PIN.
            clock: Dates new keys.

        Raises:
            NotFoundError: no such library, token or file.
            PreconditionError: `python-pkcs11` is not installed, or the PIN is refused.
            UnavailableError: the module does not answer.
        """
        self._module = module
        self._clock = clock
        self._token = token
        self._pin = _pin_of(pin_file)
        self._pkcs11 = _library_of_pkcs11()
        self._lock = Lock()
        self._session: Any = None
        self._was_open = False
        self._refusal = ""
        if not self.ids:
            self.rotate()

    @property
    def ids(self) -> tuple[str, ...]:
        """Every key there is, oldest first."""
        return self._call(lambda session: tuple(sorted(str(key.label) for key in self._keys(session))))

    @property
    def current(self) -> str:
        """Id of the key that wraps from now on."""
        return self.ids[-1]

    def rotate(self) -> str:
        """Make another key, the current one from now on."""

        def make(session: Any) -> str:
            attribute, others = self._pkcs11.Attribute, [str(key.label) for key in self._keys(session)]
            label = new_kek_id(self._clock.wall_s(), others)
            kept = {attribute.SENSITIVE: True, attribute.EXTRACTABLE: False}
            session.generate_key(self._pkcs11.KeyType.AES, 256, label=label, store=True, template=kept)
            return label

        return self._call(make)

    def erase(self, kek_id: str) -> None:
        """Destroy a key that is not the current one; what is still wrapped under it is lost."""
        if kek_id == self.current:
            raise PreconditionError(f"key-encryption key {kek_id} is in use; rotate first")
        self._call(lambda session: self._key(session, kek_id).destroy())

    def wrap(self, secret: bytes, context: bytes) -> RestingKey:
        """Wrap under the current key."""
        current = self.current

        def encrypt(session: Any) -> bytes:
            nonce = session.generate_random(8 * _NONCE_BYTES)
            return bytes(nonce) + bytes(self._key(session, current).encrypt(secret, **self._gcm(nonce, context)))

        return RestingKey(current, self._call(encrypt))

    def unwrap(self, resting: RestingKey, context: bytes) -> bytes:
        """Open what any key of these has wrapped.

        Raises:
            NotFoundError: the key that it names is not here.
            CorruptError: changed, or of another context.
            UnavailableError: the module does not answer.
        """
        nonce, sealed = resting.wrapped[:_NONCE_BYTES], resting.wrapped[_NONCE_BYTES:]

        def decrypt(session: Any) -> bytes | None:
            key = self._key(session, resting.kek_id)
            try:
                return bytes(key.decrypt(sealed, **self._gcm(nonce, context)))
            except self._pkcs11.exceptions.PKCS11Error:
                # Modules report a wrong tag in many ways, as a general error too: one that still works means the data.
                session.generate_random(8)
                return None

        opened = self._call(decrypt)
        if opened is None:
            raise CorruptError("a wrapped key does not open: changed, under another key or of another context")
        return opened

    def _gcm(self, nonce: bytes, context: bytes) -> dict[str, Any]:
        parameters = self._pkcs11.GCMParams(nonce, context, _TAG_BITS)
        return {"mechanism": self._pkcs11.Mechanism.AES_GCM, "mechanism_param": parameters}

    def _keys(self, session: Any) -> list[Any]:
        wanted = {self._pkcs11.Attribute.CLASS: self._pkcs11.ObjectClass.SECRET_KEY}
        return [key for key in session.get_objects(wanted) if str(key.label).startswith(KEK_PREFIX)]

    def _key(self, session: Any, kek_id: str) -> Any:
        for key in self._keys(session):
            if key.label == kek_id:
                return key
        raise NotFoundError(f"key-encryption key {kek_id!r} is not in token {self._token!r}")

    def _call(self, work: Callable[[Any], _Result]) -> _Result:
        """Work in the session, one call at a time; a session that broke is opened anew for the next call."""
        with self._lock:
            try:
                if self._session is None:
                    self._session = self._opened_anew() if self._was_open else self._opened()
                    self._was_open = True
                return work(self._session)
            except self._pkcs11.exceptions.PKCS11Error as error:
                self._session = None
                raise UnavailableError(f"token {self._token!r} does not answer: {_words(error)}") from error

    def _opened_anew(self) -> Any:
        """A session in the place of one that broke. A module that was here once is away, and no mistake in settings."""
        try:
            return self._opened()
        except (NotFoundError, PreconditionError) as error:
            raise UnavailableError(error.message) from error

    def _opened(self) -> Any:
        if self._refusal:
            # Tokens lock themselves after a few wrong PINs.
            raise PreconditionError(f"{self._refusal}; not tried again before the next start")
        exceptions = self._pkcs11.exceptions
        if not self._module.exists():
            raise NotFoundError(f"pkcs11_module {self._module} is not there")
        library = self._pkcs11.lib(str(self._module))
        try:
            token = library.get_token(token_label=self._token)
        except exceptions.NoSuchToken:
            raise NotFoundError(f"pkcs11_token {self._token!r} is not in {self._module}") from None
        try:
            return token.open(user_pin=self._pin, rw=True)
        except exceptions.UserAlreadyLoggedIn:
            # A login is the whole process's: another session of it is still open.
            return token.open(rw=True)
        except (exceptions.PinIncorrect, exceptions.PinInvalid, exceptions.PinLenRange, exceptions.PinLocked) as error:
            self._refusal = f"token {self._token!r} refuses the PIN: {_words(error)}"
            raise PreconditionError(self._refusal) from None


def _library_of_pkcs11() -> Any:
    try:
        import pkcs11
    except ImportError:
        raise PreconditionError(
            "pkcs11_module is set, and python-pkcs11 is not installed: cortex-training[pkcs11]"
        ) from None
    return pkcs11


def _pin_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise NotFoundError(f"pkcs11_pin_file {path} cannot be read: {error.strerror or error}") from None


def _words(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
