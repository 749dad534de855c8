#!/bin/sh
# The first program of a machine of the kernel matrix (tests/ground/kernel_lab.py): comes to its disks, which it knows by
# their serial numbers, unpacks the checkout, and becomes the init that came with it.
export PATH=/bin
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do [ ! -e "$module" ] || $b insmod "$module"; done

disk() {
    for d in /sys/block/vd*; do
        [ "$($b cat "$d/serial" 2> /dev/null)" != "$1" ] || { echo "/dev/${d##*/}"; return; }
    done
    # Those of a kernel that is a program have no numbers; it is told which is which.
    for word in $($b cat /proc/cmdline); do [ "${word#disk_"$1"=}" = "$word" ] || echo "/dev/${word#*=}"; done
}

for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -n "$(disk root)" ] && [ -n "$(disk answer)" ] && break
    $b sleep 0.5
done
$b mount -t ext4 -o rw,noatime "$(disk root)" /newroot || { echo "machine: there is no root"; $b poweroff -f; }
$b mount -t ext4 -o ro "$(disk modules)" /newroot/usr/lib/modules
$b mkdir -p /newroot/srv/site
$b mount -t ext4 -o rw,noatime "$(disk site)" /newroot/srv/site
$b tar -x -f "$(disk orders)" -C /newroot
disk answer > /newroot/srv/machine/answer
for name in proc sys dev; do $b mount --move /$name /newroot/$name; done
exec $b switch_root /newroot /bin/bash /srv/securerun/tests/ground/kernel_init.sh
