"""The wheel is all that a user needs: no compiler, and nothing of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of what is in the checkout, built in a copy so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kbpf", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(folder)], cwd=source, check=True, stdin=subprocess.DEVNULL)
    [built] = folder.glob("*.whl")
    return built


def test_it_is_pure_python_for_any_machine(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_it_holds_every_module_and_object_and_no_tests(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "kbpf").rglob("*.py")}
    objects = {str(path.relative_to(ROOT)) for path in (ROOT / "kbpf" / "objects").glob("*.o")}
    assert objects
    assert modules | objects | {"kbpf/py.typed"} <= held
    assert not any(name.startswith(("tests", "benchmarks")) for name in held)


def test_it_works_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    code = (
        "from pathlib import Path; import kbpf\n"
        "objects = sorted(Path(kbpf.__file__).with_name('objects').glob('*.o'))\n"
        "for path in objects: kbpf.load(path, backend='emulator').close()\n"
        "print(kbpf.__file__, len(objects), len(kbpf.compile('udp')))"
    )
    environment = {"PATH": "/nonexistent", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    command_line = [sys.executable, str(tmp_path / "bin" / "kbpf"), "compile", "-ddd", "udp"]
    done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
