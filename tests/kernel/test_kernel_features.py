"""What the kernel has, against bpftool and against what loads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kbpf.emulator.helpers.allowed import ALLOWED
from kbpf.kernel import features
from kbpf.kernel.features import ask
from kbpf.testing.requirements import available
from kbpf.uapi.enums import ATTACH_TYPES, HELPERS, LINK_TYPES, MAP_TYPES, PROG_TYPES

Runner = Callable[..., subprocess.CompletedProcess[str]]

# Types whose programs bpftool asks for a function of the kernel, which lockdown may refuse where the type is there.
WITH_TARGET = {name for name, probe in features.PROGRAMS.items() if probe.target}


def version(since: str) -> tuple[int, ...]:
    return tuple(map(int, since.split(".")))


def test_every_type_that_linux_names_has_a_probe() -> None:
    assert set(features.MAPS) == set(MAP_TYPES) - {"unspec"}
    assert set(features.PROGRAMS) == set(PROG_TYPES) - {"unspec"}
    assert set(features.ATTACHMENTS) == set(ATTACH_TYPES)
    assert set(features.LINKS) < set(LINK_TYPES)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, object]]:
    done = subprocess.run(["bpftool", "-j", "feature", "probe", "kernel"], capture_output=True, text=True, check=True)
    told: dict[str, dict[str, object]] = json.loads(done.stdout)
    return told


@pytest.mark.requires("kernel", "bpftool")
class TestBpftool:
    def test_agrees_on_map_types(self, found: dict[str, dict[str, object]]) -> None:
        compared = 0
        for key, there in found["map_types"].items():
            name = key.removeprefix("have_").removesuffix("_map_type")
            assert bool(ask("map_type", name)) is there, name
            compared += 1
        assert compared > 25

    def test_agrees_on_program_types(self, found: dict[str, dict[str, object]]) -> None:
        compared = 0
        for key, there in found["program_types"].items():
            name = key.removeprefix("have_").removesuffix("_prog_type")
            if name in WITH_TARGET:
                assert there is not True or ask("program_type", name), name
            else:
                assert bool(ask("program_type", name)) is there, name
                compared += 1
        assert compared > 20

    @pytest.mark.parametrize(
        "program_type", ["socket_filter", "xdp", "sched_cls", "kprobe", "sk_lookup", "sk_reuseport"]
    )
    def test_agrees_on_helpers(self, found: dict[str, dict[str, object]], program_type: str) -> None:
        said = found["helpers"][f"{program_type}_available_helpers"]
        assert isinstance(said, list)
        theirs = {name.removeprefix("bpf_") for name in said}
        # It leaves out those that write to the kernel's log, and takes any complaint that is not of the words it knows
        # for a yes. What it does not have at all, the kernel does not have.
        ours = {name for name in HELPERS if name != "unspec" and ask("helper", name, program_type)}
        assert len(ours) > 40
        known = theirs | {name for name, number in HELPERS.items() if number > max(HELPERS.get(t, 0) for t in theirs)}
        assert ours - {"trace_printk", "trace_vprintk", "probe_write_user"} <= known


@pytest.mark.requires("kernel")
class TestKernel:
    @pytest.mark.parametrize(
        "program_type", ["socket_filter", "xdp", "sched_cls", "cgroup_skb", "tracepoint", "syscall"]
    )
    def test_helpers_are_those_that_were_measured(self, program_type: str) -> None:
        # Lockdown took one of them where they were measured.
        names = {number: name for name, number in HELPERS.items() if name not in ("unspec", "probe_write_user")}
        found = {number for number in names if ask("helper", names[number], program_type)}
        # Older kernels have fewer.
        assert found <= ALLOWED[program_type] and len(found) > 40
        assert found == ALLOWED[program_type] or not available("linux-6.18")

    @pytest.mark.parametrize("name", ["tracing", "lsm", "ext", "struct_ops"])
    def test_helpers_that_depend_on_the_target_are_not_guessed(self, name: str) -> None:
        assert ask("helper", "map_lookup_elem", name).answer == "inconclusive"

    def test_what_is_older_than_this_kernel_is_there_or_said_why_not(self) -> None:
        for kind, table in (("map_type", features.MAPS), ("program_type", features.PROGRAMS)):
            for name in table:
                answer = ask(kind, name)  # type: ignore[arg-type]
                assert answer.answer != "inconclusive", (name, answer)
                assert answer or answer.detail, name
                assert version(answer.since) >= (3, 19)

    def test_versions_rise_with_the_numbers(self) -> None:
        for table, numbers in ((features.MAPS, MAP_TYPES), (features.PROGRAMS, PROG_TYPES)):
            since = [version(table[name].since) for name in numbers if name != "unspec"]  # type: ignore[attr-defined]
            assert since == sorted(since)

    @pytest.mark.parametrize(
        "name", ["cgroup_inet_ingress", "tcx_ingress", "xdp", "xdp_devmap", "sk_lookup", "sk_skb_verdict", "netfilter"]
    )
    def test_places_that_are_asked_for_by_name(self, name: str) -> None:
        found = ask("attach_type", name)
        assert found.answer == ("yes" if available(f"linux-{found.since}") else "no")

    def test_an_iterator_is_made_and_let_go(self) -> None:
        before = Path("/proc/self/fd")
        count = len(list(before.iterdir()))
        assert ask("link_type", "iter")
        assert len(list(before.iterdir())) == count

    def test_lack_of_room_is_inconclusive(self) -> None:
        script = (
            "import resource\n"
            "from kbpf.kernel.features import ask\n"
            "ask('map_type', 'hash'), ask('helper', 'map_lookup_elem', 'xdp')\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
            "print(ask('map_type', 'hash').answer, ask('link_type', 'tcx').answer)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["inconclusive", "inconclusive"]


ASK = """
import sys
from kbpf import features
for kind, *names in (item.split(":") for item in sys.argv[1:]):
    print(getattr(features, kind)(*names, backend="kernel"). answer.replace(" ", "-"))
