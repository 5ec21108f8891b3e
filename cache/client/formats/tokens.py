"""Token shards: a header of 64 bytes, then the tokens of a text, one after the other. Our own format, as plain as can
be.

    byte  0   8  magic "RHTOKENS"
    byte  8   2  version, 1
    byte 10   2  bytes of a token: 2 (uint16) or 4 (uint32)
    byte 12   4  zero
    byte 16   8  number of tokens
    byte 24  40  zero, for later versions
    byte 64      tokens

All numbers are little-endian. 64 bytes keep the tokens aligned for a memory map. A reader refuses what it does not
know: another version, other token sizes, more or fewer bytes than the header says.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.client.formats.index import ShardIndex
from cache.client.formats.ports import Readable
from cache.errors import FormatError

MAGIC = b"RHTOKENS"
VERSION = 1
HEADER_BYTES = 64
_HEADER = struct.Struct("<8sHHIQ40x")
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}

Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TokenHeader:
    token_bytes: int
    num_tokens: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return _DTYPES[self.token_bytes]


def pack_tokens(tokens: NDArray[Any], *, token_bytes: int = 2) -> bytes:
    """A token shard with these tokens. ValueError if one of them does not fit.

    >>> import numpy as np
    >>> len(pack_tokens(np.array([1, 2, 3])))
    70
    """
    dtype = _DTYPES[token_bytes]
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be a one-dimensional array of integers, not {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > np.iinfo(dtype).max):
        raise ValueError(
            f"tokens from {tokens.min()} to {tokens.max()} do not fit into {dtype.name}; use token_bytes=4"
        )
    return _HEADER.pack(MAGIC, VERSION, token_bytes, 0, len(tokens)) + tokens.astype(dtype).tobytes()


def parse_header(block: bytes, *, url: str, size_bytes: int) -> TokenHeader:
    """The header of a shard of `size_bytes`. Raises FormatError if it is not one, or if tokens are missing."""
    if len(block) < HEADER_BYTES or block[:8] != MAGIC:
        raise FormatError(
            f"{url}: not a token shard: it begins with {bytes(block[:8])!r} (byte 0)",
            advice="see docs/data.md",
            url=url,
        )
    _, version, token_bytes, reserved, num_tokens = _HEADER.unpack(block[:HEADER_BYTES])
    if version != VERSION or token_bytes not in _DTYPES or reserved or any(block[24:HEADER_BYTES]):
        raise FormatError(
            f"{url}: a token shard of version {version} with tokens of {token_bytes} bytes; this reader knows "
            f"version {VERSION} with 2 or 4 (byte 8)",
            advice="read it with the Railhead that wrote it, or write it again",
            url=url,
            offset=8,
        )
    expected = HEADER_BYTES + num_tokens * token_bytes
    if size_bytes != expected:
        raise FormatError(
            f"{url}: {num_tokens:,} tokens of {token_bytes} bytes make {expected:,} bytes, but the object has {size_bytes:,} "
            f"(byte {min(size_bytes, expected):,})",
            advice="write or upload this shard again",
            url=url,
            offset=min(size_bytes, expected),
        )
    return TokenHeader(token_bytes, num_tokens)


def unpack_tokens(shard: bytes | memoryview, *, url: str = "tokens") -> Tokens:
    """All tokens of a shard, without copying them."""
    header = parse_header(bytes(shard[:HEADER_BYTES]), url=url, size_bytes=len(shard))
    return np.frombuffer(shard, dtype=header.dtype, offset=HEADER_BYTES)


@dataclass(frozen=True)
class TokenFormat:
    """Token shards cut into windows: a sample is `seq_len` tokens and the one that follows.

    Windows begin every `seq_len` tokens, so that every token but a shard's first is predicted exactly once in an
    epoch; tokens at the end of a shard that do not fill a window are left out.
    """

    seq_len: int
    suffix: str = ".tokens"

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"windows of {self.seq_len} tokens; must be at least 1")

    def accepts(self, url: str) -> bool:
        return url.endswith(self.suffix)

    def index(self, shard: Readable) -> ShardIndex:
        header = parse_header(shard.read(0, min(HEADER_BYTES, shard.size)), url=shard.url, size_bytes=shard.size)
        num_windows = max(0, (header.num_tokens - 1) // self.seq_len)
        # The dtype travels in the name of the member, so that a window needs nothing but its bytes to be read.
        return ShardIndex(
            key_lengths=np.zeros(num_windows, dtype=np.int64),
            key_bytes=b"",
            member_counts=np.ones(num_windows, dtype=np.int64),
            offsets=HEADER_BYTES + np.arange(num_windows, dtype=np.int64) * self.seq_len * header.token_bytes,
            lengths=np.full(num_windows, (self.seq_len + 1) * header.token_bytes, dtype=np.int64),
            extensions=(header.dtype.name,),
            extension_ids=np.zeros(num_windows, dtype=np.int32),
        )
