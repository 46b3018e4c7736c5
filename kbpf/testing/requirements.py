"""What a test may need of the machine, each with a probe that says whether it is there.

A skip is a claim: it names what is missing. ``KBPF_REQUIRE=kernel,clang`` makes what it lists a must, and a
test that misses one of them fails instead of being skipped. Probes run once, when the first test asks.

``linux-6.6`` is what Linux has since that version: such a test passes on every kernel of that number or a higher one,
and with ``backend`` on the emulator.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

#: Where Debian's Python is: the one that bcc belongs to and that an unprivileged user can start.
SYSTEM_PYTHON = "/usr/bin/python3"

#: The user that unprivileged tests run as: nobody, on every distribution.
NOBODY = 65534


def as_nobody(*command: str) -> list[str]:
    """`command` run as a user without any capability; as it is when this process is not root."""
    if os.geteuid() != 0:
        return list(command)
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", *command]


def _succeeds(*command: str) -> bool:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _kernel() -> bool:
    from kbpf.kernel.probes import may_use_bpf

    return may_use_bpf("socket_filter")


def _clang() -> bool:
    return _succeeds("clang", "--target=bpf", "-c", "-x", "c", "/dev/null", "-o", "/dev/null")


def _bcc() -> bool:
    headers = [Path("/lib/modules", os.uname().release, "build"), *Path("/usr/src").glob("linux-headers-*")]
    return any(path.exists() for path in headers) and _succeeds(SYSTEM_PYTHON, "-c", "import bcc")


#: The names that ``pytest.mark.requires`` takes, what a skip says is missing, and the probe. A conftest may add to it.
PROBES: dict[str, tuple[str, Callable[[], bool]]] = {
    "kernel": ("bpf(2), for which this process lacks the permission", _kernel),
    "unprivileged": (
        f"setpriv and {SYSTEM_PYTHON}, to run as an unprivileged user",
        lambda: _succeeds(*as_nobody(SYSTEM_PYTHON, "-c", "pass")),
    ),
    "userns": (
        "user namespaces for unprivileged users",
        lambda: _succeeds(*as_nobody("unshare", "--user", "--map-root-user", "--net", "true")),
    ),
    "netns": (
        "root and iproute2, to make network namespaces",
        lambda: _succeeds("unshare", "--net", "ip", "link", "set", "lo", "up"),
    ),
    "clang": ("clang with the bpf target (Debian: clang llvm libbpf-dev)", _clang),
    "bcc": ("bcc and kernel headers (Debian: python3-bpfcc linux-headers-amd64)", _bcc),
    "tcpdump": ("tcpdump (Debian: tcpdump)", lambda: shutil.which("tcpdump") is not None),
    "libpcap": (
        "libpcap (Debian: libpcap0.8)",
        lambda: _succeeds(sys.executable, "-c", "import ctypes; ctypes.CDLL('libpcap.so.0.8')"),
    ),
    "distributed": ("Dask (pip install distributed)", lambda: importlib.util.find_spec("distributed") is not None),
    "llvmlite": ("llvmlite (pip install 'kbpf[jit]')", lambda: importlib.util.find_spec("llvmlite") is not None),
    "numpy": ("numpy (pip install numpy)", lambda: importlib.util.find_spec("numpy") is not None),
    "bpftool": ("bpftool (Debian: bpftool)", lambda: _succeeds("bpftool", "version")),
}


def is_known(name: str) -> bool:
    """Whether `name` has a probe, or is a version of Linux: ``linux-6.6``."""
    return name in PROBES or re.fullmatch(r"linux-\d+\.\d+", name) is not None


@functools.cache
def available(name: str) -> bool:
    """Whether this machine and process have what `name` stands for; ValueError for an unknown name."""
    if not is_known(name):
        raise ValueError(f"unknown requirement {name!r}; known: {', '.join(sorted(PROBES))}, linux-X.Y")
    return PROBES[name][1]() if name in PROBES else _version(os.uname().release) >= _version(name)


def _version(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def required() -> frozenset[str]:
    """The names in ``KBPF_REQUIRE``."""
    return frozenset(name.strip() for name in os.environ.get("KBPF_REQUIRE", "").split(",") if name.strip())


def missing(names: Iterable[str]) -> list[str]:
    """Those of `names` that are not available."""
    return [name for name in names if not available(name)]


def describe(names: Iterable[str]) -> str:
    """What is missing, in words: ``needs clang: clang with the bpf target ...``."""
    here = f"this is {os.uname().release}"
    return "; ".join(f"needs {name}: {PROBES[name][0] if name in PROBES else here}" for name in names)
