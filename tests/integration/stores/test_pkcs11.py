"""Key-encryption keys in a real PKCS#11 module: SoftHSM, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from cortex_common.clock import SystemClock
from cortex_common.errors import NotFoundError, PreconditionError, UnavailableError
from cortex_common.identity import Role
from cortex_common.job.status import JobPhase
from cortex_common.pb.v1 import coordinator_pb2, coordinator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.security.pkcs11_keyring import Pkcs11Keyring
from tests.conformance.key_encryption import SECRET, KeyEncryptionConformance
from tests.fakes import ManualClock
from tests.integration.coordinator.harness import ScriptedWorker, hold_at, let_go, site, working
from tests.integration.coordinator.test_jobs import announce, job, submit, until
from tests.integration.coordinator.test_keys import epochs_of, until_epochs

PIN = "4711"
LIBRARIES = [
    Path(folder) / "softhsm/libsofthsm2.so" for folder in ("/usr/lib", "/usr/lib/x86_64-linux-gnu", "/usr/local/lib")
]
LIBRARY = next((path for path in LIBRARIES if path.exists()), None)

if LIBRARY is None or shutil.which("softhsm2-util") is None:
    warnings.warn("PKCS#11 is NOT TESTED here: SoftHSM is missing (Debian: apt-get install softhsm2)", stacklevel=1)
    pytest.skip("SoftHSM is not installed (Debian: apt-get install softhsm2)", allow_module_level=True)
pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")


def new_token(label: str) -> None:
    made = subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "0815"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    """SoftHSM reads its configuration once a process: every test has a token of its own in one folder."""
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    configuration = folder / "softhsm2.conf"
    configuration.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    (folder / "pin").write_text(PIN + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(configuration))
        yield folder


@pytest.fixture
def token(module_folder, request):
    label = f"t{abs(hash(request.node.nodeid)) % 10**12}"
    new_token(label)
    # The module finds new tokens when it is initialised.
    from pkcs11 import lib

    lib(str(LIBRARY)).reinitialize()
    return label


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def ring(token, module_folder, clock):
    return Pkcs11Keyring(LIBRARY, token, module_folder / "pin", clock)


@pytest.fixture
def again(ring, token, module_folder, clock):
    """Another session; a login is the whole process's: see the test with a process of its own."""
    return lambda: Pkcs11Keyring(LIBRARY, token, module_folder / "pin", clock)


class TestPkcs11Keyring(KeyEncryptionConformance):
    pass


def test_the_keys_cannot_be_taken_out(ring: Pkcs11Keyring) -> None:
    import pkcs11

    current = ring.current
    key = ring._call(lambda session: ring._key(session, current))
    with pytest.raises(pkcs11.exceptions.AttributeSensitive):
        key[pkcs11.Attribute.VALUE]
    assert key[pkcs11.Attribute.EXTRACTABLE] is False
    assert key[pkcs11.Attribute.NEVER_EXTRACTABLE] is True


def test_another_process_opens_what_this_one_wrapped(ring: Pkcs11Keyring, token: str, module_folder: Path) -> None:
    resting = ring.wrap(SECRET, b"c")
    program = (
        "import sys; from pathlib import Path; from cortex_common.clock import SystemClock\n"
        "from cortex_common.security.keyring import RestingKey\n"
        "from cortex_common.security.pkcs11_keyring import Pkcs11Keyring\n"
        "library, token, pin, kek_id, wrapped = sys.argv[1:]\n"
        "ring = Pkcs11Keyring(Path(library), token, Path(pin), SystemClock())\n"
        "print(ring.unwrap(RestingKey(kek_id, bytes.fromhex(wrapped)), b'c').hex(), ring.current)"
    )
    arguments = [str(LIBRARY), token, str(module_folder / "pin"), resting.kek_id, resting.wrapped.hex()]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [SECRET.hex(), ring.current], done.stderr


# The search that was under way cannot end in a session that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_session_that_broke_is_opened_anew(ring: Pkcs11Keyring) -> None:
    resting = ring.wrap(SECRET, b"c")
    ring._session.close()
    with pytest.raises(Exception, match="does not answer"):
        ring.unwrap(resting, b"c")
    assert ring.unwrap(resting, b"c") == SECRET


def pull_out(ring: Pkcs11Keyring) -> None:
    """Let the module be gone: its session breaks, and its library is not where it was."""
    ring._module = ring._module / "gone"
    ring._session.close()


