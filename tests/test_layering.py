"""What a layer imports: torch, and nothing above itself (DESIGN, the parts of the house)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_vlkv

ROOT = Path(sglang_vlkv.__file__).parent
BELOW = {
    "budgets": set(),
    "rope": set(),
    "base": {"budgets", "rope"},
    "kernels": {"base", "kernels"},
    "select": {"base", "kernels"},
    "merging": {"base", "kernels"},
    "policies": {"base", "budgets", "kernels", "policies"},
    "ranks": set(),
    "twins": set(),
    "device_rows": {"kernels"},
    "events": set(),
    "publisher": {"events"},
    "monitor": {"events", "monitor", "publisher"},
    "requests": {"base", "twins", "device_rows"},
    "config": {"base", "policies"},
}
LIBRARIES = {"publisher": {"zmq", "orjson"}, "monitor": {"zmq", "orjson", "rich"}}


def imported(file: Path) -> set[str]:
    """Names of what ``file`` imports, anywhere in it: ``sglang_vlkv.<part>`` or a package."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {".".join(p[:2]) if p[0] == "sglang_vlkv" else p[0] for p in parts}


@pytest.mark.parametrize("part", BELOW)
def test_a_part_imports_torch_and_the_parts_below_it(part):
    files = [*ROOT.glob(f"{part}.py"), *ROOT.glob(f"{part}/**/*.py")]
    assert files
    ours = {f"sglang_vlkv.{below}" for below in BELOW[part]}
    libraries = LIBRARIES.get(part, {"torch", "triton"})
    for file in files:
        assert imported(file) <= libraries | sys.stdlib_module_names | ours, file


@pytest.mark.parametrize(
    "module",
    ["", ".policies", ".requests", ".events", ".inspect.__main__", ".monitor.__main__", ".compatibility.__main__"],
)
def test_importing_changes_nothing_and_leaves_sglang_out(module):
    code = f"import sys, sglang_vlkv{module}; print(*sorted(m for m in sys.modules if m.split('.')[0] == 'sglang'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
