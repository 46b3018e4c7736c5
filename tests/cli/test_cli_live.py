"""The subcommands that meet a backend: count, load, map and doctor."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kbpf
from kbpf.pcapfile import PcapWriter

OBJECT = Path(kbpf.__file__).with_name("objects") / "sockex1.bpf.o"


def udp_frame(port: int, payload: bytes) -> bytes:
    udp = struct.pack("!HHHH", 4000, port, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, b"\x7f\0\0\1", b"\x7f\0\0\1")
    return bytes(12) + b"\x08\x00" + head + udp


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Three datagrams to port 53 and two to port 7070, of 100 bytes each."""
    path = tmp_path / "capture.pcap"
    with PcapWriter(path) as writer:
        for port in (53, 7070, 53, 7070, 53):
            writer.write(udp_frame(port, bytes(100)), timestamp_ns=0)
    return path


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, capture: Path) -> Iterator[None]:
    """The emulator, with the capture on every interface."""
    from kbpf import emulator

    emulator.reset()
    monkeypatch.setenv("KBPF_BACKEND", "emulator")
    monkeypatch.setenv("KBPF_EMULATED_CAPTURE", str(capture))
    yield
    emulator.reset()


DNS_AND_MINE = {"dns": {"packets": 3, "bytes": 426}, "mine": {"packets": 2, "bytes": 284}}


def test_count_reads_a_capture(cli, capture: Path) -> None:
    done = cli("count", "--read", str(capture), "--json", "dns=udp port 53", "mine=udp port 7070")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == {"elapsed": 0.0, "final": True, "backend": "emulator", "counts": DNS_AND_MINE}


def test_count_prints_a_table(cli, capture: Path) -> None:
    assert cli("count", "--read", str(capture), "dns=udp port 53", "none=tcp").out.splitlines() == [
        "name  packets  bytes",
        "dns         3    426",
        "none        0      0",
    ]


def test_count_counts_what_came_before_the_damage(cli, capture: Path) -> None:
    capture.write_bytes(capture.read_bytes()[:-10])
    done = cli("count", "--read", str(capture), "--json", "dns=udp port 53")
    assert done.status == 1
    assert json.loads(done.out)["counts"] == {"dns": {"packets": 2, "bytes": 284}}
    assert "at byte" in done.err


def test_count_runs_in_the_emulator_over_a_capture(cli, emulated) -> None:
    done = cli("count", "lo", "--count", "1", "--interval", "0.05", "--json", "dns=udp port 53", "mine=udp port 7070")
    assert done.status == 0, done.err
    final = json.loads(done.out.splitlines()[-1])
    assert final["backend"] == "emulator"
    assert final["counts"] == DNS_AND_MINE


