"""Files and directories of a launch: by whom they can be changed, and whether they are as closed as they may be."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from securerun.finding import Finding
from securerun.guard.program import LIMITS_FILE
from securerun.job import ranktable
from securerun.linux import trust
from securerun.linux.trust import WeakPoint
from securerun.options import SITE_CONFIG
from securerun.preflight.scene import Scene

_ROOT = 0
# Of the words of a command, those that name an existing file of these names are looked at.
_CONFIGURATION = re.compile(r".*\.(ya?ml|json|toml|ini|cfg|conf|py|sh)", re.IGNORECASE)
_KEY = re.compile(r".*\.(pem|key|p12|pfx|jks|keystore)|id_(rsa|dsa|ecdsa|ed25519)", re.IGNORECASE)

# Whoever can change what is in these changes what workers run: compiled extensions and kernels.
_CODE = (
    ("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions"),
    ("TORCHINDUCTOR_CACHE_DIR", ""),
    ("TRITON_CACHE_DIR", ""),
)
# CANN's environment variable reference, torch's own documentation of logging and of torch.compile.
_DIRECTORIES: tuple[tuple[str, str, str], ...] = (
    ("ASCEND_PROCESS_LOG_PATH", "~/ascend/log", "log"),
    ("TORCH_TRACE", "", "log"),
    ("ASCEND_WORK_PATH", "", "debug"),
    ("NPU_COLLECT_PATH", "", "debug"),
    ("DUMP_GRAPH_PATH", "", "debug"),
    ("TORCH_COMPILE_DEBUG_DIR", "", "debug"),
    ("ASCEND_CACHE_PATH", "", "temp"),
)
_SYSTEM = tuple({Path("/usr"), Path("/bin"), Path("/sbin"), Path(sys.prefix), Path(sys.base_prefix)})
# A script's own options for such directories, as `--tensorboard-dir` and `--profile-save-path` of MindSpeed's.
_LOG_OPTION = re.compile(r"--[\w-]*(log|tensorboard)[\w-]*(dir|path)", re.IGNORECASE)
_DEBUG_OPTION = re.compile(r"--[\w-]*(prof|dump|trace)[\w-]*(dir|path)", re.IGNORECASE)


def changeable_programs(scene: Scene) -> Iterator[Finding]:
    """Find who can change the script, what its arguments name, the rank table and the packages.

    Each weak place once: a directory that everybody may write to is above many of them.
    """
    owners = _trusted_owners()
    told: set[Path] = set()
    for name, what, path in (*_named(scene), *_packages(), *_rank_table(scene), *_caches_of_code(scene)):
        weakness = _weakness(path, owners)
        if weakness is not None and weakness.place not in told:
            told.add(weakness.place)
            yield _changeable(name, path, weakness, f"whoever can change it changes {what} {path}")


def changeable_configuration(scene: Scene) -> Iterator[Finding]:
    """securerun's own files: root's, and nobody else's."""
    if not SITE_CONFIG.parent.is_dir():
        return
    for path in (SITE_CONFIG, LIMITS_FILE):
        weakness = _weakness(path, trust.roots())
        if weakness is not None:
            yield _changeable("config", path, weakness, f"whoever can change it decides what {path} says to every job")


def open_keys(scene: Scene) -> Iterator[Finding]:
    """Keys among the arguments that others than their owner can read."""
    for name, _, path in _named(scene):
        if name == "key":
            yield from _too_open("key", path, "key", "others can read the key")


def open_directories(scene: Scene) -> Iterator[Finding]:
    """Directories of logs, profiles, dumps and caches, as the permission table has them."""
    told: set[Path] = set()
    for kind, path in _directories(scene):
        if path not in told and path.is_dir():
            told.add(path)
            why = f"more than the owner and their group's readers get at it, and a {kind} directory may have 750"
            yield from _too_open("directory", path, kind, why)


CHECKS = (changeable_programs, changeable_configuration, open_keys, open_directories)


def of_launch(scene: Scene) -> Iterator[Path]:
    """Yield the files and directories that are a launch's own: what its command names, rank table, logs, caches.

    Not what comes with the system or with Python.
    """
    for _, _, path in (*_named(scene), *_rank_table(scene)):
        if not any(path.resolve().is_relative_to(place) for place in _SYSTEM):
            yield path
    for _, path in _directories(scene):
        yield path


