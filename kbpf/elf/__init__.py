"""Object files: sections, symbols, relocations, BTF."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kbpf.specs import CollectionSpec


def read_object(source: str | os.PathLike[str] | bytes) -> CollectionSpec:
    """Read an eBPF object file, given its path or its bytes: see `kbpf.elf.object.read_object`."""
    # What reads ELF is loaded when there is an ELF file to read.
    from kbpf.elf.object import read_object as read

    return read(source)
