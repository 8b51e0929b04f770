#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# First process of a host of the testbed, already in fresh net, mount, UTS and cgroup namespaces.
# Makes the inside look like a machine of its own, then sleeps: the namespaces and every mount
# made here live exactly as long as processes in them do.
# usage: host-init.sh NAME FILES; FILES is the host's folder for what it writes to /etc and /var.
set -eu
name=$1
files=$2

hostname "$name"
ip link set lo up

# cgroup mounts made in a fresh cgroup namespace show the host's own directory as the root
controllers=$(sed -n 's|^.* /sys/fs/cgroup/\([^ ]*\) .* - cgroup [^ ]* rw,\(.*\)$|\1 \2|p' /proc/self/mountinfo)
hybrid=$(sed -n 's|.* /sys/fs/cgroup/\([^ ]*\) .* - cgroup2 .*|\1|p' /proc/self/mountinfo | head -n 1)
mount -t sysfs sysfs /sys
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
echo "$controllers" | while read -r folder options; do
	mkdir -p "/sys/fs/cgroup/$folder"
	case $options in *name=*) options="none,name=${options##*name=}" ;; esac
	mount -t cgroup -o "$options" cgroup "/sys/fs/cgroup/$folder"
done
mkdir -p "/sys/fs/cgroup/$hybrid"
mount -t cgroup2 cgroup2 "/sys/fs/cgroup/$hybrid"

# the machine's mounts below what is replaced next are not a host's to keep busy
sed -n 's|^[^ ]* [^ ]* [^ ]* [^ ]* \(/\(run\|var\)/[^ ]*\) .*|\1|p' /proc/self/mountinfo | sort -r |
	while read -r mount; do umount --lazy "$mount"; done

# what a host writes goes to its own files: the machine's /etc and /var stay as they are
for folder in etc var; do
	mkdir -p "$files/$folder" "$files/.work-$folder"
	mount -t overlay -o "lowerdir=/$folder,upperdir=$files/$folder,workdir=$files/.work-$folder" \
		"$name-$folder" "/$folder"
done
for folder in containerd kubelet; do # need a real file system, not an overlay, underneath
	mkdir -p "$files/$folder" "/var/lib/$folder"
	mount --bind "$files/$folder" "/var/lib/$folder"
done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/netns
mount --make-rshared / # Bidirectional mounts of pods need it

echo ready >"$files/ready"
exec sleep infinity
