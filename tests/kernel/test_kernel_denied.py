"""What other users may do, and what they are told when they may not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import kbpf
from kbpf.backend import LoadRefused
from kbpf.kernel import denied, probes
from kbpf.kernel.backend import KernelBackend
from kbpf.kernel.denied import explain_denied
from kbpf.kernel.probes import Privileges
from kbpf.runtime.failures import translate
from kbpf.specs import MapSpec
from kbpf.testing.requirements import available

Runner = Callable[..., subprocess.CompletedProcess[str]]

PARANOID = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text())
DEBIANS_WISH = f"kernel.perf_event_paranoid is {PARANOID}, for which this kernel wants CAP_SYS_ADMIN"

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
        *others, tcp4, tcp6, packet, raw = words(nobody(PRELUDE + ATTACH_EVERYWHERE))
        assert (others, packet, raw) == (["ok"] * 4, "none", "none")
        # Some older kernels make no difference.
        assert tcp4 == tcp6 and tcp4 in ("EPERM", "ok")
        assert tcp4 == "EPERM" or not available("linux-6.18")

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


@pytest.mark.requires("unprivileged", "kernel")
@pytest.mark.parametrize(
    ("granted", "expected"),
    [
        ("+bpf", ["ok", "ok", "EPERM", "EPERM"]),
        ("+bpf,+net_admin", ["ok", "ok", "ok", "EPERM"]),
        ("+bpf,+perfmon", ["ok", "ok", "EPERM", "ok"]),
        ("+sys_admin", ["ok", "ok", "ok", "ok"]),
        ("+net_raw", ["EPERM", "EPERM", "EPERM", "EPERM"]),
    ],
)
def test_the_forecast_is_what_the_kernel_then_does(nobody: Runner, granted: str, expected: list[str]) -> None:
    script = PRELUDE + (
        "types = ('socket_filter', 'sk_reuseport', 'xdp', 'raw_tracepoint')\n"
        "load = lambda type: kernel.program_load(ProgramSpec(type=type, instructions=[(0xB7,), (0x95,)]), ())\n"
        "for type in types: print(outcome(load, type))\n"
        "for type in types: print('ok' if probes.may_use_bpf(type) else 'EPERM')\n"
    )
    said = words(nobody(script, capabilities=granted))
    assert said == expected * 2


@pytest.mark.requires("unprivileged", "kernel")
def test_buffers_for_perf_events_take_a_capability(nobody: Runner) -> None:
    script = PRELUDE + (
        "import kbpf\n"
        "spec = MapSpec(type='perf_event_array', key_size=4, value_size=4, max_entries=1)\n"
        "with kbpf.Map.create(spec, backend='kernel') as map:\n"
        "    try:\n"
        "        map.events().close()\n"
        "        print('ok')\n"
        "    except kbpf.PermissionDeniedError as error: print(error)\n"
    )
    refused = nobody(script, capabilities="+bpf").stdout
    allowed = nobody(script, capabilities="+bpf,+perfmon").stdout
    if PARANOID > 2:
        # Debian's kernels want more.
        assert refused == allowed and "EACCES" in refused and DEBIANS_WISH in refused
        allowed = nobody(script, capabilities="+sys_admin").stdout
    elif PARANOID > 0:
        assert "EACCES" in refused
        assert "the process lacks CAP_PERFMON, and kernel.perf_event_paranoid is" in refused
    assert allowed == "ok\n"


SECCOMP = """
import ctypes, struct
from kbpf.kernel.syscall import Buffer, _SYS_BPF
from kbpf.uapi.enums import COMMANDS
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
def refuse(number, command=None):
    # The number of the system call is at 0, its first argument at 16.
    refuse, allow = 0x00050000 | number, 0x7FFF0000
    one = [] if command is None else [
        cbpf.stmt(cbpf.LD | cbpf.W | cbpf.ABS, 16), cbpf.jump(cbpf.JMP | cbpf.JEQ, COMMANDS[command], 0, 1),
    ]
    program = Buffer(cbpf.encode([
        cbpf.stmt(cbpf.LD | cbpf.W | cbpf.ABS, 0), cbpf.jump(cbpf.JMP | cbpf.JEQ, _SYS_BPF, 0, 1 + len(one)),
        *one, cbpf.stmt(cbpf.RET, refuse), cbpf.stmt(cbpf.RET, allow),
    ]))
    fprog = Buffer(struct.pack("@HP", 4 + len(one), program.address))
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_void_p(fprog.address)) == 0
"""


@pytest.fixture
def filtered(readable_kbpf: Path) -> Callable[..., list[str]]:
    """Run a script that may put itself below a seccomp filter; its lines."""

    def run(script: str, *arguments: str) -> list[str]:
        command = [sys.executable, "-c", PRELUDE + SECCOMP + script, *arguments]
        done = subprocess.run(command, cwd=readable_kbpf, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.requires("kernel")
def test_a_log_that_says_nothing_is_no_verifiers_refusal(kernel: KernelBackend) -> None:
    numbers = "processed 0 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0\n"
    cut = "7: (79) r0 = *(u64 *)(r0 +0)\n"
    said = {
        log: type(
            translate(LoadRefused(errno.EPERM, log), kernel, "load", operation="prog_load", program_type="tracing")
        )
        for log in ("", numbers, cut, "R0 leaks addr as return value\n" + numbers)
    }
    assert list(said.values()) == [kbpf.PermissionDeniedError] * 2 + [kbpf.VerifierError] * 2


@pytest.mark.requires("kernel")
def test_attaching_to_an_event_names_what_it_takes() -> None:
    # The program is there already: a process that has it may still not have the event.
    script = """
