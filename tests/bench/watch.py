"""When lines get into files: `watch.py FILE ...` reads each as it grows, until its standard input ends.

A line holds `@NS@`, CLOCK_MONOTONIC of its printing. At the end it says, as JSON, for each file the delays in
microseconds, in order. inotify, so that looking costs nothing while nothing comes. Standard library only.
"""

import ctypes
import json
import os
import re
import select
import struct
import sys
import time

IN_MODIFY = 2
STAMP = re.compile(rb"@(\d+)@")


def main(names):
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_NONBLOCK)
    files = {}
    for name in names:
        fd = os.open(name, os.O_RDONLY)
        watch = libc.inotify_add_watch(inotify, os.fsencode(name), IN_MODIFY)
        files[watch] = [fd, os.fstat(fd).st_size, b"", name, []]
    print("ready", flush=True)
    poll = select.poll()
    poll.register(inotify, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if 0 in ready:
            break
        now = time.monotonic_ns()
        events = os.read(inotify, 1 << 16)
        changed, at = set(), 0
        while at < len(events):
            watch, _, _, length = struct.unpack_from("iIII", events, at)
            changed.add(watch)
            at += 16 + length
        for watch in changed:
            entry = files[watch]
            while True:
                data = os.pread(entry[0], 1 << 18, entry[1])
                if not data:
                    break
                entry[1] += len(data)
                # A stamp may be cut in two by the end of what is there: the rest of it comes later.
                whole, _, entry[2] = (entry[2] + data).rpartition(b"\n")
                entry[4] += [(now - int(stamp)) / 1000 for stamp in STAMP.findall(whole)]
    json.dump({entry[3]: entry[4] for entry in files.values()}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
