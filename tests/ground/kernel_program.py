"""Debian's kernels built as programs of this machine: User-mode Linux, of Debian's source, with Debian's settings.

Emulated, a test takes some thirty times as long as here; in such a program three or four times. What it does with
system calls, networks, chains, cgroups and BPF is the kernel's own code; what is below that is this machine's. It has
one processor, an interpreter of BPF instead of its compiler, and no drivers. torch, whose start is ten thousands of
page faults, is no quicker in it. To build one takes some twenty minutes of a processor, once.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
from pathlib import Path

import kernel_lab
from kernel_cells import KERNELS
from kernel_lab import Apt, KernelFiles, LabError

# What of Debian's settings for x86-64 is taken over, as built in: what programs see of a kernel, without drivers.
_TAKEN = (
    "NF_ NFT_ NETFILTER IP_NF_ IP6_NF_ IP_SET IP_TABLES IP6_TABLES BRIDGE VETH MACVLAN IPVLAN DUMMY TUN IFB NET_ "
    "NETLINK INET IPV6 IP_ TCP_ MPTCP SYN_COOKIES UNIX PACKET CGROUP MEMCG BLK_CGROUP CPUSETS PROC_ BPF "
    "NAMESPACES UTS_NS IPC_NS USER_NS PID_NS TIME_NS SECCOMP SECURITY KEYS POSIX_MQ SYSVIPC FHANDLE EPOLL EVENTFD "
    "TIMERFD SIGNALFD FANOTIFY INOTIFY AIO IO_URING OVERLAY_FS TMPFS EXT4 FUSE_FS CRYPTO_USER_API CRYPTO_SHA "
    "CRYPTO_AES SCHED_ FAIR_GROUP CFS_BAND CHECKPOINT USERFAULTFD MEMBARRIER RSEQ KCMP XFRM SOCK_ VLAN LSM "
    "KALLSYMS TASK AUDIT COREDUMP BINFMT DEVTMPFS BLK_DEV_LOOP EXPERT MULTIUSER FILE_LOCKING FIB_RULES LWTUNNEL "
    "WIREGUARD VXLAN QUOTA ADVISE CRC PSI KSM XDP_SOCKETS DEBUG_FS PRINTK_TIME GENEVE BONDING NLMON "
)
_LEFT = (
    "SECURITY_SELINUX SECURITY_SMACK SECURITY_TOMOYO SECURITY_APPARMOR SECURITY_LOCKDOWN NET_VENDOR NET_9P "
    "NET_DSA NET_SWITCHDEV NET_DEVLINK NET_TEAM NET_FC BPF_JIT BPF_PRELOAD BPFILTER NF_CONNTRACK_H323 "
    "NF_CONNTRACK_SIP "
)
_OWN = (
    *("BLK_DEV_UBD=y", "BLK_DEV_INITRD=y", "NETDEVICES=y", "CGROUP_NET_PRIO=y", "STATIC_LINK=n", "DEBUG_INFO=n"),
    "DEBUG_INFO_NONE=y",
    *('SYSTEM_TRUSTED_KEYS=""', 'SYSTEM_REVOCATION_KEYS=""', 'LOCALVERSION="-um"'),
)
_TOOLS = ("make", "gcc", "flex", "bison", "bc")


def debian_kernel(name: str) -> KernelFiles:
    """Return one of the table's kernels as a program. Raises LabError, where it cannot be built too."""
    kernel = KERNELS[name]
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise LabError(f"{missing[0]} is missing, which builds kernels; apt-get install {' '.join(_TOOLS)} libelf-dev")
    made_by = kernel_lab.key_of(
        kernel, _TAKEN, _LEFT, _OWN, inspect.getsource(_configure), kernel_lab.INITRAMFS_INIT.read_text()
    )

    def make(place: Path) -> None:
        apt = Apt(kernel.suite, "amd64")
        settings = _debians_settings(apt, kernel.pattern.replace("ARCH", "amd64"), place.parent / "image")
        source = _source(apt, name, place.parent / "source")
        _configure(source, settings)
        kernel_lab.run("make", "-s", f"-j{os.cpu_count() or 1}", "ARCH=um", "linux", cwd=source)
        release = (source / "include/config/kernel.release").read_text().strip()
        built_in = place.parent / "built-in"
        built_in.mkdir()
        for file in source.glob("modules.builtin*"):
            shutil.copy(file, built_in)
        (built_in / "modules.order").touch()
        kernel_lab.make_kernel(place, "amd64", release, source / "linux", built_in)

    return kernel_lab.files_of(kernel_lab.made(f"kernel-{name}-um-{made_by}", make))


def _debians_settings(apt: Apt, pattern: str, tree: Path) -> list[str]:
    apt.fetch_newest(pattern, tree)
    (file,) = tree.glob("boot/config-*")
    return file.read_text().splitlines()


def _source(apt: Apt, name: str, tree: Path) -> Path:
    apt.fetch_newest(rf"linux-source-{re.escape(name)}", tree)
    (archive,) = tree.glob("usr/src/linux-source-*.tar.*")
    kernel_lab.run("tar", "-x", "-f", archive, "-C", tree)
    (source,) = tree.glob("linux-source-*")
    return source


def _configure(source: Path, debians: list[str]) -> None:
    """Write .config: that of the program's own architecture, what is taken over of Debian's, and what is built in."""
    # As on x86-64 and aarch64, and as it is here: or the verifier takes no program that reads what is not aligned.
    architecture = source / "arch/um/Kconfig"
    text = architecture.read_text()
    architecture.write_text(text.replace("config UML\n", "config UML\n\tselect HAVE_EFFICIENT_UNALIGNED_ACCESS\n", 1))
    taken, left = (tuple(f"CONFIG_{name}" for name in names) for names in (_TAKEN.split(), _LEFT.split()))
    lines = [line for line in debians if line.startswith(taken) and not line.startswith(left)]
    kernel_lab.run("make", "-s", "ARCH=um", "x86_64_defconfig", cwd=source)
    with (source / ".config").open("a") as file:
        # Of two lines for one name the last is what counts.
        file.writelines(f"{re.sub('=m$', '=y', line)}\n" for line in lines)
        file.writelines(f"CONFIG_{line}\n" for line in _OWN)
    kernel_lab.run("make", "-s", "ARCH=um", "olddefconfig", cwd=source)
    kernel_lab.run("sed", "-i", "s/=m$/=y/", ".config", cwd=source)
    kernel_lab.run("make", "-s", "ARCH=um", "olddefconfig", cwd=source)
