"""A filter explained in words, from its instructions alone."""

import random

import pytest

import kbpf
from kbpf.filter.explain import explain
from kbpf.isa.cbpf import Instruction
from kbpf.specs import FILE_LAYOUTS, SOCKET_LAYOUTS
from kbpf.testing.generate_classic import generate


def decisions(expression, link="EN10MB"):
    return kbpf.compile(expression, link=link).explain().decisions()


def test_tests_are_named_by_the_header_they_read():
    assert decisions("tcp and dst port 7070") == (
        "(001) ether type = 0x0800 (IPv4)?\n"
        "  yes:\n"
        "    (003) ip protocol = 6 (TCP), else reject\n"
        "    (005) no later fragment, else reject\n"
        "    (008) tcp destination port = 7070, else reject\n"
        "    accept, keep 262144 bytes\n"
        "  no:\n"
        "    (009) ether type = 0x86dd (IPv6), else reject\n"
        "    (011) ip6 next header = 6 (TCP), else reject\n"
        "    (013) tcp destination port = 7070, else reject\n"
        "    accept, keep 262144 bytes\n"
    )


def test_addresses_are_written_as_addresses():
    assert "ip source address = 10.1.2.3" in decisions("ip src host 10.1.2.3")


def test_behind_a_vlan_tag_the_headers_keep_their_names():
    said = decisions("vlan 5 and ip and udp")
    assert "vlan id = 5" in said
    assert "ip protocol = 17 (UDP)" in said


def test_flags_are_written_by_name():
    assert "tcp flags has any of SYN, ACK" in decisions("ip and tcp[13] & 18 != 0")


@pytest.mark.parametrize("layout", [SOCKET_LAYOUTS[name] for name in ("packet", "packet_dgram", "udp", "raw4")])
def test_on_sockets_the_same_fields_have_the_same_names(layout):
    from kbpf.filter import compile_filter

    spec = compile_filter("udp dst port 53", layout)
    assert "udp destination port = 53" in explain(spec.instructions, layout).decisions()


def test_an_offset_with_two_meanings_is_named_by_its_number():
    filter = kbpf.Filter([(0x30, 0, 0, 23), (0x15, 0, 1, 6), (6, 0, 0, 1), (6, 0, 0, 0)])
    assert (
        filter.explain().decisions() == "(001) byte at 9 of the network header = 6, else reject\naccept, keep 1 bytes\n"
    )


def test_what_nothing_reaches_has_no_remark():
    filter = kbpf.Filter([(5, 0, 0, 1), (0, 0, 0, 7), (6, 0, 0, 0)])
    assert filter.explain().remarks == ["go on at (002)", "", "reject"]


def test_an_invalid_filter_is_refused():
    with pytest.raises(kbpf.FilterError, match="last instruction must return"):
        explain([Instruction(0, 0, 0, 0)], FILE_LAYOUTS["EN10MB"])


def test_every_accepted_filter_is_explained_whatever_it_does():
    rng = random.Random(7)
    for _ in range(300):
        filter = kbpf.Filter(generate(rng))
        explained = filter.explain()
        assert len(explained.remarks) == len(filter)
        assert explained.decisions()
