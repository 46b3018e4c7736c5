"""The emulated network delivers what Linux delivers: same frames, same filters, same results of recvmsg."""

from __future__ import annotations

import ctypes
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbpf.emulator import Network, current, inject, reset, sockets
from kbpf.emulator.classic import ClassicProgram
from kbpf.emulator.datapath import Frame
from kbpf.emulator.packetsocket import EmulatedPacketSocket
from kbpf.isa import cbpf
from kbpf.pcapfile import CaptureError, PcapWriter
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import PACKET_AUXDATA, PACKET_STATISTICS, SO_LOCK_FILTER, SOL_PACKET

RAW, DGRAM = socket.SOCK_RAW, socket.SOCK_DGRAM
LOCAL, OTHER = b"\x02\0\0\0\0\x02", b"\x02\0\0\0\0\x09"
SOURCE = b"\x02\0\0\0\0\x01"
IPV4 = bytes.fromhex("4500001c0000000040110000c0000201c000020200350035000800 00")


def returns(value: int) -> list[cbpf.Instruction]:
    return [cbpf.stmt(cbpf.RET | cbpf.K, value)]


def returns_word(offset: int) -> list[cbpf.Instruction]:
    return [cbpf.stmt(cbpf.LD | cbpf.W | cbpf.ABS, offset), cbpf.stmt(cbpf.RET | cbpf.A)]


def returns_byte(offset: int) -> list[cbpf.Instruction]:
    return [cbpf.stmt(cbpf.LD | cbpf.B | cbpf.ABS, offset), cbpf.stmt(cbpf.RET | cbpf.A)]


#: Programs whose return value, and so the length that is kept, tells what they saw.
FILTERS = {
    "none": None,
    "all": returns(0xFFFFFFFF),
    "drop": returns(0),
    "cut": returns(5),
    "len": [
        cbpf.stmt(cbpf.LD | cbpf.W | cbpf.LEN),
        cbpf.stmt(cbpf.ALU | cbpf.SUB | cbpf.K, 3),
        cbpf.stmt(cbpf.RET | cbpf.A),
    ],
    "pkttype": returns_word(cbpf.AD_OFF + 4),
    "vlan present": returns_word(cbpf.AD_OFF + 48),
    "hatype": returns_word(cbpf.AD_OFF + 28),
    "protocol": [
        cbpf.stmt(cbpf.LD | cbpf.W | cbpf.ABS, cbpf.AD_OFF),
        cbpf.stmt(cbpf.ALU | cbpf.MOD | cbpf.K, 31),
        cbpf.stmt(cbpf.RET | cbpf.A),
    ],
    "first": returns_byte(0),
    "network": returns_byte(cbpf.NET_OFF & 0xFFFFFFFF),
    "network 1": returns_byte(cbpf.NET_OFF + 1),
    "link": returns_byte(cbpf.LL_OFF + 12),
}


class KernelWorld:
    """lo, and the pair v0 and v1, in a namespace."""

    def __init__(self, namespace: NetworkNamespace) -> None:
        self.namespace = namespace
        for command in (
            "sysctl -qw net.ipv6.conf.default.disable_ipv6=1",
            "ip link add v0 address 02:00:00:00:00:01 type veth peer name v1 address 02:00:00:00:00:02",
            "ip link set v0 up",
            "ip link set v1 up",
        ):
            namespace.run(*command.split())

    def open(self, interface: str, type: int = RAW, protocol: int = 3) -> Any:
        made = self.namespace.socket(socket.AF_PACKET, type, 0 if interface else socket.htons(protocol))
        if interface:
            made.bind((interface, protocol))
        return made

    def attach(self, target: Any, program: list[cbpf.Instruction]) -> None:
        code = ctypes.create_string_buffer(cbpf.encode(program))
        fprog = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
        target.setsockopt(socket.SOL_SOCKET, 26, fprog)


class EmulatedWorld:
    def __init__(self) -> None:
        self.network = Network()
        one, other = self.network.add_pair("v0", "v1")
        one.address, other.address = SOURCE, LOCAL

    def open(self, interface: str, type: int = RAW, protocol: int = 3) -> Any:
        return EmulatedPacketSocket(interface or None, type, protocol, network=self.network)

    def attach(self, target: Any, program: list[cbpf.Instruction]) -> None:
        sockets.attach(target, ClassicProgram(program), cbpf.encode(program))