"""
QUESTIONS = [
    "map_type:hash",
    "map_type:sockmap",
    "program_type:xdp",
    "program_type:kprobe",
    "helper:socket_filter:trace_printk",
    # Which programs of this type never have.
    "helper:socket_filter:redirect",
]


@pytest.mark.requires("kernel", "unprivileged")
@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ("", "not-permitted not-permitted not-permitted not-permitted not-permitted not-permitted"),
        ("+bpf", "yes not-permitted not-permitted not-permitted not-permitted no"),
        ("+bpf,+net_admin", "yes yes yes not-permitted not-permitted no"),
        ("+bpf,+perfmon", "yes not-permitted not-permitted yes yes no"),
        ("+sys_admin", "yes yes yes yes yes no"),
    ],
)
def test_what_one_may_not_have_is_no_no(nobody: Runner, capabilities: str, expected: str) -> None:
    if features.probes.privileges().unprivileged_bpf_disabled == 0 and not capabilities:
        pytest.skip("kernel.unprivileged_bpf_disabled is 0 here")
    said = dict(zip(QUESTIONS, expected.split(), strict=True))
    if capabilities == "+sys_admin" and not available("linux-6.9"):
        said["map_type:sockmap"] = "not-permitted"  # CAP_NET_ADMIN itself was asked for.
    done = nobody(ASK, *QUESTIONS, capabilities=capabilities)
    assert done.stdout.split() == list(said.values()), done.stderr


@pytest.mark.requires("kernel", "unprivileged")
def test_helpers_that_take_a_capability_are_those_that_the_kernel_then_gives(nobody: Runner) -> None:
    script = (
        "from kbpf import features\n"
        "from kbpf.uapi.enums import HELPERS\n"
        "for type in ('socket_filter', 'cgroup_skb', 'sk_reuseport', 'syscall'):\n"
        "    for name in HELPERS:\n"
        "        if name != 'unspec': print(f'{type} {name}:' + features.helper(type, name, backend='kernel').answer)\n"
    )
    few, more = (
        dict(line.split(":") for line in nobody(script, capabilities=capabilities).stdout.splitlines())
        for capabilities in ("+bpf", "+bpf,+perfmon")
    )
    # What is not there is there with no capability.
    assert {more[name] for name, answer in few.items() if answer == "no"} == {"no"}
    assert {few[name] for name, answer in more.items() if answer == "yes"} == {"yes", "not permitted"}


@pytest.mark.requires("kernel")
def test_a_helper_that_lockdown_may_have_taken_is_not_said_to_be_missing() -> None:
    found = ask("helper", "probe_write_user", "kprobe")
    expected = {"none": "yes", None: "inconclusive"}.get(features.probes.lockdown(), "not permitted")
    assert found.answer == expected or (found.answer == "yes" and expected == "inconclusive"), found
    # Types that never have it.
    assert ask("helper", "probe_write_user", "socket_filter").answer == "no"


@pytest.mark.requires("kernel", "userns")
def test_capabilities_of_another_user_namespace_do_not_count(own_namespace: Runner) -> None:
    done = own_namespace(ASK, "program_type:xdp")
    assert done.stdout.split() == ["not-permitted"], done.stderr
