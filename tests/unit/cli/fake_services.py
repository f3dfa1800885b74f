"""Services for supervisor tests: they answer health checks and nothing else, and misbehave on request."""

from __future__ import annotations

from pathlib import Path

# What a file `behave` in the state folder makes of a service: die | hang (ignores SIGTERM) | unready.
SOURCE = """
import ctypes, http.server, json, os, pathlib, signal, sys, threading
import yaml


def let_the_operator_in(authority):
    from cortex_common.identity import Identity, Role
    from cortex_common.security.authority import Authority
    from cortex_common.security.joining import JoinToken

    operator_token = authority.parent / "config" / "operator.join"
    if not operator_token.exists():
        return
    token = JoinToken.decode(operator_token.read_text())
    folder = authority.parent / "certificates" / "operator"
    Authority.load(authority).issue(Identity("cortex", Role.OPERATOR, "operator"), [], folder)
    (folder / "enrolment.json").write_text(json.dumps({"token_id": token.token_id}))


def main(config):
    settings = yaml.safe_load(config.read_text())
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
    file = pathlib.Path(settings["state_dir"]) / "behave"
    behaviour = file.read_text() if file.exists() else ""
    if behaviour == "die":
        print("cannot go on: the disk is on fire", flush=True)
        return 3
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "hang" else signal.SIG_DFL)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            good = behaviour != "unready" or self.path != "/readyz"
            self.send_response(200 if good else 503)
            self.end_headers()
            self.wfile.write(b"ok" if good else b"no coordinator")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", settings["metrics_port"]), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if "authority" in settings:
        let_the_operator_in(pathlib.Path(settings["authority"]))
    path = pathlib.Path(settings["ready_file"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"pid": os.getpid(), "metrics_port": settings["metrics_port"]}))
    threading.Event().wait()
"""


def install(folder: Path) -> Path:
    """Write the fake services into a folder; a process started there finds them before the real ones."""
    for service in ("discovery", "coordinator", "aggregator", "gateway", "worker"):
        package = folder / "services" / service
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "main.py").write_text(SOURCE)
    (folder / "services" / "__init__.py").touch()
    return folder
