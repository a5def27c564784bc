"""Constant load on a server, with a record of the answers and failures."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx

LIMIT_S = 120.0  # only a failure takes this long


class Load:
    """Clients that post the same completion again and again until the ``with`` block ends."""

    def __init__(
        self, url: str, key: str, body: dict[str, Any], clients: int = 3, pause: float = 0.01
    ) -> None:
        self.answers: list[tuple[str, list[str]]] = []
        """Version that answered, and its texts."""
        self.failed: list[str] = []
        """Statuses and errors of requests that were not answered."""
        self.seconds: list[tuple[float, float]] = []
        """When each answered request began, and how long it took."""
        self._over = threading.Event()
        self._url, self._headers, self._body, self._pause = (
            url,
            {"Authorization": f"Bearer {key}"},
            body,
            pause,
        )
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def until(self, condition: Callable[[Counter[str]], Any], newest: int | None = None) -> float:
        """Return the seconds until ``condition`` holds for the versions of the coming answers.

        ``condition`` gets a count of answers by version. With ``newest`` only the newest so many
        answers count.
        """
        start, first = time.monotonic(), len(self.answers)
        while time.monotonic() < start + LIMIT_S:
            seen = self.answers[first:][-newest:] if newest else self.answers[first:]
            enough = newest is None or len(seen) == newest
            if enough and condition(Counter(version for version, _ in seen)):
                return time.monotonic() - start
            time.sleep(0.02)
        raise AssertionError(
            f"waited in vain; failed: {Counter(self.failed)}, newest: {self.answers[-3:]}"
        )

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, headers=self._headers, timeout=LIMIT_S) as client:
            while not self._over.wait(self._pause):
                self._one(client)

    def _one(self, client: httpx.Client) -> None:
        begun = time.monotonic()
        try:
            answer = client.post("/v1/completions", json=self._body)
        except httpx.HTTPError as error:
            self.failed.append(type(error).__name__)
            return
        if answer.status_code != 200:
            self.failed.append(str(answer.status_code))
            return
        document = answer.json()
        self.seconds.append((begun, time.monotonic() - begun))
        self.answers.append(
            (document["system_fingerprint"], [it["text"] for it in document["choices"]])
        )
