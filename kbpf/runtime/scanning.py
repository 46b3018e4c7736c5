"""One capture file after the other through filters: the loop around native code, and the file that matches go to."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from kbpf.emulator.jit.buffers import read_address
from kbpf.emulator.jit.scan import FAULTED, FULL, INCOMPLETE, PYTHONS, REACHED, Scan, Way, gather, loop
from kbpf.errors import FilterError, KbpfError
from kbpf.pcapfile import pcap, pcapng
from kbpf.pcapfile.headers import Pcap, Pcapng, View, cut_off, first_section
from kbpf.pcapfile.records import CaptureError, Record
from kbpf.pcapfile.stream import Stream
from kbpf.pcapfile.windows import SLICE, Windows

if TYPE_CHECKING:
    from kbpf.backend import Engine
    from kbpf.emulator.jit.batch import NativeBatch
    from kbpf.runtime.filter import Filter
    from kbpf.runtime.program import Program

_ETHERNET = 1
#: Packets that a program runs over at a time.
_AT_ONCE = 4096
#: Spans that are noted before they are written.
_SPANS = 1 << 15
_COPIED = 1 << 20
#: What a packet takes on the average, about, and the work where a file's size is not known.
_MEAN_PACKET, _ENDLESS = 200, 1 << 40


class _Runner(NamedTuple):
    """A filter, and its native code with a session where there is one."""

    filter: Filter
    native: NativeBatch | None
    session: Any


class Scanner:
    """Counts packets and matches over files; a context manager, in which files may be gone through.

    `filter_of` gives the filter for a link type; with `program` that is run instead. `progress` is told how many bytes
    have been gone through.
    """

    def __init__(
        self,
        filter_of: Callable[[int], Filter],
        engine: Engine = "auto",
        progress: Callable[[int], object] | None = None,
        program: Program | None = None,
    ) -> None:
        self.packets = self.matched = 0
        self._filter_of, self._engine, self._progress = filter_of, engine, progress
        self._program = program
        #: How often the program returned what, and how many packets were none for it.
        self.values: Counter[int] = Counter()
        self.refused = 0
        #: Whether a filter runs in native code.
        self.in_native_code = False
        self._runners: dict[int, _Runner] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Scanner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runners.clear()
        self._stack.close()

    def file(self, source: str | os.PathLike[str] | BinaryIO, output: Output) -> None:
        """Go through one file; raises `CaptureError` behind what can be read, `EmulationFault`, `FilterError`."""
        try:
            self._file(source, output)
        except CaptureError as error:
            error.file = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
            raise

    def _file(self, source: str | os.PathLike[str] | BinaryIO, output: Output) -> None:
        with Windows(source) as windows:
            stream = Stream(View(windows, 0))
            magic = stream.read_up_to(4)
            format: Pcap | Pcapng
            if magic == pcapng.MAGIC:
                format, stream = first_section(windows)
            elif len(magic) == 4 and pcap.byte_order(magic):
                format = Pcap(stream, magic)
            else:
                raise CaptureError(f"this is no pcap or pcapng file: it begins with {magic.hex() or 'nothing'}", 0)
            output.begin(format.kind, windows.copy(0, format.start))
            kind = _Walk if self._program is None else _ProgramWalk
            walk = kind(self, windows, format, output, format.start or stream.offset)
            if not format.start:
                output.span(windows, 0, stream.offset)
            try:
                walk.run()
            finally:
                walk.write()

    def runner(self, dlt: int, size: int) -> _Runner:
        """What is run over packets of a link type, of which there may be `size` bytes (0: nobody knows)."""
        if dlt not in self._runners:
            filter = self._filter_of(dlt)
            runs = size // _MEAN_PACKET if size else _ENDLESS
            native = None if self._engine == "interpreter" else filter.native(self._engine, runs)
            self.in_native_code |= native is not None
            session = None if native is None else self._stack.enter_context(native.session())
            self._runners[dlt] = _Runner(filter, native, session)
        return self._runners[dlt]

    def values_of(self, packets: list[bytes]) -> list[int | None]:
        """What the program returns for each, None where it cannot be run over it."""
        assert self._program is not None
        values: list[int | None] = []
        while len(values) < len(packets):
            done, refused = self._program.run_until_refused(packets[len(values) :])
            values += [*done, None] if refused else done
        self.packets += len(values)
        self.matched += sum(map(bool, values))
        self.values.update(value for value in values if value is not None)
        self.refused += values.count(None)
        return values

    def advance(self, octets: int) -> None:
        if self._progress is not None and octets:
            self._progress(octets)


class _Walk:
    """The way through one file."""

    def __init__(
        self, scanner: Scanner, windows: Windows, format: Pcap | Pcapng, output: Output, position: int
    ) -> None:
        self._scanner, self._windows, self._format, self._output = scanner, windows, format, output
        self._position = position
        self._told = 0
        self._spans = (ctypes.c_uint64 * (2 * _SPANS))() if output.wanted else None
        self._count = 0
        self._ways: Any = None
        #: Bytes that native code goes through before Python looks again: it tells the progress, and takes signals.
        self._slice = SLICE

    def run(self) -> None:
        windows = self._windows
        while True:
            why = self._native() if self._known() else PYTHONS
            if why in (FULL, REACHED):
                self.write()
                self._tell()
            elif why == FAULTED:
                self._raise()
            elif why == INCOMPLETE and not windows.final:
                self._refill()
            elif not self._step():
                self._tell()
                return

    def _tell(self) -> None:
        consumed = self._windows.base + self._position if self._windows.final else self._windows.consumed
        self._scanner.advance(consumed - self._told)
        self._told = max(consumed, self._told)

    def _refill(self) -> None:
        self.write()
        self._windows.more(self._position)
        self._position = 0
        self._tell()

    def _known(self) -> bool:
        """Whether native code may go on: it knows what to run over each interface's packets, or leaves them alone."""
        interfaces = self._format.interfaces
        if self._ways is None or len(self._ways) != max(len(interfaces), 1):
            self._ways = (Way * max(len(interfaces), 1))()
            for way, interface in zip(self._ways, interfaces, strict=False):
                try:
                    runner = self._scanner.runner(interface.dlt, self._windows.size)
                except FilterError:
                    # Said when there is a packet of it.
                    continue
                if runner.native is not None:
                    way.each, way.run = runner.native.address, runner.session.address
        return any(way.each for way in self._ways)

    def _native(self) -> int:
        buffer, format = self._windows.buffer, self._format
        end = self._windows.populate(self._position, self._slice)
        scan = Scan(
            position=self._position,
            end=end,
            until=end,
            packets=0,
            matched=0,
            spans=ctypes.addressof(self._spans) if self._spans is not None else 0,
            count=self._count,
            most=_SPANS,
            first=format.first,
            interfaces=len(format.interfaces),
        )
        swapped = format.order != ("<" if sys.byteorder == "little" else ">")
        with read_address(buffer) as base:
            run = loop(format.name)
            why = run(ctypes.addressof(scan), base, self._ways, swapped, format.record_header)
        self._scanner.packets += scan.packets
        self._scanner.matched += scan.matched
        moved, self._position, self._count = scan.position > self._position, scan.position, scan.count
        if why == INCOMPLETE and end < len(buffer):
            # What is incomplete goes on behind what was looked at.
            self._slice = SLICE if moved else 2 * self._slice
            return REACHED
        self._slice = SLICE
        # At the end of what is at hand Python looks whether more comes.
        return int(INCOMPLETE if why == REACHED and self._position == len(buffer) else why)

    def _raise(self) -> None:
        """The fault that a filter has ended in."""
        for interface in self._format.interfaces:
            self._scanner.runner(interface.dlt, 0).session.finish(0)

    def _step(self) -> bool:
        """Let Python read one record or block, and run it; False at the end of the file."""
        read = self._read()
        if read is None:
            return False
        record, start = read
        keep = record is None
        if record is not None:
            filter = self._scanner.runner(record.dlt, self._windows.size).filter
            keep = filter.run(record.data, record.wirelen, engine="interpreter") > 0
            self._scanner.packets += 1
            self._scanner.matched += keep
        if keep:
            self._note(start, self._position)
        return True

    def _read(self) -> tuple[Record | None, int] | None:
        """The next record, or None for another block, and where it begins; None at the end of the file.

        What has been noted is written first, where more of the file must be brought for that.
        """
        windows = self._windows
        stream = Stream(View(windows, self._position))
        stream.offset = before = windows.base + self._position
        try:
            record = self._format.read(stream)
        except CaptureError:
            if not cut_off(windows, stream, self._position):
                raise
            self._refill()
            return self._read()
        if stream.offset == before:
            if windows.final:
                return None
            self._refill()
            return self._read()
        start, self._position = self._position, stream.offset - windows.base
        return record, start

    def _note(self, start: int, end: int) -> None:
        """What lies there is to be written."""
        if self._spans is not None:
            if self._count == _SPANS:
                self.write()
            self._spans[2 * self._count], self._spans[2 * self._count + 1] = start, end
            self._count += 1

    def write(self) -> None:
        """Write what has been noted."""
        if self._count and self._spans is not None:
            copy = self._output.gathered_spans if self._scanner.in_native_code else self._output.spans
            copy(self._windows, self._spans, self._count)
        self._count = 0


