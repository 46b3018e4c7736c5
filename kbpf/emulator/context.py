"""`struct __sk_buff` as programs see it: fields computed from a `Packet`.

Which fields a socket filter may read and write is `sk_filter_is_valid_access`'s rule in net/core/filter.c: no direct
packet access, no addresses; only ``cb`` may be written.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

from kbpf.emulator.packet import Packet
from kbpf.uapi.structs import STRUCTS

_LAYOUT = STRUCTS["__sk_buff"]

_READ: dict[str, Callable[[Packet], int]] = {
    "len": lambda packet: packet.length,
    "pkt_type": lambda packet: packet.pkt_type,
    "mark": lambda packet: packet.mark,
    "queue_mapping": lambda packet: packet.queue,
    "protocol": lambda packet: socket.htons(packet.protocol),
    "vlan_present": lambda packet: int(packet.vlan_tci is not None),
    "vlan_tci": lambda packet: packet.vlan_tci or 0,
    "vlan_proto": lambda packet: 0 if packet.vlan_tci is None else socket.htons(packet.vlan_proto),
    "priority": lambda packet: packet.priority,
    "ingress_ifindex": lambda packet: packet.ingress_ifindex,
    "ifindex": lambda packet: packet.ifindex or 0,
    "tc_index": lambda packet: packet.tc_index,
    "hash": lambda packet: packet.hash,
    "napi_id": lambda packet: packet.napi_id,
    "gso_segs": lambda packet: packet.gso_segs,
    "gso_size": lambda packet: packet.gso_size,
}
_FIELD_AT = {_LAYOUT.fields[name].offset: read for name, read in _READ.items()}
#: Bytes that the kernel keeps of a field, where they are fewer than the four that programs see.
_KEPT = {
    _LAYOUT.fields[name].offset: size
    for size, names in {
        1: ("pkt_type",),
        2: ("queue_mapping", "protocol", "vlan_tci", "vlan_proto", "tc_index", "gso_segs", "gso_size"),
    }.items()
    for name in names
}
_CB = _LAYOUT.fields["cb"]
_CB_END = _CB.offset + _CB.size * _CB.count


class SkBuff:
    """The context of one run of a socket filter; a `kbpf.emulator.memory.Fields`."""

    __slots__ = ("cb", "packet")

    def __init__(self, packet: Packet) -> None:
        self.packet = packet
        self.cb = bytearray().join(word.to_bytes(4, sys.byteorder) for word in packet.cb)

    def load(self, offset: int, size: int) -> int | None:
        if offset % size:
            return None
        if _CB.offset <= offset and offset + size <= _CB_END:
            return int.from_bytes(self.cb[offset - _CB.offset : offset - _CB.offset + size], sys.byteorder)
        read = _FIELD_AT.get(offset & ~3)
        if read is None or size > 4:
            return None
        value = read(self.packet)
        # The kernel shifts and masks what it keeps wider than the load, and gives what it keeps narrower as it is.
        return value if size >= _KEPT.get(offset & ~3, 4) else value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def store(self, offset: int, size: int, value: int) -> bool:
        if offset % size or not (_CB.offset <= offset and offset + size <= _CB_END):
            return False
        self.cb[offset - _CB.offset : offset - _CB.offset + size] = value.to_bytes(size, sys.byteorder)
        return True
