"""The link model; every figure is calculated by hand."""

import pytest

from lilliput.offload.links import (
    Request,
    active_j,
    battery_percent,
    expected_resends,
    latency_s,
    radio_j,
    resend_s,
    tail_j,
    transfer_s,
)
from tests.offload.links import link

LINK = link(
    down_mbit_per_s=16.0,
    round_trip_ms=50.0,
    loss=0.2,
    up_j_per_byte=2e-6,
    active_watts=1.0,
    tail_s=10.0,
    tail_watts=0.5,
)
REQUEST = Request(up_bytes=1000, down_bytes=4000, server_s=0.3)  # one packet up, three down


def test_transfer_time_by_hand():
    assert REQUEST.packets == 4
    assert expected_resends(REQUEST, LINK) == pytest.approx(4 * 0.25)
    assert transfer_s(REQUEST, LINK, resends=0) == pytest.approx(0.050 + 0.001 + 0.002)
    assert transfer_s(REQUEST, LINK) == pytest.approx(0.053 + 0.2)
    assert latency_s(REQUEST, LINK, resends=2) == pytest.approx(0.053 + 0.4 + 0.3)


def test_resend_after_two_round_trips_or_the_minimum_timeout():
    assert resend_s(LINK) == 0.2
    assert resend_s(LINK.model_copy(update={"round_trip_ms": 400.0})) == pytest.approx(0.8)


def test_radio_energy_by_hand():
    assert active_j(REQUEST, LINK, resends=0) == pytest.approx(0.002 + 0.004 + 0.353)
    assert radio_j(REQUEST, LINK) == pytest.approx(0.006 + 0.553 + 5.0)


def test_next_request_ends_the_tail():
    assert tail_j(LINK, until_next_s=2.0) == pytest.approx(1.0)
    assert tail_j(LINK, until_next_s=11.0) == tail_j(LINK) == pytest.approx(5.0)


def test_energy_as_battery_percent():
    assert battery_percent(540.0, 15.0) == pytest.approx(1.0)


def test_declared_links_match_the_published_figures():
    """mW/Mbps is nJ/bit: 438.39 of them are 3.5 µJ a byte."""
    from pathlib import Path

    from lilliput.params import load_params

    links = load_params(Path("params.yaml")).links
    of_paper = {"4g": (438.39, 51.97), "wifi": (283.17, 137.01), "poor": (868.98, 122.12)}
    for name, (up, down) in of_paper.items():
        assert links[name].up_j_per_byte == pytest.approx(up * 8e-9, rel=0.02)
        assert links[name].down_j_per_byte == pytest.approx(down * 8e-9, rel=0.02)
