"""Filters as a user holds them."""

import pytest

import kbpf
from kbpf.specs import SOCKET_LAYOUTS

IPV4_UDP = bytes.fromhex("450000200000000040110000 0a000001 0a000002 14e90035000c0000") + b"abcd"
FRAME = bytes(12) + b"\x08\0" + IPV4_UDP


def test_a_filter_keeps_the_smaller_of_its_value_and_the_length():
    assert kbpf.compile("udp").run(FRAME) == len(FRAME)
    assert kbpf.compile("udp", snaplen=20).run(FRAME) == 20
    assert kbpf.compile("udp").run(FRAME, wirelen=1000) == 1000
    assert kbpf.compile("tcp").run(FRAME) == 0


def test_len_is_the_length_on_the_wire():
    assert kbpf.compile("len == 1000").run(FRAME, wirelen=1000) == 1000
    assert kbpf.compile("len == 1000").run(FRAME) == 0


@pytest.mark.requires("llvmlite")
@pytest.mark.parametrize("layout", ("packet", None))
def test_the_interpreter_runs_what_is_asked_of_it(layout, monkeypatch):
    from kbpf.emulator import engines
    from kbpf.filter import compile_filter

    asked = []
    monkeypatch.setattr(engines, "native_of", lambda code: asked.append(code))
    monkeypatch.setattr(engines, "WORTH", 100)
    spec = kbpf.compile("udp").spec if layout is None else compile_filter("udp", SOCKET_LAYOUTS[layout])
    compiled = kbpf.Filter.from_spec(spec)
    assert {compiled.run(FRAME, engine="interpreter") for _ in range(100)} == {len(FRAME)}
    assert asked == []


@pytest.mark.parametrize(
    ("name", "packet", "kept"),
    [
        ("udp", IPV4_UDP, 12),
        ("raw4", IPV4_UDP, 32),
        ("packet", FRAME, 46),
        ("packet_ethernet", FRAME, 46),
        ("packet_dgram", IPV4_UDP, 32),
    ],
)
def test_a_socket_filter_runs_over_what_its_socket_would_see(name, packet, kept):
    from kbpf.filter import compile_filter

    for expression, matches in [
        ("udp dst port 53", True),
        ("udp dst port 54", False),
        ("ip host 10.0.0.1", True),
        ("ip6", False),
    ]:
        filter = kbpf.Filter.from_spec(compile_filter(expression, SOCKET_LAYOUTS[name]))
        assert filter.run(packet) == (kept if matches else 0), expression


def test_the_path_is_the_instructions_that_ran():
    filter = kbpf.compile("udp dst port 53", order="libpcap")
    path = filter.path(FRAME)
    assert path.kept == len(FRAME)
    assert path.instructions[0] == 0
    assert filter.instructions[path.instructions[-1]].k == 262144
    assert list(path.instructions) == sorted(path.instructions)


def test_filters_are_values():
    filter = kbpf.compile("udp")
    assert filter == kbpf.compile("udp")
    assert hash(filter) == hash(kbpf.compile("udp"))
    assert filter != kbpf.compile("tcp")
    assert filter != kbpf.Filter(filter.instructions, link="RAW")
    assert len(filter) == len(list(filter))
    assert str(filter).startswith("(000) ldh      [12]\n")


def test_the_kernels_check_names_the_instruction():
    with pytest.raises(kbpf.FilterError, match="instruction 1: the last instruction must return"):
        kbpf.Filter([(0x28, 0, 0, 12), (0x04, 0, 0, 0)]).check()


def test_an_invalid_filter_does_not_run():
    with pytest.raises(kbpf.FilterError):
        kbpf.Filter([(0xFF, 0, 0, 0)]).run(FRAME)


def test_an_unknown_link_type_is_an_error_that_lists_the_known():
    with pytest.raises(kbpf.FilterError, match="EN10MB"):
        kbpf.compile("udp", link="NOPE")
