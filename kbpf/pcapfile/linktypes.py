"""Link types: the number in a file (LINKTYPE_*) and the number in a program (DLT_*).

They are one and the same except for a few old types, whose DLT numbers differ between
systems; here are Linux's (pcap-linktype(7), libpcap's pcap/dlt.h).
"""

from __future__ import annotations

#: LINKTYPE_* to DLT_*, where they differ: ATM_RFC1483, RAW, SLIP_BSDOS, PPP_BSDOS, ATM_CLIP.
_DLT_BY_LINKTYPE = {100: 11, 101: 12, 102: 15, 103: 16, 106: 19}
_LINKTYPE_BY_DLT = {dlt: linktype for linktype, dlt in _DLT_BY_LINKTYPE.items()}


def dlt_of_linktype(linktype: int) -> int:
    """The DLT_* for a file's LINKTYPE_*: 12 (DLT_RAW) for 101."""
    return _DLT_BY_LINKTYPE.get(linktype, linktype)


def linktype_of_dlt(dlt: int) -> int:
    """The LINKTYPE_* to write for a DLT_*: 101 for 12 (DLT_RAW)."""
    return _LINKTYPE_BY_DLT.get(dlt, dlt)
