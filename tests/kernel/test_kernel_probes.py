"""What this process may do, asked of this process."""

from __future__ import annotations

import errno
import os
import sys
import threading

import pytest

from kbpf.kernel import probes
from kbpf.kernel.backend import KernelBackend, kernel_backend
from kbpf.kernel.doctor import doctor_report
from kbpf.kernel.packages import install_command


def test_the_backend_is_one_and_verifies() -> None:
    assert kernel_backend() is kernel_backend()
    assert isinstance(kernel_backend(), KernelBackend)
    assert (kernel_backend().name, kernel_backend().verifies) == ("kernel", True)


def test_importing_the_backend_asks_nothing_of_the_heavy_modules() -> None:
    import subprocess

    script = "import sys, kbpf.kernel.backend, kbpf.kernel.probes; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"elftools", "pyroute2", "click", "rich", "asyncio", "platform", "bcc"} & set(loaded)


@pytest.mark.requires("kernel")
def test_root_may_use_every_type() -> None:
    process = probes.privileges()
    for program_type in ("socket_filter", "cgroup_skb", "sched_cls", "xdp", "kprobe", "tracing", "ext", "sk_lookup"):
        expected = not process.lacks(probes.program_capabilities(program_type))
        assert probes.may_use_bpf(program_type) is expected


@pytest.mark.requires("kernel")
def test_lack_of_descriptors_is_not_taken_for_lack_of_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(probes, "command", full)
    assert probes.may_use_bpf()


def test_privileges_are_the_threads_own_and_read_afresh() -> None:
    seen: list[probes.Privileges] = []
    thread = threading.Thread(target=lambda: seen.append(probes.privileges()))
    thread.start()
    thread.join()
    assert seen == [probes.privileges()]


def test_capabilities_are_those_that_linux_asks_for() -> None:
    assert probes.program_capabilities("socket_filter") == ("CAP_BPF",)
    assert probes.program_capabilities("xdp") == ("CAP_BPF", "CAP_NET_ADMIN")
    assert probes.program_capabilities("kprobe") == ("CAP_BPF", "CAP_PERFMON")
    assert probes.program_capabilities("ext") == ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")
    assert probes.map_capabilities("sockmap") == ("CAP_BPF", "CAP_NET_ADMIN")
    assert probes.map_capabilities("hash") == ("CAP_BPF",)


@pytest.mark.requires("kernel")
def test_bpf_answers() -> None:
    assert probes.bpf_answers() == 0


@pytest.mark.requires("kernel")
def test_the_types_that_take_more_capabilities_are_those_the_kernel_knows() -> None:
    from kbpf.uapi.enums import MAP_TYPES, PROG_TYPES

    assert set(PROG_TYPES) >= probes._NET_ADMIN_PROGRAMS | probes._PERFMON_PROGRAMS | probes._OPEN_PROGRAMS
    assert set(MAP_TYPES) >= probes._NET_ADMIN_MAPS | probes._OPEN_MAPS


def test_every_finding_that_is_missing_names_a_remedy() -> None:
    report = doctor_report()
    assert {finding.name for finding in report} >= {"kernel", "eBPF maps", "lockdown", "bcc", "headers", "clang"}
    for finding in report:
        assert finding.detail
        assert finding.remedy or finding.state != "missing", finding


@pytest.mark.requires("kernel")
def test_root_is_told_that_it_may() -> None:
    states = {finding.name: finding.state for finding in doctor_report()}
    for name in ("classic filter on a UDP socket", "packet sockets", "eBPF maps", "eBPF programs (socket_filter)"):
        assert states[name] == "ok"


def test_install_commands_are_this_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    for manager, command in (
        ("apt-get", "apt-get install python3-bpfcc"),
        ("dnf", "dnf install python3-bcc"),
        ("pacman", "pacman -S python-bcc"),
    ):
        monkeypatch.setattr("shutil.which", lambda name, manager=manager: name if name == manager else None)
        assert install_command("bcc") == command
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "debian"})
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", "6.1", "#1", "x86_64")))
    assert install_command("headers") == "apt-get install linux-headers-amd64"
