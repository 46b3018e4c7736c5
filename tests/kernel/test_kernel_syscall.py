"""The door itself: what is sent, and what is tried again."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

import pytest

from kbpf.kernel import syscall

Call = Callable[[int, int, int, int], int]


def answers(monkeypatch: pytest.MonkeyPatch, *results: int) -> list[tuple[int, int]]:
    """Let bpf(2) give these results, negative ones being errnos; returns what it is called with."""
    calls: list[tuple[int, int]] = []
    left = list(results)

    def call(number: int, command: int, address: int, size: int) -> int:
        calls.append((command, size))
        result = left.pop(0)
        if result < 0:
            ctypes.set_errno(-result)
            return -1
        return result

    monkeypatch.setattr(syscall, "_syscall", call)
    return calls


def test_attributes_are_sent_as_far_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answers(monkeypatch, 3, 0, 0)
    assert syscall.bpf(5, bytearray(b"\1" + bytes(167))) == 3
    syscall.bpf(5, bytearray(bytes(20) + b"\1" + bytes(147)))
    syscall.bpf(5, bytearray(168))
    assert [size for _, size in calls] == [8, 24, 0]


def test_an_interrupted_call_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answers(monkeypatch, *[-errno.EINTR] * 20, 0)
    assert syscall.bpf(10, bytearray(8)) == 0
    assert len(calls) == 21


def test_eagain_is_tried_a_few_times_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(answers(monkeypatch, -errno.EAGAIN, -errno.EAGAIN, 7)) == 0
    assert syscall.bpf(5, bytearray(8)) == 7
    calls = answers(monkeypatch, *[-errno.EAGAIN] * 20)
    with pytest.raises(BlockingIOError):
        syscall.bpf(5, bytearray(8))
    assert 3 <= len(calls) <= 10


def test_errors_are_the_builtin_ones_for_their_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, -errno.EPERM, -524)
    with pytest.raises(PermissionError):
        syscall.bpf(5, bytearray(8))
    with pytest.raises(OSError, match="not supported") as raised:
        syscall.bpf(5, bytearray(8))
    assert raised.value.errno == 524


def test_the_number_is_this_machines() -> None:
    expected = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
    machine = os.uname().machine
    if machine not in expected or ctypes.sizeof(ctypes.c_void_p) == 4:
        pytest.skip(f"no expectation for {machine}")
    assert expected[machine] == syscall._SYS_BPF
