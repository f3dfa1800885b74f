"""Settings of the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from cortex_common.job.parse import MAX_JOB_BYTES
from cortex_common.settings import ServiceSettings
from services.coordinator.domain.seen import Rules


class CoordinatorSettings(ServiceSettings):
    """What the coordinator needs to know, read once at start.

    Attributes:
        database: An SQLAlchemy URL, `postgresql://…` for one; SQLite in `state_dir` by default.
        database_password_file: Holds the database's password, which then is not in the URL.
        data_key_age_s: A job's data key is replaced, between two rounds, when it is so old …
        data_key_rounds: … or was used for so many rounds; also when whoever was given it leaves the job.
        keyring: File of the key-encryption keys; made if there is none. `keyring.json` in `state_dir` by default; on
            another disk than the database it protects what a stolen or backed-up disk holds.
        pkcs11_module: Library of a hardware module that holds the key-encryption keys instead; with `pkcs11_token`, the
            label of a token in it, and `pkcs11_pin_file`, which holds its PIN.
        kek_age_s: The key-encryption key is replaced when it is so old.
    """

    # A job file, and a little more.
    MAX_MESSAGE_BYTES: ClassVar[int] = MAX_JOB_BYTES + 64 * 1024

    port: int = Field(default=50051, ge=0, le=65535)
    discovery: str = "127.0.0.1:50052"
    database: str | None = None
    database_password_file: Path | None = None
    keyring: Path | None = None
    pkcs11_module: Path | None = None
    pkcs11_token: str | None = None
    pkcs11_pin_file: Path | None = None
    kek_age_s: float = Field(default=90 * 86400.0, gt=0)
    lease_s: float = Field(default=10.0, gt=0)
    gather_s: float = Field(default=5.0, ge=0)
    report_s: float = Field(default=2.0, ge=0)
    attempts: int = Field(default=3, ge=1)
    tries: int = Field(default=3, ge=1)
    data_key_age_s: float = Field(default=86400.0, gt=0)
    data_key_rounds: int = Field(default=1000, ge=1)

    @model_validator(mode="after")
    def _one_keyring(self) -> Self:
        given = [self.pkcs11_module, self.pkcs11_token, self.pkcs11_pin_file]
        if any(each is not None for each in given):
            if self.keyring is not None:
                raise ValueError("keyring and pkcs11_module are both given; allowed: one of them")
            if any(each is None for each in given):
                raise ValueError("pkcs11_module, pkcs11_token and pkcs11_pin_file go together; allowed: all or none")
        return self

    @property
    def rules(self) -> Rules:
        """The limits that are the coordinator's, not the job's."""
        keys = (self.data_key_age_s, self.data_key_rounds)
        return Rules(self.lease_s, self.gather_s, self.report_s, self.attempts, self.tries, *keys)
