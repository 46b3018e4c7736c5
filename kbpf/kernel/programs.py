"""Program commands of bpf(2): load (Linux 3.18), info (4.13), run (BPF_PROG_TEST_RUN, 4.12)."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator, Sequence

from kbpf.backend import Engine, LoadRefused, ProgramInfo, RawRun, TraceStep, object_name
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel import syscall
from kbpf.kernel.attrs import Attr, Info, command
from kbpf.kernel.btf import loaded_btf
from kbpf.specs import ProgramSpec
from kbpf.uapi.constants import BPF_F_TEST_XDP_LIVE_FRAMES
from kbpf.uapi.enums import ATTACH_TYPES, PROG_TYPES
from kbpf.uapi.structs import STRUCTS

_TYPE_NAMES = {number: name for name, number in PROG_TYPES.items()}

# The verifier's log: room at first, and the most that is tried for. What does not fit then is cut by the
# kernel, at the start since Linux 6.4, at the end before.
_LOG_ROOM = 1 << 16
_LOG_MOST = 1 << 24

# What a program may add to a packet or find in a context that is larger than the one it was given.
_DATA_GROWTH = 1 << 16
_CONTEXT_ROOM = 4096

_MAP_BY_INDEX = {ebpf.PSEUDO_MAP_IDX: ebpf.PSEUDO_MAP_FD, ebpf.PSEUDO_MAP_IDX_VALUE: ebpf.PSEUDO_MAP_VALUE}


class ProgramCommands:
    """The programs' part of the backend."""

    def program_load(
        self, spec: ProgramSpec, maps: Sequence[int], log_level: int = 0, engine: Engine | None = None
    ) -> int:
        attach_type = spec.expected_attach_type or 0
        if isinstance(attach_type, str):
            attach_type = ATTACH_TYPES[attach_type]
        if spec.type not in PROG_TYPES:
            raise LoadRefused(errno.EINVAL, f'no program type is called "{spec.type}"')
        instructions = syscall.Buffer(ebpf.encode(_with_descriptors(spec.instructions, maps)))
        license = syscall.Buffer(spec.license.encode() + b"\0")
        func_info, line_info = syscall.Buffer(spec.func_info), syscall.Buffer(spec.line_info)
        values: dict[str, int | bytes] = {
            "prog_type": PROG_TYPES[spec.type],
            "insn_cnt": len(spec.instructions),
            "insns": instructions.address,
            "license": license.address,
            "prog_flags": spec.flags,
            "prog_name": object_name(spec.name).encode(),
            "expected_attach_type": attach_type,
        }
        with loaded_btf(spec.btf) as btf:
            if btf is not None:
                values["prog_btf_fd"] = btf
                values.update(_records("func_info", func_info), **_records("line_info", line_info))
            return _load(values, log_level)

    def program_info(self, fd: int) -> ProgramInfo:
        count = Info("bpf_prog_info", fd)["nr_map_ids"]
        ids = syscall.Buffer(4 * count)
        info = Info("bpf_prog_info", fd, nr_map_ids=count, map_ids=ids.address if count else 0)
        number = info["type"]
        return ProgramInfo(
            _TYPE_NAMES.get(number, str(number)),
            info["id"],
            info.text("name"),
            info.raw("tag"),
            tuple(memoryview(ids.read()).cast("I")),
            bool(info["gpl_compatible"]),
        )

    def program_run(
        self, fd: int, data: bytes, context: bytes, repeat: int = 1, flags: int = 0, cpu: int = 0, batch_size: int = 0
    ) -> RawRun:
        # Live frames are given away: nothing comes back of them.
        live = bool(flags & BPF_F_TEST_XDP_LIVE_FRAMES)
        data_in = syscall.Buffer(data)
        # Programs without a packet refuse room for one. Too little room is found out only after the program has run.
        data_out = syscall.Buffer(len(data) + _DATA_GROWTH if data and not live else 0)
        room = max(len(context), _CONTEXT_ROOM) if context and not live else len(context)
        context_at = syscall.Buffer(context.ljust(room, b"\0"))
        values: dict[str, int | bytes] = {
            "prog_fd": fd,
            "repeat": repeat if repeat > 1 else 0,
            "flags": flags,
            "cpu": cpu,
            "batch_size": batch_size,
        }
        if data:
            values |= {"data_in": data_in.address, "data_size_in": data_in.size}
            if not live:
                values |= {"data_out": data_out.address, "data_size_out": data_out.size}
        if context:
            values |= {"ctx_in": context_at.address, "ctx_size_in": len(context)}
        out = {"ctx_out": context_at.address, "ctx_size_out": room} if context and not live else {}
        attr = Attr("prog_test_run", **values, **out)
        try:
            attr.issue()
        except OSError as error:
            if error.errno != errno.EINVAL or not context:
                raise
            # Raw tracepoint and syscall programs refuse, before they run, to be asked for a context; the latter
            # write theirs in place.
            attr = Attr("prog_test_run", **values)
            attr.issue()
        if live:
            return RawRun(attr["retval"], b"", b"", attr["duration"])
        # Types that give no context leave the room for one as it was said.
        written = attr["ctx_size_out"]
        written = len(context) if written in (0, room) else written
        return RawRun(attr["retval"], data_out.read(attr["data_size_out"]), context_at.read(written), attr["duration"])

    def program_values(self, fd: int, packets: list[bytes], context: bytes) -> array[int]:
        values = array("I")
        try:
            for packet in packets:
                values.append(self.program_run(fd, packet, context).value)
        except OSError as error:
            error.done = values  # type: ignore[attr-defined]  # what the seam says
            raise
        return values

    def program_trace(self, fd: int, data: bytes, context: bytes) -> Iterator[TraceStep]:
        raise OSError(errno.EOPNOTSUPP, "only the emulator shows the steps of a run")


def _with_descriptors(instructions: Sequence[Instruction], maps: Sequence[int]) -> list[Instruction]:
    """References to maps by index become references by descriptor, which every kernel takes."""
    rewritten = list(instructions)
    for index, instruction in enumerate(rewritten):
        if instruction.opcode == ebpf.LD_IMM64 and instruction.src in _MAP_BY_INDEX:
            if not 0 <= instruction.imm < len(maps):
                raise LoadRefused(
                    errno.EINVAL, f"instruction {index} refers to map {instruction.imm} of {len(maps)}, counted from 0"
                )
            rewritten[index] = instruction._replace(src=_MAP_BY_INDEX[instruction.src], imm=maps[instruction.imm])
    return rewritten


def _records(kind: str, memory: syscall.Buffer) -> dict[str, int]:
    """The attributes for an array of ``struct bpf_func_info`` or ``bpf_line_info``."""
    if not memory.size:
        return {}
    size = STRUCTS[f"bpf_{kind}"].size
    return {kind: memory.address, f"{kind}_rec_size": size, f"{kind}_cnt": memory.size // size}


def _load(values: dict[str, int | bytes], log_level: int) -> int:
    """Load; when it is refused, again with a log, and with room for more of it as long as it does not fit."""
    try:
        return command("prog_load", **values)
    except OSError as error:
        refused = error.errno or 0
    room = _LOG_ROOM
    while True:
        log = syscall.Buffer(room)
        try:
            return command("prog_load", log_level=log_level or 1, log_buf=log.address, log_size=room, **values)
        except OSError as error:
            if error.errno != errno.ENOSPC or room == _LOG_MOST:
                raise LoadRefused(refused, log.read().split(b"\0")[0].decode(errors="replace")) from None
        room *= 4
