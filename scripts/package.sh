#!/usr/bin/env bash
# Builds an sdist of what git tracks here, as it stands here now, a wheel from that sdist, and a .deb and an .rpm of the
# guard alone (scripts/guard_packages.py):
#   scripts/package.sh              into dist/
#   scripts/package.sh DIRECTORY    into another directory
# pip fetches what builds them (pypa/build, setuptools) into an environment that is gone afterwards. The tree that is
# built is a copy: setuptools also packages what an earlier build left in build/ and *.egg-info.
set -euo pipefail
cd "$(dirname "$0")/.."
into=$(realpath -m "${1:-dist}")
place=$(mktemp -d /tmp/securerun-package.XXXXXX)
trap 'rm -rf "$place"' EXIT

umask 022 # what is packaged is for everybody, whoever packages it
# Git asks whose the checkout is before it reads it; root in a container may package another user's.
git -c safe.directory="$PWD" ls-files -z > "$place/tracked" || {
    echo "package: git says what belongs in a package; run this in a checkout of securerun's repository" >&2
    exit 1
}
mkdir "$place/tree"
xargs -0 cp --parents -t "$place/tree" < "$place/tracked"
chmod -R u=rwX,go=rX "$place/tree"

python3 -m venv "$place/environment"
python=$place/environment/bin/python
"$python" -m pip install --quiet --no-input --disable-pip-version-check build < /dev/null
"$python" -m build --outdir "$into" "$place/tree" < /dev/null
"$python" "$place/tree/scripts/guard_packages.py" "$into"
