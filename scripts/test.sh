#!/usr/bin/env bash
# Sets up, checks style and types, and runs all tests, as many at a time as there are cores, each in a /run and a cgroup
# tree of its own. Arguments go to pytest, which then runs one test at a time: scripts/test.sh -k shield
# As root, everything; as another user the tests that need network namespaces are skipped (in CI they fail).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
scripts/lint.sh
python=${SECURERUN_VENV:-$PWD/.venv}/bin/python
if [ $# = 0 ] && [ "$(id -u)" = 0 ]; then
    set -- --dist loadfile --tx "$(nproc)*popen//python=$PWD/scripts/isolated.sh $python"
fi
exec "$python" -m pytest "$@" < /dev/null
