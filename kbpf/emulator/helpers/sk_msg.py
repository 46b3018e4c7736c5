"""Helpers of sk_msg programs: where a message goes to, how much of it, and its bytes (net/core/filter.c)."""

from __future__ import annotations

import errno

from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.helpers.sk_skb import redirect
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.sockets import SockHash, SockMap
from kbpf.emulator.memory import M32
from kbpf.emulator.sk_msg import SkMsg
from kbpf.errors import EmulationFault

#: What no message grows beyond here; Linux finds no pages for more than a few MiB.
_MOST_BYTES = 1 << 20


def _message(run: Run, context: int) -> SkMsg:
    check_context(context)
    message = run.context
    if not isinstance(message, SkMsg):
        raise EmulationFault("this program is not of type sk_msg")
    return message


def msg_apply_bytes(run: Run, context: int, count: int, *_: int) -> int:
    """The verdict is for so many bytes."""
    _message(run, context).apply_bytes = count & M32
    return 0


def msg_cork_bytes(run: Run, context: int, count: int, *_: int) -> int:
    """Wait for so many bytes, and run again."""
    _message(run, context).cork_bytes = count & M32
    return 0


def msg_pull_data(run: Run, context: int, start: int, end: int, flags: int, _: int) -> int:
    message, start, end = _message(run, context), start & M32, end & M32
    if flags or end <= start or end > message.size:
        return -errno.EINVAL
    message.pull(start, end)
    message.show(run)
    return 0


def msg_push_data(run: Run, context: int, start: int, size: int, flags: int, _: int) -> int:
    message, start, size = _message(run, context), start & M32, size & M32
    if flags:
        return -errno.EINVAL
    if not size:
        return 0
    if start > message.size:
        return -errno.EINVAL
    if message.size + size > _MOST_BYTES:
        return -errno.ENOMEM
    message.insert(start, size)
    message.show(run)
    return 0


def msg_pop_data(run: Run, context: int, start: int, size: int, flags: int, _: int) -> int:
    message, start, size = _message(run, context), start & M32, size & M32
    if flags:
        return -errno.EINVAL
    if not size:
        return 0
    if start + size > message.size:
        return -errno.EINVAL
    message.remove(start, size)
    message.show(run)
    return 0


HELPERS: dict[str, HelperFunction] = {
    "msg_redirect_map": redirect(SockMap, _message, "a message"),
    "msg_redirect_hash": redirect(SockHash, _message, "a message"),
    "msg_apply_bytes": msg_apply_bytes,
    "msg_cork_bytes": msg_cork_bytes,
    "msg_pull_data": msg_pull_data,
    "msg_push_data": msg_push_data,
    "msg_pop_data": msg_pop_data,
}
