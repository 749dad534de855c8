#!/usr/bin/env bash
# As root on x86-64 Debian, by hand before a release: tries each Python with each torch that there are wheels of. Each
# Python is that of a Debian of its own, in a directory; the kernel is this machine's. There a job of two nodes runs while
# a stranger tries its ports, then the tests of parity, and the help is asked for. docs/versions.md gets a line a pair.
#   scripts/torches.sh                    all pairs, one after another: some hours
#   scripts/torches.sh 3.9:2.1 3.13:2.9   these
#
# LAB  where the Debians, pip's cache and the logs are (default: /tmp/vm). PyPI's torch for x86-64 is a CUDA build, which
#      runs without a GPU: a pair takes 6 GB while it is tried, and the cache 3 GB for each torch.
# PARITY  which of the tests of parity, as pytest's -k has it (default: all, some 5 minutes a pair).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
lab=${LAB:-/tmp/vm}
here=$lab/torches
packages=python3,python3-venv,ca-certificates,iproute2,iptables,nftables,kmod,mount,passwd,procps,util-linux

say() { echo "torches: $*" >&2; }

suite_of() { # PYTHON: the Debian whose own it is
    case $1 in
        3.9) echo bullseye ;;
        3.11) echo bookworm ;;
        3.13) echo trixie ;;
    esac
}

make_root() { # SUITE
    local root=$lab/roots/torches-$1 mirror
    [ ! -e "$root/made" ] || return 0
    say "making $root"
    # shellcheck disable=SC2016 # apt's own words
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/\?$')
    rm -rf "$root"
    mkdir -p "$lab/roots"
    mmdebstrap --quiet --mode=root --variant=apt --include="$packages" --skip=check/qemu "$1" "$root" \
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main"
    touch "$root/made"
}

# What is of this machine: its name, and what pip is told of it.
of_this_machine() {
    printf '%s\n' /etc/hosts /etc/resolv.conf /etc/ssl/certs
    python3 -m pip config list | grep -o "/[^ ']*" | sed 's|^/*|/|'
}

# A command in a Debian, with a /run and a cgroup tree of its own. PLACE is its /srv, and goes afterwards.
within() { # ROOT PLACE COMMAND...
    local root=$1 place=$2
    shift 2
    # shellcheck disable=SC2016 # expanded by the shell that runs it
    scripts/isolated.sh unshare --mount sh -ec '
        root=$0 place=$1 cache=$2 seen=$3
        shift 3
        mount --make-rprivate /
        mount --bind "$root" "$root"
        for directory in proc sys dev run; do mount --rbind "/$directory" "$root/$directory"; done
        mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
        mount --bind "$place" "$root/srv"
        mount --bind "$cache" "$root/mnt"
        for path in $seen; do
            [ -e "$path" ] || continue
            if [ -d "$path" ]; then mkdir -p "$root$path"; else mkdir -p "$root${path%/*}" && touch "$root$path"; fi
            mount --bind "$path" "$root$path"
        done
        mkdir "$root/tmp/old"
        cd "$root"
        pivot_root . tmp/old
        umount -l /tmp/old
        cd /srv/checkout
        exec env HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin PIP_CACHE_DIR=/mnt "$@"
    ' "$root" "$place" "$here/cache" "$(of_this_machine | sort -u)" "$@" < /dev/null
}

install() { # ROOT PLACE TORCH
    # torch before 2.3 was built for numpy 1.
    # shellcheck disable=SC2016 # expanded by the shell that runs it
    within "$1" "$2" bash -euc '
        python3 -m venv /srv/venv
        pip() { /srv/venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check "$@"; }
        pip --upgrade pip
        case $1 in 2.[0-2]) numpy="numpy<2" ;; *) numpy=numpy ;; esac
        # torch 2.6 asks for it before Python 3.10 (elastic/rendezvous/registry.py), and does not say so.
        pip --only-binary torch "torch==$1.*" "$numpy"
        pip --editable . pytest hypothesis PyYAML importlib_metadata
        /srv/venv/bin/python -m compileall -q securerun
    ' bash "$3"
}

# Runs tests, and says how many passed: `14 of 14`. None passed is `0 of 0` where pytest did not come so far.
tried() { # ROOT PLACE LOG TESTS...
    local root=$1 place=$2 log=$3 passed failed
    shift 3
    within "$root" "$place" /srv/venv/bin/python -m pytest -q -p no:cacheprovider "$@" > "$log" 2>&1 || true
    passed=$(tail -n 1 "$log" | grep -o '[0-9]* passed' || echo 0)
    failed=$(tail -n 1 "$log" | grep -oE '[0-9]+ (failed|error)' | awk '{sum += $1} END {print sum + 0}')
    echo "${passed% *} of $((${passed% *} + failed))"
}

try_pair() { # PYTHON TORCH
    local python=$1 torch=$2 root place=$here/$1-$2 log=$here/logs/$1-$2 version
    root=$lab/roots/torches-$(suite_of "$python")
    mkdir -p "$here"/{cache,logs} "$place/checkout"
    git -c safe.directory="$PWD" ls-files -z | xargs -0 cp --parents -t "$place/checkout"
    say "$python with $torch"
    if ! install "$root" "$place" "$torch" > "$log.install" 2>&1; then
        grep -q "No matching distribution found for torch" "$log.install" || {
            say "it could not be installed; see $log.install"
            return 1
        }
        python3 scripts/versions_page.py "$python" "$torch" "no wheel"
        return 0
    fi
    version=$(within "$root" "$place" /srv/venv/bin/python -c \
        'from importlib import metadata; print(metadata.version("torch"))') || return 1
    python3 scripts/versions_page.py "$python" "$version" \
        "$(tried "$root" "$place" "$log.launch" tests/whole/test_two_nodes.py -k 'stranger_cannot_reach and not legacy')" \
        "$(tried "$root" "$place" "$log.parity" tests/whole/test_parity.py tests/whole/test_torch_launch.py -k "${PARITY:-}")" \
        "$(tried "$root" "$place" "$log.help" tests/whole/test_launch.py -k 'help or main_takes or module_and')"
}

[ $# -gt 0 ] || set -- {3.9,3.11,3.13}:{2.1,2.6,2.9,2.13,2.14}
for pair in "$@"; do
    if [[ ! $pair =~ ^3\.(9|11|13):[0-9]+\.[0-9]+$ ]]; then
        say "$pair is no pair of a Python that a Debian has and a torch; write 3.9:2.1, 3.11:2.6 or 3.13:2.9"
        exit 2
    fi
done
if [ "$(id -u)" != 0 ] || ! command -v mmdebstrap > /dev/null; then
    say "this makes Debians, so it needs root and mmdebstrap: apt-get install mmdebstrap, then this as root"
    exit 1
fi
failed=()
for pair in "$@"; do
    make_root "$(suite_of "${pair%:*}")"
    try_pair "${pair%:*}" "${pair#*:}" || failed+=("$pair")
    rm -rf "${here:?}/${pair%:*}-${pair#*:}"
done
if [ ${#failed[@]} -gt 0 ]; then
    say "not tried: ${failed[*]}"
    exit 1
fi
