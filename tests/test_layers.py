"""The direction of imports, and what `import dynmerge` may bring along."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each layer may import itself and those to its right; what stands alone here stands below all.
LAYERS = [
    "cli",
    "server",
    "runtime",
    "offer",
    "engines",
    "evaluation",
    "diagnostics",
    "calibration",
    "texts",
    "student",
    "merging",
    "bank",
    "adapters",
]
FLOOR = ["recipe", "preference", "errors"]
# What runs offline is nothing to the path of a request.
OFFLINE = ("evaluation", "diagnostics", "calibration", "texts", "student")
FORBIDDEN = {
    (here, there) for here in ("server", "runtime", "offer", "engines") for there in OFFLINE
}


def layer(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "dynmerge_server":
        return "server"
    if parts[0] != "dynmerge" or len(parts) == 1 or parts[1].startswith("__"):
        return None
    return parts[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from dynmerge import runtime` imports dynmerge.runtime.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_one_way() -> None:
    order = LAYERS + FLOOR
    files = [*(ROOT / "dynmerge").rglob("*.py"), *(ROOT / "server").rglob("*.py")]
    assert len(files) > 20
    for path in files:
        relative = path.relative_to(ROOT / "server" if "server" in path.parts else ROOT)
        here = layer(".".join(relative.with_suffix("").parts))
        for imported in imports(path):
            there = layer(imported)
            if here is None or there is None:
                continue
            assert order.index(here) <= order.index(there), f"{relative} imports {imported}"
            assert (here, there) not in FORBIDDEN, f"{relative} imports {imported}"


def test_importing_dynmerge_brings_in_no_engine_and_no_web_framework() -> None:
    script = "import sys, dynmerge; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    for heavy in ("vllm", "fastapi", "starlette", "uvicorn", "transformers"):
        assert heavy not in loaded
