"""Packages for a GPU host without a network, in pieces: ``python -m benchmarks.gpu.wheelhouse PROFILE``.

Downloads wheels for the host's Python from the package indexes that pip is configured with, joins
them into one archive, and cuts that into pieces of at most 60 MB with a manifest of SHA-256 sums and
an ``install.py`` that needs nothing but Python and pip: it joins, verifies, unpacks and installs
into a folder, without an index and without dependencies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

PIECE_BYTES = 60_000_000
MANIFEST, ARCHIVE = "manifest.json", "wheels.tar"
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)] + [
    f"manylinux{name}_x86_64" for name in ("2014", "2010", "1")
]


class Profile(NamedTuple):
    """What a bundle holds.

    Attributes:
        requirements: what is named.
        resolve: whether pip adds what they need; else they are all.
        note: what the host has to bring.
    """

    requirements: tuple[str, ...]
    resolve: bool
    note: str


PROFILES = {
    "flashinfer": Profile(
        # FlashInfer imports without its CuTe DSL, cuDNN, NCCL and cuTile backends, which decoding on
        # Hopper does not use; torch, numpy and CUDA's compiler are the host's. torch-c-dlpack-ext
        # spares apache-tvm-ffi a compilation when it is first imported.
        (
            "flashinfer-python==0.7.2",
            "apache-tvm-ffi==0.1.11",
            "torch-c-dlpack-ext==0.1.5",
            "einops",
            "ninja",
            "packaging>=24.2",
            "requests",
            "charset-normalizer",
            "idna",
            "urllib3",
            "certifi",
            "tabulate",
            "click",
            "tqdm",
            "nvidia-ml-py",
            "filelock",
            "typing-extensions",
        ),
        False,
        "torch 2.11+, numpy and nvcc 13 must be there; its kernels are compiled at their first use, about a "
        "minute each, so warm them before timing.",
    ),
    "sglang": Profile(
        ("sglang==0.5.23", "torch==2.14.1", "sglang-kernel==0.4.10"),
        True,
        "Replaces torch 2.11 by 2.14.1 in the folder, since sglang-kernel 0.4.10 is built for it (five symbols "
        "are missing in 2.11). Gigabytes: torch's wheel alone is 0.56 GB; unpacked, on Python 3.11, CUDA's "
        "libraries are 3.7 GB, torch 1.2, sglang-kernel 1.1 (most of it FlashAttention 3), Triton 0.9, CuTe 0.5.",
    ),
}

INSTALL = '''"""Joins the pieces beside this file, verifies and installs them: python3 install.py TARGET [pip's options]"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def digest(path):
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def main(target, *options):
    here = Path(__file__).resolve().parent
    manifest = json.loads((here / "manifest.json").read_text())
    for piece in manifest["pieces"]:
        path = here / piece["name"]
        if not path.exists():
            sys.exit(f"{piece['name']} is missing")
        if path.stat().st_size != piece["bytes"] or digest(path) != piece["sha256"]:
            sys.exit(f"{piece['name']} is damaged")
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "wheels.tar"
        with archive.open("wb") as joined:
            for piece in manifest["pieces"]:
                joined.write((here / piece["name"]).read_bytes())
        if digest(archive) != manifest["sha256"]:
            sys.exit("the joined archive is not the one that was cut")
        with tarfile.open(archive) as files:
            files.extractall(scratch, filter="data")
        archive.unlink()
        wheels = sorted(Path(scratch).glob("*.whl"))
        if {wheel.name: digest(wheel) for wheel in wheels} != manifest["wheels"]:
            sys.exit("the wheels are not those of the manifest")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        install += ["--no-cache-dir", "--upgrade", "--target", target, *options, *map(str, wheels)]
        subprocess.run(install, check=True)
    print(f"{len(wheels)} packages in {target}: put it on PYTHONPATH")


if len(sys.argv) < 2:
    sys.exit(__doc__)
main(*sys.argv[1:])
'''


def download(profile: Profile, folder: Path) -> None:
    """Wheels for the host's Python and platform, from pip's own indexes."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    command += [f"--platform={name}" for name in PLATFORMS] + ["--platform=any"]
    command += [] if profile.resolve else ["--no-deps"]
    subprocess.run([*command, *profile.requirements], check=True)


def digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def bundle(wheels: list[Path], out: Path, piece_bytes: int = PIECE_BYTES, **about) -> dict:
    """Cuts an archive of ``wheels`` into pieces in ``out``; returns the manifest.

    Args:
        about: added to the manifest.
    """
    out.mkdir(parents=True, exist_ok=True)
    pieces = []
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        archive = Path(scratch) / ARCHIVE
        with tarfile.open(archive, "w") as files:
            for wheel in sorted(wheels):
                files.add(wheel, wheel.name, filter=_anonymous)
        total, size = digest(archive), archive.stat().st_size
        with archive.open("rb") as file:
            while block := file.read(piece_bytes):
                piece = out / f"{ARCHIVE}.{len(pieces):03d}"
                piece.write_bytes(block)
                pieces.append({"name": piece.name, "bytes": len(block), "sha256": hashlib.sha256(block).hexdigest()})
    manifest = about | {
        "bytes": size,
        "sha256": total,
        "pieces": pieces,
        "wheels": {wheel.name: digest(wheel) for wheel in sorted(wheels)},
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    (out / "install.py").write_text(INSTALL)
    return manifest


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same wheels make the same archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", choices=PROFILES)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, outside the repository")
    args = parser.parse_args()
    profile = PROFILES[args.profile]
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        download(profile, Path(folder))
        wheels = sorted(Path(folder).glob("*.whl"))
        free = shutil.disk_usage(args.out.parent).free
        if free < 3 * (needed := sum(wheel.stat().st_size for wheel in wheels)):
            sys.exit(f"{needed / 1e9:.1f} GB of wheels need three times the room; {free / 1e9:.1f} GB are free")
        manifest = bundle(wheels, args.out, profile=args.profile, python=PYTHON, note=profile.note)
    for name in manifest["wheels"]:
        print(f"  {name}")
    print(f"{len(manifest['pieces'])} pieces, {manifest['bytes'] / 1e6:.1f} MB, in {args.out}. {profile.note}")
    print("On the host, with the pieces in one folder: python3 install.py TARGET; export PYTHONPATH=TARGET")


if __name__ == "__main__":
    main()
