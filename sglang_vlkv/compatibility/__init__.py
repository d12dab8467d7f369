"""Whether an SGLang has what this package relies on; only where it has all of it, anything is registered.

The sources decide, not the version, and nothing is imported to ask them: an SGLang that does not fit stays
as it was, modules that only a GPU can import are looked at too, and a wheel is asked like the installed one.
``hooks`` and ``uses`` list what is relied on; ``python -m sglang_vlkv.compatibility`` prints what is missing.
"""

from __future__ import annotations

import gc
import logging
import os
import pkgutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sglang_vlkv import TESTED_SGLANG, __version__
from sglang_vlkv.compatibility.hooks import HOOKS
from sglang_vlkv.compatibility.sources import Sources
from sglang_vlkv.compatibility.uses import CPU_PLATFORM, READS, USES

logger = logging.getLogger(__name__)

SHOWN = 3  # mismatches in a warning
COMMAND = "python -m sglang_vlkv.compatibility"

UNFIT = """\
sglang_vlkv {ours} does not fit SGLang {found} and stands aside: {absent}.
{problems}
Install a release of SGLang that it was tested with (pip install 'sglang=={newest}'), or a sglang_vlkv for \
SGLang {found}. SGLANG_PLUGINS, set to the names of the plugins to load, leaves this one out."""
UNTESTED = (
    "sglang_vlkv {ours} was tested with SGLang {tested} and not with {found}, which has all that it uses. "
    "It is registered; compare its answers with those under --kv-policy none before you rely on them."
)


class Part(NamedTuple):
    """What is registered as a whole or not at all.

    Attributes:
        variable: of the environment; hands what was found down to child processes.
        expected: by dotted name, what a symbol takes, written as in ``uses``.
        absent: what a server is without it, in a clause.
        untested: what is said where it fits an SGLang that nobody has tested it with.
    """

    variable: str
    expected: dict[str, str]
    absent: str
    untested: str = ""


PLUGIN = Part(
    "SGLANG_VLKV_PLUGIN",
    {hook.target: hook.parameters for hook in HOOKS}
    | {f"{module}.{name}": takes for module, symbols in USES.items() for name, takes in symbols.items()}
    | {f"{of}.{name}": "" for of, names in READS.items() for name in names.split()},
    "nothing of it is registered, and --kv-policy is an unrecognized argument",
    UNTESTED,
)
CPU = Part("SGLANG_VLKV_CPU", CPU_PLATFORM, "its CPU platform is not used")


class Installed(NamedTuple):
    """The SGLang that this process would import, and the folder that holds the package."""

    version: str
    folder: Path


def installed() -> Installed:
    """Raises LookupError where there is none."""
    spec = find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"there is no SGLang beside {sys.executable}")
    try:
        found = version("sglang")
    except PackageNotFoundError:
        found = "of no stated version"
    return Installed(found, Path(spec.submodule_search_locations[0]).parent)


def fits(part: Part) -> bool:
    """Whether the installed SGLang has all of ``part``; if not, a warning says what is missing.

    Looked up, and said, once in a tree of processes: each of them loads its plugins.
    """
    sglang = installed()
    subject = f"{__version__} {sglang.version} {sglang.folder}"
    known, _, verdict = os.environ.get(part.variable, "").rpartition(": ")
    if known == subject:
        return verdict == "fits"
    problems = mismatches(Sources(sglang.folder), part.expected)
    if problems:
        logger.warning(warning(UNFIT, sglang.version, absent=part.absent, problems=_shortened(problems)))
    elif part.untested and sglang.version not in TESTED_SGLANG:
        logger.warning(warning(part.untested, sglang.version))
    os.environ[part.variable] = f"{subject}: {'stands aside' if problems else 'fits'}"
    return not problems


def warning(template: str, found: str, **more: str) -> str:
    """A sentence to the operator of SGLang ``found``."""
    tested = " and ".join(TESTED_SGLANG)
    return template.format(ours=__version__, tested=tested, newest=TESTED_SGLANG[-1], found=found, **more)


def mismatches(sources: Sources, expected: dict[str, str]) -> list[str]:
    """What is expected and not found, a sentence each."""
    collects = gc.isenabled()
    gc.disable()  # it would look through a million nodes of syntax trees, again and again
    try:
        return [words for target, takes in expected.items() if (words := _mismatch(sources, target, takes))]
    finally:
        if collects:
            gc.enable()


def _shortened(problems: list[str]) -> str:
    more = len(problems) - SHOWN
    lines = [*problems[:SHOWN], *([f"and {more} more, which {COMMAND} lists"] if more > 0 else [])]
    return "\n".join(f"  {line}" for line in lines)


def _mismatch(sources: Sources, target: str, takes: str) -> str:
    symbol = sources.find(target)
    if symbol is None:
        return f"expected {target}, found none"
    if not takes:
        return ""
    found = sources.parameters(symbol)
    wanted = f"expected {target} to take ({', '.join(takes.split())})"
    if found is None:
        return f"{wanted}, found no function that says what it takes"
    *names, last = takes.split()
    if last not in ("...", "*"):
        right = [*names, last] == [parameter.name for parameter in found]
    else:
        others = [parameter for parameter in found if parameter.name not in names]
        right = len(others) + len(names) == len(found)
        right &= last == "*" or not any(parameter.needed for parameter in others)
    return "" if right else f"{wanted}, found ({', '.join(parameter.name for parameter in found)})"


def hooks_missing() -> list[str]:
    """Targets that SGLang's hook applier did not patch; it logs its failures and goes on."""
    return [
        hook.target
        for hook in HOOKS
        if not hasattr(pkgutil.resolve_name(hook.target), "__wrapped__")
    ]
