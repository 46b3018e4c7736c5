"""Where kernel headers lie, on distributions that this machine is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kbpf.kernel import headers
from kbpf.kernel.headers import Headers, find_headers


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /usr/src, and no /lib/modules."""
    place = tmp_path / "src"
    place.mkdir()
    monkeypatch.setattr(headers, "_MODULES", tmp_path / "modules")
    monkeypatch.setattr(headers, "_KHEADERS", tmp_path / "kheaders.tar.xz")
    monkeypatch.setattr(headers, "_SOURCES", (place,))
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    return place


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def merged(folder: Path) -> Path:
    touch(folder / "include/generated/autoconf.h", folder / "include/linux/kconfig.h")
    return folder


def test_none_are_none(sources: Path) -> None:
    assert find_headers() is None


def test_what_bcc_finds_by_itself_is_left_to_it(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(sources / "linux-headers-6.1")
    (headers._MODULES / os.uname().release / "build").mkdir(parents=True)
    assert find_headers() == Headers(None)
    monkeypatch.setattr(headers, "_MODULES", sources / "gone")
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/somewhere")
    assert find_headers() == Headers(None)


def test_one_folder_with_everything_needs_no_flags(sources: Path) -> None:
    folder = merged(sources / "6.9.4-200.fc40.x86_64")
    assert find_headers() == Headers(folder)


def test_debians_two_folders_are_put_together_by_flags(sources: Path) -> None:
    own, common = sources / "linux-headers-6.1.0-56-amd64", sources / "linux-headers-6.1.0-56-common"
    touch(own / "include/generated/autoconf.h", common / "include/linux/kconfig.h")
    (own / "Makefile").write_text(f"include {common}/Makefile\n")
    found = find_headers()
    assert found is not None and found.source == common
    assert f"-I{own}/include" in found.flags
    assert any(flag.startswith(f"-I{own}/arch/") and flag.endswith("/include/generated") for flag in found.flags)


def test_the_newest_are_taken(sources: Path) -> None:
    merged(sources / "linux-headers-6.1.0-9")
    newest = merged(sources / "linux-headers-6.1.0-56")
    assert find_headers() == Headers(newest)


def test_half_of_debians_folders_is_none(sources: Path) -> None:
    own = sources / "linux-headers-6.1.0-56-amd64"
    touch(own / "include/generated/autoconf.h")
    (own / "Makefile").write_text("include /gone/Makefile\n")
    assert find_headers() is None
