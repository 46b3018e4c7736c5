"""bcc's dialect, compiled by the real bcc and run on the live kernel."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kbpf.bcc
from kbpf.errors import MissingDependencyError, NotSupportedError, ObjectError, PermissionDeniedError, VerifierError
from kbpf.kernel import bcc as kernel_bcc
from kbpf.runtime.attach import packet_socket
from kbpf.runtime.backends import use_backend
from kbpf.runtime.collection import Collection
from kbpf.testing.network import NetworkNamespace

#: Bytes per IP protocol, after the kernel's first socket filter sample, counted once on loopback.
SOCKEX1 = """
#include <bcc/proto.h>

struct flow { u32 source; u32 destination; u16 port; u8 protocol; u8 spare[5]; };

BPF_ARRAY(bytes, u64, 256);
BPF_HASH(flows, struct flow, u64, 1000);
BPF_PERCPU_ARRAY(packets, u32, 1);

int count(struct __sk_buff *skb) {
    u8 *cursor = 0;
    if (skb->pkt_type == 4)
        return 0;
    struct ethernet_t *ethernet = cursor_advance(cursor, sizeof(*ethernet));
    if (ethernet->type != 0x0800)
        return 0;
    struct ip_t *ip = cursor_advance(cursor, sizeof(*ip));
    int protocol = ip->nextp;
    u64 *value = bytes.lookup(&protocol);
    if (value)
        lock_xadd(value, skb->len);
    struct flow flow = {.source = ip->src, .destination = ip->dst, .protocol = protocol};
    flows.increment(flow);
    packets.increment(0);
    return 0;
}
"""

pytestmark = pytest.mark.requires("bcc", "kernel")


def open_descriptors() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


@pytest.fixture(scope="module")
def sockex1() -> Iterator[Collection]:
    with kbpf.bcc.load(SOCKEX1) as collection:
        yield collection


@pytest.mark.requires("netns")
def test_sockex1_counts_the_bytes_that_were_sent(sockex1: Collection, netns: NetworkNamespace) -> None:
    maps = sockex1.maps
    # Nobody else's traffic is on the loopback of a namespace of its own.
    with netns.call(packet_socket, "lo") as watched, sockex1.programs["count"].attach(watched):
        before = maps["bytes"][socket.IPPROTO_UDP]
        with (
            netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
            netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            receiver.bind(("127.0.0.1", 0))
            for size in (1, 100, 1000):
                sender.sendto(bytes(size), receiver.getsockname())
                receiver.recv(2048)
        assert maps["bytes"][socket.IPPROTO_UDP] - before == 1101 + 3 * (14 + 20 + 8)
    assert maps["packets"][0].sum() >= 3
    local = int.from_bytes(socket.inet_aton("127.0.0.1"), "big")
    [flow] = [flow for flow in maps["flows"] if flow.protocol == socket.IPPROTO_UDP]
    assert (flow.source, flow.destination) == (local, local)


def test_programs_know_their_maps(sockex1: Collection) -> None:
    assert set(sockex1.programs["count"].maps) == set(sockex1.maps.values())
    assert sockex1.backend == "kernel"


def test_bcc_lets_go_and_nothing_stays_open() -> None:
    before = open_descriptors()
    source = "BPF_ARRAY(one, u32, 1);\nint f(struct __sk_buff *skb) { return 0; }"
    collection = kbpf.bcc.load(source)
    assert len(open_descriptors()) == len(before) + 2
    collection.maps["one"][0] = 5
    assert collection.maps["one"][0] == 5
    collection.close()
    with pytest.raises(VerifierError) as refused:
        kbpf.bcc.load("BPF_ARRAY(one, u32, 1);\nint f(struct __sk_buff *skb) { return *(int *)(long)skb->mark; }")
    assert refused.value.log
    gc.collect()
    assert open_descriptors() == before


def test_source_that_does_not_compile_gives_the_compilers_words(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ObjectError, match="use of undeclared identifier 'missing'"):
        kbpf.bcc.load("int f(struct __sk_buff *skb) { return missing; }")
    assert capfd.readouterr().err == ""


def test_other_program_types_and_compiler_flags_are_the_callers() -> None:
    source = "int drop(struct xdp_md *ctx) { return VERDICT; }"
    with kbpf.bcc.load(source, program_types={"drop": "xdp"}, cflags=["-DVERDICT=XDP_DROP"]) as collection:
        assert collection.programs["drop"].type == "xdp"
        assert collection.programs["drop"].run(bytes(64)).value == 1
    with pytest.raises(ValueError, match="no function nope"):
        kbpf.bcc.load(source, program_types={"nope": "xdp"}, cflags=["-DVERDICT=0"])


def test_only_bccs_own_folder_is_imported(sockex1: Collection) -> None:
    place = kernel_bcc.find_bcc()
    assert place is not None
    assert str(place.parent) not in sys.path
    assert Path(sys.modules["bcc"].__file__ or "").parent == place


def test_the_working_directory_and_the_environment_stay() -> None:
    folder, variable = Path.cwd(), os.environ.get("BCC_KERNEL_SOURCE")
    with kbpf.bcc.load("int f(struct __sk_buff *skb) { return 0; }"):
        assert (Path.cwd(), os.environ.get("BCC_KERNEL_SOURCE")) == (folder, variable)


def test_the_emulator_asked_for_by_name_is_refused() -> None:
    with use_backend("emulator"), pytest.raises(NotSupportedError, match="bcc"):
        kbpf.bcc.load(SOCKEX1)


def test_what_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bcc, "find_headers", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"headers.*install"):
        kbpf.bcc.load("int f(void *skb) { return 0; }")
    kernel_bcc.import_bcc.cache_clear()
    monkeypatch.setattr(kernel_bcc, "find_bcc", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"bcc is not installed: .*install"):
        kbpf.bcc.load("int f(void *skb) { return 0; }")
    kernel_bcc.import_bcc.cache_clear()


def test_without_permission_it_is_refused_before_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbpf.kernel.probes.may_use_bpf", lambda program_type=None: False)
    with pytest.raises(PermissionDeniedError):
        kbpf.bcc.load(SOCKEX1)


def test_importing_the_door_does_notimport_bcc() -> None:
    script = "import kbpf.bcc, sys; assert 'bcc' not in sys.modules and 'ctypes' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
