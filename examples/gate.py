#!/usr/bin/env python3
"""A gate between two cables: UDP is counted and dropped by XDP, the rest goes on by traffic control.

    gate.py

The frames go into gate0, whose other end gate1 has an XDP program and a tcx program; what passes leaves by gate2, whose
other end gate3 is read. With KBPF_BACKEND=emulator the interfaces are made here, and no privilege is needed. On the
kernel they must be there (root, Linux 6.6):

    ip link add gate0 type veth peer name gate1
    ip link add gate2 type veth peer name gate3
"""

from pathlib import Path

import kbpf

OBJECT = Path(kbpf.__file__).with_name("objects") / "gate.bpf.o"
PROTOCOLS = {"ICMP": 1, "TCP": 6, "UDP": 17}
SENT = ["TCP", "UDP", "ICMP", "UDP", "TCP"]


def frame(protocol: int, number: int) -> bytes:
    """An Ethernet frame with an IPv4 packet of 40 bytes, numbered in its identification."""
    header = bytes([0x45, 0, 0, 40, 0, number, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2])
    return b"\xff" * 6 + b"\x02\0\0\0\0\x01" + b"\x08\0" + header + bytes(20)


def main() -> None:
    with kbpf.load(OBJECT) as gate:
        if gate.backend == "emulator":
            kbpf.emulator.add_pair("gate0", "gate1")
            kbpf.emulator.add_pair("gate2", "gate3")
        with (
            kbpf.packet_socket("gate3") as receiver,
            kbpf.packet_socket("gate0", protocol=0) as sender,
            gate.programs["gate"].attach("gate1"),
            gate.programs["forward"].attach("gate1"),
        ):
            gate.maps["closed"][PROTOCOLS["UDP"]] = 1
            gate.maps["target"][0] = kbpf.interface_index("gate2", backend=gate.backend)
            for number, name in enumerate(SENT):
                sender.send(frame(PROTOCOLS[name], number))
            receiver.settimeout(5)
            for _ in range(SENT.count("TCP") + SENT.count("ICMP")):
                received = receiver.recv(2048)
                print(f"gate3: frame {received[19]} of {len(received)} bytes, protocol {received[23]}")
            for name, protocol in PROTOCOLS.items():
                passed, dropped = (sum(gate.maps[kind][protocol]) for kind in ("passed", "dropped"))
                print(f"{name}: {passed} passed, {dropped} dropped")


if __name__ == "__main__":
    main()
