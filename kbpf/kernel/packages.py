"""Which package of the system brings what, and the command that installs it."""

from __future__ import annotations

import os
import shutil

_COMMANDS = {"apt-get": "apt-get install", "dnf": "dnf install", "pacman": "pacman -S"}

# Debian and Ubuntu, Fedora and its kin, Arch.
_PACKAGES = {
    "bcc": {"apt-get": "python3-bpfcc", "dnf": "python3-bcc", "pacman": "python-bcc"},
    "bpftool": {"apt-get": "bpftool", "dnf": "bpftool", "pacman": "bpf"},
    "clang": {"apt-get": "clang", "dnf": "clang", "pacman": "clang"},
    "headers": {"apt-get": "", "dnf": "kernel-devel", "pacman": "linux-headers"},
}

_DEBIAN_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "armmp", "ppc64le": "powerpc64le"}


def install_command(what: str) -> str:
    """The command that installs ``"bcc"``, ``"bpftool"``, ``"clang"`` or ``"headers"``, to be run as root."""
    manager = next((name for name in _COMMANDS if shutil.which(name)), "apt-get")
    return f"{_COMMANDS[manager]} {_PACKAGES[what][manager] or _debian_headers()}"


def _debian_headers() -> str:
    if _distribution() == "ubuntu":
        return "linux-headers-generic"
    machine = os.uname().machine
    return f"linux-headers-{_DEBIAN_MACHINES.get(machine, machine)}"


def _distribution() -> str:
    """``ID`` of /etc/os-release."""
    import platform

    try:
        return platform.freedesktop_os_release().get("ID", "")
    except OSError:
        return ""
