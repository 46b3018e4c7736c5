"""Pins (Linux 4.4), ids (4.13) and descriptors of maps, programs, links (ids: 5.8) and BTF (4.18, ids: 5.1)."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from kbpf.backend import ObjectKind
from kbpf.kernel import syscall
from kbpf.kernel.attrs import Attr, Info, bpffs, command

# How bpf(2) abbreviates them in its commands and attributes.
_PREFIX = {"map": "map", "program": "prog", "link": "link", "btf": "btf"}


class ObjectCommands:
    """The part of the backend that all objects have in common."""

    def close(self, fd: int) -> None:
        os.close(fd)

    def duplicate(self, fd: int) -> int:
        if fd < 0:
            # fcntl.fcntl has an error of another kind for it.
            raise syscall.failure(errno.EBADF)
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)

    def pin(self, fd: int, path: str) -> None:
        memory = _path(path)
        command("obj_pin", pathname=memory.address, bpf_fd=fd)

    def open_pinned(self, path: str, flags: int = 0) -> int:
        memory = _path(path)
        try:
            return command("obj_get", pathname=memory.address, file_flags=flags)
        except PermissionError as error:
            error.filename = path
            raise

    def unpin(self, path: str) -> None:
        Path(path).unlink()

    def pins(self, kind: ObjectKind) -> list[tuple[int, str]]:
        found = []
        folders = (folder for root in bpffs() for folder in os.walk(root))
        for path in (str(Path(folder, name)) for folder, _, names in folders for name in names):
            # A pin may go at any moment, and not all may be opened.
            with suppress(OSError):
                fd = self.open_pinned(path)
                try:
                    found.append((Info(f"bpf_{_PREFIX[kind]}_info", fd)["id"], path))
                finally:
                    os.close(fd)
        return found

    def open_by_id(self, kind: ObjectKind, id: int, flags: int = 0) -> int:
        prefix = _PREFIX[kind]
        return command(f"{prefix}_get_fd_by_id", open_flags=flags, **{f"{prefix}_id": id})

    def ids(self, kind: ObjectKind) -> list[int]:
        found: list[int] = []
        while True:
            attr = Attr(f"{_PREFIX[kind]}_get_next_id", start_id=found[-1] if found else 0)
            try:
                attr.issue()
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return found
                raise
            found.append(attr["next_id"])


def _path(path: str) -> syscall.Buffer:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("a path has no NUL byte")
    return syscall.Buffer(encoded + b"\0")
