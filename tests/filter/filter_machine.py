"""A classic BPF machine of a few lines, apart from kbpf's own, and libpcap through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

M32 = 0xFFFFFFFF
NET_OFF, LL_OFF, AD_OFF = 0xFFF00000, 0xFFE00000, 0xFFFFF000

Program = Sequence[Sequence[int]]


@dataclass
class Packet:
    """The bytes of a frame, and where in it the socket's data, the network and the link header begin."""

    frame: bytes
    start: int = 0
    network: int | None = None
    link: int | None = None
    metadata: Mapping[int, int] = field(default_factory=dict)
    #: Instructions that the last run executed.
    steps: int = 0


class Rejected(Exception):
    pass


def run(program: Program, packet: Packet | bytes) -> int:
    """The program's verdict, with the kernel's semantics."""
    if isinstance(packet, bytes):
        packet = Packet(packet)
    try:
        return _run(program, packet)
    except Rejected:
        return 0


def _word(packet: Packet, k: int, size: int, absolute: bool) -> int:
    if absolute and k >= AD_OFF:
        return packet.metadata[k - AD_OFF]
    if k >= NET_OFF:
        base, k = packet.network, k - NET_OFF
    elif k >= LL_OFF:
        base, k = packet.link, k - LL_OFF
    else:
        base = packet.start
    if base is None or base + k + size > len(packet.frame):
        raise Rejected
    return int.from_bytes(packet.frame[base + k : base + k + size], "big")


def _run(program: Program, packet: Packet) -> int:
    a = x = pc = 0
    scratch: dict[int, int] = {}
    packet.steps = 0
    while True:
        code, jt, jf, k = program[pc]
        pc += 1
        packet.steps += 1
        assert packet.steps < 100_000
        kind, size = code & 7, {0x00: 4, 0x08: 2, 0x10: 1}.get(code & 0x18, 4)
        operand = x if code & 8 else k
        if code == 0x06:
            return k
        if kind == 0 and code & 0xE0 == 0x20:
            a = _word(packet, k, size, True)
        elif kind == 0 and code & 0xE0 == 0x40:
            a = _word(packet, x + k & M32, size, False)
        elif code == 0xB1:
            x = (_word(packet, k, 1, True) & 15) << 2
        elif code == 0x00:
            a = k
        elif code == 0x01:
            x = k
        elif code == 0x80:
            a = len(packet.frame) - packet.start
        elif code in (0x60, 0x61):
            a, x = (scratch[k], x) if code == 0x60 else (a, scratch[k])
        elif code in (0x02, 0x03):
            scratch[k] = a if code == 0x02 else x
        elif code == 0x07:
            x = a
        elif code == 0x87:
            a = x
        elif code == 0x05:
            # libpcap's own protochain jumps back.
            pc += k - (1 << 32) if k >> 31 else k
        elif kind == 5:
            true = {0x10: a == operand, 0x20: a > operand, 0x30: a >= operand, 0x40: bool(a & operand)}[code & 0xF0]
            pc += jt if true else jf
        elif code == 0x84:
            a = -a & M32
        elif kind == 4:
            a = _alu(code & 0xF0, a, operand)
        else:
            raise AssertionError(f"opcode {code:#x}")


def _alu(operation: int, a: int, b: int) -> int:
    if operation in (0x30, 0x90) and b == 0:
        raise Rejected
    result = {
        0x00: lambda: a + b,
        0x10: lambda: a - b,
        0x20: lambda: a * b,
        0x30: lambda: a // b,
        0x40: lambda: a | b,
        0x50: lambda: a & b,
        0x60: lambda: a << (b & 31),
        0x70: lambda: a >> (b & 31),
        0x90: lambda: a % b,
        0xA0: lambda: a ^ b,
    }[operation]()
    return result & M32


class _Insn(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class _Program(ctypes.Structure):
    _fields_ = [("bf_len", ctypes.c_uint), ("bf_insns", ctypes.POINTER(_Insn))]


def libpcap(expression: str, dlt: int, optimize: bool = False) -> list[tuple[int, int, int, int]] | None:
    """What libpcap compiles the expression to, None where it refuses."""
    library = ctypes.CDLL("libpcap.so.0.8")
    library.pcap_open_dead.restype = ctypes.c_void_p
    library.pcap_compile.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(_Program),
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint,
    ]
    library.pcap_close.argtypes = [ctypes.c_void_p]
    handle = library.pcap_open_dead(dlt, 262144)
    program = _Program()
    try:
        if library.pcap_compile(handle, ctypes.byref(program), expression.encode(), int(optimize), M32) != 0:
            return None
        instructions = [program.bf_insns[i] for i in range(program.bf_len)]
        found = [(i.code, i.jt, i.jf, i.k) for i in instructions]
        library.pcap_freecode(ctypes.byref(program))
        return found
    finally:
        library.pcap_close(handle)
