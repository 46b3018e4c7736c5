"""Expressions at random: the grammar of pcap-filter(7), most of it said rightly, and mutations of expressions."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

PROTOCOLS = [
    *(
        [
            "ip",
            "ip6",
            "arp",
            "rarp",
            "sctp",
            "tcp",
            "udp",
            "icmp",
            "icmp6",
            "igmp",
            "igrp",
            "pim",
            "vrrp",
            "carp",
            "ah",
            "esp",
        ]
    ),
    *(["atalk", "aarp", "decnet", "lat", "sca", "moprc", "mopdl", "iso", "esis", "es-is", "isis", "is-is", "clnp"]),
    *(["l1", "l2", "iih", "lsp", "snp", "csnp", "psnp", "stp", "ipx", "netbeui"]),
]
LINKS = ["link", "ether", "ppp", "slip", "fddi", "tr", "wlan"]
DIRECTIONS = ["src", "dst", "src or dst", "src and dst", "dst or src", "dst and src"]
WIRELESS = ["ra", "ta", "addr1", "addr2", "addr3", "addr4", "address1"]
TYPES = ["host", "net", "port", "portrange", "proto", "protochain", "gateway"]
OFFSETS = ["tcpflags", "icmptype", "icmpcode", "icmp6type", "icmp6code"]
WORDS = ["tcp-syn", "tcp-ack", "tcp-fin", "tcp-cwr", "icmp-echo", "icmp-unreach", "icmp6-echo", "icmp6-routeradvert"]
LLC = ["i", "s", "u", "rr", "rnr", "rej", "ui", "ua", "disc", "sabme", "test", "xid", "frmr", "dm"]
OTHERS = [
    "inbound",
    "outbound",
    "ifindex",
    "on",
    "rset",
    "reason",
    "action",
    "lane",
    "vpi",
    "oam",
    "fisu",
    "sio",
    "hopc",
    "radio",
    "len",
    "length",
]
SERVICES = r"http domain ssh ntp snmp ftp-data iso-tsap https sip tftp"
IP_NAMES = r"\tcp \udp \icmp \esp \ah ospf gre ipv6-icmp \igmp \vrrp \pim \sctp ipv6"
ETHER_NAMES = r"\ip \ip6 \arp \rarp \atalk \aarp \decnet \sca \lat \mopdl \moprc \iso \stp \ipx \netbeui"
ISO_NAMES = r"\esis \isis \clnp \tcp"
RELATIONS = ["=", "==", "!=", "<", ">", "<=", ">="]
ARITHMETIC = ["+", "-", "*", "/", "%", "&", "|", "^", "<<", ">>"]

_TOKEN = re.compile(r"\s+|[A-Za-z0-9$\\][-\w.:]*|>=|<=|!=|==|<<|>>|&&|\|\||.", re.DOTALL)
_GLUE = set("[]()<>=!&|+*/^:")


class Grammar:
    """Expressions of one seed; `wild` is how often a part is replaced by one that does not belong there."""

    def __init__(self, rng: random.Random, wild: float = 0.02) -> None:
        self.rng = rng
        self.wild = wild

    def pick(self, right: str, wrong: str) -> str:
        """One of the words of `right`, now and then of `wrong`."""
        return self.rng.choice((wrong if self.rng.random() < self.wild else right).split())

    def expression(self) -> str:
        """One expression, spaced in one of the ways that there are."""
        return self.spaced(self.chain(self.rng.choice((0, 1, 1, 2, 2, 3))))

    def spaced(self, words: Sequence[str]) -> str:
        rng = self.rng
        style = rng.random()
        text = ""
        for word in words:
            tight = style < 0.3 and text and (word[0] in _GLUE or text[-1] in _GLUE)
            if text and not tight:
                text += " " if style < 0.9 else rng.choice((" ", "  ", "\t", "\n", "\r\n", " "))
            text += word
        return text

    def mutated(self, expression: str) -> str:
        """The expression with a word or two dropped, doubled, swapped, renumbered or taken from elsewhere."""
        rng = self.rng
        words = [word for word in _TOKEN.findall(expression) if not word.isspace()]
        for _ in range(rng.choice((1, 1, 2, 3))):
            if not words:
                break
            at = rng.randrange(len(words))
            how = rng.randrange(7)
            if how == 0:
                del words[at]
            elif how == 1:
                words.insert(at, words[at])
            elif how == 2:
                other = rng.randrange(len(words))
                words[at], words[other] = words[other], words[at]
            elif how == 3:
                numbers = [i for i, word in enumerate(words) if word[0].isdigit()] or [at]
                words[rng.choice(numbers)] = self.operand()
            elif how == 4:
                words[at : at + 1] = self.primitive()
            elif how == 5:
                words.insert(at, self.word())
            else:
                words[at] = self.word()
        return self.spaced(words)

    # Chains

    def chain(self, depth: int) -> list[str]:
        rng = self.rng
        words = self.term(depth)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3)) if depth else 0):
            words += [rng.choice(("and", "or", "and", "or", "&&", "||"))]
            # An operand alone takes the qualifiers of what stood before.
            words += self.bare() if rng.random() < 0.2 else self.term(depth - 1)
        return words

    def term(self, depth: int) -> list[str]:
        rng = self.rng
        negation = [rng.choice(("not", "!"))] * rng.choice((0, 0, 0, 0, 0, 0, 1, 1, 2))
        if depth and rng.random() < 0.3:
            return [*negation, "(", *self.chain(depth - 1), ")"]
        return [*negation, *self.primitive()]

    def bare(self) -> list[str]:
        rng = self.rng
        words = [rng.choice(("not", "!"))] * (rng.random() < 0.1) + [self.operand()]
        return ["(", *words, "or", self.operand(), ")"] if rng.random() < 0.2 else words

    def primitive(self) -> list[str]:
        rng = self.rng
        if rng.random() < self.wild:
            return [self.word() for _ in range(rng.randrange(1, 4))]
        forms: list[tuple[int, Callable[[], list[str]]]] = [
            (14, self.address),
            (8, self.ports),
            (6, self.proto),
            (10, lambda: [rng.choice(PROTOCOLS)]),
            (10, self.relation),
            (8, self.tunnel),
            (4, self.special),
            (3, self.link_address),
            (1, self.anything),
        ]
        return rng.choices([form for _, form in forms], [weight for weight, _ in forms])[0]()

    def qualifiers(self, protocols: Sequence[str], types: Sequence[str]) -> list[str]:
        rng = self.rng
        words = []
        if rng.random() < 0.5:
            words.append(rng.choice(protocols if rng.random() >= self.wild else [*PROTOCOLS, *LINKS]))
        if rng.random() < 0.5:
            words += rng.choice(DIRECTIONS if rng.random() >= self.wild else WIRELESS).split()
        if not words or rng.random() < 0.7:
            words.append(rng.choice(types if rng.random() >= self.wild else TYPES))
        return words

    def operands(self, one: Callable[[], list[str]]) -> list[str]:
        """One operand, or a list of some in parentheses."""
        rng = self.rng
        if rng.random() < 0.85:
            return one()
        words = one()
        for _ in range(rng.randrange(3)):
            words += [rng.choice(("or", "or", "and")), *one()]
        return ["(", *words, ")"]

    # Primitives

    def address(self) -> list[str]:
        words = self.qualifiers(["ip", "ip", "ip6", "arp", "rarp", "decnet"], ["host", "host", "net"])
        if "decnet" in words:
            return [*(word for word in words if word != "net"), self.pick("1.1 5.7 63.1023", "64.1 1.1024 5 1.2.3")]
        six = "ip6" in words or ("ip" not in words and self.rng.random() < 0.2)
        if "net" in words:
            return words + self.operands(lambda: self.net(six))
        return words + self.operands(lambda: [self.ipv6() if six else self.host()])

    def net(self, six: bool) -> list[str]:
        rng = self.rng
        if six:
            return [
                self.pick("fe80:: :: ff02:: 2001:db8::", "fe80::1 10.0.0.0"),
                "/",
                self.pick("32 48 64 65 127 128", "0 8 129"),
            ]
        how = rng.random()
        if how < 0.1:
            return [self.pick("loopback link-local", "default nosuchnet")]
        if how < 0.4:
            return [
                self.pick("10.0.0.0 10.0 10 192.168 128.0", "1.2.3.4 fe80::1"),
                "/",
                self.pick("8 9 16 24 31 32", "0 1 33"),
            ]
        if how < 0.6:
            return [
                self.pick("10.0.0.0 10", "1.2.3.4"),
                "mask",
                self.pick("255.0.0.0 255.255 255.0.255.0", "255 0.0.0.0 1.2"),
            ]
        return [self.pick("10 10.0.0.0 192.168 192.168.1 192.168.1.0 224.0.0.0 10.0.0", "0 256 1.2.3.4.5 010.1")]

    def host(self) -> str:
        if self.rng.random() < self.wild:
            return self.operand()
        return self.pick(
            "10.0.0.1 10.0.0.2 192.168.1.5 0x0a000001 0.0.0.0 10.1 localhost 255.255.255.255", "10.0.0.256 nosuchhost"
        )

    def quad(self) -> str:
        octets = "0 1 10 127 128 192 224 255"
        return ".".join(self.pick(octets, "256 0x0a 010 1000") for _ in range(self.rng.choice((2, 3, 4, 4, 4))))

    def ipv6(self) -> str:
        return self.pick(
            "fe80::1 fe80::2 FE80::1 :: ::1 fe80:0:0:0:0:0:0:1 fe80::0:0:1 ::ffff:10.0.0.1 ::10.0.0.1 1:2:3:4:5:6:7:8 "
            "1:2:3:4:5:6:7:: ::2:3:4:5:6:7:8 1::8 ff02::1 fe80::1:2 1:2:3:4:5:6:1.2.3.4 fe80::01 2001:db8::",
            "1::1::1 1:2:3 ::12345 ::1.2.3.256 10.0.0.1 fe80::1%lo 1:2:3:4:5:6:7:8:9",
        )

    def mac(self) -> str:
        return self.pick(
            "1:2:0:ff:1:2 01:02:00:FF:01:02 1-2-0-ff-1-2 0102.00ff.0102 010200ff0102 1.2.0.ff.1.2 "
            "ff:ff:ff:ff:ff:ff 2:2:2:2:2:2 00:00:00:00:00:00 aa0004001d04",
            "$5 $ff 1:2:3:4:5 1:2:3:4:5:6:7 aa00040001d04 0:1:2:3:4:555",
        )

    def link_address(self) -> list[str]:
        words = [self.pick("ether ether link", "ppp slip fddi tr wlan ip")]
        words += self.rng.choice(("host", "src", "dst", "src host", "dst host", "src or dst")).split()
        return words + self.operands(lambda: [self.mac()])

    def ports(self) -> list[str]:
        words = self.qualifiers(["tcp", "udp", "sctp"], ["port", "port", "portrange"])
        if words[-1] not in ("port", "portrange"):
            words.append("port")
        return words + self.operands(lambda: [self.port() if words[-1] == "port" else self.port_range()])

    def port(self) -> str:
        return self.pick(
            "80 53 22 443 7070 1024 0 65535 0x50 0120 domain", "65536 -1 http snmp ftp-data nosuchservice \\80"
        )

    def port_range(self) -> str:
        return self.pick(
            "53-80 80-53 0-65535 1024-7070 7070-7070 1-1 0-0 65535-0 443 domain-http 22-http",
            "1-65536 ftp-data-80 ftp-data-ssh 80- -80 ssh",
        )

    def proto(self) -> list[str]:
        protocol = self.pick("any any ip ip6 ether link iso isis", "tcp arp decnet stp")
        names, numbers = IP_NAMES, "6 17 1 0 44 58 255 0x11"
        if protocol in ("ether", "link"):
            names, numbers = ETHER_NAMES, "0x800 0x86dd 0x42 1500 1501 65535 0"
        elif protocol in ("iso", "isis"):
            names, numbers = (ISO_NAMES, "0x83 255") if protocol == "iso" else ("26 24", "18 17 31 0")
        kind = self.pick("proto proto proto protochain", "host port") if numbers.startswith("6") else "proto"
        words = [kind] if protocol == "any" else [protocol, kind]
        return words + self.operands(
            lambda: [self.pick(names if self.rng.random() < 0.5 else numbers, "256 65536 nosuch tcp")]
        )

    def tunnel(self) -> list[str]:
        rng = self.rng
        name = rng.choice(("vlan", "vlan", "mpls", "pppoes", "pppoed", "geneve", "vxlan"))
        if name == "pppoed" or rng.random() < 0.5:
            return [name]
        number = self.pick("0 1 5 7 100 4095 0x64", "4096 65535 65536 1048575 1048576 16777215 16777216 x")
        return [name, "(", number, ")"] if rng.random() < 0.1 else [name, number]

    def special(self) -> list[str]:
        rng = self.rng
        form = rng.choices(range(8), (4, 4, 4, 4, self.wild, self.wild, self.wild, self.wild))[0]
        if form == 0:
            return [rng.choice(("less", "greater")), self.pick("0 40 60 64 1500 4294967295", "4294967296 x")]
        if form == 1:
            operator = rng.choice(("=", "<", ">", "&", "|"))
            return ["byte", self.pick("0 9 12 14 40 4000", "x"), operator, self.pick("0 1 8 255", "256")]
        if form == 2:
            what = rng.choice(
                ("broadcast", "multicast", "ether broadcast", "ether multicast", "ip multicast", "ip6 multicast")
            )
            return what.split() if rng.random() >= self.wild else ["arp", "broadcast"]
        if form == 3:
            return ["llc", *([rng.choice(LLC)] if rng.random() < 0.8 else [])]
        if form == 4:
            return [rng.choice(("inbound", "outbound"))]
        if form == 5:
            return ["ifindex", rng.choice(("0", "1", "3", "65536"))]
        if form == 6:
            kind = rng.choice(("mgt", "ctl", "data", "0", "16", "nosuch"))
            return ["type", kind, *rng.choice(([], ["subtype", rng.choice(("beacon", "ack", "qos-data", "5", "16"))]))]
        return rng.choice((["dir", "nods"], ["dir", "fromds"], ["subtype", "beacon"], ["gateway", "localhost"]))

    def relation(self) -> list[str]:
        depth = self.rng.choice((0, 1, 1, 2, 3))
        left = self.arithmetic(depth)
        return [*left, self.rng.choice(RELATIONS), *self.arithmetic(self.rng.choice((0, 0, 0, 1, 2)))]

    def arithmetic(self, depth: int) -> list[str]:
        rng = self.rng
        how = rng.random()
        if depth == 0:
            return [self.number()] if how < 0.6 else self.accessor(["0"]) if how < 0.9 else ["len"]
        if how < 0.45:
            size = rng.choice(([], [], [":", "1"], [":", "2"], [":", "4"], [":", self.pick("1", "3")]))
            offset = self.arithmetic(depth - 1) if rng.random() < 0.4 else [rng.choice(OFFSETS + [self.small()] * 6)]
            return self.accessor(offset, size)
        if how < 0.85:
            return [*self.arithmetic(depth - 1), rng.choice(ARITHMETIC), *self.arithmetic(depth - 1)]
        if how < 0.9:
            return ["-", *self.arithmetic(depth - 1)]
        return ["(", *self.arithmetic(depth - 1), ")"]

    def accessor(self, offset: list[str], size: Sequence[str] = ()) -> list[str]:
        protocol = self.pick(
            "ip ip ip tcp tcp udp ether ip6 icmp icmp6 link arp rarp sctp igmp pim decnet atalk",
            "ah esp iso stp l1 radio aarp netbeui wlan",
        )
        return [protocol, "[", *offset, *size, "]"]

    def small(self) -> str:
        return self.rng.choice(["0", "1", "2", "6", "8", "9", "12", "13", "14", "16", "20", "0x10", "013", "40", "100"])

    def number(self) -> str:
        rng = self.rng
        if rng.random() < 0.15:
            return rng.choice(WORDS)
        if rng.random() < 0.7:
            return self.small()
        return self.pick("255 256 65535 65536 0xffffffff 2147483648 037777777777 0X1F 31", "4294967296 08 32")

    def anything(self) -> list[str]:
        """Qualifiers and an operand that need not go together."""
        rng = self.rng
        words = []
        if rng.random() < 0.8:
            words.append(rng.choice([*PROTOCOLS, *LINKS]))
        if rng.random() < 0.6:
            words += rng.choice([*DIRECTIONS, *WIRELESS]).split()
        if rng.random() < 0.8:
            words.append(rng.choice(TYPES))
        return [*words, self.operand()]

    def operand(self) -> str:
        rng = self.rng
        return rng.choice(
            (self.host, self.port, self.port_range, self.mac, self.ipv6, self.number, self.quad, self.name)
        )()

    def name(self) -> str:
        names = f"{SERVICES} {IP_NAMES} {ETHER_NAMES} {ISO_NAMES} localhost loopback \\host beacon"
        return self.rng.choice(names.split())

    def word(self) -> str:
        """Any word of the language."""
        rng = self.rng
        symbols = ["(", ")", "[", "]", ":", "and", "or", "not", "/", "-", "mask", "type", "subtype", "byte", "dir"]
        pools = (PROTOCOLS, LINKS, TYPES, ["src", "dst"], RELATIONS, ARITHMETIC, symbols, OTHERS, LLC, WIRELESS, WORDS)
        return self.operand() if rng.random() < 0.2 else rng.choice(rng.choice(pools))
