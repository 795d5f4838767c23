"""Imports run down only, `import minim3` is cheap, and the scheduler knows no tensors: checked on the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import minim3

ROOT = Path(minim3.__file__).parent

# The lowest first. A part may import from parts in the rows above its own, and from itself.
ROWS = (
    ("config", "kernels"),
    ("checkpoint", "processing"),
    ("model",),
    ("loading",),
    ("inference", "parallel"),
    ("inspection",),
    ("server", "training", "evaluation"),
    ("integrations", "pocket"),
    ("cli",),
    ("__main__",),
)
# (module, part that it imports from): imports against the order, each inside a function, with the reason.
UPWARD = {
    ("minim3.model.causal_lm", "inference"),  # model.generate is a thin method over the engine
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def part_of(module: str) -> str:
    return module.split(".")[1]


def row_of(part: str) -> int:
    return next(row for row, parts in enumerate(ROWS) if part in parts)


def imported(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Every absolute module name that the file imports, at the top or inside functions, and the statement."""
    known = {name for name, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide which way they go"
            assert node.module is not None
            # `from minim3 import kernels` imports the module kernels, `from minim3.kernels import resolve` a name.
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name if name in known else node.module, node) for name in submodules)


def test_every_part_has_a_row() -> None:
    """A new package without a place in the order would be checked by nobody."""
    parts = {part_of(name) for name, _ in modules() if name != "minim3"}
    assert parts <= {part for row in ROWS for part in row}


def test_imports_run_down_only() -> None:
    against, used = [], set()
    for module, path in modules():
        if module == "minim3":
            continue  # the public names, imported lazily: see test_the_package_itself_imports_nothing
        part = part_of(module)
        for name, node in imported(path):
            if not name.startswith("minim3.") or part_of(name) == part:
                continue
            if row_of(part_of(name)) < row_of(part):
                continue
            if (module, part_of(name)) in UPWARD:
                used.add((module, part_of(name)))
                assert node.col_offset > 0, f"{path}:{node.lineno}: an upward import must be lazy"
            else:
                against.append(f"{path.relative_to(ROOT.parent)}:{node.lineno} imports {name}")
    assert not against, "\n".join(against)
    assert used == UPWARD, "a listed exception is gone: take it off the list"


def test_the_model_package_knows_no_cache_engine_training_or_parallel_code() -> None:
    """Said of `model/` in particular, since everything else stands on it: one lazy import, of `generate`, is all."""
    upward = [
        (module, name)
        for module, path in modules()
        if module.startswith("minim3.model")
        for name, _ in imported(path)
        if name.startswith("minim3.") and row_of(part_of(name)) > row_of("model")
    ]
    assert upward == [("minim3.model.causal_lm", "minim3.inference.generate")]


def test_the_package_itself_imports_nothing() -> None:
    """At the top of minim3/__init__.py only the standard library; the rest is lazy or for type checkers."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    names = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert set(names) <= {"importlib", "typing"}


def test_the_lazy_names_and_those_for_type_checkers_agree() -> None:
    """A name that type checkers see and `import` does not give, or the reverse."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == minim3._PUBLIC


TENSORLESS = ("request", "prefix", "pages", "scheduler")


def test_the_scheduler_imports_no_torch() -> None:
    """Policy that can touch tensors soon waits for a device; numpy would be the same door. So would a neighbour."""
    allowed = {f"minim3.inference.{name}" for name in TENSORLESS}
    for file in TENSORLESS:
        path = ROOT / "inference" / f"{file}.py"
        for_types = lines_for_types(path)
        for name, node in imported(path):
            if node.lineno not in for_types:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or name in allowed, f"{file}.py, line {node.lineno}: {name}"


def lines_for_types(path: Path) -> set[int]:
    """Lines under `if TYPE_CHECKING:`, which never run."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found |= {inner.lineno for inner in node.body}
    return found


def test_import_minim3_is_cheap() -> None:
    """`minim3 --version` and every process that only wants a config must not wait for torch."""
    check = (
        "import sys, minim3; minim3.__version__; dir(minim3); "
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'PIL', 'safetensors', 'jinja2', 'rich', 'typer'}; "
        "loaded = sorted(heavy & set(sys.modules)); assert not loaded, loaded; "
        "minim3.MiniMaxM3VLConfig; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT.parent)


def test_transformers_is_no_dependency() -> None:
    """An oracle of the tests: the package may import it in `integrations` alone."""
    users = [
        module
        for module, path in modules()
        for name, _ in imported(path)
        if name.split(".")[0] in ("transformers", "torchvision", "nemo_automodel") and part_of(module) != "integrations"
    ]
    assert not users
