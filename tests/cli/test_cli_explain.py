"""``kbpf explain``."""

import io
import json

from kbpf.pcapfile import PcapWriter

FRAME = bytes(12) + bytes.fromhex("0800450000200000000040110000 0a000001 0a000002 14e90035000c0000") + b"abcd"


def test_the_path_of_a_packet_is_marked(cli):
    done = cli("explain", "udp dst port 53", "--packet", FRAME.hex())
    assert done.status == 0, done.err
    assert "udp destination port = 53" in done.out
    assert "* (000) ldh      [12]" in done.out
    assert done.out.endswith("accepted: 46 bytes kept\n")


def test_a_packet_of_a_capture_is_named_by_its_number(cli, tmp_path):
    with PcapWriter(tmp_path / "two.pcap") as writer:
        writer.write(bytes(60), timestamp_ns=0)
        writer.write(FRAME, timestamp_ns=1)
    assert cli("explain", "udp", "--packet", f"{tmp_path}/two.pcap:2").out.endswith("accepted: 46 bytes kept\n")
    assert cli("explain", "udp", "--packet", f"{tmp_path}/two.pcap").out.endswith("rejected\n")
    done = cli("explain", "udp", "--packet", f"{tmp_path}/two.pcap:3")
    assert done.status == 2
    assert "has no packet 3" in done.err


def test_numbers_are_explained_like_an_expression(cli, monkeypatch):
    numbers = io.BytesIO(b"4\n40 0 0 12\n21 0 1 2048\n6 0 0 96\n6 0 0 0\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(numbers))
    said = json.loads(cli("explain", "--instructions", "-", "--json").out)
    assert said["decisions"] == "(001) ether type = 0x0800 (IPv4), else reject\naccept, keep 96 bytes\n"
    assert said["instructions"][0] == {"insn": [40, 0, 0, 12], "remark": "ether type"}


def test_what_is_no_filter_ends_with_status_2(cli, tmp_path):
    (tmp_path / "nonsense").write_text("nonsense")
    assert cli("explain", "udp and").status == 2
    assert cli("explain", "--instructions", str(tmp_path / "nonsense")).status == 2
    assert cli("explain", "udp", "--packet", "abc").status == 2
