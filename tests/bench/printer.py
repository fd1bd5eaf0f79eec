"""Prints COUNT lines, one each PAUSE seconds, each with the time of its printing, as watch.py reads it."""

import os
import sys
import time

count, pause = int(sys.argv[1]), float(sys.argv[2])
due = time.monotonic()
for number in range(count):
    due += pause
    time.sleep(max(0.0, due - time.monotonic()))
    os.write(1, b"line %d @%d@\n" % (number, time.monotonic_ns()))
