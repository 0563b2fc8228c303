"""What the design forbids, checked on the source: each check returns its faults, and is itself shown to find one."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "longvid_jax"

# Imports go down only: a part imports parts of the lines below its own. Of errors everybody may know.
FLOORS = (
    ("cli", "__main__"),
    ("cli_train", "cli_eval", "cli_assemble"),
    ("evaluate", "scale"),
    ("systems", "train"),
    ("data", "convert", "generate"),
    ("models", "memory", "video"),
    ("ops",),
    ("errors", "terminal"),
)
FLOOR = {part: len(FLOORS) - level for level, parts in enumerate(FLOORS) for part in parts}
# checkpoint stands beside the floors: it needs nothing of the package, and these and all above them may use it.
CHECKPOINT_USERS = {"convert", "train", "systems", "evaluate", "scale", "cli", "__main__"}
FACE = "__init__"  # longvid_jax/__init__.py shows every part, so nothing but the command line imports it

# The only places that may import these.
ONLY_IN = {"orbax": "checkpoint", "jax.experimental.pallas": "ops"}
NNX_FORBIDDEN = set(
    "jit scan vmap grad value_and_grad remat List Dict Optimizer Cache BatchStat Intermediate sow Variable".split()
)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(root|work|home)/")
TOP_LEVEL = {"pyproject.toml", PACKAGE, "configs", "launch", "tests", "colab", "README.md", "LICENSE", "CHANGELOG.md"}
MAX_LINES = 500  # past 400 a file deserves a second look, past this it is two files
README_COMMANDS = ("pip install . && longvid demo", "pip install '.[test]' && pytest")
HEAVY = ("jax", "flax", "transformers", "torch", "av", "orbax", "grain", "tensorflow_datasets", "matplotlib")
# What import names are called on PyPI, where that differs.
DISTRIBUTION = {"PIL": "pillow", "orbax": "orbax-checkpoint", "absl": "absl-py"}


def sources(root: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    """Path, part (the first name below the package) and syntax tree of every module of the package."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        part = path.relative_to(root / PACKAGE).parts[0].removesuffix(".py")
        yield path.relative_to(root), part, ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that is imported: anywhere, relative too, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def floors(root: Path) -> list[str]:
    parts = {part for _, part, _ in sources(root)}
    faults = []
    for path, part, tree in sources(root):
        if part == FACE:
            continue  # the public face shows all parts, lazily: see test_importing_the_package_is_light
        if part != "checkpoint" and part not in FLOOR:
            faults.append(f"{path}: {part} has no floor; give it one in FLOORS")
            continue
        for line, name in imports(path, tree):
            if name.split(".")[0] != PACKAGE:
                continue
            target = (name.split(".") + [FACE])[1]
            target = target if target in parts else FACE
            if target == part:
                continue
            if target == FACE:
                allowed = part in FLOORS[0]
            elif target == "checkpoint":
                allowed = part in CHECKPOINT_USERS
            elif part == "checkpoint":
                allowed = target == "errors"
            else:
                allowed = FLOOR[target] < FLOOR[part]
            if not allowed:
                faults.append(f"{path}:{line}: {part} may not import {name}")
    return faults


def reserved_imports(root: Path) -> list[str]:
    return [
        f"{path}:{line}: only {home} imports {name}"
        for path, part, tree in sources(root)
        for line, imported in imports(path, tree)
        for name, home in ONLY_IN.items()
        if part != home and f"{imported}.".startswith(f"{name}.")
    ]


