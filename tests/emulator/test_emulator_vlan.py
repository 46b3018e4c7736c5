"""VLAN frames through the programs of interfaces: tags in the bytes and beside them, as on Linux."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mapcode import call, copy, mov
from networld import FRAME, METADATA, Machine, compare, machines, redirect, returns, watch

pytestmark = [pytest.mark.requires("kernel"), pytest.mark.requires("netns")]


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Machine, Machine]]:
    with machines() as made:
        yield made


#: Behind the addresses.
TAGGED = {
    "802.1Q": "8100 6064",
    "a priority": "8100 2000",
    "802.1ad": "88a8 0005",
    "two tags": "88a8 0005 8100 6064",
    "two of one kind": "8100 0001 8100 0002",
    "three tags": "88a8 0005 8100 6064 8100 0007",
}


def tagged(name: str) -> bytes:
    return FRAME[:12] + bytes.fromhex(TAGGED[name]) + FRAME[12:]


PUSH = [*copy(1, 9), *mov(2, 0x0081), *mov(3, 0x2042), *call("skb_vlan_push")]
POP = [*copy(1, 9), *call("skb_vlan_pop")]
CHANGES = {"nothing": [], "pop": POP, "push": PUSH, "pop twice": [*POP, *POP], "pop and push": [*POP, *PUSH]}


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize(("place", "mode"), [("tcx_egress", None), ("xdp", "generic"), ("xdp", "native")])
def test_what_programs_see_of_tags(both: Any, name: str, place: str, mode: str | None) -> None:
    def setup(machine: Machine) -> None:
        if mode:
            machine.hook("v1", "xdp", returns(2), 1, mode=mode)
        watch(machine, "v0", "v1")

    found = compare(both, setup, frame=tagged(name), native=mode == "native")
    assert found.received["v1"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize(("device", "place"), [("v0", "tcx_egress"), ("v1", "tcx_ingress")])
def test_tags_that_programs_change(both: Any, device: str, place: str, name: str, change: str) -> None:
    def setup(machine: Machine) -> None:
        machine.hook(device, place, [*METADATA, *CHANGES[change], *returns(-1)], 1)
        watch(machine, "v0", "v1")

    compare(both, setup, frame=tagged(name))


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["802.1Q", "two tags"])
def test_tags_of_redirected_packets(both: Any, name: str, change: str, flags: int) -> None:
    def setup(machine: Machine) -> None:
        machine.hook("v1", "tcx_ingress", [*CHANGES[change], *redirect("w0", flags)], 1)
        watch(machine, "v1", "w0", "w1")

    compare(both, setup, frame=tagged(name))


@pytest.mark.parametrize("mode", ["generic", "native"])
@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("action", ["back", "redirected"])
def test_tags_of_frames_that_xdp_sends(both: Any, name: str, mode: str, action: str) -> None:
    def setup(machine: Machine) -> None:
        machine.hook("v1", "xdp", returns(3) if action == "back" else redirect("w0"), 1, mode=mode)
        for device in ("v0", "w1"):
            machine.hook(device, "xdp", returns(2), 2, mode="native")
        watch(machine, "v0", "w1")

    compare(both, setup, frame=tagged(name), native=True)
