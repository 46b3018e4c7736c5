"""Arrays: a value for each index from 0 on, of which none can be added or deleted (kernel/bpf/arraymap.c).

With BPF_F_MMAPABLE (Linux 5.5) an array's memory is the process's, too: to be read and written without system calls.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from mmap import PAGESIZE
from typing import TYPE_CHECKING, Any, NoReturn

from kbpf.errors import BpfError
from kbpf.runtime.codecs import Codec, codec
from kbpf.runtime.failures import doing
from kbpf.runtime.formats import codec_for, number_letter
from kbpf.runtime.map import Map
from kbpf.types import Int
from kbpf.uapi.constants import BPF_F_MMAPABLE

if TYPE_CHECKING:
    import numpy

#: What the index of any array is.
INDEX = Int(name="__u32", size=4)


class IndexedMap(Map):
    """A map whose keys are the numbers from 0 to `max_entries` - 1, whatever its BTF calls them."""

    def _codecs(self) -> tuple[Codec, Codec]:
        _, value = super()._codecs()
        return codec(INDEX, self.shape.key_size), value

    def _hints(self, number: int, operation: str) -> tuple[str, ...]:
        if number == errno.E2BIG:
            return (f"the last index is {self.shape.max_entries - 1}",)
        return super()._hints(number, operation)


class ArrayMap(IndexedMap):
    """An array: a mapping from each index, with values that are zero at first.

    Deleting raises `BpfError` (EINVAL): store zero. Negative numbers are no indices.
    """

    #: What `memory` gave for reading, until the map is closed: mapping takes as long as reading thousands of values.
    _memory: memoryview | None = None

    def close(self) -> None:
        self._memory = None
        super().close()

    def __len__(self) -> int:
        """`max_entries`: all elements are always there."""
        self.fileno()
        return self.shape.max_entries

    def __iter__(self) -> Iterator[int]:
        self.fileno()
        return iter(range(self.shape.max_entries))

    def __contains__(self, key: object) -> bool:
        self.fileno()
        return isinstance(key, int) and 0 <= key < self.shape.max_entries

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The value: there always is one. Raises `KeyError` behind the end."""
        return self[key]

    def pop(self, key: Any, default: Any = None) -> NoReturn:
        """Raises `BpfError` (EINVAL): elements of an array stay."""
        self._stays()

    def popitem(self) -> NoReturn:
        """Raises `BpfError` (EINVAL): elements of an array stay."""
        self._stays()

    def clear(self) -> NoReturn:
        """Raises `BpfError` (EINVAL): elements of an array stay."""
        self._stays()

    def drain(self) -> NoReturn:
        """Raises `BpfError` (EINVAL): elements of an array stay."""
        self._stays()

    def _stays(self) -> NoReturn:
        self.fileno()
        raise BpfError(errno.EINVAL, f"delete from {self.label}", self._hints(errno.EINVAL, "map_delete_elem"))

    def _hints(self, number: int, operation: str) -> tuple[str, ...]:
        if number == errno.EINVAL and "delete" in operation:
            return ("elements of an array stay; store zero",)
        return super()._hints(number, operation)

    # Memory.

    @property
    def stride(self) -> int:
        """Bytes from one value to the next in `memory`: the size rounded up to 8."""
        return self.shape.value_size + 7 & ~7

    def memory(self, writable: bool = False) -> memoryview:
        """The array's own memory, as bytes: values `stride` bytes apart, which change as programs change them.

        It stays mapped, and with it the map stays, until nothing refers to it, also when the map is closed. What is
        written there programs see at once; neither is atomic over several bytes. A map that is mapped writable cannot
        be frozen; for reading it is mapped once. Linux 5.5, and the map must be made with BPF_F_MMAPABLE, as those of a
        program's variables are.

        Raises `BpfError` (EINVAL without that flag), `PermissionDeniedError` for writing what is frozen or read-only.
        """
        fd, size = self.fileno(), self.stride * self.shape.max_entries
        if self._memory is not None and not writable:
            return self._memory
        with doing(
            self._backend,
            f"map the memory of {self.label}",
            operation="map_memory",
            hints=self._mapping_hints(writable),
        ):
            whole = self._backend.map_memory(fd, -(-size // PAGESIZE) * PAGESIZE, writable=writable)
        memory = whole[:size]
        if not writable:
            self._memory = memory
        return memory

    def _mapping_hints(self, writable: bool) -> tuple[str, ...]:
        if not self.shape.flags & BPF_F_MMAPABLE:
            return ("it was made without BPF_F_MMAPABLE",)
        return ("it is frozen, or read-only for programs or for this descriptor",) if writable else ()

    def view(self, writable: bool = False) -> memoryview:
        """`memory` with an item for each value: ``view[3]``, ``view.tolist()``, and ``view[3] = 7`` if it is writable.

        Raises `TypeError` where values are no numbers of 1, 2, 4 or 8 bytes; for those see `to_numpy`.
        """
        flat = self.value_codec.flat
        form: Any = None if flat is None else number_letter(flat)
        if form is None:
            raise TypeError(f"values of {self.label} are no single numbers")
        return self.memory(writable).cast(form)[:: self.stride // self.shape.value_size]

    def to_numpy(self, writable: bool = False) -> numpy.ndarray[Any, Any]:
        """`memory` as an array of numpy (the extra ``numpy``), with an item for each value and fields for a struct's.

        It is the memory itself: ``.copy()`` gives one that stays. Raises `MissingDependencyError`, `TypeError` for
        what numpy has no type for, and what `memory` does.
        """
        from kbpf.runtime.arrays import import_numpy

        np = import_numpy()
        spread = np.dtype({"names": ["value"], "formats": [self._dtype(np)], "offsets": [0], "itemsize": self.stride})
        found: numpy.ndarray[Any, Any] = np.frombuffer(self.memory(writable), spread)["value"]
        return found

    def _dtype(self, np: Any) -> Any:
        """The data type of a value: where no type is known, a number if it has the size of one, else bytes."""
        from kbpf.runtime.arrays import dtype_for

        size = self.shape.value_size
        if self.value_type is None or codec_for(self.value_type).size != size:
            return np.dtype(f"u{size}" if size in (1, 2, 4, 8) else f"V{size}")
        found = dtype_for(self.value_type)
        # A format of one letter is a number, and not a record of one.
        return found[0] if found.names == ("f0",) else found