def undeclared_imports(root: Path) -> list[str]:
    """At the top of a module only what `pip install .` brings; inside functions also what the extras bring."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    extras = {
        canonicalize_name(Requirement(line).name)
        for lines in project.get("optional-dependencies", {}).values()
        for line in lines
    }
    faults = []
    for path, _, tree in sources(root):
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for line, name in imports(path, node):
                first = name.split(".")[0]
                declared = core if id(node) in top else core | extras
                if first in sys.stdlib_module_names or first == PACKAGE:
                    continue
                if canonicalize_name(DISTRIBUTION.get(first, first)) not in declared:
                    faults.append(f"{path}:{line}: {first} is not among the dependencies in pyproject.toml")
    return faults


def nnx_rules(root: Path) -> list[str]:
    """Modules hold parameters and settings: nothing else of nnx is used, and no `__call__` assigns to self."""
    faults = []
    for path, _, tree in sources(root):
        aliases = {"nnx", "flax.nnx"} | {
            alias.asname
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if alias.asname and alias.name in ("nnx", "flax.nnx")
        }
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax.nnx"):
                names = [alias.name for alias in node.names]
            faults += [f"{path}:{node.lineno}: nnx.{name}" for name in names if name in NNX_FORBIDDEN]
            if isinstance(node, ast.FunctionDef) and node.name == "__call__" and node.args.args:
                faults += [f"{path}:{line}: __call__ changes self" for line in _assignments(node)]
    return faults


def _assignments(function: ast.FunctionDef) -> Iterator[int]:
    """Lines of a method that assign to, or delete, anything that hangs on its first argument."""
    self_name = function.args.args[0].arg
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            root: ast.expr = node
            while isinstance(root, ast.Attribute | ast.Subscript | ast.Starred):
                root = root.value
            if isinstance(root, ast.Name) and root.id == self_name:
                yield node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__", "delattr"):
            if node.args and ast.unparse(node.args[0]) == self_name:
                yield node.lineno


def unfinished(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted((root / PACKAGE).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    ]


def long_files(root: Path) -> list[str]:
    lengths = {
        path.relative_to(root): len(path.read_text(encoding="utf-8").splitlines())
        for folder in (PACKAGE, "tests", "configs", "launch")
        for path in sorted((root / folder).rglob("*.py"))
    }
    return [f"{path}: {length} lines, of at most {MAX_LINES}" for path, length in lengths.items() if length > MAX_LINES]


def tracked(root: Path) -> list[str]:
    """Names of the files that git tracks, or of all files where there is no checkout."""
    git = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True)
    if git.returncode == 0 and git.stdout and (root / ".git").exists():
        return [name for name in git.stdout.split("\0") if name and (root / name).exists()]
    return [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]


def top_level(root: Path) -> list[str]:
    return sorted(
        f"{name} does not belong at the top"
        for name in {file.split("/")[0] for file in tracked(root)}
        if name not in TOP_LEVEL and not name.startswith(".")
    )


def machine_paths(root: Path) -> list[str]:
    faults = []
    for name in tracked(root):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a binary file
        faults += [f"{name}: {line.strip()}" for line in text.splitlines() if MACHINE_PATH.search(line)]
    return faults


def readme_commands(root: Path) -> list[str]:
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    return [f"README.md does not say: {command}" for command in README_COMMANDS if command not in text]


def version_pairs(root: Path) -> list[str]:
    """On every Python the requirements admit the pair of jax and flax that fits, and neither of the other pair."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pairs = {"3.11": ("0.10.2", "0.12.8", "0.0.42"), "3.12": ("0.12.0.1", "0.12.12", "0.0.50")}
    faults = []
    for python, pair in {**pairs, "3.13": pairs["3.12"]}.items():
        other = pairs["3.12" if python == "3.11" else "3.11"]
        for group, lines in {"core": project["dependencies"], **project["optional-dependencies"]}.items():
            environment = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
            requirements = [Requirement(line) for line in lines]
            here = [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]
            if group == "core" and {"jax", "flax"} - {r.name for r in here}:
                faults.append(f"{group} on Python {python}: jax and flax are not both required")
            for r in here:
                if r.name in ("jax", "flax"):
                    index = ("jax", "flax").index(r.name)
                    if pair[index] not in r.specifier or other[index] in r.specifier:
                        faults.append(f"{group} on Python {python}: {r} does not mean {r.name} {pair[index]}")
                elif r.name == "libtpu" and not str(r.specifier).startswith(f"=={pair[2]}"):
                    faults.append(f"{group} on Python {python}: {r} is not the {pair[2]} that jax {pair[0]} takes")
    return faults


