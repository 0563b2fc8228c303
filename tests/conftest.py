"""The environment of all tests: the CPU as 8 devices, exact float32 products, no network; and inputs from outside."""

import importlib.util
import os
import re
import signal
from collections import Counter
from pathlib import Path

os.environ.update(
    JAX_PLATFORMS="cpu",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    TF_CPP_MIN_LOG_LEVEL="2",
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quickly import environment

# What a shell starts in the background ignores Ctrl-C, and so would all programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = 8
NEEDS = {"parity": "torch", "tpu_compile": "libtpu"}  # marker -> the package without which its tests are deselected
_absent = {marker: package for marker, package in NEEDS.items() if importlib.util.find_spec(package) is None}
_left_out: Counter[tuple[str, str]] = Counter()

# A setting of jax and not XLA_FLAGS, which programs started by tests would inherit: a user has one CPU device.
jax.config.update("jax_num_cpu_devices", DEVICES)

# XLA reads its flags once. Programs that tests start get none of them: they are a user's.
with pytest.MonkeyPatch.context() as patch:
    for name, value in environment().items():
        patch.setenv(name, value)
    jnp.zeros(1).block_until_ready()


def pytest_sessionstart() -> None:
    if jax.device_count() != DEVICES:
        pytest.exit(f"Tests of sharding need {DEVICES} CPU devices and jax has {jax.device_count()}.", returncode=1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Exact float32 products for all comparisons; compiles for TPUs at the precision that ships.

    Around the whole protocol, so that fixtures of any scope are computed at the precision of the test that asked first.
    """
    with jax.default_matmul_precision("default" if item.get_closest_marker("tpu_compile") else "highest"):
        return (yield)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """Those of a file go with it: all of them together need more memory mappings than Linux gives a process."""
    yield
    jax.clear_caches()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out a test file that imports, at its top, a package which is not there."""
    if not (_absent and collection_path.is_file() and collection_path.name.startswith("test_")):
        return None
    for marker, package in _absent.items():
        if re.search(rf"^(import|from) {package}\b", collection_path.read_text(encoding="utf-8"), re.MULTILINE):
            _left_out[marker, "files"] += 1
            return True
    return None


@pytest.hookimpl(trylast=True)  # after -m, so that the count is of tests that would have run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without = {item: marker for item in items for marker in _absent if item.get_closest_marker(marker)}
    if without:
        _left_out.update((marker, "tests") for marker in without.values())
        config.hook.pytest_deselected(items=list(without))
        items[:] = [item for item in items if item not in without]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: each has collected everything."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = [(*key, count) for key, count in _left_out.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for marker, what, count in getattr(node, "workeroutput", {}).get("left_out", ()):
        _left_out[marker, what] = count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, package in _absent.items():
        tests, files = _left_out[marker, "tests"], _left_out[marker, "files"]
        if tests or files:
            terminalreporter.write_line(
                f"{package} is not installed: {tests} {marker} tests and {files} whole files left out"
            )


def _folder(variable: str, what: str) -> Path:
    """The folder that a variable names: unset skips, or fails where LONGVID_REQUIRE_INPUTS=1; a wrong one fails."""
    value = os.environ.get(variable)
    if not value and os.environ.get("LONGVID_REQUIRE_INPUTS") != "1":
        pytest.skip(f"{variable} is not set to the folder of {what}")
    if not value or not Path(value).is_dir():
        pytest.fail(f"{variable} must be the folder of {what}, and is {value!r}.")
    return Path(value).resolve()


@pytest.fixture(scope="session")
def clips() -> Path:
    """Real video clips (haystack_10min.mp4, edge/ and others)."""
    return _folder("LONGVID_TEST_VIDEOS", "the test clips")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the published implementations, all cases."""
    return _folder("LONGVID_TEST_GOLDEN", "the golden vectors")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The golden cases that the suite always needs, in tests/golden."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def succeeds(capsys):
    """Runs a command that must succeed: what it printed on standard output and on standard error."""

    from longvid_jax import cli

    def run(*argv) -> tuple[str, str]:
        code = cli.main([str(word) for word in argv])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out, printed.err

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail with exit code 2, one line on standard error and nothing on standard output."""

    from longvid_jax import cli

    def run(*argv) -> str:
        code = cli.main([str(word) for word in argv])
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        lines = [line for line in printed.err.splitlines() if not line.startswith("longvid: warning: ")]
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("longvid: error: ")
        return lines[0]

    return run