import os
import kbpf
from kbpf.specs import ProgramSpec
with kbpf.load_program(ProgramSpec(type="kprobe", instructions=[(0xB7,), (0x95,)]), backend="kernel") as program:
    program.attach(kbpf.Uprobe("/bin/bash", 0x31030)).close()
    os.setresuid(65534, 65534, 65534)
    try: program.attach(kbpf.Uprobe("/bin/bash", 0x31030))
    except kbpf.PermissionDeniedError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert (DEBIANS_WISH if PARANOID > 2 else "the process lacks CAP_PERFMON") in done.stdout
    assert "the event's record" not in done.stdout


@pytest.mark.requires("kernel")
def test_a_seccomp_filter_is_named(filtered: Callable[..., list[str]]) -> None:
    script = """
refuse(errno.EPERM)
print(probes.may_use_bpf(), probes.privileges().seccomp, probes.privileges().no_new_privs)
print(kernel.explain_denied("map_create", errno.EPERM, map_type="hash")[0])
"""
    assert filtered(script) == ["False 2 True", "a seccomp filter refuses every bpf(2) of this process"]


@pytest.mark.requires("kernel")
@pytest.mark.parametrize(("refused", "allowed"), [("map_create", "prog_load"), ("prog_load", "map_create")])
def test_a_seccomp_filter_for_one_command_is_named(
    filtered: Callable[..., list[str]], refused: str, allowed: str
) -> None:
    script = """
refused, allowed = sys.argv[1:]
refuse(errno.EPERM, refused)
for command in (refused, allowed): print(kernel.explain_denied(command, errno.EPERM)[0])
"""
    first, second = filtered(script, refused, allowed)
    assert first == f"a seccomp filter refuses {refused} to this process"
    assert "seccomp" not in second


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("refused", ["prog_get_next_id", "obj_get_info_by_fd", "obj_get", "map_freeze"])
def test_a_seccomp_filter_is_not_taken_for_lockdown_or_a_pins_mode(
    filtered: Callable[..., list[str]], bpffs: Path, refused: str
) -> None:
    script = """
import kbpf
refused, pin = sys.argv[1:]
spec = MapSpec(type="hash", key_size=4, value_size=4, max_entries=1)
with kbpf.Map.create(spec, "kernel") as map:
    map.pin(pin)
    actions = {
        "prog_get_next_id": lambda: list(kbpf.programs("kernel")),
        "obj_get_info_by_fd": lambda: map.info,
        "obj_get": lambda: kbpf.Map.open(path=pin, backend="kernel"),
    }
    refuse(errno.EPERM, refused)
    try: actions.get(refused, map.freeze)()
    except kbpf.PermissionDeniedError as error: print(error.hints[0])
"""
    said = filtered(script, refused, str(bpffs / "pin"))
    assert said == [f"a seccomp filter refuses {refused} to this process"]


