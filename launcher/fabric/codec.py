"""Facts to JSON and back, with a version.

Written out, facts are one JSON object `{"format": "railhead-fabric-facts", "version": 1, "facts": {…}}`. Reading is strict
about what it knows (types are checked, an unknown field is an error) so that facts of another version are refused with a
sentence, not half understood.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from launcher.fabric.facts import FactsError, NodeFacts

FORMAT = "railhead-fabric-facts"
VERSION = 1

T = TypeVar("T")


def to_json(facts: NodeFacts, *, indent: int | None = None) -> str:
    """The facts as JSON text; fields that hold their default are left out."""
    return json.dumps({"format": FORMAT, "version": VERSION, "facts": plain(facts)}, indent=indent)


def from_json(text: str, *, source: str = "the text") -> NodeFacts:
    """The facts that `to_json` wrote. FactsError, naming `source`, for anything else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FactsError(
            f"{source} is not JSON ({error}).\nRecord the facts again with: python -m launcher doctor --save DIR"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FactsError(
            f'{source} is JSON, but not facts of a node (no "format": "{FORMAT}").\n'
            "Give a folder of files that `python -m launcher doctor --save DIR` wrote."
        )
    if document.get("version") != VERSION:
        raise FactsError(
            f"{source} holds facts of version {document.get('version')!r}; this program reads version {VERSION}.\n"
            "Record them again with this version: python -m launcher doctor --save DIR"
        )
    try:
        return _build(NodeFacts, document.get("facts"), "facts")
    except FactsError as error:
        raise FactsError(f"{source}: {error}") from error


def plain(value: Any) -> Any:
    """A dataclass of facts as dicts, lists and scalars, without the fields that hold their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for item in dataclasses.fields(value):
            content = getattr(value, item.name)
            if item.default is not dataclasses.MISSING and content == item.default:
                continue
            if item.default_factory is not dataclasses.MISSING and content == item.default_factory():
                continue
            found[item.name] = plain(content)
        return found
    if isinstance(value, Mapping):
        return {str(key): plain(content) for key, content in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def _build(kind: type[T], value: Any, where: str) -> T:
    """A dataclass from its plain form; FactsError says where it does not fit."""
    if not isinstance(value, dict):
        raise FactsError(f"{where} should be an object, not {_shown(value)}.")
    hints = _hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise FactsError(f"{where} has fields that this version does not know: {', '.join(unknown[:5])}.")
    arguments = {name: _convert(hints[name], content, f"{where}.{name}") for name, content in value.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise FactsError(f"{where} is incomplete ({error}).") from error


_HINTS: dict[type, dict[str, Any]] = {}
"""Resolving the annotations of a class takes longer than reading a node; each class is resolved once."""


def _hints(kind: type) -> dict[str, Any]:
    if kind not in _HINTS:
        hints = get_type_hints(kind)
        _HINTS[kind] = {item.name: hints[item.name] for item in dataclasses.fields(kind)}
    return _HINTS[kind]


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for argument in arguments:
            if argument is type(None):
                continue
            try:
                return _convert(argument, value, where)
            except FactsError:
                continue
        raise FactsError(f"{where} cannot be {_shown(value)}.")
    if origin is Literal:
        if value in arguments:
            return value
        raise FactsError(f"{where} cannot be {_shown(value)}.")
    if origin is tuple:
        if not isinstance(value, list):
            raise FactsError(f"{where} should be a list, not {_shown(value)}.")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{where}[{idx}]") for idx, item in enumerate(value))
        if len(arguments) != len(value):
            raise FactsError(f"{where} should have {len(arguments)} items, not {len(value)}.")
        return tuple(
            _convert(part, item, f"{where}[{idx}]")
            for idx, (part, item) in enumerate(zip(arguments, value, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise FactsError(f"{where} should be an object, not {_shown(value)}.")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, where)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and hint is not bool:
        raise FactsError(f"{where} should be {hint.__name__}, not {_shown(value)}.")
    if isinstance(value, hint):
        return value
    raise FactsError(f"{where} should be {hint.__name__}, not {_shown(value)}.")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
