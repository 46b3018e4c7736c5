"""Run Python as a user without privileges, with the kbpf that is being tested.

The checkout may lie where that user cannot read, so kbpf and the pure-Python packages that it needs are copied to a
folder that anybody may. Needs setpriv (util-linux) when this process is root.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from kbpf.testing.requirements import SYSTEM_PYTHON, as_nobody

#: kbpf, what it depends on, and what those import.
_PACKAGES = ("kbpf", "click", "rich", "markdown_it", "mdurl", "pygments", "elftools", "pyroute2")


class Unprivileged:
    """A copy of kbpf that an unprivileged user can run; a context manager that removes it. `folder` is on its path."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kbpf-unprivileged-"))
        self.folder.chmod(0o755)
        for name in _PACKAGES:
            found = importlib.util.find_spec(name)
            if found is None or not found.submodule_search_locations:
                continue
            source = next(iter(found.submodule_search_locations))
            shutil.copytree(source, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        # Checkouts and temporary folders may be closed to others, and copytree keeps modes.
        for folder, _, files in os.walk(self.folder):
            Path(folder).chmod(0o755)
            for file in files:
                Path(folder, file).chmod(0o644)
        self._cache = self.folder / "pycache"
        self._cache.mkdir()
        self._cache.chmod(0o1777)

    def run(
        self, code: str, *arguments: str, userns: bool = False, timeout: float = 60, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `code` with `arguments` as ``sys.argv[1:]``; the outcome, failed or not, is the caller's to judge.

        `userns` runs it as root of user and network namespaces of its own, with every capability inside them
        and loopback up. `env` adds to an environment that is otherwise empty but for PATH.
        """
        command = [SYSTEM_PYTHON, "-W", "error::ResourceWarning", "-c", code, *arguments]
        if userns:
            script = 'ip link set lo up && exec "$@"'
            command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", script, "sh", *command]
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/nonexistent",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(self.folder),
            "PYTHONPYCACHEPREFIX": str(self._cache),
            **(env or {}),
        }
        return subprocess.run(
            as_nobody(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            cwd=self.folder,
            check=False,
        )

    def close(self) -> None:
        shutil.rmtree(self.folder)

    def __enter__(self) -> Unprivileged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
