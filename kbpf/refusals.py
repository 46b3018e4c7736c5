"""Why a map or a socket refuses, on either backend and whoever asks."""

from __future__ import annotations

from errno import EPERM

#: Why nobody can change a filter.
LOCKED = "the socket's filter is locked (SO_LOCK_FILTER): nobody can change or detach it, and nothing unlocks it"

_READS = frozenset(["map_lookup_elem", "map_get_next_key", "map_lookup_batch"])
_WRITES = frozenset(
    [
        "map_update_elem",
        "map_delete_elem",
        "map_lookup_and_delete_elem",
        "map_update_batch",
        "map_delete_batch",
        "map_lookup_and_delete_batch",
    ]
)


def refused_by_object(operation: str, errno: int) -> tuple[str, ...]:
    """Why EPERM or EACCES came where the map or the socket refuses, whoever asks; nothing where it is not that."""
    if operation in _READS:
        return ("the map may not be read from user space (BPF_F_WRONLY, or opened write-only)",)
    if operation in _WRITES:
        return ("the map is frozen or read-only for user space (BPF_F_RDONLY, or opened read-only)",)
    if operation == "map_freeze":
        return ("the map is frozen already, or read-only for user space (BPF_F_RDONLY)",)
    if operation == "SO_GET_FILTER":
        return ("an eBPF program is in the socket's slot, and which one cannot be read back",)
    if operation == "mmap":
        return ("the map is frozen, or opened read-only or write-only: positions could not be written, or not read",)
    if operation == "event_attach":
        return ("the program reads more than the event's record has",)
    return (LOCKED,) if operation.startswith("SO_") and errno == EPERM else ()
