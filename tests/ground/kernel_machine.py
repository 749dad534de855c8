"""One boot of a machine of the kernel matrix, under QEMU: a command in it, and what it left.

Emulated, not accelerated: it is to work where this runs in a machine itself, and to answer the same everywhere. Or a
kernel that is a program (kernel_program.py), which needs no emulation: its system calls are ptrace's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import kernel_lab
from kernel_cells import DOCUMENT, Cell
from kernel_lab import KernelFiles, LabError

ANSWER_MIB = 32
# What a machine may take before and after its command, under emulation, beside other work.
BOOT_SECONDS = 240
_CONSOLE_LINES = 40
_QEMU = {
    # Without what 5.10 does not know: the addresses of 52 bits of `max` end its boot. Its atomics (LSE) are quicker to
    # emulate than loops.
    "arm64": ("qemu-system-aarch64", "-M", "virt,gic-version=3", "-cpu", "neoverse-n1"),
    # A quarter quicker to emulate than what `max` has; torch asks for the vectors of `max`.
    "amd64": ("qemu-system-x86_64", "-M", "q35", "-cpu", "Nehalem"),
}
_FOR_TORCH = {"amd64": ("-cpu", "max")}
_CONSOLES = {"amd64": "ttyS0", "arm64": "ttyAMA0"}
_SYSTEMD = {
    "v2": "systemd.unified_cgroup_hierarchy=1",
    "hybrid": "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=0",
    "v1": "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1",
}
_LEGACY = "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"  # systemd 256 and newer


class MachineError(Exception):
    """A machine gave no answer. The words end with the last lines of its console; `document` is what it said before."""

    def __init__(self, words: str, document: str = "") -> None:
        super().__init__(words)
        self.document = document


@dataclass(frozen=True)
class Answer:
    """What a machine left: its command's status and output, the kernel's log, and a document where there is one."""

    status: int
    output: str
    dmesg: str
    document: str


def run(
    cell: Cell,
    kernel: KernelFiles,
    command: str,
    *,
    torch: bool = False,
    limit: int = 600,
    memory_mib: int = 2048,
    processors: int = 1,
) -> Answer:
    """Boot, run the command as root in the checkout, for at most `limit` seconds, and turn off.

    What the command writes to /srv/machine/out/document comes back. Raises LabError where something that a machine is
    made of is not to be had, and MachineError where it gives no answer.
    """
    root = kernel_lab.root_image(cell.processor)
    site = kernel_lab.site_image(cell.processor, torch=torch)
    settings = f"cgroups={cell.cgroups}\nsystemd={int(cell.has_systemd)}\nlimit={limit}\n"
    with tempfile.TemporaryDirectory(prefix="sr-machine-", dir=kernel_lab.PLACE) as work:
        place = Path(work)
        kernel_lab.product_archive(place / "orders", {"settings": settings, "command": f"{command}\n"})
        with (place / "answer").open("wb") as answer:
            answer.truncate(ANSWER_MIB << 20)
        disks = (
            Disk("root", root),
            Disk("site", site),
            Disk("modules", kernel.modules, "readonly=on"),
            Disk("orders", place / "orders", "readonly=on"),
            Disk("answer", place / "answer", "cache=unsafe"),
        )
        words = (
            _program(cell, kernel, disks, place, memory_mib)
            if cell.is_program
            else (
                *_emulator(cell, processors, torch=torch),
                *_command(cell, kernel, disks, place, memory_mib),
            )
        )
        # A program's console is its standard error.
        errors = place / ("console" if cell.is_program else "errors")
        said = _until_off(words, errors, limit + BOOT_SECONDS)
        return _answer(cell, place, said)


@dataclass(frozen=True)
class Disk:
    """A file as a disk. option: QEMU's; what a machine writes to the first two is thrown away."""

    name: str
    file: Path
    option: str = "snapshot=on"


