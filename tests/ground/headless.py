"""A program that goes on in its second thread when its first has ended: /proc/PID then shows it as a zombie."""

from __future__ import annotations

import platform

# exit(2) ends the calling thread alone; exit_group(2), which is what exit(3) calls, ends all.
_EXIT = 60 if platform.machine() == "x86_64" else 93

# It says `ready` when it has come to that.
HEADLESS = f"""
import ctypes, threading, time
def stay():
    while "(zombie)" not in open("/proc/self/status").read():
        time.sleep(0.001)
    print("ready", flush=True)
    time.sleep(60)
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall({_EXIT}, 0)
"""
