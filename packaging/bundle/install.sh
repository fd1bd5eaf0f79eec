#!/bin/sh
# Installs the bundled vmr-agent, which needs no Python, into this system or into a tree that is to become one.
#
#   ./install.sh [--root DIR]        install, or upgrade; runs in progress go on
#   ./install.sh --uninstall [--root DIR]
#
# The program goes to /opt/vmr-agent/<version>, its command to /usr/bin, the unit and the udev rule below /etc, manual
# pages and completion to /usr/local/share. With --root nothing is started, and systemd need not be there; without it
# the agent is enabled and started.
set -eu
umask 022

die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

here=$(cd "$(dirname "$0")" && pwd)
root=
uninstall=
while [ $# -gt 0 ]; do
    case $1 in
        --root) [ $# -gt 1 ] || die "--root needs a directory"; root=$(cd "$2" && pwd); [ "$root" != / ] || root=; shift ;;
        --uninstall) uninstall=yes ;;
        *) die "cannot read $1; usage: install.sh [--uninstall] [--root DIR]" ;;
    esac
    shift
done
[ -n "$root" ] || [ "$(id -u)" = 0 ] || die "cannot install: only root can"
version=$(cat "$here/VERSION")
place=/opt/vmr-agent
units=$root/etc/systemd/system
share=$root/usr/local/share

running() { [ -z "$root" ] && [ -d /run/systemd/system ]; }

# Shims of runs in progress still read their modules from the version that they were started from.
in_use() {
    [ -z "$root" ] || return 1
    for each in /proc/[0-9]*/exe; do
        case $(readlink "$each" 2>/dev/null) in "$1"/*) return 0 ;; esac
    done
    return 1
}

if [ -n "$uninstall" ]; then
    if running; then systemctl disable --now vmr-agent.service 2>/dev/null || :; fi
    rm -f "$units/multi-user.target.wants/vmr-agent.service" "$units/vmr-agent.service" \
        "$root/etc/udev/rules.d/60-vmr-agent.rules" "$root/usr/bin/vmr-agent"
    rm -rf "$root$place"
    (cd "$here/share" && find . -type f) | while read -r each; do rm -f "$share/$each"; done
    if running; then systemctl daemon-reload; fi
    echo "removed; what was recorded is still in $root/var/lib/vmr-agent"
    exit 0
fi

if [ -z "$root" ]; then
    said=$("$here/program/vmr-agent" --version 2>&1) || die "cannot run here: $said
    (it needs an x86-64 Linux with the C library named in $here/NEEDS)"
fi
[ ! -e "$root/usr/share/vmr-agent" ] || die "cannot install: vmr-agent is there as a package of the distribution"

mkdir -p "$root$place" "$root/usr/bin" "$units/multi-user.target.wants" "$root/etc/udev/rules.d"
[ -e "$root/var/launch" ] || mkdir -m 755 -p "$root/var/launch"
if [ ! -d "$root$place/$version" ]; then
    rm -rf "$root$place/.new"
    cp -R "$here/program" "$root$place/.new"
    chown -R 0:0 "$root$place/.new" 2>/dev/null || :
    mv "$root$place/.new" "$root$place/$version"
fi
ln -s "$place/$version/vmr-agent" "$root/usr/bin/.vmr-agent.new"
mv "$root/usr/bin/.vmr-agent.new" "$root/usr/bin/vmr-agent"
cp "$here/vmr-agent.service" "$units/"
cp "$here/60-vmr-agent.rules" "$root/etc/udev/rules.d/"
mkdir -p "$share"
cp -R "$here/share/." "$share/"
ln -sf ../vmr-agent.service "$units/multi-user.target.wants/vmr-agent.service"
if running; then
    systemctl daemon-reload
    systemctl restart vmr-agent.service
fi
for old in "$root$place"/*; do
    [ "$old" = "$root$place/$version" ] || in_use "$old" || rm -rf "$old"
done
echo "installed vmr-agent $version"
