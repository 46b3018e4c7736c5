"""Writers of ring buffers of user space; every fact holds on both backends."""

import errno
import os
import signal
import struct
import threading
import time
from contextlib import contextmanager

import pytest
from eventcode import FP, RETURN, add, call, copy, load, mov, program_of, store, the_map

import kbpf
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.testing.btf_bytes import GLOBAL, BtfBytes

PAGE = 4096

#: Drains, and gives the low 16 bits of the sum of the records' first words, above the number of records.
CALLER = [
    copy(6, 1), Instruction(ebpf.ST | ebpf.MEM | ebpf.DW, FP, 0, -8),
    *the_map(1), *ld_imm64(2, 0, ebpf.PSEUDO_FUNC), copy(3, FP), add(3, -8), mov(4, 0), call("user_ringbuf_drain"),
    Instruction(ebpf.ALU64 | ebpf.LSH, 0, 0, 0, 16), load(1, FP, -8),
    Instruction(ebpf.ALU64 | ebpf.AND, 1, 0, 0, 0xFFFF), Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 1), RETURN,
]  # fmt: skip
CALLBACK = [
    copy(6, 2), copy(3, 1), Instruction(ebpf.ST | ebpf.MEM | ebpf.DW, FP, 0, -8),
    copy(1, FP), add(1, -8), mov(2, 4), mov(4, 0), mov(5, 0), call("dynptr_read"),
    load(1, FP, -8), load(0, 6, 0), Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 1), store(6, 0, 0),
    mov(0, 0), RETURN,
]  # fmt: skip


def drain(backend, map):
    at = next(i for i, each in enumerate(CALLER) if each.src == ebpf.PSEUDO_FUNC and each.opcode == ebpf.LD_IMM64)
    code = [*CALLER, *CALLBACK]
    code[at] = code[at]._replace(imm=len(CALLER) - at - 1)
    btf = BtfBytes()
    ids = btf.function("main", GLOBAL, parameters=1), btf.function("each", parameters=2)
    info = b"".join(struct.pack("=II", *pair) for pair in zip((0, len(CALLER)), ids, strict=True))
    return program_of(backend, code, [map], btf=btf.bytes(), func_info=info)


@contextmanager
def writing(backend, type=None):
    spec = kbpf.MapSpec(type="user_ringbuf", max_entries=PAGE)
    with kbpf.BpfMap.create(spec, backend=backend) as map, drain(backend, map) as program, map.writer(type) as writer:
        yield writer, lambda: program.run(bytes(64)).value


def test_programs_read_what_is_written(backend):
    with writing(backend, "IQ") as (writer, drained):
        assert drained() == 0
        for number in (1, 2, 3):
            writer.write((number, 0))
        assert writer.pending == 3 * 24
        assert drained() == 3 << 16 | 6
        assert writer.pending == 0


def test_bytes_of_any_length_go_around_the_ring(backend):
    with writing(backend) as (writer, drained):
        for number in range(600):
            writer.write((number).to_bytes(4, "little") + bytes(number % 97))
            if number % 5 == 4:
                assert drained() == 5 << 16 | 5 * (number - 2)


def test_a_number_is_no_bytes(backend):
    with writing(backend) as (writer, drained):
        for wrong in (5, "text", None, [1, 2]):
            with pytest.raises(TypeError, match="say what records are"):
                writer.write(wrong)
        writer.write(memoryview(b"\1\0\0\0"))
        writer.write(bytearray(b"\2\0\0\0"))
        assert drained() == 2 << 16 | 3


def test_a_full_ring_says_so_until_a_program_has_drained_it(backend):
    with writing(backend) as (writer, drained):
        for _ in range(PAGE // 256):
            writer.write(bytes(248))
        start = time.monotonic()
        for timeout in (0, 0.05):
            with pytest.raises(kbpf.MapFullError, match="programs have not drained it"):
                writer.write(b"1234", timeout)
        assert time.monotonic() - start >= 0.05
        assert writer.pending == PAGE
        later = threading.Timer(0.05, drained)
        later.start()
        writer.write(b"\1\0\0\0", timeout=None)
        later.join()
        assert drained() == 1 << 16 | 1


def test_a_record_fills_the_ring_and_never_more(backend):
    with writing(backend) as (writer, drained):
        writer.write(bytes(PAGE - 8))
        assert drained() == 1 << 16
        with pytest.raises(kbpf.BpfError, match="takes 4104 bytes, and the buffer has 4096") as caught:
            writer.write(bytes(PAGE - 7))
        assert caught.value.errno == errno.E2BIG


def test_closing_wakes_a_writer_that_waits(backend):
    with writing(backend) as (writer, _):
        writer.write(bytes(PAGE - 8))
        caught = []

        def wait():
            with pytest.raises(kbpf.BpfError) as error:
                writer.write(b"", timeout=None)
            caught.append(error.value.errno)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)
        writer.close()
        thread.join()
        assert caught == [errno.EBADF]
        assert writer.closed
        with pytest.raises(kbpf.BpfError, match="closed"):
            writer.write(b"")


def test_threads_write_whole_records(backend):
    with writing(backend) as (writer, drained):
        threads = [threading.Thread(target=lambda: [writer.write(b"\1\0\0\0", 10.0) for _ in range(500)]) for _ in "ab"]
        for thread in threads:
            thread.start()
        count = 0
        while count < 1000:
            result = drained()
            assert result >> 16 == result & 0xFFFF
            count += result >> 16
        for thread in threads:
            thread.join()


def test_in_a_forked_child_a_writer_is_closed(backend):
    with writing(backend, "I") as (writer, drained):
        child = os.fork()
        if not child:
            try:
                writer.write(1)
            except kbpf.BpfError as error:
                os._exit(0 if "before the fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        writer.write(2)
        assert drained() == 1 << 16 | 2


@pytest.mark.requires("kernel")
def test_what_is_written_outlives_a_writer_that_is_killed():
    """A record is there as a whole or not at all: its position moves last."""
    spec = kbpf.MapSpec(type="user_ringbuf", max_entries=PAGE)
    with kbpf.BpfMap.create(spec, backend="kernel") as map, drain("kernel", map) as program:
        child = os.fork()
        if not child:
            writer = map.writer()
            while True:
                try:
                    writer.write(b"\1\0\0\0" + bytes(60), timeout=None)
                except BaseException:
                    os._exit(1)
        for _ in range(20):
            time.sleep(0.002)
            result = program.run(bytes(64)).value
            assert result >> 16 == result & 0xFFFF
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        result = program.run(bytes(64)).value
        assert result >> 16 == result & 0xFFFF
        with map.writer("I") as writer:
            writer.write(7)
            assert program.run(bytes(64)).value == 1 << 16 | 7
