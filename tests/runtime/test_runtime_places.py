"""Programs on socket maps and network namespaces, by links."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf.backend import BackendName
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace

RETURNS_1 = (Instruction(ebpf.ALU64 | ebpf.MOV, imm=1), Instruction(ebpf.JMP | ebpf.EXIT))
SOCKETS = MapSpec(type="sockmap", key_size=4, value_size=4, max_entries=2)


def program(type: str, attach_type: str | None = None, backend: str = "kernel") -> kbpf.Program:
    spec = ProgramSpec(type=type, instructions=RETURNS_1, expected_attach_type=attach_type)
    return kbpf.load_program(spec, backend=backend)


@pytest.mark.parametrize(
    "backend",
    ["emulator", pytest.param("kernel", marks=[pytest.mark.requires("kernel"), pytest.mark.requires("linux-6.10")])],
)
@pytest.mark.parametrize(("type", "place"), [("sk_skb", "sk_skb_stream_verdict"), ("sk_msg", "sk_msg_verdict")])
def test_a_socket_map_has_a_program_as_long_as_the_link(type: str, place: str, backend: BackendName) -> None:
    first, second = (program(type, place, backend) for _ in range(2))
    with kbpf.Map.create(SOCKETS, backend) as map, first, second:
        with first.attach(map) as link:
            assert (link.info.type, link.info.attach_type) == ("sockmap", place)
            assert link.info.details == {"map_id": map.id}
            with pytest.raises(kbpf.BpfError) as refused:
                second.attach(map)
            assert refused.value.errno == errno.EBUSY
            link.update(second)
            assert link.info.program_id == second.id
            assert link.detach()
            assert not link.detach()
        with second.attach(map, place) as link:
            assert link.info.program_id == second.id


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("type", ["flow_dissector", "sk_lookup"])
def test_a_network_namespace_has_a_program_as_long_as_the_link(type: str) -> None:
    with NetworkNamespace() as namespace, program(type, type) as loaded:

        def attached() -> tuple[str, str, object, bool]:
            with loaded.attach("/proc/thread-self/ns/net") as link:
                info = link.info
                own = Path("/proc/thread-self/ns/net").stat().st_ino
                return info.type, info.attach_type, info.details == {"netns_ino": own}, link.detach()

        assert namespace.call(attached) == ("netns", type, True, True)
    with program(type, type) as loaded, pytest.raises(kbpf.BpfError) as refused:
        loaded.attach("/no/such/namespace")
    assert refused.value.errno == errno.ENOENT


def test_what_the_emulator_attaches_nowhere_is_said_by_name() -> None:
    with program("sk_lookup", "sk_lookup", "emulator") as loaded, pytest.raises(kbpf.NotSupportedError, match="yet"):
        loaded.attach("/proc/self/ns/net")


@pytest.mark.requires("kernel", "netns")
@pytest.mark.requires("linux-6.4")
def test_a_netfilter_hook_has_a_program_as_long_as_the_link() -> None:
    hook = kbpf.Netfilter(family="ipv6", hook="local_in", priority=-1)

    def attached(backend: str) -> tuple[str, object, str, bool, bool]:
        with program("netfilter", "netfilter", backend) as loaded, loaded.attach(hook) as link:
            info = link.info
            with pytest.raises(kbpf.BpfError, match=r"attach program .* to Netfilter\(family='ipv6'") as refused:
                loaded.attach(hook)
            assert refused.value.errno == errno.EBUSY
            return info.type, info.details, type(link).__name__, link.detach(), link.detach()

    details = {"pf": 10, "hooknum": 1, "priority": -1, "flags": 0}
    with NetworkNamespace() as namespace:
        assert namespace.call(attached, "kernel") == ("netfilter", details, "BpfLink", True, False)
    assert attached("emulator") == ("netfilter", details, "BpfLink", True, False)


@pytest.mark.parametrize(
    "wrong", [{"family": "bridge"}, {"hook": "ingress"}, {"priority": 1 << 31}, {"priority": -(1 << 31) - 1}]
)
def test_what_is_no_netfilter_hook(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kbpf.Netfilter(**{"family": "ipv4", "hook": "local_in", "priority": 0, **wrong})


@pytest.mark.requires("kernel")
def test_a_program_and_a_map_of_two_backends_do_not_mix() -> None:
    map, loaded = kbpf.Map.create(SOCKETS, "emulator"), program("sk_skb", "sk_skb_stream_verdict")
    with map, loaded, pytest.raises(ValueError, match="emulator"):
        loaded.attach(map)
