# SPDX-License-Identifier: Apache-2.0
"""Whatever happened, and wherever the agent was killed: the maps of a start from the final state."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

from bpfdp_agent.diff.tables import SERVICE_MAPS
from bpfdp_agent.layouts import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.agent import service_histories as histories
from unit.agent.kube_objects import added
from unit.agent.service_meaning import meaning
from unit.agent.test_agent_services import Bench, FakeMaps


class KilledError(Exception):
    """The agent ends here."""


class MortalMaps(FakeMaps):
    """Maps that take `left` more operations (None: any number), then kill the agent."""

    left: int | None = None

    def write(self, name, family, puts, deletes=()):
        for key, value in puts.items():
            self._spend()
            super().write(name, family, {key: value})
        for key in deletes:
            self._spend()
            super().write(name, family, {}, (key,))

    def _spend(self):
        if self.left is not None:
            if not self.left:
                raise KilledError
            self.left -= 1


def agent(*, maglev):
    bench = Bench()
    bench.maps = MortalMaps()
    restart(bench, maglev=maglev)
    return bench


def restart(bench, *, maglev):
    bench.fresh()
    bench.sync.configure(SimpleNamespace(maglev=maglev))


def said(bench):
    return {
        f: meaning(f, {name: bench.maps.read(name, f) for name in SERVICE_MAPS}) for f in FAMILIES
    }


def final_objects(view):
    return [*view.services.values(), *view.slices.values(), *view.node_objects.values()]


def shared_cluster_ips(view):
    ips = [ip for found in view.services.values() for ip in found.spec.cluster_ips]
    return len(ips) != len(set(ips))


def fresh_start(view, *, maglev):
    """What an agent writes that meets the final state first."""
    bench = agent(maglev=maglev)
    bench.view = bench.around.view = type(view)(view.nodes.own)
    bench.synced()
    bench.give(*map(added, final_objects(view)))
    asyncio.run(bench.sync.reconcile())
    return said(bench)


@settings(max_examples=150, deadline=None)
@given(histories.batches, st.booleans(), st.randoms(use_true_random=False))
def test_any_events_in_any_order_with_repeats_end_in_the_maps_of_a_fresh_start(
    batches, maglev, random
):
    bench = agent(maglev=maglev)
    for batch in batches:
        bench.give(*batch)
        asyncio.run(bench.sync.reconcile())
    # a watch that begins anew tells everything again, in an order of its own
    again = [added(found) for found in final_objects(bench.view)] * 2
    random.shuffle(again)
    bench.give(*again)
    assert asyncio.run(bench.sync.reconcile()) == 0
    assert said(bench) == fresh_start(bench.view, maglev=maglev)


LIVES = st.tuples(histories.events, st.integers(0, 20), st.booleans())
"""What happens, the operations until the agent is killed, and whether it is a new one afterwards."""


@settings(max_examples=200, deadline=None)
@given(st.lists(LIVES, min_size=1, max_size=5), histories.events, st.booleans())
def test_killed_after_any_operation_it_ends_in_the_maps_of_a_fresh_start(lives, missed, maglev):
    bench = agent(maglev=maglev)
    for batch, operations, ends in lives:
        bench.give(*batch)
        bench.maps.left = operations
        with contextlib.suppress(KilledError):
            asyncio.run(bench.sync.reconcile())
        if ends:
            restart(bench, maglev=maglev)
    bench.maps.left = None
    bench.give(*missed)
    asyncio.run(bench.sync.reconcile())
    assert said(bench) == fresh_start(bench.view, maglev=maglev)
    restart(bench, maglev=maglev)
    written = asyncio.run(bench.sync.reconcile())
    # whose only frontend is another's has no id to be known by; the API server allows no such pair
    assert written == 0 or shared_cluster_ips(bench.view)
