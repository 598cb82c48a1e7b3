"""The house keeps its shape: imports run one way, light things stay light, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "mobazoo"
LONGEST = 400

# Lower layers first; a module imports from its own layer and from those above it in this list. A name covers what is
# below it unless a longer name is listed. Unlisted modules fail: a new one must be given its place.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("mobazoo._version", "mobazoo.errors", "mobazoo.extras", "mobazoo.files"),
    ("mobazoo", "mobazoo.attention.pattern"),
    ("mobazoo.attention", "mobazoo.config"),
    ("mobazoo.nn",),
    ("mobazoo.models",),
    ("mobazoo.integrations",),
    ("mobazoo.checkpoint",),
    ("mobazoo.data", "mobazoo.metrics", "mobazoo.parts", "mobazoo.results"),
    ("mobazoo.explain",),
    ("mobazoo.cost",),
    (
        "mobazoo.train",
        "mobazoo.eval",
        "mobazoo.probe",
        "mobazoo.generate",
        "mobazoo.report",
    ),
    ("mobazoo.bench",),
    ("mobazoo.zoo",),
    ("mobazoo.cli", "mobazoo.__main__"),
)
ATTENTION: tuple[tuple[str, ...], ...] = (
    ("mobazoo.attention.pattern", "mobazoo.attention"),
    (
        "mobazoo.attention.heap",
        "mobazoo.attention.lanes",
        "mobazoo.attention.native",
        "mobazoo.attention.selection",
        "mobazoo.attention.triton_runs",
    ),
    ("mobazoo.attention.problem",),
    ("mobazoo.attention.gates",),
    ("mobazoo.attention.segments",),
    ("mobazoo.attention.blocks",),
    ("mobazoo.attention.routing",),
    ("mobazoo.attention.checks", "mobazoo.attention.tiles", "mobazoo.attention.gather", "mobazoo.attention.merge"),
    ("mobazoo.attention.blockmask",),
    ("mobazoo.attention.kernels",),
    ("mobazoo.attention.backends",),
    ("mobazoo.attention.auto",),
    ("mobazoo.attention.api",),
)
# Lazy attributes name everything, and see nothing before they are asked.
LAZY = ("mobazoo", "mobazoo.attention")
NO_TORCH = (
    "mobazoo",
    "mobazoo.errors",
    "mobazoo.extras",
    "mobazoo.files",
    "mobazoo.attention",
    "mobazoo.attention.pattern",
    "mobazoo.config",
)


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((LIBRARY, "mobazoo"), (ROOT / "models", "mobazoo.models")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Modules of the library that a module imports, ``TYPE_CHECKING`` blocks included, by their real names."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mobazoo")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            if node.module and node.module.split(".")[0] == "mobazoo":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module


def layer(name: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    """Index of the longest listed name that covers a module."""
    best: tuple[int, int] | None = None
    for at, names in enumerate(layers):
        for known in names:
            covers = name == known or (known != "mobazoo" and name.startswith(known + "."))
            if covers and (best is None or len(known) > best[1]):
                best = (at, len(known))
    return best[0] if best else None


def wrong_way(layers: tuple[tuple[str, ...], ...], names: list[str]) -> list[str]:
    found = []
    for name in names:
        here = layer(name, layers)
        for target in imports(name) if name not in LAZY else ():
            there = layer(target, layers)
            if here is not None and there is not None and there > here:
                found.append(f"{name} imports {target}")
    return found


def test_imports_run_one_way() -> None:
    assert wrong_way(LAYERS, list(MODULES)) == []


def test_imports_inside_attention_run_one_way() -> None:
    inside = [name for name in MODULES if name.startswith("mobazoo.attention.")]
    assert len(inside) > 8
    assert wrong_way(ATTENTION, inside) == []


def test_every_module_has_a_place() -> None:
    homeless = [name for name in MODULES if layer(name, LAYERS) is None and not name.startswith("mobazoo.recipes")]
    homeless += [
        name
        for name in MODULES
        if name.startswith("mobazoo.attention.")
        and ATTENTION[layer(name, ATTENTION) or 0] == ATTENTION[0]
        and name != "mobazoo.attention.pattern"
    ]
    assert homeless == []


def test_nothing_is_imported_inside_a_function() -> None:
    """That would hide a cycle."""
    found = []
    for name, path in MODULES.items():
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    targets = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    targets += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                    found += [f"{name}.{function.name}" for t in targets if t.split(".")[0] == "mobazoo"]
    assert found == []


@pytest.mark.parametrize("name", [name for name in NO_TORCH if name in MODULES])
def test_light_modules_import_no_torch(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_patterns_need_no_torch() -> None:
    code = (
        "import sys; from mobazoo.attention import Full, MoBA; p = MoBA(4, 3); assert p.covers(12) and not p.covers(13)"
        "; assert Full() == Full(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_lazy_names_are_the_public_names() -> None:
    import mobazoo.attention

    for name in mobazoo.attention.__all__:
        assert getattr(mobazoo.attention, name).__module__.startswith("mobazoo.attention") or name == "Pattern"


def test_files_are_short() -> None:
    folders = [ROOT / name for name in ("mobazoo", "models", "tests", "tools", "examples")]
    paths = [path for folder in folders if folder.exists() for path in folder.rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in paths if (n := len(p.read_text().splitlines())) > LONGEST}
    assert long == {}
