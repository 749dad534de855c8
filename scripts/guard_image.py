"""Writes an image of the guard: a Debian as one layer, and what a wheel has of securerun as another.

    guard_image.py BASE WHEEL DIRECTORY    BASE is a tar of a Debian's root

The file is an OCI image layout, and what `docker save` writes as well, so that each engine's `load` takes it. Needs
nothing but what Python has. See scripts/image.sh.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

NAME = "localhost/securerun-guard"
_LIBRARY = "usr/lib/securerun"
_PROGRAM = "usr/sbin/securerun-guard"
# -I -S: nothing but root's own files has a say in what the guard loads.
_PROGRAM_TEXT = f"""\
#!/usr/bin/python3 -IS
import sys

sys.path.append("/{_LIBRARY}")
from securerun.guard.program import main

main()
"""
# A guard that finds no log of the node's follows no link: its lines go to standard error, which is the container's log.
_LOG, _NO_FILE = "var/log/securerun.log", "/dev/stderr"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The same image from the same base and the same wheel.
_CREATED = "1970-01-01T00:00:00Z"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """A file of the image, by the digest of what is in it. content: of a layer, the digest before it was compressed."""

    path: Path
    digest: str
    content: str = ""

    @property
    def name(self) -> str:
        return f"blobs/sha256/{self.digest}"

    def described(self, kind: str) -> dict[str, Any]:
        """Return how others of the image refer to it."""
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": f"sha256:{self.digest}", "size": self.path.stat().st_size}


def main(base: Path, wheel: Path, into: Path) -> None:
    """Write the image, and say where it is and what it is called."""
    version = _version_of(wheel)
    with tempfile.TemporaryDirectory(prefix="securerun-image.") as work:
        place = Path(work)
        added = place / "added.tar"
        _write_layer(wheel, added)
        layers = [_layer(place, tar) for tar in (base, added)]
        config = _blob(place, _configuration(version, layers))
        manifest = _blob(
            place,
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": config.described("config.v1+json"),
                "layers": [layer.described("layer.v1.tar+gzip") for layer in layers],
            },
        )
        file = into / f"securerun-guard-{version}.tar"
        _write_archive(file, version, config, manifest, layers)
    print(f"{file}: {NAME}:{_tag(version)}")


def _version_of(wheel: Path) -> str:
    found = re.fullmatch(r"securerun-([^-]+)-py3-none-any\.whl", wheel.name)
    if found is None:
        sys.exit(f"image: {wheel} is no wheel of securerun; scripts/package.sh builds one")
    return found[1]


def _tag(version: str) -> str:
    return version.replace("+", "_")


def _write_layer(wheel: Path, tar: Path) -> None:
    """Write what the image has besides the Debian."""
    with zipfile.ZipFile(wheel) as packed, tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as layer:
        for name in sorted(packed.namelist()):
            if name.startswith("securerun/"):
                _add(layer, f"{_LIBRARY}/{name}", packed.read(name))
        _add(layer, _PROGRAM, _PROGRAM_TEXT.encode(), 0o755)
        link = tarfile.TarInfo(_LOG)
        link.type, link.linkname = tarfile.SYMTYPE, _NO_FILE
        layer.addfile(link)


def _add(layer: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    layer.addfile(entry, io.BytesIO(content))


def _layer(place: Path, tar: Path) -> Blob:
    """Compress a layer."""
    packed = place / f"{tar.name}.gz"
    with tar.open("rb") as content, packed.open("wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as compressed:
        shutil.copyfileobj(content, compressed, _CHUNK)
    return Blob(packed, _digest(packed), _digest(tar))


def _blob(place: Path, document: Any) -> Blob:  # noqa: ANN401 - whatever JSON holds
    content = json.dumps(document, sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()
    path = place / digest
    path.write_bytes(content)
    return Blob(path, digest)


def _configuration(version: str, layers: list[Blob]) -> dict[str, Any]:
    return {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "created": _CREATED,
        "config": {
            "Entrypoint": [f"/{_PROGRAM}", "--listen"],
            "Env": [f"PATH={_PATH}"],
            "Labels": {
                "org.opencontainers.image.title": "securerun-guard",
                "org.opencontainers.image.version": version,
                "org.opencontainers.image.licenses": "Apache-2.0",
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.content}" for layer in layers]},
        "history": [{"created": _CREATED, "created_by": "scripts/image.sh"} for _ in layers],
    }


def _write_archive(file: Path, version: str, config: Blob, manifest: Blob, layers: list[Blob]) -> None:
    name = f"{NAME}:{_tag(version)}"
    described = {
        **manifest.described("manifest.v1+json"),
        "annotations": {"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name},
    }
    of_docker = [{"Config": config.name, "RepoTags": [name], "Layers": [layer.name for layer in layers]}]
    texts = {
        "oci-layout": {"imageLayoutVersion": "1.0.0"},
        "index.json": {"schemaVersion": 2, "manifests": [described]},
        "manifest.json": of_docker,
    }
    partial = file.with_suffix(".partial")
    with tarfile.open(partial, "w") as archive:
        for text_name, text in texts.items():
            _add(archive, text_name, json.dumps(text).encode())
        for blob in {blob.name: blob for blob in (config, manifest, *layers)}.values():
            entry = tarfile.TarInfo(blob.name)
            entry.size, entry.mode = blob.path.stat().st_size, 0o644
            with blob.path.open("rb") as content:
                archive.addfile(entry, content)
    partial.replace(file)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
