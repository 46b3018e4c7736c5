"""BTF in the emulator: blobs with ids, as long as a descriptor or what was made with them holds them."""

from __future__ import annotations

import errno
import itertools
from weakref import WeakValueDictionary

from kbpf.emulator.maps.base import refused
from kbpf.errors import ObjectError
from kbpf.info import BtfInfo


class Btf:
    """A blob that was loaded. Raises `OSError` (EINVAL) where it is no BTF."""

    def __init__(self, blob: bytes) -> None:
        from kbpf.elf.btf import Btf as Parsed

        try:
            Parsed(blob)
        except ObjectError:
            raise refused(errno.EINVAL) from None
        self.blob = blob
        self.id = next(_ids)
        BTFS[self.id] = self

    @property
    def info(self) -> BtfInfo:
        return BtfInfo(self.id, len(self.blob))


_ids = itertools.count(1)
#: BTF by id, while anybody holds it.
BTFS: WeakValueDictionary[int, Btf] = WeakValueDictionary()


def described(blob: bytes) -> Btf | None:
    """The BTF of a map or program that is being made; None without, or where the kernel would not take it."""
    try:
        return Btf(blob) if blob else None
    except OSError:
        return None
