"""The indices of many shards in one piece, to be kept beside the cache or published beside the shards. Pure: bytes ↔ values.

    byte  0    8  magic "RHINDEX1"
    byte  8    4  CRC-32C of everything from byte 16 on
    byte 12    4  length of the header
    byte 16       header: JSON {format, extensions, shards: [[url, etag, size, samples, members, key bytes]], skipped, units}
    then          arrays over all shards, little-endian: member_counts, key_lengths, extension_ids (int32), offsets, lengths (int64); keys;
                  sizes of the units (int64), where the header says units: true ("samples" above are units then)

A pack is believed of a shard only where url, etag and size are those of the object that is there now. What does not hold together is a
FormatError and nothing else: whoever reads packs builds the index anew then. Urls below `root` are stored relative to it, so that a
prefix may be copied with its index.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import crc32c
import numpy as np
from numpy.typing import NDArray

from cache.client.formats.index import MAX_SKIPPED_KEPT, Shard, ShardIndex
from cache.errors import FormatError

MAGIC = b"RHINDEX1"
FOLDER = ".railhead-index"
"""Below the prefix of the shards. What lies in it is no shard of any format."""

_PREFIX = struct.Struct("<8sII")
_DTYPES: tuple[np.dtype[Any], ...] = (
    np.dtype("<i4"),
    np.dtype("<i4"),
    np.dtype("<i4"),
    np.dtype("<i8"),
    np.dtype("<i8"),
)
"""member_counts, key_lengths, extension_ids, offsets, lengths."""


def format_identity(shard_format: object) -> str | None:
    """Names a format with all its settings and the version of its index; None if its indices are not to be kept."""
    version = getattr(shard_format, "index_version", None)
    return None if version is None else f"{type(shard_format).__module__}.{shard_format!r} v{version}"


def pack_url(root: str, identity: str) -> str:
    """Where the pack of a format is published below the prefix `root`."""
    kind = identity.partition("(")[0].rpartition(".")[2].removesuffix("Format").lower()
    return f"{root.rstrip('/')}/{FOLDER}/{kind}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}.idx"


def pack_key(roots: list[str], identity: str) -> str:
    """Under which name the node's cache keeps the pack of these prefixes: 32 hex digits."""
    return hashlib.blake2b("\0".join([identity, *roots]).encode(), digest_size=16).hexdigest()


def encode_pack(root: str, identity: str, indices: Mapping[Shard, ShardIndex]) -> bytes:
    """The pack of these shards, in their order."""
    extensions = sorted({extension for index in indices.values() for extension in index.extensions})
    number = {extension: idx for idx, extension in enumerate(extensions)}
    below = root.rstrip("/") + "/"
    skipped = [[shard_idx, *entry] for shard_idx, index in enumerate(indices.values()) for entry in index.skipped][
        :MAX_SKIPPED_KEPT
    ]
    header: dict[str, Any] = {
        "format": identity,
        "extensions": extensions,
        "shards": [
            [
                shard.url.removeprefix(below),
                shard.etag,
                shard.size_bytes,
                len(index.member_counts),
                len(index.offsets),
                len(index.key_bytes),
            ]
            for shard, index in indices.items()
        ],
        "skipped": skipped,
    }
    unit_sizes = [index.unit_sizes for index in indices.values() if index.unit_sizes is not None]
    if unit_sizes:
        # A shard without units in a data set that has some: every sample is a unit.
        header["units"] = True
        unit_sizes = [
            np.ones(len(index.member_counts), dtype=np.int64) if index.unit_sizes is None else index.unit_sizes
            for index in indices.values()
        ]
    columns: list[tuple[NDArray[Any], ...]] = [
        (
            index.member_counts,
            index.key_lengths,
            np.array([number[extension] for extension in index.extensions] or [0], dtype=np.int32)[index.extension_ids],
            index.offsets,
            index.lengths,
        )
        for index in indices.values()
    ]
    arrays = [
        np.concatenate([np.empty(0, dtype), *(column[idx] for column in columns)]).astype(dtype).tobytes()
        for idx, dtype in enumerate(_DTYPES)
    ]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    keys = [index.key_bytes for index in indices.values()]
    body = b"".join([text, *arrays, *keys, *(sizes.astype("<i8").tobytes() for sizes in unit_sizes)])
    return _PREFIX.pack(MAGIC, crc32c.crc32c(body), len(text)) + body


