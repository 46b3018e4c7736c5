"""``kbpf link``: links of every kind that can be made here, beside bpftool as far as it knows them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel import syscall
from kbpf.kernel.attrs import command
from kbpf.kernel.backend import KernelBackend
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.enums import ATTACH_TYPES

pytestmark = pytest.mark.requires("kernel", "bpftool")
RETURNS_1 = (Instruction(ebpf.ALU64 | ebpf.MOV, imm=1), Instruction(ebpf.JMP | ebpf.EXIT))
RETURNS_0 = (Instruction(ebpf.ALU64 | ebpf.MOV), Instruction(ebpf.JMP | ebpf.EXIT))


def program(type: str, attach_type: str | None = None, **spec: Any) -> kbpf.Program:
    code = RETURNS_1 if type in ("cgroup_skb", "sk_lookup", "netfilter") else RETURNS_0
    made = ProgramSpec(type=type, instructions=code, expected_attach_type=attach_type, **spec)
    return kbpf.load_program(made, backend="kernel")


@pytest.fixture
def shown(cli) -> Callable[[int], tuple[dict[str, Any], list[str], Any]]:
    """What is shown of a link: ours as JSON, ours as text, and bpftool's JSON. The id, type and program are checked."""

    def show(fd: int, with_program: kbpf.Program) -> tuple[dict[str, Any], list[str], Any]:
        with kbpf.Link.open(fd=fd, backend="kernel") as opened:
            id, type = str(opened.id), opened.info.type
        told = json.loads(cli("link", "show", "id", id, "--json").out)
        assert list(told)[:3] == ["id", "type", "prog_id"]
        assert (told.pop("id"), told.pop("type"), told.pop("prog_id")) == (int(id), type, with_program.id)
        head, *lines = cli("link", "show", "id", id).out.splitlines()
        assert head.startswith(f"{id}: {type}  prog {with_program.id}")
        behind = head.removeprefix(f"{id}: {type}  prog {with_program.id}").strip()
        theirs = json.loads(subprocess.run(["bpftool", "-j", "link", "show", "id", id], capture_output=True).stdout)
        found = {name: value for name, value in theirs.items() if name not in ("id", "type", "prog_id")}
        return told, [*([behind] if behind else []), *(line.strip() for line in lines)], found

    return show  # type: ignore[return-value]


@pytest.fixture
def group() -> Iterator[str]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    path = Path(next(where for _, where, kind, *_ in mounts if kind == "cgroup2")) / f"kbpf-test-{os.getpid()}"
    path.mkdir()
    yield str(path)
    path.rmdir()


@pytest.mark.requires("linux-6.17")
def test_raw_tracepoints(cli, shown) -> None:
    with program("raw_tracepoint") as loaded, loaded.attach(kbpf.RawTracepoint("sched_switch"), cookie=7) as link:
        told, text, theirs = shown(link.fileno(), loaded)
        # Newer kernels tell of a cookie, and newer bpftools.
        assert told == theirs | {"cookie": 7}
        assert text == ["tp 'sched_switch'  cookie 7"]
        assert theirs["tp_name"] in {one.get("tp_name") for one in json.loads(cli("link", "list", "--json").out)}
    assert cli("link", "show", "name", "x").status == 2


def test_control_groups(shown, group: str) -> None:
    with program("cgroup_skb", "cgroup_inet_ingress") as loaded, loaded.attach(group) as link:
        told, text, theirs = shown(link.fileno(), loaded)
        assert told == theirs and list(told) == ["cgroup_id", "attach_type"]
        assert text == [f"cgroup_id {told['cgroup_id']}  attach_type cgroup_inet_ingress"]


@pytest.mark.parametrize(
    ("type", "attach_type", "told"),
    [
        ("xdp", None, {}),
        pytest.param(
            *("sched_cls", "tcx_ingress", {"attach_type": "tcx_ingress"}), marks=pytest.mark.requires("linux-6.6")
        ),
    ],
)
def test_interfaces(shown, type: str, attach_type: str | None, told: dict[str, str]) -> None:
    with NetworkNamespace() as namespace, program(type, attach_type) as loaded:

        def look() -> tuple[dict[str, Any], list[str], Any]:
            with loaded.attach("lo", mode="generic" if type == "xdp" else None) as link:
                left = os.dup(link.fileno())
                before = shown(left, loaded)
                link.detach()
            try:
                return before, shown(left, loaded)[1]
            finally:
                os.close(left)

        (fields, text, _), detached = namespace.call(look)
        assert fields == {"devname": "lo", "ifindex": 1} | told
        assert list(fields) == ["devname", "ifindex", *told]
        words = [f"{name} {value}" for name, value in told.items()]
        assert text == ["  ".join(["ifindex lo(1)", *words])]
        assert detached == ["  ".join(["ifindex (detached)", *words])]


@pytest.mark.parametrize("type", ["flow_dissector", "sk_lookup"])
def test_network_namespaces(shown, type: str) -> None:
    with NetworkNamespace() as namespace, program(type, type) as loaded:

        def look() -> Any:
            with loaded.attach("/proc/thread-self/ns/net") as link:
                return shown(link.fileno(), loaded)

        told, text, theirs = namespace.call(look)
        assert told == theirs and list(told) == ["netns_ino", "attach_type"]
        assert text == [f"netns_ino {told['netns_ino']}  attach_type {type}"]


