"""Beside another SGLang: what fits is found without importing it, and what does not is left as it was."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import sglang_vlkv
from sglang_vlkv import TESTED_SGLANG, compatibility
from sglang_vlkv.compatibility import COMMAND, CPU, PLUGIN, UNFIT, UNTESTED, installed, mismatches, warning
from sglang_vlkv.compatibility.sources import Sources
from sglang_vlkv.cpu import activate
from tests.serving import CHECKPOINT, ROOT, Server

DOCUMENT = (ROOT / "docs" / "compatibility.md").read_text()
OLDER = "0.5.22"  # fits the CPU platform and not the plugin
KV_POLICY = ["--model-path", str(CHECKPOINT), "--kv-policy", "vlcache"]
ABSENT = "sglang.srt.constants.NOT_THERE"

# What is registered of us, by place, after SGLang has loaded its plugins.
REGISTERED = """
import json, sys
from sglang_vlkv import compatibility
for name in sys.argv[2:]:
    compatibility.PLUGIN.expected[name] = ""
before = compatibility.hooks_missing()
from sglang.srt.plugins import load_plugins
load_plugins()
ours = sorted(name for name in sys.modules if name.startswith("sglang_vlkv"))
from sglang.srt.arg_groups.resolution_hooks import _HOOKS
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache import registry
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs, prepare_server_args
print("RESULT", json.dumps({
    "modules": ours,
    "hooks": sorted(of for of, (*_, hook) in HookRegistry._hooks.items() if hook[2].plugin_name == "vlkv"),
    "unpatched": [before, compatibility.hooks_missing()],
    "resolution": sorted(_HOOKS),
    "attention": sorted(name for name, made in ATTENTION_BACKENDS.items() if "vlkv" in made.__module__),
    "radix": "vlkv" in registry._RADIX_CACHE_REGISTRY,
    "engine": Engine.server_args_class is not ServerArgs,
}))
sys.stdout.flush()
prepare_server_args(json.loads(sys.argv[1]))
print("ACCEPTED")
"""

# What Python itself finds of all that is expected: parameters and whether they are needed, by name.
RUNTIME = """
import inspect, json, pkgutil
from sglang_vlkv.compatibility import CPU, PLUGIN
def found(target, takes):
    try:
        symbol = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        return str(error)
    if not takes:
        return True
    symbol = inspect.unwrap(symbol)
    given = inspect.signature(getattr(symbol, "__func__", symbol)).parameters.values()
    return [[p.name, p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)] for p in given]
expected = PLUGIN.expected | CPU.expected
print("RESULT", json.dumps({name: found(name, takes) for name, takes in expected.items()}))
"""


def clean() -> dict[str, str]:
    """The environment of a process whose parents have not looked yet."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_VLKV_")}


def result(run: subprocess.CompletedProcess) -> dict:
    lines = [line[7:] for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(lines[0])


def said(log: str) -> list[str]:
    """Our warnings in a log, without the time that SGLang puts before them."""
    found = re.findall(r"(?m)^(?:\[[^]]*\] )?(sglang_vlkv .*(?:\n  .*)*(?:\nInstall .*)?)", log)
    return [one for one in found if "stands aside" in one or "was tested" in one]


def shown(text: str) -> list[str]:
    """The messages in the document."""
    blocks = re.findall(r"(?m)(?:^ {6}.+\n)+", text)
    return [re.sub(r"(?m)^ {6}", "", block).rstrip() for block in blocks]


@pytest.fixture(scope="module")
def older() -> Path:
    """SGLang 0.5.22, unpacked; kept between runs."""
    folder = ROOT / ".cache" / f"sglang-{OLDER}"
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
        command = [*pip, "--dest", str(unfinished), f"sglang=={OLDER}"]
        got = subprocess.run(command, capture_output=True, text=True)
        if got.returncode:
            pytest.skip(f"pip cannot download the wheel of SGLang {OLDER} now: {got.stderr.strip()[-200:]}")
        [wheel] = unfinished.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(unfinished)
        wheel.unlink()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict[str, Future]:
    """Processes that mostly import, by name; two at a time."""
    newer, empty = tmp_path_factory.mktemp("newer"), tmp_path_factory.mktemp("empty")
    info = newer / "sglang-0.5.24.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.24\n")
    policy = json.dumps(KV_POLICY)

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            capture_output=True, text=True, timeout=300, cwd=empty, env=clean() | env,
        )  # fmt: skip

    path = os.pathsep.join(filter(None, [str(newer), os.environ.get("PYTHONPATH")]))
    with ThreadPoolExecutor(2) as pool:
        yield {
            "fits": pool.submit(run, "-c", REGISTERED, policy),
            "misses": pool.submit(run, "-c", REGISTERED, policy, ABSENT),
            "untested": pool.submit(run, "-m", "sglang.launch_server", "--help", PYTHONPATH=path),
            "runtime": pool.submit(run, "-c", RUNTIME),
        }
        pool.shutdown(cancel_futures=True)


