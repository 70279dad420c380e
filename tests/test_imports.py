"""The import direction of docs/DESIGN: kernels ← recsys_moe ← pipelines, serving; only the command line opens every room."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "recsys_moe", "pipelines", "serving")
FRAMEWORKS = {"ray", "mlflow", "fastapi", "typer", "starlette", "uvicorn"}
# The door, and the module that is run as a door.
DOORS = {*(str(path.relative_to(ROOT)) for path in (ROOT / "recsys_moe/cli").glob("*.py")), "recsys_moe/__main__.py"}
ROOMS = {"recsys_moe.kernels": "kernels", "recsys_moe.pipelines": "pipelines", "recsys_moe.serving": "serving"}
ALLOWED = {
    "kernels": {"kernels"},
    "recsys_moe": {"recsys_moe", "kernels"},
    "pipelines": {"pipelines", "recsys_moe", "kernels"},
    "serving": {"serving", "recsys_moe", "kernels"},
}


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str | None:
    """Which folder an imported module lives in; None for other people's."""
    for prefix, folder in ROOMS.items():
        if module == prefix or module.startswith(prefix + "."):
            return folder
    return "recsys_moe" if module.split(".")[0] == "recsys_moe" else None


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    if relative in DOORS:
        return
    folder = path.relative_to(ROOT).parts[0]
    for module in imported(path):
        assert room(module) in {None, *ALLOWED[folder]}, f"{relative} imports {module}"
        if folder in ("kernels", "recsys_moe"):
            assert module.split(".")[0] not in FRAMEWORKS, f"{relative} imports {module}: the library is free of frameworks"
        assert module.split(".")[0] not in {"kernels", "pipelines", "serving", "conf"}, f"{relative}: bare name {module}"


def test_kernels_import_nothing_but_torch_and_triton() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {module.split(".")[0] for module in imported(path)} - sys.stdlib_module_names
        assert roots <= {"torch", "triton", "recsys_moe"}, path
