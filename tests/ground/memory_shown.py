"""A process that has the kernel show what it likes as its environment."""

from __future__ import annotations

# struct prctl_mm_map (include/uapi/linux/prctl.h): the environment is where the process says, here in a large mapping
# that nothing was written to.
SHOWS_A_GIGABYTE = """
import ctypes, mmap, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
size = 1 << 30
place = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, 2**64 - 1, 0)
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
field = lambda number: int(fields[number - 3])
libc.sbrk.restype = ctypes.c_void_p
values = (field(26), field(27), field(45), field(46), field(47), libc.sbrk(0), field(28), field(48), field(49))
text = struct.pack("=11QQII", *values, place, place + size, 0, 0, 2**32 - 1)
PR_SET_MM, PR_SET_MM_MAP = 35, 14
if libc.prctl(PR_SET_MM, PR_SET_MM_MAP, ctypes.c_char_p(text), len(text), 0) != 0:
    print(ctypes.get_errno(), flush=True)
    raise SystemExit
"""
