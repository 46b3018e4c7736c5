"""The one door to the kernel: bpf(2), and the socket calls that Python's `socket` gets wrong for filters.

The only place that knows a syscall number, and with `kbpf.kernel.bcc` the only one in this package that uses ctypes.
Everything here raises plain `OSError`. New bpf descriptors are close-on-exec: the kernel makes them so, always.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from kbpf.errors import errno_text

# (64-bit, 32-bit) numbers of bpf(2) by uname's machine; where a machine is not listed, those of asm-generic/unistd.h.
_GENERIC = (280, 280)
_NUMBERS = {
    "x86_64": (321, 357),
    "i686": (0, 357),
    "i586": (0, 357),
    "aarch64": (280, 386),
    "armv7l": (0, 386),
    "armv6l": (0, 386),
    "ppc64le": (361, 361),
    "ppc64": (361, 361),
    "ppc": (0, 361),
    "s390x": (351, 351),
    "mips64": (5315, 4355),
    "mips": (0, 4355),
    "sparc64": (349, 349),
}
_wide, _narrow = _NUMBERS.get(os.uname().machine, _GENERIC)
_SYS_BPF = _wide if struct.calcsize("P") == 8 else _narrow
# The same of perf_event_open(2), for 64-bit machines.
_SYS_PERF_EVENT_OPEN = {"x86_64": 298, "ppc64le": 319, "ppc64": 319, "s390x": 331, "mips64": 5292, "sparc64": 327}.get(
    os.uname().machine, 241
)

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong]
# The same function again, as another object, for other arguments.
_perf_event_open = _libc["syscall"]
_perf_event_open.restype = ctypes.c_long
_perf_event_open.argtypes = [
    ctypes.c_long, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ulong,
]  # fmt: skip
_libc.recv.restype = ctypes.c_ssize_t
_libc.recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.bind.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32]

# What libbpf gives a program load that is interrupted by signals.
_AGAIN_TRIES = 5

_ELEMENT = struct.Struct("=I4xQQQ")
#: The command number of BPF_MAP_LOOKUP_ELEM, which `element_reader` issues.
_LOOKUP_ELEM = 1


class Buffer:
    """Memory that the kernel may read and write, at a fixed `address` as long as this object lives."""

    __slots__ = ("_array", "address", "size")

    def __init__(self, contents: int | bytes) -> None:
        """`contents`: that many zero bytes, or these bytes."""
        if isinstance(contents, int):
            self._array = ctypes.create_string_buffer(max(contents, 1))
            self.size = contents
        else:
            self._array = ctypes.create_string_buffer(contents, max(len(contents), 1))
            self.size = len(contents)
        self.address = ctypes.addressof(self._array)

    def read(self, size: int | None = None) -> bytes:
        """The first `size` bytes; all of them by default."""
        return ctypes.string_at(self._array, self.size if size is None else min(size, self.size))


def failure(number: int) -> OSError:
    """The error for an errno, as the subclass that Python has for it."""
    return OSError(number, errno_text(number))


def _last_failure() -> OSError:
    return failure(ctypes.get_errno())


def bpf(command: int, attr: bytearray) -> int:
    """bpf(2). What the kernel writes into the attributes is in `attr` afterwards.

    The attributes are sent only as far as they are not zero, so that a kernel which does not know the last of them
    accepts the call. A call that a signal interrupted is made again, as PEP 475 has it.
    """
    # The kernel may write to fields behind the size it was told: the memory is always whole.
    memory = (ctypes.c_char * len(attr)).from_buffer(attr)
    size = min(-(-len(attr.rstrip(b"\0")) // 8) * 8, len(attr))
    given = bytes(attr)
    tries = 0
    while True:
        result = int(_syscall(_SYS_BPF, command, ctypes.addressof(memory), size))
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number == errno.EAGAIN:
            tries += 1
        if number not in (errno.EINTR, errno.EAGAIN) or tries == _AGAIN_TRIES:
            raise failure(number)
        # A batch that was interrupted says how far it came, where the next try reads how far to go.
        attr[:] = given


def perf_event_open(attr: bytes, cpu: int, process: int = -1) -> int:
    """perf_event_open(2), by default for all processes on one processor; the descriptor is close-on-exec."""
    close_on_exec = 8
    result = int(_perf_event_open(_SYS_PERF_EVENT_OPEN, attr, process, cpu, -1, close_on_exec))
    if result < 0:
        raise _last_failure()
    return result


# Machines whose processors keep loads in order, and stores in order behind them.
_ORDERED = ("x86_64", "i686", "i586", "s390x")
_SEQUENTIALLY_CONSISTENT = 5


def memory_barrier() -> Callable[[], object] | None:
    """A barrier between loads, and between loads and stores behind them: compiled code, called through ctypes.

    None where the processor needs none. It is libatomic's ``atomic_thread_fence``; EOPNOTSUPP where that library is
    missing.
    """
    if os.uname().machine in _ORDERED:
        return None
    return _fence()


def _fence() -> Callable[[], object]:
    try:
        # Not CDLL, which would let go of the interpreter's lock.
        fence = ctypes.PyDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        raise OSError(
            errno.EOPNOTSUPP, "ring buffers need libatomic.so.1 on this machine (Debian: libatomic1)"
        ) from None
    fence.argtypes, fence.restype = [ctypes.c_int], None
    return partial(fence, _SEQUENTIALLY_CONSISTENT)


def full_barrier() -> Callable[[], object]:
    """A barrier that also keeps loads behind stores before them, which no processor does by itself."""
    if os.uname().machine not in _ORDERED:
        return _fence()
    lock = threading.Lock()

    def barrier() -> None:
        # Taking a lock is a locked instruction, which these machines carry out in order with everything.
        with lock:
            pass

    return barrier


def _address(data: bytes | None) -> int:
    """Where the bytes themselves are, for what the kernel only reads; 0 for None."""
    return ctypes.c_void_p.from_buffer(ctypes.c_char_p(data)).value or 0


def element(command: int, fd: int, key: bytes | None, value: bytes | int | None = None, flags: int = 0) -> bytes:
    """One of the commands on a map's element.

    `value` is what the kernel reads, or the number of bytes that it writes, which are returned.
    """
    key_at = _address(key)
    if isinstance(value, int):
        room = ctypes.create_string_buffer(max(value, 1))
        bpf(command, bytearray(_ELEMENT.pack(fd, key_at, ctypes.addressof(room), flags)))
        return room.raw[:value]
    bpf(command, bytearray(_ELEMENT.pack(fd, key_at, _address(value), flags)))
    return b""


def _native(packer: struct.Struct) -> Any:
    """The letter under which a memoryview has the same numbers as a format of `struct`; None where it has none."""
    order, letter = packer.format[:-1], packer.format[-1:]
    same = order in ("", "@", "=") and letter in "bBhHiIqQfd" and struct.calcsize(letter) == packer.size
    return letter if same else None


def element_reader(
    fd: int,
    key_size: int,
    value_size: int,
    key_packer: struct.Struct | None = None,
    value_packer: struct.Struct | None = None,
) -> Callable[[Any], Any]:
    """BPF_MAP_LOOKUP_ELEM on one map, bound: one Python frame over the system call.

    Takes and gives what `kbpf.backend.Backend.map_reader` says. None for ENOENT, other errnos raise; a key of another
    length than `key_size` is a `ValueError`. Any number of threads may call it, and signal handlers too: each call
    takes its buffers off a list, or makes new ones.
    """
    key_array, value_array, attr_array = (ctypes.c_char * size for size in (key_size, value_size, _ELEMENT.size))
    if (key_packer and key_packer.size != key_size) or (value_packer and value_packer.size != value_size):
        raise ValueError("a packer of another size than the map has")

    # Packing bytes as one field is as fast as any other way to copy them.
    key_form, value_form = key_packer or struct.Struct(f"{key_size}s"), value_packer or struct.Struct(f"{value_size}s")
    pack_into, unpack_from = key_form.pack_into, value_form.unpack_from
    single = len(value_form.unpack(bytes(value_size))) == 1
    # Numbers of the machine are written and read as such, in half the time.
    key_letter, value_letter = _native(key_form), _native(value_form)

    def slot() -> tuple[Any, Any, Any, Any]:
        key, value = key_array(), value_array()
        # Queues and stacks have no key, and refuse an address of one.
        key_at = ctypes.addressof(key) if key_size else 0
        attr = attr_array.from_buffer_copy(_ELEMENT.pack(fd, key_at, ctypes.addressof(value), 0))
        return (
            memoryview(key).cast("B").cast(key_letter) if key_letter else key,
            memoryview(value).cast("B").cast(value_letter) if value_letter else value,
            ctypes.c_void_p(ctypes.addressof(attr)),
            attr,
        )

    free = [slot()]
    take, give, get_errno, missing = free.pop, free.append, ctypes.get_errno, errno.ENOENT
    # Arguments that are made once need no conversion at each call, and neither do undeclared ones: a sixth of the time.
    call = _libc["syscall"]
    call.restype = ctypes.c_long
    number, command, size = ctypes.c_long(_SYS_BPF), ctypes.c_long(_LOOKUP_ELEM), ctypes.c_ulong(_ELEMENT.size)
    checked = key_packer is None

    def failed(buffers: tuple[Any, Any, Any, Any]) -> Any:
        _, value, attr, _ = buffers
        found = None
        while get_errno() != missing:
            if get_errno() != errno.EINTR:
                raise _last_failure()
            if not call(number, command, attr, size):
                found = value[0] if value_letter else unpack_from(value)[0] if single else unpack_from(value)
                break
        give(buffers)
        return found

    def read(wanted: Any) -> Any:
        if checked and len(wanted) != key_size:
            raise ValueError(f"a key of {len(wanted)} bytes where the map has {key_size}")
        try:
            buffers = take()
        except IndexError:
            buffers = slot()
        key, value, attr, _ = buffers
        if key_letter:
            key[0] = wanted
        else:
            pack_into(key, 0, wanted)
        if call(number, command, attr, size):
            return failed(buffers)
        found = value[0] if value_letter else unpack_from(value)[0] if single else unpack_from(value)
        give(buffers)
        return found

    def read_number(wanted: Any) -> Any:
        # The same where key and value are numbers, without asking each time whether they are.
        try:
            buffers = take()
        except IndexError:
            buffers = slot()
        key, value, attr, _ = buffers
        key[0] = wanted
        if call(number, command, attr, size):
            return failed(buffers)
        found = value[0]
        give(buffers)
        return found

    return read_number if key_letter and value_letter else read


def setsockopt(fd: int, level: int, option: int, value: bytes) -> None:
    """setsockopt(2), with the bytes as they are."""
    if _libc.setsockopt(fd, level, option, value, len(value)):
        raise _last_failure()


def set_filter(fd: int, level: int, option: int, count: int, program: bytes) -> None:
    """setsockopt(2) with a ``struct sock_fprog`` of `count` instructions."""
    instructions = Buffer(program)
    setsockopt(fd, level, option, struct.pack("@HP", count, instructions.address))


def getsockopt(fd: int, level: int, option: int, room: int, optlen: int | None = None) -> tuple[bytes, int]:
    """getsockopt(2): what was written into `room` bytes, and the length that the kernel gives back.

    `optlen` is the length that the kernel is told, where that is not counted in bytes (SO_GET_FILTER).
    """
    memory = ctypes.create_string_buffer(max(room, 1))
    length = ctypes.c_uint32(room if optlen is None else optlen)
    if _libc.getsockopt(fd, level, option, memory, ctypes.byref(length)):
        raise _last_failure()
    return memory.raw[:room], length.value


def getsockname(fd: int, room: int = 128) -> bytes:
    """getsockname(2): the raw socket address."""
    memory = ctypes.create_string_buffer(room)
    length = ctypes.c_uint32(room)
    if _libc.getsockname(fd, memory, ctypes.byref(length)):
        raise _last_failure()
    return memory.raw[: length.value]


def bind(fd: int, address: bytes) -> None:
    """bind(2) with a raw socket address."""
    if _libc.bind(fd, address, len(address)):
        raise _last_failure()


def recv(fd: int, room: int, flags: int) -> int:
    """recv(2) into memory that is then forgotten; returns what it returned."""
    memory = ctypes.create_string_buffer(max(room, 1))
    result = int(_libc.recv(fd, memory, room, flags))
    if result < 0:
        raise _last_failure()
    return result
