# SPDX-License-Identifier: Apache-2.0
"""Docker-archives from layer tarballs, without an image builder."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """One image: its names, its layers from the bottom up, and how it starts."""

    tags: Sequence[str]
    layers: Sequence[Path]
    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    env: Sequence[str] = (f"PATH={PATH}",)


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_id(image: Image) -> str:
    """The image's id as engines show it: the digest of its configuration."""
    config = _config(image, [digest(layer) for layer in image.layers])
    return hashlib.sha256(config).hexdigest()


def contents(archive: Path) -> dict[str, str]:
    """The images in a docker-archive: each name with its image id."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile("manifest.json")
        entries = json.load(file) if file else []
    return {tag: Path(entry["Config"]).stem for entry in entries for tag in entry["RepoTags"] or ()}


def write_layer(layer: Path, files: dict[str, Path]) -> None:
    """Write a layer that holds the given executables, byte for byte the same each time."""
    with tarfile.open(layer, "w") as tar:
        for name, source in sorted(files.items()):
            info = tarfile.TarInfo(name.lstrip("/"))
            info.size, info.mode = source.stat().st_size, 0o755
            with source.open("rb") as content:
                tar.addfile(info, content)


def write_archive(target: Path, images: Sequence[Image]) -> None:
    """Write one docker-archive of several images; a layer they share is stored once."""
    names = {layer: digest(layer) for image in images for layer in image.layers}
    manifest = []
    with tarfile.open(target, "w") as tar:
        for layer, sha in names.items():
            tar.add(layer, f"{sha}.tar", filter=_anonymous)
        for image in images:
            config = _config(image, [names[layer] for layer in image.layers])
            config_name = f"{hashlib.sha256(config).hexdigest()}.json"
            _add(tar, config_name, config)
            layers = [f"{names[layer]}.tar" for layer in image.layers]
            manifest.append({"Config": config_name, "RepoTags": list(image.tags), "Layers": layers})
        _add(tar, "manifest.json", json.dumps(manifest).encode())


def _config(image: Image, layer_digests: Sequence[str]) -> bytes:
    config = {"Env": list(image.env), "Entrypoint": list(image.entrypoint), "Cmd": list(image.cmd)}
    return json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{d}" for d in layer_digests]},
            "history": [{"created": "1970-01-01T00:00:00Z"} for _ in layer_digests],
        }
    ).encode()


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
