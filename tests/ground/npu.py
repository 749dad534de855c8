"""torch_npu, the real one, on a machine without NPU: the wheel from PyPI, and stand-ins for the libraries of CANN.

The wheel needs CANN's libraries to be loaded, not to be used: its launcher and its ParallelStore are plain TCP, and
gloo does the training. A stand-in is a shared library of the right name; one of them has all the functions that the
wheel links to, and each does nothing but return an error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from lacking import Lacking

# Where scripts/setup.sh installs torch_npu: out of the way of the other tests.
PACKAGES = Path(sys.prefix) / "npu"
TORCH_NPU_RUN = str(PACKAGES / "bin" / "torch_npu_run")
TRAIN = str(Path(__file__).with_name("npu_train.py"))
HCCL_PORTS = range(60000, 60016)

# What the wheel's own libraries name as NEEDED (readelf -d) and neither torch nor the system has.
_CANN = ("ascendcl", "hccl", "ge_runner", "graph", "acl_op_compiler", "acl_tdt_channel", "atb")
# ACL_ERROR_INTERNAL_ERROR of acl/acl_base.h
_ERROR = 500000
# These return a pointer, which is followed unless it is null.
_POINTERS = {"aclGetRecentErrMsg", "aclrtGetSocName", "aclCreateDataBuffer", "aclCreateTensorDesc", "aclopCreateAttr"}


def require() -> None:
    """Raise Lacking, saying what to do, where torch_npu cannot be had."""
    if not (PACKAGES / ".filled-with").exists():
        raise Lacking(f"{PACKAGES} has no torch_npu; run scripts/setup.sh test")
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if missing:
        raise Lacking(f"{', '.join(missing)} not found; install gcc (scripts/setup.sh test does)")


def build_stand_ins(directory: Path) -> None:
    """Compile the stand-ins into a directory, with what else torch_npu looks for where CANN is installed."""
    for package in ("opp", "runtime", "compiler"):
        (directory / package).mkdir()
    lines = [
        f"void *{name}(void) {{ return 0; }}" if name in _POINTERS else f"int {name}(void) {{ return {_ERROR}; }}"
        for name in sorted(_functions_of_cann())
    ]
    for library in _CANN:
        source = directory / f"{library}.c"
        source.write_text("\n".join(lines) + "\n")
        name = f"lib{library}.so"
        subprocess.run(
            ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", directory / name, source], check=True
        )
        lines = []  # all functions are in the first one


def environment(stand_ins: Path) -> dict[str, str]:
    """What lets a launcher and its workers import torch_npu, when they ask for it and not before."""
    return {
        "PYTHONPATH": str(PACKAGES),
        "LD_LIBRARY_PATH": str(stand_ins),
        # Without the first torch_npu prints a warning on standard output, with it it wants the second.
        "ASCEND_HOME_PATH": str(stand_ins),
        "ASCEND_OPP_PATH": str(stand_ins / "opp"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def _functions_of_cann() -> set[str]:
    """What the wheel's libraries need and neither they, nor torch, nor Python and the C library define."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    wheel = [*PACKAGES.glob("torch_npu/lib/*.so"), *PACKAGES.glob("torch_npu/_C.*.so")]
    assert wheel
    defined = _symbols("--defined-only", [*wheel, *Path(torch.origin).parent.glob("lib/*.so*")])
    process = ctypes.CDLL(None)
    return {
        name
        for name, kind in _symbols("--undefined-only", wheel).items()
        # Weak symbols (w) may stay undefined, and one with a version belongs to a system library.
        if kind == "U" and "@" not in name and name not in defined and not hasattr(process, name)
    }


def _symbols(which: str, libraries: Iterable[Path]) -> dict[str, str]:
    """The dynamic symbols of libraries, each with its kind (nm(1))."""
    done = subprocess.run(["nm", "-D", which, *libraries], check=True, stdout=subprocess.PIPE, text=True)
    words = (line.split() for line in done.stdout.splitlines())
    return {symbol[-1]: symbol[-2] for symbol in words if len(symbol) >= 2}