@pytest.fixture
def worlds(netns: NetworkNamespace) -> Iterator[list[Any]]:
    yield [KernelWorld(netns), EmulatedWorld()]


@pytest.fixture(params=[pytest.param("kernel", marks=pytest.mark.requires("netns")), "emulator"])
def world(request: pytest.FixtureRequest) -> Any:
    return KernelWorld(request.getfixturevalue("netns")) if request.param == "kernel" else EmulatedWorld()


@pytest.fixture(autouse=True)
def fresh_network() -> Iterator[None]:
    reset()
    yield
    reset()


def received(target: Any, room: int = 4096) -> list[Any]:
    target.setblocking(False)
    found = []
    while True:
        try:
            found.append(target.recvmsg(room, 256))
        except BlockingIOError:
            return found


def random_frame(rng: random.Random) -> bytes:
    target = rng.choice([LOCAL, LOCAL, OTHER, b"\xff" * 6, b"\x01\0\x5e\0\0\x01", bytes(6), SOURCE])
    tags = b"".join(
        rng.choice([b"\x81\0", b"\x88\xa8"]) + rng.randrange(65536).to_bytes(2, "big")
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2]))
    )
    body = rng.choice(
        [b"\x08\0" + IPV4, b"\x86\xdd" + b"\x60" + bytes(50), b"\0\x08\xff\xff" + bytes(9), b"\0\x08" + bytes(8)]
    )
    frame = target + SOURCE + tags + body + rng.randbytes(rng.choice([0, 0, 7, 900]))
    return frame[: rng.choice([len(frame)] * 6 + [14, 15, 16, 17, 18, 19, 20, 22, 24])]


@pytest.mark.requires("netns")
@pytest.mark.parametrize("interface", ["lo", "v0"])
def test_random_frames_arrive_as_on_linux(worlds: list[Any], interface: str) -> None:
    rng = random.Random(7)
    listening = ["lo"] if interface == "lo" else ["v0", "v1"]
    plan = [
        (name, kind, protocol, filter)
        for name in listening
        for kind in (RAW, DGRAM)
        for filter in FILTERS
        for protocol in ((3,) if filter != "none" else (3, 0x0800, 0x86DD, 0x8100, 0x88A8, 1, 4, 0))
    ]
    frames = [random_frame(rng) for _ in range(60)]
    results = []
    for world in worlds:
        open_sockets = []
        for name, kind, protocol, filter in plan:
            target = world.open(name, kind, protocol)
            target.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            program = FILTERS[filter]
            if program is not None:
                world.attach(target, program)
            open_sockets.append(target)
        seen = []
        with world.open(interface, RAW, 0) as sender:
            for frame in frames:
                assert sender.send(frame) == len(frame)
                seen.append([received(s) for s in open_sockets])
        for target in open_sockets:
            target.close()
        results.append(seen)
    for frame, kernel, emulated in zip(frames, *results, strict=True):
        for what, left, right in zip(plan, kernel, emulated, strict=True):
            assert left == right, (frame.hex(), what)
    assert sum(len(r) for seen in results[0] for r in seen) > 500


def test_loopback_shows_a_frame_going_out_and_then_coming_in(world: Any) -> None:
    with world.open("lo") as listener, world.open("lo", DGRAM, 0x0800) as other, world.open("lo", RAW, 0) as sender:
        sender.send(bytes(12) + b"\x08\0" + IPV4)
        assert [m[3][2] for m in received(listener)] == [4, 0]
        assert [(m[0], m[3]) for m in received(other)] == [(IPV4, ("lo", 0x0800, 0, 772, bytes(6)))]


def test_a_socket_does_not_see_its_own_frames_going_out(world: Any) -> None:
    with world.open("lo") as one:
        one.send(bytes(12) + b"\x08\0" + IPV4)
        assert [m[3][2] for m in received(one)] == [0]


