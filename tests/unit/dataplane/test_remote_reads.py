"""What an object store's broken connection is called."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cortex_common.errors import UnavailableError
from cortex_common.storage.remote import S3Access, S3BlobStore


class _BreaksOff(BaseHTTPRequestHandler):
    """Promises a hundred bytes and sends ten."""

    def do_HEAD(self) -> None:
        self._begin(200)

    def do_GET(self) -> None:
        self._begin(206)
        self.wfile.write(bytes(10))

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _begin(self, status: int) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", "100"), ("ETag", '"one"'), ("Content-Type", "application/x")):
            self.send_header(name, value)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()


def test_a_connection_that_breaks_off_within_an_object_is_told_as_unavailable(tmp_path: Path) -> None:
    for name in ("key", "secret"):
        (tmp_path / name).write_text(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), _BreaksOff) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            access = S3Access(address, "us-east-1", tmp_path / "key", tmp_path / "secret")
            with S3BlobStore("s3://tests/x", access).open("a") as reader:
                assert reader.size == 100
                with pytest.raises(UnavailableError, match="does not answer"):
                    reader.read_at(0, 100)
        finally:
            server.shutdown()
            serving.join()