PAIRS = """
[project]
dependencies = [
    "jax==0.10.2; python_version < '3.12'", "flax==0.12.8; python_version < '3.12'", "orbax-checkpoint",
    "jax==0.12.0.1; python_version >= '3.12'", "flax==0.12.12; python_version >= '3.12'",
]
optional-dependencies = {test = ["torch", "libtpu==0.0.42.1; python_version < '3.12'"]}
"""
# A tiny tree without a fault; each self-test adds a file to it, or replaces one.
TREE = {
    "../pyproject.toml": PAIRS,
    "../README.md": "\n".join(README_COMMANDS),
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from longvid_jax.systems import load",
    "errors.py": "",
    "checkpoint.py": "from longvid_jax.errors import CheckpointError\nimport orbax.checkpoint",
    "ops/attention.py": "from jax.experimental import pallas\nfrom . import topk",
    "ops/topk.py": "def f():\n    import torch",
    "models/llama.py": "from flax import nnx\n\nclass M(nnx.Module):\n    def __call__(self, x):\n        y = self[x]",
    "generate.py": "",
    "convert/hf.py": "from longvid_jax import checkpoint, models",
    "scale/mesh.py": "",
    "systems/load.py": "from ..models import llama\nimport longvid_jax.checkpoint\nfrom longvid_jax import generate",
    "cli.py": "import longvid_jax as lv\nfrom longvid_jax import load",
}
# (check, file, its text, what the fault says)
SELF_TESTS: list[tuple[Callable[[Path], list[str]], str, str, str]] = [
    (floors, "ops/topk.py", "from longvid_jax import models", "ops may not import longvid_jax.models"),
    (floors, "ops/topk.py", "from ..models import llama", "ops may not import longvid_jax.models.llama"),
    (floors, "ops/topk.py", "def f():\n    import longvid_jax.models.llama", "topk.py:2: ops may not import"),
    (floors, "ops/topk.py", "from longvid_jax import load", "ops may not import longvid_jax.load"),
    (floors, "ops/topk.py", "from longvid_jax.checkpoint import save", "ops may not import longvid_jax.checkpoint"),
    (floors, "memory/pivotkv.py", "from longvid_jax.models.llama import Llama", "memory may not import"),
    (floors, "video/decode.py", "from .. import models", "video may not import longvid_jax.models"),
    (floors, "models/qwen.py", "import longvid_jax.generate", "models may not import longvid_jax.generate"),
    (floors, "train/loop.py", "import longvid_jax.systems", "train may not import longvid_jax.systems"),
    (floors, "systems/retake.py", "import longvid_jax.scale", "systems may not import longvid_jax.scale"),
    (floors, "checkpoint.py", "import longvid_jax.convert", "checkpoint may not import longvid_jax.convert"),
    (floors, "utils.py", "", "utils has no floor"),
    (reserved_imports, "ops/topk.py", "import orbax.checkpoint as ocp", "only checkpoint imports orbax"),
    (reserved_imports, "models/llama.py", "from jax.experimental import pallas", "only ops imports"),
    (undeclared_imports, "ops/topk.py", "import torch", "torch is not among the dependencies"),
    (undeclared_imports, "ops/topk.py", "def f():\n    import cv2", "cv2 is not among the dependencies"),
    (nnx_rules, "models/llama.py", "from flax import nnx\nf = nnx.jit(g)", "llama.py:2: nnx.jit"),
    (nnx_rules, "models/llama.py", "from flax import nnx as n\nx = n.List()", "llama.py:2: nnx.List"),
    (nnx_rules, "models/llama.py", "import flax.nnx\nx = flax.nnx.Optimizer()", "llama.py:2: nnx.Optimizer"),
    (nnx_rules, "models/llama.py", "from flax.nnx import Variable", "llama.py:1: nnx.Variable"),
    *(
        (nnx_rules, "models/llama.py", f"class M:\n    def __call__(self, x):\n        {line}", "llama.py:3: __call__")
        for line in (
            "self.x = x",
            "self.x += x",
            "self.x: int = x",
            "self.w.value[0] = x",
            "y, *self.x = x",
            "del self.x",
            "setattr(self, 'x', x)",
        )
    ),
    (unfinished, "ops/topk.py", "def f():\n    raise NotImplementedError", "topk.py:2: raise NotImplementedError"),
    (unfinished, "ops/topk.py", "# TODO: later", "topk.py:1: # TODO: later"),
    (long_files, "ops/topk.py", "x = 1\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
    (top_level, "../src/topk.py", "", "src does not belong at the top"),
    (machine_paths, "ops/topk.py", "path = '/" + "root/clips'", "ops/topk.py: path"),
    (readme_commands, "../README.md", README_COMMANDS[0], f"README.md does not say: {README_COMMANDS[1]}"),
    *(
        (version_pairs, "../pyproject.toml", PAIRS.replace(old, new), fault)
        for old, new, fault in (
            ("jax==0.10.2", "jax==0.12.0.1", "core on Python 3.11: jax==0.12.0.1; "),
            ("flax==0.12.12", "flax>=0.12.8", "core on Python 3.12: flax>=0.12.8; "),
            ("python_version >= '3.12'", "python_version == '3.12'", "core on Python 3.13: jax and flax are not both"),
            ("libtpu==0.0.42.1", "libtpu==0.0.50.1", "test on Python 3.11: libtpu==0.0.50.1; "),
        )
    ),
]
CHECKS = sorted({check for check, *_ in SELF_TESTS}, key=lambda check: check.__name__)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_source_has_no_fault(check):
    assert check(ROOT) == []


@pytest.mark.parametrize(
    ("check", "file", "text", "fault"), SELF_TESTS, ids=[f"{check.__name__}-{file}" for check, file, *_ in SELF_TESTS]
)
def test_a_check_finds_its_fault(check, file, text, fault, tmp_path):
    for name, content in TREE.items():
        _write(tmp_path / PACKAGE / name, content)
    assert check(tmp_path) == []
    _write(tmp_path / PACKAGE / file, text)
    assert any(fault in line for line in check(tmp_path)), check(tmp_path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_importing_the_package_is_light():
    code = f"import json, sys, longvid_jax; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []


def test_eight_devices_and_exact_products():
    import jax

    assert jax.device_count() == 8
    assert jax.config.jax_default_matmul_precision == "highest"


@pytest.mark.tpu_compile
def test_compiles_for_tpus_are_at_the_precision_that_ships():
    import jax

    assert jax.config.jax_default_matmul_precision == "default"
