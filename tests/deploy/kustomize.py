"""The part of Kustomize that our kustomizations use, so that the rules check what is applied.

A test compares it with kubectl's. As there, a patch that finds no resource or no field is an error.
"""

import copy
import posixpath
from typing import Any

import yaml

from tests.deploy.tree import Loader, Tree, walk

KNOWN = {"apiVersion", "kind", "resources", "images", "patches"}


def render(tree: Tree, folder: str) -> list[dict[str, Any]]:
    """Return the resources of a directory's kustomization.

    Raises:
        ValueError: it is none, or uses what this module does not implement.
    """
    path = posixpath.join(folder, "kustomization.yaml")
    if path not in tree.texts:
        raise ValueError(f"{folder} has no kustomization.yaml")
    kustomization = tree.documents(path)[0]
    if unknown := kustomization.keys() - KNOWN:
        raise ValueError(f"{path}: unknown {sorted(unknown)}")
    found: list[dict[str, Any]] = []
    for entry in kustomization.get("resources", ()):
        at = posixpath.normpath(posixpath.join(folder, entry))
        if at in tree.texts:
            found += copy.deepcopy(tree.documents(at))
        else:
            found += render(tree, at)
    for entry in kustomization.get("patches", ()):
        operations = tree.documents(posixpath.join(folder, entry["path"]))[0]
        targets = [resource for resource in found if _is(resource, entry["target"])]
        if not targets:
            raise ValueError(f"{path}: no resource is {entry['target']}")
        for target in targets:
            for operation in operations:
                _apply(target, operation, where=entry["path"])
    for image in kustomization.get("images", ()):
        _rename(found, image, where=path)
    return found


def _is(resource: dict[str, Any], target: dict[str, str]) -> bool:
    group, _, version = resource["apiVersion"].rpartition("/")
    ours = {
        "group": group,
        "version": version,
        "kind": resource["kind"],
        "name": resource["metadata"]["name"],
    }
    return all(ours[key] == value for key, value in target.items())


def _apply(resource: dict[str, Any], operation: dict[str, Any], *, where: str) -> None:
    if operation["op"] != "replace":
        raise ValueError(f"{where}: unknown operation {operation['op']!r}")
    *way, last = [
        part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
    ]
    at: Any = resource
    try:
        for part in way:
            at = at[int(part)] if isinstance(at, list) else at[part]
        key: Any = int(last) if isinstance(at, list) else last
        at[key]  # replace needs something to replace
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: {resource['kind']} has nothing at {operation['path']}"
        ) from error
    at[key] = operation["value"]


def _rename(resources: list[dict[str, Any]], image: dict[str, str], *, where: str) -> None:
    hits = 0
    for path, value in walk(resources):
        if isinstance(value, dict) and "image" in value and "/containers/" in path:
            name, _, tag = value["image"].rpartition(":")
            if name == image["name"]:
                value["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
                hits += 1
    if not hits:
        raise ValueError(f"{where}: no container's image is {image['name']}")


def loaded(text: str) -> list[dict[str, Any]]:
    """Return the resources in kubectl's output."""
    return [document for document in yaml.load_all(text, Loader) if document is not None]
