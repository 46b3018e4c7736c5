"""What the kernel backend knows beyond an errno reaches the user."""

from __future__ import annotations

import socket

import pytest

import kbpf


def test_a_filter_that_would_never_run_is_refused_with_the_reason() -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with first, second, pytest.raises(kbpf.NotSupportedError) as raised:
        kbpf.attach(first, kbpf.Filter([(6, 0, 0, 0)]))
    assert "EOPNOTSUPP" in str(raised.value)
    assert "Linux never runs a filter on a UNIX stream socket" in str(raised.value)
