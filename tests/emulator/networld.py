"""Two machines that should behave alike: a network namespace of the kernel's, and the emulated network.

Each has ``lo`` and three cables, v0 to v1, w0 to w1 and u0 to u1, all in one namespace. Programs are attached through
the runtime, frames come from packet sockets, and what the programs saw is in a queue map.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

from mapcode import EXIT, Code, call, copy, mov, the_map

import kbpf
from kbpf.emulator import add_pair, current, reset
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.runtime.backends import get_backend
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.structs import STRUCTS

T = TypeVar("T")

DEVICES = ("lo", "v0", "v1", "w0", "w1", "u0", "u1")
INDEX = {name: number for number, name in enumerate(DEVICES, 1)}
MACS = {name: bytes([2, 0, 0, 0, 0, number]) for name, number in INDEX.items() if name != "lo"} | {"lo": bytes(6)}

SKB, XDP = STRUCTS["__sk_buff"].fields, STRUCTS["xdp_md"].fields
#: What a program over socket buffers notes down.
SEEN = (
    "len", "pkt_type", "mark", "queue_mapping", "protocol", "vlan_present", "vlan_tci", "priority",
    "ingress_ifindex", "ifindex", "tc_index", "cb", "tc_classid", "wire_len", "gso_segs",
)  # fmt: skip
_RECORD = 96
LOG = MapSpec(type="queue", key_size=0, value_size=_RECORD, max_entries=4096, name="log")
#: How often programs may still send packets elsewhere: on Linux a loop through interfaces does not end.
HOPS = MapSpec(type="array", key_size=4, value_size=8, max_entries=1, name="hops")
MOST_HOPS = 12
I = Instruction  # noqa: E741


#: From 192.0.2.1, port 53, to 192.0.2.2, port 13568; without a checksum and data.
IPV4 = bytes.fromhex("4500001c0000000040110000c0000201c000020200350035000800 00")
FRAME = MACS["v1"] + MACS["v0"] + b"\x08\0" + IPV4
INGRESS = 1
PASS, TX = 2, 3


class Seen(NamedTuple):
    """One line of the log: who wrote it, the fields of `SEEN` or of ``xdp_md``, and the packet's bytes up to 16."""

    who: int
    fields: tuple[int, ...]
    sizes: tuple[int, int]
    start: bytes


def _store(offset: int, register: int, size: int = ebpf.W) -> Code:
    return [I(ebpf.STX | ebpf.MEM | size, ebpf.FP, register, offset)]


def _packet(context: dict[str, Any], base: int) -> Code:
    """Sizes of the data and the metadata, and the first bytes; R6 to R8 end up as data_meta, data and data_end."""
    load = ebpf.LDX | ebpf.MEM
    code = [
        I(load | ebpf.W, 6, 9, context["data_meta"].offset),
        I(load | ebpf.W, 7, 9, context["data"].offset),
        I(load | ebpf.W, 8, 9, context["data_end"].offset),
    ]
    code += [*copy(1, 8), I(ebpf.ALU64 | ebpf.SUB | ebpf.X, 1, 7), *_store(base, 1)]
    code += [*copy(1, 7), I(ebpf.ALU64 | ebpf.SUB | ebpf.X, 1, 6), *_store(base + 4, 1)]
    copied: Code = []
    for at in range(0, 16, 4):
        copied += [I(load | ebpf.W, 1, 7, at), *_store(base + 8 + at, 1)]
    code += [*copy(1, 7), I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 16)]
    return [*code, I(ebpf.JMP | ebpf.JGT | ebpf.X, 1, 8, len(copied)), *copied]


def log(who: int, kind: str) -> Code:
    """Note down what the program sees; R9 is the context before and after."""
    start = -_RECORD
    code = [I(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, at) for at in range(start, 0, 8)]
    code += [I(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, start, who)]
    context = SKB if kind == "sched_cls" else XDP
    names = SEEN if kind == "sched_cls" else ("ingress_ifindex", "rx_queue_index")
    for number, name in enumerate(names):
        code += [I(ebpf.LDX | ebpf.MEM | ebpf.W, 1, 9, context[name].offset), *_store(start + 4 + 4 * number, 1)]
    code += _packet(context, start + 4 + 4 * len(SEEN))
    code += [*the_map(1, 0), *copy(2, ebpf.FP), I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, start), *mov(3, 0)]
    return [*code, *call("map_push_elem")]


def unless_looping(otherwise: int, body: Code) -> Code:
    """`body`, or the return value `otherwise` when packets have been sent on too often."""
    code = [
        I(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, -4, 0),
        *the_map(1, 1),
        *copy(2, ebpf.FP),
        I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, -4),
        *call("map_lookup_elem"),
    ]
    enough = [*mov(0, otherwise), EXIT]
    code += [I(ebpf.JMP | ebpf.JNE, 0, 0, len(enough), 0), *enough]
    code += [I(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 0, 0), I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 1)]
    code += [I(ebpf.STX | ebpf.MEM | ebpf.DW, 0, 1, 0), I(ebpf.JMP | ebpf.JLE, 1, 0, len(enough), MOST_HOPS), *enough]
    return [*code, *body]


