"""The headers of a tar archive, read without its bodies.

Knows the file format and nothing of samples. Every header's checksum is verified, so that a wrong offset can never
become a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cache.client.formats.ports import Readable
from cache.errors import FormatError

BLOCK = 512
MAX_EXTENDED_HEADER_BYTES = 1024 * 1024
"""Long names and PAX records beyond this are not names but damage; without a bound, a broken size would be read into
memory."""

NEAR_BYTES = 16 * 1024
WINDOW_BYTES = 256 * 1024
FAR_READ_BYTES = 4 * BLOCK
"""Where headers lie closer than NEAR_BYTES, a window of 256 KiB holds many of them (bodies of small images, labels);
where they lie far apart, only as much is read as a PAX header, its records and the header after it take."""

_REASONS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": "directory",
    b"6": "named pipe",
}
_WITHOUT_DATA = frozenset(_REASONS)
_REGULAR = frozenset({b"0", b"\0", b"7"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One archive member: where its data lies, or why it is none of ours."""

    name: str
    offset: int
    """First byte of the data in the archive."""
    size: int
    url: str
    reason_to_skip: str = ""

    def error(self, message: str, advice: str = "") -> FormatError:
        return FormatError(
            f"{self.url}: {message} (byte {self.offset})", advice=advice, url=self.url, offset=self.offset
        )


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    size: int
    type: bytes
    is_extended_sparse: bool


def entries(archive: Readable, *, require_end_marker: bool = True) -> Iterator[Entry]:
    """All members of an archive, in order. Raises FormatError at the first byte that does not fit."""
    reader = _HeaderReader(archive)
    reader.refuse_compressed()
    position = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    pax_global: dict[str, str] = {}
    while True:
        if position == archive.size and not require_end_marker:
            return
        block = reader.block(position)
        if not any(block):
            return
        header = _parse(block, archive.url, position)
        data = position + BLOCK
        if header.type in (b"L", b"K", b"x", b"g"):
            body = reader.extended(data, header.size)
            if header.type == b"L":
                long_name = _text(body)
            elif header.type == b"x":
                pax = _pax_records(body, archive.url, data)
            elif header.type == b"g":
                pax_global |= _pax_records(body, archive.url, data)
            position = data + _padded(header.size)
            continue
        records = pax_global | pax
        if header.is_extended_sparse:
            data = reader.after_sparse_headers(data)
        name = records.get("path", long_name if long_name is not None else header.name)
        size = 0 if header.type in _WITHOUT_DATA else _pax_size(records, header.size, archive.url, position)
        if data + size > archive.size:
            raise _error(
                archive.url,
                position,
                f"cut short: {name!r} should have {size:,} bytes from {data:,} on, but the archive ends at {archive.size:,}",
                "write or upload this shard again",
            )
        yield Entry(name, data, size, archive.url, _reason_to_skip(header, name, records))
        position = data + _padded(size)
        long_name, pax = None, {}


class _HeaderReader:
    """Blocks of an archive through a window, which is large where headers are close to each other."""

    def __init__(self, archive: Readable) -> None:
        self._archive = archive
        self._window = b""
        self._window_start = 0
        self._last_read = 0

    def block(self, position: int) -> bytes:
        """The 512 bytes of a header. Raises FormatError where the archive ends before."""
        if position + BLOCK > self._archive.size:
            raise _error(
                self._archive.url,
                min(position, self._archive.size),
                f"cut short: a header should be at {position:,}, but the archive ends at {self._archive.size:,} without its end marker",
                "write or upload this shard again, or read it with TarFormat(require_end_marker=False) if it was written so",
            )
        return self._read(position, BLOCK)

    def extended(self, position: int, size: int) -> bytes:
        """The body of a header that extends the next one."""
        if size > MAX_EXTENDED_HEADER_BYTES:
            raise _error(
                self._archive.url, position, f"an extended header of {size:,} bytes; that is damage, not a name"
            )
        if position + size > self._archive.size:
            raise _error(
                self._archive.url,
                position,
                f"cut short: an extended header of {size:,} bytes, but the archive ends at {self._archive.size:,}",
                "write or upload this shard again",
            )
        return self._read(position, size)

    def after_sparse_headers(self, position: int) -> int:
        """Where the data of an old GNU sparse file begins: after a chain of further header blocks."""
        while True:
            is_last = not self.block(position)[504]
            position += BLOCK
            if is_last:
                return position

    def refuse_compressed(self) -> None:
        """A compressed archive has no offsets; say so instead of 'bad checksum'."""
        start = self._read(0, min(BLOCK, self._archive.size))
        if not start:
            raise _error(self._archive.url, 0, "empty: not even the end marker of an archive", "write this shard again")
        for magic, kind in (
            (b"\x1f\x8b", "gzip"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"BZh", "bzip2"),
            (b"\xfd7zXZ", "xz"),
        ):
            if start.startswith(magic):
                raise _error(
                    self._archive.url,
                    0,
                    f"compressed with {kind}: samples cannot be read from the middle of it",
                    "store the archive uncompressed; compress its members if they need it (images and audio already are)",
                )

    def _read(self, position: int, length: int) -> bytes:
        start = position - self._window_start
        if start < 0 or start + length > len(self._window):
            is_near = position - self._last_read <= max(NEAR_BYTES, len(self._window) + NEAR_BYTES)
            wanted = max(length, WINDOW_BYTES if is_near else FAR_READ_BYTES)
            self._window = self._archive.read(position, min(wanted, self._archive.size - position))
            self._window_start, start = position, 0
        self._last_read = position
        found = self._window[start : start + length]
        if len(found) != length:
            raise _error(self._archive.url, position, f"{len(found)} bytes were read where {length} are")
        return found


