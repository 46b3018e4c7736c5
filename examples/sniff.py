#!/usr/bin/env python3
"""The classic Linux socket filter: print a line for each TCP packet to port 7070.

    sniff.py lo --count 10

A packet socket bound to one interface, and on it the sixteen numbers that `tcpdump -dd 'tcp and dst port 7070'`
prints. Needs CAP_NET_RAW; with KBPF_BACKEND=emulator and KBPF_EMULATED_CAPTURE=FILE it reads a capture
instead, without any privilege.
"""

import argparse
import ipaddress

import kbpf

TCP_TO_PORT_7070 = kbpf.Filter(
    [
        (0x28, 0, 0, 0x0000000C),
        (0x15, 0, 7, 0x00000800),
        (0x30, 0, 0, 0x00000017),
        (0x15, 0, 11, 0x00000006),
        (0x28, 0, 0, 0x00000014),
        (0x45, 9, 0, 0x00001FFF),
        (0xB1, 0, 0, 0x0000000E),
        (0x48, 0, 0, 0x00000010),
        (0x15, 5, 6, 0x00001B9E),
        (0x15, 0, 5, 0x000086DD),
        (0x30, 0, 0, 0x00000014),
        (0x15, 0, 3, 0x00000006),
        (0x28, 0, 0, 0x00000038),
        (0x15, 0, 1, 0x00001B9E),
        (0x06, 0, 0, 0x00040000),
        (0x06, 0, 0, 0x00000000),
    ]
)


def describe(frame: bytes) -> str:
    """One line for an Ethernet frame with an IP packet in it."""
    packet = frame[14:]
    if packet[0] >> 4 == 4:
        source, target = ipaddress.IPv4Address(packet[12:16]), ipaddress.IPv4Address(packet[16:20])
        return f"IPv4 proto={packet[9]} src={source} dst={target}"
    source6, target6 = ipaddress.IPv6Address(packet[8:24]), ipaddress.IPv6Address(packet[24:40])
    return f"IPv6 proto={packet[6]} src={source6} dst={target6}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("interface")
    parser.add_argument("--count", type=int, default=10, help="packets to print (default 10)")
    parser.add_argument("--timeout", type=float, default=None, help="seconds to wait for a packet (default: for ever)")
    arguments = parser.parse_args()
    with kbpf.packet_socket(arguments.interface) as sock, kbpf.attach(sock, TCP_TO_PORT_7070):
        sock.settimeout(arguments.timeout)
        print(f"listening on {arguments.interface}", flush=True)
        for _ in range(arguments.count):
            try:
                print(describe(sock.recv(65535)), flush=True)
            except TimeoutError:
                break


if __name__ == "__main__":
    main()
