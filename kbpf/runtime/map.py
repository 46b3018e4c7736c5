"""Maps as typed mutable mappings, on either backend.

The semantics are bpf(2)'s: what the kernel refuses raises, what it leaves open (the order
of a hash, whether iteration sees concurrent changes) stays open.
"""

from __future__ import annotations

import errno
from collections.abc import ItemsView, Iterator, MutableMapping, Sequence, ValuesView
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from kbpf.backend import Backend, object_name
from kbpf.errors import BpfError, MapFullError
from kbpf.info import MapInfo
from kbpf.runtime.backends import select
from kbpf.runtime.codecs import Codec, codec, per_cpu_codec
from kbpf.runtime.failures import doing, translate
from kbpf.runtime.resource import Resource
from kbpf.specs import MapSpec
from kbpf.types import Type
from kbpf.uapi.constants import BPF_ANY

if TYPE_CHECKING:
    from kbpf.runtime.event_writer import EventWriter
    from kbpf.runtime.events import Events

_PER_CPU = frozenset(["percpu_hash", "percpu_array", "lru_percpu_hash", "percpu_cgroup_storage"])
_ARRAYS = frozenset(["array", "percpu_array", "prog_array", "perf_event_array", "cgroup_array", "array_of_maps"])
# Elements in the first batch; a bucket that does not fit doubles it.
_BATCH = 8192


