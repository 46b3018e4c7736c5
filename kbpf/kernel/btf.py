"""BTF blobs in the kernel: loaded for a moment, read back by id. Linux 4.18; CAP_BPF."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kbpf.kernel import syscall
from kbpf.kernel.attrs import Info, command


@contextmanager
def loaded_btf(blob: bytes) -> Iterator[int | None]:
    """A descriptor of the loaded blob; what is made with it keeps the BTF alive, so it is closed on leaving.

    None where there is no blob or the kernel does not take it (an older one that lacks a kind of type): maps and
    programs work without.
    """
    if not blob:
        yield None
        return
    memory = syscall.Buffer(blob)
    try:
        fd = command("btf_load", btf=memory.address, btf_size=memory.size)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def read_btf(id: int) -> bytes:
    """The raw BTF with this id; empty where it may not be read (opening by id needs CAP_SYS_ADMIN)."""
    try:
        fd = command("btf_get_fd_by_id", btf_id=id)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOENT):
            return b""
        raise
    try:
        memory = syscall.Buffer(Info("bpf_btf_info", fd)["btf_size"])
        Info("bpf_btf_info", fd, btf=memory.address, btf_size=memory.size)
        return memory.read()
    finally:
        os.close(fd)
