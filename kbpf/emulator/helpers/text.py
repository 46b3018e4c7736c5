"""Helpers over text: formatting as bpf_trace_printk and bpf_snprintf do it, and numbers out of text."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Sequence

from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32, M64
from kbpf.errors import EmulationFault

#: A conversion (`bpf_bprintf_prepare`, kernel/bpf/helpers.c): flags and width, then size and kind.
_CONVERSION = re.compile(
    rb"%(?:(?P<percent>%)|(?P<string>s|p[ku]s)|(?P<pointer>p[xK]?)(?![a-zA-Z0-9])|(?P<character>c)"
    rb"|(?P<flags>[0 +-]*)(?P<width>\d*)(?P<size>l{0,2})(?P<kind>[diuxX]))"
)
#: Arguments that bpf_trace_printk passes on, and the most that the others do.
_FEW, _MOST = 3, 12
_SPACE = b"\t\n\v\f\r \xa0"
#: FIELD_WIDTH_MAX (lib/vsprintf.c).
_MOST_WIDTH = (1 << 23) - 1
#: Digits of a number that are looked at.
_MOST_TEXT = 63
_BASES = (0, 8, 10, 16)


class _BadFormat(Exception):
    pass


def text_at(run: Run, address: int) -> bytes:
    """The bytes up to a NUL."""
    out = bytearray()
    while byte := run.load(address + len(out), 1):
        out.append(byte)
    return bytes(out)


def _formatted(run: Run, format: bytes, arguments: Sequence[int]) -> bytes:
    if any(byte == 0x7F or (byte < 0x20 and not 9 <= byte <= 13) for byte in format):
        raise _BadFormat
    rest, out, at = iter(arguments), b"", 0
    for match in _CONVERSION.finditer(format):
        if b"%" in format[at : match.start()]:
            raise _BadFormat
        out += format[at : match.start()]
        at = match.end()
        if match["percent"]:
            out += b"%"
            continue
        value = next(rest, None)
        if value is None:
            raise _BadFormat
        out += _conversion(run, match, value)
    if b"%" in format[at:]:
        raise _BadFormat
    return out + format[at:]


def _conversion(run: Run, match: re.Match[bytes], value: int) -> bytes:
    if match["string"]:
        try:
            return text_at(run, value)
        except EmulationFault:
            return b""
    if match["pointer"]:
        # The kernel shows a digest of the address.
        return b"%016x" % value
    if match["character"]:
        return bytes([value & 0xFF])
    bits = 64 if match["size"] else 32
    value &= (1 << bits) - 1
    if match["kind"] in b"di" and value >> bits - 1:
        value -= 1 << bits
    kind = match["kind"].replace(b"u", b"d").replace(b"i", b"d")
    flags = match["flags"] if match["kind"] in b"di" else match["flags"].translate(None, b"+ ")
    width = min(int(match["width"] or 0), _MOST_WIDTH)
    return (b"%" + flags + (b"%d" % width if width else b"") + kind) % value


def _format_at(run: Run, address: int, size: int) -> bytes:
    text, end, _ = run.read(address, size).partition(b"\0")
    if not end:
        raise _BadFormat
    return text


def _trace(line: bytes) -> int:
    if environment.trace is not None:
        environment.trace(line.decode(errors="replace"))
    return len(line)


def trace_printk(run: Run, text: int, size: int, first: int, second: int, third: int) -> int:
    try:
        return _trace(_formatted(run, _format_at(run, text, size & M32), (first, second, third)[:_FEW]))
    except _BadFormat:
        return -errno.EINVAL


def _arguments(run: Run, address: int, size: int) -> tuple[int, ...]:
    if size % 8 or size > 8 * _MOST or (size and not address):
        raise _BadFormat
    return struct.unpack(f"={size // 8}Q", run.read(address, size)) if size else ()


def trace_vprintk(run: Run, text: int, size: int, data: int, data_size: int, _: int) -> int:
    try:
        return _trace(_formatted(run, _format_at(run, text, size & M32), _arguments(run, data, data_size & M32)))
    except _BadFormat:
        return -errno.EINVAL


def snprintf(run: Run, to: int, size: int, format: int, data: int, data_size: int) -> int:
    """How long the whole text is, with its NUL, however much of it had room."""
    size &= M32
    if size:
        run.check_writable(to, size)
    try:
        out = _formatted(run, text_at(run, format), _arguments(run, data, data_size & M32))
    except _BadFormat:
        return -errno.EINVAL
    if size:
        run.write(to, out[: size - 1] + b"\0")
    return len(out) + 1


def _parse(run: Run, text: int, size: int, flags: int) -> tuple[int, bool, int] | int:
    """How many bytes were read, whether there was a minus, and the number; or a negative errno."""
    raw = run.read(text, size & M32)
    if flags not in _BASES or not raw:
        return -errno.EINVAL
    start = len(raw) - len(raw.lstrip(_SPACE))
    negative = raw[start : start + 1] == b"-"
    start += negative
    if start == len(raw):
        return -errno.EINVAL
    body = raw[start : start + _MOST_TEXT].lower()
    prefixed = re.match(rb"0x[0-9a-f]", body) is not None
    base = flags or (16 if prefixed else 8 if body[:1] == b"0" else 10)
    skipped = 2 if base == 16 and body[:2] == b"0x" else 0
    allowed = b"0123456789abcdef"[:base]
    digits = len(body) - skipped - len(body[skipped:].lstrip(allowed))
    if not digits:
        return -errno.EINVAL
    number = int(body[skipped : skipped + digits], base)
    if number > M64:
        return -errno.ERANGE
    return start + skipped + digits, negative, number


def _store_number(run: Run, to: int, parsed: tuple[int, bool, int] | int, signed: bool) -> int:
    if isinstance(parsed, int):
        return parsed
    consumed, negative, number = parsed
    if not signed and negative:
        return -errno.EINVAL
    if signed and number > (1 << 63 if negative else (1 << 63) - 1):
        return -errno.ERANGE
    run.store(to, 8, -number if negative else number)
    return consumed


def strtol(run: Run, text: int, size: int, flags: int, to: int, _: int) -> int:
    run.store(to, 8, 0)
    return _store_number(run, to, _parse(run, text, size, flags), signed=True)


def strtoul(run: Run, text: int, size: int, flags: int, to: int, _: int) -> int:
    run.store(to, 8, 0)
    return _store_number(run, to, _parse(run, text, size, flags), signed=False)


def strncmp(run: Run, first: int, size: int, second: int, *_: int) -> int:
    """-1, 0 or 1."""
    for at in range(size & M32):
        a, b = run.load(first + at, 1), run.load(second + at, 1)
        if a != b:
            return -1 if a < b else 1
        if not a:
            break
    return 0


HELPERS: dict[str, HelperFunction] = {
    "trace_printk": trace_printk,
    "trace_vprintk": trace_vprintk,
    "snprintf": snprintf,
    "strtol": strtol,
    "strtoul": strtoul,
    "strncmp": strncmp,
}