@pytest.mark.requires("kernel")
def test_a_seccomp_filter_that_hides_bpf_is_no_kernel_without_it(filtered: Callable[..., list[str]]) -> None:
    script = """
import kbpf
refuse(errno.ENOSYS)
spec = MapSpec(type="hash", key_size=4, value_size=4, max_entries=1)
program = ProgramSpec(instructions=[(0xB7,), (0x95,)])
for action in (lambda: kbpf.Map.create(spec, "kernel"), lambda: kbpf.load_program(program, backend="kernel")):
    try: action()
    except kbpf.NotSupportedError as error: print(error.hints[0])
print(kbpf.features.map_type("hash", backend="kernel"))
"""
    told = "a seccomp filter hides bpf(2) from this process: the kernel has it"
    first, second, third = filtered(script)
    assert first == second == told
    assert "not permitted" in third and told in third


@pytest.mark.requires("unprivileged", "kernel")
def test_what_the_verifier_withholds_for_want_of_a_capability(nobody: Runner) -> None:
    script = PRELUDE + (
        "import kbpf\n"
        "leak, unready = [(0xBF, 0, 1), (0x95,)], [(0x95,)]\n"
        "helper, other = ([(0x85, 0, 0, 0, number), *unready] for number in (6, 51))\n"
        "for code in (leak, helper, other, unready):\n"
        "    try: kbpf.load_program(ProgramSpec(instructions=code), backend='kernel').close()\n"
        "    except kbpf.VerifierError as error: print('CAP_PERFMON' in str(error))\n"
        "    else: print('ok')\n"
    )
    assert words(nobody(script, capabilities="+bpf")) == ["True", "True", "False", "False"]
    assert words(nobody(script, capabilities="+bpf,+perfmon")) == ["ok", "False", "False", "False"]


@pytest.mark.requires("unprivileged", "kernel")
def test_attaching_to_a_control_group_names_what_it_takes(nobody: Runner) -> None:
    script = PRELUDE + (
        "program = kernel.program_load(ProgramSpec(type='cgroup_skb', instructions=[(0xB7,), (0x95,)],\n"
        "    expected_attach_type='cgroup_inet_ingress'), ())\n"
        "import os\n"
        "group = os.open(sys.argv[1], os.O_RDONLY)\n"
        "print(outcome(kernel.link_create, program, group, 'cgroup_inet_ingress'))\n"
        "print(kernel.explain_denied('link_create', errno.EPERM, program_type='cgroup_skb')[0])\n"
    )
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    groups = [place for _, place, kind, *_ in mounts if kind == "cgroup2"]
    if not groups:
        pytest.skip("no control groups of version 2 are mounted")
    done = nobody(script, groups[0], capabilities="+bpf")
    assert done.stdout.splitlines() == ["EPERM", "the process lacks CAP_NET_ADMIN"], done.stderr


OPEN = """
import sys, kbpf
try:
    kbpf.Map.open(path=sys.argv[1], backend="kernel")
except kbpf.PermissionDeniedError as error:
    print(error.hints[0])
"""


@pytest.mark.requires("unprivileged", "kernel")
def test_a_pin_of_somebody_else_shows_its_mode(nobody: Runner, bpffs: Path, kernel: KernelBackend) -> None:
    fd = kernel.map_create(MapSpec(type="array", key_size=4, value_size=4, max_entries=1))
    try:
        kernel.pin(fd, str(bpffs / "pinned"))
    finally:
        kernel.close(fd)
    done = nobody(OPEN, str(bpffs / "pinned"))
    assert done.stdout == "a folder above the pin may not be entered by this process\n", done.stderr
    # Under a folder that all may enter the pin's own mode is what refuses.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        bound = Path(folder, "bpf")
        bound.mkdir()
        subprocess.run(["mount", "--bind", bpffs, bound], check=True)
        try:
            done = nobody(OPEN, str(bound / "pinned"))
        finally:
            subprocess.run(["umount", bound], check=True)
    assert done.stdout == "the pin does not let this process in: mode 0600 of user 0, it is user 65534\n", done.stderr


