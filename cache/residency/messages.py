"""What the machine is told and what it asks for. Events are past facts, actions are imperatives; all plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cache.blocks import ExtentId, ObjectId
from cache.errors import CacheError
from cache.order.lookahead import Visit
from cache.order.prospect import Outline

if TYPE_CHECKING:
    from cache.order.outline import Spans, Table
    from cache.order.schedule import Schedule

# -- events --


@dataclass(frozen=True)
class ObjectOpened:
    """A reader (or an announced order) needs this generation of an object to be known."""

    client_id: str
    object_id: ObjectId


@dataclass(frozen=True)
class ObjectClosed:
    """As often as it was opened: then its client needs it to be known no longer."""

    client_id: str
    content_id: str


@dataclass(frozen=True)
class ExtentFound:
    """Recovery found an extent file; `present` are the blocks that its table claims, unverified."""

    object_id: ObjectId
    extent_idx: int
    generation: int
    file_bytes: int
    present: frozenset[int] | None
    """None: the table has not been read yet (ExtentTableRead follows when somebody needs it)."""


@dataclass(frozen=True)
class StockTaken:
    """So many extent files are here from before this daemon: they count from now on. StockFound or StockLost follows for each."""

    file_bytes: int
    num_files: int
    last_generation: int


@dataclass(frozen=True)
class StockFound:
    """Some of the files that StockTaken has counted."""

    found: tuple[ExtentFound, ...]


@dataclass(frozen=True)
class StockLost:
    """One of them could not be used, and is gone."""

    file_bytes: int


@dataclass(frozen=True)
class HeldFound:
    """An evicted file is still on the disk, held open by somebody who is no reader of this daemon. Its bytes count until an ExtentReleased
    by UNKNOWN_READERS follows."""

    extent: ExtentId
    generation: int
    file_bytes: int


@dataclass(frozen=True)
class ExtentTableRead:
    extent: ExtentId
    generation: int
    present: frozenset[int]


@dataclass(frozen=True)
class BlocksWanted:
    """A reader waits for the blocks [first, end) of one extent. `for_peer`: the reader is another node's daemon, which asks their owner:
    they come from the origin, never from a further peer."""

    request_id: int
    client_id: str
    content_id: str
    first: int
    end: int
    for_peer: bool = False


@dataclass(frozen=True)
class WantSettled:
    """Who asked has been given the file, or no longer waits. Until then an answered request keeps its extent: else what was fetched
    for one reader would be evicted for the next before it was read, and so on for ever."""

    request_id: int


@dataclass(frozen=True)
class BlocksHinted:
    """A reader will probably want these blocks soon; nobody waits."""

    content_id: str
    first: int
    end: int


@dataclass(frozen=True)
class CheckAsked:
    """Somebody wants an extent's readable blocks read back and compared with their checksums."""

    request_id: int
    client_id: str
    extent: ExtentId


@dataclass(frozen=True)
class ExtentHeld:
    """A reader was given the open file of an extent."""

    client_id: str
    extent: ExtentId
    generation: int


@dataclass(frozen=True)
class ExtentReleased:
    client_id: str
    extent: ExtentId
    generation: int


@dataclass(frozen=True)
class ClientGone:
    client_id: str


@dataclass(frozen=True)
class OrderAnnounced:
    client_id: str
    stream_id: str
    visits: tuple[Visit, ...]


@dataclass(frozen=True)
class OrderAdvanced:
    stream_id: str
    num_visits: int


@dataclass(frozen=True)
class OrderOutlined:
    """What a reader will use beyond the visits that it announces."""

    client_id: str
    stream_id: str
    outline: Outline


@dataclass(frozen=True)
class EpochComputed:
    """The answer to ComputeEpoch."""

    group: int
    epoch: int
    spans: Spans


@dataclass(frozen=True)
class StreamClosed:
    stream_id: str


@dataclass(frozen=True)
class ExtentCreated:
    extent: ExtentId
    generation: int


@dataclass(frozen=True)
class ExtentFailed:
    """The file could not be made or written; the local disk is at fault."""

    extent: ExtentId
    generation: int
    error: CacheError


@dataclass(frozen=True)
class BlocksLanded:
    """A fetch is over: its blocks [first, end) are in their file."""

    extent: ExtentId
    generation: int
    first: int
    end: int
    num_bytes: int
    write_s: float = 0.0
    """How long the local disk took to take it."""
    seconds: float = 0.0
    """What the fetch took, 0 if that says nothing about where it came from."""
    source: str = ""
    """As in FetchBlocks."""
    lender: str = ""
    """The peer that the bytes came from; empty: the origin."""


@dataclass(frozen=True)
class BlocksFailed:
    """A fetch of the blocks [first, end) is over, and brought only those before `landed`, if any."""

    extent: ExtentId
    generation: int
    first: int
    end: int
    error: CacheError
    landed: int = 0
    source: str = ""
    """As in FetchBlocks."""


@dataclass(frozen=True)
class BlocksChecked:
    """The blocks from `first` on were read back; `sound` says of each whether it matched its checksum."""

    extent: ExtentId
    generation: int
    first: int
    sound: tuple[bool, ...]
    disk_error: CacheError | None = None
    """Why they are not sound, when the disk could not read them; None: their bytes are others."""
    read_s: float = 0.0


@dataclass(frozen=True)
class EvictAsked:
    """A person asks that an object leaves the disk."""

    content_id: str


