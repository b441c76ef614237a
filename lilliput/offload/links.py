"""A model of radio links: estimated seconds and joules of a request to the edge server.

One request and its answer over an open connection, in packets of `PACKET_BYTES`:

- transfer = round trip + bytes ÷ rate, up and down + resends × `resend_s`. A packet is sent until it arrives, so
  `loss` ÷ (1 − `loss`) resends per packet are expected;
- a resend starts after two round trips without an answer (the tail loss probe of RFC 8985; a request has too few
  packets for duplicate acknowledgements), but not before `LEAST_RESEND_S`, Linux's minimum timeout;
- radio = joules per byte × bytes + active watts × (transfer + the server's seconds) + tail watts × tail (the power
  model of Huang et al., MobiSys 2012). A resend costs time; its bytes are not counted again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lilliput.config import LinkConfig

PACKET_BYTES = 1460
LEAST_RESEND_S = 0.2


@dataclass(frozen=True)
class Request:
    """One request to the edge server.

    Attributes:
        up_bytes: of the request's body.
        down_bytes: of the answer's body.
        server_s: response time of the server.
    """

    up_bytes: int
    down_bytes: int
    server_s: float

    @property
    def packets(self) -> int:
        """Packets in both directions."""
        return sum(math.ceil(count / PACKET_BYTES) for count in (self.up_bytes, self.down_bytes))


def expected_resends(request: Request, link: LinkConfig) -> float:
    """Expected number of resent packets of `request`."""
    return request.packets * link.loss / (1.0 - link.loss)


def resend_s(link: LinkConfig) -> float:
    """Seconds until a lost packet is detected."""
    return max(LEAST_RESEND_S, 2.0 * link.round_trip_ms / 1e3)


def transfer_s(request: Request, link: LinkConfig, resends: float | None = None) -> float:
    """Transfer seconds in both directions; with the expected resends if none are given."""
    count = expected_resends(request, link) if resends is None else resends
    sending_s = 8e-6 * (request.up_bytes / link.up_mbit_per_s + request.down_bytes / link.down_mbit_per_s)
    return link.round_trip_ms / 1e3 + sending_s + count * resend_s(link)


def latency_s(request: Request, link: LinkConfig, resends: float | None = None) -> float:
    """Seconds from sending `request` to receiving its answer."""
    return transfer_s(request, link, resends) + request.server_s


def active_j(request: Request, link: LinkConfig, resends: float | None = None) -> float:
    """Joules of the device's radio from sending `request` to its answer, including the wait for the server."""
    sent_j = request.up_bytes * link.up_j_per_byte + request.down_bytes * link.down_j_per_byte
    return sent_j + link.active_watts * latency_s(request, link, resends)


def tail_j(link: LinkConfig, until_next_s: float = math.inf) -> float:
    """Joules of the radio after the answer; the next request ends the tail."""
    return link.tail_watts * min(link.tail_s, until_next_s)


def radio_j(request: Request, link: LinkConfig) -> float:
    """Expected joules of an isolated request: active joules and a complete tail."""
    return active_j(request, link) + tail_j(link)


def battery_percent(energy_j: float, battery_wh: float) -> float:
    """`energy_j` in percent of a full battery."""
    return 100.0 * energy_j / (battery_wh * 3600.0)
