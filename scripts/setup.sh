#!/usr/bin/env bash
# Sets up what the other scripts need: system packages, a virtual environment, torch and securerun in it.
#   scripts/setup.sh            to run securerun
#   scripts/setup.sh test       to run its tests as well
# May be run again at any time: it installs only what is missing and, if nothing is, is done at once without a network.
#
# SECURERUN_VENV         where the virtual environment is (default: .venv in the checkout)
# SECURERUN_TORCH        what to install where there is no torch (default: torch==2.13.0, for Python 3.10 and newer)
# SECURERUN_TORCH_INDEX  an additional package index to look for it, such as PyTorch's own index of CPU builds.
#                        Without it pip takes what its usual index has: on x86-64 a build of some gigabytes with CUDA,
#                        which works too.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin" # where a root shell made by plain `su` does not look
extra=${1:-}
venv=${SECURERUN_VENV:-$PWD/.venv}

say() { echo "setup: $*" >&2; }

missing_packages() {
    command -v ip > /dev/null || echo iproute2
    command -v iptables > /dev/null && command -v ip6tables > /dev/null || echo iptables
    command -v nft > /dev/null || echo nftables
    command -v nsenter > /dev/null && command -v setpriv > /dev/null || echo util-linux
    command -v ps > /dev/null || echo procps
    # python-iptables, for the legacy backend, is compiled when it is installed.
    [ "$extra" != test ] || command -v gcc > /dev/null || echo gcc libc6-dev
    # The ways of an ordinary user to a guard are tried with real users, sudo and socket activation.
    [ "$extra" != test ] || command -v sudo > /dev/null || echo sudo
    [ "$extra" != test ] || command -v useradd > /dev/null || echo passwd
    [ "$extra" != test ] || command -v systemd-socket-activate > /dev/null || echo systemd
    # A job's own network has either of these as its way out.
    [ "$extra" != test ] || command -v pasta > /dev/null || echo passt
    [ "$extra" != test ] || command -v slirp4netns > /dev/null || echo slirp4netns
    # Completion is tried in real shells.
    [ "$extra" != test ] || command -v zsh > /dev/null || echo zsh
    # The Slurm example runs on a cluster of its own.
    [ "$extra" != test ] || { command -v slurmctld && command -v slurmd && command -v munged; } > /dev/null ||
        echo slurm-wlm munge
    # Containers are tried in real engines; nothing of theirs is started by their packages.
    [ "$extra" != test ] || [ -x /usr/bin/podman ] || echo podman
    # A developer's machine may have another client, in /usr/local.
    [ "$extra" != test ] || { [ -x /usr/bin/docker ] && [ -x /usr/sbin/dockerd ]; } || echo docker.io
    [ "$extra" != test ] || { command -v runc && command -v catatonit; } > /dev/null || echo runc catatonit
    # What belongs in a package is what git tracks.
    [ "$extra" != test ] || command -v git > /dev/null || echo git
    # Machines with older kernels are made and booted (scripts/kernels.sh).
    [ "$extra" != test ] || command -v qemu-system-x86_64 > /dev/null || echo qemu-system-x86
    [ "$extra" != test ] || command -v qemu-system-aarch64 > /dev/null || echo qemu-system-arm
    [ "$extra" != test ] || { command -v cpio && command -v depmod && command -v mke2fs; } > /dev/null ||
        echo cpio kmod e2fsprogs
    [ "$extra" != test ] || { command -v xz && command -v zstd; } > /dev/null || echo xz-utils zstd
    # Packages of the guard are built, and installed into roots of their own.
    [ "$extra" != test ] || command -v rpmbuild > /dev/null || echo rpm
    [ "$extra" != test ] || command -v mmdebstrap > /dev/null || echo mmdebstrap
    [ "$extra" != test ] || command -v mandoc > /dev/null || echo mandoc
    # The page of --report is looked at in a browser.
    [ "$extra" != test ] || command -v chromium > /dev/null || echo chromium fonts-noto-core
    # Debian's python3 comes without what makes virtual environments.
    python3 -c 'import ensurepip, venv' 2> /dev/null || echo python3 python3-venv
}

install_system_packages() {
    local missing
    missing=$(missing_packages | xargs)
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        say "please install with your system's package manager, then run this again: $missing"
        exit 1
    fi
    say "installing $missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq < /dev/null
    # shellcheck disable=SC2086 # a list of words
    without_services apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends $missing < /dev/null > /dev/null
    # Nor at the next start of the machine.
    case " $missing " in *" munge "*) disable munge slurmctld slurmd ;; esac
    case " $missing " in *" docker.io "*) disable docker.service docker.socket containerd ;; esac
    case " $missing " in *" podman "*) disable podman.service podman.socket podman-restart podman-auto-update.service podman-auto-update.timer ;; esac
}

