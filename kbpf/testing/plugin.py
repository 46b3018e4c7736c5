"""The pytest plugin: ``pytest.mark.requires``, fixtures for both backends, and a check that nothing leaks.

``@pytest.mark.requires("kernel", "clang")`` skips a test where one of them is missing, and says which;
with ``KBPF_REQUIRE=kernel,clang`` it fails instead. The session fails when it ends with a descriptor (of a BPF
link, say), a child process, a pin or a network namespace that it did not begin with, and says what it was.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kbpf.backend import BackendName
from kbpf.testing import leaks, requirements
from kbpf.testing.network import LoopbackTraffic, NetworkNamespace, VethEnd, connect
from kbpf.testing.unprivileged import Unprivileged


def pytest_configure(config: pytest.Config) -> None:
    known = ", ".join((*requirements.PROBES, "linux-X.Y"))
    config.addinivalue_line("markers", f"requires(*names): what of the machine the test needs: {known}")
    config.pluginmanager.register(LeakCheck(), "kbpf-leak-check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if unknown := {name for name in requirements.required() if not requirements.is_known(name)}:
        raise pytest.UsageError(f"KBPF_REQUIRE names what nobody probes for: {', '.join(sorted(unknown))}")
    for item in items:
        for mark in item.iter_markers("requires"):
            if unknown := {name for name in mark.args if not requirements.is_known(name)}:
                raise pytest.UsageError(f"{item.nodeid} requires what nobody probes for: {', '.join(sorted(unknown))}")


def need(*names: str) -> None:
    """Skip the running test, or fail it, if something it needs is missing."""
    if lacking := requirements.missing(names):
        must = requirements.required().intersection(lacking)
        if must:
            pytest.fail(f"required by KBPF_REQUIRE, but missing: {requirements.describe(sorted(must))}", pytrace=False)
        pytest.skip(requirements.describe(lacking))


def pytest_runtest_setup(item: pytest.Item) -> None:
    names = dict.fromkeys(name for mark in item.iter_markers("requires") for name in mark.args)
    if isinstance(item, pytest.Function) and getattr(item, "callspec", None):
        # The emulator has it, whatever Linux it runs on.
        emulated = item.callspec.params.get("backend") == "emulator"
        names = {name: None for name in names if not (emulated and name.startswith("linux-"))}
    need(*names)


class LeakCheck:
    """Compares what is open when the session ends with what was open when it began.

    Fixtures of a module may keep things open between tests, so a test is not failed by itself; where
    a descriptor was first seen is remembered, and said if it is still there in the end.
    """

    def __init__(self) -> None:
        self.before: leaks.Snapshot | None = None
        self.first_seen: dict[str, str] = {}
        self.report: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        self.before = leaks.snapshot()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        for descriptor in leaks.descriptors():
            self.first_seen.setdefault(descriptor, nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.before is None:
            return
        extra = leaks.leaked(self.before)
        for kind, found in extra._asdict().items():
            for what in sorted(found):
                where = f", first seen after {self.first_seen[what]}" if what in self.first_seen else ""
                self.report.append(f"{kind}: {what}{where}")
        if self.report and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.report:
            terminalreporter.section("left behind by the tests", red=True)
            for line in self.report:
                terminalreporter.line(line, red=True)


@pytest.fixture(params=[pytest.param("kernel", marks=pytest.mark.requires("kernel")), "emulator"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    """``"kernel"``, then ``"emulator"``: the test runs on both and holds for both."""
    name: BackendName = request.param
    return name


@pytest.fixture
def netns() -> Iterator[NetworkNamespace]:
    """A network namespace of the test's own."""
    need("netns")
    with NetworkNamespace() as namespace:
        yield namespace


@pytest.fixture
def veth() -> Iterator[tuple[VethEnd, VethEnd]]:
    """The two ends of a veth pair, each in a network namespace of its own."""
    need("netns")
    with NetworkNamespace() as left, NetworkNamespace() as right:
        yield connect(left, right)


@pytest.fixture(scope="session")
def unprivileged() -> Iterator[Unprivileged]:
    """Runs Python code with this kbpf as an unprivileged user."""
    need("unprivileged")
    with Unprivileged() as user:
        yield user


@pytest.fixture
def loopback_traffic() -> LoopbackTraffic:
    """Makes UDP and TCP traffic on loopback."""
    return LoopbackTraffic()
