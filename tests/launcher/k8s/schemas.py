"""What an API server would say of an object: by the custom resources' schemas, unknown fields refused; else by kubernetes-validate."""

from __future__ import annotations

import functools
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
from kubernetes_validate.utils import all_versions, schema_contents
from referencing import Registry, Resource

FIXTURE = Path(__file__).parents[2] / "fixtures" / "crds" / "schemas.json.xz"
KUBERNETES_VERSIONS = ("1.29", "1.35")
"""Native sidecars are on by default from 1.29."""
_ALWAYS = ("apiVersion", "kind", "metadata")


@functools.cache
def schemas() -> dict[str, Any]:
    # Go allows flags in the middle of a pattern, Python at its start only.
    text = lzma.decompress(FIXTURE.read_bytes()).decode().replace('"^(?i)', '"(?i)^')
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@functools.cache
def _validator(key: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schemas()[key])


def faults(one: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with one object; empty if nothing is."""
    key = f"{one['apiVersion']}/{one['kind']}"
    if key not in schemas():
        return _core_faults(one)
    schema = schemas()[key]
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in _validator(key).iter_errors(one)]
    found += unknown_fields(one, schema)
    found += [f for path, template in _templates(one, "") for f in _pod_faults(path, template)]
    return found


def unknown_fields(node: Any, schema: Mapping[str, Any], path: str = "") -> list[str]:
    """Keys that the schema does not have: the API server prunes them, or refuses them under strict validation; and doubled list keys."""
    if schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource"):
        return []
    found: list[str] = []
    if isinstance(node, Mapping):
        properties = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        for key, value in node.items():
            child = f"{path}.{key}" if path else key
            if key in properties:
                if not (path == "" and key == "metadata"):
                    found += unknown_fields(value, properties[key], child)
            elif isinstance(extra, Mapping):
                found += unknown_fields(value, extra, child)
            elif not (extra is True or (path == "" and key in _ALWAYS)):
                found.append(f'unknown field "{child}"')
    elif isinstance(node, list):
        keys = schema.get("x-kubernetes-list-map-keys", []) if schema.get("x-kubernetes-list-type") == "map" else []
        seen = set()
        for idx, item in enumerate(node):
            found += unknown_fields(item, schema.get("items", {}), f"{path}[{idx}]")
            if keys:
                identity = tuple(str(item.get(key)) for key in keys)
                if identity in seen:
                    found.append(f'duplicate "{path}[{idx}]": {identity}')
                seen.add(identity)
    return found


def _core_faults(one: Mapping[str, Any]) -> list[str]:
    """As `kubernetes_validate.validate(…, strict=True)` finds them; that reads 2 MB of definitions anew for each object."""
    return list(_core_faults_of(json.dumps(one)))


@functools.lru_cache(maxsize=4096)
def _core_faults_of(text: str) -> tuple[str, ...]:
    one = json.loads(text)
    return tuple(
        f"Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}"
        for version in KUBERNETES_VERSIONS
        for error in _core_validator(version, one["apiVersion"], one["kind"]).iter_errors(one)
    )


@functools.cache
def _core_validator(version: str, api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    release = next(one for one in all_versions() if one.startswith(f"{version}."))
    folder = f"kubernetes-json-schema/v{release}-local-strict"
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    return jsonschema.Draft202012Validator(schema, registry=_definitions(folder, version) @ Registry())


@functools.cache
def _definitions(folder: str, version: str) -> Resource[Any]:
    return Resource.from_contents(schema_contents(f"{folder}/_definitions.json", version))


def _pod_faults(path: str, template: Mapping[str, Any]) -> list[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
    return [f"{path}: {fault}" for fault in _core_faults(pod)]


def _templates(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Pod templates anywhere in a custom resource."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if (
                key in ("template", "submitterPodTemplate")
                and isinstance(value, Mapping)
                and "containers" in value.get("spec", {})
            ):
                yield f"{path}.{key}", value
            else:
                yield from _templates(value, f"{path}.{key}")
    elif isinstance(node, list):
        for idx, item in enumerate(node):
            yield from _templates(item, f"{path}[{idx}]")
