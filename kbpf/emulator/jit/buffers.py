"""Where the bytes of Python's buffers are in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kbpf.emulator.memory import Buffer


def host_address(buffer: Buffer) -> tuple[int, object]:
    """Where a buffer's bytes are, and what keeps them there; 0 and None for a view that may only be read."""
    if isinstance(buffer, bytes):
        return ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p).value or 0, buffer
    try:
        held = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    except (TypeError, ValueError):
        return 0, None
    return ctypes.addressof(held), held


_NEW = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of CPython's C API, which is documented."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


@contextmanager
def read_address(buffer: Any) -> Iterator[int]:
    """Where the bytes of any contiguous buffer are, to be read meanwhile. Raises `BufferError` or `TypeError`."""
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(view), 0)
    try:
        yield view.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def unwritten(size: int) -> bytes:
    """A bytes object for native code to write into, at `read_address`, before anything else sees it."""
    made: bytes = _NEW(None, size)
    return made