class Outcome(NamedTuple):
    """What programs saw, what packet sockets got, what devices counted, and what could not be sent."""

    seen: list[Seen]
    received: dict[str, list[Any]]
    counters: dict[str, tuple[int, ...]]
    refused: list[int | None]


class Machine:
    """What is common: programs and the maps that they all use. `begin` forgets what the last test has set up."""

    backend: Literal["kernel", "emulator"]

    def __init__(self) -> None:
        self.stack = ExitStack()

    def begin(self) -> None:
        self.stack.close()
        self.log, self.hops = (self.stack.enter_context(kbpf.BpfMap.create(s, self.backend)) for s in (LOG, HOPS))
        self.sockets: dict[str, Any] = {}
        #: errnos of frames that could not be sent.
        self.refused: list[int | None] = []
        self.counted = {device: self.counters(device) for device in DEVICES}

    def outcome(self) -> Outcome:
        """All that can be seen from outside since `begin`."""
        counters = {
            device: tuple(now - then for now, then in zip(self.counters(device), before, strict=True))
            for device, before in self.counted.items()
        }
        return Outcome(self.seen(), self.received(), counters, self.refused)

    def inside(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        return function(*arguments, **keywords)

    def program(self, code: Code, kind: str = "sched_cls", maps: Sequence[Any] = (), **spec: Any) -> kbpf.Program:
        made = [self.log, self.hops, *maps]
        specs = tuple(MapSpec(type="array", key_size=4, value_size=4, max_entries=1) for _ in made)
        loaded = kbpf.load_program(
            ProgramSpec(type=kind, instructions=tuple(code), maps=specs, **spec), maps=made, backend=self.backend
        )
        return self.stack.enter_context(loaded)

    def attach(self, program: kbpf.Program, device: str, place: str | None = None, **how: Any) -> Any:
        return self.stack.enter_context(self.inside(program.attach, device, place, **how))

    def hook(self, device: str, place: str, code: Code, who: int = 0, maps: Sequence[Any] = (), **how: Any) -> Any:
        """Attach a program that notes down what it sees and then does `code`."""
        kind = "xdp" if place == "xdp" else "sched_cls"
        body = [*copy(9, 1), *(log(who, kind) if who else []), *code]
        return self.attach(self.program(body, kind, maps), device, place if kind == "sched_cls" else None, **how)

    def listen(self, *devices: str) -> None:
        for device in devices or DEVICES:
            self.sockets[device] = self.stack.enter_context(self.open(device))

    def open(self, device: str, type: int = socket.SOCK_RAW, protocol: int = 3) -> Any:
        raise NotImplementedError

    def send(self, device: str, frame: bytes, mark: int = 0) -> None:
        """Send a frame, and wait until nothing moves any more."""
        with self.open(device, protocol=0) as sender:
            if mark:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            try:
                sender.send(frame)
            except OSError as error:
                self.refused.append(error.errno)
        self.settle()

    def settle(self) -> None:
        pass

    def seen(self) -> list[Seen]:
        """The log, which is empty then."""
        found = []
        while True:
            try:
                raw = get_backend(self.backend).map_lookup_and_delete(self.log.fileno(), None, _RECORD)
            except FileNotFoundError:
                return found
            words = struct.unpack_from("=24I", raw)
            count = 1 + len(SEEN)
            found.append(Seen(words[0], words[1:count], words[count : count + 2], raw[4 * count + 8 : 4 * count + 24]))

    def received(self) -> dict[str, list[Any]]:
        """What each packet socket got: bytes, protocol and packet type."""
        found = {}
        for device, listener in self.sockets.items():
            listener.setblocking(False)
            found[device] = got = []
            while True:
                try:
                    data, address = listener.recvfrom(65536)
                except BlockingIOError:
                    break
                got.append((bytes(data), *address[:3]))
        return found

    def add_pair(self, first: str, second: str) -> None:
        raise NotImplementedError

    def remove(self, device: str) -> None:
        raise NotImplementedError

    def counters(self, device: str) -> tuple[int, ...]:
        """Packets received and sent, bytes received and sent, dropped ones received and sent."""
        raise NotImplementedError


class EmulatedMachine(Machine):
    backend = "emulator"

    def __init__(self) -> None:
        super().__init__()
        reset()
        for first in "vwu":
            for made in add_pair(f"{first}0", f"{first}1"):
                made.address = MACS[made.name]
        assert {i: current().interface(i).index for i in DEVICES} == INDEX

    def open(self, device: str, type: int = socket.SOCK_RAW, protocol: int = 3) -> Any:
        from kbpf.emulator.packetsocket import EmulatedPacketSocket

        return EmulatedPacketSocket(device, type, protocol)

    def add_pair(self, first: str, second: str) -> None:
        add_pair(first, second)

    def remove(self, device: str) -> None:
        # Both ends of a cable go together.
        other = current().interface(device).peer
        current().remove_interface(device)
        current().remove_interface(other.name)

    def counters(self, device: str) -> tuple[int, ...]:
        c = current().interface(device).counters
        return c.rx_packets, c.tx_packets, c.rx_bytes, c.tx_bytes, c.rx_dropped, c.tx_dropped


class KernelMachine(Machine):
    backend = "kernel"

    def __init__(self, namespace: NetworkNamespace) -> None:
        super().__init__()
        self.namespace = namespace
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", "net.ipv6.conf.all.disable_ipv6=1")
        for first in "vwu":
            one, two = f"{first}0", f"{first}1"
            command = f"ip link add {one} index {INDEX[one]} address {MACS[one].hex(':')} type veth "
            command += f"peer name {two} index {INDEX[two]} address {MACS[two].hex(':')}"
            namespace.run(*command.split())
            for device in (one, two):
                namespace.run("ip", "link", "set", device, "up")

    def inside(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        return self.namespace.call(function, *arguments, **keywords)

    def open(self, device: str, type: int = socket.SOCK_RAW, protocol: int = 3) -> Any:
        made = self.namespace.socket(socket.AF_PACKET, type, 0)
        made.bind((device, protocol))
        return made

    def settle(self) -> None:
        # Packets wait for a soft interrupt of this processor, which comes before the process goes on, or soon.
        time.sleep(0.002)

    def add_pair(self, first: str, second: str) -> None:
        self.namespace.run("ip", "link", "add", first, "type", "veth", "peer", "name", second)

    def remove(self, device: str) -> None:
        self.namespace.run("ip", "link", "delete", device)

    def counters(self, device: str) -> tuple[int, ...]:
        fields = self.namespace.run("cat", "/proc/net/dev").stdout.split(f"{device}:")[1].split("\n")[0].split()
        numbers = [int(field) for field in fields]
        return numbers[1], numbers[9], numbers[0], numbers[8], numbers[3], numbers[11]


@contextmanager
def machines() -> Iterator[tuple[Machine, Machine]]:
    """The kernel's and the emulator's. One processor, so that there is one order of events."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with NetworkNamespace() as namespace:
            made = KernelMachine(namespace), EmulatedMachine()
            with made[0].stack, made[1].stack:
                yield made
    finally:
        reset()
        os.sched_setaffinity(0, allowed)


def returns(value: int) -> Code:
    return [*mov(0, value), EXIT]


def redirect(device: str, flags: int = 0) -> Code:
    return [*mov(1, INDEX.get(device, 99)), *mov(2, flags), *call("redirect"), EXIT]


def clone(device: str, flags: int = 0) -> Code:
    return [*copy(1, 9), *mov(2, INDEX[device]), *mov(3, flags), *call("clone_redirect")]


def put_field(name: str, value: int, element: int = 0) -> Code:
    return [*mov(1, value), I(ebpf.STX | ebpf.MEM | ebpf.W, 9, 1, SKB[name].offset + 4 * element)]


#: Everything that travels with a packet from hook to hook.
METADATA = [
    *put_field("mark", 5),
    *put_field("priority", 6),
    *put_field("cb", 0x11, 0),
    *put_field("cb", 0x44, 4),
    *put_field("tc_index", 8),
    *put_field("tc_classid", 9),
]


def watch(machine: Machine, *devices: str) -> None:
    """Programs at all places of devices, by default of all, that note down what they see and change nothing."""
    places = [(device, place) for device in devices or DEVICES for place in ("tcx_egress", "tcx_ingress")]
    for who, (device, place) in enumerate(places, 100):
        machine.hook(device, place, returns(-1), who)


def without_gro(line: Seen) -> Seen:
    """Without what the receive offload that comes with XDP in veth's driver leaves in ``skb->cb``."""
    fields = zip(SEEN, line.fields, strict=True)
    return line._replace(
        fields=tuple(0 if name in ("cb", "tc_classid", "tc_index") else value for name, value in fields)
    )


def compare(
    both: tuple[Machine, Machine],
    setup: Callable[[Machine], Any],
    device: str = "v0",
    frame: bytes = FRAME,
    native: bool = False,
    listen: tuple[str, ...] = (),
    **how: int,
) -> Outcome:
    """Do the same on both sides, and find that the same came of it; `native` says that XDP is in a driver."""
    outcomes = []
    for machine in both:
        machine.begin()
        machine.listen(*listen)
        setup(machine)
        machine.send(device, frame, **how)
        outcomes.append(machine.outcome())
        machine.stack.close()
    kernel, emulated = outcomes
    if native:
        for outcome in outcomes:
            outcome.seen[:] = [without_gro(line) for line in outcome.seen]
    assert emulated.seen == kernel.seen
    assert emulated.received == kernel.received
    assert emulated.counters == kernel.counters
    assert emulated.refused == kernel.refused
    return kernel
