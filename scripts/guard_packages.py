"""Builds a .deb and an .rpm of the guard alone: what root runs, for hosts whose users have securerun of their own.

    guard_packages.py DIRECTORY    of the checkout that it is in, into a directory

The guard needs the standard library alone, so this needs nothing but what Python has, dpkg-deb and rpmbuild; where one
of these is missing its package is left out, which is said. See scripts/package.sh.
"""

from __future__ import annotations

import ast
import configparser
import gzip
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from securerun.ctl import setup  # noqa: E402 - of this checkout, which is not installed

NAME = "securerun-guard"
SUMMARY = "closes the network of training jobs to everyone but the job"
_DESCRIPTION = (
    "securerun starts distributed PyTorch jobs as torchrun does, with all their ports closed to strangers. This is the "
    "part of it that runs as root, for hosts where users have securerun in environments of their own."
)
_LIBRARY = "usr/lib/securerun"
_PROGRAM = Path("usr/sbin", NAME)
_UNITS = "usr/lib/systemd/system"
_DOCUMENTS = f"usr/share/doc/{NAME}"
# Minimal systems keep no documents.
_EXAMPLES = f"usr/share/{NAME}"
_BEGINNING = ("securerun.guard.server", "securerun.guard.program", "securerun.guard.listener")
_OLDEST_PYTHON = "3.9"

_PROGRAM_TEXT = f"""\
#!/usr/bin/python3 -IS
import sys

sys.path.append("/{_LIBRARY}")
from securerun.guard.program import main

main()
"""

# The group whose members may connect; no user is in it until an administrator says so. Compiled here, since the unit
# has /usr read-only, and each guard would compile all of it again.
_AFTER_INSTALLING = f"""\
umask 022
getent group {setup.DEFAULT_GROUP} > /dev/null || groupadd --system {setup.DEFAULT_GROUP}
/usr/bin/python3 -IS -m compileall -q /{_LIBRARY} || :
if [ -d /run/systemd/system ]; then systemctl daemon-reload || :; fi
"""
# What was compiled is no file of the package's.
_BEFORE_REMOVING = f"""\
if [ -d /{_LIBRARY} ]; then find /{_LIBRARY} -depth -type d -name __pycache__ -exec rm -rf {{}} +; fi
"""
# Guards that run go on until their jobs end; only nobody connects any more.
_STOP = "if [ -d /run/systemd/system ]; then systemctl --no-reload disable --now securerun.socket || :; fi\n"

_CONTROL = """\
Package: {name}
Version: {version}
Architecture: all
Maintainer: The developers of securerun <securerun@localhost>
Installed-Size: {size}
Depends: python3 (>= {python}), passwd
Recommends: iptables | nftables, python3 (>= 3.11) | python3-tomli
Suggests: sudo, systemd
Section: admin
Priority: optional
Description: {summary}
 {description}
"""

_SPEC = """\
%global __os_install_post %{{nil}}
%global _binary_payload w9.gzdio
Name: {name}
Version: {version}
Release: 1
Summary: {summary}
License: Apache-2.0
BuildArch: noarch
AutoReqProv: no
Requires: /usr/bin/python3
Requires: python3 >= {python}
Requires(post): /usr/sbin/groupadd
Recommends: iptables
Recommends: (python3-tomli if python3 < 3.11)

%description
{description}

%install
mkdir -p %{{buildroot}}
cp -a {root}/. %{{buildroot}}/

%files
%defattr(-,root,root,-)
{directories}
{files}

%post
{post}
%preun
if [ "$1" = 0 ]; then
{preun}
fi
"""


