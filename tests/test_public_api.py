"""What holds for the whole package: its public names, its documentation, its layers and what it never does."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_r2

PACKAGE = Path(hf_r2.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

# Imports run downwards: a part imports only parts of its own row or of rows above it here
LAYERS = [
    {"files"},
    {"adapters"},
    {"selection", "grain", "fusing", "tiles"},
    {"sharding", "cells", "largest"},
    {"stacking"},
    {"moments"},
    {"codecs", "losses", "projection"},
    {"refine", "evaluation", "aware"},
    {"quantization", "training", "report", "hub"},
    {"planning", "export"},
    {"cli"},
]
LEAVES = {"files", "adapters", "grain", "fusing"}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def modules_where(condition):
    """Parametrize a test over the modules that satisfy a condition."""
    return pytest.mark.parametrize("module", [module for module in MODULES if condition(module)])


def part_of(module):
    """Name of the top-level file or folder that a module belongs to."""
    return module.split("/")[0].removesuffix(".py")


every_module = modules_where(lambda module: True)
every_part = modules_where(lambda module: module != "__init__.py")


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(tree):
    names = (name.split(".") for name in imported_modules(tree))
    return {name[1] for name in names if name[0] == "hf_r2" and len(name) > 1}


def public_definitions(body, prefix=""):
    """Yield (qualified name, node) of every public class, function and method."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def calls(tree):
    """Yield (dotted name of what is called, keyword arguments)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_the_public_names_are_sorted_and_unique():
    assert list(hf_r2.__all__) == sorted(set(hf_r2.__all__))


@pytest.mark.parametrize("name", hf_r2.__all__)
def test_a_public_name_is_there_and_documented(name):
    value = getattr(hf_r2, name)
    assert inspect.getdoc(value)
    assert value.__doc__, "the docstring is inherited"


def test_everything_that_the_package_imports_from_its_parts_is_public():
    imported = {
        alias.asname or alias.name
        for node in ast.walk(TREES["__init__.py"])
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_r2")
        for alias in node.names
    }
    assert imported == set(hf_r2.__all__)


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@every_module
def test_a_module_imports_and_its_all_names_exist(module):
    dotted = ".".join(["hf_r2", *module.removesuffix(".py").split("/")]).removesuffix(".__init__")
    imported = importlib.import_module(dotted)
    assert imported.__doc__
    for name in getattr(imported, "__all__", []):
        assert hasattr(imported, name)


@every_module
def test_public_classes_and_functions_are_documented_and_annotated(module):
    for name, node in public_definitions(TREES[module].body):
        assert ast.get_docstring(node), f"{name} has no docstring"
    if module == "tiles/kernels.py":  # whose arguments Triton types when a kernel is launched
        return
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare = [a.arg for a in every if a and a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{function.name} does not annotate {bare}"
        assert function.returns is not None, f"{function.name} does not annotate what it returns"


@every_module
def test_a_module_is_of_readable_size(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 600


@modules_where(lambda module: module != "cli.py")
def test_the_library_does_not_print_or_assert(module):
    assert not [name for name, _ in calls(TREES[module]) if name == "print"]
    assert not [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Assert)]


@every_module
def test_nothing_is_pickled_and_no_remote_code_is_trusted(module):
    roots = {name.split(".")[0] for name in imported_modules(TREES[module])}
    assert not roots & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for name, keywords in calls(TREES[module]):
        if name in ("torch.load", "load_state_dict_from_url", "torch.hub.load_state_dict_from_url"):
            assert keywords.get("weights_only") == "True", f"{name} without weights_only=True"
        assert name != "torch.save", "torch.save writes a pickle"
        assert keywords.get("trust_remote_code", "False") == "False"


@every_part
def test_every_module_belongs_to_a_layer(module):
    assert part_of(module) in LEVEL, f"give {part_of(module)!r} a place in LAYERS"


@every_part
def test_imports_run_downwards(module):
    part, imported = part_of(module), imported_parts(TREES[module])
    if part in LAYERS[-1]:
        imported -= set(hf_r2.__all__)
    assert imported <= LEVEL.keys(), "import from the parts, not from the package"
    assert not {name for name in imported if LEVEL[name] > LEVEL[part]}
    if part in LEAVES:
        assert not imported


MATHS = {"codecs", "losses", "grain", "fusing", "tiles", "sharding", "cells", "largest", "moments"}
MATHS_MODULES = {"planning/allocation.py", "planning/sensitivity.py"}


@modules_where(
    lambda module: (part_of(module) in MATHS and module != "losses/range_loss.py") or module in MATHS_MODULES
)
def test_the_maths_imports_no_transformers(module):
    roots = {name.split(".")[0] for name in imported_modules(TREES[module])}
    assert not roots & {"transformers", "optimum", "datasets"}


def test_importing_the_package_leaves_trainer_and_data_sets_alone():
    code = "import sys, hf_r2; print([m for m in ('transformers.trainer', 'datasets', 'optimum') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(getattr(hf_r2, name) for name in hf_r2.__all__)
