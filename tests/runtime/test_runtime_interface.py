"""Links of programs to interfaces: where they go, what is refused, and when they end, on both backends alike."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import kbpf
from kbpf.backend import Attached
from kbpf.emulator import add_pair, reset
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.runtime.backends import get_backend
from kbpf.specs import ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi import constants as uapi

RETURNS_2 = (Instruction(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 2), Instruction(ebpf.JMP | ebpf.EXIT))
_CABLE = ("ip", "link", "add", "v0", "index", "2", "type", "veth", "peer", "name", "v1", "index", "3")
INDEX = {"lo": 1, "v0": 2, "v1": 3}


class Place:
    """A machine with a cable from v0 to v1."""

    def __init__(self, backend: Any, namespace: NetworkNamespace | None) -> None:
        self.backend, self.namespace = backend, namespace
        if namespace is None:
            reset()
            add_pair("v0", "v1")
        else:
            namespace.run(*_CABLE)

    def call(self, function: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.namespace is None:
            return function(*arguments, **keywords)
        return self.namespace.call(function, *arguments, **keywords)

    def program(self, type: str, **spec: Any) -> kbpf.Program:
        return kbpf.load_program(ProgramSpec(type=type, instructions=RETURNS_2, **spec), backend=self.backend)

    def attach(self, program: kbpf.Program, *arguments: Any, **keywords: Any) -> kbpf.InterfaceLink:
        # The kernel lets a link that nobody holds go a moment later, and until then its place is taken.
        for _ in range(500):
            try:
                return self.call(program.attach, *arguments, **keywords)
            except kbpf.BpfError as error:
                if error.errno not in (errno.EBUSY, errno.EEXIST):
                    raise
            time.sleep(0.01)
        raise TimeoutError(f"{arguments} stays taken")

    def attempt(self, function: Any, *arguments: Any, **keywords: Any) -> Any:
        """What it gives, or the errno that it ends with."""
        try:
            return self.call(function, *arguments, **keywords)
        except OSError as error:
            return error.errno


@pytest.fixture
def place(backend: Any, request: pytest.FixtureRequest) -> Iterator[Place]:
    yield Place(backend, request.getfixturevalue("netns") if backend == "kernel" else None)
    reset()


def test_a_link_is_off_after_with(place: Place) -> None:
    with place.program("xdp") as program:
        with place.attach(program, "v1") as link:
            assert (link.info.type, link.info.attach_type, link.info.ifindex) == ("xdp", "xdp", INDEX["v1"])
            assert link.info.program_id == program.id
        assert link.closed
        with place.attach(program, "v1", mode="generic") as link:
            assert link.detach()
            assert not link.detach()


@pytest.mark.parametrize("first", [None, "generic", "native"])
@pytest.mark.parametrize("second", [None, "generic", "native"])
def test_an_interface_has_one_xdp_program(place: Place, first: Any, second: Any) -> None:
    with place.program("xdp") as program, place.program("xdp") as other, place.attach(program, "v1", mode=first):
        found = place.attempt(other.attach, "v1", mode=second)
        generic = (first == "generic", second == "generic")
        # EBUSY where one of the same mode is, EEXIST where one of the other is.
        assert found == (16 if generic[0] == generic[1] else 17)


@pytest.mark.requires("linux-6.6")
def test_what_cannot_be_attached(place: Place) -> None:
    seam = get_backend(place.backend)
    with place.program("xdp") as xdp, place.program("sched_cls") as cls, place.program("socket_filter") as other:
        devmap = place.program("xdp", expected_attach_type="xdp_devmap")
        found = {
            "xdp nowhere": place.attempt(xdp.attach, 99),
            "xdp unknown": place.attempt(xdp.attach, "nothing"),
            "tcx nowhere": place.attempt(cls.attach, 99, "tcx_egress"),
            "native on loopback": place.attempt(xdp.attach, "lo", mode="native"),
            "devmap": place.attempt(devmap.attach, "v0"),
            "both modes": place.attempt(seam.link_create, xdp.fileno(), 2, "xdp", 6),
            "hardware": place.attempt(seam.link_create, xdp.fileno(), 2, "xdp", 8),
            "another flag": place.attempt(seam.link_create, xdp.fileno(), 2, "xdp", 1),
            "cls as xdp": place.attempt(seam.link_create, cls.fileno(), 2, "xdp"),
            "xdp as tcx": place.attempt(seam.link_create, xdp.fileno(), 2, "tcx_ingress"),
            "filter": place.attempt(seam.link_create, other.fileno(), 2, "tcx_ingress"),
            "no program": place.attempt(seam.link_create, 999999, 2, "tcx_ingress"),
            "query nowhere": place.attempt(seam.program_query, 99, "tcx_ingress"),
            "query nothing": place.attempt(seam.program_query, 2, "tcx_ingress"),
        }
        devmap.close()
    assert found == {
        "xdp nowhere": 22, "xdp unknown": 19, "tcx nowhere": 19, "native on loopback": 95, "devmap": 22,
        "both modes": 22, "hardware": 22, "another flag": 22, "cls as xdp": 22, "xdp as tcx": 22, "filter": 22,
        "no program": 9, "query nowhere": 19, "query nothing": Attached(1, (), ()),
    }  # fmt: skip


@pytest.mark.requires("linux-6.6")
def test_traffic_control_programs_have_an_order(place: Place) -> None:
    names = "abcde"
    programs = {name: place.program("sched_cls", name=name) for name in names}
    links = {}

    def order() -> tuple[int, str]:
        attached = place.call(kbpf.attached_programs, "v0", "tcx_ingress", backend=place.backend)
        by_id = {program.id: name for name, program in programs.items()}
        return attached.revision, "".join(by_id[id] for id in attached.program_ids)

    try:
        assert order() == (1, "")
        links["a"] = place.attach(programs["a"], "v0", "tcx_ingress")
        links["b"] = place.attach(programs["b"], "v0", "tcx_ingress")
        links["c"] = place.attach(programs["c"], "v0", "tcx_ingress", before="all")
        links["d"] = place.attach(programs["d"], "v0", "tcx_ingress", after=links["c"])
        assert order() == (5, "cdab")
        assert place.attempt(programs["a"].attach, "v0", "tcx_ingress") == 17
        assert place.attempt(programs["e"].attach, "v0", "tcx_ingress", before=programs["e"]) == 2
        links["d"].update(programs["e"], expected=programs["d"])
        assert order() == (6, "ceab")
        with pytest.raises(kbpf.PermissionDeniedError):
            links["d"].update(programs["d"], expected=programs["a"])
        assert place.attempt(links["d"].update, programs["a"]) == 17
        links["c"].detach()
        assert order() == (7, "eab")
    finally:
        for resource in (*links.values(), *programs.values()):
            resource.close()
    assert place.call(kbpf.attached_programs, "v0", "tcx_ingress", backend=place.backend).revision == 1


def _ways(place: Place) -> list[Any]:
    """Create links with every kind of flags, relatives and revisions beside one that is there; what came of it."""
    bits = (uapi.BPF_F_REPLACE, uapi.BPF_F_BEFORE, uapi.BPF_F_AFTER, uapi.BPF_F_ID, uapi.BPF_F_LINK, 0x80)
    flags = [sum(chosen) for count in range(len(bits)) for chosen in itertools.combinations(bits, count)]
    seam, outcomes = get_backend(place.backend), []
    with ExitStack() as stack:
        one, other = (stack.enter_context(place.program("sched_cls")) for _ in range(2))
        elsewhere = stack.enter_context(place.attach(stack.enter_context(place.program("xdp")), "v1"))
        ways = [(flag, which, 0) for flag in flags for which in range(6)]
        ways += [(flag, 0, revision) for flag in (0, uapi.BPF_F_BEFORE) for revision in (2, 9)]
        for flag, which, revision in ways:
            with place.attach(one, "v0", "tcx_egress") as link:
                by_id, by_link = flag & uapi.BPF_F_ID, flag & uapi.BPF_F_LINK
                # An id taken for a program's may be a link's, and a descriptor that is none may be another's id.
                held: list[Any] = [link, elsewhere] if by_link else [one, other]
                relatives = [0, 1 << 30, *(h.id if by_id else h.fileno() for h in held)]
                relatives += [] if by_id else [one.fileno(), link.fileno()]
                if which >= len(relatives):
                    continue
                relative = relatives[which]
                made = refused = 0
                try:
                    made = place.call(seam.link_create, other.fileno(), 2, "tcx_egress", flag, relative, revision)
                except OSError as error:
                    refused = error.errno or -1
                order = [id == one.id for id in place.call(seam.program_query, 2, "tcx_egress").program_ids]
                outcomes.append((flag, which, revision, refused, order))
                if not refused:
                    seam.close(made)
    return outcomes


@pytest.mark.requires("kernel", "netns")
@pytest.mark.requires("linux-6.6")
def test_every_way_to_say_where_gives_the_same(netns: NetworkNamespace) -> None:
    kernel, emulated = _ways(Place("kernel", netns)), _ways(Place("emulator", None))
    for left, right in zip(kernel, emulated, strict=True):
        assert left == right
    assert {outcome[3] for outcome in kernel} == {0, 2, 9, 22, 34, 116}
    reset()


def test_a_pinned_link_stays(place: Place, request: pytest.FixtureRequest) -> None:
    path = f"/sys/fs/bpf/kbpf_test_link_{id(place)}"
    seam = get_backend(place.backend)
    with place.program("xdp") as program:
        link = place.attach(program, "v1")
        link.pin(path)
        link.close()
        try:
            assert place.attempt(program.attach, "v1") == 16
        finally:
            seam.unpin(path)
        # The kernel lets a link that nobody holds go a moment later.
        while isinstance(found := place.attempt(program.attach, "v1"), int):
            assert found == 16
            time.sleep(0.01)
        found.close()


def test_another_type_of_program_is_refused(place: Place) -> None:
    with place.program("xdp") as program, place.program("sched_cls") as other, place.attach(program, "v1") as link:
        assert place.attempt(link.update, other) == 22
        assert link.attached is program


def test_arguments_that_do_not_fit(place: Place) -> None:
    with place.program("xdp") as xdp, place.program("sched_cls") as cls:
        for function, arguments, keywords in (
            (cls.attach, ("v0",), {}),
            (cls.attach, ("v0", "tcx_ingress"), {"mode": "generic"}),
            (xdp.attach, ("v0",), {"mode": "fast"}),
            (xdp.attach, ("v0",), {"before": "all"}),
            (cls.attach, ("v0", "tcx_ingress"), {"before": "all", "after": "all"}),
        ):
            with pytest.raises(ValueError, match=r"way|mode|before|places"):
                place.call(function, *arguments, **keywords)