def _emulator(cell: Cell, processors: int, *, torch: bool) -> tuple[str, ...]:
    """Return QEMU and the machine that it is to emulate."""
    more = _FOR_TORCH.get(cell.architecture, ()) if torch else ()
    return (*_QEMU[cell.architecture], *more, "-accel", "tcg", "-smp", str(processors))


def _command(cell: Cell, kernel: KernelFiles, disks: Sequence[Disk], place: Path, memory_mib: int) -> tuple[str, ...]:
    """Return the rest of QEMU's command line."""
    drives = [
        f"file={str(disk.file).replace(',', ',,')},format=raw,if=none,id={disk.name},{disk.option}" for disk in disks
    ]
    devices = [f"virtio-blk-pci,drive={disk.name},serial={disk.name}" for disk in disks]
    return (
        *("-m", str(memory_mib), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{place / 'console'}", "-device", "virtio-rng-pci"),
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initramfs)),
        *("-append", " ".join([f"console={_CONSOLES[cell.architecture]}", *_command_line(cell)])),
        *(word for pair in zip(drives, devices) for word in ("-drive", pair[0], "-device", pair[1])),
    )


def _program(cell: Cell, kernel: KernelFiles, disks: Sequence[Disk], place: Path, memory_mib: int) -> tuple[str, ...]:
    """Return the command line of a kernel that is a program (Documentation/virt/uml/user_mode_linux_howto_v2.rst).

    It has one processor, and says on its standard error what a machine says on its console.
    """
    drives: list[str] = []
    for letter, disk in zip("abcde", disks):
        # What is written goes to a file of its own, as with snapshot=on.
        before = f"{place / disk.name}-written," if disk.option == Disk.option else ""
        # c: without locks on the files, which QEMU takes for another's writing.
        flags = "rc" if "readonly" in disk.option else "c"
        drives += [f"ubd{letter}{flags}={before}{disk.file}", f"disk_{disk.name}=ubd{letter}"]
    return (
        *(str(kernel.image), f"mem={memory_mib}M", f"initrd={kernel.initramfs}", f"uml_dir={place}/"),
        *("con0=null,fd:2", "con=null", "ssl=null", *_command_line(cell), *drives),
    )


def _command_line(cell: Cell) -> list[str]:
    words = ["panic=-1", "quiet", "loglevel=4", "net.ifnames=0", "audit=0"]
    words += ["mitigations=off", "random.trust_cpu=on"]
    if cell.has_systemd:
        words += [_SYSTEMD[cell.cgroups], _LEGACY, "systemd.show_status=0"]
    return words


def _until_off(words: tuple[str, ...], errors: Path, seconds: float) -> str:
    """Let it run until it turns itself off, and return how it ended, and its last error; end it after that long."""
    if shutil.which(words[0]) is None:
        raise LabError(f"{words[0]} is missing; run scripts/setup.sh test")
    # Where its throw-away disks are.
    environment = {**os.environ, "TMPDIR": str(errors.parent)}
    with errors.open("w") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        ended = "it turned itself off"
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            ended = f"it was still running after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = "".join(_read(errors).strip().splitlines()[-1:])
    return f"{ended}; {last}".rstrip("; ")


def _answer(cell: Cell, place: Path, said: str) -> Answer:
    try:
        with tarfile.open(place / "answer", "r:") as archive:
            found = {member.name.removeprefix("./"): _text(archive, member) for member in archive if member.isfile()}
        return Answer(int(found["status"]), found["output"], found["dmesg"], found.get("document", ""))
    except (tarfile.TarError, KeyError, ValueError) as error:
        console = _read(place / "console").splitlines()
        documents = [line.removeprefix(DOCUMENT) for line in console if line.startswith(DOCUMENT)]
        shown = [line for line in console if not line.startswith(DOCUMENT)][-_CONSOLE_LINES:]
        words = "\n".join([f"{cell} gave no answer ({error}; {said}); its console:", *shown])
        raise MachineError(words, documents[-1] if documents else "") from error


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None
    return file.read().decode(errors="replace")


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""
