"""The direction of imports (docs/architecture.md): packages stand in one order, and import only what is before them."""

from __future__ import annotations

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_sas"
ORDER = (
    *("core", "kernels", "data", "optim", "toy", "model", "corpus", "objective", "run", "launch"),
    *(
        "evaluation",
        "onsets",
        "export",
        "glue",
        "trajectory",
        "config",
        "train",
        "report",
        "visualization",
        "experiments",
    ),
)


def imports(path: Path, running: bool = False) -> set[str]:
    """The project's modules that a module imports, wherever in it, as paths below the package without suffix.

    With `running` those imports are left out that are for type checkers only.
    """
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if running and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_sas"):
            base = node.module.removeprefix("megatron_sas").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".").replace(".", "/")
                is_module = (PACKAGE / f"{inner}.py").is_file() or (PACKAGE / inner).is_dir()
                found.add(inner if is_module else base.replace(".", "/"))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("megatron_sas.")]
            found |= {name.removeprefix("megatron_sas.").replace(".", "/") for name in names}
    return found - {""}


@functools.cache
def graph(running: bool = False) -> dict[str, set[str]]:
    """Module to the modules that it imports."""
    paths = {str(path.relative_to(PACKAGE).with_suffix("")): path for path in PACKAGE.rglob("*.py")}
    return {
        name.removesuffix("/__init__"): imports(path, running) for name, path in paths.items() if name != "__init__"
    }


def package(module: str) -> str:
    return module.split("/")[0]


def test_no_module_lies_loose_at_the_root_but_the_configuration():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "config.py"}


def test_every_package_has_its_place_in_the_order():
    assert {package(module) for module in graph()} == set(ORDER)


def test_packages_import_only_what_is_before_them():
    upward = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if ORDER.index(package(other)) > ORDER.index(package(module))
    ]
    assert not upward


def test_modules_do_not_import_in_circles():
    list(TopologicalSorter(graph(running=True)).static_order())  # raises CycleError with the circle


def test_the_longest_chain_of_packages_has_at_most_eight():
    length: dict[str, int] = {}
    needs = {
        name: {package(o) for m, others in graph().items() if package(m) == name for o in others} for name in ORDER
    }
    for name in ORDER:
        length[name] = 1 + max((length[other] for other in needs[name] - {name}), default=0)
    assert max(length.values()) <= 8