@pytest.mark.requires("kernel")
def test_what_is_no_pin_is_no_question_of_its_mode(tmp_path: Path, bpffs: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", bpffs):
        with pytest.raises(kbpf.PermissionDeniedError) as caught:
            kbpf.BpfMap.open(path=str(path), backend="kernel")
        assert caught.value.hints == ("it is no pin: those are files on a BPF file system",)


@pytest.mark.requires("kernel")
def test_this_kernel_charges_no_memory_to_the_limit() -> None:
    script = (
        "import resource\n"
        "from kbpf.kernel import probes\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "print(probes.charges_memlock(), probes.may_use_bpf())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    charged, able = done.stdout.split()
    assert (charged, able) in (("False", "True"), ("True", "False"))


def held(**changes: object) -> Privileges:
    everything = Privileges(frozenset(probes.CAPABILITIES), True, 2, None, 0, False)
    return everything._replace(**changes)


class TestReasons:
    """The words, for machines that this one is not."""

    @pytest.fixture
    def process(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def pretend(blocked: int = 0, **changes: object) -> None:
            monkeypatch.setattr(denied.probes, "privileges", lambda: held(**changes))
            monkeypatch.setattr(denied.probes, "bpf_answers", lambda operation="": blocked)

        return pretend

    def test_a_kernel_that_is_more_paranoid_than_linux(
        self, process: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        setting = tmp_path / "perf_event_paranoid"
        setting.write_text("3\n")
        monkeypatch.setattr(denied, "_PARANOID", setting)
        process(effective=frozenset({"CAP_BPF", "CAP_PERFMON"}))
        assert explain_denied("perf_event_open", errno.EACCES) == (
            "kernel.perf_event_paranoid is 3, for which this kernel wants CAP_SYS_ADMIN",
            "run as root, or set kernel.perf_event_paranoid to 2",
        )

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

    @pytest.mark.parametrize(("release", "charged"), [("5.10.0-8-amd64", True), ("5.11.0", False), ("6.18.44", False)])
    def test_memory_limits_count_where_older_kernels_charge_them(
        self, process: Callable[..., None], monkeypatch: pytest.MonkeyPatch, release: str, charged: bool
    ) -> None:
        process()
        monkeypatch.setattr("os.uname", lambda: os.uname_result(("Linux", "host", release, "#1", "x86_64")))
        monkeypatch.setattr("kbpf.kernel.features.loads_call", lambda name: False)
        monkeypatch.setattr("resource.getrlimit", lambda which: (65536, 65536))
        said = " ".join(explain_denied("map_create", errno.EPERM, map_type="hash"))
        assert ("RLIMIT_MEMLOCK, which is 65536 bytes" in said) is charged

    def test_a_kernel_with_the_change_and_an_older_number_charges_nothing(
        self, process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process()
        monkeypatch.setattr("os.uname", lambda: os.uname_result(("Linux", "host", "4.18.0-553.el8", "#1", "x86_64")))
        monkeypatch.setattr("kbpf.kernel.features.loads_call", lambda name: True)
        assert "MEMLOCK" not in " ".join(explain_denied("map_create", errno.EPERM, map_type="hash"))

    def test_programs_that_let_no_others_in(self, process: Callable[..., None]) -> None:
        process()
        assert "to let no others in" in explain_denied("link_create", errno.EPERM, program_type="cgroup_sock")[0]

    def test_maps_for_which_one_capability_did_not_stand_for_another(self, process: Callable[..., None]) -> None:
        process(effective=frozenset({"CAP_SYS_ADMIN"}))
        reason, _ = explain_denied("map_create", errno.EPERM, map_type="sockmap")
        assert (
            reason == "before Linux 6.9 maps of this type take CAP_NET_ADMIN itself: CAP_SYS_ADMIN does not include it"
        )
        assert "CAP_NET_ADMIN" not in " ".join(explain_denied("map_create", errno.EPERM, map_type="hash"))
        process(effective=frozenset({"CAP_SYS_ADMIN", "CAP_NET_ADMIN"}))
        assert "6.9" not in " ".join(explain_denied("map_create", errno.EPERM, map_type="sockmap"))

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
