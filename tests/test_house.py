"""The house itself: what knows of which base model, names that mean one thing, no circles."""

import ast
import re
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "imprompt"
MOST_PARAMETERS = 12

# Words that only a family of base models may say.
OF_A_FAMILY = (
    r"unet|attn2|cross_attention_kwargs|encoder_hidden_states|sample_size|\b77\b|vae factor 8"
)
EXCEPTIONS = {  # file -> lines that say one of them, and why they may
    "attention/kernels.py": ("77 text tokens", "a block's size is chosen for such a text"),
    "checkpoints/layouts.py": ("imprompt.families.unet_", "numbered layouts are a UNet's alone"),
    "checkpoints/adapters.py": ("imprompt.families.unet_", "as in layouts"),
    "generation/blocks.py": ("imprompt.families.unet_", "published presets are a UNet's"),
}
MANY_PARAMETERS = {  # functions that may have more, and why
    "forward_kernel": "Triton takes tensors and strides one by one",
    "query_kernel": "as forward_kernel",
    "image_kernel": "as forward_kernel",
    "add_query_gradient": "as forward_kernel",
    "from_pretrained": "the façade: what a user may say, by keyword",
}


@cache
def trees() -> dict[str, ast.Module]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def test_only_families_know_a_kind_of_base_model() -> None:
    told = []
    for path in ROOT.rglob("*.py"):
        name = str(path.relative_to(ROOT))
        allowed = EXCEPTIONS.get(name, ("\0", ""))[0]
        if not name.startswith("families/"):
            lines = path.read_text().splitlines()
            told += [
                f"{name}:{number}: {line.strip()}"
                for number, line in enumerate(lines, 1)
                if re.search(OF_A_FAMILY, line, re.IGNORECASE) and allowed not in line
            ]
    assert not told, "\n".join(told)


def test_exceptions_are_needed() -> None:
    for name, (allowed, _) in EXCEPTIONS.items():
        lines = (ROOT / name).read_text().splitlines()
        assert any(allowed in line and re.search(OF_A_FAMILY, line, re.I) for line in lines), name


def test_a_public_name_is_defined_once() -> None:
    homes = defaultdict(set)
    for module, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                homes[node.name].add(module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not twice
    spellings = defaultdict(set)
    for name in homes:
        spellings[name.lower()].add(name)
    assert not [names for names in spellings.values() if len(names) > 1]


def imports(tree: ast.Module, modules: set[str]) -> set[str]:
    """Return the modules of the package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= named & modules or {node.module}
    return found & modules


def test_no_import_runs_in_a_circle() -> None:
    """Late imports count too: what needs each other belongs together or apart."""
    modules = set(trees())
    graph = {name: imports(tree, modules) - {name} for name, tree in trees().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# What a room outside the package may not import: how the model is made knows nothing of how it is
# judged, and the package knows of neither.
OUTSIDE = {
    "src/imprompt": {"worlds", "studies", "benchmarks", "tests"},
    "worlds": {"studies", "benchmarks", "tests"},
    "studies": {"benchmarks", "tests"},
}


@pytest.mark.parametrize("folder", OUTSIDE)
def test_a_room_does_not_import_those_that_stand_on_it(folder: str) -> None:
    told = []
    for path in (ROOT.parents[1] / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            told += [
                f"{path}: {name}" for name in names if name.partition(".")[0] in OUTSIDE[folder]
            ]
    assert not told


def test_no_function_has_too_many_parameters() -> None:
    told = {}
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                one = node.args
                names = [given.arg for given in one.posonlyargs + one.args + one.kwonlyargs]
                if (count := len(names) - (names[:1] in (["self"], ["cls"]))) > MOST_PARAMETERS:
                    told[f"{module}.{node.name}"] = count
    assert {name.rpartition(".")[2] for name in told} <= MANY_PARAMETERS.keys(), told
