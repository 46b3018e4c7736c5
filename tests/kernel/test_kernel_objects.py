"""Pins, ids and descriptors on the running kernel."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from kbpf.isa.ebpf import Instruction
from kbpf.kernel.backend import KernelBackend
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.constants import BPF_F_RDONLY

pytestmark = pytest.mark.requires("kernel")

Keep = Callable[[int], int]

ARRAY = MapSpec(type="array", key_size=4, value_size=4, max_entries=1)
PROGRAM = ProgramSpec(instructions=(Instruction(0xB7), Instruction(0x95)))


def test_descriptors_are_close_on_exec(kernel: KernelBackend, keep: Keep) -> None:
    map = keep(kernel.map_create(ARRAY))
    program = keep(kernel.program_load(PROGRAM, ()))
    again = keep(kernel.open_by_id("map", kernel.map_info(map).id))
    for fd in (map, program, again, keep(kernel.duplicate(map))):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_a_pin_outlives_the_descriptor(kernel: KernelBackend, keep: Keep, bpffs: Path) -> None:
    path = str(bpffs / "counters")
    fd = kernel.map_create(ARRAY)
    id = kernel.map_info(fd).id
    kernel.pin(fd, path)
    with pytest.raises(FileExistsError):
        kernel.pin(fd, path)
    kernel.close(fd)
    assert kernel.map_info(keep(kernel.open_pinned(path))).id == id
    kernel.unpin(path)
    for gone in (kernel.open_pinned, kernel.unpin):
        with pytest.raises(FileNotFoundError):
            gone(path)


def test_a_pin_opened_for_reading_refuses_writes(kernel: KernelBackend, keep: Keep, bpffs: Path) -> None:
    path = str(bpffs / "counters")
    kernel.pin(keep(kernel.map_create(ARRAY)), path)
    fd = keep(kernel.open_pinned(path, BPF_F_RDONLY))
    assert kernel.map_lookup(fd, bytes(4), 4) == bytes(4)
    with pytest.raises(PermissionError):
        kernel.map_update(fd, bytes(4), bytes(4))


def test_pins_are_made_only_on_a_bpf_file_system(
    kernel: KernelBackend, keep: Keep, bpffs: Path, tmp_path: Path
) -> None:
    fd = keep(kernel.map_create(ARRAY))
    for path in (tmp_path / "here", bpffs / "with.dot"):
        with pytest.raises(OSError) as raised:
            kernel.pin(fd, str(path))
        assert raised.value.errno == errno.EPERM
    with pytest.raises(ValueError, match="NUL"):
        kernel.pin(fd, "a\0b")


def test_what_exists_is_listed_and_opened_by_id(kernel: KernelBackend, keep: Keep) -> None:
    map, program = keep(kernel.map_create(ARRAY)), keep(kernel.program_load(PROGRAM, ()))
    map_id, program_id = kernel.map_info(map).id, kernel.program_info(program).id
    assert map_id in kernel.ids("map")
    assert program_id in kernel.ids("program")
    assert kernel.map_info(keep(kernel.open_by_id("map", map_id))).id == map_id
    assert kernel.program_info(keep(kernel.open_by_id("program", program_id))).id == program_id
    with pytest.raises(FileNotFoundError):
        kernel.open_by_id("map", 2**31)


def test_a_closed_descriptor_is_ebadf_and_for_its_info_ebadfd(kernel: KernelBackend) -> None:
    fd = kernel.map_create(ARRAY)
    kernel.close(fd)
    expected = {kernel.close: errno.EBADF, kernel.duplicate: errno.EBADF, kernel.map_freeze: errno.EBADF}
    for use, number in {**expected, kernel.map_info: errno.EBADFD, kernel.program_info: errno.EBADFD}.items():
        with pytest.raises(OSError) as raised:
            use(fd)
        assert raised.value.errno == number
