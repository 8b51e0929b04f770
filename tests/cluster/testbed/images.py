# SPDX-License-Identifier: Apache-2.0
"""The images the cluster needs, made without a registry.

Debian root filesystems come from mmdebstrap, programs from the tools cache. All node images
are one docker-archive, so that the root filesystem they share is unpacked once.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.testbed import archive
from cluster.testbed.commands import run, wait_for
from cluster.testbed.progress import say, step
from cluster.testbed.settings import (
    AGNHOST_IMAGE,
    BASE_IMAGE,
    BIN,
    BUSYBOX_IMAGE,
    CACHE,
    CONNTRACK_PEER,
    CONNTRACK_PEER_IMAGE,
    COREDNS_VERSION,
    DNS_TESTING_IMAGE,
    PAUSE_IMAGE,
)
from cluster.testbed.tools import kubernetes_source, kubernetes_version

IMAGES = CACHE / "images"
NODE_IMAGES = IMAGES / "node-images.tar"
TOOL_PACKAGES = (
    "bind9-dnsutils",
    "conntrack",
    "curl",
    "iproute2",
    "iptables",
    "iputils-ping",
    "netcat-openbsd",
    "nftables",
    "procps",
    "wget",
)
# what Debian's own slim images leave out
SLIM = ("doc", "info", "lintian", "linda", "locale", "man")
APT_SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))


def coredns_image() -> str:
    """The name CoreDNS's Deployment refers to."""
    return f"registry.k8s.io/coredns/coredns:{COREDNS_VERSION}"


def kube_proxy_image() -> str:
    """The name kube-proxy's DaemonSet refers to."""
    return f"registry.k8s.io/kube-proxy:{kubernetes_version()}"


def base_image() -> None:
    """Put a Debian base image into buildah's storage, unless the very same is there."""
    rootfs = _rootfs("debian-bookworm-slim")
    base = archive.Image([BASE_IMAGE], [rootfs], cmd=["bash"])
    if _in_buildah(archive.image_id(base)):
        say(f"{BASE_IMAGE} is there")
        return
    with step(f"importing {BASE_IMAGE} into buildah"):
        target = IMAGES / "base.tar"
        archive.write_archive(target, [base])
        run(["buildah", "pull", "--quiet", f"docker-archive:{target}"])
        target.unlink()


def _in_buildah(image_id: str) -> bool:
    found = subprocess.run(
        ["buildah", "images", "--quiet", "--no-trunc", BASE_IMAGE],
        check=False,
        text=True,
        capture_output=True,
    )
    return image_id in found.stdout


def _rootfs(name: str, packages: tuple[str, ...] = ()) -> Path:
    """A Debian bookworm root filesystem as a tarball, from the cache or from mmdebstrap."""
    rootfs = IMAGES / f"{name}.rootfs.tar"
    wanted = " ".join(("bookworm", *SLIM, *packages))
    stamp = rootfs.with_suffix(".packages")
    if rootfs.exists() and stamp.exists() and stamp.read_text() == wanted:
        return rootfs
    IMAGES.mkdir(parents=True, exist_ok=True)
    partial = rootfs.with_suffix(".partial")
    options = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in SLIM]
    if packages:
        options.append(f"--include={','.join(packages)}")
    with step(f"building the Debian root filesystem {name} (mmdebstrap, about 30 s)"):
        run(
            [
                "mmdebstrap",
                "--variant=minbase",
                "--format=tar",
                *options,
                *_apt_options(),
                "bookworm",
                partial,
                *[path for path in APT_SOURCES if path.exists()][:1],
            ],
            hint="mmdebstrap needs a Debian mirror that apt can reach: try `apt-get update`",
        )
        partial.rename(rootfs)
        stamp.write_text(wanted)
    return rootfs


def _apt_options() -> list[str]:
    """The machine's own proxy settings, for machines that reach mirrors through one."""
    dump = run(["apt-config", "dump", "Acquire::http::Proxy", "Acquire::https::Proxy"])
    return [f"--aptopt={line}" for line in dump.splitlines() if line.strip()]


def node_images() -> Path:
    """The docker-archive with every image a node starts with, built when a part changed."""
    programs = [BIN / name for name in ("agnhost", "kube-proxy", "coredns", CONNTRACK_PEER)]
    rootfs = _rootfs("testbed-tools", TOOL_PACKAGES)
    pause = _pause()
    inputs = [rootfs, pause, *programs]
    facts = "".join(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in inputs)
    facts += archive.digest(Path(__file__))
    stamp = NODE_IMAGES.with_suffix(".inputs")
    if NODE_IMAGES.exists() and stamp.exists() and stamp.read_text() == facts:
        return NODE_IMAGES
    with step("writing the node images"):
        layers = {p.name: _layer(p) for p in (*programs, pause)}
        layers["certificate"] = _certificate_layer()
        partial = NODE_IMAGES.with_suffix(".partial")
        archive.write_archive(partial, _images(rootfs, layers))
        partial.rename(NODE_IMAGES)
        for layer in layers.values():
            layer.unlink()
        stamp.write_text(facts)
    return NODE_IMAGES


