"""A cable that delays frames and loses some, between two TAP devices: what `tc netem` does where the kernel has it.

Run as a script in the namespace of the devices: their names, seconds of delay, share of lost frames. It prints a line
when both are there, and passes frames on until it is killed.
"""

from __future__ import annotations

import fcntl
import os
import queue
import random
import struct
import sys
import threading
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
MOST_BYTES = 65_536


def opened(name: str) -> int:
    """A TAP device of that name."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def pass_on(source: int, sink: int, delay_s: float, loss: float, seed: int) -> None:
    """Every frame of one device to the other, late, or never."""
    chance, waiting = random.Random(seed), queue.SimpleQueue[tuple[float, bytes]]()

    def write() -> None:
        while True:
            due_s, frame = waiting.get()
            time.sleep(max(0.0, due_s - time.monotonic()))
            try:
                os.write(sink, frame)
            except OSError:  # the other end is down just now
                continue

    threading.Thread(target=write, daemon=True).start()
    while True:
        try:
            frame = os.read(source, MOST_BYTES)
        except OSError:  # this end is down just now
            time.sleep(0.05)
            continue
        if chance.random() >= loss:
            waiting.put((time.monotonic() + delay_s, frame))


def main() -> None:
    """Both directions."""
    ends = [opened(name) for name in sys.argv[1:3]]
    delay_s, loss = map(float, sys.argv[3:5])
    print("ready", flush=True)
    back = threading.Thread(target=pass_on, args=(ends[1], ends[0], delay_s, loss, 1), daemon=True)
    back.start()
    pass_on(ends[0], ends[1], delay_s, loss, 2)


if __name__ == "__main__":
    main()