def test_a_socket_on_all_interfaces_names_the_one_a_frame_came_by(world: Any) -> None:
    with world.open("") as listener:
        assert listener.getsockname() == ("", 3, 0, 0, b"")
        with world.open("v0", RAW, 0) as sender:
            sender.send(LOCAL + SOURCE + b"\x08\0" + IPV4)
        # On a busy machine Linux brings the frame over a moment after it was sent.
        found: list[Any] = []
        while len(found) < 2 and select.select([listener], [], [], 2)[0]:
            found += received(listener)
        assert [(m[3][0], m[3][2]) for m in found] == [("v0", 4), ("v1", 0)]


@pytest.mark.parametrize(
    ("attempt", "errno_name"),
    [
        (lambda s, d, w: s.send(bytes(13)), "EINVAL"),
        (lambda s, d, w: s.send(bytes(70000)), "EMSGSIZE"),
        (lambda s, d, w: s.bind(("v0", 3)) or s.send(bytes(1515)), "EMSGSIZE"),
        (lambda s, d, w: d.sendto(b"x", ("nosuch", 0x0800)), "ENODEV"),
        (lambda s, d, w: s.bind(("nosuch", 3)), "ENODEV"),
        (lambda s, d, w: s.setsockopt(SOL_PACKET, 4711, 1), "ENOPROTOOPT"),
        (lambda s, d, w: s.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, b"xx"), "EINVAL"),
        (lambda s, d, w: s.setsockopt(socket.SOL_SOCKET, 27, 0), "ENOENT"),
    ],
)
def test_what_is_refused_has_linux_s_errno(world: Any, attempt: Callable[..., Any], errno_name: str) -> None:
    import errno

    with world.open("lo") as one, world.open("lo", DGRAM) as other, pytest.raises(OSError) as raised:
        attempt(one, other, world)
    assert errno.errorcode[raised.value.errno or 0] == errno_name


def test_reading_into_short_buffers_loses_the_rest(world: Any) -> None:
    frame = bytes(12) + b"\x08\0" + bytes(range(36))
    with world.open("lo", RAW, 0x0800) as listener, world.open("lo", RAW, 0) as sender:
        listener.setblocking(False)
        for _ in range(7):
            sender.send(frame)
        assert listener.recv(10) == frame[:10]
        assert listener.recv(10, socket.MSG_PEEK) == frame[:10]
        assert len(listener.recv(10, socket.MSG_TRUNC)) == 50
        assert listener.recvmsg(10)[::2] == (frame[:10], socket.MSG_TRUNC)
        buffer = bytearray(60)
        assert listener.recv_into(buffer) == 50 and buffer == frame + bytes(10)
        assert listener.recv_into(buffer, 5) == 5
        assert listener.recv_into(buffer, 5, socket.MSG_TRUNC) == 50
        assert listener.recvfrom_into(buffer) == (50, ("lo", 0x0800, 0, 772, bytes(6)))
        for flags in (0, socket.MSG_DONTWAIT):
            with pytest.raises(BlockingIOError):
                listener.recv(10, flags)
        with pytest.raises(ValueError):
            listener.recv_into(buffer, 61)


def test_a_filter_cuts_but_the_auxdata_keeps_the_length(world: Any) -> None:
    with world.open("lo", RAW, 0x0800) as listener, world.open("lo", RAW, 0) as sender:
        listener.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        world.attach(listener, returns(20))
        sender.send(bytes(12) + b"\x08\0" + bytes(36))
        data, [(_, _, aux)], flags, _ = listener.recvmsg(100, 100)
        assert (len(data), struct.unpack("IIIHHHH", aux), flags) == (20, (1, 50, 20, 0, 14, 0, 0), 0)