def test_totals_are_rated_over_the_time_to_the_interruption(cli, emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[float]:
        yield 0.001
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr("kbpf.cli.count.watch", interrupted)
    final = json.loads(cli("count", "lo", "--json", "dns=udp port 53").out.splitlines()[-1])
    assert final["elapsed"] >= 0.05


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_count_on_the_kernel_prints_totals_when_interrupted(number: signal.Signals) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        port = receiver.getsockname()[1]
        # Where the tests run in the background of a shell, SIGINT is ignored, and so by their children.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "from kbpf.cli.main import main; main()"
        command = [sys.executable, "-u", "-c", code, "count", "lo", "--interval", "0.05", "--json"]
        process = subprocess.Popen([*command, f"mine=udp dst port {port}"], stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout is not None
            process.stdout.readline()  # It counts.
            for _ in range(5):
                sender.sendto(b"x" * 100, ("127.0.0.1", port))
            process.send_signal(number)
            *_, last = process.stdout.read().splitlines()
    assert process.returncode == 0
    final = json.loads(last)
    assert final["final"]
    assert final["backend"] == "kernel"
    assert final["counts"] == {"mine": {"packets": 5, "bytes": 5 * 142}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lo"], "NAME=EXPR"),
        (["lo", "udp port 53"], "NAME=EXPR"),
        (["dns=udp"], "interface"),
        (["lo", "a=udp", "a=tcp"], "Two expressions"),
    ],
)
def test_count_says_what_is_wrong_with_its_arguments(cli, arguments: list[str], said: str) -> None:
    done = cli("count", *arguments)
    assert done.status == 2
    assert said in done.err


def test_count_says_where_an_expression_is_wrong(cli, capture: Path) -> None:
    done = cli("count", "--read", str(capture), "dns=udp prot 53")
    assert done.status == 2
    assert "^" in done.err


def test_an_unknown_interface_is_said_in_a_line(cli) -> None:
    done = cli("count", "nosuchif0", "all=ip")
    assert done.status == 1
    assert done.err.startswith("kbpf: open a packet socket on nosuchif0: ")


@pytest.mark.requires("unprivileged")
def test_count_without_privilege_says_what_is_lacking(unprivileged) -> None:
    done = unprivileged.run("from kbpf.cli.main import main; main()", "count", "lo", "all=ip")
    assert done.returncode == 1
    assert "CAP_NET_RAW" in done.stderr
    assert "Traceback" not in done.stderr


def test_load_shows_the_maps_of_an_object(cli, emulated) -> None:
    done = cli("load", str(OBJECT), "--attach", "lo", "--duration", "0.05", "--json")
    assert done.status == 0, done.err
    final = json.loads(done.out.splitlines()[-1])
    assert {"key": 17, "value": 5 * 128} in final["maps"]["bytes"]


def test_load_shows_tables_without_the_zeros_of_arrays(cli, emulated) -> None:
    done = cli("load", str(OBJECT), "--attach", "lo", "--duration", "0.05")
    assert done.out.splitlines() == ["bytes (array)", "key  value", "17     640"]


@pytest.mark.requires("kernel")
def test_load_attaches_to_the_kernel(cli) -> None:
    done = cli("load", str(OBJECT), "--attach", "lo", "--duration", "0.05", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["backend"] == "kernel"


def test_load_refuses_what_is_no_object(cli, tmp_path: Path) -> None:
    file = tmp_path / "text.o"
    file.write_text("not an object")
    done = cli("load", str(file), "--attach", "lo")
    assert done.status == 1
    assert done.err.startswith("kbpf: ")


@pytest.mark.requires("kernel")
def test_map_dump_shows_a_map_by_id(cli) -> None:
    with kbpf.Map.create(
        kbpf.MapSpec(type="hash", key_size=4, value_size=8, max_entries=4, name="numbers"), backend="kernel"
    ) as map:
        map[b"\1\2\3\4"] = bytes(7) + b"\xff"
        assert json.loads(cli("map", "dump", "id", str(map.id), "--json").out) == [
            {"key": ["0x01", "0x02", "0x03", "0x04"], "value": [*["0x00"] * 7, "0xff"]}
        ]
        assert cli("map", "dump", "id", str(map.id)).out.splitlines() == [
            "numbers (hash)",
            "key                  value",
            "01020304  00000000000000ff",
        ]


@pytest.mark.requires("kernel")
def test_map_dump_shows_a_pinned_map(cli) -> None:
    path = Path(f"/sys/fs/bpf/kbpf-test-{os.getpid()}")
    if not os.path.ismount("/sys/fs/bpf"):
        pytest.skip("no BPF file system is mounted on /sys/fs/bpf")
    with kbpf.Map.create(
        kbpf.MapSpec(type="array", key_size=4, value_size=4, max_entries=1, name="one"), backend="kernel"
    ) as map:
        map.pin(str(path))
        try:
            assert json.loads(cli("map", "dump", str(path), "--json").out)[0]["value"] == ["0x00"] * 4
        finally:
            path.unlink()


def test_map_dump_of_nothing_is_said_in_a_line(cli) -> None:
    done = cli("map", "dump", "/nonexistent")
    assert done.status == 1
    assert done.err.startswith("kbpf: open map '/nonexistent'")


def test_doctor_reports_as_json_and_as_text(cli) -> None:
    report = json.loads(cli("doctor", "--json").out)
    assert {"name", "state", "detail", "remedy"} == set(report[0])
    text = cli("doctor").out
    assert all(finding["name"] in text for finding in report)


@pytest.mark.requires("unprivileged")
def test_doctor_names_the_remedy_to_an_unprivileged_user(unprivileged) -> None:
    done = unprivileged.run("from kbpf.cli.main import main; main()", "doctor", "--json")
    report = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert report["packet sockets"]["state"] == "missing"
    assert "CAP_NET_RAW" in report["packet sockets"]["detail"] + report["packet sockets"]["remedy"]
    assert report["classic filter on a UDP socket"]["state"] == "ok"


def test_an_unknown_backend_is_wrong_usage(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBPF_BACKEND", "emulated")
    done = cli("doctor")
    assert (done.status, done.out) == (2, "")
    assert "KBPF_BACKEND: 'emulated' is none of auto, kernel, emulator" in done.err


@pytest.mark.requires("unprivileged", "kernel")
def test_map_dump_of_one_who_may_not_looks_at_the_kernel(unprivileged) -> None:
    done = unprivileged.run(
        "from kbpf.cli.main import main; import sys; sys.argv[1:] = ['map', 'dump', 'id', '1']; main()"
    )
    assert done.returncode == 1
    assert "EPERM" in done.stderr
    assert "CAP_SYS_ADMIN" in done.stderr


def test_a_capture_that_is_not_there_is_named(cli, emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KBPF_EMULATED_CAPTURE", str(tmp_path / "missing.pcap"))
    done = cli("count", "lo", "all=")
    assert done.status == 1
    assert "missing.pcap" in done.err