def _layer(program: Path) -> Path:
    """A layer with one program at the root, where the images' entry points expect it."""
    layer = IMAGES / f"{program.name}.layer.tar"
    archive.write_layer(layer, {f"/{program.name}": program})
    return layer


def _certificate_layer() -> Path:
    """What agnhost's `porter` serves HTTPS with, from upstream's module."""
    porter = kubernetes_source() / "test/images/agnhost/porter"
    layer = IMAGES / "certificate.layer.tar"
    names = ("localhost.crt", "localhost.key")
    archive.write_layer(layer, {f"/{name}": porter / name for name in names})
    return layer


def _images(rootfs: Path, layers: dict[str, Path]) -> list[archive.Image]:
    tools = [rootfs, layers["agnhost"]]
    agnhost = [*tools, layers["coredns"], layers["certificate"]]
    return [
        archive.Image([AGNHOST_IMAGE], agnhost, entrypoint=["/agnhost"], cmd=["pause"]),
        archive.Image([BUSYBOX_IMAGE, DNS_TESTING_IMAGE], tools, cmd=["sh"]),
        archive.Image([kube_proxy_image()], [rootfs, layers["kube-proxy"]], ["/kube-proxy"]),
        archive.Image(
            [CONNTRACK_PEER_IMAGE], [rootfs, layers[CONNTRACK_PEER]], [f"/{CONNTRACK_PEER}"]
        ),
        archive.Image([coredns_image()], [layers["coredns"]], ["/coredns"]),
        archive.Image([PAUSE_IMAGE], [layers["pause"]], ["/pause"]),
    ]


def _pause() -> Path:
    """Upstream's pause.c, compiled; its source comes with the Go module of Kubernetes."""
    program = BIN / "pause"
    if not program.exists():
        with step("compiling pause"):
            run(
                [
                    "gcc",
                    "-Os",
                    "-static",
                    f"-DVERSION={PAUSE_IMAGE.rpartition(':')[2]}",
                    "-o",
                    program,
                    kubernetes_source() / "build/pause/linux/pause.c",
                ],
                hint="gcc and libc6-dev come with `make packages`",
            )
    return program


def seed(preload: Sequence[Path] = ()) -> Path:
    """A containerd root that holds the node images unpacked; every node starts with a copy.

    Unpacking once and linking the files is what makes a warm start quick. What is in `preload`
    (docker-archives) is unpacked on top, in a second seed.
    """
    source = node_images()
    key = _key(source.with_suffix(".inputs").read_text() + platform.release())
    root = _unpacked(f"seed-{key}", "seed-*", source, None)
    for number, more in enumerate(preload):
        key = _key(root.name + archive.digest(more))
        root = _unpacked(f"preload{number}-{key}", f"preload{number}-*", more, root)
    return root


def _key(facts: str) -> str:
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _unpacked(name: str, outdated: str, source: Path, below: Path | None) -> Path:
    """The seed of that name: from the cache, or made by importing `source` on top of another."""
    root = CACHE / "containerd" / name
    if not root.exists():
        root.parent.mkdir(exist_ok=True)
        for old in (*root.parent.glob(outdated), *root.parent.glob("partial")):
            shutil.rmtree(old)
        partial = root.with_name("partial")
        partial.mkdir()
        with step(f"unpacking {source.name}"):
            if below:
                copy_seed(below, partial)
            _import_into(partial, source)
            partial.rename(root)
    return root


def copy_seed(source: Path, target: Path) -> None:
    """Link the unpacked files into an empty folder (nothing writes to them); copy the databases."""
    flags = "-al" if source.stat().st_dev == target.stat().st_dev else "-a"
    run(["cp", flags, f"{source}/.", target])
    for database in target.rglob("*.db"):
        copy = database.with_suffix(".copy")
        shutil.copy2(database, copy)
        copy.rename(database)


def _import_into(root: Path, archive_path: Path) -> None:
    """Import an archive with a containerd that lives only for this; it listens on no network."""
    with tempfile.TemporaryDirectory(prefix="bpfdp-testbed-seed-") as scratch:
        config, socket = Path(scratch, "config.toml"), Path(scratch, "containerd.sock")
        config.write_text(
            f'version = 2\nroot = "{root}"\nstate = "{scratch}/state"\n'
            f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{socket}"\n'
        )
        log = Path(scratch, "log")
        with log.open("w") as output:
            # a mount namespace of its own: no mount can outlive it
            daemon = subprocess.Popen(
                ["unshare", "--mount", "containerd", "--config", config],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_for("containerd for the image import", socket.exists, 20, f"See {log}")
            run(["ctr", "-a", socket, "-n", "k8s.io", "images", "import", archive_path])
        finally:
            daemon.terminate()
            daemon.wait(20)