def _parse(block: bytes, url: str, position: int) -> _Header:
    stored = _number(block[148:156], url, position, "checksum")
    unsigned = sum(block) - sum(block[148:156]) + 8 * 0x20
    if stored != unsigned and stored != _signed_sum(block):
        raise _error(
            url,
            position,
            f"not a tar header: its checksum is {stored}, its bytes sum up to {unsigned}",
            "the shard is damaged, or not a tar archive",
        )
    name = _text(block[:100])
    kind = block[156:157]
    if block[257:263] == b"ustar\0" and block[345] != 0:
        name = f"{_text(block[345:500])}/{name}"
    if kind == b"\0" and name.endswith("/"):  # how v7 archives mark a directory
        kind = b"5"
    size = _number(block[124:136], url, position, "size")
    return _Header(name, size, kind, is_extended_sparse=kind == b"S" and block[482] != 0)


def _signed_sum(block: bytes) -> int:
    """The checksum as some old writers made it, of signed chars: every byte ≥ 128 counts 256 less."""
    signed = sum(byte - 256 if byte >= 0x80 else byte for byte in block[:148] + block[156:])
    return signed + 8 * 0x20


def _number(field: bytes, url: str, position: int, what: str) -> int:
    """An octal number with blanks around it, or, with the top bit set, a binary one (GNU, star)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    # int() alone would accept signs, underscores and other digits.
    if text.strip(b"01234567"):
        raise _error(
            url, position, f"not a tar header: its {what} reads {field!r}", "the shard is damaged, or not a tar archive"
        )
    return int(text or b"0", 8)


def _pax_records(body: bytes, url: str, position: int) -> dict[str, str]:
    """`len key=value\\n` records, where len counts the whole record."""
    records = {}
    at = 0
    while at < len(body) and body[at] != 0:
        blank = body.find(b" ", at, at + 20)
        digits = body[at:blank] if blank > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = body[blank + 1 : end - 1].partition(b"=")
        if not equals or end > len(body) or body[end - 1 : end] != b"\n":
            raise _error(
                url, position + at, f"a PAX record that cannot be read: {body[at : at + 40]!r}", "the shard is damaged"
            )
        records[_text(key)] = value.decode("utf-8", "surrogateescape")
        at = end
    return records


def _pax_size(records: dict[str, str], size: int, url: str, position: int) -> int:
    text = records.get("size")
    if text is None:
        return size
    if not (text.isascii() and text.isdigit()):
        raise _error(url, position, f"a PAX header gives the size {text!r}", "the shard is damaged")
    return int(text)


def _reason_to_skip(header: _Header, name: str, records: dict[str, str]) -> str:
    if header.type in _REASONS:
        return _REASONS[header.type]
    if header.type == b"S" or any(key.startswith("GNU.sparse.") for key in records):
        return "sparse file"
    if header.type not in _REGULAR:
        return f"type {header.type.decode('latin-1')!r}"
    if name.endswith("/"):
        return "directory"
    return ""


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _error(url: str, position: int, message: str, advice: str = "") -> FormatError:
    return FormatError(f"{url}: {message} (byte {position:,})", advice=advice, url=url, offset=position)