class _ProgramWalk(_Walk):
    """The way of a program through a file, so many packets at a time."""

    def run(self) -> None:
        #: Packets that are read and not run: their bytes, and where their records lie.
        self._waiting: list[tuple[bytes, int, int]] = []
        try:
            while (read := self._read()) is not None:
                record, start = read
                if record is None:
                    # Blocks between packets keep their places.
                    self.write()
                    self._note(start, self._position)
                    continue
                if record.dlt != _ETHERNET:
                    raise FilterError(f"the capture has packets of link type {record.dlt}, programs take Ethernet's")
                self._waiting.append((record.data, start, self._position))
                if len(self._waiting) == _AT_ONCE:
                    self.write()
        finally:
            self.write()
            self._tell()

    def write(self) -> None:
        """Run what waits first."""
        waiting, self._waiting = self._waiting, []
        values = self._scanner.values_of([data for data, _, _ in waiting])
        for (_, start, end), value in zip(waiting, values, strict=True):
            if value:
                self._note(start, end)
        if waiting:
            self._tell()
        super().write()


class Output:
    """The file that matching records are copied to; it gets its name when the block ends without a failure.

    Where no file was a capture there is nothing to write, not even a header: what has the name stays.

    `path` may be None: nothing is written. ``"-"`` is standard output; that, and what is there and no regular file (a
    pipe, a terminal, /dev/null), is written to as it is. A symbolic link stays one.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._file: BinaryIO | None = None
        #: The name that it has before its own, and whether it has not even that before it is whole.
        self._unfinished: Path | None = None
        self._nameless = False
        self._kind: tuple[object, ...] | None = None

    @property
    def wanted(self) -> bool:
        return self._path is not None

    def __enter__(self) -> Output:
        if self._path is None:
            return self
        if is_file(self._path):
            self._path = self._path.resolve()
            self._unfinished = hidden(self._path, self)
            self._file = _nameless(self._path.parent)
            self._nameless = self._file is not None
            if self._file is None:
                self._file = self._unfinished.open("xb", buffering=0)
        elif str(self._path) == "-":
            sys.stdout.flush()
            self._file = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
        else:
            self._file = self._path.open("wb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        whole = kind is None and self._kind is not None
        with self._file as file:
            if self._nameless and self._unfinished is not None and whole:
                _link(file, self._unfinished)
        if self._unfinished is not None and self._path is not None:
            if whole:
                self._unfinished.replace(self._path)
            else:
                self._unfinished.unlink(missing_ok=True)

    def begin(self, kind: tuple[object, ...], header: bytes) -> None:
        """Another file of a format begins; raises `KbpfError` if it cannot be written behind those before."""
        if self._kind is None:
            self._kind = kind
            self._put(header)
        elif kind != self._kind and self._file is not None:
            raise KbpfError(f"the captures are of different kinds: {_words(self._kind)}, and {_words(kind)}")

    def span(self, windows: Windows, start: int, end: int) -> None:
        self._put(windows.copy(start, end - start))

    def spans(self, windows: Windows, spans: Any, count: int) -> None:
        """Copy what lies between `count` pairs of offsets of what is at hand."""
        part = bytearray()
        for start, end in zip(spans[: 2 * count : 2], spans[1 : 2 * count : 2], strict=True):
            part += windows.copy(start, end - start)
            if len(part) >= _COPIED:
                self._put(part)
                part.clear()
        self._put(part)

    def gathered_spans(self, windows: Windows, spans: Any, count: int) -> None:
        """`spans` in native code."""
        buffer, room, used = windows.buffer, bytearray(_COPIED), ctypes.c_uint64()
        done = 0
        with read_address(buffer) as base, memoryview(buffer) as view, memoryview(room) as copied:
            to = (ctypes.c_char * _COPIED).from_buffer(room)
            while done < count:
                # Writing may have taken long.
                windows.check(spans[2 * done], spans[2 * count - 1])
                following = gather()(base, spans, done, count, to, _COPIED, ctypes.byref(used))
                if following == done:
                    with view[spans[2 * done] : spans[2 * done + 1]] as long:
                        self._put(long)
                    done += 1
                else:
                    with copied[: used.value] as part:
                        self._put(part)
                    done = following

    def append(self, path: str) -> None:
        """Write what is in another such file behind what is here."""
        with Windows(path) as windows:
            stream = Stream(View(windows, 0))
            magic = stream.read_up_to(4)
            if magic == pcapng.MAGIC:
                self.begin(Pcapng.kind, b"")
                self._put(windows.buffer)
            else:
                format = Pcap(stream, magic)
                self.begin(format.kind, windows.copy(0, format.start))
                with memoryview(windows.buffer) as view, view[format.start :] as rest:
                    self._put(rest)

    def _put(self, data: Any) -> None:
        if self._file is None:
            return
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                with view[done:] as rest:
                    try:
                        done += self._file.write(rest) or 0
                    except OSError as error:
                        error.filename = str(self._path)
                        raise


def _nameless(directory: Path) -> BinaryIO | None:
    """A new file that has no name, and is gone with who writes it (Linux 3.11); None where that cannot be."""
    try:
        file = os.fdopen(os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb", buffering=0)
    except OSError:
        return None
    if not Path(f"/proc/self/fd/{file.fileno()}").exists():
        # It could not be given a name.
        file.close()
        return None
    return file


def _link(file: BinaryIO, path: Path) -> None:
    """Give it a name. Without a descriptor of a directory, Python calls link(2), which does not follow links."""
    os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True)


def is_file(path: Path) -> bool:
    """Whether what is written there is or becomes a regular file, rather than going through a pipe or to a device."""
    return str(path) != "-" and (path.is_file() or not path.exists())


def hidden(path: Path, owner: object) -> Path:
    """The name of a file beside another one that nobody else has."""
    return path.with_name(f".{path.name}.{os.getpid()}.{id(owner):x}")


def _words(kind: tuple[object, ...]) -> str:
    if len(kind) == 1:
        return str(kind[0])
    name, order, _, dlt, ticks = kind
    return f"{name} ({'little' if order == '<' else 'big'}-endian, link type {dlt}, {ticks} ticks a second)"
