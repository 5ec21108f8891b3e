"""The residency machine under generated histories, against the model of its world (tests/models/residency_world.py).

Each promise of cache/residency/machine.py is an assertion in the model, made after every single action; here only histories are made.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cache.blocks import BLOCK_BYTES, BLOCKS_PER_EXTENT, EXTENT_BYTES, ExtentId, ObjectId, num_blocks
from cache.errors import AccessDenied, CapacityError, CorruptBlock, DiskError, OriginThrottled, OriginUnavailable
from cache.order.lookahead import Lookahead, Visit
from cache.residency import messages as m
from cache.residency.health import FIRST_PAUSE_S
from cache.residency.patience import COOLING_S, Patience
from cache.residency.residents import Residents
from cache.residency.state import State
from cache.residency.waiting import Waiting
from tests.models.residency_world import World

OBJECTS = [
    ObjectId("s3://b/one", '"1"', 10),
    ObjectId("s3://b/two", '"1"', 2 * BLOCK_BYTES),
    ObjectId("s3://b/two", '"2"', 2 * BLOCK_BYTES),
    ObjectId("s3://b/three", '"1"', 3 * BLOCK_BYTES - 5),
    ObjectId("s3://b/long", '"1"', EXTENT_BYTES + BLOCK_BYTES + 1),
    ObjectId("s3://b/empty", '"1"', 0),
]
FILLED = [object_id for object_id in OBJECTS if object_id.size_bytes]
CLIENTS = ["a", "b", "c"]
STREAMS = {"a/train": "a", "b/train": "b", "b/val": "b"}
CAPACITIES = [9 * BLOCK_BYTES // 4, 22 * BLOCK_BYTES // 4, 80 * 2**20, 200 * 2**20]
ORIGIN_ERRORS = [
    AccessDenied("no"),
    OriginUnavailable("away"),
    OriginThrottled("slow down", retry_after_s=3.0),
    CapacityError("no room"),
]
DISK_ERRORS = [DiskError(f"the disk is {kind}", kind=kind) for kind in ("full", "read-only", "io", "slow", "lost")]

objects, filled, clients = st.sampled_from(OBJECTS), st.sampled_from(FILLED), st.sampled_from(CLIENTS)
streams = st.sampled_from(sorted(STREAMS))
picks = st.integers(0, 1000)


@st.composite
def spans(draw: st.DrawFn) -> tuple[ObjectId, int, int]:
    """Blocks [first, end) within one extent of an object."""
    object_id = draw(filled)
    count = num_blocks(object_id.size_bytes)
    first = draw(st.integers(0, count - 1))
    last_of_extent = min(count, (first // BLOCKS_PER_EXTENT + 1) * BLOCKS_PER_EXTENT)
    return object_id, first, draw(st.integers(first + 1, last_of_extent))


@st.composite
def windows(draw: st.DrawFn) -> list[tuple[ObjectId, int, int]]:
    """Visits to announce; one may span two extents, or be empty."""
    found = []
    for object_id in draw(st.lists(objects, min_size=1, max_size=6)):
        count = num_blocks(object_id.size_bytes)
        first = draw(st.integers(0, count))
        found.append((object_id, first, draw(st.integers(first, count))))
    return found


def remembered(thing: object) -> dict[str, object]:
    """The collections within the machine that are not empty (but for the free words, what is cooling, and a shortlist of guesses)."""
    found: dict[str, object] = {}
    for name, value in vars(thing).items():
        if (
            isinstance(value, dict | list | set | deque | OrderedDict)
            and value
            and name not in ("_free", "_cooling_until_s", "shortlist")
        ):
            found[name] = value
        elif isinstance(value, State | Residents | Waiting | Patience | Lookahead):
            found |= remembered(value)
    return found


class Histories(RuleBasedStateMachine):
    @initialize(
        capacity=st.sampled_from(CAPACITIES),
        max_files=st.sampled_from([1, 2, 100]),
        limits=st.sampled_from([(4, 1), (2, 1), (1, 0), (16, 4)]),
        full_look=st.sampled_from([0, 512]),
        found=st.lists(
            st.tuples(st.sampled_from(FILLED), st.integers(0, 2**16 - 1)), unique_by=lambda f: f[0], max_size=4
        ),
        held=st.lists(st.sampled_from(FILLED), max_size=2),
    )
    def start(
        self,
        capacity: int,
        max_files: int,
        limits: tuple[int, int],
        found: list[tuple[ObjectId, int]],
        full_look: int = 512,
        held: Sequence[ObjectId] = (),
    ) -> None:
        """A daemon begins on a directory that holds files of its predecessor."""
        self.world = World(
            capacity, max_files=max_files, max_in_flight=limits[0], demand_reserve=limits[1], full_look=full_look
        )
        for generation, (object_id, mask) in enumerate(found, start=5):
            blocks = [b for b in range(min(BLOCKS_PER_EXTENT, num_blocks(object_id.size_bytes))) if mask >> b & 1]
            self.world.found(object_id, 0, generation, blocks)
        for generation, object_id in enumerate(held, start=20):
            self.world.found_held(object_id, generation, file_bytes=2**20)
        self.world.set_capacity(capacity)

    @precondition(lambda self: self.world.looks)
    @rule(pick=picks)
    def unknown_readers_let_go(self, pick: int) -> None:
        self.world.unknown_readers_let_go(self.world.looks[pick % len(self.world.looks)])

    @rule(client=clients, object_id=objects)
    def open(self, client: str, object_id: ObjectId) -> None:
        self.world.open(client, object_id)

    @rule(client=clients, object_id=objects, times=st.sampled_from([1, 50]))
    def close(self, client: str, object_id: ObjectId, times: int) -> None:
        for _ in range(times):
            self.world.close(client, object_id)

    @rule(client=clients, span=spans())
    def want(self, client: str, span: tuple[ObjectId, int, int]) -> None:
        object_id, first, end = span
        self.world.open(client, object_id)
        request_id = self.world.want(client, object_id, first, end)
        if request_id in self.world.answers:
            self.world.hold_answered(request_id)
            self.world.settle(request_id)

    @rule(client=clients, span=spans())
    def want_and_read_later(self, client: str, span: tuple[ObjectId, int, int]) -> None:
        """The answer lies in the daemon for a while before its session's turn comes."""
        object_id, first, end = span
        self.world.open(client, object_id)
        self.world.want(client, object_id, first, end)

    @precondition(lambda self: self.world.asked)
    @rule(pick=picks)
    def settle(self, pick: int) -> None:
        """A session hands over, or gives up; of some request that was ever made, as a confused one might."""
        asked = sorted(self.world.asked)
        self.world.settle(asked[pick % len(asked)])

    @rule(span=spans())
    def hint(self, span: tuple[ObjectId, int, int]) -> None:
        self.world.hint(*span)

    @rule(stream=streams, window=windows())
    def announce(self, stream: str, window: list[tuple[ObjectId, int, int]]) -> None:
        for object_id, _, _ in window:
            self.world.open(STREAMS[stream], object_id)
        visits = [Visit(object_id.content_id, first, end) for object_id, first, end in window]
        self.world.announce(STREAMS[stream], stream, visits)

    @precondition(lambda self: self.world.streams)
    @rule(pick=picks, num_visits=st.integers(0, 20))
    def advance(self, pick: int, num_visits: int) -> None:
        names = sorted(self.world.streams)
        self.world.advance(names[pick % len(names)], num_visits)

    @precondition(lambda self: self.world.streams)
    @rule(pick=picks)
    def close_stream(self, pick: int) -> None:
        names = sorted(self.world.streams)
        self.world.close_stream(names[pick % len(names)])

    @rule(client=clients)
    def leave(self, client: str) -> None:
        self.world.leave(client)

    @precondition(lambda self: self.world.answers)
    @rule(pick=picks)
    def hand_over(self, pick: int) -> None:
        """A session passes the file of an answered request; or of one answered long ago, as after a slow context switch."""
        answered = [rid for rid in self.world.answers if rid in self.world.asked]
        if answered:
            self.world.hold_answered(answered[pick % len(answered)])

    @precondition(lambda self: any(self.world.holders.values()))
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        held = [(key, client) for key, holders in self.world.holders.items() for client in holders]
        self.world.release(*held[pick % len(held)])

    @rule(client=clients, span=spans())
    def ask_for_check(self, client: str, span: tuple[ObjectId, int, int]) -> None:
        object_id, first, _ = span
        self.world.open(client, object_id)
        self.world.check(client, ExtentId(object_id.content_id, first // BLOCKS_PER_EXTENT))

    @precondition(lambda self: self.world.creations)
    @rule(pick=picks, error=st.one_of(st.none(), st.none(), st.sampled_from(DISK_ERRORS)))
    def creation_ends(self, pick: int, error: DiskError | None) -> None:
        creations = self.world.creations
        self.world.create_done(creations[pick % len(creations)], error)

    @precondition(lambda self: self.world.tables)
    @rule(pick=picks, fails=st.booleans())
    def table_ends(self, pick: int, fails: bool) -> None:
        tables = self.world.tables
        self.world.table_done(tables[pick % len(tables)], CorruptBlock("torn") if fails else None)

    @precondition(lambda self: self.world.fetches)
    @rule(pick=picks, error=st.one_of(st.none(), st.none(), st.sampled_from(ORIGIN_ERRORS + DISK_ERRORS)))
    def fetch_ends(self, pick: int, error: CapacityError | None) -> None:
        fetches = self.world.fetches
        self.world.fetch_done(fetches[pick % len(fetches)], error)

    @precondition(lambda self: self.world.checks)
    @rule(pick=picks, is_sound=st.booleans(), error=st.one_of(st.none(), st.sampled_from(DISK_ERRORS)))
    def check_ends(self, pick: int, is_sound: bool, error: DiskError | None) -> None:
        checks = self.world.checks
        self.world.check_done(checks[pick % len(checks)], is_sound, None if is_sound else error)

    @rule()
    def scrub(self) -> None:
        self.world.step(m.ScrubDue())

    @rule(span=spans())
    def a_reader_cannot_read(self, span: tuple[ObjectId, int, int]) -> None:
        self.world.step(m.ExtentSuspected(ExtentId(span[0].content_id, span[1] // BLOCKS_PER_EXTENT)))

    @precondition(lambda self: self.world.num_probes)
    @rule(error=st.one_of(st.none(), st.sampled_from(DISK_ERRORS)))
    def probe_ends(self, error: DiskError | None) -> None:
        self.world.probe_done(error)

    @rule(free=st.sampled_from([0, 5, 30, 1000]), files=st.sampled_from([0, 2, None]))
    def disk_is_looked_at(self, free: int, files: int | None) -> None:
        """Somebody else on the disk takes space, or gives it back."""
        budget = self.world.machine.budget
        self.world.step(m.DiskSeen(budget.used_bytes, budget.num_files, free * 2**20, files))

    @rule(object_id=objects)
    def evict(self, object_id: ObjectId) -> None:
        self.world.evict(object_id)

    @rule(capacity=st.sampled_from(CAPACITIES))
    def set_capacity(self, capacity: int) -> None:
        self.world.set_capacity(capacity)

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.5, 3.0, COOLING_S, FIRST_PAUSE_S + 1, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule()
    def nothing_new_changes_nothing(self) -> None:
        """No busy loop: looking twice at the same world, the second look finds nothing to do, and the next deadline lies ahead."""
        self.world.pass_time()
        assert self.world.pass_time() == []
        deadline_s = self.world.machine.next_deadline_s()
        assert deadline_s is None or deadline_s > self.world.now

    def teardown(self) -> None:
        """Whatever happened: every request is answered in the end, and when everybody has gone nothing is left."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.run_until_quiet()
        assert not world.open_requests, "a request was never answered"
        for request_id in list(world.unsettled):
            world.settle(request_id)
        for stream in list(world.streams):
            world.close_stream(stream)
        for client in CLIENTS:
            world.leave(client)
        world.run_until_quiet()
        # What was hinted while the disk refused files is fetched when it is asked again: only then is there nothing left to do.
        world.pass_time(COOLING_S + FIRST_PAUSE_S + 60)
        world.run_until_quiet()
        for object_id in OBJECTS:
            world.evict(object_id)
        world.pass_time(COOLING_S + FIRST_PAUSE_S + 60)
        world.run_until_quiet()
        assert not world.files
        assert world.machine.budget.used_bytes == 0 and world.machine.budget.num_files == 0
        assert list(world.machine.objects()) == []
        left = remembered(world.machine)
        assert left == {}, f"something is remembered of what has gone: {left}"


Histories.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHistories = Histories.TestCase


def test_the_tries_of_a_block_are_forgotten_with_its_object() -> None:
    """Found by the histories: its reader left, its fetch failed once, and its file made room for another before the next try."""
    one, two = OBJECTS[0], OBJECTS[1]
    history = Histories()
    history.start(capacity=9 << 20, max_files=1, limits=(4, 1), found=[])
    history.want(client="a", span=(two, 0, 1))
    history.leave(client="a")
    history.creation_ends(pick=0, error=None)
    history.fetch_ends(pick=0, error=OriginUnavailable("away"))
    history.want(client="a", span=(one, 0, 1))
    history.teardown()


def test_a_block_that_rots_while_a_request_waits_for_its_neighbour_is_waited_for_too() -> None:
    """Found by the histories: the request was answered when the neighbour landed, though its other block had gone meanwhile."""
    two = OBJECTS[1]
    history = Histories()
    history.start(capacity=9 << 20, max_files=2, limits=(4, 1), found=[])
    history.want(client="a", span=(two, 0, 1))
    history.creation_ends(pick=0, error=None)
    history.fetch_ends(pick=0, error=None)
    history.ask_for_check(client="a", span=(two, 0, 1))
    history.want(client="a", span=(two, 0, 2))
    history.check_ends(pick=0, is_sound=False, error=None)
    history.teardown()


def test_two_files_in_room_for_one_do_not_push_each_other_out_for_ever() -> None:
    """Found by the histories: each new file went for the other's before anything was fetched into it."""
    one, two = OBJECTS[0], OBJECTS[1]
    history = Histories()
    history.start(capacity=9 << 20, max_files=1, limits=(2, 1), found=[])
    history.announce(stream="a/train", window=[(two, 0, 1)])
    history.close_stream(pick=0)
    history.want(client="b", span=(one, 0, 1))
    history.creation_ends(pick=0, error=None)
    history.leave(client="b")
    history.teardown()
