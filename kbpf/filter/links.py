"""Where headers are, and how each link layer says what is inside.

A `Headers` is the state of reading an expression from left to right: ``vlan``, ``mpls``, ``pppoes``, ``geneve`` and
``vxlan`` move everything that is named after them.
"""

from __future__ import annotations

from typing import NamedTuple

from kbpf.errors import FilterError
from kbpf.filter.values import M32, Condition, Pool, Value, every, negated, some
from kbpf.isa.cbpf import AD_OFF, LL_OFF, NET_OFF
from kbpf.specs import Layout

IP, ARP, RARP, IP6, VLAN, PPPOED, PPPOES, MPLS, DECNET = (
    0x0800,
    0x0806,
    0x8035,
    0x86DD,
    0x8100,
    0x8863,
    0x8864,
    0x8847,
    0x6003,
)
VLAN_TYPES = (0x8100, 0x88A8, 0x9100)
ATALK, AARP, IPX_TYPE, TRANSPARENT_ETHERNET = 0x809B, 0x80F3, 0x8137, 0x6558
SAP_ISO, SAP_IP, SAP_NETBEUI, SAP_IPX, SAP_STP = 0xFE, 0x06, 0xF0, 0xE0, 0x42
#: Type field values up to here are 802.3 lengths.
LENGTHS = 1500
# LINUX_SLL_P_802_3 and _802_2; the same numbers stand in skb->protocol.
_P_802_3, _P_802_2 = 1, 4
# ARPHRD_ETHER and ARPHRD_LOOPBACK: devices with Ethernet headers.
_ETHERNET_HARDWARE = (1, 772)
# PPP's protocol numbers for EtherTypes and SAPs.
_PPP = {
    IP: 0x21,
    IP6: 0x57,
    DECNET: 0x27,
    ATALK: 0x29,
    0x0600: 0x25,
    SAP_ISO: 0x23,
    SAP_STP: 0x31,
    SAP_IPX: 0x2B,
    MPLS: 0x281,
}

_NAMES = {
    0: "NULL",
    1: "EN10MB",
    12: "RAW",
    105: "IEEE802_11",
    113: "LINUX_SLL",
    127: "IEEE802_11_RADIO",
    276: "LINUX_SLL2",
}


class At(NamedTuple):
    """An offset: a constant and perhaps a variable part."""

    k: int
    base: Value | None = None


