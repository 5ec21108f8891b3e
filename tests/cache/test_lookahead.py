"""The merged future of many readers, against a model that keeps every visit in plain lists."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cache.blocks import BLOCKS_PER_EXTENT, ExtentId, extent_of
from cache.order.lookahead import Lookahead, Visit

STREAMS = ["a", "b", "c"]
EXTENTS = [ExtentId(name, idx) for name in ("x", "y") for idx in (0, 1)]

streams = st.sampled_from(STREAMS)
visits = st.builds(
    lambda name, first, count: Visit(name, first, first + count),
    st.sampled_from(["x", "y"]),
    st.integers(0, 2 * BLOCKS_PER_EXTENT - 4),
    st.integers(0, 3),
)


class Futures(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.lookahead = Lookahead()
        self.visits: dict[str, list[Visit]] = {}
        self.position: dict[str, int] = {}
        self.is_fetched: set[tuple[str, int]] = set()

    @rule(stream=streams, window=st.lists(visits, max_size=5))
    def announce(self, stream: str, window: list[Visit]) -> None:
        self.lookahead.announce(stream, window)
        self.visits.setdefault(stream, []).extend(window)
        self.position.setdefault(stream, 0)

    @rule(stream=streams, num_visits=st.integers(0, 30))
    def advance(self, stream: str, num_visits: int) -> None:
        """Going back, beyond the end, or in a stream that nobody announced, is harmless."""
        self.lookahead.advance(stream, num_visits)
        if stream in self.visits:
            self.position[stream] = max(self.position[stream], min(num_visits, len(self.visits[stream])))

    @rule(stream=streams)
    def close(self, stream: str) -> None:
        self.lookahead.close(stream)
        self.visits.pop(stream, None)
        self.position.pop(stream, None)

    @rule()
    def fetch_the_next(self) -> None:
        """What is offered is the nearest block of any stream that is still needed."""
        offered = self.lookahead.next_candidate(lambda name, block: (name, block) not in self.is_fetched)
        needed = [
            (number - self.position[stream], visit.content_id, block)
            for stream, listed in self.visits.items()
            for number, visit in enumerate(listed)
            if number >= self.position[stream]
            for block in range(visit.first, visit.end)
            if (visit.content_id, block) not in self.is_fetched
        ]
        if not needed:
            assert offered is None
            return
        assert offered is not None
        visit, block, distance = offered
        name = visit.content_id
        assert visit.first <= block < visit.end
        assert (distance, name, block) in needed
        assert distance == min(needed)[0]
        self.is_fetched.add((name, block))

    @rule(extent=st.sampled_from(EXTENTS))
    def lose(self, extent: ExtentId) -> None:
        """An extent is evicted: its blocks are offered again, if they are still announced."""
        self.is_fetched = {(n, b) for n, b in self.is_fetched if ExtentId(n, extent_of(b)) != extent}
        self.lookahead.offer_again(extent)

    @invariant()
    def it_knows_the_next_use_of_every_extent(self) -> None:
        for extent in EXTENTS:
            distances = [
                number - self.position[stream]
                for stream, listed in self.visits.items()
                for number, visit in enumerate(listed)
                if number >= self.position[stream] and visit.end > visit.first and visit.content_id == extent.content_id
                if extent_of(visit.first) <= extent.extent_idx <= extent_of(visit.end - 1)
            ]
            assert self.lookahead.next_use(extent) == (min(distances) if distances else None)

    @invariant()
    def it_knows_which_blocks_are_announced(self) -> None:
        announced = {
            (visit.content_id, block)
            for stream, listed in self.visits.items()
            for visit in listed[self.position[stream] :]
            for block in range(visit.first, visit.end)
        }
        for name in ("x", "y"):
            for block in range(0, 2 * BLOCKS_PER_EXTENT, 7):
                assert self.lookahead.is_announced(name, block) == ((name, block) in announced)

    @invariant()
    def it_counts_what_lies_ahead(self) -> None:
        ahead = {stream: listed[self.position[stream] :] for stream, listed in self.visits.items()}
        assert self.lookahead.num_announced == sum(map(len, ahead.values()))
        assert self.lookahead.num_streams == len(self.visits)
        used = {visit.content_id for listed in ahead.values() for visit in listed if visit.end > visit.first}
        assert self.lookahead.content_ids() == used
        assert {name for name in ("x", "y") if self.lookahead.uses_object(name, 2)} == used

    def teardown(self) -> None:
        """When all streams are closed nothing is remembered."""
        if hasattr(self, "lookahead"):
            for stream in STREAMS:
                self.lookahead.close(stream)
            assert self.lookahead.content_ids() == set() and self.lookahead.num_announced == 0


Futures.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestFutures = Futures.TestCase