@pytest.mark.parametrize("size", [50, 300, 1000, 1500, 4000])
@pytest.mark.parametrize("rcvbuf", [0, 4000, 20000])
def test_a_full_queue_drops_as_many_as_linux_and_counts_them(world: Any, size: int, rcvbuf: int) -> None:
    with world.open("lo", RAW, 0x0800) as listener, world.open("lo", RAW, 0) as sender:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == max(2 * rcvbuf, 2304)
        for _ in range(100):
            sender.send(bytes(12) + b"\x08\0" + bytes(size - 14))
        statistics = struct.unpack("II", listener.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        count = len(received(listener))
        assert statistics == (100, 100 - count)
        with EmulatedWorld().open("lo", RAW, 0x0800) as model:
            model.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
            for _ in range(100):
                model.network.inject("lo", bytes(12) + b"\x08\0" + bytes(size - 14))
            assert count == len(received(model))
        assert listener.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8) == bytes(8)


def test_what_a_filter_drops_is_not_counted(world: Any) -> None:
    with world.open("lo") as listener, world.open("lo", RAW, 0) as sender:
        world.attach(listener, returns(0))
        sender.send(bytes(14))
        assert listener.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8) == bytes(8)


def test_a_timeout_ends_waiting_and_a_closed_socket_is_ebadf(world: Any) -> None:
    listener = world.open("lo")
    with listener:
        listener.settimeout(0.05)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            listener.recv(1)
        assert time.monotonic() - start > 0.04
        assert (listener.gettimeout(), listener.getblocking()) == (0.05, True)
    assert listener.fileno() == -1
    with pytest.raises(OSError) as raised:
        listener.recv(1)
    assert raised.value.errno == 9


def test_a_waiting_reader_wakes_up_and_select_sees_packets(world: Any) -> None:
    with world.open("lo") as listener, world.open("lo", RAW, 0) as sender:
        assert select.select([listener], [], [], 0)[0] == []
        threading.Timer(0.05, sender.send, [bytes(14)]).start()
        assert len(listener.recv(100)) == 14
        assert select.select([listener], [], [], 1)[0] == [listener]
        received(listener)
        assert select.select([listener], [], [], 0)[0] == []


def test_injected_metadata_reaches_program_and_reader() -> None:
    with EmulatedPacketSocket("lo") as listener:
        for name, value in (("vlan", 0x6064), ("mark", 9), ("pkt_type", 3)):
            offset = {"vlan": 44, "mark": 20, "pkt_type": 4}[name]
            program = [
                cbpf.stmt(cbpf.LD | cbpf.W | cbpf.ABS, cbpf.AD_OFF + offset),
                cbpf.jump(cbpf.JMP | cbpf.JEQ | cbpf.K, value, 0, 1),
                *returns(100),
                *returns(0),
            ]
            sockets.attach(listener, ClassicProgram(program), cbpf.encode(program))
            inject("lo", bytes(12) + b"\x08\0" + IPV4, pkt_type=0)
            assert received(listener) == []
            inject("lo", bytes(12) + b"\x08\0" + IPV4, **{"pkt_type": 0, name: value})
            assert len(received(listener)) == 1


def test_a_cut_frame_has_its_length_on_the_wire() -> None:
    with EmulatedPacketSocket("lo", protocol=0x0800) as listener:
        listener.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        listener.setsockopt(socket.SOL_SOCKET, 35, 1)
        inject("lo", bytes(12) + b"\x08\0" + IPV4, wirelen=1000, timestamp=1.5)
        data, ancillary, _, _ = listener.recvmsg(4096, 256)
        assert data == bytes(12) + b"\x08\0" + IPV4
        assert struct.unpack("IIIHHHH", ancillary[1][2])[1:3] == (1000, 1000)
        assert struct.unpack("=qq", ancillary[0][2]) == (1, 500_000_000)
        with pytest.raises(ValueError):
            inject("lo", bytes(14), wirelen=13)
        with pytest.raises(ValueError):
            inject("lo", bytes(13))
        with pytest.raises(OSError):
            inject("nosuch", bytes(14))


def test_a_device_without_link_header_starts_at_the_network_header() -> None:
    network = current()
    network.add_interface("tun0", hatype=65534)
    with EmulatedPacketSocket("tun0") as listener:
        assert sockets.layout_of(listener).name == "packet_ip"
        inject("tun0", IPV4)
        assert listener.recvfrom(100) == (IPV4, ("tun0", 0x0800, 0, 65534, b""))
    network.remove_interface("tun0")
    with pytest.raises(OSError):
        network.add_interface("lo")
    with pytest.raises(OSError):
        network.add_interface("much-too-long-a-name")


