"""What native code and Python share: one run's structure, and the table of the regions that it reaches."""

from __future__ import annotations

import ctypes

#: Entries of the table; a region's is at its number modulo this.
TABLE_SIZE = 256


class Entry(ctypes.Structure):
    """A region in host memory: how many of its bytes may be read, and written."""

    _fields_ = (
        ("number", ctypes.c_uint64),
        ("base", ctypes.c_uint64),
        ("readable", ctypes.c_uint64),
        ("writable", ctypes.c_uint64),
    )


#: What a run's `status` says: it goes on; Python has something to raise; Python has its result already; Python is
#: asked, and stays so where an exception comes up before Python can note it, as those of signal handlers do.
RUNNING, RAISED, DECIDED, ASKED = range(4)


class Native(ctypes.Structure):
    """One run.

    `half` is half of its budget, `ended_at` the instruction that ended it. Addresses are the host's; `network` and
    `mac` count from `buffer`, -1 where there is none.
    """

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("fuel", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("status", ctypes.c_uint64),
        ("buffer", ctypes.c_uint64),
        ("buffer_size", ctypes.c_uint64),
        ("network", ctypes.c_int64),
        ("mac", ctypes.c_int64),
        ("stack", ctypes.c_uint64),
        ("table", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("slots_valid", ctypes.c_uint64),
        ("cpu", ctypes.c_uint64),
        ("depth", ctypes.c_uint64),
        ("tail_calls", ctypes.c_uint64),
        ("ended_at", ctypes.c_uint64),
    )


#: Where each field lies, in words.
WORD = {name: number for number, (name, _) in enumerate(Native._fields_)}
WORDS = len(WORD)
