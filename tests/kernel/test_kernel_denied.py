"""What other users may do, and what they are told when they may not."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable

import pytest

from kbpf.kernel import denied, probes
from kbpf.kernel.denied import explain_denied
from kbpf.kernel.probes import Privileges

Runner = Callable[..., subprocess.CompletedProcess[str]]

PRELUDE = """
import errno, socket, sys
from kbpf.isa import cbpf
from kbpf.kernel import probes
from kbpf.kernel.backend import KernelBackend
from kbpf.specs import MapSpec, ProgramSpec
kernel = KernelBackend()
KEEP_ALL = cbpf.encode([cbpf.stmt(cbpf.RET | cbpf.K, 0xFFFFFFFF)])
def outcome(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
"""

ATTACH_EVERYWHERE = """
for family, type in ((2, 2), (10, 2), (1, 2), (16, 3), (2, 1), (10, 1), (17, 3), (2, 3)):
    try:
        with socket.socket(family, type, 1 if (family, type) == (2, 3) else 0) as made:
            print(outcome(kernel.socket_attach_filter, made, KEEP_ALL), end=" ")
    except PermissionError:
        print("none", end=" ")
"""

LOAD = """
print(
    outcome(kernel.map_create, MapSpec(type="array", key_size=4, value_size=4, max_entries=1)),
    outcome(kernel.program_load, ProgramSpec(instructions=[(0xB7,), (0x95,)]), ()),
    outcome(kernel.ids, "map"),
    probes.may_use_bpf(), probes.may_use_bpf("socket_filter"), probes.may_use_bpf("xdp"),
)
"""


def words(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.requires("unprivileged")
class TestNobody:
    def test_attaches_classic_filters_but_not_to_tcp(self, nobody: Runner) -> None:
        expected = ["ok", "ok", "ok", "ok", "EPERM", "EPERM", "none", "none"]
        assert words(nobody(PRELUDE + ATTACH_EVERYWHERE)) == expected

    def test_may_not_use_bpf_where_the_sysctl_says_so(self, nobody: Runner) -> None:
        if not probes.privileges().unprivileged_bpf_disabled:
            pytest.skip("kernel.unprivileged_bpf_disabled is 0 here")
        assert words(nobody(PRELUDE + LOAD)) == ["EPERM"] * 3 + ["False"] * 3

    def test_is_told_what_it_lacks(self, nobody: Runner) -> None:
        script = PRELUDE + (
            'for line in kernel.explain_denied("prog_load", errno.EPERM, program_type="xdp"): print(line)\n'
            'for line in kernel.explain_denied("map_create", errno.EPERM, map_type="hash"): print(line)\n'
            'for line in kernel.explain_denied("socket(AF_PACKET)", errno.EPERM): print(line)\n'
            'for line in kernel.explain_denied("map_get_fd_by_id", errno.EPERM): print(line)\n'
        )
        done = nobody(script)
        assert done.returncode == 0, done.stderr
        assert "lacks CAP_BPF and CAP_NET_ADMIN\n" in done.stdout
        assert "grant CAP_BPF and CAP_NET_ADMIN, or set KBPF_BACKEND=emulator" in done.stdout
        disabled = probes.privileges().unprivileged_bpf_disabled
        if disabled:
            assert f"lacks CAP_BPF, and kernel.unprivileged_bpf_disabled is {disabled}" in done.stdout
        assert "takes CAP_NET_RAW, which the process lacks" in done.stdout
        assert "lacks CAP_SYS_ADMIN" in done.stdout

    def test_learns_whether_it_is_the_lock_or_tcp(self, nobody: Runner) -> None:
        script = PRELUDE + (
            "from kbpf.kernel.denied import explain_denied\n"
            "tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)\n"
            "kernel.socket_lock(udp)\n"
            'for made in (tcp, udp): print(explain_denied("SO_ATTACH_FILTER", errno.EPERM, socket=made)[0])\n'
        )
        tcp, udp = nobody(script).stdout.splitlines()
        assert "TCP socket takes CAP_NET_ADMIN" in tcp
        assert "locked" in udp


@pytest.mark.requires("userns")
class TestOwnNamespace:
    def test_attaches_classic_filters_to_everything(self, own_namespace: Runner) -> None:
        assert words(own_namespace(PRELUDE + ATTACH_EVERYWHERE)) == ["ok"] * 8

    def test_capabilities_there_do_not_count_for_bpf(self, own_namespace: Runner) -> None:
        assert words(own_namespace(PRELUDE + LOAD))[2] == "EPERM"
        script = PRELUDE + (
            "process = probes.privileges()\n"
            'print("CAP_BPF" in process.effective, process.has("CAP_BPF"), process.initial_user_namespace)\n'
            'print(kernel.explain_denied("prog_load", errno.EPERM, program_type="xdp")[0])\n'
        )
        first, second = own_namespace(script).stdout.splitlines()
        assert first.split() == ["True", "False", "False"]
        assert "must be held in the initial user namespace" in second


def held(**changes: object) -> Privileges:
    everything = Privileges(frozenset(probes.CAPABILITIES), True, 2, None, 0, False)
    return everything._replace(**changes)


class TestReasons:
    """The words, for machines that this one is not."""

    @pytest.fixture
    def process(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def pretend(blocked: int = 0, **changes: object) -> None:
            monkeypatch.setattr(denied.probes, "privileges", lambda: held(**changes))
            monkeypatch.setattr(denied.probes, "bpf_answers", lambda: blocked)

        return pretend

    def test_lockdown(self, process: Callable[..., None]) -> None:
        process(lockdown="integrity")
        reason, _ = explain_denied("prog_load", errno.EPERM, program_type="tracing")
        assert reason == "the process has the capabilities, but the kernel is locked down (integrity)"

    def test_lockdown_that_cannot_be_read(self, process: Callable[..., None]) -> None:
        process()
        assert "mount -t securityfs" in explain_denied("prog_load", errno.EPERM, program_type="tracing")[1]

    def test_seccomp(self, process: Callable[..., None]) -> None:
        process(blocked=errno.EPERM, seccomp=2)
        assert "a seccomp filter refuses" in explain_denied("map_create", errno.EPERM, map_type="hash")[0]

    def test_no_bpf_at_all(self, process: Callable[..., None]) -> None:
        process(blocked=errno.ENOSYS)
        assert "no bpf(2)" in explain_denied("map_create", errno.EPERM)[0]

    def test_map_rights(self, process: Callable[..., None]) -> None:
        process()
        assert "frozen or read-only" in explain_denied("map_update_elem", errno.EPERM)[0]
        assert "may not be read" in explain_denied("map_lookup_elem", errno.EPERM)[0]
        assert "frozen already" in explain_denied("map_freeze", errno.EPERM)[0]

    def test_pins(self, process: Callable[..., None]) -> None:
        process()
        assert "permissions" in explain_denied("obj_get", errno.EACCES)[0]
        assert "BPF file system" in explain_denied("obj_pin", errno.EPERM)[0]

    @pytest.mark.parametrize("operation", ["map_create", "prog_load", "map_update_elem", "obj_pin", "SO_ATTACH_FILTER"])
    def test_memory_limits_are_never_blamed(self, process: Callable[..., None], operation: str) -> None:
        process(effective=frozenset())
        said = " ".join(explain_denied(operation, errno.EPERM)).lower()
        assert said and "memlock" not in said and "rlimit" not in said

    def test_an_operation_that_is_not_known_is_not_guessed_about(self) -> None:
        assert explain_denied("getsockopt", errno.EPERM) == ()
