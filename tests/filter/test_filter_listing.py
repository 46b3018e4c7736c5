"""``order="libpcap"`` gives the listings that tcpdump's users know."""

from __future__ import annotations

import pytest
from filter_machine import libpcap

from kbpf.asm.listing import listing
from kbpf.filter import compile_filter

SIXTEEN = """\
(000) ldh      [12]
(001) jeq      #0x800           jt 2	jf 9
(002) ldb      [23]
(003) jeq      #0x6             jt 4	jf 15
(004) ldh      [20]
(005) jset     #0x1fff          jt 15	jf 6
(006) ldxb     4*([14]&0xf)
(007) ldh      [x + 16]
(008) jeq      #0x1b9e          jt 14	jf 15
(009) jeq      #0x86dd          jt 10	jf 15
(010) ldb      [20]
(011) jeq      #0x6             jt 12	jf 15
(012) ldh      [56]
(013) jeq      #0x1b9e          jt 14	jf 15
(014) ret      #262144
(015) ret      #0
"""


def test_tcp_and_dst_port_7070_is_the_sixteen_instructions() -> None:
    assert listing(compile_filter("tcp and dst port 7070", order="libpcap").instructions) == SIXTEEN


@pytest.mark.requires("libpcap")
@pytest.mark.parametrize(
    "expression",
    [
        *("ip", "arp", "tcp", "udp", "icmp", "icmp6", "port 53", "tcp port 80", "udp dst port 53", "host 10.0.0.1"),
        *("src net 10.0.0.0/8", "not host 10.0.0.1", "tcp and dst port 7070", "udp portrange 100-200", "ip proto 47"),
        *("ether src 1:2:3:4:5:6", "ip[0]>>4=4", "tcp[13]&2!=0", "less 100", "vlan 5", "ip6 net fe80::/10"),
        *("arp or rarp", "host 10.0.0.1 or 10.0.0.2", "ip6 multicast", "ether broadcast", "icmp[0]=8"),
    ],
)
def test_common_listings_are_libpcaps(expression: str) -> None:
    ours = compile_filter(expression, order="libpcap", names="numeric").instructions
    assert [tuple(i) for i in ours] == libpcap(expression, 1, optimize=True)
