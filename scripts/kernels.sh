#!/usr/bin/env bash
# As root: boots machines with the kernels that people have, under QEMU, and tries securerun in each: what doctor says and
# what is true, runs of one node and of two, kills, the tests of the shield, the guard and the port chains, and that nothing
# is left. Keeps what each came to in docs/kernels/ and writes docs/kernels.md. Arguments go to tests/ground/kernel_matrix.py:
#   scripts/kernels.sh                            all cells, a night
#   scripts/kernels.sh 5.10/amd64/v1 '6.12/*'     these
#   scripts/kernels.sh --missing --parts truth,one,two,kills,socket,left
#   scripts/kernels.sh --kernel DIRECTORY         a kernel of your own: vmlinuz, release, modules/RELEASE
#   scripts/kernels.sh --run 5.10/arm64/v2 'uname -a'
#   scripts/kernels.sh --run 5.10/um/v2 'COMMAND'  the kernel built as a program, ten times as quick, for all that starts no torch
# SECURERUN_KERNELS: where kernels, disks and packages are kept (default: .kernels in the checkout, some gigabytes).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
if [ "$(id -u)" != 0 ]; then
    echo "kernels: disks whose files belong to root need root; run this as root" >&2
    exit 1
fi
scripts/setup.sh test
exec "${SECURERUN_VENV:-.venv}/bin/python" tests/ground/kernel_matrix.py "$@" < /dev/null
