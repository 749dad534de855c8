#!/usr/bin/env bash
# As root: runs a command with a /run and a cgroup tree of its own, so that tests that look for what is left there run
# side by side:   scripts/isolated.sh COMMAND [ARGUMENTS]
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
# shellcheck disable=SC2016 # expanded by the shell that runs it
inside='
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
if [ -n "$0" ]; then
    umount "$0"
    mount -t cgroup2 cgroup2 "$0"
fi
exec "$@"
'
hierarchy=$(findmnt -n -t cgroup2 -o TARGET | tail -n 1)
if [ -z "$hierarchy" ]; then
    exec unshare --mount sh -e -c "$inside" "" "$@"
fi
# Whoever was killed could not remove theirs.
for left in "$hierarchy"/securerun-tests-*; do
    if ! kill -0 "${left##*-}" 2> /dev/null; then
        find "$left" -depth -type d -exec rmdir {} + 2> /dev/null || true
    fi
done
cgroup=$hierarchy/securerun-tests-$$
mkdir "$cgroup"
# shellcheck disable=SC2329 # called at the end
remove() {
    for _ in 1 2 3 4 5; do
        find "$cgroup" -depth -type d -exec rmdir {} + 2> /dev/null && break
        sleep 0.5
    done
}
trap remove EXIT
# Whoever ends this ends the group, as terminals and timeout(1) do; what is left is removed when the command has ended.
trap : INT TERM HUP
status=0
# shellcheck disable=SC2016 # likewise; a process joins before it makes this cgroup its root (cgroup_namespaces(7))
sh -c 'echo $$ > "$0/cgroup.procs" && exec "$@"' "$cgroup" \
    unshare --mount --cgroup sh -e -c "$inside" "$hierarchy" "$@" || status=$?
exit "$status"
