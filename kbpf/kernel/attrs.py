"""``union bpf_attr`` and the info structures, packed and read by the names that linux/bpf.h gives their members."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kbpf.backend import LacksFeature
from kbpf.kernel import syscall
from kbpf.uapi.enums import COMMANDS
from kbpf.uapi.structs import ATTRS, STRUCTS, Struct

# What the kernel calls the files behind the descriptors that each info structure tells of.
_FILES = {
    "bpf_map_info": ("bpf-map",),
    "bpf_prog_info": ("bpf-prog",),
    # The one that made it, and those by id and from pins.
    "bpf_link_info": ("bpf_link", "bpf-link"),
    "bpf_btf_info": ("btf",),
}
# How a kernel refuses what it does not know.
_UNKNOWN = (errno.EINVAL, errno.E2BIG)


def pack(layout: Struct, values: dict[str, int | bytes]) -> bytearray:
    """A structure with these members set and all others 0."""
    data = bytearray(layout.size)
    for name, value in values.items():
        field = layout.fields[name]
        if isinstance(value, int):
            try:
                value = value.to_bytes(field.size, sys.byteorder, signed=value < 0)
            except OverflowError:
                raise ValueError(f"{name}: {value!r} does not fit {field.size} bytes") from None
        data[field.offset : field.offset + len(value)] = value
    return data


def member(layout: Struct, data: bytes | bytearray, name: str) -> int:
    """An integer member; 0 where `data` comes from a kernel that did not have it yet."""
    offset, size, _, bits, shift = layout.fields[name]
    value = int.from_bytes(data[offset : offset + size], sys.byteorder)
    return value >> shift & ((1 << bits) - 1) if bits else value


class Attr:
    """The attributes of one command of bpf(2), named as bpftool would; after `issue` also what the kernel wrote."""

    def __init__(self, name: str, /, **values: int | bytes) -> None:
        self._command = COMMANDS[name]
        self._layout = ATTRS[name]
        self._data = pack(self._layout, values)

    def issue(self) -> int:
        return syscall.bpf(self._command, self._data)

    def __getitem__(self, name: str) -> int:
        return member(self._layout, self._data, name)


def command(name: str, /, **values: int | bytes) -> int:
    """Issue a command of bpf(2) whose attributes nobody reads afterwards."""
    return Attr(name, **values).issue()


@contextmanager
def newer(what: str, since: str, name: str, /, **values: int | bytes) -> Iterator[None]:
    """Have a refusal of what is newer than the kernel say so: `what` it is (in the plural), and since which Linux.

    Kernels say EINVAL or E2BIG of a command, flags or attributes that they do not know, and of much else. Which it is,
    the command `name` tells where it is given `values` with a descriptor that cannot be: EBADF if they are known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNKNOWN or _reaches_descriptors(name, **values):
            raise
        raise LacksFeature(error.errno, f"there are no {what} here; Linux has them since {since}") from None


def _reaches_descriptors(name: str, /, **values: int | bytes) -> bool:
    try:
        command(name, **values)
    except OSError as error:
        return error.errno not in _UNKNOWN
    return True


class Info:
    """What BPF_OBJ_GET_INFO_BY_FD (Linux 4.13) tells of a descriptor, in the structure called `kind`.

    `asked` are members set beforehand: where variable parts go, and how much room is there.
    """

    def __init__(self, kind: str, fd: int, **asked: int) -> None:
        self._layout = STRUCTS[kind]
        self._fd = fd
        _expect(fd, kind)
        memory = syscall.Buffer(bytes(pack(self._layout, dict(asked))))
        attr = Attr("obj_get_info_by_fd", bpf_fd=fd, info_len=memory.size, info=memory.address)
        attr.issue()
        #: As much as the kernel has of it: an older one has less.
        self._data = memory.read(attr["info_len"])

    def __getitem__(self, name: str) -> int:
        return member(self._layout, self._data, name)

    def text(self, name: str) -> str:
        """A member that is a C string. The kernel lets Latin-1 letters through in names."""
        return self.raw(name).split(b"\0")[0].decode("latin-1")

    def raw(self, name: str) -> bytes:
        field = self._layout.fields[name]
        return self._data[field.offset : field.offset + field.size * field.count]

    def list(self, address: str, count: str) -> tuple[int, ...]:
        """A list of u64 that the kernel writes elsewhere, asked for with a second call."""
        length = self[count]
        if not length or address not in self._layout.fields:
            return ()
        memory = syscall.Buffer(8 * length)
        Info(self._layout.name, self._fd, **{address: memory.address, count: length})
        return tuple(memoryview(memory.read()).cast("Q"))

    def string(self, address: str, length: str) -> str:
        """A C string that the kernel writes elsewhere, asked for with a second call; empty where there is none."""
        size = self[length]
        if not size:
            return ""
        # The length that the kernel gives counts the NUL byte for some, and not for others.
        memory = syscall.Buffer(size + 1)
        Info(self._layout.name, self._fd, **{address: memory.address, length: memory.size})
        return os.fsdecode(memory.read().split(b"\0")[0])


def fdinfo(fd: int) -> dict[str, str]:
    """What only a descriptor's file in /proc tells, line by line; empty without /proc."""
    text = read_text(f"/proc/thread-self/fdinfo/{fd}") or ""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def read_text(path: str) -> str | None:
    """A small file of /proc or /sys, stripped; None where it is not there or may not be read."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def bpffs() -> list[str]:
    """Where BPF file systems are mounted, as far as this process can see."""
    mounts = [line.split(" ") for line in (read_text("/proc/self/mounts") or "").splitlines()]
    # Blanks and such are written as \040.
    places = [place for _, place, kind, *_ in mounts if kind == "bpf"]
    return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place) for place in places]


def _expect(fd: int, kind: str) -> None:
    """Refuse a descriptor of something else, of which the kernel would tell with another structure."""
    try:
        found = str(Path(f"/proc/thread-self/fd/{fd}").readlink()).removeprefix("anon_inode:")
    except OSError:
        return  # Not open, which the kernel says itself, or no /proc.
    if found not in _FILES[kind]:
        raise OSError(errno.EINVAL, f"the descriptor is of {found}, not {_FILES[kind][0]}")
