"""The HTTP API as a person with curl uses it, and waiting for what it says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

DIGITS = Path(__file__).parents[1] / "jobs" / "digits.json"


def until(what: str, condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """What the condition gives, once that is true; connections may fail meanwhile."""
    end_s, last = time.monotonic() + timeout_s, "false"
    while time.monotonic() < end_s:
        try:
            if value := condition():
                return value
        except (httpx.HTTPError, AssertionError) as error:
            last = repr(error)
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {timeout_s:g} s; {last}")


def job(rounds: int, **changes: Any) -> dict[str, Any]:
    """The digits job with that many rounds that take a while, none of which closes without all four workers."""
    document: dict[str, Any] = json.loads(DIGITS.read_text())
    document["training"] |= {"rounds": rounds, "local_epochs": 8}
    document["placement"]["min_workers"] = 4
    document["aggregation"] |= changes
    return document


@dataclass(frozen=True)
class Api:
    """A gateway and a token for it."""

    url: str
    token: str

    def get(self, path: str) -> Any:
        """A document."""
        answer = httpx.get(f"{self.url}{path}", headers=self._headers, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def submit(self, document: dict[str, Any]) -> str:
        """The job's id."""
        answer = httpx.post(f"{self.url}/api/v1/jobs/submit", headers=self._headers, json=document, timeout=30)
        assert answer.status_code in (200, 201, 202), answer.text
        return str(answer.json()["job_id"])

    def status(self, job_id: str) -> dict[str, Any]:
        """Where it stands."""
        status: dict[str, Any] = self.get(f"/api/v1/jobs/{job_id}/status")
        if status["status"] in ("failed", "cancelled"):
            raise RuntimeError(f"job {job_id} has {status['status']}: {status['error']}")
        return status

    def gets_further(self, job_id: str, rounds: int = 2, timeout_s: float = 180.0) -> int:
        """Rounds done, once it is that many more than now."""

        def done() -> int:
            return len(self.status(job_id)["history"])

        wanted = rounds + until("where the job stands", lambda: done() + 1) - 1
        until(f"round {wanted}", lambda: done() >= wanted, timeout_s)
        return int(wanted)

    def held(self, job_id: str) -> dict[str, Any]:
        """The status of a job that is made to stand still."""
        self._post(job_id, "pause")
        return until(  # type: ignore[no-any-return]
            "the job stands still", lambda: (s := self.status(job_id))["status"] == "paused" and s
        )

    def live(self, role: str) -> dict[str, str]:
        """Nodes of that role that are there, and the region of each."""
        regions = self.get("/api/v1/network/status")["regions"].items()
        nodes = [(region, node) for region, status in regions for node in status["nodes"] if node["role"] == role]
        return {node["name"]: region for region, node in nodes if node["health"] == "live"}

    def cancel(self, job_id: str) -> None:
        """End it."""
        self._post(job_id, "cancel")

    def completed(self, job_id: str, timeout_s: float = 600.0) -> dict[str, Any]:
        """The status, once the job is done."""
        return until(  # type: ignore[no-any-return]
            "the job's end", lambda: (s := self.status(job_id))["status"] == "completed" and s, timeout_s
        )

    def _post(self, job_id: str, what: str) -> None:
        answer = httpx.post(f"{self.url}/api/v1/jobs/{job_id}/{what}", headers=self._headers, timeout=30)
        assert answer.status_code in (200, 202, 204), answer.text

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}
