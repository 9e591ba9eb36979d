"""A directory is whole when its manifest is there and every file has the size and hash that the manifest names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file, write_json_atomic

MANIFEST = "manifest.json"


def write_manifest(directory: str | Path, **metadata: Any) -> None:
    """Write `manifest.json` last: `metadata`, and size and SHA-256 of every other file of the directory."""
    directory = Path(directory)
    files = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json_atomic(directory / MANIFEST, {**metadata, "files": files})


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of `directory`.

    Raises:
        InputError: there is none (so the directory was never finished), or it is not one.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory}: has no {MANIFEST}, so it was never finished; use another checkpoint")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["size"], int) and entry["sha256"] for entry in manifest["files"].values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is damaged; use another checkpoint") from None
    for name in manifest["files"]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{path}: names {name!r}, a file outside of its directory; use another checkpoint")
    return manifest


def verify_manifest(
    directory: str | Path, names: Iterable[str] | None = None, sha256: Callable[[Path], str] = sha256_file
) -> dict[str, Any]:
    """Check the named files (default: all) against the manifest and return it.

    Raises:
        InputError: a file is missing, cannot be read, or has another size or hash.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name in manifest["files"] if names is None else names:
        try:
            _verify_file(directory / name, manifest["files"].get(name), sha256)
        except OSError as error:  # which may not say where
            raise InputError(f"{directory / name}: cannot be read ({error.strerror}); use another checkpoint") from None
    return manifest


def _verify_file(path: Path, entry: dict[str, Any] | None, sha256: Callable[[Path], str]) -> None:
    if entry is None or not path.is_file():
        raise InputError(f"{path}: is missing; use another checkpoint")
    if path.stat().st_size != entry["size"]:
        raise InputError(
            f"{path}: has {path.stat().st_size} bytes, not {entry['size']} as its manifest says; use another checkpoint"
        )
    if sha256(path) != entry["sha256"]:
        raise InputError(f"{path}: its SHA-256 differs from the manifest's; use another checkpoint")
