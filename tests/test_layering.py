"""Which room may import which: only what stands below it, and no two each other (DESIGN, the parts of the house)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_vlkv

ROOT = Path(sglang_vlkv.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# The lowest first. A room is a folder, or a module beside the folders.
ROOMS = {
    "printable": set(),
    "commands": {"PIL", "requests", "torch", "numpy", "torchcodec"},
    "compatibility": {"sglang"},
    "kernels": {"torch", "triton"},
    "stages": {"torch"},
    "policies": {"torch"},
    "base": set(),
    "observe": {"sglang", "zmq", "orjson", "prometheus_client"},
    "options": {"torch", "sglang"},
    "cache": {"torch", "sglang"},
    "attention": {"torch", "sglang", "flashinfer_ext"},
    "scheduler": {"torch", "sglang"},
    "frontend": {"sglang", "fastapi", "starlette"},
    "plugin": {"sglang"},
    "cpu": {"torch", "sglang"},
    "language": {"sglang"},
    "monitor": {"zmq", "orjson", "rich"},
    "inspect": {"torch", "torchcodec", "PIL", "requests", "numpy"},
    "tinyvlm": {"torch", "PIL", "requests", "numpy", "transformers", "tokenizers", "safetensors"},
}
# What keeps out of SGLang in rooms that do not.
WITHOUT_SGLANG = (
    "observe/events.py", "observe/publisher.py", "options/config.py", "options/backends.py",
    "cache/requests.py", "cache/twins.py", "cache/device_rows.py", "cache/ranks.py",
)  # fmt: skip


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Names of what ``file`` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(file: Path) -> set[str]:
    """Other rooms that ``file`` imports from."""
    parts = (name.split(".") for name in imported(file))
    found = {part[1] for part in parts if part[0] == "sglang_vlkv" and len(part) > 1}
    return found - {room_of(file), "__version__", "TESTED_SGLANG"}


def test_every_module_is_in_a_room():
    assert {room_of(file) for file in MODULES} == {"__init__", *ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_rooms_below_it_and_its_libraries(room):
    below = list(ROOMS)[: list(ROOMS).index(room)]
    files = [file for file in MODULES if room_of(file) == room]
    assert files
    for file in files:
        assert rooms_of(file) <= set(below), file
        libraries = {name.split(".")[0] for name in imported(file)} - {"sglang_vlkv"} - sys.stdlib_module_names
        assert libraries <= ROOMS[room], file


@pytest.mark.parametrize("module", WITHOUT_SGLANG)
def test_what_needs_no_engine_imports_none(module):
    assert not any(name.split(".")[0] == "sglang" for name in imported(ROOT / module))


def test_files_and_functions_are_short():
    """Kernels excepted, whose length is their arguments'."""
    long = []
    for file in MODULES:
        lines = file.read_text().splitlines()
        if len(lines) > 400:
            long.append((file.name, len(lines)))
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = node.end_lineno - node.lineno + 1
                if size > 60 and room_of(file) != "kernels":
                    long.append((f"{file.name}:{node.name}", size))
    assert not long


@pytest.mark.parametrize(
    "module",
    ["", ".base", ".policies", ".cache.requests", ".observe.events", ".inspect.__main__", ".monitor.__main__",
     ".compatibility.__main__"],
)
def test_importing_changes_nothing_and_leaves_sglang_out(module):
    code = f"import sys, sglang_vlkv{module}; print(*sorted(m for m in sys.modules if m.split('.')[0] == 'sglang'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
