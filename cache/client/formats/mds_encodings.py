"""Values of MosaicML's MDS columns: bytes → Python, by the name of the encoding. Pure.

Numbers, strings, JSON and arrays come as MosaicML's own reader gives them. Images stay the bytes of their file ("jpeg", "png" and lists
of them), so that one decoder serves all formats; `decode_images` opens them with Pillow as MosaicML does. `pkl` runs code of whoever
wrote the shard, so it needs to be allowed by name.

Source: mosaicml-streaming 0.13, streaming/base/format/mds/encodings.py.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

Decoder = Callable[[bytes], Any]

_SCALARS = (
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64"),
)
_ARRAY_DTYPES = {
    8: "u1",
    9: "i1",
    16: "<u2",
    17: "<i2",
    18: "<f2",
    32: "<u4",
    33: "<i4",
    34: "<f4",
    64: "<u8",
    65: "<i8",
    66: "<f8",
}
_SHAPE_DTYPES = ("u1", "<u2", "<u4", "<u8")
_IMAGES = ("jpeg", "png")
_IMAGE_LISTS = ("jpeg_array", "jpegarray", "list[jpeg]", "list[png]")


def decoder_for(encoding: str, *, allow_pickle: bool = False, decode_images: bool = False) -> Decoder:
    """What turns a column's bytes into its value. The decoder raises ValueError for bytes that are none of this encoding's.

    Raises ValueError for an encoding that is unknown, and for one that is not allowed; its text completes "column x: …".

    >>> decoder_for("int")(bytes([5, 0, 0, 0, 0, 0, 0, 0]))
    5
    """
    name, _, config = encoding.partition(":")
    if name == "ndarray":
        return _array_decoder(config)
    if config:
        raise ValueError(f"unknown encoding {encoding!r}")
    if name in _SCALARS:
        return _scalar_decoder(np.dtype(name).newbyteorder("<"))
    if name == "pkl":
        if not allow_pickle:
            raise ValueError(
                "it is pickled, and reading it runs code of whoever wrote the shard\n"
                "  if you trust the data set, say MdsFormat(allow_pickle=True)"
            )
        return _unpickled
    if name in _IMAGES:
        return _opened_image if decode_images else _as_is
    if name in _IMAGE_LISTS:
        return _list_decoder(8 if name.startswith("list") else 4, _opened_image if decode_images else _as_is)
    if name == "list[pil]":
        return _list_decoder(8, _raw_image)
    plain = _PLAIN.get(name)
    if plain is None:
        raise ValueError(f"unknown encoding {encoding!r}")
    return plain


def fixed_size(encoding: str) -> int | None:
    """Bytes of each value where the encoding says so, None where it varies.

    >>> fixed_size("ndarray:float32:2,3"), fixed_size("str")
    (24, None)
    """
    name, _, config = encoding.partition(":")
    if name == "int":
        return 8
    if name in _SCALARS:
        return np.dtype(name).itemsize
    if name == "ndarray" and config.count(":") == 1:
        dtype, shape = _array_config(config)
        return None if dtype is None or shape is None else dtype.itemsize * int(np.prod(shape))
    return None


def _as_is(data: bytes) -> bytes:
    return data


def _integer(data: bytes) -> int:
    if len(data) != 8:
        raise ValueError(f"an int of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _unpickled(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:  # whatever a pickle may raise
        raise ValueError(f"cannot be unpickled: {error}") from error


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _decimal(data: bytes) -> Decimal:
    try:
        return Decimal(data.decode())
    except ArithmeticError as error:
        raise ValueError(f"{data[:40]!r} is no decimal number") from error


def _scalar_decoder(dtype: np.dtype[Any]) -> Decoder:
    def decode(data: bytes) -> Any:
        if len(data) != dtype.itemsize:
            raise ValueError(f"{dtype.name} of {len(data)} bytes")
        return np.frombuffer(data, dtype)[0]

    return decode


def _array_config(config: str) -> tuple[np.dtype[Any] | None, tuple[int, ...] | None]:
    parts = config.split(":") if config else []
    known = {np.dtype(code).name: np.dtype(code) for code in _ARRAY_DTYPES.values()}
    sizes = parts[1].split(",") if len(parts) == 2 else []
    if len(parts) > 2 or (parts and parts[0] not in known) or not all(s.isascii() and s.isdigit() for s in sizes):
        raise ValueError(f"unknown encoding 'ndarray:{config}'")
    return known[parts[0]] if parts else None, tuple(int(size) for size in sizes) if sizes else None


def _array_decoder(config: str) -> Decoder:
    fixed_dtype, fixed_shape = _array_config(config)

    def decode(data: bytes) -> Any:
        at = 0
        dtype, shape = fixed_dtype, fixed_shape
        try:
            if dtype is None:
                dtype = np.dtype(_ARRAY_DTYPES[data[0]])
                at = 1
            if shape is None:
                sizes = np.dtype(_SHAPE_DTYPES[data[at] % 4])
                num_axes = data[at] >> 2
                shape = tuple(int(n) for n in np.frombuffer(data, sizes, num_axes, at + 1))
                at += 1 + num_axes * sizes.itemsize
        except (KeyError, IndexError) as error:
            raise ValueError("an array whose head cannot be read") from error
        return np.frombuffer(data, dtype, offset=at).reshape(shape)

    return decode


def _list_decoder(head_bytes: int, decode_element: Decoder) -> Decoder:
    """Lists have 4 bytes for later use, a count, sizes, elements; jpeg arrays lack the first 4."""

    def decode(data: bytes) -> list[Any]:
        try:
            (count,) = struct.unpack_from("<I", data, head_bytes - 4)
            sizes = struct.unpack_from(f"<{min(count, len(data))}I", data, head_bytes)
        except struct.error as error:
            raise ValueError("a list that is cut short") from error
        at = head_bytes + 4 * count
        if at + sum(sizes) != len(data) or len(sizes) != count:
            raise ValueError(f"a list whose {count} elements do not fill its {len(data)} bytes")
        elements = []
        for size in sizes:
            elements.append(decode_element(data[at : at + size]))
            at += size
        return elements

    return decode


def _opened_image(data: bytes) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data))
    except OSError as error:
        raise ValueError(f"no image that Pillow can open: {error}") from error


def _raw_image(data: bytes) -> Any:
    """Width, height, length of the mode's name, the mode's name, pixels."""
    from PIL import Image

    try:
        width, height, mode_len = struct.unpack_from("<3I", data)
    except struct.error as error:
        raise ValueError("an image that is cut short") from error
    if mode_len > 16:
        raise ValueError(f"an image whose mode has a name of {mode_len} bytes")
    if width * height > 8 * len(data):  # a pixel takes a bit at least; Pillow would make room for them first
        raise ValueError(f"an image of {width} x {height} in {len(data)} bytes")
    try:
        return Image.frombytes(data[12 : 12 + mode_len].decode(), (width, height), data[12 + mode_len :])
    except (KeyError, MemoryError, OverflowError) as error:
        raise ValueError(f"an image that cannot be made: {error}") from error


_PLAIN: dict[str, Decoder] = {
    "bytes": _as_is,
    "str": lambda data: data.decode(),
    "int": _integer,
    "str_int": lambda data: int(data.decode()),
    "str_float": lambda data: float(data.decode()),
    "str_decimal": _decimal,
    "json": _json,
    "pil": _raw_image,
}
