"""Where everything of a local network lies in its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cortex_common.identity import TlsFiles

DEFAULT_DIR = Path(".cortex")


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below the directory of a local network."""

    root: Path

    @classmethod
    def of(cls, directory: Path) -> Layout:
        """The layout of a directory, as an absolute path: services may run elsewhere."""
        return cls(directory.expanduser().absolute())

    @property
    def network_file(self) -> Path:
        """Members, their ports, and where the operator's certificate is."""
        return self.root / "network.json"

    @property
    def authority(self) -> Path:
        """The certificate authority of the network."""
        return self.root / "authority"

    @property
    def certificates(self) -> Path:
        """One folder a member, and one for the operator."""
        return self.root / "certificates"

    @property
    def token_file(self) -> Path:
        """The API token printed by `cortex up`, mode 0600."""
        return self.root / "token"

    @property
    def tokens_file(self) -> Path:
        """The hashed API tokens the gateway accepts."""
        return self.root / "tokens.json"

    @property
    def run(self) -> Path:
        """State of the running processes; meaningless when none runs."""
        return self.root / "run"

    @property
    def supervisor_file(self) -> Path:
        """Process ids and restarts, written by the supervisor."""
        return self.run / "supervisor.json"

    @property
    def lock_file(self) -> Path:
        """Locked while a supervisor runs."""
        return self.root / "lock"

    @property
    def supervisor_log(self) -> Path:
        """What a detached supervisor had to say."""
        return self.logs / "supervisor.log"

    @property
    def logs(self) -> Path:
        """One log file a process."""
        return self.root / "logs"

    @property
    def tensorboard(self) -> Path:
        """Scalars of every job."""
        return self.state("coordinator") / "tensorboard"

    @property
    def join_tokens_file(self) -> Path:
        """Hashes of the join tokens that `cortex up` made, for discovery to take up."""
        return self.root / "config" / "join-tokens.json"

    def join_token(self, name: str) -> Path:
        """The join token a member is to enrol with, mode 0600; there is none once it has no need of one."""
        return self.root / "config" / f"{name}.join"

    def tls(self, name: str) -> TlsFiles:
        """Certificate, key and roots of a member, or of the operator."""
        folder = self.certificates / name
        return TlsFiles(folder / "ca.pem", folder / "tls.crt", folder / "tls.key")

    def config(self, name: str) -> Path:
        """The configuration of a member."""
        return self.root / "config" / f"{name}.yaml"

    def state(self, name: str) -> Path:
        """What a member keeps across restarts."""
        return self.root / "state" / name

    def ready(self, name: str) -> Path:
        """Written by the member once it serves."""
        return self.run / f"{name}.json"

    def log(self, name: str) -> Path:
        """Output of the member's process."""
        return self.logs / f"{name}.log"
