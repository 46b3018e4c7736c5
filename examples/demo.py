#!/usr/bin/env python3
"""Show what kbpf does here: a filter on a live socket, an eBPF program that counts, and its map read from Python.

As root all of it is the running kernel's. As another user the filters are real too (packet sockets in a user
namespace of its own, where the machine allows that), and the eBPF part runs in the emulator over the
frames that were captured there. Whatever is printed was measured in this run.
"""

import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import kbpf
from kbpf import emulator
from kbpf.pcapfile import PcapWriter, open_capture

OBJECT = Path(kbpf.__file__).with_name("objects") / "sockex1.bpf.o"
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP"}
PORT = 7070


def say(text: str = "") -> None:
    print(text, flush=True)


def receive_all(sock: socket.socket) -> list[bytes]:
    """Everything that has arrived, up to a short silence."""
    sock.settimeout(0.2)
    packets = []
    with suppress(TimeoutError):
        while True:
            packets.append(sock.recv(65535))
    return packets


def listing() -> None:
    """An expression compiled, as tcpdump lists it."""
    say(f"1. The expression 'tcp and dst port {PORT}', compiled to classic BPF")
    compiled = kbpf.compile(f"tcp and dst port {PORT}", order="libpcap")
    say("".join(f"   {line}\n" for line in str(compiled).splitlines()).rstrip())


def udp_filter() -> None:
    """A classic filter on an ordinary UDP socket; needs no privilege."""
    say("2. A classic filter on a UDP socket")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        expression = "udp and less 13"
        with kbpf.attach(receiver, expression) as link:
            for size in (1, 5, 6, 100):
                sender.sendto(b"x" * size, receiver.getsockname())
            sizes = [len(packet) for packet in receive_all(receiver)]
            say(f"   {link.backend}: {expression!r} on the socket; sent 1, 5, 6 and 100 bytes, received {sizes}")
            read = link.read_back()
            say(f"   read back from the kernel: {0 if read is None else len(read)} instructions")


def make_traffic() -> dict[int, int]:
    """TCP, UDP and ICMP over loopback; gives the payload bytes sent by protocol number."""
    sent = dict.fromkeys(PROTOCOLS, 0)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as child,
    ):
        client.sendall(b"t" * 20000)
        while sent[6] < 20000:
            sent[6] += len(child.recv(65536))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for port in (PORT, PORT, PORT + 1):
            sent[17] += udp.sendto(b"u" * 500, ("127.0.0.1", port))
    echo = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + b"e" * 56
    checksum = sum(struct.unpack("!32H", echo))
    checksum = ~((checksum & 0xFFFF) + (checksum >> 16)) & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        sent[1] += icmp.sendto(echo[:2] + struct.pack("!H", checksum) + echo[4:], ("127.0.0.1", 0))
    return sent


def packet_filter(capture: Path) -> None:
    """A classic filter on a packet socket on lo; all frames of the traffic are written to `capture`."""
    say("3. A classic filter on a packet socket on lo")
    expression = f"udp and dst port {PORT}"
    with kbpf.packet_socket("lo") as filtered, kbpf.packet_socket("lo") as everything:
        with kbpf.attach(filtered, expression) as link:
            sent = make_traffic()
            frames = receive_all(filtered)
            say(f"   {link.backend}: {expression!r} passed {len(frames)} frames of {[len(f) for f in frames]} bytes")
            say("   (two datagrams, each seen going out and coming in)")
        seen = receive_all(everything)
    say(f"   payload sent: {summary(sent)} bytes, in {len(seen)} frames")
    with PcapWriter(capture) as writer:
        for frame in seen:
            writer.write(frame, timestamp_ns=time.time_ns())


def summary(sent: dict[int, int]) -> str:
    return ", ".join(f"{PROTOCOLS[protocol]} {count}" for protocol, count in sent.items())


def show_counters(collection: kbpf.Collection) -> None:
    counted = collection.maps["bytes"]
    say(f"   {collection.backend}: {summary({protocol: counted[protocol] for protocol in PROTOCOLS})} bytes counted")


def count_on_the_kernel() -> None:
    say("4. An eBPF program (sockex1) on a packet socket on lo, its map read from Python")
    with (
        kbpf.packet_socket("lo") as sock,
        kbpf.load(OBJECT, backend="kernel") as collection,
        collection.programs["count"].attach(sock),
    ):
        sent = make_traffic()
        time.sleep(0.1)
        show_counters(collection)
        say(f"   payload sent: {summary(sent)} bytes; the program counts whole IP packets")


def count_in_the_emulator(capture: Path) -> None:
    say("5. The same program in the emulator, over the frames captured in step 3")
    with (
        kbpf.packet_socket("lo", backend="emulator") as sock,
        kbpf.load(OBJECT, backend="emulator") as collection,
        collection.programs["count"].attach(sock),
    ):
        with open_capture(capture) as frames:
            # The capture has each frame twice, outgoing and incoming, as loopback does; the emulated one doubles again.
            for frame in list(frames)[::2]:
                emulator.inject("lo", frame.data)
        show_counters(collection)


def main() -> int:
    if sys.argv[1:2] == ["--in-namespace"]:
        from pyroute2 import IPRoute

        with IPRoute() as netlink:
            netlink.link("set", index=1, state="up")
        packet_filter(Path(sys.argv[2]))
        return 0
    say(f"kbpf on Linux {os.uname().release}, as user {os.geteuid()}")
    listing()
    udp_filter()
    with tempfile.TemporaryDirectory() as folder:
        capture = Path(folder) / "frames.pcap"
        if os.geteuid() == 0:
            packet_filter(capture)
            count_on_the_kernel()
            count_in_the_emulator(capture)
            return 0
        child = [sys.executable, __file__, "--in-namespace", str(capture)]
        if subprocess.run(["unshare", "-Urn", *child], check=False).returncode:
            say("   packet sockets: this machine allows no user namespaces here; nothing was captured")
            return 0
        say("4. eBPF on the kernel: not for this user (`kbpf doctor` says what is missing)")
        count_in_the_emulator(capture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