disable() { systemctl disable --quiet "$@" > /dev/null 2>&1 || true; }

# Slurm's tests start what they need of it. Before a package starts its service it asks policy-rc.d (Debian Policy 9.3.3).
without_services() (
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod 755 "$policy"
    fi
    "$@"
)

make_virtual_environment() {
    if "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
        return 0
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then
        say "$(python3 --version) is too old; securerun needs Python 3.9 or newer as python3"
        exit 1
    fi
    say "making $venv"
    python3 -m venv --clear "$venv"
}

torch_version() {
    "$venv/bin/python" -c 'import importlib.metadata as metadata; print(metadata.version("torch"))' 2> /dev/null
}

has_torch() { torch_version > /dev/null; }

pip_install() {
    "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check "$@" < /dev/null
}

install_torch() {
    has_torch && return 0
    say "installing ${SECURERUN_TORCH:=torch==2.13.0}"
    pip_install ${SECURERUN_TORCH_INDEX:+--extra-index-url "$SECURERUN_TORCH_INDEX"} "$SECURERUN_TORCH"
}

# The note in the virtual environment says for which checkout and which requirements it was filled.
note="$venv/.filled-for${extra:+-$extra}"
requirements() { echo "$PWD"; sha256sum setup.cfg pyproject.toml; }

install_securerun() {
    if has_torch && [ "$(cat "$note" 2> /dev/null)" = "$(requirements)" ]; then
        return 0
    fi
    install_torch
    say "installing securerun${extra:+ and what its tests need}"
    pip_install --editable ".${extra:+[$extra]}"
    requirements > "$note"
}

# As pip does, but for what is installed as editable; without it, where PYTHONDONTWRITEBYTECODE is set, as in many
# containers, every launch compiles all that it imports.
compile_securerun() { "$venv/bin/python" -m compileall -q securerun; }

# For the tests of torch_npu_run. In a directory of its own, since among the packages of the virtual environment
# `import torch` would load it, in every other test, and fail for want of CANN's libraries.
install_torch_npu() {
    local directory="$venv/npu" packages
    [ "$extra" = test ] || return 0
    packages=("torch-npu==$(torch_version | cut -d + -f 1)" pyyaml) # the one made for the torch that is there
    [ "$(cat "$directory/.filled-with" 2> /dev/null)" != "${packages[*]}" ] || return 0
    say "installing torch_npu in $directory"
    rm -rf "$directory"
    # Its --no-deps leaves the torch that is there alone; numpy, which it needs too, is there for the other tests.
    if pip_install --no-deps --only-binary :all: --target "$directory" "${packages[@]}"; then
        echo "${packages[*]}" > "$directory/.filled-with"
    else
        say "could not install torch_npu; the tests of torch_npu_run are skipped (in CI they fail)"
    fi
}

# For the tests of docs/launchers.md: launchers of others, in an environment of their own that sees all of the tests' and
# changes nothing of it.
launchers=(accelerate==1.15.0 deepspeed==0.19.8 lightning-fabric==2.6.6 pytorch-lightning==2.6.6 ray==2.60.0 torchx==0.7.0)
install_launchers() {
    local directory="$venv/launchers" seen
    [ "$extra" = test ] || return 0
    seen="$(torch_version) $PWD ${launchers[*]}"
    [ "$(cat "$directory/.filled-with" 2> /dev/null)" != "$seen" ] || return 0
    say "installing launchers of others in $directory"
    rm -rf "$directory"
    "$venv/bin/python" -m venv --without-pip "$directory"
    "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$directory/tests.pth"
    echo "$PWD" >> "$directory/tests.pth"
    mv "$directory/tests.pth" "$directory"/lib/python3*/site-packages/
    # deepspeed is built from its source, by the torch that is there, and compiles nothing then.
    if DS_BUILD_OPS=0 "$directory/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        --no-build-isolation "${launchers[@]}" < /dev/null; then
        echo "$seen" > "$directory/.filled-with"
    else
        say "could not install launchers of others; their tests are skipped (in CI they fail)"
    fi
}

install_system_packages
make_virtual_environment
install_securerun
compile_securerun
install_torch_npu
install_launchers
