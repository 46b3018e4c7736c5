"""The plugin's promises, each seen from a pytest session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_on(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text('pytest_plugins = ["kbpf.testing.plugin"]\n')
    (folder / "test_inner.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "--rootdir", str(folder), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "/nonexistent"}
    env |= {"KBPF_REQUIRE": "", **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


NEEDS_TCPDUMP = "import pytest\n@pytest.mark.requires('tcpdump')\ndef test_it(): pass\n"


def test_a_skip_names_what_is_missing(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, NEEDS_TCPDUMP)
    assert done.returncode == 0
    assert "1 skipped" in done.stdout
    assert "needs tcpdump: tcpdump (Debian: tcpdump)" in done.stdout


def test_a_required_skip_is_a_failure(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, NEEDS_TCPDUMP, KBPF_REQUIRE="clang,tcpdump")
    assert done.returncode == 1
    assert "required by KBPF_REQUIRE, but missing: needs tcpdump" in done.stdout


def test_a_version_of_linux_is_a_requirement(tmp_path: Path) -> None:
    major, minor = map(int, os.uname().release.split("-")[0].split(".")[:2])
    here, later = f"linux-{major}.{minor}", f"linux-{major}.{minor + 1}"
    code = "import pytest\n" + "".join(
        f"@pytest.mark.requires('{name}')\ndef test_{index}(): pass\n"
        for index, name in enumerate(("linux-3.19", here, later, f"linux-{major + 1}.0"))
    )
    done = pytest_on(tmp_path, code)
    assert "2 passed, 2 skipped" in done.stdout
    assert f"needs {later}: this is {os.uname().release}" in done.stdout
    assert pytest_on(tmp_path, code, KBPF_REQUIRE=f"{here},{later}").returncode == 1


def test_the_emulator_has_what_a_version_of_linux_has(tmp_path: Path) -> None:
    code = "import pytest\n@pytest.mark.requires('linux-99.0')\ndef test_it(backend): assert backend == 'emulator'\n"
    done = pytest_on(tmp_path, code)
    assert "1 passed, 1 skipped" in done.stdout


@pytest.mark.parametrize("name", ["quantum", "linux", "linux-6", "6.6", "linux-6.6.1"])
def test_an_unknown_requirement_is_refused(tmp_path: Path, name: str) -> None:
    done = pytest_on(tmp_path, f"import pytest\n@pytest.mark.requires('{name}')\ndef test_it(): pass\n")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert name in done.stderr


def test_an_unknown_name_in_kbpf_require_is_refused(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, "def test_it(): pass\n", KBPF_REQUIRE="kernal")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "kernal" in done.stderr


def test_a_leaked_descriptor_fails_the_session_and_names_the_test(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, "import os\ndef test_good(): pass\ndef test_leak(): os.pipe()\n")
    assert done.returncode == 1
    assert "2 passed" in done.stdout
    assert "pipe:[" in done.stdout
    assert "first seen after test_inner.py::test_leak" in done.stdout


def test_a_leaked_child_fails_the_session(tmp_path: Path) -> None:
    code = "import os\ndef test_leak():\n    if os.fork() == 0:\n        os.execv('/bin/sleep', ['sleep', '4'])\n"
    done = pytest_on(tmp_path, code)
    assert done.returncode == 1
    assert "children: process" in done.stdout


def test_what_a_module_keeps_open_and_then_closes_is_no_leak(tmp_path: Path) -> None:
    code = """
import os, pytest
@pytest.fixture(scope="module")
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends: os.close(end)
def test_one(pipe): pass
def test_two(pipe): pass
"""
    assert pytest_on(tmp_path, code).returncode == 0


@pytest.mark.requires("unprivileged")
def test_unprivileged_code_has_no_capabilities_and_this_kbpf(unprivileged) -> None:
    code = (
        "import os, kbpf; print(os.getuid(), kbpf.__file__);"
        "print([line for line in open('/proc/self/status') if line.startswith('CapEff')])"
    )
    done = unprivileged.run(code)
    assert done.returncode == 0, done.stderr
    assert "CapEff:\\t0000000000000000" in done.stdout
    assert str(unprivileged.folder) in done.stdout
    if os.getuid() == 0:
        assert done.stdout.startswith("65534 ")


@pytest.mark.requires("unprivileged", "userns")
def test_userns_code_is_root_of_a_network_with_only_loopback(unprivileged) -> None:
    done = unprivileged.run("import os, socket; print(os.getuid(), socket.if_nameindex())", userns=True)
    assert done.stdout.strip() == "0 [(1, 'lo')]", done.stderr


def test_veth_ends_reach_each_other_over_both_ip_versions(veth) -> None:
    import socket

    left, right = veth
    for family, address in ((socket.AF_INET, right.ipv4), (socket.AF_INET6, right.ipv6)):
        with (
            right.namespace.socket(family, socket.SOCK_DGRAM) as receiver,
            left.namespace.socket(family, socket.SOCK_DGRAM) as sender,
        ):
            receiver.bind((address, 0))
            receiver.settimeout(5)
            sender.sendto(b"hello", receiver.getsockname()[:2])
            assert receiver.recv(100) == b"hello"


def test_a_failure_inside_a_namespace_reaches_the_caller(netns) -> None:
    with pytest.raises(ZeroDivisionError):
        netns.call(lambda: 1 // 0)


def test_loopback_traffic_gives_the_ports_it_used(loopback_traffic) -> None:
    assert all(0 < port < 65536 for port in (*loopback_traffic.udp(3), *loopback_traffic.tcp(b"x" * 100_000)))
