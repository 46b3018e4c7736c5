"""Where the kernel's headers really are.

bcc looks in /lib/modules/RELEASE only. In containers and on machines with a kernel of their own that folder is missing,
and distributions keep headers under /usr/src: Fedora and Arch in one folder, Debian in two (generated files for
the architecture, and all others in ``-common``).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

_MODULES = Path("/lib/modules")
_SOURCES = (Path("/usr/src"), Path("/usr/src/kernels"))
_KHEADERS = Path("/sys/kernel/kheaders.tar.xz")

# The kernel's name for an architecture, where it is not uname's.
_ARCHITECTURES = {
    "x86_64": "x86",
    "i686": "x86",
    "aarch64": "arm64",
    "armv7l": "arm",
    "ppc64le": "powerpc",
    "riscv64": "riscv",
    "s390x": "s390",
    "loongarch64": "loongarch",
}


class Headers(NamedTuple):
    """Headers for compiling against the kernel.

    `source` is the folder to compile in, None where bcc finds its headers by itself; `flags` are the compiler's
    options for what lies elsewhere.
    """

    source: Path | None
    flags: tuple[str, ...] = ()


def find_headers() -> Headers | None:
    """The headers of the running kernel, or else of the newest one that has some here; None where there are none."""
    own = _MODULES / os.uname().release
    if os.environ.get("BCC_KERNEL_SOURCE") or (own / "build").is_dir() or (own / "source").is_dir():
        return Headers(None)
    if _KHEADERS.exists():
        return Headers(None)
    built = [
        path for place in _SOURCES for path in place.glob("*") if (path / "include/generated/autoconf.h").is_file()
    ]
    for path in sorted(built, key=_version, reverse=True):
        headers = _headers_in(path)
        if headers is not None:
            return headers
    return None


def _headers_in(build: Path) -> Headers | None:
    """`build` has the generated headers; the others are beside them, or where its Makefile says."""
    if _has_source(build):
        return Headers(build)
    makefile = build / "Makefile"
    named = re.search(r"^include\s+(.+)/Makefile$", makefile.read_text(), re.M) if makefile.is_file() else None
    if named is None or not _has_source(source := build / named[1]):
        return None
    machine = os.uname().machine
    generated = build / "arch" / _ARCHITECTURES.get(machine, machine) / "include/generated"
    folders = (generated, generated / "uapi", build / "include", build / "include/generated/uapi")
    return Headers(source, tuple(f"-I{folder}" for folder in folders))


def _has_source(path: Path) -> bool:
    return (path / "include/linux/kconfig.h").is_file()


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path.name))
