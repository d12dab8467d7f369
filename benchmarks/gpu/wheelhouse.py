"""Packages for a GPU host without a network, in pieces: ``python -m benchmarks.gpu.wheelhouse PROFILE``.

Downloads wheels for the host's Python from the package indexes that pip is configured with, leaves out
what the benchmark does not use, joins them into one archive, and cuts that into pieces of at most 28 MB
with a manifest of SHA-256 sums and an ``install.py`` that needs nothing but Python and pip: it joins,
verifies, unpacks and installs into a folder, without an index and without dependencies.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PIECE_BYTES = 28_000_000
PRUNED = "+pruned"  # behind the version of a wheel that is not whole
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
        prune: whether :data:`PRUNINGS` apply.
    """

    requirements: tuple[str, ...]
    resolve: bool
    note: str
    prune: bool = False


def flashinfer_keeps(name: str) -> bool:
    """What importing FlashInfer, and compiling its paged decode and prefill (FA2), reads."""
    if name.startswith("flashinfer/data/"):
        sources = "csrc/batch_decode", "csrc/batch_prefill", "csrc/tvm_ffi_utils.h"
        return name.removeprefix("flashinfer/data/").startswith(("include/", "cccl/libcudacxx/include/", *sources))
    if name.startswith("flashinfer/experimental/"):
        return name.count("/") == 2 or name.startswith("flashinfer/experimental/cake_nvfp4_per_token/")
    return name.startswith("flashinfer/") and not name.startswith("flashinfer/moe_ep/")


SGLANG_KERNELS = "sglang/kernels/ops/attention/"
SGLANG_FILES = ("decode_attention.py", "metadata.py", "score_mod.py")


def sglang_keeps(name: str) -> bool:
    """The stock Triton decode kernel, which needs no more of SGLang than :data:`SGLANG_STUBS`."""
    return name.startswith(SGLANG_KERNELS) and name.removeprefix(SGLANG_KERNELS) in SGLANG_FILES


SGLANG_STUBS = {
    "sglang/__init__.py": '"""Only the stock Triton decode kernel: the rest of SGLang is not here."""\n',
    "sglang/kernels/__init__.py": "",
    "sglang/kernels/ops/__init__.py": "",
    "sglang/kernels/ops/attention/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/environ.py": "envs = None  # of kernels that are not used here\n",
    "sglang/srt/utils.py": """import torch


def is_hip():
    return False


is_gfx95_supported = is_gfx1250_supported = is_hip


def get_device_core_count(device_id=0):
    return torch.cuda.get_device_properties(device_id).multi_processor_count
""",
}

# By distribution, as wheels spell it: what stays of its files, and what is added.
PRUNINGS: dict[str, tuple[Callable[[str], bool], dict[str, str]]] = {
    "flashinfer_python": (flashinfer_keeps, {}),
    "sglang": (sglang_keeps, SGLANG_STUBS),
}

PROFILES = {
    "kernels": Profile(
        # FlashInfer imports without its CuTe DSL, cuDNN, NCCL and cuTile backends, which decoding on
        # Hopper does not use; torch, numpy and CUDA's compiler are the host's. torch-c-dlpack-ext
        # spares apache-tvm-ffi a compilation when it is first imported.
        (
            "sglang==0.5.23",
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
        "FlashInfer's paged decode and prefill, and SGLang's Triton decode kernel alone. torch 2.11+, numpy and nvcc "
        "13 must be there; FlashInfer's kernels are compiled at their first use, about a minute each on 16 cores, "
        "but for those that --kernels brought.",
        True,
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


def prune(wheel: Path, kept: Callable[[str], bool], added: dict[str, bytes]) -> Path:
    """Puts a wheel of fewer files in the place of ``wheel``; its version says so."""
    name, version, *tags = wheel.name.split("-")
    pruned = wheel.with_name("-".join([name, version + PRUNED, *tags]))
    before, info = (f"{name}-{version}{label}.dist-info/" for label in ("", PRUNED))
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(pruned, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:

        def add(path: str, content: bytes) -> None:
            new.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)  # of no date: the same every time
            checksum = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.writerow([path, f"sha256={checksum}", len(content)])

        for path in sorted(old.namelist()):
            if path == f"{before}METADATA":
                line = f"\nVersion: {version}"
                add(f"{info}METADATA", old.read(path).decode().replace(f"{line}\n", f"{line}{PRUNED}\n").encode())
            elif path.startswith(before):
                if path not in (f"{before}RECORD", f"{before}entry_points.txt"):
                    add(path.replace(before, info), old.read(path))
            elif kept(path) and path not in added:
                add(path, old.read(path))
        for path, content in added.items():
            add(path, content)
        new.writestr(zipfile.ZipInfo(f"{info}RECORD"), record.getvalue() + f"{info}RECORD,,\n")
    wheel.unlink()
    return pruned


def prune_all(folder: Path, kernels: Path | None) -> None:
    """Applies :data:`PRUNINGS` to the wheels of a folder.

    Args:
        kernels: what FlashInfer compiled for the host's device (``cached_ops`` in its cache), to go along.
    """
    compiled = {
        f"flashinfer/data/aot/{library.stem}/{library.name}": library.read_bytes()
        for library in sorted(kernels.glob("*/*.so") if kernels else ())
    }
    for name, (kept, added) in PRUNINGS.items():
        more = {path: text.encode() for path, text in added.items()} | (compiled if name == "flashinfer_python" else {})
        (wheel,) = folder.glob(f"{name}-*.whl")
        prune(wheel, kept, more)


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
    parser.add_argument("--out", type=Path, required=True, help="an empty folder that git does not track")
    parser.add_argument("--kernels", type=Path, help="FlashInfer's cached_ops for the host's device, to go along")
    args = parser.parse_args()
    profile = PROFILES[args.profile]
    if args.kernels and not any(args.kernels.glob("*/*.so")):
        parser.error(f"{args.kernels} holds no compiled kernels; python -m flashinfer_ext.check --compile makes them")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        download(profile, Path(folder))
        if profile.prune:
            prune_all(Path(folder), args.kernels)
        wheels = sorted(Path(folder).glob("*.whl"))
        args.out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(args.out).free
        if free < 3 * (needed := sum(wheel.stat().st_size for wheel in wheels)):
            sys.exit(f"{needed / 1e9:.1f} GB of wheels need three times the room; {free / 1e9:.1f} GB are free")
        manifest = bundle(wheels, args.out, profile=args.profile, python=PYTHON, note=profile.note)
    for name in manifest["wheels"]:
        print(f"  {name}")
    print(f"{len(manifest['pieces'])} pieces, {manifest['bytes'] / 1e6:.1f} MB, in {args.out}. {profile.note}")
    print("On the host, with the pieces in one folder: python3 install.py TARGET; export PYTHONPATH=TARGET")


if __name__ == "__main__":
    main()
