"""How fast are events read? Ring buffers and perf buffers against bcc's callbacks, both with decoded fields.

    python benchmarks/ring_buffer.py [--events N] [--rounds N]

One program fills the same map before each turn, and only the reading is timed. Goals: 2.5 times as many events a
second as bcc's ring_buffer callbacks, 5 times where events of one size are read in bulk. Needs root and the
distribution's bcc.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import kbpf
from kbpf.kernel.backend import kernel_backend
from kbpf.kernel.bcc import import_bcc
from kbpf.kernel.headers import find_headers
from kbpf.kernel.packages import install_command

SOURCE = """
struct event { u32 pid; u32 kind; u64 time; u64 bytes; char comm[16]; };
BPF_RINGBUF_OUTPUT(ring, %d);
BPF_PERF_OUTPUT(perf);

int to_ring(struct __sk_buff *skb) {
    struct event event = {.pid = 7, .kind = 2, .time = bpf_ktime_get_ns(), .bytes = skb->len, .comm = "worker"};
    return ring.ringbuf_output(&event, sizeof(event), BPF_RB_NO_WAKEUP);
}

int to_perf(struct __sk_buff *skb) {
    struct event event = {.pid = 7, .kind = 2, .time = bpf_ktime_get_ns(), .bytes = skb->len, .comm = "worker"};
    return perf.perf_submit(skb, &event, sizeof(event));
}
"""
#: Bytes that an event takes in either buffer, with its header.
EACH = 56


@dataclass
class Event:
    pid: Annotated[int, "I"]
    kind: Annotated[int, "I"]
    time: Annotated[int, "Q"]
    bytes: Annotated[int, "Q"]
    comm: Annotated[bytes, "16s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    headers = find_headers()
    if headers is None:
        raise SystemExit(f"bcc needs kernel headers: {install_command('headers')}")
    if headers.source is not None:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.source)
    pages = 1 << (options.events * EACH // 4096).bit_length()
    # Runs stay on one processor, whose perf buffer they fill.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    bcc = import_bcc()
    bpf = bcc.BPF(text=SOURCE % pages, cflags=list(headers.flags))
    for kind in ("ring", "perf"):
        program = bpf.load_func(f"to_{kind}", bcc.BPF.SOCKET_FILTER).fd

        def fill(program: int = program) -> None:
            kernel_backend().program_run(program, bytes(64), b"", repeat=options.events)

        measure(bpf, kind, fill, pages, options.events, options.rounds)


def measure(bpf: Any, kind: str, fill: Callable[[], None], pages: int, count: int, rounds: int) -> None:
    table = bpf[kind]
    kernel = kernel_backend()
    with kbpf.BpfMap.from_fd(kernel, kernel.duplicate(table.map_fd)) as map:
        readers = {"bcc callbacks": bcc_reader(bpf, table, kind, pages), **kbpf_readers(map, kind, pages, count)}
        times: dict[str, list[float]] = {name: [] for name in readers}
        for name in list(readers) * rounds:
            prepare, read = readers[name]
            done = prepare()
            fill()
            start = time.perf_counter()
            seen, total = read()
            times[name].append(time.perf_counter() - start)
            done()
            assert (seen, total) == (count, 7 * count), (name, seen, total)
    median = {name: statistics.median(all) for name, all in times.items()}
    print(f"{count} events from a {kind} buffer, median of {rounds}:")
    for name, seconds in median.items():
        ratio = median["bcc callbacks"] / seconds
        print(f"  {name:34} {count / seconds / 1e6:6.2f} million a second   {ratio:5.1f} times bcc's")


Reader = tuple[Callable[[], Callable[[], object]], Callable[[], tuple[int, int]]]


def bcc_reader(bpf: Any, table: Any, kind: str, pages: int) -> Reader:
    """As bcc's users read: a callback for each event, which decodes it and reads its fields."""
    seen = total = 0

    def callback(_: Any, data: Any, size: int) -> None:
        nonlocal seen, total
        event = table.event(data)
        seen += 1
        total += event.pid
        _ = event.time, event.bytes, event.comm

    if kind == "ring":
        table.open_ring_buffer(callback)

    def prepare() -> Callable[[], object]:
        nonlocal seen, total
        seen = total = 0
        if kind == "perf":
            # Whoever opens the array last has it.
            table.open_perf_buffer(callback, page_cnt=pages)
            return lambda: [table.__delitem__(cpu) for cpu in list(table._open_key_fds)]
        return lambda: None

    def read() -> tuple[int, int]:
        bpf.ring_buffer_consume() if kind == "ring" else bpf.perf_buffer_consume()
        return seen, total

    return prepare, read


def kbpf_readers(map: kbpf.BpfMap, kind: str, pages: int, count: int) -> dict[str, Reader]:
    def reader(type: Any, read: Callable[[Any], tuple[int, int]]) -> Reader:
        events: Any = None

        def prepare() -> Callable[[], object]:
            nonlocal events
            events = map.events(type, size=pages * 4096)
            close: Callable[[], object] = events.close
            return close

        return prepare, lambda: read(events)

    def one_by_one(events: Any) -> tuple[int, int]:
        seen = total = 0
        for event in events:
            seen += 1
            total += event.pid
            _ = event.time, event.bytes, event.comm
            if seen == count:
                break
        return seen, total

    def unpacked(events: Any) -> tuple[int, int]:
        seen = total = 0
        for pid, _kind, _time, _bytes, _comm in events:
            seen += 1
            total += pid
            if seen == count:
                break
        return seen, total

    def in_bulk(events: Any) -> tuple[int, int]:
        everything = events.read_all()
        return len(everything), sum(event[0] for event in everything)

    readers = {
        "kbpf, a dataclass": reader(Event, one_by_one),
        "kbpf, tuples": reader("IIQQ16s", unpacked),
        "kbpf, tuples in bulk": reader("IIQQ16s", in_bulk),
        "kbpf, bytes in bulk": reader(None, lambda events: (len(found := events.read_all()), 7 * len(found))),
    }
    try:
        import numpy  # noqa: F401
    except ImportError:
        return readers

    def as_array(events: Any) -> tuple[int, int]:
        array = events.read_array()
        return len(array), int(array["pid"].sum())

    return {**readers, "kbpf, an array of numpy": reader(Event, as_array)}


if __name__ == "__main__":
    main()
