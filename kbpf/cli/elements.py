"""Keys and values on the command line: what ``kbpf map get`` and ``set`` read of one element."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import click

import kbpf
from kbpf.cli import objects
from kbpf.cli.formatted import formatted, global_data, is_of_btf
from kbpf.cli.output import plain
from kbpf.runtime.codecs import Codec
from kbpf.runtime.maps.keyless import BloomFilter, Queue
from kbpf.runtime.maps.references import MapOfMaps, ProgramArray
from kbpf.types import Struct


def split(words: tuple[str, ...], names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The selector at the beginning, and what stands behind each of `names`: ``id 4 key 1 value 2``."""
    # Behind a word of the selector stands what it says, also where that is called "key".
    start = 2 if words[0] in ("id", "pinned", "name") else 1
    which, rest = words[:start], list(words[start:])
    given: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(names):
        if rest[:1] == [name]:
            end = next((at for at, word in enumerate(rest) if at and word in names[index + 1 :]), len(rest))
            given[name], rest = tuple(rest[1:end]), rest[end:]
    if rest or () in given.values():
        raise click.UsageError(f"Behind the map stands {' and '.join(f'{name} {name.upper()}' for name in names)}.")
    return which, given


def read(map: kbpf.BpfMap, given: dict[str, tuple[str, ...]]) -> tuple[bytes, bytes]:
    """Key and value of an element, or no key and the next value."""
    if isinstance(map, Queue):
        _expect(map, given, ())
        try:
            return b"", map.value_codec.encode(map.peek())
        except IndexError as error:
            raise click.ClickException(f"{error}.") from None
    _expect(map, given, ("key",))
    assert isinstance(map, kbpf.Map)
    key = parsed(map.key_codec, given["key"])
    try:
        return key, map.raw_value(key)
    except KeyError:
        raise click.ClickException(f"{map.label} has no key {' '.join(given['key'])}.") from None


def fields(map: kbpf.BpfMap, key: bytes, value: bytes) -> dict[str, Any]:
    """An element as ``bpftool -j`` has it: the bytes, and as `formatted` what they mean where that is known."""
    size = map.shape.value_size
    # bpftool has an empty key where there is none.
    found: dict[str, Any] = {"key": _hexadecimal(key)}
    meant: dict[str, Any] = {"key": _meant(map.key_type, map.key_codec, key)} if key else {}
    if map.per_cpu:
        parts = [value[at : at + size] for at in range(0, len(value), -(-size // 8) * 8)]
        found["values"] = [{"cpu": cpu, "value": _hexadecimal(part)} for cpu, part in enumerate(parts)]
        values = [_meant(map.value_type, map.element_codec, part) for part in parts]
        meant["values"] = [{"cpu": cpu, "value": _written(one)} for cpu, one in enumerate(values)]
        known = not isinstance(values[0], bytes)
    elif map.key_type is None and isinstance(map.value_type, Struct) and is_of_btf(map.value_type, size):
        # Of a section of variables only the value has a type.
        found["value"], meant, known = _hexadecimal(value), {"value": global_data(map.value_type, value)}, True
    else:
        found["value"], meant["value"] = _hexadecimal(value), _meant(map.value_type, map.value_codec, value)
        known = not isinstance(meant["value"], bytes)
    if not known and isinstance(meant.get("key", b""), bytes):
        return found
    return found | {"formatted": {name: _written(part) for name, part in meant.items()}}


def _meant(type: Any, codec: Codec, data: bytes) -> Any:
    """What JSON has for it, or bytes where nothing is known of it."""
    if is_of_btf(type, len(data)):
        return formatted(type, data)
    found = codec.decode(data)
    return found if isinstance(found, bytes) else plain(found)


def _written(meant: Any) -> Any:
    return meant.hex() if isinstance(meant, bytes) else meant


def _hexadecimal(data: bytes) -> list[str]:
    return [f"0x{byte:02x}" for byte in data]


def store(map: kbpf.BpfMap, given: dict[str, tuple[str, ...]], flags: int) -> None:
    """Store a value, with BPF_NOEXIST only under a new key, with BPF_EXIST only under an old one."""
    if isinstance(map, (Queue, BloomFilter)):
        _expect(map, given, ("value",))
        if flags:
            raise click.UsageError(f"In a map of type {map.type} nothing is new or there already.")
        put = map.push if isinstance(map, Queue) else map.add
        put(parsed(map.value_codec, given["value"]))
        return
    _expect(map, given, ("key", "value"))
    assert isinstance(map, kbpf.Map)
    key, words = parsed(map.key_codec, given["key"]), given["value"]
    with ExitStack() as stack:
        value: Any
        if isinstance(map, ProgramArray):
            value = stack.enter_context(kbpf.Program.open(**_selected(words), backend=objects.backend()))
        elif isinstance(map, MapOfMaps):
            value = stack.enter_context(kbpf.BpfMap.open(**_selected(words), backend=objects.backend()))
        elif map.per_cpu:
            one = parsed(map.element_codec, words)
            value = [one] * (map.value_codec.size // -(-map.shape.value_size // 8) // 8)
        else:
            value = parsed(map.value_codec, words)
        try:
            map.update_element(key, value, flags)
        except KeyError:
            raise click.ClickException(f"{map.label} has no key {' '.join(given['key'])}.") from None


def _expect(map: kbpf.BpfMap, given: dict[str, tuple[str, ...]], names: tuple[str, ...]) -> None:
    if not isinstance(map, (kbpf.Map, Queue, BloomFilter)) or (isinstance(map, BloomFilter) and not names):
        raise click.UsageError(f"A map of type {map.type} has no elements to read or store.")
    if tuple(given) != names:
        wanted = " and ".join(f"{name} {name.upper()}" for name in names) or "nothing"
        raise click.UsageError(f"For a map of type {map.type} give {wanted} behind it.")


def _selected(words: tuple[str, ...]) -> dict[str, Any]:
    how, what = objects.selector(words)
    if how == "name":
        raise click.UsageError("Give the value as id N or pinned PATH.")
    return {"id": int(what)} if how == "id" else {"path": what}


def parsed(codec: Codec, words: tuple[str, ...]) -> bytes:
    """The bytes of what stands on the command line."""
    try:
        return _bytes(codec, words)
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"{' '.join(words)}: {error}.") from None


def _bytes(codec: Codec, words: tuple[str, ...]) -> bytes:
    if words[0] == "hex":
        return _sized(codec, bytes(int(word, 16) for word in words[1:]))
    if all("=" in word for word in words):
        return codec.encode({name: _value(value) for name, _, value in (word.partition("=") for word in words)})
    if len(words) == codec.size and len(words) > 1:
        return bytes(map(_integer, words))
    if len(words) > 1 and isinstance(codec.decode(bytes(codec.size)), bytes):
        raise ValueError(f"{len(words)} bytes where {codec.size} are wanted")
    if len(words) > 1:
        return codec.encode(tuple(map(_value, words)))
    return codec.encode(_value(words[0]))


def _sized(codec: Codec, data: bytes) -> bytes:
    if len(data) != codec.size:
        raise ValueError(f"{len(data)} bytes where {codec.size} are wanted")
    return data


def _integer(word: str) -> int:
    """A number as C and bpftool read it: ``01`` and ``010`` are octal."""
    return int(word, 8 if word[:1] == "0" and word.isdecimal() else 0)


def _value(word: str) -> Any:
    for read in (_integer, float):
        try:
            return read(word)
        except ValueError:
            continue
    return word
