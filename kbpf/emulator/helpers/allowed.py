"""Which helpers the kernel lets programs of a type call (measured on Linux 6.18, as root)."""

from __future__ import annotations


def _ids(text: str) -> frozenset[int]:
    """The numbers of ``"1-3,5"``."""
    ranges = (part.partition("-") for part in text.replace(" ", "").split(","))
    return frozenset(n for first, _, last in ranges for n in range(int(first), int(last or first) + 1))


#: What all of them may call.
_BASE = _ids(
    "1-3,5-8,12,14-17,22,35,37,42,55,80,87-89,93-94,105-106,109,112-115,117-118,120,123,125,130-134,136-141,148-149,"
    "153-154,156-158,160,164-165,169-172,175-178,180-182,191,194-203,208-211"
)
_LWT = _BASE | _ids("24-26,28,33-34,39")
_SCHED = _BASE | _ids(
    "9-11,13,18-21,23-26,28-34,38-41,43,46-48,50,66,68-69,79,83-86,95-100,107-108,110,122,124,135,151-152,155,163,192,"
    "204-207"
)
ALLOWED: dict[str, frozenset[int]] = {
    "socket_filter": _BASE | _ids("25-26,46-47,68,122"),
    "sched_cls": _SCHED,
    "sched_act": _SCHED,
    "xdp": _BASE | _ids("23,25,28,44,51,54,65,69,84-86,99-100,110,163,188-190,204-207"),
    "cgroup_skb": (_BASE | _ids("25-26,46-47,68,79,81,83-86,95-99,107-108,122,128-129")),
    "lwt_in": _LWT | _ids("73"),
    "lwt_out": _LWT,
    "lwt_xmit": _LWT | _ids("9-11,13,20-21,23,29-30,38,40-41,43,73,135"),
    "flow_dissector": _BASE | _ids("26"),
    "sk_lookup": _BASE | _ids("25,86,124"),
}
#: What only GPL-compatible programs may call, of whatever type.
GPL_ONLY = _ids("6,22,25,35,55,69,100,110,112-115,158,163,165,169-172,175-177,191,204-207")
#: What may sleep, as these programs may not.
SLEEPING = _ids("148,191")
