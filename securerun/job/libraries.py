"""Which of the libraries that open connections for a job can be in use on this host, and what that makes of variables.

A cluster's environment names interfaces and ports for all of its libraries, on every host. A variable that cannot be
right is refused where its library may read it; where the library has neither device nor software, nobody would ever
have missed what it says, and it is passed over with a line.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Mapping
from pathlib import Path

from securerun.errors import PolicyError

_DEVICES = Path("/dev")
# Where CANN's installer puts it, and what its set_env.sh says.
_CANN = Path("/usr/local/Ascend")
_CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")


class Library(str, enum.Enum):
    """A library whose variables are read here, in its own spelling."""

    GLOO = "gloo"
    HCCL = "HCCL"
    NCCL = "NCCL"

    __str__ = str.__str__


# The device files that each needs. Those of NCCL also are of its ports to other makers' devices, which read its
# variables: RCCL (kfd), Jetson's (nvhost, nvgpu, nvmap), WSL's (dxg), Iluvatar's. gloo needs none.
_DEVICE_FILES: Mapping[Library, tuple[str, ...]] = {
    Library.HCCL: ("davinci*", "vdavinci*", "hisi_hdc", "devmm_svm"),
    Library.NCCL: ("nvidia*", "kfd", "dxg", "nvhost*", "nvgpu*", "nvmap", "iluvatar*"),
}
_LACKING: Mapping[Library, str] = {
    Library.HCCL: "no NPU in /dev, and no CANN",
    Library.NCCL: "no NVIDIA or AMD device in /dev",
}


def may_be_in_use(library: Library, environment: Mapping[str, str], devices: Path | None = None) -> bool:
    """Return whether a job on this host could use a library: its device is there, or what is installed for it alone.

    devices: where device files are.
    """
    if library is Library.GLOO:
        return True
    if any(any((devices or _DEVICES).glob(pattern)) for pattern in _DEVICE_FILES[library]):
        return True
    return library is Library.HCCL and _has_cann(environment)


class Variables:
    """How the variables of libraries are read in one launch. warnings: what was passed over, a line each."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._warnings: dict[str, None] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was passed over, each once."""
        return tuple(self._warnings)

    @contextlib.contextmanager
    def of(self, library: Library) -> Iterator[None]:
        """Read variables of a library in this block.

        A PolicyError of the block is raised where the library may be in use; elsewhere it ends the block, and is noted.
        """
        try:
            yield
        except PolicyError as error:
            if may_be_in_use(library, self._environment):
                raise
            self._warnings[f"{error}; passed over, since {library} cannot be in use here: {_LACKING[library]}"] = None


def _has_cann(environment: Mapping[str, str]) -> bool:
    named = (environment.get(variable, "").strip() for variable in _CANN_VARIABLES)
    return any(_is_directory(path) for path in (_CANN, *(Path(text) for text in named if text)))


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # somebody may not look there: it is there
        return True
