"""Maps with keys as typed mutable mappings, on either backend.

The semantics are bpf(2)'s: what the kernel refuses raises, what it leaves open (the order of a hash, whether iteration
sees concurrent changes) stays open. A method is one command, which nothing comes between, where it does not say else.
"""

from __future__ import annotations

import errno
import struct
import sys
import threading
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, MutableMapping, ValuesView
from contextlib import suppress
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

from kbpf.backend import Backend
from kbpf.errors import BpfError, PermissionDeniedError
from kbpf.runtime.maps import walk
from kbpf.runtime.maps.base import BpfMap, Shape
from kbpf.runtime.maps.snapshot import Snapshot
from kbpf.uapi.constants import BPF_ANY, BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG, BPF_NOEXIST

if TYPE_CHECKING:
    from kbpf.runtime.maps.watch import Change
    from kbpf.runtime.program import Program

__all__ = ["Map", "Shape"]

_MISSING: Any = object()


class Map(BpfMap, MutableMapping[Any, Any]):
    """A BPF map with keys.

    Keys and values are Python values where their types are known (`kbpf.runtime.codecs`), and bytes where not.
    A missing key is a `KeyError`. Threads and processes may use one at the same time. Linux 3.18; batches since 5.6,
    used where there.
    """

    __hash__ = object.__hash__

    #: Whether there are keys without a value: indices of arrays where nothing is.
    has_gaps: ClassVar[bool] = False
    #: Whether values are data, which programs may write, and no objects of the kernel.
    holds_data: ClassVar[bool] = True

    def __init__(
        self,
        backend: Backend,
        fd: int,
        shape: Shape,
        key_type: Any = None,
        value_type: Any = None,
    ) -> None:
        super().__init__(backend, fd, shape, key_type, value_type)
        self._adder: Program | None = None
        self._adder_lock = threading.Lock()
        self._bind()

    def _bind(self) -> None:
        """Have the backend's own lookup at hand, which packs a key of one number and unpacks flat values itself."""
        key, value = self.key_codec, self.value_codec
        self._by_number = isinstance(key.make, itemgetter)
        packer = key.flat if self._by_number else None
        with self._descriptor as fd:
            read = self._backend.map_reader(fd, self.shape.key_size, value.size, packer, value.flat)
        self._read = read if packer is not None else _encoding(key.encode, read)
        #: What makes a value of what is read; None where that is the value.
        self._made: Callable[[Any], Any] | None = value.decode
        if value.flat is not None:
            make = value.make
            self._made = None if make is None or isinstance(make, itemgetter) else make
            if self._made and len(value.flat.unpack(bytes(value.size))) == 1:
                self._made = _of_one_field(self._made)

    def _set_types(self, key: Any, value: Any) -> None:
        super()._set_types(key, value)
        self._bind()

    def close(self) -> None:
        # First: whoever still takes the other is inside the descriptor already.
        self._read = self._refuse
        super().close()
        if self._adder is not None:
            self._adder.close()

    def _refuse(self, key: Any) -> Any:
        raise self._descriptor.closed_error()

    def __eq__(self, other: object) -> bool:
        return self is other

    # One element.

    def __getitem__(self, key: Any) -> Any:
        # What ``with descriptor`` does, in half the time.
        descriptor = self._descriptor
        inside = descriptor.inside
        inside.append(None)
        try:
            found = self._read(key)
        except (struct.error, TypeError, ValueError):
            # Bytes, or what does not fit and is to be told so.
            encoded = self._key(key)
            if not self._by_number or self.key_codec.flat is None:
                raise
            return self[self.key_codec.flat.unpack(encoded)[0]]
        except OSError as error:
            raise self._failure(error, "look up a key in", "map_lookup_elem") from None
        finally:
            inside.pop()
            if descriptor.number is None:
                descriptor.give_back()
        if found is None:
            raise KeyError(key)
        return found if self._made is None else self._made(found)

    def raw_value(self, key: bytes) -> bytes:
        """The bytes of a value; of a per-CPU map all CPUs', each rounded up to 8. `KeyError` for a missing key.

        Raises `ValueError` for a key of another length than keys have.
        """
        if len(key) != self.shape.key_size:
            raise ValueError(f"a key of {len(key)} bytes where {self.label} has {self.shape.key_size}")
        return self._look_up(key, key, 0)

    def lookup_element(self, key: Any, flags: int = 0) -> Any:
        """BPF_MAP_LOOKUP_ELEM with flags: with ``BPF_F_LOCK`` (Linux 5.1) no program's locked update is seen half done.

        Raises `KeyError`, `BpfError` (EINVAL for flags that the map does not take).
        """
        return self.value_codec.decode(self._look_up(key, self._key(key), flags))

    def _look_up(self, key: Any, encoded: bytes, flags: int) -> bytes:
        try:
            with self._descriptor as fd:
                return self._backend.map_lookup(fd, encoded, self.value_codec.size, flags)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise KeyError(key) from None
            raise self._failure(error, "look up a key in", "map_lookup_elem") from None

    def raw_items(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values as the bytes that they are, by batches where there are; see `raw_value`."""
        key_size, value_size = self.shape.key_size, self.value_codec.size
        for keys, values in walk.chunks(self):
            for index in range(len(keys) // key_size):
                yield (
                    keys[index * key_size : (index + 1) * key_size],
                    values[index * value_size : (index + 1) * value_size],
                )

    def __setitem__(self, key: Any, value: Any) -> None:
        self.update_element(key, value)

    def update_element(self, key: Any, value: Any, flags: int = BPF_ANY) -> None:
        """BPF_MAP_UPDATE_ELEM: store, with ``BPF_NOEXIST`` only a new key, with ``BPF_EXIST`` only an old one.

        ``BPF_F_LOCK`` (Linux 5.1) besides takes the spin lock of the value. Raises `KeyError` where BPF_EXIST finds
        none, `MapFullError` when there is no room, `BpfError` (EEXIST, EPERM if frozen).
        """
        try:
            with self._descriptor as fd:
                self._backend.map_update(fd, self._key(key), self.value_codec.encode(value), flags)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise KeyError(key) from None
            raise self._failure(error, "store in", "map_update_elem") from None

    def __delitem__(self, key: Any) -> None:
        try:
            with self._descriptor as fd:
                self._backend.map_delete(fd, self._key(key))
        except OSError as error:
            if self._is_missing(error):
                raise KeyError(key) from None
            raise self._failure(error, "delete from", "map_delete_elem") from None

    def _is_missing(self, error: OSError) -> bool:
        """Whether a deletion was refused because there is no such key."""
        return error.errno == errno.ENOENT

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The value of a key, which is stored as `default` if there is none: in one command, of several that try it."""
        while True:
            try:
                self.update_element(key, default, BPF_NOEXIST)
            except BpfError as error:
                if error.errno != errno.EEXIST:
                    raise
            else:
                return default
            try:
                return self[key]
            except KeyError:
                continue  # Somebody deleted it in between.

    def pop(self, key: Any, default: Any = _MISSING) -> Any:
        """Take a key out and give its value, `default` if there is none.

        One command where the kernel has it (BPF_MAP_LOOKUP_AND_DELETE_ELEM: hashes since Linux 5.14), else a lookup
        and a deletion, between which the value may change.
        """
        try:
            return self.value_codec.decode(self._take(self._key(key)))
        except KeyError:
            if default is _MISSING:
                raise KeyError(key) from None
            return default

    def popitem(self) -> tuple[Any, Any]:
        """Take some element out. Raises `KeyError` when there is none."""
        while True:
            try:
                with self._descriptor as fd:
                    key = self._backend.map_next_key(fd, None, self.shape.key_size)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise KeyError(f"{self.label} is empty") from None
                raise self._failure(error, "take from", "map_get_next_key") from None
            try:
                return self.key_codec.decode(key), self.value_codec.decode(self._take(key))
            except KeyError:
                continue  # Somebody else took it first.

    def _take(self, key: bytes) -> bytes:
        size = self.value_codec.size
        try:
            with self._descriptor as fd:
                try:
                    return self._backend.map_lookup_and_delete(fd, key, size)
                except OSError as error:
                    if error.errno not in walk.NO_COMMAND:
                        raise
                value = self._backend.map_lookup(fd, key, size)
                self._backend.map_delete(fd, key)
        except OSError as error:
            if self._is_missing(error):
                raise KeyError from None
            raise self._failure(error, "take from", "map_lookup_and_delete_elem") from None
        return value

    # All elements.

    def __iter__(self) -> Iterator[Any]:
        for keys, _ in walk.chunks(self, keys_only=True):
            yield from self.key_codec.decode_many(keys)

    def __len__(self) -> int:
        """Elements now in it, counted by reading."""
        return sum(len(keys) // self.shape.key_size for keys, _ in walk.chunks(self, keys_only=True))

    def items(self) -> ItemsView[Any, Any]:
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        return _Values(self)

    def snapshot(self) -> Snapshot:
        """Everything in it as a ``dict``, which also says what it is worth: see `Snapshot`."""
        result = Snapshot(self._is_constant())
        pieces = walk.chunks(self)
        while True:
            try:
                keys, values = next(pieces)
            except StopIteration as end:
                result.complete = end.value
                return result
            result.update(zip(self.key_codec.decode_many(keys), self.value_codec.decode_many(values), strict=True))

    def _is_constant(self) -> bool:
        """Whether nobody can change it any more: neither programs nor user space."""
        return bool(self.shape.flags & BPF_F_RDONLY_PROG) and self.info.frozen

    # Many elements.

    def update(self, other: Any = (), /, **named: Any) -> None:
        """Store all of a mapping or of pairs: `update_many`."""
        self.update_many(other)
        if named:
            self.update_many(named)

    def update_many(self, elements: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> None:
        """Store many elements: in batches (BPF_MAP_UPDATE_BATCH, Linux 5.6), or one by one where there are none.

        Each element is stored by itself: where one is refused, as by `MapFullError`, those before it are in.
        """
        pairs = elements.items() if isinstance(elements, Mapping) else elements
        encode_value = self.value_codec.encode
        encoded = [(self._key(key), encode_value(value)) for key, value in pairs]
        at = self._in_batches([key for key, _ in encoded], [value for _, value in encoded])
        for key, value in encoded[at:]:
            try:
                with self._descriptor as fd:
                    self._backend.map_update(fd, key, value, BPF_ANY)
            except OSError as error:
                raise self._failure(error, "store in", "map_update_elem") from None

    def _in_batches(self, keys: list[bytes], values: list[bytes]) -> int:
        """How many of the elements were stored: all, or those before there turned out to be no such command."""
        each = max(walk.BATCH_BYTES // (self.shape.key_size + self.value_codec.size), 1)
        for at in range(0, len(keys), each):
            some = keys[at : at + each]
            try:
                with self._descriptor as fd:
                    self._backend.map_update_batch(fd, b"".join(some), b"".join(values[at : at + each]), len(some))
            except OSError as error:
                if error.errno in walk.NO_COMMAND:
                    return at + int(getattr(error, "done", 0))
                raise self._failure(error, "store in", "map_update_batch") from None
        return len(keys)

    def delete_many(self, keys: Iterable[Any]) -> int:
        """Delete those of the keys that are there, and give how many were: in batches where there are such."""
        return self._delete([self._key(key) for key in keys])

    def _delete(self, encoded: list[bytes]) -> int:
        at = deleted = 0
        most = each = max(walk.BATCH_BYTES // self.shape.key_size, 1)
        while at < len(encoded):
            some = encoded[at : at + each]
            try:
                with self._descriptor as fd:
                    done = self._backend.map_delete_batch(fd, b"".join(some), len(some))
            except OSError as error:
                done = int(getattr(error, "done", 0))
                at, deleted = at + done, deleted + done
                if error.errno == errno.ENOENT:
                    at += 1  # That one is not there.
                    # Others may be missing too, and those behind each would be copied once more.
                    each = max(2 * done, 1)
                elif error.errno in walk.NO_COMMAND:
                    break
                else:
                    raise self._failure(error, "delete from", "map_delete_batch") from None
            else:
                at, deleted = at + done, deleted + done
                each = min(2 * each, most)
        for key in encoded[at:]:
            try:
                with self._descriptor as fd:
                    self._backend.map_delete(fd, key)
            except OSError as error:
                if not self._is_missing(error):
                    raise self._failure(error, "delete from", "map_delete_elem") from None
            else:
                deleted += 1
        return deleted

    def drain(self) -> list[tuple[Any, Any]]:
        """Take all elements out and give them, as for counters that are read and begin anew.

        In batches (BPF_MAP_LOOKUP_AND_DELETE_BATCH, Linux 5.6: hashes), or key by key as `pop` does. What is added
        meanwhile may be in it or stay, so that a key that was taken and came again is in it twice; what a program adds
        to a value that it has looked up already may be lost with it. Raises `BpfError` (EINVAL) where elements cannot
        be deleted.
        """
        taken: list[tuple[Any, Any]] = []
        size, decode, decode_value = self.shape.key_size, self.key_codec.decode, self.value_codec.decode
        try:
            for keys, values in walk.chunks(self, delete=True):
                taken += zip(self.key_codec.decode_many(keys), self.value_codec.decode_many(values), strict=True)
        except walk.NoSuchBatch:
            for keys, _ in list(walk.chunks(self, keys_only=True)):
                for key in (keys[at : at + size] for at in range(0, len(keys), size)):
                    with suppress(KeyError):
                        taken.append((decode(key), decode_value(self._take(key))))
        return taken

    def increment(self, key: Any, by: int = 1) -> None:
        """Add to a number of 4 or 8 bytes, of which nothing gets lost: neither what programs add nor what others do.

        A small program of type ``syscall`` does it with one atomic instruction (Linux 5.14), because bpf(2) has no
        command to add; it is loaded the first time, which takes what loading programs takes. (``map[key] += 1`` needs
        no program, and loses what is added between its lookup and its update.) A missing key begins at 0. Of a per-CPU
        map the value of the processor is added to that this happens to run on: the sum counts. Numbers wrap around.

        Raises `TypeError` for values that are no such number and for LPM tries, in which a program finds the longest
        prefix and not the key's own, `MapFullError`, `PermissionDeniedError` also for maps that programs may not read
        and write, and `KeyError` behind the end of an array.
        """
        if self.shape.value_size not in (4, 8) or not self.holds_data:
            raise TypeError(f"values of {self.label} are no numbers of 4 or 8 bytes")
        if barred := self.shape.flags & (BPF_F_RDONLY_PROG | BPF_F_WRONLY_PROG):
            name = "BPF_F_RDONLY_PROG" if barred == BPF_F_RDONLY_PROG else "BPF_F_WRONLY_PROG"
            hint = f"a program does the adding, which may not read and write the map ({name})"
            raise PermissionDeniedError(errno.EACCES, f"add in {self.label}", (hint,))
        encoded, amount = self._key(key), by & (1 << 64) - 1
        adder = self._adder_program()
        while adder.run(context=amount.to_bytes(8, sys.byteorder) + encoded).value:
            first = (amount & (1 << 8 * self.shape.value_size) - 1).to_bytes(self.shape.value_size, sys.byteorder)
            try:
                with self._descriptor as fd:
                    self._backend.map_update(fd, encoded, self._first(first), BPF_NOEXIST)
                return
            except OSError as error:
                if error.errno == errno.E2BIG and "array" in self.type:
                    raise KeyError(key) from None
                if error.errno != errno.EEXIST:
                    raise self._failure(error, "add in", "map_update_elem") from None

    def _first(self, value: bytes) -> bytes:
        """A new element's value: of per-CPU maps that of the first CPU, and zeroes."""
        return value.ljust(self.value_codec.size, b"\0")

    def _adder_program(self) -> Program:
        from kbpf.runtime.maps.adder import load_adder

        self.fileno()
        owner = self._owner or self
        assert isinstance(owner, Map)
        with owner._adder_lock:
            if owner._adder is None:
                owner._adder = load_adder(owner)
            return owner._adder

    def watch(self, interval: float = 1.0, *, count: int | None = None) -> Iterator[Change]:
        """Read it every `interval` seconds, and give what changed each time: see `kbpf.runtime.maps.watch.Change`.

        The first reading is made when the first change is asked for, and the change comes an interval later; `count` is
        how many there will be. Times are multiples of the interval from the start on, by the monotonic clock; those
        that a slow reader misses are left out. Raises `TypeError` where values have no numbers.
        """
        from kbpf.runtime.maps.watch import watch

        if interval <= 0:
            raise ValueError(f"an interval of {interval} seconds")
        return watch(self, interval, count)

    def clear(self) -> None:
        """Delete the elements that are in it now. Raises `BpfError` (EINVAL) where they cannot be deleted."""
        size = self.shape.key_size
        for keys, _ in list(walk.chunks(self, keys_only=True)):
            self._delete([keys[at : at + size] for at in range(0, len(keys), size)])

    def _key(self, key: Any) -> bytes:
        return self.key_codec.encode(key)


class _Items(ItemsView[Any, Any]):
    _mapping: Map

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        map = self._mapping
        many = map.key_codec.decode_many, map.value_codec.decode_many
        # The zips are walked in C, which is a third of the time.
        return chain.from_iterable(
            zip(many[0](keys), many[1](values), strict=True) for keys, values in walk.chunks(map)
        )


class _Values(ValuesView[Any]):
    _mapping: Map

    def __iter__(self) -> Iterator[Any]:
        map = self._mapping
        return chain.from_iterable(map.value_codec.decode_many(values) for _, values in walk.chunks(map))


def _encoding(encode: Callable[[Any], bytes], read: Callable[[bytes], Any]) -> Callable[[Any], Any]:
    return lambda key: read(encode(key))


def _of_one_field(make: Callable[[tuple[Any, ...]], Any]) -> Callable[[Any], Any]:
    return lambda field: make((field,))
