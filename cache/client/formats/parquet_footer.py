"""Where row groups and their columns lie, out of the footer of a Parquet file. Pure: bytes → values.

pyarrow can say the same, but a damaged footer can end the whole process there (a C++ exception that its Python side does not catch;
pyarrow 26), which fuzzing found within seconds. So the few fields that are needed are read here, from Thrift's compact protocol, and
whatever does not hold together is a ValueError.

Sources: apache/parquet-format src/main/thrift/parquet.thrift; apache/thrift doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_INTEGERS = frozenset({_I16, _I32, _I64})
_MAX_DEPTH = 32
"""Of structs within structs; Parquet's own are at most 6 deep."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One column of one row group."""

    path: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Group:
    num_rows: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Footer:
    num_rows: int
    groups: tuple[Group, ...]
    paths: frozenset[str]
    """Of all columns that have values."""


def parse_footer(data: bytes) -> Footer:
    """The footer of a file, without its last 8 bytes. Raises ValueError for anything that is none."""
    fields = _Reader(data).struct(_FILE)
    groups = tuple(_group(number, found) for number, found in enumerate(_get(fields, 4, list, "row groups")))
    paths = frozenset(chunk.path for group in groups for chunk in group.chunks)
    return Footer(_count(fields, 3, "rows of the file"), groups, paths | _schema_paths(_get(fields, 2, list, "schema")))


def _group(number: int, fields: dict[int, Any]) -> Group:
    what = f"row group {number}"
    chunks = tuple(_chunk(what, chunk) for chunk in _get(fields, 1, list, f"{what}: columns"))
    return Group(_count(fields, 3, f"{what}: rows"), chunks)


def _chunk(group: str, fields: dict[int, Any]) -> Chunk:
    if 1 in fields:
        raise ValueError(f"{group}: a column lies in another file")
    if 3 not in fields:
        raise ValueError(f"{group}: a column is encrypted, or nothing is said of it")
    meta = fields[3]
    path = ".".join(part.decode() for part in _get(meta, 3, list, f"{group}: path of a column"))
    start = _count(meta, 9, f"{group}: column {path!r}: first page")
    dictionary = meta.get(11, 0)
    if 0 < dictionary < start:
        start = dictionary
    return Chunk(path, start, start + _count(meta, 7, f"{group}: column {path!r}: size"))


def _schema_paths(elements: list[dict[int, Any]]) -> frozenset[str]:
    """Paths of the leaves. The schema is stored depth first, each node with the number of its children; the first is the root."""
    paths: set[str] = set()
    open_nodes: list[tuple[str, int]] = []
    for number, element in enumerate(elements):
        name = _get(element, 4, bytes, "name of a column").decode()
        num_children = element.get(5, 0)
        if number:
            if not open_nodes:
                raise ValueError("a schema with more than one root")
            parent, rest = open_nodes.pop()
            if rest > 1:
                open_nodes.append((parent, rest - 1))
            name = f"{parent}.{name}" if parent else name
        if num_children > 0:
            open_nodes.append((name if number else "", num_children))
        elif number:
            paths.add(name)
    if open_nodes:
        raise ValueError("a schema that is cut short")
    return frozenset(paths)


def _get(fields: dict[int, Any], number: int, kind: type, what: str) -> Any:
    value = fields.get(number)
    if not isinstance(value, kind):
        raise ValueError(f"{what}: not said")
    return value


def _count(fields: dict[int, Any], number: int, what: str) -> int:
    value = fields.get(number)
    if not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"{what}: {value!r}")
    return value


_Spec = dict[int, tuple[Any, ...]]
"""Fields that are wanted: number → (kinds of Thrift's,) or (_LIST, spec of a struct, or kinds of its elements), or (_STRUCT, spec)."""

_META: _Spec = {3: (_LIST, _BINARY), 7: (_I64,), 9: (_I64,), 11: (_I64,)}
_CHUNK: _Spec = {1: (_BINARY,), 3: (_STRUCT, _META)}
_GROUP: _Spec = {1: (_LIST, _CHUNK), 3: (_I64,)}
_ELEMENT: _Spec = {4: (_BINARY,), 5: (_I32,)}
_FILE: _Spec = {2: (_LIST, _ELEMENT), 3: (_I64,), 4: (_LIST, _GROUP)}


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self, spec: _Spec, depth: int = 0) -> dict[int, Any]:
        """The wanted fields of a struct; the others are passed over."""
        found: dict[int, Any] = {}
        number = 0
        while True:
            head = self._byte()
            if head == 0:
                return found
            kind, delta = head & 0x0F, head >> 4
            number = number + delta if delta else self._zigzag()
            wanted = spec.get(number)
            if wanted is None:
                self._skip(kind, depth + 1)
            elif kind != wanted[0]:
                raise ValueError(
                    f"a field {number} of type {kind} instead of {wanted[0]} (byte {self._at} of the footer)"
                )
            else:
                found[number] = self._value(kind, wanted[1:], depth + 1)

    def _value(self, kind: int, inner: tuple[Any, ...], depth: int) -> Any:
        if kind in _INTEGERS:
            return self._zigzag()
        if kind == _BINARY:
            return self._binary()
        if kind == _STRUCT:
            return self.struct(inner[0], depth)
        element_kind, count = self._list_head()
        (wanted,) = inner
        if isinstance(wanted, dict):
            if element_kind != _STRUCT and count:
                raise ValueError(f"a list of type {element_kind} instead of structs (byte {self._at} of the footer)")
            return [self.struct(wanted, depth) for _ in range(count)]
        if element_kind != wanted and count:
            raise ValueError(f"a list of type {element_kind} instead of {wanted} (byte {self._at} of the footer)")
        return [self._binary() for _ in range(count)]

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"structs nested deeper than {_MAX_DEPTH}")
        if kind in (_TRUE, _FALSE):
            return
        if kind == _BYTE:
            self._byte()
        elif kind in _INTEGERS:
            self._varint()
        elif kind == _DOUBLE:
            self._take(8)
        elif kind == _BINARY:
            self._binary()
        elif kind in (_LIST, _SET):
            element_kind, count = self._list_head()
            for _ in range(count):
                self._skip_element(element_kind, depth + 1)
        elif kind == _MAP:
            count = self._bounded(self._varint())
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._skip_element(kinds >> 4, depth + 1)
                self._skip_element(kinds & 0x0F, depth + 1)
        elif kind == _STRUCT:
            self._skip_struct(depth)
        else:
            raise ValueError(f"a value of type {kind} (byte {self._at} of the footer)")

    def _skip_struct(self, depth: int) -> None:
        while head := self._byte():
            if not head >> 4:
                self._zigzag()
            self._skip(head & 0x0F, depth + 1)

    def _skip_element(self, kind: int, depth: int) -> None:
        # Booleans take a byte in containers, and none as fields.
        self._skip(_BYTE if kind in (_TRUE, _FALSE) else kind, depth)

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        count = head >> 4
        return head & 0x0F, self._bounded(self._varint() if count == 15 else count)

    def _bounded(self, count: int) -> int:
        if count > len(self._data) - self._at:  # every element takes a byte at least
            raise ValueError(f"a container of {count} elements (byte {self._at} of the footer)")
        return count

    def _binary(self) -> bytes:
        return self._take(self._varint())

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise ValueError(
                f"{length} bytes where {len(self._data) - self._at} are left (byte {self._at} of the footer)"
            )
        self._at += length
        return self._data[self._at - length : self._at]

    def _byte(self) -> int:
        if self._at >= len(self._data):
            raise ValueError("cut short")
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError(f"a number of more than 64 bits (byte {self._at} of the footer)")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
