#!/usr/bin/env bash
# As root: runs benchmarks and writes what they find to benchmarks/results/NAME.json, then docs/benchmarks.md and
# docs/pictures/*.svg from that.
#   scripts/bench.sh                     all of them, about a quarter of an hour
#   scripts/bench.sh layers connect      these
#   scripts/bench.sh --results DIRECTORY writes there, and no page
#   scripts/bench.sh --quick             few rounds, 3 minutes: whether they work, not how fast it is; no result is kept
# Each runs with a /run and a cgroup tree of its own. Keep the machine quiet meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
all=(exposure ending start connect tags layers guard traffic launch peers audit)
names=() quick=() results=
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=(--quick) ;;
        --results)
            results=${2:?--results needs a directory}
            shift
            ;;
        -*)
            echo "bench: unknown option $1; see the head of $0" >&2
            exit 2
            ;;
        *) names+=("$1") ;;
    esac
    shift
done
if [ ${#names[@]} = 0 ]; then
    for name in "${all[@]}"; do [ ! -e "benchmarks/$name.py" ] || names+=("$name"); done
fi
if [ ${#quick[@]} -gt 0 ] && [ -z "$results" ]; then
    results=$(mktemp -d)
    trap 'rm -r "$results"' EXIT
fi
scripts/setup.sh test
python=${SECURERUN_VENV:-$PWD/.venv}/bin/python
failed=()
for name in "${names[@]}"; do
    if [ ! -e "benchmarks/$name.py" ]; then
        echo "bench: there is no benchmark $name; there are ${all[*]}" >&2
        exit 2
    fi
    echo "== $name" >&2
    scripts/isolated.sh "$python" "benchmarks/$name.py" "${quick[@]}" --json "${results:-benchmarks/results}/$name.json" \
        < /dev/null || failed+=("$name")
done
if [ -z "$results" ]; then
    "$python" benchmarks/pictures.py
    "$python" benchmarks/page.py
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "bench: failed: ${failed[*]}" >&2
    exit 1
fi