def decode_pack(root: str, identity: str, data: bytes, *, where: str) -> dict[Shard, ShardIndex]:
    """The indices of a pack. Raises FormatError for anything that is not a whole and consistent pack of this format; `where` names it."""
    if len(data) < _PREFIX.size or data[:8] != MAGIC:
        raise FormatError(f"{where}: not an index of shards: it begins with {bytes(data[:8])!r}", url=where)
    _, crc, header_len = _PREFIX.unpack_from(data)
    if crc32c.crc32c(memoryview(data)[_PREFIX.size :]) != crc:
        raise FormatError(f"{where}: an index that does not match its checksum", url=where)
    try:
        header = json.loads(data[_PREFIX.size : _PREFIX.size + header_len])
        if header["format"] != identity:
            raise FormatError(f"{where}: an index of {header['format']}, not of {identity}", url=where)
        return _unpack(root, header, data, _PREFIX.size + header_len)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, UnicodeError) as error:
        raise FormatError(f"{where}: an index that contradicts itself: {error}", url=where) from error


def _unpack(root: str, header: dict[str, Any], data: bytes, at: int) -> dict[Shard, ShardIndex]:
    rows, extensions = header["shards"], tuple(header["extensions"])
    num_samples, num_members, num_key_bytes = (sum(_count(row[idx]) for row in rows) for idx in (3, 4, 5))
    arrays: list[NDArray[Any]] = []
    for count, dtype in zip((num_samples, num_samples, num_members, num_members, num_members), _DTYPES, strict=True):
        arrays.append(np.frombuffer(data, dtype, count, at))
        at += count * dtype.itemsize
    has_units = header.get("units", False) is True
    expected = at + num_key_bytes + (8 * num_samples if has_units else 0)
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes instead of {expected}")
    unit_sizes = np.frombuffer(data, "<i8", num_samples, at + num_key_bytes) if has_units else None
    if unit_sizes is not None and unit_sizes.size and not 1 <= int(unit_sizes.min()) <= int(unit_sizes.max()) < 2**40:
        raise ValueError("a unit of no or of impossibly many samples")
    member_counts, key_lengths, extension_ids, offsets, lengths = arrays
    is_sound = (
        min((int(array.min()) for array in arrays if array.size), default=0) >= 0
        and (not extension_ids.size or int(extension_ids.max()) < len(extensions))
        and all(isinstance(extension, str) for extension in extensions)
    )
    if not is_sound:
        raise ValueError("a number in it is out of bounds")
    skipped: dict[int, list[tuple[str, str]]] = {}
    for shard_idx, name, reason in header["skipped"]:
        skipped.setdefault(int(shard_idx), []).append((str(name), str(reason)))
    found: dict[Shard, ShardIndex] = {}
    sample = member = 0
    for shard_idx, (url, etag, size, samples, members, key_bytes) in enumerate(rows):
        last_sample, last_member = sample + samples, member + members
        index = ShardIndex(
            key_lengths=key_lengths[sample:last_sample].astype(np.int64),
            key_bytes=data[at : at + key_bytes],
            member_counts=member_counts[sample:last_sample].astype(np.int64),
            offsets=offsets[member:last_member].astype(np.int64),
            lengths=lengths[member:last_member].astype(np.int64),
            extensions=extensions,
            extension_ids=extension_ids[member:last_member].astype(np.int32),
            skipped=tuple(skipped.get(shard_idx, ())),
            unit_sizes=_units(unit_sizes, sample, last_sample),
        )
        _check(index, _count(size))
        shard = Shard(str(url) if "://" in url else f"{root.rstrip('/')}/{url}", str(etag), size)
        found[shard] = index
        sample, member, at = last_sample, last_member, at + key_bytes
    return found


def _units(sizes: NDArray[Any] | None, first: int, last: int) -> NDArray[np.int64] | None:
    """The units of one shard; None where each sample is one, as in a shard without units."""
    if sizes is None or bool((sizes[first:last] == 1).all()):
        return None
    return sizes[first:last].astype(np.int64)


def _check(index: ShardIndex, size_bytes: int) -> None:
    """What a reader relies on: members within the shard, every member and every key belonging to a sample."""
    if int(index.member_counts.sum()) != len(index.offsets) or int(index.key_lengths.sum()) != len(index.key_bytes):
        raise ValueError("samples and members do not add up")
    if index.offsets.size and int(index.offsets.max()) > size_bytes - int(index.lengths[index.offsets.argmax()]):
        raise ValueError("a member lies beyond the end of its shard")
    if index.offsets.size and bool((index.lengths > size_bytes - index.offsets).any()):
        raise ValueError("a member lies beyond the end of its shard")


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
