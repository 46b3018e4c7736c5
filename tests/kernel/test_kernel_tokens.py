"""Tokens: a process in a user namespace uses maps and programs that a BPF file system delegates to it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbpf.kernel import tokens
from kbpf.uapi.constants import BPF_F_TOKEN_FD

pytestmark = pytest.mark.requires("kernel")

#: The same on every machine but a few: fsconfig(2) in the parent; fsopen, fsmount and move_mount in the child.
FSCONFIG = 431
SET_STRING, CREATE = 1, 6

CHILD = """
import ctypes, errno, json, os, socket, sys
door = socket.socket(fileno=int(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
    raise OSError(ctypes.get_errno(), "unshare")
door.send(b"unshared")
assert door.recv(10) == b"mapped"
filesystem = call(430, b"bpf", 1)
socket.send_fds(door, [b"made"], [filesystem])
assert door.recv(10) == b"delegated"
mount = call(432, filesystem, 1, 0)
call(429, mount, b"", -100, b"/sys/fs/bpf", 4)

import kbpf
from kbpf.kernel import probes
from kbpf.kernel.tokens import token_create

def outcome(function):
    try:
        with function() as made:
            return [made.backend, made.type]
    except kbpf.BpfError as error:
        return errno.errorcode[error.errno]

def map(type, **where):
    return kbpf.Map.create(kbpf.MapSpec(type=type, key_size=4, value_size=4, max_entries=1), **where)

def program(type):
    code = bytes.fromhex("b7000000000000009500000000000000")
    return kbpf.load_program(kbpf.ProgramSpec(type=type, instructions=code))

os.close(token_create("/sys/fs/bpf"))
told = {
    "maps": probes.may_use_bpf(),
    "hash": outcome(lambda: map("hash", backend="kernel")),
    "lru_hash": outcome(lambda: map("lru_hash", backend="kernel")),
    "socket_filter": outcome(lambda: program("socket_filter")),
    # In auto: the emulator where the kernel would refuse.
    "xdp": outcome(lambda: program("xdp")),
}
os.environ["LIBBPF_BPF_TOKEN_PATH"] = ""
told["without"] = outcome(lambda: map("hash", backend="kernel"))
os.environ["LIBBPF_BPF_TOKEN_PATH"] = "/nonexistent"
told["elsewhere"] = outcome(lambda: map("hash", backend="kernel"))
print(json.dumps(told))
"""


def configure(filesystem: int, command: int, key: str | None = None, value: str | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [None if text is None else text.encode() for text in (key, value)]
    if libc.syscall(FSCONFIG, filesystem, command, *arguments, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def in_a_container(**delegated: str) -> dict[str, Any]:
    """What the child tells, in a user namespace whose /sys/fs/bpf delegates this to it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-W", "ignore", "-c", CHILD, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True) as child:
            theirs.close()
            assert ours.recv(10) == b"unshared"
            for kind in ("uid_map", "gid_map"):
                Path(f"/proc/{child.pid}/{kind}").write_text("0 0 1")
            ours.send(b"mapped")
            _, [filesystem], _, _ = socket.recv_fds(ours, 10, 1)
            try:
                for what, value in delegated.items():
                    configure(filesystem, SET_STRING, f"delegate_{what}", value)
                configure(filesystem, CREATE)
            finally:
                os.close(filesystem)
            ours.send(b"delegated")
            assert child.stdout is not None
            told: dict[str, Any] = json.loads(child.stdout.read())
    return told


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64", "riscv64"), reason="numbers of system calls")
@pytest.mark.requires("linux-6.9")
def test_what_is_delegated_is_used_without_being_asked_for() -> None:
    assert in_a_container(cmds="any", maps="any", progs="any", attachs="any") == {
        "maps": True,
        "hash": ["kernel", "hash"],
        "lru_hash": ["kernel", "lru_hash"],
        "socket_filter": ["kernel", "socket_filter"],
        "xdp": ["kernel", "xdp"],
        "without": "EPERM",
        "elsewhere": "ENOENT",
    }


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64", "riscv64"), reason="numbers of system calls")
@pytest.mark.requires("linux-6.9")
def test_what_is_not_delegated_is_refused() -> None:
    some = in_a_container(
        cmds="map_create:prog_load", maps="hash:array", progs="socket_filter", attachs="cgroup_inet_ingress"
    )
    assert (some["maps"], some["hash"], some["lru_hash"]) == (True, ["kernel", "hash"], "EPERM")
    assert (some["socket_filter"], some["xdp"]) == (["kernel", "socket_filter"], ["emulator", "xdp"])


@pytest.mark.requires("linux-6.9")
def test_the_first_user_namespace_has_no_tokens() -> None:
    with pytest.raises(OSError) as refused:
        tokens.token_create("/sys/fs/bpf")
    assert refused.value.errno == 95  # EOPNOTSUPP


def test_a_token_is_sent_with_its_flag_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    made = iter_descriptors()
    monkeypatch.setattr(tokens, "in_initial_user_namespace", lambda: False)
    monkeypatch.setattr(tokens, "token_create", lambda path: next(made))
    monkeypatch.setattr(tokens, "command", lambda name, /, **values: sent.append((name, values)) or 3)
    for name, prefix in (("map_create", "map"), ("prog_load", "prog"), ("btf_load", "btf")):
        assert tokens.command_with_token(name, **{f"{prefix}_flags": 1}) == 3
        _, values = sent[-1]
        assert values[f"{prefix}_flags"] == BPF_F_TOKEN_FD | 1
        with pytest.raises(OSError):
            os.fstat(values[f"{prefix}_token_fd"])


def iter_descriptors() -> Iterator[int]:
    while True:
        yield os.open("/dev/null", os.O_RDONLY)