@dataclass(frozen=True)
class PinsChanged:
    """All urls that are pinned now. An object that is one of them, or below one of them, is not evicted to make room for others."""

    urls: tuple[str, ...]


@dataclass(frozen=True)
class CapacityChanged:
    """A new bound; None leaves the one on files as it is."""

    capacity_bytes: int
    max_files: int | None = None


@dataclass(frozen=True)
class DiskSeen:
    """What the file system has left for everybody, and what of it was ours at that moment. None: it does not count inodes."""

    used_bytes: int
    num_files: int
    free_bytes: int
    free_files: int | None


@dataclass(frozen=True)
class DiskTroubled:
    """The local disk refused or was too slow at something that belongs to no extent."""

    error: CacheError


@dataclass(frozen=True)
class DiskProbed:
    """A ProbeDisk has ended; `error`: what went wrong."""

    error: CacheError | None


@dataclass(frozen=True)
class ExtentSuspected:
    """A reader could not read a file that it was given: its blocks are to be read back."""

    extent: ExtentId


@dataclass(frozen=True)
class ScrubDue:
    """Time to read a block back, if nobody needs the disk for something better."""


@dataclass(frozen=True)
class SpaceFound:
    """A file that is no extent, and takes space of the cache, was found at the start."""

    size_bytes: int


@dataclass(frozen=True)
class SpaceAsked:
    """Somebody wants to write such a file. Answered at once."""

    request_id: int
    client_id: str
    size_bytes: int


@dataclass(frozen=True)
class SpaceReturned:
    size_bytes: int


@dataclass(frozen=True)
class TimePassed:
    """A deadline that `Residency.next_deadline_s` named has come."""


Event = (
    ObjectOpened
    | ObjectClosed
    | ExtentFound
    | StockTaken
    | StockFound
    | StockLost
    | HeldFound
    | ExtentTableRead
    | BlocksWanted
    | WantSettled
    | BlocksHinted
    | CheckAsked
    | ExtentHeld
    | ExtentReleased
    | ClientGone
    | OrderAnnounced
    | OrderOutlined
    | EpochComputed
    | OrderAdvanced
    | StreamClosed
    | ExtentCreated
    | ExtentFailed
    | BlocksLanded
    | BlocksFailed
    | BlocksChecked
    | EvictAsked
    | PinsChanged
    | CapacityChanged
    | DiskSeen
    | DiskTroubled
    | DiskProbed
    | ExtentSuspected
    | ScrubDue
    | SpaceFound
    | SpaceAsked
    | SpaceReturned
    | TimePassed
)

# -- actions --


@dataclass(frozen=True)
class PublishWord:
    """Store one residency word. Executed at once and in order: eviction's zeros precede the unlink."""

    word_idx: int
    value: int


@dataclass(frozen=True)
class CreateExtent:
    object_id: ObjectId
    extent_idx: int
    generation: int


@dataclass(frozen=True)
class RemoveExtent:
    """Unlink the file; or, while somebody holds it open, set it aside under another name, so that a daemon that comes after this one still
    counts it."""

    extent: ExtentId
    generation: int
    is_held: bool = False
    """Readers that this daemon knows hold it: RemoveHeld follows when the last has let go."""
    is_old: bool = False
    """Readers of whom it hears nothing may hold it: say (by an ExtentReleased of UNKNOWN_READERS) when none does. It counts until then."""


@dataclass(frozen=True)
class RemoveHeld:
    """No reader that this daemon knows holds the evicted file any more: remove what was set aside, and say (by an ExtentReleased of
    UNKNOWN_READERS) when it is gone. It counts until then."""

    extent: ExtentId
    generation: int


@dataclass(frozen=True)
class ReadTable:
    extent: ExtentId
    generation: int


@dataclass(frozen=True)
class FetchBlocks:
    """One request to the origin: the blocks [first, end) of one extent, at most BLOCKS_PER_FETCH."""

    object_id: ObjectId
    extent_idx: int
    generation: int
    first: int
    end: int
    is_demand: bool
    source: str = ""
    """The peer that is to be asked first; empty: the origin."""


@dataclass(frozen=True)
class CheckBlocks:
    """Read the blocks [first, end) of one extent back, at most BLOCKS_PER_FETCH. `from_device`: past the page cache (nobody is about to
    read them)."""

    object_id: ObjectId
    extent_idx: int
    generation: int
    first: int
    end: int
    from_device: bool = False


@dataclass(frozen=True)
class ProbeDisk:
    """Try whether a file can be written and read back again."""


@dataclass(frozen=True)
class ComputeEpoch:
    """Work out when an epoch uses each extent (order/outline.py: `spans`), and report it by EpochComputed. Takes up to a second for very
    many objects, so it is done where it holds nobody up."""

    group: int
    epoch: int
    table: Table
    schedule: Schedule
    ranks: tuple[int, ...]
    world_size: int


@dataclass(frozen=True)
class Answer:
    """The end of a request: the blocks are readable in `generation`, or `error` says why not. `cause` says what was waited for."""

    request_id: int
    generation: int = 0
    cause: str = "hit"
    error: CacheError | None = field(default=None)


Action = (
    PublishWord
    | CreateExtent
    | RemoveExtent
    | RemoveHeld
    | ReadTable
    | FetchBlocks
    | CheckBlocks
    | ProbeDisk
    | ComputeEpoch
    | Answer
)
