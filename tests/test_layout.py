"""The architecture, read off the files: two leaves that know nothing of each other, and the engine on top."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dpkit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dpkit", "accountants", "layers")
STANDARD = sys.stdlib_module_names


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found or folder == "examples", folder
    return found


def name(path: Path) -> str:
    """dpkit.engine for dpkit/engine.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from nodes(other)
            continue
        yield child
        yield from nodes(child)


def imports(path: Path) -> set[str]:
    """The modules that a file imports at run time, anywhere in it, by their full names."""
    found: set[str] = set()
    package = name(path) if path.name == "__init__.py" else name(path).rpartition(".")[0]
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                home = ".".join([*above, home]).rstrip(".")
            found.add(home)
            if node.module is None:  # from . import checks
                found |= {f"{home}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imports(path)}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, from the root."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


# --- directions ---


@pytest.mark.parametrize("path", files("accountants"), ids=name)
def test_accountants_are_a_leaf(path: Path) -> None:
    """numpy and scipy; a plot may use matplotlib. Never torch, dpkit or layers."""
    assert tops(path) - STANDARD <= {"numpy", "scipy", "matplotlib", "accountants"}


@pytest.mark.parametrize("path", files("layers"), ids=name)
def test_layers_are_a_leaf(path: Path) -> None:
    """torch; conversions may look at transformers. Never dpkit or accountants."""
    assert tops(path) - STANDARD <= {"torch", "transformers", "layers"}


@pytest.mark.parametrize("path", [p for folder in ("accountants", "layers") for p in files(folder)], ids=name)
def test_leaves_import_themselves_relatively(path: Path) -> None:
    """An absolute import would make a second copy of every class, beside dpkit.accountants."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        assert not {m.partition(".")[0] for m in modules} & set(PACKAGES)


@pytest.mark.parametrize("path", files("dpkit"), ids=name)
def test_dpkit_needs_torch_only(path: Path) -> None:
    """The leaves by their public names, nothing heavier; transformers only where the user's model brought it,
    cryptography only for noise, hypothesis only to draw cases, numpy and scipy where their loops are faster; audits
    compute statistics and draw them."""
    secure = {"cryptography"} if path.name == "keystream.py" else set()
    statistics = {"numpy", "scipy", "matplotlib"} if name(path).startswith("dpkit.audit.") else set()
    statistics |= {"normals.py": {"numpy"}, "forms.py": {"numpy", "scipy"}}.get(path.name, set())
    drawn = {"hypothesis"} if name(path) == "dpkit.testing.strategies" else set()
    joined = {
        "dpkit.integrations.lightning": {"pytorch_lightning"},
        "dpkit.integrations.transformers": {"transformers"},
    }
    own = joined.get(name(path), set())
    assert tops(path) - STANDARD <= {"torch", "dpkit", "transformers"} | secure | statistics | drawn | own
    leaves = {m for m in imports(path) if m.startswith(("dpkit.accountants", "dpkit.layers"))}
    assert leaves <= {"dpkit.accountants", "dpkit.layers"}
    top_level = ast.parse(path.read_text(encoding="utf-8")).body
    for lazy in ({"transformers", "cryptography", "matplotlib"} & tops(path)) - own:
        assert not [n for n in top_level if isinstance(n, ast.ImportFrom) and n.module and lazy in n.module]


def test_imports_run_downwards() -> None:
    """No cycle among dpkit's files; errors, trees and records at the bottom, forms above them, the engine on top.

    Audits, tests and integrations look at it from outside.
    """
    modules = {name(p) for p in files("dpkit")} - {"dpkit"}
    graph = {name(p): imports(p) & modules for p in files("dpkit") if p.name != "__init__.py"}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle
    assert not graph["dpkit.errors"] | graph["dpkit.trees"] | graph["dpkit.records"]
    assert graph["dpkit.forms"] <= {"dpkit.errors", "dpkit.trees", "dpkit.records"}
    assert {"dpkit.step", "dpkit.sampling", "dpkit.noise", "dpkit.clipping"} <= graph["dpkit.engine"]
    assert {"dpkit.tape", "dpkit.sums", "dpkit.spending"} <= graph["dpkit.step"]
    outside = ("dpkit.audit.", "dpkit.testing.", "dpkit.integrations.", "dpkit.interop")
    assert not [user for user, used in graph.items() if "dpkit.engine" in used and not user.startswith(outside)]
    assert not [
        low for low, used in graph.items() if not low.startswith(outside) and any(u.startswith(outside) for u in used)
    ]
    below = ("errors", "trees", "records", "forms", "rules", "checks")
    assert not [low for low in below if graph[f"dpkit.{low}"] & {"dpkit.tape", "dpkit.live", "dpkit.sampling"}]


@pytest.mark.parametrize("path", files("examples"), ids=name)
def test_examples_use_the_public_api(path: Path) -> None:
    """What a user could write: dpkit's public names, and no underscore."""
    own = {m for m in imports(path) if m.partition(".")[0] in PACKAGES}
    assert {m for m in own if not m.startswith("dpkit.integrations.")} <= {"dpkit", "dpkit.accountants", "dpkit.layers"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "dpkit":
                assert node.attr in {*dpkit.__all__, "accountants", "layers"}, node.attr
            if node.value.id in ("dpkit", "engine"):
                assert not node.attr.startswith("_"), node.attr


def test_only_the_tape_hooks_into_a_model() -> None:
    """Module hooks are registered in one file."""
    users = [name(p) for p in files("dpkit") if "register_forward" in p.read_text(encoding="utf-8")]
    assert users == ["dpkit.tape"]


# --- importing ---


def test_importing_dpkit_loads_little() -> None:
    """Neither dpkit nor dpkit.accountants loads torch; nothing prints, warns or sets up logging."""
    code = (
        "import sys, logging, dpkit, dpkit.accountants\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert not logging.getLogger().handlers\n"
        "assert 'accountants' not in sys.modules\n"
        "dpkit.PrivacyEngine\n"
        "assert 'torch' in sys.modules\n"
        "assert not [m for m in ('transformers', 'matplotlib', 'opacus', 'sklearn') if m in sys.modules]\n"
        "assert not logging.getLogger().handlers\n"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_accountants_without_torch() -> None:
    """They answer on a machine that has no torch."""
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "import dpkit.accountants as a\n"
        "print(a.epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=100, delta=1e-5))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert 0.1 < float(done.stdout) < 10


def test_public_names() -> None:
    """Every public name loads, from the home it is said to have, is documented, and is listed by dir()."""
    assert len(set(dpkit.__all__)) == len(dpkit.__all__)
    for public in dpkit.__all__:
        value = getattr(dpkit, public)
        assert public in dir(dpkit)
        if public != "__version__":
            assert inspect.getdoc(value), f"{public} has no docstring"
            assert value.__module__.startswith("dpkit."), public
            assert value.__doc__, f"{public} has only its base's docstring"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dpkit.no_such_name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_hides_a_module(package: str) -> None:
    """A public name that is also a file's: which of both a reader gets would depend on what was imported first."""
    home = importlib.import_module({"dpkit": "dpkit"}.get(package, f"dpkit.{package}"))
    assert not {path.stem for path in (ROOT / package).glob("*.py")} & set(home.__all__)


def test_type_checkers_see_the_same_names() -> None:
    """The names under TYPE_CHECKING are those that load lazily."""
    tree = ast.parse((ROOT / "dpkit" / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name
        for block in tree.body
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(dpkit.__all__) - {"__version__"}


@pytest.mark.parametrize("method", [m for m in vars(dpkit.PrivacyEngine) if not m.startswith("_")])
def test_engine_is_documented(method: str) -> None:
    """Every public method and property of the engine says what it does."""
    member = inspect.getattr_static(dpkit.PrivacyEngine, method)
    if callable(member) or isinstance(member, property):
        assert inspect.getdoc(member)


@pytest.mark.parametrize("path", [p for folder in PACKAGES for p in files(folder)], ids=name)
def test_files_say_what_they_are(path: Path) -> None:
    """A docstring at the top; no print, no logging set-up, no catch-all **kwargs in a public signature of dpkit."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    if path.name != "__main__.py":
        assert "print" not in calls
    assert "logging.basicConfig" not in calls


# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel; skipped where the build backend is not installed."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    [built] = out.glob("dpkit-*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_three_packages(wheel: Path) -> None:
    """accountants and layers lie inside dpkit, no file is missing, nothing else comes along."""
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
    expected = {"dpkit/py.typed"}
    for folder in PACKAGES:
        prefix = "" if folder == "dpkit" else "dpkit/"
        expected |= {prefix + path.relative_to(ROOT).as_posix() for path in files(folder)}
    assert held == expected


@pytest.mark.slow
def test_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, the three packages import from there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\n"
        "import dpkit, dpkit.accountants, dpkit.layers\n"
        "assert all(m.__file__.startswith(sys.argv[1]) for m in (dpkit, dpkit.accountants, dpkit.layers))\n"
        "dpkit.PrivacyEngine()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
