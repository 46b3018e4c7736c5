"""Classic filters as a user holds them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import compress, repeat
from operator import index
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kbpf.backend import ENGINES
from kbpf.errors import FilterError
from kbpf.isa import cbpf
from kbpf.runtime.packets import Packets, as_bytes, listed_packets, unsigned
from kbpf.specs import FILE_LAYOUTS, FilterSpec, Layout

if TYPE_CHECKING:
    from kbpf.backend import Engine
    from kbpf.emulator.context import SkBuff
    from kbpf.emulator.jit.batch import NativeBatch, Start
    from kbpf.emulator.packet import Packet
    from kbpf.emulator.program import ClassicProgram
    from kbpf.filter.explain import Explanation
    from kbpf.pcapfile import Capture
    from kbpf.specs import CollectionSpec, ProgramSpec

# Where the network header starts in what a filter for this layout is given; transport layouts are given it too.
_NETWORK = {"NULL": 4, "EN10MB": 14, "RAW": 0, "LINUX_SLL": 16, "LINUX_SLL2": 20}
_NETWORK |= {"packet": 14, "packet_ethernet": 14, "packet_ip": 0, "packet_dgram": 0, "raw4": 0}


class Path(NamedTuple):
    """The way of one packet: the bytes kept, 0 for none, and the indices of the instructions that ran."""

    kept: int
    instructions: tuple[int, ...]


class Filter:
    """A classic BPF filter: instructions, and the layout they were compiled for.

    Immutable, hashable, comparable; a sequence of instructions in that it has a length and can be iterated.
    """

    __slots__ = ("_emulated", "_native", "spec")

    def __init__(
        self, instructions: Iterable[Sequence[int]], link: str = "EN10MB", *, layout: Layout | None = None
    ) -> None:
        """From ``(code, jt, jf, k)`` tuples. `link` names the link type of the packets it is for.

        Raises `FilterError` for an unknown link type; the instructions are checked by `check`, and when it is attached.
        """
        self.spec = FilterSpec(
            instructions=tuple(cbpf.Instruction(*i) for i in instructions), layout=layout or file_layout(link)
        )
        self._emulated: ClassicProgram | None = None
        #: In native code; False where there is none.
        self._native: NativeBatch | Literal[False] | None = None

    @classmethod
    def from_spec(cls, spec: FilterSpec) -> Filter:
        return cls(spec.instructions, layout=spec.layout)

    @property
    def instructions(self) -> tuple[cbpf.Instruction, ...]:
        """The instructions, each with `code`, `jt`, `jf` and `k`."""
        return self.spec.instructions

    @property
    def layout(self) -> Layout:
        """What lies at offset 0."""
        return self.spec.layout

    def check(self) -> None:
        """The check that Linux makes when a filter is attached; raises `FilterError` naming the instruction.

        Linux refuses loops, which ``protochain`` for captures has; `run` takes them.
        """
        cbpf.check(self.instructions)

    def to_ebpf(self) -> ProgramSpec:
        """The filter as an eBPF socket filter with the same return values, for `kbpf.load_program` (Linux 4.17).

        Loads from the packet stay LD_ABS and LD_IND, so it is for the same sockets; ancillary words come from the
        context. Raises `FilterError` if the filter is invalid, or asks for what an eBPF program cannot know: the
        device's hardware type, netlink attributes, the offset of the payload.
        """
        from kbpf.isa.translate import to_loadable
        from kbpf.specs import ProgramSpec

        return ProgramSpec(
            type="socket_filter", name="filter", instructions=to_loadable(self.instructions), license="Dual MIT/GPL"
        )

    def run(
        self, packet: bytes | bytearray | memoryview, wirelen: int | None = None, *, engine: Engine = "auto"
    ) -> int:
        """Run over one packet, in user space; gives the bytes it keeps.

        That is the smaller of return value and `wirelen`, 0 for none.

        `packet` starts with the link header of the filter's link type. For the sockets that hand a filter only what
        follows the IP header (UDP, TCP, ping, raw IPv6) it starts with the IP header, for UNIX and netlink sockets with
        the payload. `wirelen` is the packet's length on the wire where `packet` was cut; the default is all there is.
        `engine` is ``"interpreter"``, ``"jit"`` (native code), or ``"auto"``: native code once the filter has run often
        enough to earn it. Raises `FilterError` if the filter is invalid, and `MissingDependencyError` if native code is
        asked for and llvmlite is not installed (``pip install 'kbpf[jit]'``), `ValueError` for a `wirelen` below 0.
        """
        data = packet if isinstance(packet, bytes) else as_bytes(packet)
        if wirelen is None:
            wirelen = len(data)
        elif not 0 <= (wirelen := index(wirelen)) < 1 << 64:
            raise ValueError(f"a packet's length has up to 64 bits and no sign, {wirelen} is none")
        native = self._native if engine != "interpreter" else False
        if native is None or engine not in ENGINES or (engine == "jit" and not native):
            native = self._compiled(engine)
        if native:
            return native.one(data, wirelen)
        program = self._emulated or self._prepare()
        if self.layout.live:
            prepared = self._packet(data, wirelen)
            return min(program.run_packet(prepared), prepared.length)
        kept = program.run(data, wirelen)
        return kept if kept < wirelen else wirelen

    def match_all(
        self,
        packets: Iterable[bytes] | Packets | Capture,
        wirelens: Sequence[int] | None = None,
        *,
        engine: Engine = "auto",
    ) -> bytes:
        """Run over many packets, as `run` does over each: a byte for each, 1 where it keeps something, else 0.

        `packets` are bytes objects, a `kbpf.Packets`, or an open capture, whose lengths on the wire are taken from
        it. The bytes are ready for `itertools.compress`. In native code that is one call; over `Packets` without the
        interpreter's lock. Raises `FilterError` if the filter is invalid, `ValueError` for `wirelens` of another
        number than packets, or below 0.
        """
        if isinstance(packets, Packets):
            wirelens = packets.wirelens if wirelens is None else wirelens
        elif not isinstance(packets, list):
            packets, wirelens = listed_packets(packets, wirelens)
        if wirelens is not None:
            wirelens = unsigned(wirelens)
            if len(wirelens) != len(packets):
                raise ValueError(f"{len(wirelens)} lengths for {len(packets)} packets")
        native = None if engine == "interpreter" else self.native(engine, len(packets))
        if not native:
            lengths: Iterable[int | None] = repeat(None) if wirelens is None else wirelens
            runs = zip(packets, lengths, strict=False)
            return bytes(self.run(packet, length, engine="interpreter") > 0 for packet, length in runs)
        if isinstance(packets, Packets):
            return native.over_spans(packets.buffer, packets.offsets, packets.sizes, wirelens)
        try:
            return native.over_list(packets, wirelens)
        except TypeError:
            return native.over_list([as_bytes(packet) for packet in packets], wirelens)

    def select(
        self,
        packets: Iterable[bytes] | Packets | Capture,
        wirelens: Sequence[int] | None = None,
        *,
        engine: Engine = "auto",
    ) -> list[bytes]:
        """The packets that it keeps something of, whole; `match_all` says of which."""
        if not isinstance(packets, (list, Packets)):
            packets, wirelens = listed_packets(packets, wirelens)
        return list(compress(packets, self.match_all(packets, wirelens, engine=engine)))

    def native(self, engine: Engine, runs: int) -> NativeBatch | None:
        """The filter in native code, where it is there and asked for, or earned by `runs` that are to come.

        For what runs a filter over packets that it finds by itself (`kbpf.runtime.scanning`).
        """
        native = self._native
        return native if native and engine in ENGINES else self._compiled(engine, runs) or None

    def _compiled(self, engine: Engine, runs: int = 0) -> NativeBatch | Literal[False] | None:
        """The filter in native code, if it is asked for or has earned it; False where there is none."""
        program = self._emulated or self._prepare()
        program.check(engine)
        if engine == "jit" or program.has_earned(runs):
            start: Start = "transport" if self.layout.start == "transport" else "packet"
            self._native = program.native(start, _Live(self) if self.layout.live else program) or False
        return self._native

    def path(self, packet: bytes, wirelen: int | None = None) -> Path:
        """Run over one packet as `run` does, and tell which instructions ran."""
        prepared = self._packet(bytes(packet), len(packet) if wirelen is None else wirelen)
        value, instructions = (self._emulated or self._prepare()).path(prepared)
        return Path(min(value, prepared.length), instructions)

    def explain(self) -> Explanation:
        """What the filter asks, in words; see `kbpf.filter.explain`. Raises `FilterError` if the filter is invalid."""
        from kbpf.filter.explain import explain

        return explain(self.instructions, self.layout)

    def _prepare(self) -> ClassicProgram:
        from kbpf.emulator.program import ClassicProgram

        network = _NETWORK.get(self.layout.name)
        live = self.layout.live
        mac = 0 if live and network == 14 else None
        # What is worth native code goes through `_compiled`; what comes here is to stay in the interpreter.
        self._emulated = ClassicProgram(
            self.instructions,
            network=0 if live and network is None else network,
            mac=mac,
            loops=not live,
            engine="interpreter",
        )
        return self._emulated

    def _packet(self, data: bytes, wirelen: int) -> Packet:
        """The packet as a socket of this layout would hand it to the filter."""
        from kbpf.emulator.packet import Packet

        layout, offset = self.layout, 0
        network: int | None = _NETWORK.get(layout.name, 0 if layout.live else None)
        if layout.start == "transport" and data:
            offset = min(len(data), (data[0] & 15) * 4 if data[0] >> 4 == 4 else 40)
        protocol = 0
        if network == 14 and len(data) >= 14:
            protocol = struct.unpack_from("!H", data, 12)[0]
        elif layout.network and network is not None and len(data) > network:
            protocol = {4: 0x0800, 6: 0x86DD}.get(data[network] >> 4, 0)
        mac = 0 if network == 14 else None
        length = max(wirelen - offset, 0)
        return Packet(buffer=data, offset=offset, mac=mac, network=network, length=length, protocol=protocol)

    def __len__(self) -> int:
        return len(self.instructions)

    def __iter__(self) -> Any:
        return iter(self.instructions)

    def __eq__(self, other: object) -> bool:
        return self.spec == other.spec if isinstance(other, Filter) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        return f"<Filter of {len(self)} instructions for {self.layout.name}>"

    def __str__(self) -> str:
        from kbpf.asm.listing import listing

        return listing(self.instructions, "d")


class _Live:
    """Makes packets for a filter of a live socket from their bytes; a `kbpf.emulator.interpreter.Subject`."""

    def __init__(self, filter: Filter) -> None:
        from kbpf.emulator.interpreter import BUDGET

        self.budget = BUDGET
        self._filter = filter

    def packet(self, data: bytes, length: int) -> Packet:
        return self._filter._packet(data, length)

    def context(self, packet: Packet) -> SkBuff:
        from kbpf.emulator.context import SkBuff

        return SkBuff(packet)


def file_layout(link: str) -> Layout:
    """The layout of captures of a link type; raises `FilterError` for one that is not known."""
    try:
        return FILE_LAYOUTS[link]
    except KeyError:
        raise FilterError(f"unknown link type {link!r}; there are {', '.join(FILE_LAYOUTS)}") from None


def compile(
    expression: str,
    link: str = "EN10MB",
    socket: Any = None,
    snaplen: int = 262144,
    optimize: bool = True,
    order: Literal["traffic", "libpcap"] = "traffic",
    names: Literal["system", "system+dns", "numeric"] = "system",
) -> Filter:
    """Compile a pcap-filter(7) expression.

    For packets of the link type `link`, as captures hold them; or with `socket`, for what that
    live socket's data starts with. A match keeps `snaplen` bytes. ``order="libpcap"`` gives tcpdump's order of tests,
    the default what runs fewest instructions over usual traffic. Service, protocol and network names come from the
    system's files; host names are looked up only with ``names="system+dns"``.

    Raises `FilterSyntaxError` with the position for text that does not parse, and `FilterError` for what cannot be
    answered there. What can never match compiles to ``ret #0``. Needs no privilege.
    """
    from kbpf.filter import compile_filter

    layout = file_layout(link)
    if socket is not None:
        from kbpf.runtime.attach import backend_of

        layout = backend_of(socket, None).socket_layout(socket)
    spec = compile_filter(expression, layout, snaplen=snaplen, optimize=optimize, order=order, names=names)
    return Filter.from_spec(spec)


def compile_ebpf(
    expression: str,
    target: Literal["socket_filter", "sched_cls", "xdp"] = "socket_filter",
    action: str | tuple[int, int] | None = None,
    *,
    link: str = "EN10MB",
    socket: Any = None,
    optimize: bool = True,
    names: Literal["system", "system+dns", "numeric"] = "system",
) -> CollectionSpec:
    """Compile a pcap-filter(7) expression to an eBPF program, for `kbpf.load`.

    The collection holds one program, ``"filter"``, and maps for lists of more than 64 addresses. The verdicts are those
    of the classic filter, whatever the length of the packet.

    `target` is the program's type, and `action` what it does with packets that match:

    - ``socket_filter``: ``"keep"``, the default, returns 262144 for them and 0 for others. For packet sockets on
      Ethernet devices, or with `socket` for that socket, or ``link="RAW"`` for devices without a link header. The first
      of these is right under BPF_PROG_TEST_RUN too, which takes the Ethernet header off (offsets and ``len`` count
      from it all the same). Linux 5.1.
    - ``sched_cls``: ``"drop"``, the default, returns TC_ACT_SHOT for them and leaves others to the next classifier
      (TC_ACT_UNSPEC); ``"pass"`` returns TC_ACT_OK for them and TC_ACT_SHOT for others. Linux 5.1.
    - ``xdp``: ``"drop"``, the default, ``"tx"`` (others pass), or ``"pass"``, which drops the others. Linux 5.1, for
      ``len`` and offsets that may be beyond 2,048 bytes 5.18.

    A pair of numbers says what to return for packets that match and for others. VLAN tags are looked for in the
    metadata and in the bytes, by XDP in the bytes only, as it runs before they are stripped.

    Raises `FilterSyntaxError` and `FilterError` as `kbpf.compile` does, and `FilterError` for what a program of that
    type cannot know and for expressions too large for it. Needs no privilege.
    """
    from kbpf.filter.ebpf import compile_ebpf, target_layout

    layout = target_layout(target, link)
    if socket is not None:
        if target != "socket_filter":
            raise FilterError(f"a program of type {target} goes on no socket")
        from kbpf.runtime.attach import backend_of

        layout = backend_of(socket, None).socket_layout(socket)
    return compile_ebpf(expression, target, layout, action, optimize=optimize, names=names)
