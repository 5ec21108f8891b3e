"""The world around the residency machine, as a model: what its actions do to disk, words, workers and readers.

Every promise of the machine is checked on the way. It performs actions as the control process does, but completes nothing by itself:
a test (or hypothesis) says which creation, fetch or
check ends next, and how. It keeps its own account of everything that the machine keeps, computed in the plainest way.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from cache.blocks import (
    BLOCKS_PER_EXTENT,
    BLOCKS_PER_FETCH,
    ExtentId,
    ObjectId,
    extent_of,
    extent_span,
    num_blocks,
    num_extents,
)
from cache.errors import CacheError
from cache.order.lookahead import Visit
from cache.residency import messages as m
from cache.residency.budget import INDEX_BYTES_PER_EXTENT, UNKNOWN_READERS, Budget, Floor
from cache.residency.machine import Residency
from cache.residency.policy import UNKNOWN_USE, Candidate, Decision, FarthestNextUse
from cache.residency.slots import EVICTION_WORD
from cache.residency.state import Limits

LABEL_BYTES = 8192
FileKey = tuple[ExtentId, int]
"""An extent file: its extent and its generation."""


@dataclass
class ModelFile:
    object_id: ObjectId
    size_bytes: int
    is_made: bool = False
    is_unlinked: bool = False
    good_blocks: set[int] = field(default_factory=set)
    """Blocks whose bytes on the disk are those of the object."""


@dataclass
class ModelStream:
    client_id: str
    visits: list[Visit] = field(default_factory=list)
    position: int = 0


class CheckingPolicy:
    """The real policy, watched: candidates tell the truth, and no victim is needed sooner than what displaces it."""

    def __init__(self, world: World) -> None:
        self._world = world

    def choose(
        self, need_bytes: int, candidates: Iterable[Candidate], own_next_use: float, need_files: int = 0
    ) -> Decision:
        listed = list(candidates)
        by_extent = {candidate.extent: candidate for candidate in listed}
        for candidate in listed:
            assert candidate.next_use == self._world.next_use(candidate.extent), candidate
            assert not self._world.busy(candidate.extent), (
                f"{candidate.extent} is in a worker's hands and may be evicted"
            )
        decision = FarthestNextUse().choose(need_bytes, listed, own_next_use, need_files)
        for victim in decision.victims:
            next_use = by_extent[victim].next_use
            assert next_use > own_next_use or next_use == UNKNOWN_USE, (victim, next_use, own_next_use)
        return decision


class World:
    def __init__(
        self,
        capacity_bytes: int,
        *,
        max_files: int = 1000,
        max_in_flight: int = 4,
        demand_reserve: int = 1,
        num_words: int = 4096,
        full_look: int = 512,
    ) -> None:
        self.now = 100.0
        self.machine = Residency(
            Budget(capacity_bytes, max_files, keep_free=Floor(10 * 2**20, 1)),
            limits=Limits(max_in_flight, demand_reserve, LABEL_BYTES, scrub_bytes_per_s=1 << 50, full_look=full_look),
            policy=CheckingPolicy(self),
            rng=random.Random(7),
            num_words=num_words,
        )
        self.max_in_flight = max_in_flight
        self.num_probes = 0
        """Probes of the disk that are under way."""
        self.words: Counter[int] = Counter()
        self.files: dict[FileKey, ModelFile] = {}
        self.current: dict[ExtentId, int] = {}
        self.creations: list[m.CreateExtent] = []
        self.tables: list[m.ReadTable] = []
        self.fetches: list[m.FetchBlocks] = []
        self.checks: list[m.CheckBlocks] = []
        self.holders: dict[FileKey, Counter[str]] = {}
        self.open_requests: dict[int, m.BlocksWanted | m.CheckAsked] = {}
        self.answers: dict[int, m.Answer] = {}
        self.clients: set[str] = set()
        self.streams: dict[str, ModelStream] = {}
        self.objects: dict[str, ObjectId] = {}
        self.used_generations: set[int] = set()
        self.old: set[FileKey] = set()
        """Files from before this daemon, and those of readers that have died."""
        self.looks: list[FileKey] = []
        """Evicted files of which the disk has not said yet that nobody unknown holds them."""
        self.num_fetches: Counter[tuple[str, int]] = Counter()
        self.asked: dict[int, m.BlocksWanted] = {}
        self.unsettled: set[int] = set()
        """Wants that were answered and whose file was not handed over yet: their extents must stay."""
        self.bases: dict[str, int] = {}
        """Where the words of each object begin; one that was forgotten in the last step included."""
        self._next_request = 1

    # -- what readers do --

    def open(self, client: str, object_id: ObjectId) -> None:
        self.clients.add(client)
        self.objects[object_id.content_id] = object_id
        self.step(m.ObjectOpened(client, object_id))

    def close(self, client: str, object_id: ObjectId) -> None:
        """The reader closes what it has opened, or what it has not."""
        self.step(m.ObjectClosed(client, object_id.content_id))

    def want(self, client: str, object_id: ObjectId, first: int, end: int) -> int:
        request_id, self._next_request = self._next_request, self._next_request + 1
        event = m.BlocksWanted(request_id, client, object_id.content_id, first, end)
        self.open_requests[request_id] = self.asked[request_id] = event
        self.step(event)
        return request_id

    def settle(self, request_id: int) -> None:
        """The session has handed the file over, or its reader no longer waits."""
        self.open_requests.pop(request_id, None)
        self.unsettled.discard(request_id)
        self.step(m.WantSettled(request_id))

    def hint(self, object_id: ObjectId, first: int, end: int) -> None:
        self.step(m.BlocksHinted(object_id.content_id, first, end))

    def check(self, client: str, extent: ExtentId) -> int:
        request_id, self._next_request = self._next_request, self._next_request + 1
        event = m.CheckAsked(request_id, client, extent)
        self.open_requests[request_id] = event
        self.step(event)
        return request_id

    def announce(self, client: str, stream: str, visits: Iterable[Visit]) -> None:
        listed = tuple(visits)
        self.streams.setdefault(stream, ModelStream(client)).visits.extend(listed)
        self.step(m.OrderAnnounced(client, stream, listed))

    def advance(self, stream: str, num_visits: int) -> None:
        model = self.streams[stream]
        model.position = max(model.position, min(num_visits, len(model.visits)))
        self.step(m.OrderAdvanced(stream, num_visits))

    def close_stream(self, stream: str) -> None:
        del self.streams[stream]
        self.step(m.StreamClosed(stream))

    def release(self, key: FileKey, client: str) -> None:
        self._let_go(key, client, 1)
        self.step(m.ExtentReleased(client, *key))

    def leave(self, client: str) -> None:
        """The reader's process dies."""
        for stream in [name for name, model in self.streams.items() if model.client_id == client]:
            self.close_stream(stream)
        for request_id in [rid for rid, event in self.open_requests.items() if event.client_id == client]:
            del self.open_requests[request_id]
        self.unsettled = {rid for rid in self.unsettled if self.asked[rid].client_id != client}
        for key in list(self.holders):
            if self.holders[key][client] and self.current.get(key[0]) == key[1]:
                self.old.add(key)
            self._let_go(key, client, self.holders[key][client])
        self.clients.discard(client)
        self.step(m.ClientGone(client))

    # -- what the disk and the workers report --

    def found(self, object_id: ObjectId, extent_idx: int, generation: int, blocks: Iterable[int]) -> None:
        """A file from before this daemon; `blocks` are those that it holds."""
        start, end = extent_span(object_id.size_bytes, extent_idx)
        file_bytes = LABEL_BYTES + end - start
        extent = ExtentId(object_id.content_id, extent_idx)
        self.objects[object_id.content_id] = object_id
        self.files[extent, generation] = ModelFile(
            object_id, file_bytes + INDEX_BYTES_PER_EXTENT, is_made=True, good_blocks=set(blocks)
        )
        self.current[extent] = generation
        self.used_generations.add(generation)
        self.old.add((extent, generation))
        self.step(m.StockTaken(file_bytes, 1, generation))
        self.step(m.StockFound((m.ExtentFound(object_id, extent_idx, generation, file_bytes, None),)))

    def found_held(self, object_id: ObjectId, generation: int, file_bytes: int) -> None:
        """A file that a former daemon evicted while a reader had it open; he still has."""
        key = (ExtentId(object_id.content_id, 0), generation)
        self.files[key] = ModelFile(object_id, file_bytes + INDEX_BYTES_PER_EXTENT, is_made=True, is_unlinked=True)
        self.holders[key] = Counter({UNKNOWN_READERS: 1})
        self.looks.append(key)
        self.used_generations.add(generation)
        self.step(m.HeldFound(*key, file_bytes))

    def unknown_readers_let_go(self, key: FileKey) -> None:
        """The disk says that nobody has it open whom this daemon does not know."""
        self.looks.remove(key)
        self.release(key, UNKNOWN_READERS)

    def create_done(self, action: m.CreateExtent, error: CacheError | None = None) -> None:
        self.creations.remove(action)
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        if error is not None:
            self.step(m.ExtentFailed(extent, action.generation, error))
            return
        self.files[extent, action.generation].is_made = True
        self.step(m.ExtentCreated(extent, action.generation))

    def table_done(self, action: m.ReadTable, error: CacheError | None = None) -> None:
        self.tables.remove(action)
        if error is not None:
            self.step(m.ExtentFailed(action.extent, action.generation, error))
            return
        file = self.files.get((action.extent, action.generation))
        present = frozenset(file.good_blocks) if file is not None else frozenset()
        self.step(m.ExtentTableRead(action.extent, action.generation, present))

    def fetch_done(self, action: m.FetchBlocks, error: CacheError | None = None) -> None:
        self.fetches.remove(action)
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        if error is not None:
            self.step(m.BlocksFailed(extent, action.generation, action.first, action.end, error))
            return
        self.files[extent, action.generation].good_blocks.update(range(action.first, action.end))
        self.step(m.BlocksLanded(extent, action.generation, action.first, action.end, action.end - action.first))

    def check_done(self, action: m.CheckBlocks, is_sound: bool = True, error: CacheError | None = None) -> None:
        self.checks.remove(action)
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        blocks = range(action.first, action.end)
        if not is_sound:
            self.files[extent, action.generation].good_blocks.difference_update(blocks)
        self.step(m.BlocksChecked(extent, action.generation, action.first, (is_sound,) * len(blocks), error))

    def probe_done(self, error: CacheError | None = None) -> None:
        self.num_probes -= 1
        self.step(m.DiskProbed(error))

    def evict(self, object_id: ObjectId) -> None:
        self.step(m.EvictAsked(object_id.content_id))

    def set_capacity(self, capacity_bytes: int) -> None:
        self.step(m.CapacityChanged(capacity_bytes))

    def pass_time(self, seconds: float = 0.0) -> list[m.Action]:
        self.now += seconds
        return self.step(m.TimePassed())

    def run_until_quiet(self) -> None:
        """Everything under way ends well, and what follows from it, until nothing is under way; time goes on where needed."""
        for _ in range(2000):
            if self.creations:
                self.create_done(self.creations[0])
            elif self.tables:
                self.table_done(self.tables[0])
            elif self.checks:
                self.check_done(self.checks[0])
            elif self.fetches:
                self.fetch_done(self.fetches[0])
            elif self.num_probes:
                self.probe_done()
            elif self.looks:
                self.unknown_readers_let_go(self.looks[0])
            elif (deadline_s := self.machine.next_deadline_s()) is not None:
                self.pass_time(max(0.0, deadline_s - self.now))
            else:
                return
        raise AssertionError("it never comes to rest")

    # -- the machine's step, and everything that must hold after it --

    def step(self, event: m.Event) -> list[m.Action]:
        bytes_before, files_before = self.disk_bytes, len(self.files)
        actions = self.machine.step(event, self.now)
        now_known = {o.content_id: self.machine.word_base(o.content_id) for o in self.machine.objects()}
        self.bases |= now_known
        for action in actions:
            self._perform(action)
            # After each action, not each step: the disk sees them one by one. (A smaller capacity is reached by and by.)
            assert self.disk_bytes <= max(bytes_before, self.machine.budget.capacity_bytes), action
            assert len(self.files) <= max(files_before, self.machine.budget.max_files), action
        self.bases = now_known
        self.check_invariants()
        return actions

    def _perform(self, action: m.Action) -> None:
        match action:
            case m.PublishWord(word_idx, value):
                self._publish(word_idx, value)
            case m.CreateExtent(object_id, extent_idx, generation):
                assert generation not in self.used_generations, f"generation {generation} comes a second time"
                self.used_generations.add(generation)
                extent = ExtentId(object_id.content_id, extent_idx)
                assert extent not in self.current, f"{extent} has a file already"
                start, end = extent_span(object_id.size_bytes, extent_idx)
                size = LABEL_BYTES + end - start + INDEX_BYTES_PER_EXTENT
                self.files[extent, generation] = ModelFile(object_id, size)
                self.current[extent] = generation
                self.creations.append(action)
            case m.RemoveExtent(extent, generation):
                self._remove(action)
            case m.RemoveHeld(extent, generation):
                assert self.files[extent, generation].is_unlinked, action
                assert set(self.holders[extent, generation]) == {UNKNOWN_READERS}, action
                if (extent, generation) not in self.looks:
                    self.looks.append((extent, generation))
            case m.ReadTable(extent, generation):
                assert self.current[extent] == generation
                assert action not in self.tables, "a table is read twice at once"
                self.tables.append(action)
            case m.FetchBlocks(object_id, extent_idx, generation, first, end):
                extent = ExtentId(object_id.content_id, extent_idx)
                assert self.current[extent] == generation and self.files[extent, generation].is_made, action
                assert 0 < end - first <= BLOCKS_PER_FETCH and extent_of(first) == extent_of(end - 1) == extent_idx
                for block in range(first, end):
                    assert not self._in_hand(object_id.content_id, block), f"block {block} is fetched twice at once"
                    assert self.words[self.word_of_block(object_id, block)] == 0, "a readable block is fetched over"
                    self.num_fetches[object_id.content_id, block] += 1
                self.fetches.append(action)
            case m.CheckBlocks(object_id, extent_idx, generation, first, end):
                extent = ExtentId(object_id.content_id, extent_idx)
                assert self.current[extent] == generation and self.files[extent, generation].is_made, action
                assert 0 < end - first <= BLOCKS_PER_FETCH and extent_of(first) == extent_of(end - 1) == extent_idx
                for block in range(first, end):
                    assert not self._in_hand(object_id.content_id, block), action
                self.checks.append(action)
            case m.ProbeDisk():
                assert self.num_probes == 0, "the disk is probed twice at once"
                self.num_probes += 1
            case m.Answer(request_id):
                self._answer(request_id, action)

    def _publish(self, word_idx: int, value: int) -> None:
        if word_idx == EVICTION_WORD:
            assert value > self.words[EVICTION_WORD], "the count of evictions must grow"
        elif value:
            owner = self._owner_of(word_idx)
            assert owner is not None, f"word {word_idx} belongs to nobody"
            object_id, block, extent_idx = owner
            extent = ExtentId(object_id.content_id, extent_idx)
            assert self.current.get(extent) == value, f"{extent}: generation {value} is not its file's"
            file = self.files[extent, value]
            assert file.is_made and not file.is_unlinked
            if block is not None:
                assert block in file.good_blocks, f"block {block} of {extent} is published but is not there"
        self.words[word_idx] = value

    def _remove(self, action: m.RemoveExtent) -> None:
        extent, generation = action.extent, action.generation
        file = self.files[extent, generation]
        assert self.current.pop(extent) == generation
        assert not any(self._extent_of_want(rid) == extent for rid in self.unsettled), (
            "removed before it was handed over"
        )
        assert not self.busy(extent), f"{extent} is removed while a worker has it in hand"
        # Learned and forgotten within one step (found on disk beyond the bound): it never had a word.
        base = self.bases.get(extent.content_id, max(self.words, default=0) + 1)
        blocks = num_blocks(file.object_id.size_bytes)
        first = extent.extent_idx * BLOCKS_PER_EXTENT
        for block in range(first, min(first + BLOCKS_PER_EXTENT, blocks)):
            assert self.words[base + block] == 0, f"block {block} of {extent} is still published"
        assert self.words[base + blocks + extent.extent_idx] == 0, f"{extent} is still published"
        self.tables = [t for t in self.tables if (t.extent, t.generation) != (extent, generation)]
        file.is_unlinked = True
        assert action.is_held == bool(self.holders.get((extent, generation)))
        assert action.is_old == ((extent, generation) in self.old)
        if action.is_old or action.is_held:
            self.holders.setdefault((extent, generation), Counter())[UNKNOWN_READERS] = 1
        if action.is_old:
            self.looks.append((extent, generation))
        if not self.holders.get((extent, generation)):
            del self.files[extent, generation]

    def _answer(self, request_id: int, answer: m.Answer) -> None:
        assert request_id not in self.answers, f"request {request_id} is answered twice"
        event = self.open_requests.pop(request_id)  # KeyError: nobody asked, or the client has gone
        self.answers[request_id] = answer
        if answer.error is not None or isinstance(event, m.CheckAsked):
            return
        object_id = self.objects[event.content_id]
        assert answer.generation != 0
        self.unsettled.add(request_id)
        for block in range(event.first, event.end):
            word = self.words[self.word_of_block(object_id, block)]
            assert word == answer.generation, f"answered, but block {block} of request {request_id} is not readable"

    def hold_answered(self, request_id: int) -> FileKey | None:
        """What a session does with the answer of a want: hands the file over, if it is still there, and says so."""
        answer, event = self.answers[request_id], self.asked[request_id]
        key = (ExtentId(event.content_id, extent_of(event.first)), answer.generation)
        if answer.error is not None or self.current.get(key[0]) != key[1] or event.client_id not in self.clients:
            return None
        self.hold(key, event.client_id)
        return key

    def hold(self, key: FileKey, client: str) -> None:
        assert self.current.get(key[0]) == key[1], "only a file that is there can be handed over"
        self.holders.setdefault(key, Counter())[client] += 1
        self.step(m.ExtentHeld(client, *key))

    def _let_go(self, key: FileKey, client: str, times: int) -> None:
        held = self.holders.get(key, Counter())
        held[client] -= min(times, held[client])
        self.holders[key] = +held
        if not self.holders[key] and key in self.files and self.files[key].is_unlinked:
            del self.files[key]

    # -- what the world knows --

    @property
    def disk_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def busy(self, extent: ExtentId) -> bool:
        in_hand = [*self.fetches, *self.checks]
        being_made = any(ExtentId(a.object_id.content_id, a.extent_idx) == extent for a in self.creations)
        return being_made or any(ExtentId(a.object_id.content_id, a.extent_idx) == extent for a in in_hand)

    def next_use(self, extent: ExtentId) -> float:
        """Visits until the nearest announced use, by looking at every visit of every stream."""
        distances = [
            float(number - stream.position)
            for stream in self.streams.values()
            for number, visit in enumerate(stream.visits)
            if number >= stream.position and visit.content_id == extent.content_id and visit.end > visit.first
            if extent_of(visit.first) <= extent.extent_idx <= extent_of(visit.end - 1)
        ]
        return min(distances, default=UNKNOWN_USE)

    def word_of_block(self, object_id: ObjectId, block: int) -> int:
        return self.bases[object_id.content_id] + block

    def readable(self, object_id: ObjectId) -> set[int]:
        if not self.machine.is_known(object_id.content_id):
            return set()
        return {b for b in range(num_blocks(object_id.size_bytes)) if self.words[self.word_of_block(object_id, b)]}

    def _extent_of_want(self, request_id: int) -> ExtentId:
        event = self.asked[request_id]
        return ExtentId(event.content_id, extent_of(event.first))

    def _in_hand(self, content_id: str, block: int) -> bool:
        in_hand = [*self.fetches, *self.checks]
        return any(a.object_id.content_id == content_id and a.first <= block < a.end for a in in_hand)

    def _owner_of(self, word_idx: int) -> tuple[ObjectId, int | None, int] | None:
        """Object, block (None for an extent's word) and extent of a word."""
        for content_id, base in self.bases.items():
            object_id = self.objects[content_id]
            blocks, extents = num_blocks(object_id.size_bytes), num_extents(object_id.size_bytes)
            at = word_idx - base
            if 0 <= at < blocks:
                return object_id, at, extent_of(at)
            if blocks <= at < blocks + extents:
                return object_id, None, at - blocks
        return None

    def check_invariants(self) -> None:
        budget = self.machine.budget
        if not self.machine.health.may_read:
            led = [
                owner
                for idx, value in self.words.items()
                if value and (owner := self._owner_of(idx)) and owner[1] is not None
            ]
            checking = {(a.object_id.content_id, block) for a in self.checks for block in range(a.first, a.end)}
            assert {(o.content_id, block) for o, block, _ in led} <= checking, (
                "readers are led to a disk that cannot be read"
            )
        assert budget.used_bytes == self.disk_bytes, "the account of bytes differs from the files that are there"
        assert budget.num_files == len(self.files)
        assert self.machine.in_flight == len(self.fetches) + len(self.checks)
        assert self.machine.in_flight <= self.max_in_flight, "more is under way than the limit"
        held = {k: v for k, v in self.holders.items() if v and k in self.files and self.files[k].is_unlinked}
        assert {key: ghost.holders for key, ghost in budget.ghosts.items()} == held
        spans = sorted(
            (self.machine.word_base(o.content_id), num_blocks(o.size_bytes) + num_extents(o.size_bytes))
            for o in self.machine.objects()
        )
        for (base, count), (next_base, _) in pairwise(spans):
            assert base + count <= next_base or count == 0, "two objects share residency words"