def plug_in(ring: Pkcs11Keyring) -> None:
    ring._module = ring._module.parent


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_module_that_was_here_is_away_and_not_missing_until_it_is_back(ring: Pkcs11Keyring) -> None:
    resting = ring.wrap(SECRET, b"c")
    pull_out(ring)
    for told in ("does not answer", "is not there", "is not there"):
        with pytest.raises(UnavailableError, match=told):
            ring.unwrap(resting, b"c")
    plug_in(ring)
    assert ring.unwrap(resting, b"c") == SECRET


def test_a_pin_that_is_refused_is_not_tried_until_the_token_locks_itself(ring: Pkcs11Keyring) -> None:
    ring._session.close()
    ring._session, ring._pin = None, "9999"
    with pytest.raises(UnavailableError, match="refuses the PIN"):
        ring.wrap(SECRET, b"c")
    ring._pin = PIN
    with pytest.raises(UnavailableError, match="not tried again"):
        ring.wrap(SECRET, b"c")


def test_what_is_wrong_is_said(token: str, module_folder: Path, tmp_path: Path) -> None:
    clock, pin = SystemClock(), module_folder / "pin"
    with pytest.raises(NotFoundError, match="nobody"):
        Pkcs11Keyring(LIBRARY, "nobody", pin, clock)
    with pytest.raises(NotFoundError, match="pkcs11_module"):
        Pkcs11Keyring(tmp_path / "none.so", token, pin, clock)
    with pytest.raises(NotFoundError, match="pkcs11_pin_file"):
        Pkcs11Keyring(LIBRARY, token, tmp_path / "none", clock)
    (tmp_path / "wrong").write_text("9999")
    with pytest.raises(PreconditionError, match="refuses the PIN"):
        Pkcs11Keyring(LIBRARY, token, tmp_path / "wrong", clock)


async def test_a_job_runs_under_keys_of_the_module_through_a_rotation_and_a_restart(
    token: str, module_folder: Path, tls_of: Any, tmp_path: Path
) -> None:
    async with site(tls_of, tmp_path) as cortex:
        cortex.coordinator_settings = {
            "pkcs11_module": LIBRARY,
            "pkcs11_token": token,
            "pkcs11_pin_file": module_folder / "pin",
        }
        await cortex.stop("coordinator")
        (tmp_path / "coordinator" / "keyring.json").unlink()
        await cortex.start("coordinator")
        await announce(cortex, "w1", "w2")
        workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
        async with working(*workers):
            async with cortex.jobs() as stub:
                hold_at(1, *workers)
                job_id = await submit(stub, job(training={"rounds": 6}))
                await until(stub, job_id, JobPhase.TRAINING, round_number=1)
            operator = cortex.tls_of(Role.OPERATOR, "ann")
            async with open_channel(cortex.coordinator, operator, Role.COORDINATOR) as channel:
                keys = coordinator_pb2_grpc.KeyServiceStub(channel)
                made = await keys.RotateKeyEncryptionKey(coordinator_pb2.RotateKeyEncryptionKeyRequest())
            await cortex.stop("coordinator")
            await cortex.start("coordinator")
            let_go(*workers)
            async with cortex.jobs() as stub:
                status = await until(stub, job_id, JobPhase.COMPLETED)
        assert [(report.attempt, report.accepted) for report in status.history] == [(1, 2)] * 6
        assert Pkcs11Keyring(LIBRARY, token, module_folder / "pin", SystemClock()).ids == (made.kek_id,)
        assert not (tmp_path / "coordinator" / "keyring.json").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_rounds_begin_while_the_module_is_away_and_get_a_new_key_when_it_is_back(
    token: str, module_folder: Path, tls_of: Any, tmp_path: Path
) -> None:
    async with site(tls_of, tmp_path) as cortex:
        cortex.coordinator_settings = {
            "pkcs11_module": LIBRARY,
            "pkcs11_token": token,
            "pkcs11_pin_file": module_folder / "pin",
            "data_key_rounds": 2,
        }
        await cortex.stop("coordinator")
        await cortex.start("coordinator")
        await announce(cortex, "w1", "w2")
        workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
        async with working(*workers), cortex.jobs() as stub:
            hold_at(1, *workers)
            job_id = await submit(stub, job(training={"rounds": 400}))
            await until(stub, job_id, JobPhase.TRAINING, round_number=1)
            ring = cortex.running.coordinator._keys._keyring
            pull_out(ring)
            let_go(*workers)
            await until(stub, job_id, JobPhase.TRAINING, round_number=8)
            assert len(await epochs_of(cortex, job_id)) == 1
            plug_in(ring)
            await until_epochs(cortex, job_id, 3)
            await stub.CancelJob(coordinator_pb2.CancelJobRequest(job_id=job_id))
            status = await until(stub, job_id, JobPhase.CANCELLED)
    assert all((report.attempt, report.accepted) == (1, 2) for report in status.history)
