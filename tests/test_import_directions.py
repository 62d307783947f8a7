"""Modules import in one direction: each only from those above it in ORDER."""

import ast
import json
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "sptseg_lib"
# The table of contents of the package; a package in it stands for all of its modules.
ORDER = [
    "__init__",
    "disk",
    "hardware",
    "palette",
    "class_lists",
    "precision",
    "attention",
    "spectral",
    "mixers",
    "frequency",
    "scenes",
    "clip",
    "graph",
    "settings",
    "distributed",
    "splits",
    "corruptions",
    "transductive",
    "datasets",
    "augment",
    "encoder",
    "decoder",
    "heads",
    "losses",
    "model",
    "metrics",
    "diagnose",
    "inference",
    "pictures",
    "data",
    "checkpoint",
    "train",
    "evaluate",
    "two_stage",
    "zs3",
    "spread",
    "study",
    "results",
    "vocabulary",
    "panels",
    "robustness",
    "ablations",
    "peers",
    "plots",
    "shipped",
    "class_names",
    "predictor",
    "segmentation",
    "cost",
    "peer_study",
    "report",
    "pipeline",
    "execute",
    "__main__",
]
PLOTTING = {"matplotlib", "seaborn", "ipywidgets"}


def module_name(path: Path) -> str:
    """sptseg_lib/clip/load.py -> sptseg_lib.clip.load, and a package's __init__.py -> the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(LIBRARY.rglob("*.py"))}


def imported(tree: ast.AST, package: str, modules: set[str]) -> set[str]:
    """Absolute dotted names that code imports, at any depth; `package` resolves the relative ones.

    `from x import y` names x.y where that is one of `modules`, and x otherwise.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            names.update(member if member in modules else base for member in members)
    return names


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imported(ast.parse(path.read_text(encoding="utf-8")), package, set(MODULES))


def place(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    return (module.split(".") + ["__init__"])[1]


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def notebooks() -> list[Path]:
    return sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def notebook_tree(path: Path) -> ast.AST:
    """The code cells of a notebook as one syntax tree; lines of IPython commands are left out."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    lines = ["pass" if line.lstrip().startswith(("%", "!", "?")) else line for line in code.splitlines()]
    return ast.parse("\n".join(lines))


def test_relative_imports_are_resolved():
    modules = {"lib", "lib.plots", "lib.scenes", "lib.scenes.atlas", "lib.clip.load"}
    code = "from . import atlas\nfrom ..clip.load import load_clip\nimport torch.fft\nif 1:\n    from .. import plots"
    expected = {"lib.scenes.atlas", "lib.clip.load", "torch.fft", "lib.plots"}
    assert imported(ast.parse(code), "lib.scenes", modules) == expected


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_above(module):
    own, others = place(module), imports_of(module) & set(MODULES)
    missing = {place(name) for name in (module, *others)} - set(ORDER)
    assert not missing, f"{missing} have no place in ORDER: write down which modules they may import from"
    for other in others:
        assert ORDER.index(place(other)) <= ORDER.index(own), f"{module} imports {other}, which stands below it"


def test_no_cycles_inside_packages():
    TopologicalSorter({module: imports_of(module) & set(MODULES) - {module} for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [name for name in MODULES if place(name) == "spectral"])
def test_spectral_imports_torch_alone(module):
    foreign = {name for name in imports_of(module) if not name.startswith("sptseg_lib.spectral")}
    assert top_level(foreign) <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", MODULES)
def test_plotting_stays_where_figures_are_made(module):
    if place(module) not in {"plots", "report", "segmentation"}:
        assert "sptseg_lib.plots" not in imports_of(module), f"{module} imports plots; it makes no figures"
    if place(module) not in {"plots", "segmentation"}:
        assert not top_level(imports_of(module)) & PLOTTING, f"{module} draws; figures belong in plots"


@pytest.mark.parametrize("module", MODULES)
def test_library_imports_no_tests_scripts_or_notebooks(module):
    assert not top_level(imports_of(module)) & {"tests", "data_scripts", "notebooks"}


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebooks_import_no_notebooks(path):
    source = "".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    siblings = {other.stem for other in notebooks()} | {"notebooks", "import_ipynb", "nbimporter", "tests"}
    assert not top_level(imported(notebook_tree(path), "", set())) & siblings
    assert "%run" not in source, f"{path.name} runs another file; what is used twice belongs in the library"


@pytest.mark.parametrize("path", [*MODULES.values(), *notebooks()], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_star_imports(path):
    tree = notebook_tree(path) if path.suffix == ".ipynb" else ast.parse(path.read_text(encoding="utf-8"))
    stars = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    assert not stars, f"{path.name} imports everything from {stars}"
