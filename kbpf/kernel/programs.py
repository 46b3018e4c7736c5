"""Program commands of bpf(2): load (Linux 3.18), info (4.13), run (BPF_PROG_TEST_RUN, 4.12)."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress

from kbpf.backend import Engine, LoadRefused, object_name
from kbpf.info import ProgramInfo
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel import kallsyms, syscall
from kbpf.kernel.attrs import Attr, Info, command, fdinfo, newer
from kbpf.kernel.btf import kernel_type, loaded_btf
from kbpf.kernel.denied import withheld
from kbpf.kernel.tokens import command_with_token
from kbpf.runs import RawRun, TraceStep
from kbpf.specs import ProgramSpec
from kbpf.uapi.constants import BPF_F_TEST_XDP_LIVE_FRAMES, BPF_STATS_RUN_TIME
from kbpf.uapi.enums import ATTACH_TYPES, PROG_TYPES
from kbpf.uapi.structs import STRUCTS

TYPE_NAMES = {number: name for name, number in PROG_TYPES.items()}

# The verifier's log: room at first, and where that is too little. What does not fit then is cut by the kernel, at the
# start since Linux 6.4, at the end before. There is nothing between: each try goes through the whole program again.
_LOG_ROOMS = (1 << 16, 1 << 24)

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
        try:
            attached_type = _attached_type(spec)
        except OSError as error:
            raise LoadRefused(error.errno or errno.ENOENT, error.strerror or "") from None
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
            "attach_btf_id": attached_type,
        }
        with loaded_btf(spec.btf) as btf:
            if btf is not None:
                values["prog_btf_fd"] = btf
                values.update(_records("func_info", func_info), **_records("line_info", line_info))
            spare = array("i", [maps[index] for index in ebpf.spare_maps(spec.instructions, len(maps))])
            return _load_with_maps(values, spare, log_level) if spare else _load(values, log_level)

    def program_info(self, fd: int) -> ProgramInfo:
        count = Info("bpf_prog_info", fd)["nr_map_ids"]
        ids = syscall.Buffer(4 * count)
        info = Info("bpf_prog_info", fd, nr_map_ids=count, map_ids=ids.address if count else 0)
        number, file = info["type"], fdinfo(fd)
        return ProgramInfo(
            TYPE_NAMES.get(number, str(number)),
            info["id"],
            info.text("name"),
            info.raw("tag"),
            # A map may have been bound in between, or a kernel hide them.
            tuple(memoryview(ids.read(4 * info["nr_map_ids"])).cast("I")),
            bool(info["gpl_compatible"]),
            info["load_time"],
            info["created_by_uid"],
            info["xlated_prog_len"],
            info["jited_prog_len"],
            info["run_time_ns"],
            info["run_cnt"],
            info["recursion_misses"],
            info["verified_insns"],
            info["btf_id"],
            info["attach_btf_id"],
            info["attach_btf_obj_id"],
            info["ifindex"],
            int(file["memlock"]) if "memlock" in file else None,
        )

    def program_code(self, fd: int, jited: bool = False) -> bytes:
        kind = "jited" if jited else "xlated"
        memory = syscall.Buffer(Info("bpf_prog_info", fd)[f"{kind}_prog_len"])
        if not memory.size:
            return b""
        info = Info("bpf_prog_info", fd, **{f"{kind}_prog_insns": memory.address, f"{kind}_prog_len": memory.size})
        # The kernel takes the address away where it gives nothing.
        return memory.read() if info[f"{kind}_prog_insns"] else b""

    def call_name(self, imm: int) -> str:
        # The kernel has put in how far the function is from one of its own.
        return kallsyms.function_at(imm)

    def program_bind_map(self, program: int, map: int) -> None:
        command("prog_bind_map", prog_fd=program, map_fd=map)

    def program_stream(self, fd: int, stream: int, size: int) -> bytes:
        memory = syscall.Buffer(size)
        with newer("streams of programs", "6.17", "prog_stream_read_by_fd", prog_fd=-1):
            read = command(
                "prog_stream_read_by_fd", stream_buf=memory.address, stream_buf_len=size, stream_id=stream, prog_fd=fd
            )
        return memory.read(read)

    def statistics_enable(self) -> int:
        return command("enable_stats", type=BPF_STATS_RUN_TIME)

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


def _attached_type(spec: ProgramSpec) -> int:
    """The id of the kernel's function or type that the program is for, by the name that its section has; 0 for none."""
    if spec.type not in ("tracing", "lsm") or not spec.attach_to:
        return 0
    if spec.expected_attach_type == "trace_raw_tp":
        return kernel_type(f"btf_trace_{spec.attach_to}", "typedef")
    prefix = {"trace_iter": "bpf_iter_", "lsm_mac": "bpf_lsm_", "lsm_cgroup": "bpf_lsm_"}
    return kernel_type(prefix.get(str(spec.expected_attach_type), "") + spec.attach_to, "func")


def _records(kind: str, memory: syscall.Buffer) -> dict[str, int]:
    """The attributes for an array of ``struct bpf_func_info`` or ``bpf_line_info``."""
    if not memory.size:
        return {}
    size = STRUCTS[f"bpf_{kind}"].size
    return {kind: memory.address, f"{kind}_rec_size": size, f"{kind}_cnt": memory.size // size}


def _load_with_maps(values: dict[str, int | bytes], maps: array[int], log_level: int) -> int:
    """Load with maps that no instruction names: the kernel takes how many there are (Linux 6.14), or each by itself."""
    descriptors = syscall.Buffer(maps.tobytes())
    try:
        return _load({**values, "fd_array": descriptors.address, "fd_array_cnt": len(maps)}, log_level)
    except LoadRefused as error:
        # What a kernel does not know is too long for it, or invalid, and there is nothing in the log.
        if error.errno not in (errno.E2BIG, errno.EINVAL) or error.log:
            raise
    fd = _load(values, log_level)
    with suppress(OSError):
        for map in maps:
            command("prog_bind_map", prog_fd=fd, map_fd=map)
    return fd


def _load(values: dict[str, int | bytes], log_level: int) -> int:
    """Load; when it is refused, again with a log, and with room for more of it where it does not fit."""
    try:
        return command_with_token("prog_load", **values)
    except OSError as error:
        refused = error.errno or 0
    text = ""
    for room in _LOG_ROOMS:
        log = syscall.Buffer(room)
        try:
            logged = {"log_level": log_level or 1, "log_buf": log.address, "log_size": room}
            return command_with_token("prog_load", **logged, **values)
        except OSError as error:
            text = log.read().split(b"\0")[0].decode(errors="replace")
            if error.errno != errno.ENOSPC:
                break
    raise LoadRefused(refused, text, withheld(text))
