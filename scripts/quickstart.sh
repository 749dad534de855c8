#!/usr/bin/env bash
# As root on Debian or Ubuntu: sets up, then shows what securerun does. Two hosts made of network namespaces train one
# model together, first with torchrun, then with securerun, while a third host tries to get at every port of theirs.
# Nothing is changed in the machine's own network. Ends with status 1 if anything was not as promised.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
if [ "$(id -u)" != 0 ]; then
    echo "quickstart: hosts made of network namespaces need root; run this as root" >&2
    exit 1
fi
scripts/setup.sh
exec "${SECURERUN_VENV:-.venv}/bin/python" scripts/quickstart.py < /dev/null
