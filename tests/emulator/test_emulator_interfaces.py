"""Programs on interfaces see the same packets on the emulated network as on Linux, and make the same of them."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from mapcode import EXIT, Code, call, copy, mov, the_map
from networld import (
    FRAME,
    INDEX,
    INGRESS,
    METADATA,
    PASS,
    TX,
    I,
    Machine,
    clone,
    compare,
    machines,
    redirect,
    returns,
    unless_looping,
    watch,
)

import kbpf
from kbpf import emulator
from kbpf.emulator.packetsocket import EmulatedPacketSocket
from kbpf.isa import ebpf
from kbpf.specs import MapSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import BPF_F_BROADCAST, BPF_F_EXCLUDE_INGRESS

pytestmark = [pytest.mark.requires("kernel"), pytest.mark.requires("netns")]


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Machine, Machine]]:
    with machines() as made:
        yield made


@pytest.mark.parametrize("value", [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 100])
@pytest.mark.parametrize(("device", "place"), [("v0", "tcx_egress"), ("v1", "tcx_ingress")])
def test_verdicts_of_traffic_control(both: Any, device: str, place: str, value: int) -> None:
    def setup(machine: Machine) -> None:
        machine.hook(device, place, returns(value), 1)
        machine.hook(device, place, returns(0), 2)

    found = compare(both, setup, mark=7)
    assert [line.who for line in found.seen] == ([1, 2] if value == -1 else [1])


@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("mode", ["generic", "native"])
def test_actions_of_xdp(both: Any, mode: str, value: int) -> None:
    found = compare(
        both, lambda machine: machine.hook("v1", "xdp", returns(value), 1, mode=mode), native=mode == "native"
    )
    assert bool(found.received["v1"]) == (value == PASS)


def test_a_frame_that_native_xdp_sends_back_is_taken_by_native_xdp(both: Any) -> None:
    def setup(machine: Machine) -> None:
        machine.hook("v1", "xdp", returns(TX), 1, mode="native")
        machine.hook("v0", "xdp", returns(PASS), 2, mode="native")

    found = compare(both, setup, native=True, mark=9)
    assert found.received["v0"]


@pytest.mark.parametrize("verdict", [-1, 0])
@pytest.mark.parametrize(
    ("device", "place", "sent"),
    [("v0", "tcx_egress", "v0"), ("v1", "tcx_ingress", "v0"), ("lo", "tcx_egress", "lo")],
)
def test_metadata_travel_from_hook_to_hook(both: Any, device: str, place: str, sent: str, verdict: int) -> None:
    def setup(machine: Machine) -> None:
        machine.hook(device, place, [*METADATA, *returns(verdict)], 1)
        watch(machine)

    compare(both, setup, sent)


#: Where from, by which hook, and where to. On Linux what comes back to where it came from takes turns with all else
#: that goes on, and is left out; but sending through one another ends.
WAYS = [
    (device, place, target, flags)
    for device, place in (("v0", "tcx_egress"), ("v1", "tcx_ingress"))
    for target in ("w0", "w1", "v0", "v1", "lo")
    for flags in (0, INGRESS)
    if (device, target, flags) not in {("v1", "v0", 0), ("v1", "v1", INGRESS)}
]
NOWHERE = [("v0", "tcx_egress", "none", 0), ("v1", "tcx_ingress", "none", INGRESS)]


@pytest.mark.parametrize(("device", "place", "target", "flags"), [*WAYS, *NOWHERE])
def test_redirected_packets(both: Any, device: str, place: str, target: str, flags: int) -> None:
    def setup(machine: Machine) -> None:
        machine.hook(device, place, unless_looping(0, [*METADATA, *redirect(target, flags)]), 1)
        watch(machine)

    compare(both, setup, mark=3)


@pytest.mark.parametrize(("device", "place", "target", "flags"), WAYS)
def test_copies_that_are_redirected(both: Any, device: str, place: str, target: str, flags: int) -> None:
    """From v0 out of v0 they go until sending through one another is too deep."""

    def setup(machine: Machine) -> None:
        machine.hook(device, place, unless_looping(0, [*METADATA, *clone(target, flags), *returns(0)]), 1)
        watch(machine)

    compare(both, setup, mark=3)


@pytest.mark.parametrize("target", ["w0", "w1", "v0", "lo", "none"])
@pytest.mark.parametrize(("mode", "taken"), [("generic", False), ("native", False), ("native", True)])
def test_frames_that_xdp_redirects(both: Any, target: str, mode: str, taken: bool) -> None:
    def setup(machine: Machine) -> None:
        machine.hook("v1", "xdp", unless_looping(PASS, redirect(target)), 1, mode=mode)
        if taken:
            machine.hook("w1", "xdp", returns(PASS), 2, mode="native")

    compare(both, setup, native=mode == "native", mark=3)


def adjust(helper: str, by: int) -> Code:
    return [*copy(1, 9), *mov(2, by), *call(helper)]


#: Write the packet's first byte but one, and the last byte of the EtherType.
_WRITE = [
    I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 9, 0),
    I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 9, 4),
    *copy(4, 2),
    I(ebpf.ALU64 | ebpf.ADD, 4, 0, 0, 14),
    I(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, 2),
    I(ebpf.ST | ebpf.MEM | ebpf.B, 2, 0, 1, 0x77),
    I(ebpf.ST | ebpf.MEM | ebpf.B, 2, 0, 13, 0x44),
]
_METADATA = [
    *adjust("xdp_adjust_meta", -8),
    I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 9, 8),
    I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 9, 0),
    *copy(4, 2),
    I(ebpf.ALU64 | ebpf.ADD, 4, 0, 0, 8),
    I(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, 2),
    I(ebpf.ST | ebpf.MEM | ebpf.W, 2, 0, 0, 0x1234),
    I(ebpf.ST | ebpf.MEM | ebpf.W, 2, 0, 4, 0x5678),
]
#: Write what is new in front: the kernel leaves there what it finds.
_FILL = [
    I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 9, 0),
    I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 9, 4),
    *copy(4, 2),
    I(ebpf.ALU64 | ebpf.ADD, 4, 0, 0, 20),
    I(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, 5),
    *(I(ebpf.ST | ebpf.MEM | ebpf.W, 2, 0, at, 0x00080800 + at) for at in range(0, 20, 4)),
]
CHANGES = {
    "shorter in front": adjust("xdp_adjust_head", 4),
    "longer in front": [*adjust("xdp_adjust_head", -20), *_FILL],
    "shorter behind": adjust("xdp_adjust_tail", -5),
    "too short": adjust("xdp_adjust_tail", -40),
    "longer behind": adjust("xdp_adjust_tail", 6),
    "other bytes": _WRITE,
    "metadata": _METADATA,
    "metadata and longer": [*_METADATA, *adjust("xdp_adjust_head", -4)],
}


@pytest.mark.parametrize("mode", ["generic", "native"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_xdp_changes_reaches_the_stack(both: Any, change: str, mode: str) -> None:
    def setup(machine: Machine) -> None:
        machine.hook("v1", "xdp", [*CHANGES[change], *returns(PASS)], 1, mode=mode)
        machine.hook("v1", "tcx_ingress", redirect("w0"), 2)
        machine.hook("w0", "tcx_egress", returns(0), 3)
        machine.hook("w1", "tcx_ingress", returns(0), 4)

    found = compare(both, setup, native=mode == "native")
    assert found.received["w1"] or change == "other bytes"


def redirect_map(flags: int, key: int = 0) -> Code:
    return [*the_map(1, 2), *mov(2, key), *mov(3, flags), *call("redirect_map"), EXIT]


def devices(machine: Machine, type: str, entries: dict[int, str], code: Code | None = None) -> Any:
    """A devmap; `code` is a program that looks at what goes out."""
    made = machine.stack.enter_context(
        kbpf.Map.create(MapSpec(type=type, key_size=4, value_size=8, max_entries=8), machine.backend)
    )
    program = None
    if code is not None:
        program = machine.program([*copy(9, 1), *code], "xdp", expected_attach_type="xdp_devmap")
    for key, device in entries.items():
        value = struct.pack("=Ii", INDEX[device], -1 if program is None else program.fileno())
        machine.inside(made.__setitem__, key, value)
    return made


@pytest.mark.parametrize("mode", ["generic", "native"])
@pytest.mark.parametrize("type", ["devmap", "devmap_hash"])
@pytest.mark.parametrize("flags", [0, PASS, BPF_F_BROADCAST, BPF_F_BROADCAST | BPF_F_EXCLUDE_INGRESS])
@pytest.mark.parametrize("code", [None, returns(PASS), returns(1), [*_WRITE, *returns(PASS)]])
def test_frames_that_go_where_a_map_says(both: Any, mode: str, type: str, flags: int, code: Code | None) -> None:
    def setup(machine: Machine) -> None:
        targets = devices(machine, type, {1: "w0", 3: "u0", 4: "v1"}, code)
        key = 1 if flags != PASS else 2
        machine.hook("v1", "xdp", unless_looping(PASS, redirect_map(flags, key)), 1, [targets], mode=mode)
        for device in ("w1", "u1", "v0"):
            machine.hook(device, "xdp", returns(PASS), 0, mode=mode)

    compare(both, setup, native=mode == "native")


@pytest.mark.parametrize("mode", ["generic", "native"])
@pytest.mark.parametrize("value", [None, PASS, 1])
def test_frames_that_go_to_a_processor(both: Any, mode: str, value: int | None) -> None:
    def setup(machine: Machine) -> None:
        made = machine.stack.enter_context(
            kbpf.Map.create(MapSpec(type="cpumap", key_size=4, value_size=8, max_entries=1), machine.backend)
        )
        program = None
        if value is not None:
            program = machine.program([*copy(9, 1), *_WRITE, *returns(value)], "xdp", expected_attach_type="xdp_cpumap")
        made[0] = struct.pack("=Ii", 8, -1 if program is None else program.fileno())
        machine.hook("v1", "xdp", redirect_map(0), 1, [made], mode=mode)
        machine.hook("v1", "tcx_ingress", returns(0), 2)

    # Processors have receive offload, whatever the mode.
    found = compare(both, setup, native=True, mark=4)
    assert bool(found.received["v1"]) == (value != 1)


def test_an_interface_that_goes_away_takes_its_programs_off(both: Any) -> None:
    outcomes = []
    for machine in both:
        machine.begin()
        machine.add_pair("x0", "x1")
        links = [machine.hook("x1", "xdp", returns(PASS)), machine.hook("x1", "tcx_ingress", returns(0))]
        before = [link.info.ifindex > 0 for link in links]
        machine.remove("x0")
        with pytest.raises(kbpf.BpfError) as raised:
            links[1].update(machine.program(returns(0)))
        outcomes.append((before, [link.info.ifindex for link in links], raised.value.errno, links[1].detach()))
        machine.stack.close()
    assert outcomes[0] == outcomes[1] == ([True, True], [0, 0], errno.ENOLINK, False)


def test_packets_that_go_to_the_other_end_in_another_network(both: Any) -> None:
    kernel, emulated = both
    outcomes = []
    with NetworkNamespace() as far:
        command = "ip link add x0 index 20 type veth peer name x1 index 21 address 02:00:00:00:00:21 netns"
        kernel.namespace.run(*command.split(), far.name)
        elsewhere = emulator.Network()
        one, two = emulator.current().add_pair("x0", "x1", elsewhere)
        two.address = bytes.fromhex("020000000021")
        kernel.namespace.run("ip", "link", "set", "x0", "up")
        far.run("sysctl", "-qw", "net.ipv6.conf.x1.disable_ipv6=1")
        far.run("ip", "link", "set", "x1", "up")
        for machine, index in ((kernel, 20), (emulated, one.index)):
            machine.begin()
            machine.listen("v1", "w0")
            redirect_peer = [*METADATA, *mov(1, index), *mov(2, 0), *call("redirect_peer"), EXIT]
            machine.hook("v1", "tcx_ingress", redirect_peer, 1)
            if machine is kernel:
                listener = far.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
                listener.bind(("x1", 3))
            else:
                listener = EmulatedPacketSocket("x1", socket.SOCK_RAW, 3, network=elsewhere)
            machine.sockets["x1"] = machine.stack.enter_context(listener)
            machine.send("v0", FRAME, mark=3)
            outcomes.append((machine.seen(), machine.received()))
            machine.stack.close()
        emulator.current().remove_interface("x0")
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1]["x1"]
