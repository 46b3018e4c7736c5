"""Which socket of a table a packet is for, and what a socket shows programs."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any

import pytest

from kbpf.emulator.memory import Space
from kbpf.emulator.sock import TCP, Sock
from kbpf.emulator.socket_table import ReuseportGroup, SocketTable
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import BPF_TCP_ESTABLISHED, BPF_TCP_LISTEN
from kbpf.uapi.structs import STRUCTS


def packed(address: str) -> bytes:
    return ip_address(address).packed


def sock(local: str, port: int, protocol: int = socket.IPPROTO_UDP, **fields: Any) -> Sock:
    address = packed(local)
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    return Sock(family=family, protocol=protocol, local=address, local_port=port, **fields)


def find(table: SocketTable, remote: str, port: int, local: str, local_port: int, **given: Any) -> Sock | None:
    protocol = given.pop("protocol", socket.IPPROTO_UDP)
    return table.lookup(protocol, packed(remote), port, packed(local), local_port, **given)


def table_of(*socks: Sock) -> SocketTable:
    table = SocketTable()
    for one in socks:
        table.add(one)
    return table


def test_a_socket_goes_with_its_removal() -> None:
    one = sock("0.0.0.0", 53)
    table = table_of(one)
    assert find(table, "10.0.0.1", 9, "10.0.0.2", 53) is one
    table.remove(one)
    table.remove(one)
    assert one not in table
    assert find(table, "10.0.0.1", 9, "10.0.0.2", 53) is None


def test_what_is_bound_to_more_is_found() -> None:
    anyone, device = sock("0.0.0.0", 53), sock("0.0.0.0", 53, bound_dev_if=3)
    bound, connected = sock("10.0.0.2", 53), sock("10.0.0.2", 53, remote=packed("10.0.0.1"), remote_port=9)
    dual = sock("::", 53)
    table = table_of(anyone, device, bound, connected, dual)
    assert find(table, "10.0.0.1", 9, "10.0.0.2", 53) is connected
    assert find(table, "10.0.0.1", 8, "10.0.0.2", 53) is bound
    assert find(table, "10.0.0.1", 8, "10.0.0.3", 53, ifindex=3) is device
    assert find(table, "10.0.0.1", 8, "10.0.0.3", 53, ifindex=4) is anyone
    assert find(table, "fd00::1", 8, "fd00::2", 53) is dual
    table.remove(anyone)
    assert find(table, "10.0.0.1", 8, "10.0.0.3", 53) is dual
    dual.v6only = True
    assert find(table, "10.0.0.1", 8, "10.0.0.3", 53) is None


def test_a_connection_comes_before_its_listener() -> None:
    listener = sock("::", 80, socket.IPPROTO_TCP, state=BPF_TCP_LISTEN)
    child = sock(
        "::ffff:10.0.0.2", 80, socket.IPPROTO_TCP, remote=packed("::ffff:10.0.0.1"), remote_port=9,
        state=BPF_TCP_ESTABLISHED,
    )  # fmt: skip
    table = table_of(child, listener)
    assert find(table, "10.0.0.1", 9, "10.0.0.2", 80, protocol=socket.IPPROTO_TCP) is child
    assert find(table, "10.0.0.1", 8, "10.0.0.2", 80, protocol=socket.IPPROTO_TCP) is listener
    assert find(table, "10.0.0.1", 9, "10.0.0.2", 80) is None


def test_a_group_shares_by_hash_and_fills_gaps_with_its_last() -> None:
    group = ReuseportGroup()
    socks = [sock("0.0.0.0", 53) for _ in range(3)]
    table = SocketTable()
    for one in socks:
        group.add(one)
        table.add(one)
    for number, one in enumerate(socks):
        table.flow_hash = lambda flow, number=number: (number << 32) // 3 + 1  # type: ignore[misc]
        assert find(table, "10.0.0.1", 9, "10.0.0.2", 53) is one
    group.remove(socks[0])
    assert group.socks == [socks[2], socks[1]]
    assert socks[0].reuseport is None


def test_a_socket_is_shown_and_not_written() -> None:
    one = sock(
        "10.0.0.2", 80, socket.IPPROTO_TCP, type=1, remote=packed("10.0.0.1"), remote_port=0x1234, mark=7,
        state=BPF_TCP_ESTABLISHED, tcp={"snd_cwnd": 10, "bytes_acked": 1 << 40},
    )  # fmt: skip
    space, fields = Space(), STRUCTS["bpf_sock"].fields
    expected = {"family": 2, "type": 1, "protocol": 6, "mark": 7, "src_port": 80, "dst_port": 0x3412, "state": 1,
                "src_ip4": 0x0200000A, "dst_ip4": 0x0100000A, "rx_queue_mapping": 0xFFFFFFFF}  # fmt: skip
    for name, value in expected.items():
        assert space.load(one.address + fields[name].offset, 4) == value, name
    tcp = STRUCTS["bpf_tcp_sock"].fields
    assert space.load(one.address + TCP + tcp["snd_cwnd"].offset, 4) == 10
    assert space.load(one.address + TCP + tcp["bytes_acked"].offset, 8) == 1 << 40
    for offset, size in ((fields["mark"].offset, 2), (fields["dst_port"].offset + 2, 2), (0, 8), (80, 4), (TCP, 2)):
        with pytest.raises(EmulationFault):
            space.load(one.address + offset, size)
    with pytest.raises(EmulationFault):
        space.store(one.address + fields["mark"].offset, 4, 1)
    assert space.owner(one.address) is one
