"""BPF tokens (Linux 6.9): what a process in a user namespace may do because a BPF file system delegates it.

A file system mounted with ``delegate_cmds=`` and its kin gives a token to processes of its user namespace, as those in
a container are. It is used for maps, programs and BTF without being asked for. Where it is looked for is libbpf's rule:
LIBBPF_BPF_TOKEN_PATH, which turns the search off when it is empty, else /sys/fs/bpf.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from kbpf.kernel.attrs import command, fdinfo, newer
from kbpf.uapi.constants import BPF_F_TOKEN_FD
from kbpf.uapi.enums import PROG_TYPES

_USUAL = "/sys/fs/bpf"
# The inode of /proc/PID/ns/user in the first user namespace: fixed by the kernel (PROC_USER_INIT_INO).
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD
_PREFIX = {"map_create": "map", "prog_load": "prog", "btf_load": "btf"}


def in_initial_user_namespace() -> bool:
    try:
        return Path("/proc/self/ns/user").stat().st_ino == _INITIAL_USER_NAMESPACE
    except OSError:
        return True  # No /proc, or a kernel without user namespaces.


def token_create(path: str) -> int:
    """BPF_TOKEN_CREATE from the BPF file system at `path`.

    EOPNOTSUPP in the first user namespace, ENOENT where nothing is delegated, EPERM where it is another namespace's or
    CAP_BPF is missing in this one.
    """
    place = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with newer("tokens", "6.9", "token_create", bpffs_fd=-1):
            return command("token_create", bpffs_fd=place)
    finally:
        os.close(place)


def delegates_program(type: str) -> bool:
    """Whether this process can have a token that allows loading programs of this type."""
    token = _token()
    if token is None:
        return False
    try:
        allowed = fdinfo(token).get("allowed_progs", "0")
        return allowed == "any" or bool(int(allowed, 16) >> PROG_TYPES[type] & 1)
    finally:
        os.close(token)


def command_with_token(name: str, /, **values: int | bytes) -> int:
    """Issue ``map_create``, ``prog_load`` or ``btf_load``, with a token where this process can have one."""
    token = _token()
    if token is None:
        return command(name, **values)
    prefix = _PREFIX[name]
    flags = int(values.pop(f"{prefix}_flags", 0)) | BPF_F_TOKEN_FD
    try:
        return command(name, **values, **{f"{prefix}_flags": flags, f"{prefix}_token_fd": token})
    finally:
        os.close(token)


def _token() -> int | None:
    """A new token's descriptor; None where there is none to be had."""
    if in_initial_user_namespace():
        return None
    named = os.environ.get("LIBBPF_BPF_TOKEN_PATH")
    if named == "":
        return None
    try:
        return token_create(named or _USUAL)
    except OSError as error:
        # Kernels before 6.9 know no such command; nor is every directory of that name a BPF file system.
        unusual = (errno.ENOENT, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTDIR)
        if named or error.errno not in unusual:
            raise
        return None
