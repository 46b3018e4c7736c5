"""What a thing is before it meets a backend: frozen, comparable, printable data.

A backend turns a spec into an object that owns one kernel (or emulator) resource.
Types are named as bpftool names them: ``"hash"``, ``"lru_hash"``, ``"socket_filter"``, ``"sched_cls"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from kbpf.isa import cbpf, ebpf

if TYPE_CHECKING:
    # Dataclasses that a filter has no use for.
    from kbpf.types import Type

Start = Literal["link", "network", "transport", "payload"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What lies at offset 0 of the data that a classic filter sees, and what else can be reached.

    `start` is the header at offset 0. `live` layouts are those of sockets: the kernel reaches the
    network header through ``SKF_NET_OFF`` and the link header through ``SKF_LL_OFF`` (where `network`
    and `link_header` say that there is one), and gives metadata through ancillary loads. The layouts of files
    have only their bytes, with the link header that `dlt` names.
    """

    name: str
    start: Start
    #: DLT_* of the link header; None where that is not known or there is none.
    dlt: int | None = None
    live: bool = False
    #: The network header can be reached.
    network: bool = True
    #: The link header can be reached.
    link_header: bool = True
    #: The IP protocol, where the socket has only one.
    protocol: int | None = None
    #: 4 or 6 where only that version can arrive. AF_INET6 sockets get IPv4 too, so theirs is None.
    ip_version: int | None = None


#: Layouts of captures, by the name of the link type (pcap-linktype(7)).
FILE_LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(name="NULL", start="link", dlt=0),
        Layout(name="EN10MB", start="link", dlt=1),
        Layout(name="RAW", start="network", dlt=12, link_header=False),
        Layout(name="IEEE802_11", start="link", dlt=105),
        Layout(name="LINUX_SLL", start="link", dlt=113),
        Layout(name="IEEE802_11_RADIO", start="link", dlt=127),
        Layout(name="LINUX_SLL2", start="link", dlt=276),
    )
}

#: Layouts of sockets, as measured; which one a socket has, its family, type and protocol say.
SOCKET_LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        # AF_PACKET SOCK_RAW: the link header, whatever the device has; `packet` when that is not known to be Ethernet.
        Layout(name="packet", start="link", live=True),
        Layout(name="packet_ethernet", start="link", dlt=1, live=True),
        # A device without a link header (tun, and raw IP tunnels).
        Layout(name="packet_ip", start="network", live=True, link_header=False),
        Layout(name="packet_dgram", start="network", live=True),
        Layout(name="udp", start="transport", live=True, protocol=17),
        Layout(name="tcp", start="transport", live=True, protocol=6),
        # Ping sockets.
        Layout(name="icmp", start="transport", live=True, protocol=1, ip_version=4),
        Layout(name="icmp6", start="transport", live=True, protocol=58, ip_version=6),
        # Raw IPv4 sockets see the IPv4 header, raw IPv6 sockets what follows the IPv6 header.
        Layout(name="raw4", start="network", live=True, ip_version=4),
        Layout(name="raw6", start="transport", live=True, ip_version=6),
        Layout(name="unix", start="payload", live=True, network=False, link_header=False),
        Layout(name="netlink", start="payload", live=True, network=False, link_header=False),
    )
}


@dataclass(frozen=True, kw_only=True)
class FilterSpec:
    """A classic filter: instructions, and the layout they were compiled for."""

    instructions: tuple[cbpf.Instruction, ...]
    layout: Layout = FILE_LAYOUTS["EN10MB"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "instructions", tuple(cbpf.Instruction(*i) for i in self.instructions))


@dataclass(frozen=True, kw_only=True)
class MapSpec:
    """A map: ``struct`` sizes in bytes, flags as in linux/bpf.h (``BPF_F_*``).

    `contents` are (key, value) pairs to put in after creation, then `frozen` freezes it.
    `inner` describes the maps in a map of maps. `key_type` and `value_type` are what BTF says of the
    bytes; `btf` is the raw BTF blob and the type ids in it that the kernel is told.
    """

    type: str
    key_size: int = 0
    value_size: int = 0
    max_entries: int = 0
    flags: int = 0
    name: str = ""
    map_extra: int = 0
    numa_node: int | None = None
    inner: MapSpec | None = None
    contents: tuple[tuple[bytes, bytes], ...] = ()
    frozen: bool = False
    pinning: Literal["none", "by_name"] = "none"
    key_type: Type | None = None
    value_type: Type | None = None
    btf: bytes = field(default=b"", repr=False)
    btf_key_type_id: int = 0
    btf_value_type_id: int = 0

    def __post_init__(self) -> None:
        for name in ("key_size", "value_size", "max_entries", "flags"):
            if not 0 <= getattr(self, name) < 1 << 32:
                raise ValueError(f"{name} of a map has 32 bits, {getattr(self, name)} does not fit")


@dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """An eBPF program.

    `instructions` may be given as bytes or decoded, and are kept decoded. A 64-bit immediate load whose `src` is
    ``PSEUDO_MAP_IDX`` or ``PSEUDO_MAP_IDX_VALUE`` refers to ``maps[imm]``, as in the kernel (BPF_PROG_LOAD's fd_array).
    Maps that no instruction refers to live as long as the program, too (Linux 6.14, and 5.10 by BPF_PROG_BIND_MAP).
    `func_info` and `line_info` are arrays of ``struct bpf_func_info`` and ``struct bpf_line_info`` into `btf`.
    """

    type: str = "socket_filter"
    instructions: tuple[ebpf.Instruction, ...]
    license: str = "GPL"
    maps: tuple[MapSpec, ...] = ()
    expected_attach_type: str | int | None = None
    name: str = ""
    flags: int = 0
    #: ELF section the program came from, and what the section name says it attaches to.
    section: str = ""
    attach_to: str = ""
    btf: bytes = field(default=b"", repr=False)
    func_info: bytes = field(default=b"", repr=False)
    line_info: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        given: bytes | Iterable[ebpf.Instruction] = self.instructions
        decoded = (
            ebpf.decode(bytes(given))
            if isinstance(given, (bytes, bytearray, memoryview))
            else (ebpf.Instruction(*i) for i in given)
        )
        object.__setattr__(self, "instructions", tuple(decoded))
        object.__setattr__(self, "maps", tuple(self.maps))
        attach_type = self.expected_attach_type
        if isinstance(attach_type, str):
            from kbpf.uapi.enums import ATTACH_TYPES

            if attach_type not in ATTACH_TYPES:
                raise ValueError(f"no attach type is called {attach_type!r}")
        for name, number in (("flags", self.flags), ("expected_attach_type", attach_type)):
            if isinstance(number, int) and not 0 <= number < 1 << 32:
                raise ValueError(f"{name} of a program has 32 bits, {number} does not fit")


@dataclass(frozen=True)
class Tracepoint:
    """A tracepoint of the kernel, as tracefs lists it: ``Tracepoint("sched", "sched_switch")``.

    For programs of type ``tracepoint`` (Linux 4.7), which get its record.
    """

    system: str
    name: str


@dataclass(frozen=True)
class RawTracepoint:
    """A tracepoint of the kernel by its name alone, whose program gets its arguments as they are.

    For programs of type ``raw_tracepoint`` (Linux 4.17) and ``raw_tracepoint_writable`` (5.2).
    """

    name: str


@dataclass(frozen=True)
class Uprobe:
    """A place in a file of code, as it is run by a process `pid`, or by any.

    `offset` is into the file, or a function's name; with `returns` the program runs when the function there returns.
    For programs of type ``kprobe`` (uprobes as perf events: Linux 4.17).
    """

    path: str
    offset: int | str
    returns: bool = False
    pid: int | None = None

    def __post_init__(self) -> None:
        if "\0" in self.path:
            raise ValueError("a path has no NUL byte")
        if isinstance(self.offset, int):
            _check_range("offset", self.offset, 1 << 64)
        _check_range("pid", self.pid, 1 << 31, 1)


@dataclass(frozen=True, kw_only=True)
class PerfEvent:
    """An event of perf_event_open(2), a program being run each `period` of it.

    `type` and `config` are PERF_TYPE_* and what it counts; of a process `pid` on all processors, or of all processes on
    one processor. For programs of type ``perf_event`` (Linux 4.9).
    """

    type: int
    config: int
    period: int
    pid: int | None = None
    cpu: int | None = None

    def __post_init__(self) -> None:
        if self.pid is None and self.cpu is None:
            raise ValueError("a perf event is of a process, or on a processor")
        for name, limit in (("type", 1 << 32), ("config", 1 << 64), ("period", 1 << 63), ("cpu", 1 << 31)):
            _check_range(name, getattr(self, name), limit)
        _check_range("pid", self.pid, 1 << 31, 1)


#: Numbers of families (NFPROTO_*) and hooks (NF_INET_*), linux/netfilter.h.
NETFILTER_FAMILIES = {"ipv4": 2, "ipv6": 10}
NETFILTER_HOOKS = {"prerouting": 0, "local_in": 1, "forward": 2, "local_out": 3, "postrouting": 4}


@dataclass(frozen=True, kw_only=True)
class Netfilter:
    """A hook of netfilter in a network namespace, where programs run by rising `priority`.

    With `defragment` they see packets whose fragments have been put together (Linux 6.6). For programs of type
    ``netfilter`` (Linux 6.4), which return NF_DROP (0) or NF_ACCEPT (1).
    """

    family: Literal["ipv4", "ipv6"]
    hook: Literal["prerouting", "local_in", "forward", "local_out", "postrouting"]
    priority: int
    defragment: bool = False

    def __post_init__(self) -> None:
        for name, given, known in (
            ("family", self.family, NETFILTER_FAMILIES),
            ("hook", self.hook, NETFILTER_HOOKS),
        ):
            if given not in known:
                raise ValueError(f"{name}: {given!r} is none of {', '.join(known)}")
        _check_range("priority", self.priority, 1 << 31, -(1 << 31))


def _check_range(name: str, value: int | None, limit: int, first: int = 0) -> None:
    if value is not None and not first <= value < limit:
        raise ValueError(f"{name}: {value} is not in {first} to {limit - 1}")


#: What programs are attached to that is no socket and no device.
EventSource: TypeAlias = "Tracepoint | RawTracepoint | Uprobe | PerfEvent"


@dataclass(frozen=True, kw_only=True)
class CollectionSpec:
    """What an object file holds: maps and programs by name. Programs that name the same map share it."""

    maps: Mapping[str, MapSpec] = field(default_factory=dict)
    programs: Mapping[str, ProgramSpec] = field(default_factory=dict)