class Shape(NamedTuple):
    """What a map is: bpftool's type name, sizes in bytes, `max_entries`, BPF_F_* flags."""

    type: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class Map(Resource, MutableMapping[Any, Any]):
    """A BPF map.

    Keys and values are Python values where their types are known (`kbpf.runtime.codecs`), and bytes where not.
    A missing key is a `KeyError`. Linux 3.18; batch reads since 5.6, used where there.
    """

    __hash__ = object.__hash__

    def __init__(
        self, backend: Backend, fd: int, shape: Shape, key_type: Type | None = None, value_type: Type | None = None
    ) -> None:
        super().__init__(backend, fd, f'map "{shape.name}"' if shape.name else f"map ({shape.type})")
        self.shape = shape
        #: What BTF says of the values; of ring buffers and perf event arrays, what an object says of the events.
        self.value_type = value_type
        self.key_codec = codec(key_type, shape.key_size)
        self.value_codec = _value_codec(backend, shape, value_type)
        self._read = backend.map_reader(fd, shape.key_size, self.value_codec.size)

    @classmethod
    def create(cls, spec: MapSpec, backend: str | None = None, *, inner: Map | None = None) -> Map:
        """Make a new map from `spec`, with its first contents, frozen if it says so.

        `inner` is the template for a map of maps; without it one is made from ``spec.inner`` and let go again.
        Needs CAP_BPF (or ``kernel.unprivileged_bpf_disabled=0``, for the plain types). Raises `PermissionDeniedError`,
        `BpfError` (EINVAL for a size or flag that the type does not take, E2BIG and ENOMEM for too large).
        """
        return cls._create(spec, select(backend), inner)

    @classmethod
    def _create(cls, spec: MapSpec, chosen: Backend, inner: Map | None = None) -> Map:
        if spec.inner is not None and inner is None:
            with cls._create(spec.inner, chosen) as template:
                return cls._create(spec, chosen, template)
        spec = as_created(spec, chosen)
        named = f'map "{spec.name}" ({spec.type})' if spec.name else f"map ({spec.type})"
        with doing(chosen, f"create {named}", operation="map_create", map_type=spec.type):
            fd = chosen.map_create(spec, None if inner is None else inner.fileno())
        shape = Shape(spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags, spec.name)
        made = cls(chosen, fd, shape, spec.key_type, spec.value_type)
        try:
            if spec.contents:
                with doing(chosen, f"fill {named}", operation="map_update_elem"):
                    _fill(chosen, fd, spec)
            if spec.frozen:
                made.freeze()
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def open(
        cls,
        *,
        path: str | None = None,
        id: int | None = None,
        name: str | None = None,
        fd: int | None = None,
        backend: str | None = None,
    ) -> Map:
        """Open an existing map by pin, id, name or inherited descriptor; exactly one of them.

        By `fd` the descriptor is duplicated: the caller keeps its own. By `id` and `name` CAP_SYS_ADMIN is needed;
        a name must be the only one. Keys and values have the types that the kernel knows from the map's BTF. Raises
        `KeyError` for a name that is not there, `BpfError` (ENOENT) for a path or id.
        """
        chosen = select(backend)
        given = [what for what in (path, id, name, fd) if what is not None]
        if len(given) != 1:
            raise TypeError("Map.open() takes exactly one of path, id, name and fd")
        with doing(chosen, f"open map {given[0]!r}", operation="obj_get" if path is not None else "map_get_fd_by_id"):
            if path is not None:
                opened = chosen.open_pinned(path)
            elif fd is not None:
                opened = chosen.duplicate(fd)
            else:
                opened = chosen.open_by_id("map", id if id is not None else _id_of_name(chosen, str(name)))
        return cls.from_fd(chosen, opened)

    @classmethod
    def from_fd(
        cls,
        backend: Backend,
        fd: int,
        key_type: Type | None = None,
        value_type: Type | None = None,
        name: str | None = None,
    ) -> Map:
        """Take over a descriptor, asking the backend what map it is."""
        try:
            with doing(backend, "read a map's info", operation="obj_get_info_by_fd"):
                info = backend.map_info(fd)
            if key_type is None and value_type is None and info.btf_value_type_id:
                key_type, value_type = _types_from_btf(backend, fd, info.btf_key_type_id, info.btf_value_type_id)
        except BaseException:
            backend.close(fd)
            raise
        shape = Shape(
            info.type, info.key_size, info.value_size, info.max_entries, info.flags, info.name if name is None else name
        )
        return cls(backend, fd, shape, key_type, value_type)

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def type(self) -> str:
        """bpftool's name of the map type."""
        return self.shape.type

    @property
    def id(self) -> int:
        """The map's id, by which others find it."""
        with doing(self._backend, f"read the info of {self.label}", operation="obj_get_info_by_fd"):
            return self._backend.map_info(self.fileno()).id

    @property
    def info(self) -> MapInfo:
        """What there is to tell of it now, as ``bpftool map show`` does."""
        with doing(self._backend, f"read the info of {self.label}", operation="obj_get_info_by_fd"):
            return self._backend.map_info(self.fileno())

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.backend
        return f"<Map {self.name!r} {self.type} {self.shape.key_size}/{self.shape.value_size} bytes, {state}>"

    # A map stays true when it is empty, as a file does: it is a resource first.
    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __getitem__(self, key: Any) -> Any:
        if self._fd is None:
            self.fileno()
        try:
            found = self._read(self._key(key))
        except OSError as error:
            raise self._failure(error, "look up a key in", "map_lookup_elem") from None
        if found is None:
            raise KeyError(key)
        return self.value_codec.decode(found)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.update_element(key, value)

    def update_element(self, key: Any, value: Any, flags: int = BPF_ANY) -> None:
        """BPF_MAP_UPDATE_ELEM: store, with ``BPF_NOEXIST`` only a new key, with ``BPF_EXIST`` only an old one.

        Raises `KeyError` where BPF_EXIST finds none, `MapFullError` when there is no room, `BpfError` (EEXIST,
        EPERM if frozen).
        """
        try:
            self._backend.map_update(self.fileno(), self._key(key), self.value_codec.encode(value), flags)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise KeyError(key) from None
            raise self._failure(error, "store in", "map_update_elem") from None

    def __delitem__(self, key: Any) -> None:
        try:
            self._backend.map_delete(self.fileno(), self._key(key))
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise KeyError(key) from None
            raise self._failure(error, "delete from", "map_delete_elem") from None

    def __iter__(self) -> Iterator[Any]:
        for keys, _ in self._chunks(keys_only=True):
            yield from self.key_codec.decode_many(keys)

    def __len__(self) -> int:
        """Elements now in it, counted by reading; for arrays `max_entries`."""
        if self.type in _ARRAYS:
            return self.shape.max_entries
        return sum(len(keys) // self.shape.key_size for keys, _ in self._chunks(keys_only=True))

    def items(self) -> ItemsView[Any, Any]:
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        return _Values(self)

    def snapshot(self) -> dict[Any, Any]:
        """Everything in it as a dict, read in batches. Not atomic: changes made meanwhile may or may not be seen."""
        result: dict[Any, Any] = {}
        for keys, values in self._chunks():
            result.update(zip(self.key_codec.decode_many(keys), self.value_codec.decode_many(values), strict=True))
        return result

    def clear(self) -> None:
        """Delete every element. Raises `BpfError` (EINVAL) for arrays, whose elements cannot be deleted."""
        for key in list(self):
            try:
                del self[key]
            except KeyError:
                continue  # Somebody else deleted it first.

    def freeze(self) -> None:
        """BPF_MAP_FREEZE (Linux 5.2): user space may not write any more; programs still may.

        EPERM when it is frozen already.
        """
        with doing(self._backend, f"freeze {self.label}", operation="map_freeze"):
            self._backend.map_freeze(self.fileno())

    def pin(self, path: str) -> None:
        """Pin on a BPF file system (Linux 4.4). Raises `BpfError` (EEXIST; EINVAL where it is no bpffs)."""
        with doing(self._backend, f"pin {self.label} at {path}", operation="obj_pin"):
            self._backend.pin(self.fileno(), path)

    def events(
        self,
        type: Any = None,
        *,
        size: int = 1 << 18,
        wakeup: int = 1,
        cpus: Sequence[int] | None = None,
    ) -> Events:
        """A reader of what programs write to this ring buffer or perf event array.

        `type` says what the events are: a format of `struct`, a ctypes type, a dataclass (`kbpf.runtime.formats`), a
        type of BTF, or a function of an event's bytes; without one they are bytes. Those of perf event arrays have up
        to 7 bytes behind what the program gave, because the kernel rounds up.

        For a perf event array a buffer of `size` bytes is made for each of `cpus` (all that are online, as far as the
        array has elements for them), which takes the place of whoever read it before; readers are woken at each
        `wakeup`th sample of a processor. That needs CAP_PERFMON. A ring buffer is to have one reader.

        Raises `TypeError` for maps of other types, `PermissionDeniedError`, `NotSupportedError`.
        """
        from kbpf.runtime.events import Events

        reader = Events(self._backend)
        try:
            reader.add(self, type, size=size, wakeup=wakeup, cpus=cpus)
        except BaseException:
            reader.close()
            raise
        return reader

    def writer(self, type: Any = None) -> EventWriter:
        """A writer for this ring buffer of user space (type user_ringbuf, Linux 6.1); `type` as in `events`.

        Raises `TypeError` for maps of other types, `PermissionDeniedError`, `NotSupportedError`.
        """
        from kbpf.runtime.event_writer import EventWriter

        return EventWriter(self, type)

    def _key(self, key: Any) -> bytes:
        return self.key_codec.encode(key)

    def _failure(self, error: OSError, what: str, operation: str) -> BpfError:
        if isinstance(error, BpfError):
            return error  # The map was closed.
        if error.errno == errno.E2BIG and self.type in _ARRAYS:
            hint = f"the last index is {self.shape.max_entries - 1}"
            return translate(error, self._backend, f"{what} {self.label}", operation=operation, hints=(hint,))
        if error.errno in (errno.E2BIG, errno.ENOSPC):
            return MapFullError(error.errno, f"{what} {self.label}", (f"it holds {self.shape.max_entries} entries",))
        return translate(error, self._backend, f"{what} {self.label}", operation=operation, map_type=self.type)

    def _chunks(self, keys_only: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values back to back, chunk by chunk: by batch, or key by key where the type has none."""
        key_size, value_size = self.shape.key_size, self.value_codec.size
        token: bytes | None = None
        size, started = min(_BATCH, max(self.shape.max_entries, 1)), False
        while True:
            try:
                # Asked for each time: the map may have been closed meanwhile, and the number be another file's.
                batch = self._backend.map_lookup_batch(self.fileno(), token, size, key_size, value_size)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    size *= 2
                    continue
                if not started and error.errno in (errno.EINVAL, errno.EOPNOTSUPP, 524):
                    break
                raise self._failure(error, "read", "map_lookup_batch") from None
            started = True
            if batch.length:
                yield batch.keys, batch.values
            if batch.token is None:
                return
            token = batch.token
        yield from self._one_by_one(keys_only)

    def _one_by_one(self, keys_only: bool) -> Iterator[tuple[bytes, bytes]]:
        key_size = self.shape.key_size
        key: bytes | None = None
        # A deleted key sends the walk back to the start; without a bound, churn could keep it going forever.
        for _ in range(2 * self.shape.max_entries + 1):
            try:
                key = self._backend.map_next_key(self.fileno(), key, key_size)
                if keys_only:
                    yield key, b""
                    continue
                value = self._read(key)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise self._failure(error, "read", "map_get_next_key") from None
            if value is not None:
                yield key, value


class _Items(ItemsView[Any, Any]):
    _mapping: Map

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        map = self._mapping
        for keys, values in map._chunks():
            yield from zip(map.key_codec.decode_many(keys), map.value_codec.decode_many(values), strict=True)


class _Values(ValuesView[Any]):
    _mapping: Map

    def __iter__(self) -> Iterator[Any]:
        for _, values in self._mapping._chunks():
            yield from self._mapping.value_codec.decode_many(values)


def as_created(spec: MapSpec, chosen: Backend) -> MapSpec:
    """The spec with what it leaves to the machine filled in: as libbpf has it, no size means an entry for each CPU."""
    if spec.type == "perf_event_array" and spec.max_entries == 0:
        return replace(spec, max_entries=chosen.possible_cpus())
    return spec


def _fill(chosen: Backend, fd: int, spec: MapSpec) -> None:
    """Put the first contents in: in one batch (Linux 5.6), or one by one where the type or the kernel has none."""
    if len(spec.contents) > 1:
        keys, values = (b"".join(parts) for parts in zip(*spec.contents, strict=True))
        with suppress(OSError):
            chosen.map_update_batch(fd, keys, values, len(spec.contents))
            return
    for key, value in spec.contents:
        chosen.map_update(fd, key, value, BPF_ANY)


def _value_codec(backend: Backend, shape: Shape, type: Type | None) -> Codec:
    one = codec(type, shape.value_size)
    return per_cpu_codec(one, backend.possible_cpus()) if shape.type in _PER_CPU else one


def _types_from_btf(backend: Backend, fd: int, key_id: int, value_id: int) -> tuple[Type | None, Type | None]:
    blob = backend.map_btf(fd)
    if not blob:
        return None, None
    from kbpf.elf.btf import Btf

    btf = Btf(blob)
    # Maps of a program's variables have a type for the value alone.
    return btf.resolve(key_id) if key_id else None, btf.resolve(value_id)


def _id_of_name(backend: Backend, name: str) -> int:
    found = []
    for id in backend.ids("map"):
        try:
            fd = backend.open_by_id("map", id)
        except OSError as error:
            if error.errno == errno.ENOENT:
                continue  # It went away between listing and opening.
            raise
        try:
            if backend.map_info(fd).name == object_name(name):
                found.append(id)
        finally:
            backend.close(fd)
    if not found:
        raise KeyError(name)
    if len(found) > 1:
        raise ValueError(f"{len(found)} maps are called {name!r}: open one by id, of {', '.join(map(str, found))}")
    return found[0]
