"""Spans of a buffer, a block at a time: looked at first, then run without a look at each, many at once where that pays.

A filter's tests are branches that no processor foresees where packets are mixed. Where the processor gathers from
several addresses at once, LLVM turns the loop over a block into one without branches, of eight packets a round. That
takes loads of eight bytes, and packets that are not the last ones in the buffer.
"""

from __future__ import annotations

#: Packets in a block.
_BLOCK = 64
#: Bytes that a cache holds; of a larger buffer, a block's packets are asked for before they are run.
_CACHED = 1 << 20
#: Bytes behind a packet that a `wide` load may take.
_SLACK = 7
#: Packets a round of a loop in vectors.
_LANES = 8

_SPANS = "ptr %base, i64 %room, ptr %offsets, ptr %sizes"


def _loop(name: str, result: str, parameters: str, round: str, ends: str, first: str = "", last: str = "") -> str:
    """A function that does something for each of `count`, at least one. `first` are phis, `last` metadata."""
    return f"""
define internal {result} @{name}(i64 %count, {parameters}) noinline {{
entry:
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %following, %head ]
{first}
  %offsetp = getelementptr i64, ptr %offsets, i64 %i
  %offset = load i64, ptr %offsetp
{round}
  %following = add nuw i64 %i, 1
  %more = icmp ult i64 %following, %count
  br i1 %more, label %head, label %stop{last}
stop:
  ret {ends}
}}
"""


_ASK = _loop(
    "ask",
    "void",
    "ptr %base, ptr %offsets",
    """
  %data = getelementptr i8, ptr %base, i64 %offset
  call void @llvm.prefetch.p0(ptr %data, i32 0, i32 3, i32 1)
""",
    "void",
)

_FITS = _loop(
    "fits",
    "i1",
    "i64 %room, ptr noalias readonly %offsets, ptr noalias readonly %sizes",
    """
  %sizep = getelementptr i64, ptr %sizes, i64 %i
  %size = load i64, ptr %sizep
  %inside = icmp ule i64 %offset, %room
  %left = sub i64 %room, %offset
  %whole = icmp ule i64 %size, %left
  %both = and i1 %inside, %whole
  %still = and i1 %good, %both
""",
    "i1 %still",
    first="  %good = phi i1 [ true, %entry ], [ %still, %head ]",
)

_METADATA = f"""
!100 = distinct !{{!100, !101, !102}}
!101 = !{{!"llvm.loop.vectorize.enable", i1 true}}
!102 = !{{!"llvm.loop.vectorize.width", i32 {_LANES}}}
"""


def _unchecked(each: str, vectors: bool) -> str:
    return _loop(
        "unchecked",
        "void",
        "ptr noalias %run, ptr noalias readonly %lengths, ptr noalias %out, ptr noalias readonly %base, "
        "ptr noalias readonly %offsets, ptr noalias readonly %sizes",
        f"""
  %sizep = getelementptr i64, ptr %sizes, i64 %i
  %size = load i64, ptr %sizep
  %lengthp = getelementptr i64, ptr %lengths, i64 %i
  %length = load i64, ptr %lengthp
  %data = getelementptr i8, ptr %base, i64 %offset
  %kept = call i64 @{each}(ptr %run, ptr %data, i64 %size, i64 %length)
  %match = icmp ne i64 %kept, 0
  %byte = zext i1 %match to i8
  %outp = getelementptr i8, ptr %out, i64 %i
  store i8 %byte, ptr %outp
""",
        "void",
        last=", !llvm.loop !100" if vectors else "",
    )


def over_blocks(each: str, vectors: bool) -> str:
    """``@over_spans``, with ``@checked`` for blocks that hold a packet outside the buffer, or too close to its end.

    With `vectors`, what is called has `wide` loads (`kbpf.emulator.jit.emit.Source`).
    """
    return f"""{_ASK}{_FITS}{_unchecked(each, vectors)}{_METADATA if vectors else ""}
define i64 @over_spans(ptr noalias %run, i64 %count, ptr %wirelens, ptr %out, {_SPANS}) {{
entry:
  %none = icmp eq ptr %wirelens, null
  %lengths = select i1 %none, ptr %sizes, ptr %wirelens
  %far = icmp ugt i64 %room, {_CACHED}
  %enough = call i64 @llvm.usub.sat.i64(i64 %room, i64 {_SLACK if vectors else 0})
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %following, %done ]
  %left = sub i64 %count, %i
  %n = call i64 @llvm.umin.i64(i64 %left, i64 {_BLOCK})
  %end = icmp eq i64 %n, 0
  br i1 %end, label %stop, label %block
block:
  %o = getelementptr i64, ptr %offsets, i64 %i
  %s = getelementptr i64, ptr %sizes, i64 %i
  %l = getelementptr i64, ptr %lengths, i64 %i
  %r = getelementptr i8, ptr %out, i64 %i
  br i1 %far, label %ask, label %look
ask:
  call void @ask(i64 %n, ptr %base, ptr %o)
  br label %look
look:
  %fit = call i1 @fits(i64 %n, i64 %enough, ptr %o, ptr %s)
  br i1 %fit, label %all, label %some
all:
  call void @unchecked(i64 %n, ptr %run, ptr %l, ptr %r, ptr %base, ptr %o, ptr %s)
  br label %done
some:
  %ran = call i64 @checked(ptr %run, i64 %n, ptr %l, ptr %r, ptr %base, i64 %room, ptr %o, ptr %s)
  %through = icmp eq i64 %ran, %n
  br i1 %through, label %done, label %short
short:
  %did = add i64 %i, %ran
  ret i64 %did
done:
  %following = add nuw i64 %i, %n
  br label %head
stop:
  ret i64 %i
}}
"""
