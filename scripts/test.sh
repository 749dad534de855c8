#!/usr/bin/env bash
# Sets up, checks style and types, and runs all tests. Arguments go to pytest: scripts/test.sh -k shield
# As root, everything; as another user the tests that need network namespaces are skipped (in CI they fail).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
scripts/lint.sh
exec "${SECURERUN_VENV:-.venv}/bin/python" -m pytest "$@" < /dev/null
