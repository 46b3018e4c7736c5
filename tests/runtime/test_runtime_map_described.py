"""Maps whose types were said in Python are known to the kernel and its tools; all holds on both backends."""

from __future__ import annotations

import json
import subprocess
from ctypes import Structure, c_uint16, c_uint32
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

import kbpf
from kbpf.kernel.maps import MapCommands
from kbpf.uapi.constants import BPF_F_NO_PREALLOC


@dataclass(frozen=True)
class Flow:
    address: Annotated[int, "I"]
    port: Annotated[int, "H"]
    protocol: Annotated[int, "H"]


class Counts(Structure):
    _fields_ = (("packets", c_uint32), ("kind", c_uint16), ("flags", c_uint16))


def made(type: str, backend: str, **types: Any) -> Any:
    storage = type.endswith("storage")
    spec = {"key_size": 4 if storage or "array" in type else 0, "max_entries": 0 if storage else 200}
    return kbpf.BpfMap.create(
        kbpf.MapSpec(type=type, flags=BPF_F_NO_PREALLOC if storage else 0, **spec), backend, **types
    )


@pytest.mark.parametrize("type", ["hash", "percpu_hash", "lru_hash", "lru_percpu_hash"])
@pytest.mark.parametrize(("key", "value"), [(Flow, Counts), ("I", "Q"), (Counts, "d"), (Flow, "?")])
def test_hashes(backend: str, type: str, key: Any, value: Any) -> None:
    with made(type, backend, key=key, value=value) as map, kbpf.Map.open(id=map.id, backend=backend) as opened:
        assert map.info.btf_id > 0
        assert opened.key_type is not None and opened.value_type is not None


@pytest.mark.parametrize(
    "type",
    [
        *("array", "percpu_array", "sk_storage", "inode_storage", "task_storage"),
        pytest.param("cgrp_storage", marks=pytest.mark.requires("linux-6.2")),
    ],
)
def test_keys_that_are_numbers_need_not_be_said(backend: str, type: str) -> None:
    with made(type, backend, value=Counts) as map, kbpf.BpfMap.open(id=map.id, backend=backend) as opened:
        assert opened.value_type.name == "Counts"


def test_what_is_opened_elsewhere_has_names(backend: str) -> None:
    with made("hash", backend, key=Flow, value=Counts) as map:
        map[Flow(1, 2, 3)] = Counts(4, 5, 6)
        with kbpf.Map.open(id=map.id, backend=backend) as opened:
            [(key, value)] = opened.items()
            assert key._asdict() == {"address": 1, "port": 2, "protocol": 3}
            assert value._asdict() == {"packets": 4, "kind": 5, "flags": 6}


@pytest.mark.parametrize(("key", "value"), [("I", "IH"), (None, "Q"), ("I", None), ("I", ">Q"), ("I", "3s")])
def test_what_has_no_names_is_not_described(backend: str, key: Any, value: Any) -> None:
    spec = kbpf.MapSpec(type="hash", key_size=4, value_size=0 if value else 8, max_entries=2)
    with kbpf.Map.create(spec, backend, key=key, value=value) as map:
        assert map.info.btf_id == 0


@pytest.mark.requires("kernel")
def test_a_kernel_that_takes_no_types_makes_the_map_without(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MapCommands.map_create

    def older(self: MapCommands, spec: kbpf.MapSpec, inner: int | None = None) -> int:
        if spec.btf:
            raise OSError(22, "Invalid argument")
        return whole(self, spec, inner)

    monkeypatch.setattr(MapCommands, "map_create", older)
    with made("hash", "kernel", key="I", value="Q") as map:
        map[1] = 2
        assert (map.info.btf_id, dict(map.items())) == (0, {1: 2})


@pytest.mark.requires("kernel", "bpftool")
def test_bpftool_shows_the_names() -> None:
    with made("hash", "kernel", key=Flow, value="Q") as map:
        map[Flow(1, 2, 3)] = 4
        command = ["bpftool", "-j", "map", "dump", "id", str(map.id)]
        [element] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert element["formatted"] == {"key": {"address": 1, "port": 2, "protocol": 3}, "value": 4}
