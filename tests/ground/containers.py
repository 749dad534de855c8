"""What a container gives the job in it: few capabilities, namespaces of its own, a cgroup file system of its own."""

from __future__ import annotations

from hosts import cgroup2_mount

# docker run's own (moby, oci/caps/defaults.go), which ascend-docker-runtime leaves as they are.
DOCKER_CAPABILITIES = (
    "+chown,+dac_override,+fsetid,+fowner,+mknod,+net_raw,+setgid,+setuid,+setfcap,+setpcap,+net_bind_service,"
    "+sys_chroot,+kill,+audit_write"
)
# A cgroup file system is read-only in a container without --privileged.
READ_ONLY_CGROUPS = 'mount -o remount,ro,bind "$0"'
WRITABLE_CGROUPS = ":"
# The guard ends with the container's first process, so that one gives it time to clean up.
_AND_RUN = '; "$@"; status=$?; while ls /run/securerun; do sleep 0.1; done > /dev/null 2>&1; exit $status'


def container(capabilities: str, mount: str, *command: str) -> list[str]:
    """`command` as a container runs it: as root of few capabilities, in a pid and a mount namespace."""
    wrap = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", mount + _AND_RUN]
    limited = ["setpriv", f"--bounding-set=-all,{capabilities}", "--inh-caps=-all", *command]
    return [*wrap, str(cgroup2_mount()), *limited]
