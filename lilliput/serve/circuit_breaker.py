"""A circuit breaker: pauses requests to a backend that fails repeatedly."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after `failures` in a row. After `rest_s` it admits one request, and closes if that succeeds."""

    def __init__(self, failures: int = 3, rest_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._failure_limit, self._rest_s, self._clock = failures, rest_s, clock
        self._failures, self._opened = 0, 0.0

    @property
    def closed(self) -> bool:
        """Whether there are few failures, or the pause is over."""
        return self._failures < self._failure_limit or self._clock() - self._opened >= self._rest_s

    def admits(self) -> bool:
        """Whether this request may be sent; after a pause, one at a time."""
        if self._failures < self._failure_limit:
            return True
        if not self.closed:
            return False
        self._opened = self._clock()  # this request tries; the others wait for its result
        return True

    def failed(self) -> None:
        """Counts a failed request."""
        self._failures += 1
        self._opened = self._clock()

    def succeeded(self) -> None:
        """Closes the breaker after a successful request."""
        self._failures = 0
