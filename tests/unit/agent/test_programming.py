# SPDX-License-Identifier: Apache-2.0
"""The programming latency: each change counts once, none from before the start."""

from __future__ import annotations

import datetime

import msgspec
from bpfdp_agent.reconcile.programming import ProgrammingLatency
from bpfdp_agent.watch.wire import EndpointSliceAnnotations, ObjectKey
from unit.agent.kube_objects import endpoint, endpoint_slice

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
WEB = ObjectKey("ns", "web")


def changed(text: str):
    found = endpoint_slice([endpoint("10.0.0.1")])
    annotations = EndpointSliceAnnotations(last_change=text)
    metadata = msgspec.structs.replace(found.metadata, annotations=annotations)
    return msgspec.structs.replace(found, metadata=metadata)


def test_a_change_counts_once_and_only_after_the_start():
    now = START
    latency = ProgrammingLatency(lambda: now)
    assert latency.of(WEB, 4, [changed("2025-12-31T23:59:59Z")]) == []
    now = START + datetime.timedelta(seconds=3)
    assert latency.of(WEB, 4, [changed("2026-01-01T00:00:01.5Z")]) == [1.5]
    assert latency.of(WEB, 4, [changed("2026-01-01T00:00:01.5Z")]) == []
    assert latency.of(WEB, 6, [changed("")]) == []
    assert latency.of(WEB, 4, [changed("yesterday")]) == []