class Headers:
    """Where the headers are that the next primitive is about."""

    def __init__(self, pool: Pool, layout: Layout) -> None:
        self.pool = pool
        self.layout = layout
        #: NULL, EN10MB, RAW, LINUX_SLL, LINUX_SLL2, IEEE802_11(_RADIO), PPP; METADATA where only skb->protocol says it.
        self.link = _NAMES.get(layout.dlt, "") if layout.dlt is not None else ""
        self.header = At(0)
        self.type = At(0)
        self.payload = At(0)
        #: From the payload to the network header, which MPLS labels precede.
        self.network = 0
        self.network_after_llc = 0
        self.labels = 0
        self.vlans = 0
        self.tunnel = ""
        #: The EtherType in the tunnel's own header, which may be Ethernet's.
        self.tunnel_type: Value | None = None
        if layout.live and layout.start != "link":
            self._socket()
        elif not self.link:
            self._any_device()
        else:
            self._link()

    def _link(self) -> None:
        if self.link == "EN10MB":
            self.type, self.payload, self.network_after_llc = At(12), At(14), 3
        elif self.link == "NULL":
            self.payload = At(4)
        elif self.link == "LINUX_SLL":
            self.type, self.payload = At(14), At(16)
        elif self.link == "LINUX_SLL2":
            self.payload = At(20)
        elif self.link in ("IEEE802_11", "IEEE802_11_RADIO"):
            self._wireless()

    def _wireless(self) -> None:
        pool = self.pool
        start: Value | None = None
        if self.link == "IEEE802_11_RADIO":
            # The length of the radiotap header is little-endian.
            high = pool.op("lsh", pool.load(None, 3, 1), pool.const(8))
            start = pool.op("or", high, pool.load(None, 2, 1))
        self.header = At(0, start)
        # 24 bytes, and 2 more in QoS data frames.
        control = pool.op("and", pool.load(start, 0, 1), pool.const(0x8C))
        length = pool.op("lsh", self._is_zero(pool.op("xor", control, pool.const(0x88))), pool.const(1))
        self.payload = At(24, length if start is None else pool.op("add", length, start))
        self.network, self.network_after_llc = 8, 3

    def _is_zero(self, value: Value) -> Value:
        """1 if a value below 2^31 is 0, else 0."""
        pool = self.pool
        return pool.op("rsh", pool.op("sub", value, pool.const(1)), pool.const(31))

    def _any_device(self) -> None:
        self.link = "METADATA"
        self.payload = At(NET_OFF)

    def _socket(self) -> None:
        layout = self.layout
        if layout.start == "network":
            # A cooked packet socket gets everything; the others only IP.
            self.link = "METADATA" if layout.link_header and layout.ip_version is None else "RAW"
        else:
            self.link = "RAW"
            self.payload = At(NET_OFF)
        self.header = At(LL_OFF)

    # Loads

    def load(self, at: At, offset: int, size: int) -> Value:
        return self.pool.load(at.base, at.k + offset & M32, size)

    def network_word(self, offset: int, size: int) -> Value:
        return self.load(self.payload, self.network + offset, size)

    def network_test(self, offset: int, size: int, k: int, mask: int = M32) -> Condition:
        return self.pool.test("eq", self.network_word(offset, size), k, mask)

    def link_test(self, offset: int, size: int, k: int, mask: int = M32) -> Condition:
        return self.pool.test("eq", self.load(self.header, offset, size), k, mask)

    def bytes_test(self, at: At, offset: int, data: bytes) -> Condition:
        """Bytes equal, compared from the last word to the first, as libpcap does."""
        parts: list[Condition] = []
        size = len(data)
        for width in (4, 2, 1):
            while size >= width:
                size -= width
                word = int.from_bytes(data[size : size + width], "big")
                parts.append(self.pool.test("eq", self.load(at, offset + size, width), word))
        return every(*parts)

    def transport(self, version: int) -> At:
        """The transport header."""
        if self.layout.live and self.layout.start == "transport" and not self.tunnel:
            return At(0)
        if version == 6:
            return At(self.payload.k + self.network + 40, self.payload.base)
        return At(self.payload.k + self.network, self._ip_header_length())

    def _ip_header_length(self) -> Value:
        pool = self.pool
        length = pool.op("and", self.load(self.payload, self.network, 1), pool.const(0xF))
        length = pool.op("lsh", length, pool.const(2))
        return length if self.payload.base is None else pool.op("add", length, self.payload.base)

    # What a packet is

    def require(self, what: str, *links: str) -> None:
        if self.link not in links:
            raise FilterError(f"{what} cannot be answered on {self.describe()}")

    def describe(self) -> str:
        if self.layout.live:
            return f"a {self.layout.name} socket"
        return f"{self.link} captures"

    def ethernet(self, what: str) -> Condition:
        """What must hold for the link header to be Ethernet's; refuses where it cannot be."""
        if self.link == "EN10MB":
            if self.tunnel_type is not None:
                # The tunnel may hold a network packet without a link header.
                return self._tunnels_ethernet()
            return True
        if self.layout.live and self.layout.link_header and not self.labels and not self.tunnel and self.link != "PPP":
            hardware = self.pool.load(None, AD_OFF + 28, 4)
            return some(*(self.pool.test("eq", hardware, kind) for kind in _ETHERNET_HARDWARE))
        raise FilterError(f"{what} cannot be answered on {self.describe()}")

    def carries(self, protocol: int) -> Condition:
        """The link layer says that `protocol` (an EtherType, or an 802.2 SAP up to 1500) is inside."""
        if self.labels:
            return self._labelled(protocol)
        if self.link == "EN10MB":
            return self._ethernet(protocol)
        if self.link == "LINUX_SLL2":
            return self._type(protocol)
        if self.link in ("LINUX_SLL", "METADATA"):
            return self._cooked(protocol)
        if self.link == "NULL":
            # Address families in the byte order of the host that captured; this one's is assumed.
            family = {IP: 2, IP6: 10}.get(protocol)
            return family is not None and self.link_test(0, 4, family << 24)
        if self.link == "PPP":
            return self.pool.test("eq", self.load(self.type, 0, 2), _PPP.get(protocol, protocol))
        if self.link == "RAW":
            return self._version(protocol)
        return every(self.wireless_data(), self._llc(protocol))

    def _version(self, protocol: int) -> Condition:
        version = {IP: 4, IP6: 6}.get(protocol)
        if version is None:
            return False
        if self.layout.ip_version is not None:
            return version == self.layout.ip_version
        return self.pool.test("eq", self.load(self.payload, 0, 1), version << 4, 0xF0)

    def _labelled(self, protocol: int) -> Condition:
        version = {IP: 0x40, IP6: 0x60}.get(protocol)
        if version is None:
            raise FilterError("only IPv4 and IPv6 can be looked for behind MPLS labels")
        return every(self.network_test(-2, 1, 1, 1), self.network_test(0, 1, version, 0xF0))

    def _type(self, k: int) -> Condition:
        inner = self.pool.test("eq", self.type_word(), k)
        if self.tunnel_type is None:
            return inner
        inner = every(self._tunnels_ethernet(), inner)
        if self.vlans or k == TRANSPARENT_ETHERNET:
            return inner
        return some(inner, self.pool.test("eq", self.tunnel_type, k))

    def _tunnels_ethernet(self) -> Condition:
        assert self.tunnel_type is not None
        return self.pool.test("eq", self.tunnel_type, TRANSPARENT_ETHERNET)

    def type_word(self) -> Value:
        """The EtherType, or what stands for it."""
        if self.link == "METADATA":
            return self.pool.load(None, AD_OFF, 4)
        return self.load(self.type, 0, 2)

    def is_802_3(self) -> Condition:
        length = negated(self.pool.test("gt", self.type_word(), LENGTHS))
        return length if self.tunnel_type is None else every(self._tunnels_ethernet(), length)

    def llc_word(self, offset: int, size: int) -> Value:
        return self.load(self.payload, offset, size)

    def _snap(self, organisation: int, protocol: int) -> Condition:
        header = b"\xaa\xaa\x03" + organisation.to_bytes(3, "big") + protocol.to_bytes(2, "big")
        return self.bytes_test(self.payload, 0, header)

    def _ethernet(self, protocol: int) -> Condition:
        pool = self.pool
        if protocol in (SAP_ISO, SAP_IP, SAP_NETBEUI):
            return every(self.is_802_3(), pool.test("eq", self.llc_word(0, 2), protocol << 8 | protocol))
        if protocol == SAP_IPX:
            return some(
                self._type(IPX_TYPE),
                every(
                    self.is_802_3(),
                    some(
                        self._snap(0, IPX_TYPE),
                        pool.test("eq", self.llc_word(0, 1), SAP_IPX),
                        pool.test("eq", self.llc_word(0, 2), 0xFFFF),
                    ),
                ),
            )
        if protocol in (ATALK, AARP):
            snap = self._snap(0x080007 if protocol == ATALK else 0, protocol)
            return some(self._type(protocol), every(self.is_802_3(), snap))
        if protocol <= LENGTHS:
            return every(self.is_802_3(), pool.test("eq", self.load(self.type, 2, 1), protocol))
        return self._type(protocol)

    def _cooked(self, protocol: int) -> Condition:
        pool = self.pool
        if protocol in (SAP_ISO, SAP_IP, SAP_NETBEUI):
            return every(self._type(_P_802_2), pool.test("eq", self.llc_word(0, 2), protocol << 8 | protocol))
        if protocol == SAP_IPX:
            return some(
                self._type(IPX_TYPE),
                self._type(_P_802_3),
                every(
                    self._type(_P_802_2),
                    some(pool.test("eq", self.llc_word(0, 1), SAP_IPX), self._snap(0, IPX_TYPE)),
                ),
            )
        if protocol in (ATALK, AARP):
            snap = self._snap(0x080007 if protocol == ATALK else 0, protocol)
            return some(self._type(protocol), every(self._type(_P_802_2), snap))
        if protocol <= LENGTHS:
            return every(self._type(_P_802_2), pool.test("eq", self.llc_word(0, 1), protocol))
        return self._type(protocol)

    def _llc(self, protocol: int) -> Condition:
        pool = self.pool
        if protocol in (SAP_ISO, SAP_IP, SAP_NETBEUI):
            return pool.test("eq", self.llc_word(0, 2), protocol << 8 | protocol)
        if protocol == ATALK:
            return self._snap(0x080007, ATALK)
        if protocol <= LENGTHS:
            return pool.test("eq", self.llc_word(0, 1), protocol)
        return pool.test("eq", self.llc_word(6, 2), protocol)

    def wireless_data(self) -> Condition:
        """An 802.11 data frame."""
        return every(self.link_test(0, 1, 0, 4), negated(self.link_test(0, 1, 0, 8)))

    # What moves the headers

    def into_vlan(self) -> None:
        self.type = self.type._replace(k=self.type.k + 4)
        self.payload = self.payload._replace(k=self.payload.k + 4)
        self.vlans += 1

    def into_maybe_vlan(self, in_band: Value) -> None:
        """`in_band` is 0 or 4, as the tag is in the metadata or in the bytes."""
        self.type = At(self.type.k, in_band)
        self.payload = At(self.payload.k, in_band)
        self.vlans += 1

    def into_mpls(self) -> None:
        self.network += 4
        self.network_after_llc += 4
        self.labels += 1

    def into_pppoe(self) -> None:
        self.link = "PPP"
        at = At(self.payload.k + self.network + 6, self.payload.base)
        self.header = self.type = at
        self.payload = at._replace(k=at.k + 2)
        self.network = self.network_after_llc = 0

    def into_tunnel(self, name: str, start: Value, length: Value | int, type_offset: int | None) -> None:
        """Behind a UDP tunnel's header of `length` bytes at `start`.

        The EtherType of what is inside is at `type_offset`; None: it is always Ethernet.
        """
        pool = self.pool
        size = pool.const(length) if isinstance(length, int) else length
        inner = pool.op("add", start, size)
        self.link, self.tunnel, self.vlans = "EN10MB", name, 0
        self.network, self.network_after_llc, self.labels = 0, 3, 0
        self.header = At(0, inner)
        if type_offset is None:
            self.type, self.payload, self.tunnel_type = At(12, inner), At(14, inner), None
            return
        kind = pool.load(start, type_offset, 2)
        ethernet = self._is_zero(pool.op("xor", kind, pool.const(TRANSPARENT_ETHERNET)))
        payload = pool.op("add", inner, pool.op("mul", ethernet, pool.const(14)))
        self.payload = At(0, payload)
        self.type, self.tunnel_type = At(12, inner), kind
