"""The index: which extent files there are and what they belong to. SQLite in WAL mode; one thread uses it.

It saves reading a label per file at the start; it is never the only copy of anything: files describe themselves (store/format.py), so
an index that is lost or damaged is made again from them.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from cache.blocks import ExtentId, ObjectId

log = logging.getLogger("railhead.cache")

_ROWS = "SELECT url, etag, size_bytes, extent_idx, generation, file_bytes FROM extents JOIN objects USING (content_id)"


@dataclass(frozen=True)
class IndexRow:
    object_id: ObjectId
    extent_idx: int
    generation: int
    file_bytes: int

    @property
    def extent(self) -> ExtentId:
        return ExtentId(self.object_id.content_id, self.extent_idx)


class Index:
    """Open index. A damaged file is set aside and an empty index takes its place (`was_damaged`)."""

    def __init__(self, path: Path) -> None:
        self.was_damaged = False
        try:
            self._db = self._open(path)
        except sqlite3.DatabaseError:
            self.was_damaged = True
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._db = self._open(path)

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA wal_autocheckpoint=256")
            db.executescript(
                """
                CREATE TABLE IF NOT EXISTS objects(
                    content_id TEXT PRIMARY KEY, url TEXT NOT NULL, etag TEXT NOT NULL, size_bytes INTEGER NOT NULL
                ) WITHOUT ROWID;
                CREATE TABLE IF NOT EXISTS extents(
                    content_id TEXT NOT NULL, extent_idx INTEGER NOT NULL, generation INTEGER NOT NULL, file_bytes INTEGER NOT NULL,
                    PRIMARY KEY (content_id, extent_idx)
                ) WITHOUT ROWID;
                """
            )
            db.execute(_ROWS + " LIMIT 0")  # other columns under our names: not our index
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
        except BaseException:
            db.close()
            raise
        return db

    def rows(self) -> list[IndexRow]:
        return [
            IndexRow(ObjectId(url, etag, size), idx, gen, nbytes)
            for url, etag, size, idx, gen, nbytes in self._db.execute(_ROWS)
        ]

    def files(self) -> list[tuple[str, int, int, int]]:
        """Every extent file as (content id, extent_idx, generation, file_bytes), the oldest first."""
        query = "SELECT content_id, extent_idx, generation, file_bytes FROM extents ORDER BY generation"
        return self._db.execute(query).fetchall()

    def objects(self, content_ids: Sequence[str]) -> dict[str, ObjectId]:
        """What these are the ids of, as far as it is known and true: a row that contradicts its own id is passed over."""
        marks = ",".join("?" * len(content_ids))
        query = f"SELECT content_id, url, etag, size_bytes FROM objects WHERE content_id IN ({marks})"
        found = {cid: ObjectId(url, etag, size) for cid, url, etag, size in self._db.execute(query, list(content_ids))}
        return {content_id: oid for content_id, oid in found.items() if oid.content_id == content_id}

    def add(self, rows: Iterable[IndexRow]) -> None:
        """All of them or none."""
        with self._transaction():
            for row in rows:
                oid = row.object_id
                self._db.execute(
                    "INSERT OR REPLACE INTO objects VALUES (?,?,?,?)",
                    (oid.content_id, oid.url, oid.etag, oid.size_bytes),
                )
                self._db.execute(
                    "INSERT OR REPLACE INTO extents VALUES (?,?,?,?)",
                    (oid.content_id, row.extent_idx, row.generation, row.file_bytes),
                )

    def adopt(self, rows: Iterable[IndexRow]) -> None:
        """Adds those of which no other file is known."""
        known = "SELECT 1 FROM extents WHERE content_id=? AND extent_idx=?"
        self.add(row for row in rows if self._db.execute(known, astuple(row.extent)).fetchone() is None)

    def remove(self, extents: Iterable[tuple[ExtentId, int]]) -> None:
        """Forgets these extent files, and the objects of which none is left."""
        with self._transaction():
            for extent, generation in extents:
                key = (extent.content_id, extent.extent_idx, generation)
                self._db.execute("DELETE FROM extents WHERE content_id=? AND extent_idx=? AND generation=?", key)
                self._db.execute(
                    "DELETE FROM objects WHERE content_id=?1 AND NOT EXISTS (SELECT 1 FROM extents WHERE content_id=?1)",
                    (extent.content_id,),
                )

    def close(self) -> None:
        self._db.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


@contextlib.contextmanager
def index_errors() -> Iterator[None]:
    """The index only saves time at the next start: that it cannot be read or written is said and survived."""
    try:
        yield
    except sqlite3.Error as error:
        log.warning("the index does not work (%s); the next start reads the files instead", error)


class _Transaction:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN")

    def __exit__(self, exc_type: object, exc: object, tb: object) -> None:
        self._db.execute("COMMIT" if exc_type is None else "ROLLBACK")