# ---- Another SGLang ----


def test_all_is_registered_where_all_fits(done):
    run = done["fits"].result()
    found = result(run)
    assert not said(run.stderr) and run.stdout.endswith("ACCEPTED\n")
    targets = [hook.target for hook in compatibility.HOOKS]
    assert found["hooks"] == sorted(targets)
    assert found["unpatched"] == [targets, []]  # which a scheduler asks before its first request
    assert found["attention"] == ["fa3", "flashinfer", "torch_native", "triton"]
    resolved = "handle_attention_backend_compatibility", "handle_gpu_memory_settings", "handle_other_validations"
    assert found["resolution"] == sorted(resolved)
    assert found["radix"] and found["engine"]


def test_nothing_is_registered_where_one_symbol_is_missing(done):
    run = done["misses"].result()
    found = result(run)
    loaded = re.compile(r"sglang_vlkv($|\.(plugin|compatibility|cpu)\b)")
    assert not [name for name in found["modules"] if not loaded.match(name)]
    assert found["hooks"] == found["attention"] == found["resolution"] == []
    assert not found["radix"] and not found["engine"]


def test_one_warning_says_what_is_missing_and_sglang_refuses_the_flag(done):
    run = done["misses"].result()
    problems = f"  expected {ABSENT}, found none"
    [words] = said(run.stderr)
    assert words == warning(UNFIT, installed().version, absent=PLUGIN.absent, problems=problems)
    assert run.returncode == 2
    assert run.stderr.endswith("error: unrecognized arguments: --kv-policy vlcache\n")


def test_a_release_that_nobody_has_tested_is_served_and_named(done):
    run = done["untested"].result()
    assert "--kv-policy {none,vlcache,vlkv," in run.stdout
    assert said(run.stderr) == [warning(UNTESTED, "0.5.24")]


def test_the_messages_of_the_document_are_those_of_the_operator():
    untested, unfit = (block for block in shown(DOCUMENT) if block.startswith("sglang_vlkv"))
    assert untested == warning(UNTESTED, "0.5.24")
    problems = "\n".join(unfit.splitlines()[1:-1])
    assert unfit == warning(UNFIT, OLDER, absent=PLUGIN.absent, problems=problems)
    assert f"which {COMMAND} lists" in problems and CPU.absent in DOCUMENT


def test_an_older_release_serves_as_without_us(older):
    """Its own process tree warns once, and nothing of ours but the CPU platform is in it."""
    with Server("--max-total-tokens", "4000", env={"PYTHONPATH": path_to(older)}, cwd=older) as server:
        answer = server.generate("What is a cat?", max_new_tokens=8)
        info = server.info()
        assert server.post("/generate", server.body("Hi", custom={"kv_policy": "h2o"})).status_code == 200
        log = server.log()
    assert len(answer["output_ids"]) == 8
    assert (info["version"], info["attention_backend"]) == (OLDER, "torch_native")
    assert "kv_policy" not in info and "kv_policy" not in answer["meta_info"]
    assert said(log) == [shown(DOCUMENT)[1]]


def test_an_older_release_refuses_our_flag_itself(older):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sglang.launch_server", *KV_POLICY],
        capture_output=True, text=True, timeout=300, cwd=older, env=clean() | {"PYTHONPATH": path_to(older)},
    )  # fmt: skip
    assert run.returncode == 2 and len(said(run.stderr)) == 1
    assert run.stderr.endswith("error: unrecognized arguments: --kv-policy vlcache\n")


def path_to(older: Path) -> str:
    return os.pathsep.join([str(older), str(ROOT)])


def test_the_cpu_platform_stands_aside_by_itself(monkeypatch, caplog):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setenv(CPU.variable, "")
    monkeypatch.setitem(CPU.expected, ABSENT, "")
    problems = f"  expected {ABSENT}, found none"
    assert activate() is None and activate() is None
    [record] = caplog.records
    assert record.getMessage() == warning(UNFIT, installed().version, absent=CPU.absent, problems=problems)


def test_what_was_found_for_another_sglang_counts_for_none(monkeypatch):
    monkeypatch.setenv(CPU.variable, f"{sglang_vlkv.__version__} 0.5.22 /elsewhere: stands aside")
    assert compatibility.fits(CPU)
    assert os.environ[CPU.variable].endswith(f"{installed().folder}: fits")


# ---- The list ----