def _named(scene: Scene) -> Iterator[tuple[str, str, Path]]:
    """Yield the script or program of a command, and the files that its arguments name: check, words, path."""
    if not scene.command:
        return
    first, *arguments = scene.command
    script = _module(arguments.pop(0)) if first == "-m" and arguments else _script(first)
    if script is not None:
        yield "script", "the script", script
    for word in arguments:
        _, equals, value = word.partition("=")
        path = Path(value if word.startswith("-") and equals else word)
        if _KEY.fullmatch(path.name) and path.is_file():
            yield "key", "the key", path
        elif _CONFIGURATION.fullmatch(path.name) and path.is_file():
            yield "config", "the file", path


def _script(name: str) -> Path | None:
    if Path(name).exists():
        return Path(name)
    found = shutil.which(name)
    return Path(found) if found else None


def _module(name: str) -> Path | None:
    """Return where `python -m` finds a module's outermost package; to find more, Python would have to run it."""
    specification = importlib.machinery.PathFinder.find_spec(name.partition(".")[0], [str(Path.cwd()), *sys.path])
    if specification is None:
        return None
    places = specification.submodule_search_locations
    place = next(iter(places), None) if places else specification.origin
    return Path(place) if place else None


def _packages() -> Iterator[tuple[str, str, Path]]:
    """Yield where this Python looks for modules: site-packages, the standard library, PYTHONPATH."""
    for entry in sys.path:
        path = Path(entry or ".")
        if path.is_dir():
            yield "site-packages", "the modules in", path


def _rank_table(scene: Scene) -> Iterator[tuple[str, str, Path]]:
    location = ranktable.locate(scene.environment, lambda _: None)
    if location is not None:
        yield "rank-table", "the rank table", location.path


def _caches_of_code(scene: Scene) -> Iterator[tuple[str, str, Path]]:
    for variable, usual in _CODE:
        path = _directory(scene, variable, usual)
        if path is not None:
            yield "extensions", "the code in", path


def _directories(scene: Scene) -> Iterator[tuple[str, Path]]:
    if scene.log_dir:
        yield "log", Path(scene.log_dir)
    for variable, usual in _CODE:
        path = _directory(scene, variable, usual)
        if path is not None:
            yield "temp", path
    for variable, usual, kind in _DIRECTORIES:
        path = _directory(scene, variable, usual)
        if path is not None:
            yield kind, path
    yield from _directories_of_options(scene)


def _directories_of_options(scene: Scene) -> Iterator[tuple[str, Path]]:
    for word, following in zip(scene.command, (*scene.command[1:], "")):
        option, equals, value = word.partition("=")
        kind = next(
            (kind for pattern, kind in ((_LOG_OPTION, "log"), (_DEBUG_OPTION, "debug")) if pattern.fullmatch(option)),
            None,
        )
        if kind is not None and (value or following):
            yield kind, Path(value if equals else following)


def _directory(scene: Scene, variable: str, usual: str) -> Path | None:
    """Return the directory that a variable names, or the usual one; None where there is neither."""
    text = scene.environment.get(variable, "").strip() or usual
    if not text:
        return None
    home = scene.environment.get("HOME", "")
    path = Path(text.replace("~", home, 1) if text.startswith("~/") and home else text)
    return path if path.is_dir() else None


def _weakness(path: Path, owners: Collection[int]) -> WeakPoint | None:
    try:
        return trust.weak_point(path, owners)
    except OSError:
        return None


def _trusted_owners() -> frozenset[int]:
    """Return who may own what a job runs: root, and the job's user."""
    return trust.roots() | {os.geteuid()}


def _changeable(name: str, path: Path, weakness: WeakPoint, why: str) -> Finding:
    place = shlex.quote(str(weakness.place))
    if weakness.mode is not None:
        fix = f"chmod go-w {place}"
    elif os.geteuid() == _ROOT and weakness.place != path:  # nobody's home is to become root's
        fix = f"securerun --run-as {weakness.owner}"
    else:
        fix = f"chown {os.geteuid()} {place}" if os.geteuid() == _ROOT else f"cp -a {shlex.quote(str(path))} ~"
    return Finding(name, str(weakness), why, fix)


def _too_open(name: str, path: Path, kind: str, why: str) -> Iterator[Finding]:
    from securerun.host import permissions

    status = path.stat()
    if permissions.excess(status.st_mode, kind):
        allowed = stat.S_IMODE(status.st_mode) & permissions.row(kind).maximum(status.st_mode)
        what = f"{path} has mode {stat.S_IMODE(status.st_mode):o}"
        yield Finding(name, what, why, f"chmod {allowed:o} {shlex.quote(str(path))}")
