"""Listings are libpcap's, to the space."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from kbpf.asm.listing import line, listing
from kbpf.isa.cbpf import AD_OFF, Instruction

IP_TCP = [(0x28, 0, 0, 12), (0x15, 0, 3, 0x800), (0x30, 0, 0, 23), (0x15, 0, 1, 6), (6, 0, 0, 262144), (6, 0, 0, 0)]


def test_the_three_styles() -> None:
    assert listing(IP_TCP).splitlines()[:2] == ["(000) ldh      [12]", "(001) jeq      #0x800           jt 2\tjf 5"]
    assert listing(IP_TCP, "dd").splitlines()[1] == "{ 0x15, 0, 3, 0x00000800 },"
    assert listing(IP_TCP, "ddd").splitlines()[:3] == ["6", "40 0 0 12", "21 0 3 2048"]


def test_ancillary_loads_go_by_name() -> None:
    assert line(0, (0x20, 0, 0, AD_OFF + 4)) == "(000) ld       [type]"


@pytest.mark.requires("libpcap")
def test_every_opcode_reads_as_libpcap_prints_it() -> None:
    class Insn(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]

    image = ctypes.CDLL("libpcap.so.0.8").bpf_image
    image.restype = ctypes.c_char_p
    image.argtypes = [ctypes.POINTER(Insn), ctypes.c_int]
    operands = (0, 1, 32, 0x7FFFFFFF, 0x80000000, 0xFFE00001, 0xFFF00009, *range(AD_OFF, AD_OFF + 72, 4), 0xFFFFFFFF)
    for code in range(256):
        for k in operands:
            expected = image(ctypes.byref(Insn(code, 3, 255, k)), 5).decode()
            assert line(5, Instruction(code, 3, 255, k)) == expected


@pytest.mark.requires("tcpdump")
@pytest.mark.parametrize("style", ["d", "dd", "ddd"])
def test_a_whole_listing_is_tcpdumps(style: str) -> None:
    def tcpdump(option: str) -> str:
        command = ["tcpdump", "-y", "EN10MB", option, "tcp and dst port 7070"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    numbers = [Instruction(*map(int, text.split())) for text in tcpdump("-ddd").splitlines()[1:]]
    assert listing(numbers, style) == tcpdump(f"-{style}")
