"""The example programs, run as their readers run them, on both backends."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kbpf.pcapfile import PcapWriter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def ipv4(protocol: int, payload: bytes, source: bytes = b"\x0a\0\0\1") -> bytes:
    """An Ethernet frame of loopback with an IPv4 packet in it."""
    total = 20 + len(payload)
    header = bytes([0x45, 0, total >> 8, total & 255, 0, 0, 0, 0, 64, protocol, 0, 0]) + source + b"\x0a\0\0\2"
    return bytes(12) + b"\x08\0" + header + payload


def tcp(port: int, source: bytes = b"\x0a\0\0\1") -> bytes:
    return ipv4(6, b"\x04\xd2" + port.to_bytes(2, "big") + bytes(8) + b"\x50\x02" + bytes(6), source)


@pytest.fixture
def capture(tmp_path):
    """Two TCP packets to port 7070 among others: 3 of TCP, 1 of UDP, 1 of ICMP."""
    path = tmp_path / "traffic.pcap"
    with PcapWriter(path) as writer:
        for frame in [tcp(7070), tcp(80), ipv4(17, bytes(108)), tcp(7070, b"\x0a\0\0\3"), ipv4(1, bytes(64))]:
            writer.write(frame, timestamp_ns=time.time_ns())
    return path


def run(name, *arguments, **environment):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
    )


def test_sniff_prints_the_matching_packets_of_a_capture(capture):
    done = run("sniff.py", "lo", "--timeout", "0.5", KBPF_BACKEND="emulator", KBPF_EMULATED_CAPTURE=str(capture))
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "listening on lo"
    # Loopback shows each packet twice, outgoing and incoming.
    assert set(lines[1:]) == {"IPv4 proto=6 src=10.0.0.1 dst=10.0.0.2", "IPv4 proto=6 src=10.0.0.3 dst=10.0.0.2"}
    assert len(lines) == 5


def test_sockex1_counts_a_capture(capture):
    arguments = ("--times", "1", "--interval", "0.5")
    done = run("sockex1.py", *arguments, KBPF_BACKEND="emulator", KBPF_EMULATED_CAPTURE=str(capture))
    assert done.stderr == ""
    assert done.stdout == "TCP 120 UDP 128 ICMP 84 bytes\n"


@pytest.mark.requires("kernel")
def test_sniff_prints_live_packets():
    command = [sys.executable, str(EXAMPLES / "sniff.py"), "lo", "--count", "2", "--timeout", "20"]
    with (
        socket.socket() as server,
        subprocess.Popen(
            [*command], stdout=subprocess.PIPE, text=True, env={**os.environ, "KBPF_BACKEND": "kernel"}
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "listening on lo\n"
        server.settimeout(2)
        # Whether somebody listens there or not: the SYN goes out and comes in.
        server.connect_ex(("127.0.0.1", 7070))
        assert process.stdout.read() == "IPv4 proto=6 src=127.0.0.1 dst=127.0.0.1\n" * 2


@pytest.mark.requires("kernel")
def test_sockex1_counts_live_traffic():
    stop = threading.Event()

    def talk():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not stop.wait(0.05):
                sender.sendto(b"x" * 72, ("127.0.0.1", 9))

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        done = run("sockex1.py", "--times", "2", "--interval", "1", KBPF_BACKEND="kernel")
    finally:
        stop.set()
        talker.join()
    assert done.stderr == ""
    counts = [
        tuple(map(int, re.fullmatch(r"TCP (\d+) UDP (\d+) ICMP (\d+) bytes", line).groups()))
        for line in done.stdout.splitlines()
    ]
    assert len(counts) == 2
    assert 0 < counts[0][1] < counts[1][1]


@pytest.mark.requires("kernel")
def test_the_demonstration_uses_the_kernel_as_root():
    done = run("demo.py")
    assert done.returncode == 0, done.stderr
    assert "kernel: 'udp and less 13' on the socket; sent 1, 5, 6 and 100 bytes, received [1, 5]" in done.stdout
    assert "kernel: 'udp and dst port 7070' passed 4 frames of [542, 542, 542, 542] bytes" in done.stdout
    counted = re.search(r"kernel: ICMP (\d+), TCP (\d+), UDP (\d+) bytes counted", done.stdout)
    assert counted is not None
    # On a machine with other traffic on lo there may be more; headers make it more in any case.
    assert int(counted[1]) >= 84
    assert int(counted[2]) > 20000
    assert int(counted[3]) >= 1584


@pytest.mark.requires("unprivileged", "userns")
def test_the_demonstration_emulates_ebpf_without_privileges(unprivileged):
    copy = unprivileged.folder / "demo.py"
    copy.write_text((EXAMPLES / "demo.py").read_text())
    done = unprivileged.run("import runpy; runpy.run_path('demo.py', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert "kernel: 'udp and less 13' on the socket" in done.stdout
    assert "kernel: 'udp and dst port 7070' passed 4 frames" in done.stdout
    assert re.search(r"emulator: ICMP \d+, TCP \d+, UDP 1584 bytes counted", done.stdout)


GATE = """\
gate3: frame 0 of 54 bytes, protocol 6
gate3: frame 2 of 54 bytes, protocol 1
gate3: frame 4 of 54 bytes, protocol 6
ICMP: 1 passed, 0 dropped
TCP: 2 passed, 0 dropped
UDP: 0 passed, 2 dropped
"""


def test_the_gate_in_the_emulator():
    done = run("gate.py", KBPF_BACKEND="emulator")
    assert (done.stdout, done.stderr) == (GATE, "")


@pytest.mark.requires("kernel", "netns")
def test_the_gate_on_the_kernel(netns):
    for one, other in (("gate0", "gate1"), ("gate2", "gate3")):
        netns.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        netns.run("ip", "link", "add", one, "type", "veth", "peer", "name", other)
        netns.run("ip", "link", "set", one, "up")
        netns.run("ip", "link", "set", other, "up")
    done = netns.run("env", "KBPF_BACKEND=kernel", sys.executable, str(EXAMPLES / "gate.py"))
    assert (done.stdout, done.stderr) == (GATE, "")


@pytest.mark.requires("distributed")
def test_cluster_adds_up_what_matches_in_each_file(capture, tmp_path):
    other = tmp_path / "other.pcap"
    other.write_bytes(capture.read_bytes())
    done = run("cluster.py", "tcp and dst port 7070", str(capture), str(other))
    assert done.stdout == "4 of 10 packets match\n", done.stderr
