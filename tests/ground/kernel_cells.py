"""The cells of the kernel matrix: which kernel, on which processor, with which cgroups, under which init.

5.10/amd64/v1              Debian's 5.10 on x86-64, version 1 of cgroups alone
6.12/arm64/systemd-v2      Debian's 6.12 on aarch64, systemd as init
5.10/um/v2                 Debian's 5.10 built as a program of this machine's (kernel_program.py); not in the table
mine/amd64/hybrid          a kernel of one's own, from a directory mine (scripts/kernels.sh --kernel)
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = {"amd64": "x86-64", "arm64": "aarch64"}
PROGRAM = "um"
# What an init mounts at /sys/fs/cgroup; with systemd- in front systemd itself does, and the socket unit is tried.
GROUNDS = ("v2", "hybrid", "v1", "systemd-v2", "systemd-v1")
# The suite has these (tests/whole/test_kernels.py), so that none of this can rot.
OF_THE_SUITE = ("5.10/amd64/v1", "5.10/arm64/v1", "6.12/amd64/v2")

# Begins a line of a machine's console with what is known of it until then.
DOCUMENT = "machine-document "


@dataclass(frozen=True)
class Kernel:
    """One of Debian's. suite: where it is. pattern: which packages are it; ARCH stands for the architecture."""

    name: str
    suite: str
    pattern: str
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("5.10", "bullseye", r"linux-image-5\.10\.[0-9.]+-[0-9]+-ARCH"),
        Kernel("6.1", "bookworm", r"linux-image-6\.1\.[0-9.]+-[0-9]+-ARCH"),
        Kernel("6.12", "trixie", r"linux-image-6\.12\.[0-9.]+\+deb13-ARCH"),
        Kernel("newest", "trixie-backports", r"linux-image-[0-9.]+\+deb13-ARCH", ("amd64",)),
    )
}


@dataclass(frozen=True)
class Cell:
    """One machine that the product is tried on."""

    kernel: str
    architecture: str
    ground: str

    def __str__(self) -> str:
        return f"{self.kernel}/{self.architecture}/{self.ground}"

    @property
    def is_program(self) -> bool:
        """Whether it is no machine but a program of this one: User-mode Linux."""
        return self.architecture == PROGRAM

    @property
    def processor(self) -> str:
        """Debian's name for what its programs are compiled for."""
        return "amd64" if self.is_program else self.architecture

    @property
    def has_systemd(self) -> bool:
        return self.ground.startswith("systemd-")

    @property
    def cgroups(self) -> str:
        """v2, hybrid or v1."""
        return self.ground.removeprefix("systemd-")

    def has(self, part: str) -> bool:
        """Whether a part of the trial (kernel_trial.py) applies to such a machine."""
        return {"socket": self.has_systemd, "net_cls": self.cgroups != "v2"}.get(part, True)

    @property
    def file_name(self) -> str:
        return f"{self}.json".replace("/", "-")


def parse_cell(text: str) -> Cell:
    """Raises ValueError, saying what a cell looks like, where there can be no such cell."""
    words = text.split("/")
    architectures = (*ARCHITECTURES, PROGRAM)
    if len(words) != 3 or words[1] not in architectures or words[2] not in GROUNDS:
        raise ValueError(f"{text!r} is no cell; write KERNEL/{'|'.join(architectures)}/{'|'.join(GROUNDS)}")
    return Cell(*words)


def all_cells(own: tuple[Cell, ...] = ()) -> list[Cell]:
    """Those of Debian's kernels, then those of kernels of one's own."""
    debian = [
        Cell(kernel.name, architecture, ground)
        for kernel in KERNELS.values()
        for architecture in kernel.architectures
        for ground in GROUNDS
    ]
    return [*debian, *own]
