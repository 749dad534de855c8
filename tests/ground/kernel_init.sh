#!/bin/bash
# Process 1 of a machine of the kernel matrix: mounts what an init mounts, runs /srv/machine/command, writes what that left in
# /srv/machine/out to the disk for the answer, and turns the machine off. Or becomes systemd, which then runs it as a service.
# /srv/machine/settings says: cgroups=v2|hybrid|v1 systemd=0|1 limit=SECONDS
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
own=/srv/securerun/tests/ground/kernel_init.sh
# shellcheck source=/dev/null
. /srv/machine/settings

say() { echo "machine: $*" > /dev/console; }

run_command() {
    mkdir -p /srv/machine/out
    cd /srv/securerun || exit
    say "$(uname -rm) is up after $(cut -d ' ' -f 1 /proc/uptime) s"
    PATH=/srv/site/bin:$PATH timeout --kill-after=10 "${limit:?}" bash /srv/machine/command > /srv/machine/out/output 2>&1 < /dev/null
    echo $? > /srv/machine/out/status
    dmesg > /srv/machine/out/dmesg
    say "ended with status $(cat /srv/machine/out/status)"
    tar -c -C /srv/machine/out . | dd of="$(cat /srv/machine/answer)" bs=64k conv=fsync iflag=fullblock 2> /dev/null
}

turn_off() {
    echo o > /proc/sysrq-trigger
    sleep 5
    echo b > /proc/sysrq-trigger # a kernel without ACPI cannot turn off; QEMU ends at a reboot
    sleep 30
}

become_systemd() {
    mount -o remount,rw /
    cat > /etc/systemd/system/machine.service << UNIT
[Unit]
After=basic.target
[Service]
Type=oneshot
ExecStart=/bin/bash $own service
TimeoutStartSec=infinity
StandardInput=null
UNIT
    mkdir -p /etc/systemd/system/machine.target.wants
    printf '[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n' > /etc/systemd/system/machine.target
    ln -sf /etc/systemd/system/machine.service /etc/systemd/system/machine.target.wants/machine.service
    ln -sf /etc/systemd/system/machine.target /etc/systemd/system/default.target
    for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer systemd-networkd-wait-online.service; do
        ln -sf /dev/null "/etc/systemd/system/$unit"
    done
    exec /lib/systemd/systemd
}

of_version_1() {
    mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
    for name in cpu,cpuacct cpuset memory devices freezer blkio pids net_cls,net_prio; do
        mkdir -p "/sys/fs/cgroup/$name"
        mount -t cgroup -o "$name" cgroup "/sys/fs/cgroup/$name" || rmdir "/sys/fs/cgroup/$name"
    done
    mkdir -p /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
}

if [ "${1:-}" = service ]; then
    run_command
    turn_off
fi
# As its package's script does.
chmod 0440 /etc/sudoers
[ "${systemd:?}" = 0 ] || become_systemd

mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p /run/lock
ln -sfn /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -sfn "/proc/self/fd/${n%%:*}" "/dev/${n##*:}"; done
mount -t securityfs securityfs /sys/kernel/security 2> /dev/null
mount -t bpf bpf /sys/fs/bpf 2> /dev/null
ip link set lo up
hostname machine
case ${cgroups:?} in
    v2) mount -t cgroup2 cgroup2 /sys/fs/cgroup ;;
    hybrid)
        of_version_1
        mkdir /sys/fs/cgroup/unified
        mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
        ;;
    v1) of_version_1 ;;
esac

# In a session of its own. This one reaps what it leaves.
setsid bash -c "limit=${limit:?}; $(declare -f say run_command); run_command" &
runner=$!
while kill -0 $runner 2> /dev/null; do wait -n 2> /dev/null || sleep 0.2; done
turn_off
