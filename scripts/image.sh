#!/usr/bin/env bash
# As root: builds an image of the guard for the nodes of a cluster of containers, from a wheel and Debian's python3:
#   scripts/image.sh                     into dist/, from a wheel of this checkout
#   scripts/image.sh WHEEL               into dist/
#   scripts/image.sh WHEEL DIRECTORY     into another directory
#   scripts/image.sh --base FILE         only the Debian of it, as a tar
# podman, docker and skopeo take it as it is:
#   podman load --input dist/securerun-guard-VERSION.tar
# The guard is that of `securerunctl setup kubernetes`: it listens, and begins a guard for each job that connects.
#
# SECURERUN_IMAGE_BASE   the Debian, as --base wrote it; without it one is made, with the packages of the day
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
wheel=${1:-}
into=$(realpath -m "${2:-dist}")
# Python for the guard, what it writes port chains with, and what the guard's own package needs as well.
packages=python3,iptables,libnftables1,passwd

# Pages and translations are for nobody there; who holds the rights to what stays.
make_base() { # FILE
    if ! command -v mmdebstrap > /dev/null; then
        echo "image: this makes a Debian, so it needs mmdebstrap: apt-get install mmdebstrap, then this again" >&2
        exit 1
    fi
    mmdebstrap --quiet --mode=root --variant=essential --include="$packages" --skip=check/qemu --format=tar \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        bookworm "$1" < /dev/null
}

umask 022 # what is packaged is for everybody, whoever packages it
if [ "$wheel" = --base ]; then
    make_base "${2:?a file for the Debian}"
    exit
fi
place=$(mktemp -d /tmp/securerun-image.XXXXXX)
trap 'rm -rf "$place"' EXIT
if [ -z "$wheel" ]; then
    scripts/package.sh "$place/dist" > /dev/null
    wheel=$(echo "$place"/dist/*.whl)
fi
base=${SECURERUN_IMAGE_BASE:-$place/base.tar}
[ -e "$base" ] || make_base "$base"
mkdir -p "$into"
python3 scripts/guard_image.py "$base" "$wheel" "$into"
