#!/usr/bin/env bash
# Checks securerun.
#   scripts/test.sh                     sets up, checks style and types, and runs all tests, three at a time for two cores,
#                                       each runner in a /run and a cgroup tree of its own
#   scripts/test.sh -k shield           likewise; arguments go to pytest, which then runs one test at a time
#   scripts/test.sh --fast [ARGUMENTS]  only the tests that need neither root nor namespaces, and take no time: for whoever
#                                       changes a line. No lint, which is scripts/lint.sh
# As root, everything, and --fast as an ordinary user; as another user the tests that need root are skipped (in CI they
# fail).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
python=${SECURERUN_VENV:-$PWD/.venv}/bin/python

if [ "${1:-}" = --fast ]; then
    shift
    [ -x "$python" ] || scripts/setup.sh test
    words=("$python" -m pytest -m "not ground and not slow" --numprocesses "$(nproc)" --dist worksteal "$@")
    if [ "$(id -u)" = 0 ]; then
        words=("$python" tests/ground/ordinary_user.py "${words[@]}" -p no:cacheprovider)
    fi
    exec "${words[@]}" < /dev/null
fi

scripts/lint.sh
if [ $# = 0 ] && [ "$(id -u)" = 0 ]; then
    # A third of a test is waiting.
    set -- --dist loadfile --no-loadscope-reorder --tx "$((($(nproc) * 3 + 1) / 2))*popen//python=$PWD/scripts/isolated.sh $python"
fi
exec "$python" -m pytest "$@" < /dev/null
