"""What descriptors of the real operating system stand for: files, processes, control groups."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from kbpf.emulator.maps.base import refused


def file_behind(descriptor: int) -> os.stat_result:
    """What fstat(2) says; EBADF."""
    try:
        return os.fstat(descriptor)
    except (OSError, OverflowError):
        raise refused(errno.EBADF) from None


def described(descriptor: int) -> dict[str, str]:
    """What procfs says of an open descriptor; EBADF."""
    file_behind(descriptor)
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def group_behind(descriptor: int, *kinds: str) -> int:
    """The id of the group whose directory, in a file system of these kinds, is open; EBADF."""
    mount, file = described(descriptor).get("mnt_id"), file_behind(descriptor)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        own, _, kind = line.partition(" - ")
        if own.split()[0] == mount and kind.split()[0] in kinds and stat.S_ISDIR(file.st_mode):
            return file.st_ino
    raise refused(errno.EBADF)