@pytest.mark.requires("linux-6.4")
def test_netfilter(shown) -> None:
    hook = kbpf.Netfilter(family="ipv4", hook="local_in", priority=-128)
    with NetworkNamespace() as namespace, program("netfilter", "netfilter") as loaded:

        def look() -> Any:
            with loaded.attach(hook) as link:
                return shown(link.fileno(), loaded)

        told, text, _ = namespace.call(look)
        assert told == {"pf": 2, "hook": 1, "prio": -128, "flags": 0} and list(told) == ["pf", "hook", "prio", "flags"]
        assert text == ["ip input prio -128"]


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.requires("linux-6.9")
def test_uprobes(shown, returns: bool) -> None:
    with (
        program("kprobe") as loaded,
        loaded.attach(kbpf.Uprobe("/bin/bash", 0x31030, returns=returns), cookie=9) as link,
    ):
        told, text, _ = shown(link.fileno(), loaded)
        assert told == {"retprobe": returns, "file": "/bin/bash", "offset": 0x31030, "cookie": 9}
        assert list(told) == ["retprobe", "file", "offset", "cookie"]
        assert text == [f"{'uretprobe' if returns else 'uprobe'} /bin/bash+0x31030  cookie 9"]


@pytest.mark.requires("linux-6.6")
def test_events_that_are_counted(shown) -> None:
    source = kbpf.PerfEvent(type=1, config=2, period=1 << 30, cpu=0)
    with program("perf_event") as loaded, loaded.attach(source) as link:
        told, text, _ = shown(link.fileno(), loaded)
        assert told == {"event_type": "software", "event_config": "page-faults", "cookie": 0}
        assert text == ["event software:page-faults"]


def test_an_event_that_the_kernel_tells_nothing_of(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    told = KernelBackend.link_info
    monkeypatch.setattr(KernelBackend, "link_info", lambda self, link: replace(told(self, link), details={}))
    source = kbpf.PerfEvent(type=1, config=2, period=1 << 30, cpu=0)
    with program("perf_event") as loaded, loaded.attach(source) as link:
        with kbpf.Link.open(fd=link.fileno(), backend="kernel") as opened:
            id = str(opened.id)
        assert json.loads(cli("link", "show", "id", id, "--json").out).keys() == {"id", "type", "prog_id"}
        assert cli("link", "show", "id", id).out.splitlines()[0] == f"{id}: perf_event  prog {loaded.id}"


@pytest.mark.requires("linux-6.8")
def test_several_uprobes(shown) -> None:
    path = syscall.Buffer(b"/bin/bash\0")
    offsets, cookies = (syscall.Buffer(struct.pack("=2Q", *numbers)) for numbers in ((0x31030, 0x31040), (5, 6)))
    places = {"path": path.address, "offsets": offsets.address, "cookies": cookies.address, "cnt": 2, "flags": 1}
    with program("kprobe", "trace_uprobe_multi") as loaded:
        fd = command(
            "link_create",
            prog_fd=loaded.fileno(),
            attach_type=ATTACH_TYPES["trace_uprobe_multi"],
            **{f"uprobe_multi.{name}": value for name, value in places.items()},
        )
        try:
            told, text, _ = shown(fd, loaded)
        finally:
            os.close(fd)
    path_told = told.pop("path")
    assert Path(path_told).samefile("/bin/bash")
    assert told == {
        "retprobe": True,
        "func_cnt": 2,
        "pid": 0,
        "funcs": [
            {"offset": 0x31030, "ref_ctr_offset": 0, "cookie": 5},
            {"offset": 0x31040, "ref_ctr_offset": 0, "cookie": 6},
        ],
    }
    assert text[0] == f"uretprobe.multi  path {path_told}  func_cnt 2"
    assert [line.split() for line in text[2:]] == [["0x31030", "0x0", "0x5"], ["0x31040", "0x0", "0x6"]]


@pytest.mark.parametrize(
    ("over", "keywords", "expected"),
    [
        ("bpf_map", {}, {}),
        ("task", {}, {}),
        ("task", {"pid": os.getpid()}, {"pid": os.getpid()}),
        ("task", {"tid": os.getpid()}, {"tid": os.getpid()}),
    ],
)
def test_iterators(shown, over: str, keywords: dict[str, int], expected: dict[str, int]) -> None:
    with program("tracing", "trace_iter", attach_to=over) as loaded, loaded.iterator(**keywords) as link:
        told, text, theirs = shown(link.fileno(), loaded)
        assert told == theirs | expected
        assert text == ["  ".join(f"{name} {value}" for name, value in told.items())]


def test_iterators_over_control_groups(shown, group: str) -> None:
    with program("tracing", "trace_iter", attach_to="cgroup") as loaded, loaded.iterator(cgroup=group) as link:
        told, text, theirs = shown(link.fileno(), loaded)
        assert told == theirs and told["order"] == "descendants_pre"
        assert text == [f"target_name cgroup  cgroup_id {told['cgroup_id']}  order descendants_pre"]


@pytest.mark.requires("linux-6.10")
def test_socket_maps(shown) -> None:
    sockets = MapSpec(type="sockmap", key_size=4, value_size=4, max_entries=2)
    with kbpf.Map.create(sockets, "kernel") as map, program("sk_msg") as loaded, loaded.attach(map) as link:
        told, text, _ = shown(link.fileno(), loaded)
        assert told == {"map_id": map.id, "attach_type": "sk_msg_verdict"}
        assert text == [f"map_id {map.id}  attach_type sk_msg_verdict"]


def test_pins_of_links(cli, shown) -> None:
    path = f"/sys/fs/bpf/kbpf-test-link-{os.getpid()}"
    with program("raw_tracepoint") as loaded, loaded.attach(kbpf.RawTracepoint("sched_switch")) as made:
        with kbpf.Link.open(fd=made.fileno(), backend="kernel") as link:
            link.pin(path)
            id = str(link.id)
        try:
            assert json.loads(cli("link", "show", "id", id, "-f", "--json").out)["pinned"] == [path]
            assert cli("link", "show", "id", id, "-f").out.splitlines()[-1] == f"\tpinned {path}"
        finally:
            Path(path).unlink()
