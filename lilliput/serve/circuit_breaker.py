"""A circuit breaker: what fails again and again is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after `failures` in a row; after `rest_s` one request may try, and closes it again if that goes well."""

    def __init__(self, failures: int = 3, rest_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._rest_s, self._clock = failures, rest_s, clock
        self._failures, self._opened = 0, 0.0

    @property
    def closed(self) -> bool:
        """Whether all is well, or the rest is over."""
        return self._failures < self._most or self._clock() - self._opened >= self._rest_s

    def admits(self) -> bool:
        """Whether this request may pass; after a rest, one at a time."""
        if self._failures < self._most:
            return True
        if not self.closed:
            return False
        self._opened = self._clock()  # this one tries; others wait for how it goes
        return True

    def failed(self) -> None:
        """A request failed."""
        self._failures += 1
        self._opened = self._clock()

    def succeeded(self) -> None:
        """A request went well."""
        self._failures = 0
