"""Sockets that run the hooks of their control group, on the kernel and in the emulator: a scenario sees the same."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from groups import Nested, emulated_groups, real_groups
from hooks import CONTEXT, Recorder, returns, whole
from sides import Side

from kbpf import emulator as emulated
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import ProgramSpec
from kbpf.uapi.structs import STRUCTS

I = Instruction  # noqa: E741
INET4, INET6 = socket.AF_INET, socket.AF_INET6
HERE = {INET4: "127.0.0.1", INET6: "::1"}
ADDR = STRUCTS["bpf_sock_addr"].fields


class World(NamedTuple):
    """One side: its groups, how it makes sockets, and what it must close."""

    side: Side
    groups: Nested
    socket: Callable[..., Any]
    stack: ExitStack

    def open(self, family: int = INET4, type: int = socket.SOCK_DGRAM) -> Any:
        return self.keep(self.socket(family, type))

    def keep(self, made: Any) -> Any:
        made.settimeout(0.2)
        return self.stack.enter_context(made)

    def record(self, type: str, hook: str, steps: Sequence[Sequence[Instruction]], value: int = 1) -> Recorder:
        recorder = self.stack.enter_context(Recorder(self.side, type, hook, steps, value))
        link = self.groups.attach(recorder.fd, hook)
        self.stack.callback(self.side.backend.close, link)
        return recorder

    def attach(self, type: str, hook: str, code: Sequence[Instruction]) -> int:
        fd = self.side.backend.program_load(
            ProgramSpec(type=type, instructions=tuple(code), expected_attach_type=hook), []
        )
        link = self.groups.attach(fd, hook)
        self.side.backend.close(fd)
        self.stack.callback(self.side.backend.close, link)
        return link


@contextmanager
def two_worlds(kernel: Side, emulator: Side) -> Iterator[tuple[World, World]]:
    """The kernel's and the emulator's."""
    emulated.reset()
    with ExitStack() as stack:
        real, ours = stack.enter_context(real_groups(kernel)), stack.enter_context(emulated_groups(emulator))
        with ExitStack() as first, ExitStack() as second:
            yield World(kernel, real, socket.socket, first), World(emulator, ours, emulated.socket, second)


def free_ports(family: int, count: int, type: int = socket.SOCK_DGRAM) -> list[int]:
    """Ports that nobody has on the kernel's side, nor in the emulator."""
    with ExitStack() as stack:
        ends = [stack.enter_context(socket.socket(family, type)) for _ in range(count)]
        for end in ends:
            end.bind((HERE[family], 0))
        return [end.getsockname()[1] for end in ends]


def said(call: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, or the errno or the time out that it ends with."""
    try:
        return call(*arguments)
    except TimeoutError:
        return "nothing came"
    except OSError as error:
        return error.errno


def same(worlds: tuple[World, World], scenario: Callable[[World], Any]) -> Any:
    truth, found = (scenario(world) for world in worlds)
    assert found == truth
    return truth


def address_of(version: int, *more: str) -> list[list[Instruction]]:
    return whole("bpf_sock_addr", "user_family", "family", "type", "protocol", f"user_ip{version}", "user_port", *more)


def replace(version: int, words: Sequence[int], port: int | None = None) -> list[Instruction]:
    """Put another address in its place."""
    code = [I(ebpf.ALU64 | ebpf.MOV | ebpf.X, CONTEXT, 1)]
    start = ADDR[f"user_ip{version}"].offset
    stores = [(start + 4 * at, word) for at, word in enumerate(words)]
    if port is not None:
        stores.append((ADDR["user_port"].offset, socket.htons(port)))
    for offset, value in stores:
        code += [*ld_imm64(1, value), I(ebpf.STX | ebpf.MEM | ebpf.W, CONTEXT, 1, offset)]
    return [*code, *returns(1)]
