"""The house rules: who may import whom, where torch.distributed and native code live, how long files may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for folder in ("shardopt", "tests", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
PACKAGE = [path for path in FILES if "shardopt" in path.relative_to(ROOT).parts[0]]

# design.md section 3: a module imports only from strictly lower levels. Modules of a package are one unit.
LEVELS = [
    {"asks", "ieee", "piped", "spelling", "telling"},
    {"polar"},
    {"rules", "codecs"},
    {"addons"},  # reads rules' Hyper and checks: above them
    {"write"},
    {"recipe", "state"},
    {"dtensor", "kernels"},
    {"given"},
    {"item", "report", "groups", "capture"},
    {"prelude"},
    {"engine"},
    {"optimizer", "release", "checkpoint_info"},
    {"presets", "integrations", "plan"},
    {"routing"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def unit(path):
    """The top-level module or package of shardopt that this file belongs to."""
    return path.relative_to(ROOT / "shardopt").parts[0].removesuffix(".py")


def imports(path):
    """Absolute names of everything that the file imports, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_ladder(path):
    here = unit(path)
    assert here in LEVEL, f"{here} has no level: add it to the ladder"
    for name in imports(path):
        if name.split(".")[0] != "shardopt":
            continue
        there = name.split(".")[1]
        there = there if there in LEVEL else "__init__"
        assert there == here or LEVEL[there] < LEVEL[here], f"{here} imports {name}, which is not below it"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_distributed_and_native_code_have_one_place(path):
    for name in imports(path):
        if unit(path) not in ("dtensor", "integrations"):
            assert not name.startswith("torch.distributed"), f"{path}: {name}"
        if unit(path) != "kernels":
            assert name.split(".")[0] not in ("ctypes", "cuda", "triton") and "cpp_extension" not in name, (
                f"{path}: {name}"
            )


def test_every_test_is_collected():
    """Two test files of one name would hide each other."""
    names = [path.name for path in FILES if path.name.startswith("test_")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_say_what_they_are(path):
    text = path.read_text()
    assert text.count("\n") <= 300, "one idea a file: split it"
    assert path.stem not in ("utils", "helpers", "common", "misc")
    if text.strip():
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        assert first, "the first sentence says what the file is"
