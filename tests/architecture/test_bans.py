"""What no code may do, and what only one module may do. Import contracts (.importlinter) hold the rest."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

from tests.architecture.sources import ROOT, calls, imports, sources

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.jit.load", "eval", "exec"}
CIPHERS = {
    "AESGCM",
    "AESGCMSIV",
    "ChaCha20Poly1305",
    "Cipher",
    "Suite",
    "Fernet",
    "AESCCM",
    "AESOCB3",
    "AESSIV",
    "aes_key_wrap",
}
# Whoever imports from these could make one under another name.
CIPHER_MODULES = (
    "cryptography.hazmat.primitives.ciphers",
    "cryptography.hazmat.primitives.hpke",
    "cryptography.hazmat.primitives.keywrap",
    "cryptography.hazmat.decrepit",
    "cryptography.fernet",
    "Crypto",
    "nacl",
)


def where(rule: Callable[[ast.Module], bool]) -> set[str]:
    """Files for which the rule holds."""
    return {path for path, tree in sources().items() if rule(tree)}


def test_there_is_code_to_check() -> None:
    assert len(sources()) > 150


def test_nothing_is_ever_unpickled() -> None:
    assert where(lambda tree: any(name.split(".")[0] in UNSAFE_MODULES for name in imports(tree))) == set()
    assert where(lambda tree: any(name in UNSAFE_CALLS for name in calls(tree))) == set()


def test_arrays_are_read_without_pickle() -> None:
    def reads_arrays_loosely(tree: ast.Module) -> bool:
        loads = [
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in ("np.load", "numpy.load")
        ]
        return any(
            not any(word.arg == "allow_pickle" and ast.unparse(word.value) == "False" for word in load.keywords)
            for load in loads
        )

    assert where(reads_arrays_loosely) == set()


def makes_ciphers(tree: ast.Module) -> bool:
    """Whether it calls one by its name, or imports one by whatever name."""
    named = {name.rsplit(".", 1)[-1] for name in (*calls(tree), *imports(tree))}
    return bool(named & CIPHERS) or any(name.startswith(CIPHER_MODULES) for name in imports(tree))


def test_ciphers_are_made_in_one_module() -> None:
    assert where(makes_ciphers) == {"libs/cortex_common/security/encryption.py"}


@pytest.mark.parametrize(
    "code",
    [
        "from cryptography.hazmat.primitives.ciphers.aead import AESGCM as Seal\nSeal(key)",
        "from cryptography.hazmat.primitives.ciphers import aead\ngetattr(aead, name)(key)",
        "import cryptography.hazmat.primitives.hpke as wrapping",
        "from cryptography.hazmat.primitives import ciphers",
        "from cryptography.hazmat.decrepit.ciphers.algorithms import ARC4",
        "from cryptography.fernet import Fernet",
        "from Crypto.Cipher import AES",
        "aead.ChaCha20Poly1305(key)",
    ],
)
def test_a_cipher_under_another_name_is_seen(code: str) -> None:
    assert makes_ciphers(ast.parse(code))


def test_one_module_catches_everything() -> None:
    def catches_everything(tree: ast.Module) -> bool:
        handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
        return any(node.type is None or "Exception" in ast.unparse(node.type).split(".") for node in handlers)

    assert where(catches_everything) <= {"libs/cortex_common/rpc/interceptor.py"}


def test_who_catches_even_interrupts_raises_them_again() -> None:
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node.type and ast.unparse(node.type) == "BaseException":
                assert any(isinstance(line, ast.Raise) and line.exc is None for line in node.body), path


def test_the_wall_clock_is_read_in_few_places() -> None:
    readers = where(lambda tree: any(name.endswith((".now", ".utcnow", ".today")) for name in calls(tree)))
    # Certificates are issued by people's commands, at the time it is.
    assert readers <= {"libs/cortex_common/clock.py", "libs/cortex_common/security/authority.py"}


def test_nothing_waits_on_the_event_loop_but_by_the_clock() -> None:
    sleepers = where(lambda tree: any(name in ("asyncio.sleep", "time.sleep", "sleep") for name in calls(tree)))
    assert sleepers <= {"libs/cortex_common/clock.py"}


@pytest.mark.parametrize("banned", ["mock.patch", "MagicMock", "monkeypatch.setattr(time", "time.sleep("])
def test_tests_use_fakes_and_conditions(banned: str) -> None:
    users = [
        path for path in (ROOT / "tests").rglob("*.py") if banned in path.read_text() and path.name != "test_bans.py"
    ]
    assert users == []
