"""Rooms import downwards only and in no circle; processes that train and forecast know neither pandas nor Qlib."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kronos_qlib

PACKAGE = Path(__file__).parents[1] / "kronos_qlib"
GOLDEN = Path(__file__).parent / "golden" / "small-bits"
# In order: a room imports from itself and from the rooms before it. A new room has to be given its place here.
ROOMS = "text versions addresses files settings extensions hardware nn data ingest forecast train evaluation".split()
ROOMS += ["workflow", "analysis", "live", "web", "cli", "__main__"]
# Their imports must stay small, and so must those of all modules of `train`.
SMALL = ("nn", "data.windows", "data.join_windows", "data.windows_on_disk", "forecast.engine.generate", "forecast.task")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# All but the package itself, which imports its public names when they are first used.
MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


class Imports(ast.NodeVisitor):
    """What a module imports of the package, within functions too, but not what it imports for type checkers alone."""

    def __init__(self, module: str) -> None:
        self.found: set[str] = set()
        self.visit(ast.parse(MODULES[module].read_text()))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "kronos_qlib"}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert not node.level, "imports name the package"
        if node.module.split(".")[0] == "kronos_qlib":
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            self.found |= {name if name in MODULES else node.module for name in names}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What each module imports of the package."""
    return {module: Imports(module).found - {module} for module in MODULES}


def test_a_room_imports_only_from_itself_and_from_the_rooms_before_it(imports: dict[str, set[str]]):
    def place(module: str) -> int:
        return ROOMS.index(module.split(".")[1])

    public = {module for module, imported in imports.items() if "kronos_qlib" in imported}
    assert not public, "these import a public name, which hides the room that it is of"
    assert [(m, i) for m, imported in imports.items() for i in imported if place(i) > place(m)] == []


def test_no_module_imports_itself_by_way_of_others(imports: dict[str, set[str]]):
    TopologicalSorter(imports).prepare()  # its CycleError names the modules of a circle


def test_the_public_names_complete_and_are_those_that_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    names = {alias.asname for node in checked.body for alias in node.names}
    assert names == set(kronos_qlib.__all__) <= set(dir(kronos_qlib))
    assert all(getattr(kronos_qlib, name).__name__ == name for name in names)
    assert (PACKAGE / "py.typed").exists()


def test_processes_that_train_and_forecast_know_neither_pandas_nor_qlib():
    names = [f"kronos_qlib.{name}" for name in SMALL]
    names += [module for module in MODULES if module.split(".")[1] == "train"]
    script = f"""
import sys
from importlib import import_module
from kronos_qlib import Kronos, KronosTokenizer
for name in {names}:
    import_module(name)
    heavy = {{"pandas", "qlib", "mlflow", "matplotlib", "tensorflow", "peft", "transformers"}} & sys.modules.keys()
    assert not heavy, f"{{name}} imports {{heavy}}"
golden = {str(GOLDEN)!r}
Kronos.from_pretrained(golden + "/model"), KronosTokenizer.from_pretrained(golden + "/tokenizer")
import torch
from kronos_qlib.train.step import PlainAdamW
optimizer = PlainAdamW([torch.nn.Parameter(torch.zeros(1))])
torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=2).step()
optimizer.step(), optimizer.zero_grad(), optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules, "to load or train a network imports torch's compiler"
import kronos_qlib.evaluation.training_report  # of the process that trains without others
assert "matplotlib" not in sys.modules, "a training draws when it has ended, not before"
from kronos_qlib import KronosPredictor
assert "qlib" not in sys.modules, "a forecast of a DataFrame needs no Qlib"
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