def main(into: Path) -> None:
    """Build what can be built here."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="securerun-guard.") as work:
        root = Path(work, "root")
        stage(root)
        for program, build in (("dpkg-deb", build_deb), ("rpmbuild", build_rpm)):
            if shutil.which(program) is None:
                print(f"package: no {program} here, so no package of the guard by it", file=sys.stderr)
                continue
            build(root, Path(work), into)


def stage(root: Path) -> None:
    """Put every file of the package below a root, each with the mode that it is to have."""
    for module in sorted(modules()):
        _write(root / _LIBRARY / module, (CHECKOUT / module).read_text(encoding="utf-8"))
    _write(root / _PROGRAM, _PROGRAM_TEXT, 0o755)
    program = Path("/", _PROGRAM)
    for name, text in setup.guard_units(program, setup.DEFAULT_GROUP).items():
        _write(root / _UNITS / name, text)
    _write(root / _EXAMPLES / "sudoers", setup.sudoers_rule(f"%{setup.DEFAULT_GROUP}", program))
    _write(root / _DOCUMENTS / "copyright", (CHECKOUT / "LICENSE").read_text(encoding="utf-8"))
    for page in sorted((CHECKOUT / "docs/man").iterdir()):
        place = root / f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz"
        _write(place, gzip.compress(page.read_bytes(), mtime=0))


def modules() -> set[str]:
    """The files of all modules that a guard may load, and of the packages that these are in."""
    known = {_name_of(path.relative_to(CHECKOUT)): path for path in (CHECKOUT / "securerun").rglob("*.py")}
    found: set[str] = set()
    pending = [*_BEGINNING]
    while pending:
        name = pending.pop()
        if name in known and name not in found:
            found.add(name)
            pending += [name.rpartition(".")[0]]
            pending += [] if known[name].name == "__init__.py" else _imported(known[name])
    return {str(known[name].relative_to(CHECKOUT)) for name in found}


def _imported(path: Path) -> Iterator[str]:
    """What a module names: by imports, inside of functions too, and in texts for importlib."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _version() -> str:
    """The version as both kinds of package sort it: what comes before a release has a tilde."""
    configuration = configparser.ConfigParser()
    configuration.read(CHECKOUT / "setup.cfg")
    return re.sub(r"\.?(dev|a|b|rc)(\d+)", r"~\1\2", configuration["metadata"]["version"])


def build_deb(root: Path, work: Path, into: Path) -> None:
    """Build the .deb of what is staged. Raises CalledProcessError with dpkg-deb's own words before."""
    tree = work / "deb"
    shutil.copytree(root, tree)
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file()) // 1024 + 1
    version = _version()
    wrapped = "\n ".join(textwrap.wrap(_DESCRIPTION, 76))
    control = _CONTROL.format(
        name=NAME, version=version, size=size, python=_OLDEST_PYTHON, summary=SUMMARY, description=wrapped
    )
    _write(tree / "DEBIAN/control", control)
    _write(tree / "DEBIAN/postinst", _script(_AFTER_INSTALLING), 0o755)
    stop = f'if [ "$1" = remove ]; then\n{_STOP}fi\n'
    _write(tree / "DEBIAN/prerm", _script(stop + _BEFORE_REMOVING), 0o755)
    built = into / f"{NAME}_{version}_all.deb"
    _run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(tree), str(built))


def build_rpm(root: Path, work: Path, into: Path) -> None:
    """Build the .rpm of what is staged. Raises CalledProcessError with rpmbuild's own words before."""
    top = work / "rpm"
    below = sorted(root.rglob("*"))
    ours = (root / _LIBRARY, root / _DOCUMENTS, root / _EXAMPLES)
    own = [path for path in below if path.is_dir() and {path, *path.parents}.intersection(ours)]
    spec = _SPEC.format(
        name=NAME,
        version=_version(),
        summary=SUMMARY,
        python=_OLDEST_PYTHON,
        description="\n".join(textwrap.wrap(_DESCRIPTION, 76)),
        root=root,
        directories="\n".join(f"%dir /{path.relative_to(root)}" for path in own),
        files="\n".join(f"/{path.relative_to(root)}" for path in below if path.is_file()),
        post=_AFTER_INSTALLING,
        preun=_STOP + _BEFORE_REMOVING,
    )
    _write(top / "guard.spec", spec)
    _run("rpmbuild", "-bb", "--quiet", "--define", f"_topdir {top}", str(top / "guard.spec"))
    for built in (top / "RPMS").rglob("*.rpm"):
        shutil.copy(built, into)


def _script(text: str) -> str:
    return f"#!/bin/sh\nset -e\n{text}"


def _write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
