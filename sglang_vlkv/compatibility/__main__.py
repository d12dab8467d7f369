"""``python -m sglang_vlkv.compatibility [WHEEL or VERSION]``: what of an SGLang fits this package."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import Path as ZipPath
from zipfile import is_zipfile

from sglang_vlkv import TESTED_SGLANG, __version__
from sglang_vlkv.compatibility import CPU, PLUGIN, installed, mismatches
from sglang_vlkv.compatibility.sources import Sources

FITS, MISFITS, ABSENT = 0, 1, 2  # exit status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_vlkv.compatibility",
        description="Prints what sglang_vlkv expects of an SGLang and does not find, and a verdict. The exit "
        "status is 0 where all of it is there, 1 where it is not, 2 where that SGLang cannot be had.",
    )
    parser.add_argument(
        "sglang", nargs="?", metavar="WHEEL or VERSION",
        help="a wheel file, which is not installed, or a version, which pip downloads; "
        "without it, the installed SGLang",
    )  # fmt: skip
    asked = parser.parse_args(arguments).sglang
    with TemporaryDirectory() as folder:
        try:
            if asked is None:
                version, root = installed()
            elif re.fullmatch(r"\d+(\.\w+)+", asked):
                version, root = _opened(_download(asked, folder))
            else:
                version, root = _opened(Path(asked))
            return _check(version, Sources(root))
        except LookupError as error:
            print(error.args[0], file=sys.stderr)
        except SyntaxError as error:
            python = sys.version.split()[0]
            print(f"SGLang {version} cannot be read by Python {python}: {error}", file=sys.stderr)
        return ABSENT


def _check(version: str, sources: Sources) -> int:
    status = FITS
    for name, part in (("plugin", PLUGIN), ("CPU platform", CPU)):
        problems = mismatches(sources, part.expected)
        print(*problems, sep="\n", end="\n" if problems else "")
        verdict = f"does not fit, {len(problems)} of" if problems else "fits, all of"
        ours = f"the {name} of sglang_vlkv {__version__}"
        print(f"SGLang {version}: {ours} {verdict} {len(part.expected)} symbols")
        status = MISFITS if problems else status
    if status == FITS and version not in TESTED_SGLANG:
        print(f"Nobody has tested it with SGLang {version}: make test does.")
    return status


def _download(version: str, folder: str) -> Path:
    """A wheel; what has to be built is left alone.

    Raises:
        LookupError: pip has none.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", folder, f"sglang=={version}"], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise LookupError(f"SGLang {version} cannot be had: pip download says {said}")
    [wheel] = Path(folder).glob("*.whl")
    return wheel


def _opened(wheel: Path) -> tuple[str, ZipPath]:
    """The version of the SGLang in ``wheel``, and its packages.

    Raises:
        LookupError: it is no wheel, or one of something else.
    """
    if not is_zipfile(wheel):
        raise LookupError(f"{wheel} is neither a version nor a wheel that can be read")
    found = next(iter(distributions(name="sglang", path=[str(wheel)])), None)
    if found is None:
        raise LookupError(f"{wheel} is not a wheel of SGLang")
    return found.version, ZipPath(wheel)


if __name__ == "__main__":
    sys.exit(main())
