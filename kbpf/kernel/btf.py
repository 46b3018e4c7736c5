"""BTF in the kernel: loaded, read back by id, and the kernel's own types by name. Linux 4.18; CAP_BPF."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from kbpf.info import BtfInfo
from kbpf.kernel import syscall
from kbpf.kernel.attrs import Info, command
from kbpf.kernel.tokens import command_with_token

_TYPE = struct.Struct("=III")


#: BTF kinds: of types that nothing follows in the type section, a word, three, or pairs and triples as counted.
_FOLLOWED_BY = {1: 4, 3: 12, 14: 4, 17: 4}
_FOLLOWED_BY_EACH = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
_KINDS = {"func": 12, "typedef": 8, "struct": 4}
_VMLINUX = Path("/sys/kernel/btf/vmlinux")


class BtfCommands:
    """The BTF's part of the backend."""

    def btf_load(self, blob: bytes) -> int:
        memory = syscall.Buffer(blob)
        return command_with_token("btf_load", btf=memory.address, btf_size=memory.size)

    def btf_info(self, fd: int) -> BtfInfo:
        info = Info("bpf_btf_info", fd)
        return BtfInfo(info["id"], info["btf_size"], info.string("name", "name_len"), bool(info["kernel_btf"]))

    def btf_data(self, fd: int) -> bytes:
        memory = syscall.Buffer(Info("bpf_btf_info", fd)["btf_size"])
        Info("bpf_btf_info", fd, btf=memory.address, btf_size=memory.size)
        return memory.read()


@contextmanager
def loaded_btf(blob: bytes) -> Iterator[int | None]:
    """A descriptor of the loaded blob; what is made with it keeps the BTF alive, so it is closed on leaving.

    None where there is no blob or the kernel does not take it (an older one that lacks a kind of type): maps and
    programs work without.
    """
    if not blob:
        yield None
        return
    try:
        fd = BtfCommands().btf_load(blob)
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
        return BtfCommands().btf_data(fd)
    finally:
        os.close(fd)


@cache
def kernel_type(name: str, kind: Literal["func", "typedef", "struct"]) -> int:
    """The id of the first type of that name and kind in the kernel's BTF.

    ENOENT for none, and for a kernel without BTF. The types are walked over, not parsed: a tenth of a second.
    """
    blob = _VMLINUX.read_bytes()
    header, types, size, strings = struct.unpack_from("=4xIIII", blob)
    wanted = blob.find(b"\0" + name.encode() + b"\0", header + strings) + 1 - header - strings
    at, end, id = header + types, header + types + size, 0
    while wanted > 0 and at < end:
        id += 1
        named, info, _ = _TYPE.unpack_from(blob, at)
        found = info >> 24 & 0x1F
        if named == wanted and found == _KINDS[kind]:
            return id
        at += 12 + _FOLLOWED_BY.get(found, 0) + _FOLLOWED_BY_EACH.get(found, 0) * (info & 0xFFFF)
    raise OSError(errno.ENOENT, f"the kernel's BTF has no {kind} {name}")
