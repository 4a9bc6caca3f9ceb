"""The shape of the code itself: who imports whom, sizes, names, import without work."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PRODUCT = ("sparqle_stream", "kernels")
STAGES = ("audio", "vad", "features", "encoder", "ctc", "qformer", "llm", "captions")
STAGE_MAY_IMPORT = {"config", "decode", "errors", "pieces", "rows"}
# Names that say nothing: a helper lives where it is used, or gets a real name.
EMPTY_NAMES = {"utils", "util", "base", "common", "helpers", "misc"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 50
MAX_KERNEL_LINES = 120  # a kernel is one function by nature
# Loading any of these takes longer than `--help` may.
HEAVY = ("torch", "transformers", "onnxruntime", "av", "numpy", "starlette", "sounddevice")


def python_files(*folders: str) -> list[Path]:
    return sorted(
        path for name in folders for path in (REPO / name).rglob("*.py") if path.is_file()
    )


def label(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


PRODUCT_FILES = python_files(*PRODUCT)
ALL_FILES = python_files(*PRODUCT, "training", "bench", "tests")


def module_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_not_run_at_import(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports_of(path: Path, at_import: bool = False) -> set[str]:
    """Dotted names that a file imports; `at_import`: only those that importing it runs."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    return find_imports(path.read_text(), package, at_import)


def find_imports(source: str, package: str, at_import: bool) -> set[str]:
    """`from a import b` counts as `a` and as `a.b`."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*above, module]).strip(".")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif at_import and is_not_run_at_import(node):
            continue
        todo.extend(ast.iter_child_nodes(node))
    return found


def inner_modules(imports: set[str], package: str = "sparqle_stream") -> set[str]:
    """First name below the package: {'sparqle_stream.config.X'} -> {'config'}."""
    return {name.split(".")[1] for name in imports if name.startswith(f"{package}.")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage):
    """Only `pipeline` knows the order of the stages; each can be read and tested alone."""
    path = REPO / "sparqle_stream" / f"{stage}.py"
    assert inner_modules(imports_of(path)) <= STAGE_MAY_IMPORT


def test_the_bottom_imports_nothing_above_it():
    package = REPO / "sparqle_stream"
    assert inner_modules(imports_of(package / "errors.py")) == set()
    assert inner_modules(imports_of(package / "config.py")) <= {"errors"}
    assert inner_modules(imports_of(package / "messages.py")) <= {"config", "errors"}


@pytest.mark.parametrize("path", python_files("kernels"), ids=label)
def test_kernels_stand_alone(path):
    assert not {name for name in imports_of(path) if name.startswith("sparqle_stream")}


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=label)
def test_the_product_does_not_import_what_is_not_shipped(path):
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert not tops & {"training", "bench", "tests", "pytest", "hypothesis"}


def test_the_model_side_does_not_know_the_wire():
    """`server` and `cli` stand on the engine, never the other way round."""
    for name in (*STAGES, "pipeline", "engine", "models", "config", "errors"):
        inner = inner_modules(imports_of(REPO / "sparqle_stream" / f"{name}.py"))
        assert not inner & {"server", "client", "cli", "doctor"}, name


def test_modules_import_each_other_without_cycles():
    graph = {
        module_of(path): imports_of(path, at_import=True)
        for path in PRODUCT_FILES
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"cycle: {' -> '.join((*above, module))}"
        if module in done:
            return
        for other in sorted(graph[module] & graph.keys()):
            visit(other, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())
    assert done == set(graph)


@pytest.mark.parametrize("path", ALL_FILES, ids=label)
def test_a_file_can_be_read_in_one_sitting(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert path.stem not in EMPTY_NAMES
    if text.strip():
        assert ast.get_docstring(tree), "say what goes in and what comes out"
    if path.is_relative_to(REPO / "tests"):
        return
    longest = MAX_KERNEL_LINES if path.stem.startswith("triton") else MAX_FUNCTION_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= longest, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=label)
def test_no_path_of_one_machine(path):
    """The wheel must not know where it was developed."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    places = re.compile(r"(?:^|[\s'\"=])(?:/(?:home|root|work|opt|mnt|Users)/|\.\./shared)")
    assert not [text for text in strings if places.search(text)]


@pytest.mark.parametrize("path", ALL_FILES, ids=label)
def test_an_open_end_names_its_issue(path):
    open_ends = re.findall(r"#\s*(?:TODO|FIXME|XXX)\b(?!.*#\d).*", path.read_text())
    assert not open_ends


def test_importing_the_command_line_loads_nothing_heavy():
    """`--help` answers at once only while every heavy import waits inside its command."""
    code = f"""
import sys
import sparqle_stream.cli
print(*sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


def test_importing_every_module_does_nothing():
    """No thread, no process, no handler, no word on the terminal: work begins in functions."""
    modules = [module_of(path) for path in PRODUCT_FILES if not path.stem.startswith("triton")]
    code = f"""
import importlib, logging, sys, threading
import numpy, torch  # their own start-up is not ours
threads = threading.active_count()
for name in {modules!r}:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert threading.active_count() == threads, threading.enumerate()
assert not logging.getLogger().handlers
"""
    paths = f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'kernels')!r}]\n"
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", paths + code],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_every_stage_is_there():
    """The tests above look files up by name: a renamed stage must not slip out of them."""
    present = {path.stem for path in (REPO / "sparqle_stream").glob("*.py")}
    assert set(STAGES) <= present


def test_the_finder_of_imports_finds_them():
    """What the tests above rely on: lazy, relative and typing-only imports are told apart."""
    source = (
        "from typing import TYPE_CHECKING\n"
        "from sparqle_stream import llm\n"
        "from . import vad\n"
        "if TYPE_CHECKING:\n    from sparqle_stream.engine import Engine\n"
        "def f():\n    from .encoder import step\n"
    )
    everything = find_imports(source, "sparqle_stream", at_import=False)
    assert inner_modules(everything) == {"llm", "vad", "engine", "encoder"}
    assert inner_modules(find_imports(source, "sparqle_stream", True)) == {"llm", "vad"}