def test_the_sources_say_what_python_finds(done):
    """But what a class has only once it is made, and modules that cannot be imported without a GPU."""
    sources, compared = Sources(installed().folder), 0
    for target, found in result(done["runtime"].result()).items():
        symbol = sources.find(target)
        assert symbol is not None, target
        if isinstance(found, list):
            read = [list(parameter) for parameter in sources.parameters(symbol)]
            if isinstance(symbol.node, ast.ClassDef):  # a dataclass puts keyword-only fields last
                read, found = sorted(read), sorted(found)
            assert read == found, target
        elif found is not True:
            owner, _, name = target.rpartition(".")
            assert f"has no attribute '{name}'" in found or "flashattention" in found, found
            assert isinstance(sources.find(owner).node, ast.ClassDef)
            continue
        compared += 1
    assert compared > 170


def test_all_that_is_imported_of_sglang_is_expected():
    expected = PLUGIN.expected | CPU.expected
    imports = {}
    for file in Path(sglang_vlkv.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "sglang":
                imports |= {f"{node.module}.{one.name}": file for one in node.names}
            elif isinstance(node, ast.Import):
                imports |= {one.name: file for one in node.names if one.name.split(".")[0] == "sglang"}
    assert len(imports) > 50
    for name, file in imports.items():
        assert any(f"{target}.".startswith(f"{name}.") for target in expected), (name, file)


def test_make_sets_up_the_release_that_is_tested():
    assert f'"sglang=={TESTED_SGLANG[-1]}"' in (ROOT / "pyproject.toml").read_text()


MODULES = {
    "pack/__init__.py": "from .one import Base\nfrom pack.stars import *\n",
    "pack/stars.py": "def shine(a): ...\nfrom pack.gone import *\nfrom pack import *\n",
    "pack/one.py": """
        import functools
        from typing import TYPE_CHECKING
        from elsewhere import thing
        if TYPE_CHECKING:
            from pack.two import Point
        def keeps(function):
            @functools.wraps(function)
            def inner(*args): return function(*args)
            return inner
        def registers(name):
            def decorator(function): return function
            return decorator
        def changes(function):
            def inner(*args): return function(*args)
            return inner
        class Base:
            def __init__(self, a, b=1, *args, c, d=2, **others):
                self.made, count = a, b
            def method(self, x): ...
            @classmethod
            @keeps
            def kept(cls, y): ...
            @registers("it")
            def registered(self, z): ...
            @changes
            def changed(self, y): ...
        Base = thing(Base)
        class Alone:
            pass
        """,
    "pack/two.py": """
        from dataclasses import dataclass
        from typing import ClassVar
        from pack import Base as Renamed
        from . import one
        try:
            from missing import either
        except ImportError:
            either = None
        if one:
            def either(first): ...
        else:
            def either(second): ...
            def otherwise(third): ...
        class Child(Renamed, one.Alone):
            own = 1
        @dataclass(frozen=True)
        class Point:
            x: int
            kind: ClassVar[str] = "p"
            y: int = 0
        @dataclass
        class Point3(Point):
            z: int = 0
        """,
}
FOUND = {  # by name: parameters, with "=" where they need not be given; None where it takes none
    "pack.Base.method": "self x",
    "pack.shine": "a",
    "pack.one.Base.__init__": "self a b= args= c d= others=",
    "pack.one.Base.made": None,
    "pack.one.Base.kept": "cls y",
    "pack.one.Base.registered": "self z",
    "pack.one.Base.changed": None,
    "pack.one.thing": None,
    "pack.two.Child.method": "self x",
    "pack.two.Child.made": None,
    "pack.two.Child.own": None,
    "pack.two.either": "first",
    "pack.two.otherwise": "third",
    "pack.two.Point3.__init__": "self x y= z=",
    "pack.two.Point3.x": None,
}
NOT_FOUND = (
    "pack.one.Base.other", "pack.one.Base.count", "pack.one.Point", "pack.three", "pack.gone",
    "pack.stars.three", "other.thing", "pack.one.Alone.made", "pack.one.Alone.__init__",
    "pack.one.thing.inside",
)  # fmt: skip


@pytest.fixture(params=["folder", "wheel"])
def package(request, tmp_path):
    for file, source in MODULES.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(re.sub(r"(?m)^ {8}", "", source))
    if request.param == "folder":
        return Sources(tmp_path)
    with zipfile.ZipFile(tmp_path / "pack.whl", "w") as wheel:
        for file in MODULES:
            wheel.write(tmp_path / file, file)
    return Sources(zipfile.Path(tmp_path / "pack.whl"))


def test_sources_are_read(package):
    for target, expected in FOUND.items():
        symbol = package.find(target)
        assert symbol is not None, target
        taken = package.parameters(symbol)
        words = None if taken is None else " ".join(p.name + "=" * (not p.needed) for p in taken)
        assert words == expected, target
    assert not [target for target in NOT_FOUND if package.find(target) is not None]


@pytest.mark.parametrize("takes, fits", [
    ("", True),
    ("self a b args c d others", True),
    ("self b a args c d others", False),
    ("self a b args c others", False),
    ("self a c ...", True),
    ("self a ...", False),  # c must be given
    ("self a *", True),
    ("self a e *", False),
    ("self a c e ...", False),
])  # fmt: skip
def test_parameters_are_compared(package, takes, fits):
    problems = mismatches(package, {"pack.one.Base.__init__": takes})
    found = "found (self, a, b, args, c, d, others)"
    wanted = f"expected pack.one.Base.__init__ to take ({', '.join(takes.split())})"
    assert problems == ([] if fits else [f"{wanted}, {found}"])


def test_what_is_no_function_takes_nothing(package):
    [problem] = mismatches(package, {"pack.one.Base.changed": "self y"})
    assert problem.endswith("changed to take (self, y), found no function that says what it takes")


# ---- The command ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The installed SGLang's sources as release 0.5.99, which has lost a method and renamed a parameter."""
    path = tmp_path_factory.mktemp("wheel") / "sglang-0.5.99-py3-none-any.whl"
    root = installed().folder
    with zipfile.ZipFile(path, "w") as made:
        places = ("sglang/*.py", "sglang/srt/**/*.py", "sglang/lang/**/*.py")
        for file in [file for place in places for file in root.glob(place)]:
            source = file.read_text()
            if file.name == "scheduler.py" and file.parent.name == "managers":
                source = source.replace("def _should_defer_prefill(", "def _defers_prefill(")
            if file.name == "interface.py" and file.parent.name == "platforms":
                source = re.sub(r"(server_args_defaults\(self), server_args", r"\1, arguments", source)
            made.writestr(str(file.relative_to(root)), source)
        info = "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.99\n"
        made.writestr("sglang-0.5.99.dist-info/METADATA", info)
        made.writestr("sglang-0.5.99.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        made.writestr("sglang-0.5.99.dist-info/RECORD", "")
    return path


def ask(*arguments: str | Path, wheels: Path) -> subprocess.CompletedProcess:
    """Runs the command where pip knows the wheels of a folder and no index."""
    env = clean() | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    command = [sys.executable, *COMMAND.split()[1:], *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def test_the_command_says_that_the_installed_one_fits(tmp_path):
    run = ask(wheels=tmp_path)
    name = f"SGLang {installed().version}"
    us = f"sglang_vlkv {sglang_vlkv.__version__} fits, all of"
    assert run.stdout.splitlines() == [
        f"{name}: the plugin of {us} {len(PLUGIN.expected)} symbols",
        f"{name}: the CPU platform of {us} {len(CPU.expected)} symbols",
    ]
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("by_version", [False, True], ids=["wheel", "version"])
def test_the_command_lists_what_a_release_has_lost(wheel, by_version):
    run = ask("0.5.99" if by_version else wheel, wheels=wheel.parent)
    name, us = "SGLang 0.5.99", f"sglang_vlkv {sglang_vlkv.__version__} does not fit, 1 of"
    defaults = "expected sglang.srt.platforms.interface.SRTPlatform.apply_server_args_defaults"
    assert run.stdout.splitlines() == [
        "expected sglang.srt.managers.scheduler.Scheduler._should_defer_prefill, found none",
        f"{name}: the plugin of {us} {len(PLUGIN.expected)} symbols",
        f"{defaults} to take (self, server_args), found (self, arguments)",
        f"{name}: the CPU platform of {us} {len(CPU.expected)} symbols",
    ]
    assert run.returncode == 1


def test_the_command_says_in_a_sentence_what_cannot_be_had(wheel, tmp_path):
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as made:
        made.writestr("other-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    newer = tmp_path / "newer.whl"
    with zipfile.ZipFile(newer, "w") as made:
        made.writestr("sglang-9.dist-info/METADATA", "Metadata-Version: 2.1\nName: sglang\nVersion: 9\n")
        made.writestr("sglang/srt/server_args.py", "no python of today")
    python = f"Python {sys.version.split()[0]}: invalid syntax (<unknown>, line 1)"
    pip = "pip download says ERROR: No matching distribution found for sglang==0.5.98"
    for asked, words in {
        "0.5.98": f"SGLang 0.5.98 cannot be had: {pip}",
        "nowhere.whl": "nowhere.whl is neither a version nor a wheel that can be read",
        __file__: f"{__file__} is neither a version nor a wheel that can be read",
        str(other): f"{other} is not a wheel of SGLang",
        str(newer): f"SGLang 9 cannot be read by {python}",
    }.items():
        run = ask(asked, wheels=wheel.parent)
        assert (run.returncode, run.stdout, run.stderr) == (2, "", words + "\n")
