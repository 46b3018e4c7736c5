"""What maps of every type are: one descriptor, a shape, codecs, and the doors by which one is made or opened."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args
from weakref import WeakSet

from kbpf.backend import Backend, object_name
from kbpf.errors import BpfError, MapFullError
from kbpf.info import MapInfo
from kbpf.runtime.backends import select
from kbpf.runtime.codecs import Codec, codec, per_cpu_codec
from kbpf.runtime.failures import doing, translate
from kbpf.runtime.maps.described import create, described
from kbpf.runtime.maps.unmade import needs_template, reasons
from kbpf.runtime.resource import Descriptor, Resource
from kbpf.specs import MapSpec
from kbpf.types import Type
from kbpf.uapi.constants import BPF_ANY

if TYPE_CHECKING:
    from kbpf.runtime.event_writer import EventWriter
    from kbpf.runtime.events import Events

_PER_CPU = frozenset(["percpu_hash", "percpu_array", "lru_percpu_hash", "percpu_cgroup_storage"])
#: Commands that store elements.
STORES = ("map_update_elem", "map_update_batch")

Self = TypeVar("Self", bound="BpfMap")


class Shape(NamedTuple):
    """What a map is: bpftool's type name, sizes in bytes, `max_entries`, BPF_F_* flags."""

    type: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class BpfMap(Resource):
    """A BPF map of any type. Those with keys are a `Map`; see `kbpf.runtime.maps` for the others.

    ``BpfMap.create`` and ``BpfMap.open`` take any type and give the class that it has. Linux 3.18.
    """

    def __init__(
        self,
        backend: Backend,
        fd: int,
        shape: Shape,
        key_type: Any = None,
        value_type: Any = None,
    ) -> None:
        """Use `create` or `open`. The types are what `with_types` takes."""
        super().__init__(backend, fd, f'map "{shape.name}"' if shape.name else f"map ({shape.type})")
        self.shape = shape
        #: What BTF says of keys and values, or what was said instead; of ring buffers and perf event arrays, what an
        #: object says of the events.
        self.key_type, self.value_type = key_type, value_type
        self.key_codec, self.value_codec = self._codecs()
        #: The same map seen with other types, without a descriptor of their own.
        self._views: WeakSet[BpfMap] = WeakSet()
        self._owner: BpfMap | None = None

    @classmethod
    def create(
        cls: type[Self],
        spec: MapSpec,
        backend: str | None = None,
        *,
        inner: BpfMap | None = None,
        key: Any = None,
        value: Any = None,
    ) -> Self:
        """Make a new map from `spec`, with its first contents, frozen if it says so.

        `inner` is the template for a map of maps; without it one is made from ``spec.inner`` and let go again. `key`
        and `value` say what keys and values are, as `with_types` takes them; sizes that the spec leaves 0 are theirs,
        and the kernel is told of them (BTF) where the spec has none.
        Needs CAP_BPF (or ``kernel.unprivileged_bpf_disabled=0``, for the plain types). Raises `PermissionDeniedError`,
        `BpfError` (EINVAL for a size or flag that the type does not take, E2BIG and ENOMEM for too large),
        `TypeError` where the type has another class.
        """
        return cls._create(spec, select(backend), inner, key, value)

    @classmethod
    def _create(
        cls: type[Self],
        spec: MapSpec,
        chosen: Backend,
        inner: BpfMap | None = None,
        key: Any = None,
        value: Any = None,
    ) -> Self:
        if spec.inner is not None and inner is None:
            with BpfMap._create(spec.inner, chosen) as template:
                return cls._create(spec, chosen, template, key, value)
        kind = cls._kind(spec.type)
        if key is not None:
            spec = replace(spec, key_size=spec.key_size or _codec_of(key).size)
        if value is not None:
            spec = replace(spec, value_size=spec.value_size or _codec_of(value).size)
        spec = as_created(spec, chosen)
        for said, size in ((key, spec.key_size), (value, spec.value_size)):
            if said is not None:
                _codec_of(said, size)
        named = f'map "{spec.name}" ({spec.type})' if spec.name else f"map ({spec.type})"
        if inner is None and needs_template(spec):
            hint = "it is made after another map: pass one as inner, or the inner spec"
            raise BpfError(errno.EINVAL, f"create {named}", (hint,))
        try:
            fd = create(chosen, described(spec, key, value), spec, None if inner is None else inner.fileno())
        except OSError as error:
            hints = reasons(spec) if error.errno == errno.EINVAL else ()
            attempt = f"create {named}"
            raise translate(error, chosen, attempt, operation="map_create", map_type=spec.type, hints=hints) from None
        shape = Shape(spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags, spec.name)
        made = kind(
            chosen, fd, shape, spec.key_type if key is None else key, spec.value_type if value is None else value
        )
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
        cls: type[Self],
        *,
        path: str | os.PathLike[str] | None = None,
        id: int | None = None,
        name: str | None = None,
        fd: int | None = None,
        flags: int = 0,
        backend: str | None = None,
        key: Any = None,
        value: Any = None,
    ) -> Self:
        """Open an existing map by pin, id, name or inherited descriptor; exactly one of them.

        What it gives owns a descriptor of its own, which keeps the map alive until it is closed; a pin stays where it
        is. By `fd` the descriptor is duplicated: the caller keeps its own. By `id` and `name` CAP_SYS_ADMIN is needed;
        a name must be the only one. Keys and values have the types that the kernel knows from the map's BTF, or `key`
        and `value`, as `with_types` takes them.

        With `flags` BPF_F_RDONLY or BPF_F_WRONLY this process can only read or only write it (Linux 4.15; by `fd` it
        stays as it is): reading takes no more than the permission to read a pin.

        Raises `KeyError` for a name that is not there, `BpfError` (ENOENT) for a path or id, `TypeError` where the
        map's type has another class.
        """
        chosen = select(backend)
        given = [what for what in (path, id, name, fd) if what is not None]
        if len(given) != 1:
            raise TypeError(f"{cls.__name__}.open() takes exactly one of path, id, name and fd")
        if fd is not None and flags:
            raise TypeError("a map that is opened by fd keeps the flags of that descriptor")
        if id is not None and not 0 <= index(id) < 1 << 32:
            raise ValueError(f"{id} is no id: they have 32 bits")
        with doing(chosen, f"open map {given[0]!r}", operation="obj_get" if path is not None else "map_get_fd_by_id"):
            if path is not None:
                opened = chosen.open_pinned(os.fspath(path), flags)
            elif fd is not None:
                opened = chosen.duplicate(index(fd))
            else:
                opened = chosen.open_by_id("map", id if id is not None else _id_of_name(chosen, str(name)), flags)
        found = cls.from_fd(chosen, opened)
        if key is not None or value is not None:
            try:
                found._set_types(key, value)
            except BaseException:
                found.close()
                raise
        return found

    @classmethod
    def from_fd(
        cls: type[Self],
        backend: Backend,
        fd: int,
        key_type: Type | None = None,
        value_type: Type | None = None,
        name: str | None = None,
    ) -> Self:
        """Take over a descriptor, asking the backend what map it is."""
        try:
            with doing(backend, "read a map's info", operation="obj_get_info_by_fd"):
                info = backend.map_info(fd)
            kind = cls._kind(info.type)
            if key_type is None and value_type is None and info.btf_value_type_id:
                key_type, value_type = _types_from_btf(backend, fd, info.btf_key_type_id, info.btf_value_type_id)
        except BaseException:
            backend.close(fd)
            raise
        shape = Shape(
            info.type, info.key_size, info.value_size, info.max_entries, info.flags, info.name if name is None else name
        )
        return kind(backend, fd, shape, key_type, value_type)

    @classmethod
    def _kind(cls: type[Self], type: str) -> type[Self]:
        """The class for a map type, which must be this one or derive from it."""
        from kbpf.runtime.maps import class_for

        kind = class_for(type)
        if not issubclass(kind, cls):
            raise TypeError(f"a map of type {type} is no {cls.__name__}: use {kind.__name__}")
        return kind

    def with_types(self: Self, *, key: Any = None, value: Any = None) -> Self:
        """The same map, whose keys and values are seen as something else; None leaves what is there.

        `key` and `value` are formats of `struct` (``"<IH"``), ctypes types, dataclasses with fields such as
        ``Annotated[int, "I"]`` (`kbpf.runtime.formats`), or types of BTF (`kbpf.types`). What it gives has no
        descriptor of its own: it is closed when this one is. Raises `ValueError` for a type of another size.
        """
        owner = self._owner or self
        seen = type(self)(self._backend, self.fileno(), self.shape, self.key_type, self.value_type)
        seen._owner, seen._descriptor = owner, self._descriptor
        owner._views.add(seen)
        seen._set_types(key, value)
        return seen

    def _set_types(self, key: Any, value: Any) -> None:
        for said, size in ((key, self.shape.key_size), (value, self.shape.value_size)):
            if said is not None:
                _codec_of(said, size)
        self.key_type = self.key_type if key is None else key
        self.value_type = self.value_type if value is None else value
        self.key_codec, self.value_codec = self._codecs()

    def _codecs(self) -> tuple[Codec, Codec]:
        """What keys and values are between bytes and Python; kinds whose values are more than data derive this."""
        key, value = _codec(self.key_type, self.shape.key_size), self.element_codec
        return key, per_cpu_codec(value, self._backend.possible_cpus()) if self.per_cpu else value

    @property
    def element_codec(self) -> Codec:
        """The codec of a value, or of one CPU's."""
        return _codec(self.value_type, self.shape.value_size)

    def close(self) -> None:
        """Give the descriptor back; the map goes when programs, pins and others have let go of it, too."""
        for seen in list(self._views):
            seen.close()
        if self._owner is not None:
            self._descriptor = Descriptor(self._backend, None, self.label)
        super().close()

    def __del__(self) -> None:
        # A view owns nothing that could leak.
        if getattr(self, "_owner", None) is None:
            super().__del__()

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def type(self) -> str:
        """bpftool's name of the map type."""
        return self.shape.type

    @property
    def per_cpu(self) -> bool:
        """Whether each possible CPU has a value of its own: values are a `PerCpu`."""
        return self.shape.type in _PER_CPU

    @property
    def id(self) -> int:
        """The map's id, by which others find it."""
        return self.info.id

    @property
    def info(self) -> MapInfo:
        """What there is to tell of it now, as ``bpftool map show`` does."""
        with doing(self._backend, f"read the info of {self.label}", operation="obj_get_info_by_fd"):
            return self._backend.map_info(self.fileno())

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.backend
        sizes = f"{self.shape.key_size}/{self.shape.value_size} bytes"
        return f"<{type(self).__name__} {self.name!r} {self.type} {sizes}, {state}>"

    # A map stays true when it is empty, as a file does: it is a resource first.
    def __bool__(self) -> bool:
        return True

    def freeze(self) -> None:
        """BPF_MAP_FREEZE (Linux 5.2): user space may not write any more; programs still may.

        EPERM when it is frozen already, EBUSY from older kernels.
        """
        with doing(self._backend, f"freeze {self.label}", operation="map_freeze"):
            self._backend.map_freeze(self.fileno())

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Pin on a BPF file system (Linux 4.4). Raises `BpfError` (EEXIST; EINVAL where it is no bpffs)."""
        with doing(self._backend, f"pin {self.label} at {path}", operation="obj_pin"):
            self._backend.pin(self.fileno(), os.fspath(path))

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

    def _failure(self, error: OSError, what: str, operation: str) -> BpfError:
        """The error for what a command on an element was refused with; `what` goes before the map's name."""
        if isinstance(error, BpfError):
            return error  # The map was closed.
        attempt, hints = f"{what} {self.label}", self._hints(error.errno or 0, operation)
        if error.errno in (errno.E2BIG, errno.ENOSPC) and operation in STORES and not hints:
            return MapFullError(error.errno, attempt, (f"it holds {self.shape.max_entries} entries",))
        return translate(error, self._backend, attempt, operation=operation, map_type=self.type, hints=hints)

    def _hints(self, number: int, operation: str) -> tuple[str, ...]:
        """What is known of the reason for an errno besides what it says."""
        if number == errno.EBADF and not self.closed:
            return (f"descriptor {self.fileno()} was closed by something else than the map's close()",)
        return ()


def _codec_of(said: Any, size: int | None = None) -> Codec:
    # Knows ctypes, which takes longer to import than all of this.
    from kbpf.runtime.formats import codec_for

    return codec_for(said, size)


def _codec(type: Any, size: int) -> Codec:
    # What an object says of another size than the map has is no reason not to open the map.
    return codec(type, size) if type is None or isinstance(type, get_args(Type)) else _codec_of(type, size)


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
        chosen.map_update(fd, key or None, value, BPF_ANY)


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