def capture_file(path: Path, count: int, dlt: int = 1) -> Path:
    with PcapWriter(path, dlt) as writer:
        for index in range(count):
            link = b"" if dlt == 12 else bytes(12) + b"\x08\0"
            writer.write(link + IPV4 + bytes([index % 256]), timestamp_ns=index)
    return path


def test_a_capture_waits_for_the_filter_and_ends_with_a_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBPF_EMULATED_CAPTURE", str(capture_file(tmp_path / "x.pcap", 3000)))
    with sockets.open_packet_socket("eth7") as listener:
        assert sockets.drain(listener) == 0
        program = [
            cbpf.stmt(cbpf.LD | cbpf.B | cbpf.ABS, 42),
            cbpf.jump(cbpf.JMP | cbpf.JEQ | cbpf.K, 1, 0, 1),
            *returns(100),
            *returns(0),
        ]
        sockets.attach(listener, ClassicProgram(program), cbpf.encode(program))
        assert select.select([listener], [], [], 0)[0] == [listener]
        found = []
        with pytest.raises(TimeoutError):
            while True:
                found.append(listener.recv(100)[42])
        assert found == [1] * 12
        assert select.select([listener], [], [], 0)[0] == []
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(1)


def test_reading_a_map_brings_the_capture_to_programs_that_are_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBPF_EMULATED_CAPTURE", str(capture_file(tmp_path / "x.pcap", 2500, dlt=12)))
    seen = []

    class Counter:
        def run_packet(self, packet: Any) -> int:
            seen.append((packet.pkt_type, packet.protocol, packet.length))
            return 0

    with sockets.open_packet_socket("lo") as listener:
        current().settle()
        assert not seen
        sockets.attach(listener, Counter(), None)
        current().settle()
        assert seen == [(4, 0x0800, 43), (0, 0x0800, 43)] * 2500
        current().settle()
        assert len(seen) == 5000


def test_a_capture_plays_again_when_all_who_heard_it_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBPF_EMULATED_CAPTURE", str(capture_file(tmp_path / "x.pcap", 3)))
    for _ in range(2):
        with sockets.open_packet_socket("lo", protocol=0x0800) as first, sockets.open_packet_socket("lo") as second:
            assert len(received(first)) == 3 and len(received(second)) == 6
    with sockets.open_packet_socket("lo"):
        pass  # Nothing was read: the file is closed all the same.


def test_captures_that_cannot_be_played_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBPF_EMULATED_CAPTURE", str(tmp_path / "nosuch.pcap"))
    with pytest.raises(FileNotFoundError):
        sockets.open_packet_socket("lo")
    monkeypatch.setenv("KBPF_EMULATED_CAPTURE", str(capture_file(tmp_path / "x.pcap", 1, dlt=195)))
    with sockets.open_packet_socket("lo") as listener, pytest.raises(CaptureError, match="195"):
        listener.recv(1)


@pytest.mark.parametrize("dlt", [113, 276])
def test_cooked_captures_become_ethernet(dlt: int) -> None:
    head = (
        b"\0\0\0\x01\0\x06" + SOURCE + b"\0\0\x08\0"
        if dlt == 113
        else b"\x08\0\0\0\0\0\0\x01\0\x01\0\x06" + SOURCE + b"\0\0"
    )
    import io

    out = io.BytesIO()
    PcapWriter(out, dlt).write(head + IPV4)
    current().play("lo", out.getvalue())
    with EmulatedPacketSocket("lo", protocol=0x0800) as listener:
        assert listener.recv(100) == bytes(6) + SOURCE + b"\x08\0" + IPV4


def test_frames_of_the_peer_come_by_the_cable() -> None:
    network = current()
    one, _ = network.add_pair("a", "b")
    with EmulatedPacketSocket("b") as listener:
        network.transmit(one, Frame(b"\xff" * 6 + SOURCE + b"\x08\0" + IPV4, 42, 0), None)
        assert listener.recvfrom(100)[1] == ("b", 0x0800, 1, 1, SOURCE)
