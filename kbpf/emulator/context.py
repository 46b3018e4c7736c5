"""`struct __sk_buff` as programs see it: fields computed from a `Packet`, and the bytes where programs reach them.

Which fields a type's programs may read and write are the `*_is_valid_access` rules of net/core/filter.c, measured on
Linux 6.18. A load of `data` gives an address in the packet's region, which begins at offset 0, or with the
metadata that XDP put before it, and ends with the packet.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

from kbpf.emulator.interpreter import PACKET_ADDRESS, Run
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.errors import EmulationFault
from kbpf.uapi.structs import STRUCTS

_LAYOUT = STRUCTS["__sk_buff"]
_NO_QUEUE_MAPPING = 0xFFFF


def _socket(packet: Packet) -> Sock:
    """The packet's socket, which those that have these fields have."""
    if packet.socket is None:
        raise EmulationFault("the packet has no socket")
    return packet.socket


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
    "tc_classid": lambda packet: packet.tc_classid,
    "wire_len": lambda packet: packet.wire_len,
    "tstamp": lambda packet: packet.tstamp,
    "tstamp_type": lambda packet: packet.tstamp_type,
    "hwtstamp": lambda packet: packet.hwtstamp,
    "sk": lambda packet: 0 if packet.socket is None else packet.socket.address,
    "family": lambda packet: _socket(packet).family,
    # In network order, in the field's upper half.
    "remote_port": lambda packet: socket.htons(_socket(packet).remote_port) << 16,
    "local_port": lambda packet: _socket(packet).local_port,
    "data": lambda packet: PACKET_ADDRESS + packet.metadata,
    "data_meta": lambda packet: PACKET_ADDRESS,
    "data_end": lambda packet: PACKET_ADDRESS + packet.metadata + len(packet.buffer) - packet.offset,
}
#: How many bytes of a field that programs set are kept.
_WRITE = {"mark": 4, "priority": 4, "tc_index": 2, "tc_classid": 2, "queue_mapping": 2, "tstamp": 8}
_ATTRIBUTE = {"queue_mapping": "queue"}
#: Read whole or not at all.
_WHOLE = ("data", "data_meta", "data_end", "tstamp", "tstamp_type", "hwtstamp", "sk")
#: Addresses of the packet's socket, each as the kernel keeps it, whatever the family is.
_ENDS = {"remote_ip4": "remote4", "local_ip4": "local4", "remote_ip6": "remote6", "local_ip6": "local6"}
_END_AT = {
    field.offset + 4 * word: (_ENDS[name], 4 * word)
    for name, field in _LAYOUT.fields.items()
    if name in _ENDS
    for word in range(field.count)
}
_FIELD_AT = {_LAYOUT.fields[name].offset: name for name in _READ}
#: Bytes that the kernel keeps of a field, where they are fewer than the four that programs see.
_KEPT = {
    name: size
    for size, names in {
        1: ("pkt_type",),
        2: ("family", "local_port",
            "queue_mapping", "protocol", "vlan_tci", "vlan_proto", "tc_index", "gso_segs", "gso_size", "tc_classid",
        ),
    }.items()
    for name in names
}  # fmt: skip
_CB = _LAYOUT.fields["cb"]
_CB_WORDS = struct.Struct(f"={_CB.count}I")
_CB_END = _CB.offset + _CB.size * _CB.count


class Access(NamedTuple):
    """What programs of a type may do with the context: fields they read and write, and the packet's bytes."""

    read: frozenset[str]
    write: frozenset[str] = frozenset()
    direct: bool = False
    writes_packet: bool = False


_DATA = frozenset(("data", "data_end"))
_TRAFFIC_CONTROL = frozenset(("data_meta", "tc_classid", "tstamp", "tstamp_type", "wire_len", "hwtstamp"))
_SOCKET = frozenset(("family", "remote_port", "local_port"))
_METADATA = frozenset(_READ) - _DATA - _TRAFFIC_CONTROL - _SOCKET
_SCHED = Access(
    frozenset(_READ) - _SOCKET,
    frozenset(_WRITE),
    direct=True,
    writes_packet=True,
)
_LWT = Access(_METADATA | _DATA, frozenset(("mark", "priority")), direct=True)
#: Programs over what sockets have received, of which there are no test runs; they only read ``cb``.
SK_SKB = Access(
    (_METADATA | _DATA | _SOCKET) - {"mark"}, frozenset(("priority", "tc_index")), direct=True, writes_packet=True
)
#: By program type; ``cb`` may be read and written by all of them.
ACCESS = {
    "socket_filter": Access(_METADATA),
    "sched_cls": _SCHED,
    "sched_act": _SCHED,
    "cgroup_skb": Access(
        _METADATA | _DATA | _SOCKET | {"tstamp", "hwtstamp"}, frozenset(("mark", "priority", "tstamp")), direct=True
    ),
    "lwt_in": _LWT,
    "lwt_out": _LWT,
    "lwt_xmit": _LWT._replace(writes_packet=True),
}


class SkBuff:
    """The context of one run over a socket buffer; a `kbpf.emulator.interpreter.Context`."""

    __slots__ = ("access", "cb", "packet")

    def __init__(self, packet: Packet, program_type: str = "socket_filter") -> None:
        self.packet = packet
        self.access = ACCESS[program_type]
        self.cb = bytearray().join(word.to_bytes(4, sys.byteorder) for word in packet.cb)
        if self.access.direct:
            packet.buffer = bytearray(packet.buffer)

    @property
    def words(self) -> tuple[int, int, int, int, int]:
        """``cb`` as the packet keeps it."""
        return _CB_WORDS.unpack(self.cb)

    def show(self, run: Run) -> None:
        if self.access.direct:
            packet = self.packet
            start = packet.offset - packet.metadata
            run.show(memoryview(packet.buffer)[start:], self.access.writes_packet, packet.metadata)

    def load(self, offset: int, size: int) -> int | None:
        if offset % size:
            return None
        if _CB.offset <= offset and offset + size <= _CB_END:
            return int.from_bytes(self.cb[offset - _CB.offset : offset - _CB.offset + size], sys.byteorder)
        if offset in _END_AT and size == 4 and "family" in self.access.read:
            which, at = _END_AT[offset]
            address: bytes = getattr(_socket(self.packet), which)
            return int.from_bytes(address[at : at + 4], sys.byteorder)
        name = _FIELD_AT.get(offset & ~3)
        if name is None or name not in self.access.read:
            return None
        if name in _WHOLE:
            return _READ[name](self.packet) if (offset, size) == _LAYOUT.fields[name][:2] else None
        if size > 4:
            return None
        value = _READ[name](self.packet)
        # The kernel shifts and masks what it keeps wider than the load, and gives what it keeps narrower as it is.
        return value if size >= _KEPT.get(name, 4) else value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def store(self, offset: int, size: int, value: int) -> bool:
        if offset % size:
            return False
        if _CB.offset <= offset and offset + size <= _CB_END:
            self.cb[offset - _CB.offset : offset - _CB.offset + size] = value.to_bytes(size, sys.byteorder)
            return True
        name = _FIELD_AT.get(offset)
        if name not in self.access.write or size != _LAYOUT.fields[name].size:
            return False
        if name != "queue_mapping" or value < _NO_QUEUE_MAPPING:
            setattr(self.packet, _ATTRIBUTE.get(name, name), value & (1 << 8 * _WRITE[name]) - 1)
        return True
