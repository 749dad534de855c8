#!/usr/bin/env bash
# As root: sets up, then runs the tests over a copy of the tree in which every process of securerun notes the branches
# that it takes, and reports those of what runs as root: guard, firewall and linux. Arguments go to pytest:
#   scripts/coverage.sh tests/ctl/test_ctl.py
# Tests of what the guard imports and how small it is fail here: it holds the tool that watches it. What a killed process
# did is not known; so the child of the shield's self-test (selftest.py), which its parent kills, does not count.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
scripts/setup.sh test
python=$(realpath -s "${SECURERUN_VENV:-$PWD/.venv}")/bin/python
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
place=$(mktemp -d /tmp/securerun-coverage.XXXXXX)
trap 'rm -rf "$place"' EXIT
chmod 755 "$place"

git ls-files -z | xargs -0 cp --parents -t "$place"
mkdir -m 1777 "$place/data"
cat > "$place/coverage.cfg" << END
[run]
branch = True
parallel = True
data_file = $place/data/coverage
source = $place/securerun
patch = fork, _exit, execv
[report]
include = */securerun/guard/*, */securerun/firewall/*, */securerun/linux/*
exclude_also =
    if TYPE_CHECKING:
    def (_answer_and_exit|_errno_of|_enter|_listed|_send_to_self|_send_over)\(
show_missing = True
skip_covered = True
END
cat >> "$place/securerun/__init__.py" << END

import os, sys  # noqa
os.environ["COVERAGE_PROCESS_START"] = "$place/coverage.cfg"
sys.path.append("$packages")
import coverage  # noqa
coverage.process_startup()
sys.path.remove("$packages")
END

# A virtual environment of links, with all packages and commands but securerun's own.
"$python" -m venv --without-pip "$place/.venv"
venv=$(dirname "$(dirname "$python")")
ln -s "$venv/npu" "$place/.venv/npu"
find "$packages" -mindepth 1 -maxdepth 1 ! -name '*securerun*' \
    -exec ln -s -t "$place/.venv/lib/$(basename "$(dirname "$packages")")/site-packages" {} +
for command in "$venv"/bin/*; do
    name=${command##*/}
    case $name in activate* | Activate* | securerun* | python*) continue ;; esac
    cp "$command" "$place/.venv/bin/$name"
    if head -c 2 "$command" | grep -q '#!'; then
        sed -i "1s|$venv/bin/|$place/.venv/bin/|" "$place/.venv/bin/$name"
    fi
done
cd "$place"
"$python" -m pip --python "$place/.venv/bin/python" install --quiet --no-deps --no-build-isolation --editable .
set -- --dist loadfile --tx "$(nproc)*popen//python=$place/scripts/isolated.sh $place/.venv/bin/python" "$@"
.venv/bin/python -m pytest "$@" < /dev/null || echo "coverage: not all tests passed" >&2
"$python" -m coverage combine --quiet --rcfile coverage.cfg
"$python" -m coverage report --rcfile coverage.cfg --fail-under 95
