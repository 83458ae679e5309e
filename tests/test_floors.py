"""The project keeps its structure: imports point down, and the core and its functions stay small enough to be read."""

import ast
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

PROJECT = Path(__file__).parents[1]
FOLDERS = ("data", "gemma3", "reward", "grpo")
FILES = [*PROJECT.glob("*.py"), *chain.from_iterable((PROJECT / folder).rglob("*.py") for folder in FOLDERS)]
TREES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts): ast.parse(path.read_text("utf-8")) for path in FILES
}
TREES = {name.removesuffix(".__init__"): tree for name, tree in TREES.items()}

# The modules outside the core that the core may import: flags, and the processes and memory of a run.
BASE = {"grpo.run.cli", "grpo.run.settings", "grpo.run.processes", "grpo.run.trackers", "grpo.run.memory"}


def is_core(module: str) -> bool:
    """Whether one must read the module to understand the algorithm or the model."""
    return module == "train" or (module.count(".") == 1 and module.split(".")[0] in ("grpo", "gemma3"))


def imports(module: str) -> set[str]:
    """The project's modules that a module imports."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else node.module for name in names}
    return found & TREES.keys()


def allowed(module: str, imported: str) -> bool:
    package, target = module.split(".")[0], imported.split(".")[0]
    if package in ("data", "gemma3"):
        reads_files = imported.startswith("gemma3.files")
        return target == package and (not reads_files or module == "gemma3" or module.startswith("gemma3.files"))
    if package == "reward":
        return target in ("reward", "data")
    if module == "grpo.algorithm":
        return False
    if module in BASE:
        return target in ("data", "gemma3") or imported in BASE | {"grpo.algorithm"}
    if package == "grpo":
        is_wing = target == "grpo" and not is_core(imported) and imported not in BASE
        return target in FOLDERS and (not is_core(module) or not is_wing)
    return target in FOLDERS  # train.py and eval.py do not import each other


def test_imports_point_down():
    wrong = [f"{module} imports {name}" for module in TREES for name in imports(module) if not allowed(module, name)]
    assert not wrong, wrong


def test_no_module_imports_itself_by_way_of_others():
    order = TopologicalSorter({module: imports(module) for module in TREES}).static_order()  # CycleError names a circle
    assert set(order) == TREES.keys()


def test_functions_of_the_core_take_at_most_eight_parameters_and_hide_none():
    for module in filter(is_core, TREES):
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len(set(names) - {"self"}) <= 8, f"{module}.{node.name} takes {names}"
                assert node.args.kwarg is None, f"{module}.{node.name} hides parameters"


def test_the_core_has_a_ceiling():
    paths = [*PROJECT.glob("gemma3/*.py"), *PROJECT.glob("grpo/*.py"), PROJECT / "train.py"]
    assert sum(len(path.read_text("utf-8").splitlines()) for path in paths) <= 3400
