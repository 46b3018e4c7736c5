"""Where XDP programs send packets with bpf_redirect_map: devices (Linux 4.14) and processors (4.15).

Where values have 8 bytes, each may have a program that looks at the packet there (devices: Linux 5.8, processors 5.9).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from kbpf.runtime.codecs import Codec, codec
from kbpf.runtime.map import Map
from kbpf.runtime.maps.arrays import INDEX, IndexedMap
from kbpf.runtime.maps.references import descriptor_of

_VALUES = {4: struct.Struct("=I"), 8: struct.Struct("=II")}


class Device(NamedTuple):
    """A device's index, and the id of the program that runs there; 0 for none."""

    ifindex: int
    program_id: int


class Processor(NamedTuple):
    """How many packets may wait for a processor, and the id of the program that runs there; 0 for none."""

    queue_size: int
    program_id: int


class _Targets(Map):
    """Numbers, or numbers and programs. Values of 4 bytes are read as an ``int``."""

    holds_data = False
    _record: type[Device | Processor]

    def _codecs(self) -> tuple[Codec, Codec]:
        key, value = super()._codecs()
        packer = _VALUES.get(value.size)
        if packer is None:
            return key, value
        make = (lambda fields: fields[0]) if value.size == 4 else self._record._make

        def encode(value: Any) -> bytes:
            if isinstance(value, (bytes, bytearray, memoryview)):
                return bytes(value)
            target, program = value if isinstance(value, tuple) else (value, None)
            fields = [self._number(target)]
            if packer.size == 8:
                fields.append(0 if program is None else descriptor_of(program, self._backend, "Program"))
            elif program is not None:
                raise ValueError(f"values of {self.label} have 4 bytes, and no room for a program")
            try:
                return packer.pack(*fields)
            except struct.error:
                raise ValueError(f"{value!r} does not fit {packer.size} bytes") from None

        return codec(INDEX, key.size), Codec(
            packer.size,
            encode,
            lambda data: make(packer.unpack(data)),
            lambda data: [make(fields) for fields in packer.iter_unpack(data)],
            packer,
            make,
        )

    def _number(self, target: Any) -> int:
        return int(target)


class DeviceMap(_Targets):
    """Devices by any number: ``map[7] = "eth0"``, or its index, or either with a program: ``("eth0", program)``.

    Reading gives the index, or a `Device`. A device that goes leaves the map.
    """

    _record = Device

    def _number(self, target: Any) -> int:
        return self._backend.interface_index(target) if isinstance(target, str) else int(target)


class DeviceArray(DeviceMap, IndexedMap):
    """The same by index."""

    has_gaps = True


class CpuMap(_Targets, IndexedMap):
    """Processors by number: ``map[1] = 192`` lets that many packets wait for it; or ``(192, program)``.

    Reading gives the number, or a `Processor`.
    """

    _record = Processor
    has_gaps = True
