"""Command lines: what is wrong with one is a sentence and status 2, and nobody's text moves the terminal."""

from __future__ import annotations

import importlib
import io
import json
import socket
import subprocess
import sys
import unicodedata
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from PIL import Image

from sglang_vlkv.commands import Problem, media, values
from sglang_vlkv.commands.door import command
from sglang_vlkv.commands.server import post
from sglang_vlkv.commands.shapes import fits, lacks
from sglang_vlkv.printable import printable
from tests.servers import answering, hangs_up, sends
from tests.serving import ROOT, free_port

DIGITS = ROOT / "examples" / "digits.png"
NASTY = "x\x1b]0;T\x07\x1b[31m\nFAKE\r\x00\x7f\x9b2J\u0085\u202e\u2066\u200f\u2028\u2029\ufeff\U000e0041"


def controls(text: str) -> list[str]:
    """What of ``text`` a terminal obeys, but for the ends of its lines."""
    kinds = {char: unicodedata.category(char) for char in set(text) - {"\n"}}
    return sorted(char for char, kind in kinds.items() if kind in ("Cc", "Cf", "Cs", "Zl", "Zp"))


# ---- What others chose ----


def test_every_control_character_is_escaped_and_all_else_stays():
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        shown = printable(char)
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in (0x200C, 0x200D):
            assert shown.isascii() and shown[0] == "\\" and shown.isprintable(), code
        else:
            assert shown == char, code
    assert printable(NASTY) == (
        r"x\x1b]0;T\x07\x1b[31m\nFAKE\r\x00\x7f\x9b2J\x85\u202e\u2066\u200f\u2028\u2029\ufeff\U000e0041"
    )
    assert printable("a\n\tb\r\x1b", keep="\n\t") == "a\n\tb\\r\\x1b"
    family = "\U0001f468\u200d\U0001f469"
    assert printable(f"C:\\new {family} é\u3000") == f"C:\\new {family} é\u3000"
    printable("\ud800").encode()


# ---- Values ----

NO_NUMBERS = ["", "x", "nan", "NaN", "inf", "-inf", "1e400", "-1", "--", "0x10", "1,5", NASTY, "9" * 5000]
READ = {  # what reads -> what it makes of texts, and texts that it refuses
    "whole": (
        values.whole(), {"1": 1, "2147483647": 2**31 - 1}, [*NO_NUMBERS, "0", "1.5", "1e3", "2147483648"],
    ),
    "whole in bounds": (values.whole(64, 1024), {"64": 64, "1024": 1024}, [*NO_NUMBERS, "63", "1025"]),
    "positive": (values.positive, {"1e-9": 1e-9, "3": 3.0}, [*NO_NUMBERS, "0", "-0.0"]),
    "not negative": (values.not_negative, {"0": 0.0, "1e308": 1e308}, NO_NUMBERS),
    "share": (values.share, {"1": 1.0, "0.1": 0.1}, [*NO_NUMBERS, "0", "1.0001"]),
    "port": (values.port, {"1": 1, "65535": 65535}, [*NO_NUMBERS, "0", "65536"]),
    "JSON object": (
        values.json_object, {'{"a": [1]}': {"a": [1]}},
        ["", "x", "[1]", "3", "null", '{"a": NaN}', '{"a": -Infinity}', "{", '{"a":' * 10**5],
    ),
    "server": (
        values.server,
        {"http://127.0.0.1:1/": "http://127.0.0.1:1", "https://a.b/c": "https://a.b/c", "http://[::1]:3": "http://[::1]:3"},
        [
            "", "x", "localhost:30000", "file:///etc/passwd", "ftp://a", "http://", "http://a:0", "http://a:99999",
            "http://a:x", "http://[::1", "http://a b", "http://a\n", "http://a..b", "http://a?b=c", "http://\xe4.de",
            NASTY,
        ],
    ),
    "key": (values.key, {"sk-1": "sk-1", "": ""}, ["a\nb", "\xe4", "\x1b"]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_values_are_read_or_refused_in_a_sentence(name):
    read, good, bad = READ[name]
    for text, value in good.items():
        assert read(text) == value
    for text in bad:
        with pytest.raises(ArgumentTypeError) as refused:
            read(text)
        words = str(refused.value)
        assert 10 < len(words) < 400 and "\n" not in words and not controls(words), text[:20]


def test_files_and_folders(tmp_path):
    there, missing = tmp_path / "there", tmp_path / "no" / "x"
    there.write_text("a")
    assert values.file(str(there)) == values.new_file(str(there)) == there
    assert there.read_text() == "a", "looking at it changes nothing"
    assert values.new_file(str(tmp_path / "new")) == tmp_path / "new" and not (tmp_path / "new").exists()
    assert values.new_folder(str(missing)) == missing and values.folder(str(tmp_path)) == tmp_path
    for read, path, said in [
        (values.file, missing, "cannot be read: No such file"), (values.file, tmp_path, "Is a directory"),
        (values.new_file, missing, "there is no folder"), (values.new_file, tmp_path, "it is a folder"),
        (values.folder, there, "is no folder"), (values.new_folder, there, "is no folder"),
        (values.new_folder, there / "a" / "b", "is no folder"),
    ]:  # fmt: skip
        with pytest.raises(ArgumentTypeError, match=said):
            read(str(path))


def test_shapes():
    for value, kind in [
        (1, int), (0, int), (1, float), (-0.5, float), (True, bool), ("", str), (None, int | None), ([], list[int]),
        ([[1], []], list[list[int]]), ({"a": 1}, dict[str, int]), ({"a": None}, dict), ([1.5], list[float] | None),
    ]:  # fmt: skip
        assert fits(value, kind), (value, kind)
    for value, kind in [
        (True, int), (1.0, int), (-1, int), (2**63, int), ("1", int), (float("nan"), float), (1e300, float),
        (10**400, float), (None, str), ([1, "a"], list[int]), ([[1], 2], list[list[int]]), ({"a": "b"}, dict[str, int]),
        ({1: 1}, dict[str, int]), ({}, list), (None, list[int]),
    ]:  # fmt: skip
        assert not fits(value, kind), (value, kind)
    kinds = {"a": int, "b": str | None}
    assert lacks({"a": 1, "b": None, "c": []}, kinds) is None
    assert [lacks(value, kinds) for value in ({}, {"a": 1}, {"a": "", "b": ""}, [], None)] == [
        "a", "b", "a", "object", "object",
    ]  # fmt: skip


# ---- The door ----


def test_what_a_command_ends_with(capsys):
    def ends(problem) -> tuple[int, str]:
        @command
        def main() -> int:
            if isinstance(problem, BaseException):
                raise problem
            return problem

        return main(), capsys.readouterr().err

    assert [ends(status) for status in (0, None, 1)] == [(0, ""), (0, ""), (1, "")]
    status, said = ends(Problem(f"No {NASTY}."))
    assert status == 2 and said == f"No {printable(NASTY)}.\n"
    assert ends(FileNotFoundError(2, "No such file", "a\nb")) == (2, "a\\nb: No such file.\n")
    assert ends(OSError(28, "No space left on device")) == (2, "No space left on device.\n")
    assert ends(KeyboardInterrupt()) == (130, "")
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


def test_a_reader_that_leaves_and_a_terminal_that_knows_few_letters():
    code = (
        "import sys; from sglang_vlkv.commands.door import command\n"
        "@command\ndef main():\n  print('é漢\\u2713')\n  for _ in range(100_000): print('x' * 99)\n"
        "sys.exit(main())"
    )
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, env=environment)
    assert run.stdout.readline() == b"\\xe9\\u6f22\\u2713\n"
    run.stdout.close()
    assert run.wait(30) == 2 and run.stderr.read() == b""


# ---- Every command line ----

WHOLE, POSITIVE, SHARE = ["nan", "1.5", "-1", "0", "x", "1e400"], ["nan", "inf", "-1", "0"], ["nan", "0", "2", "-1"]
NO_URL = ["localhost:1", "file:///etc/passwd", "http://a:99999", ""]
ASKS = ["--question", "red?"]
LINES = {
    "sglang_vlkv.monitor": {
        "endpoint": ["0", "65536", "-1", "x", "tcp://a", "tcp://1.2.3.4:70000", "ipc://"], "--seconds": POSITIVE,
        "--speed": ["nan", "-1", "inf"], "--replay": ["no/such", "."], "--record": ["no/such", "."],
    },
    "sglang_vlkv.inspect": {
        "--url": NO_URL, "--kv-budget": SHARE, "--max-tokens": WHOLE, "--out": ["no/such/x"], "--layer": ["x"],
        "--api-key": ["a\nb"], "--image": ["no/such", "."], "--video": ["no/such", "."], "--font": ["no/such", "."],
        "--kv-policy-config": ["{", "[1]", ".", "no/such", str(DIGITS), '{"a":' * 10**4],
    },
    "sglang_vlkv.tinyvlm.ask": {
        "--url": NO_URL, "--seed": ["nan", "-1"], "--visual-tokens": ["63", "1025", "nan"], "--task": ["video", "x"],
        "--save": ["no/such/x.png", "."], "--image": ["no/such", "."],
    },
    "sglang_vlkv.tinyvlm.train": {
        "--steps": WHOLE, "--threads": WHOLE, "--seed": ["-1", "nan"], "--learning-rate": POSITIVE, "--vision": ["x"],
        "--start": ["no/such", "examples"], "out_dir": [str(DIGITS), f"{DIGITS}/x"],
    },
    "sglang_vlkv.tinyvlm.build": {
        "--layers": WHOLE, "--head-dim": ["17", *WHOLE], "--kv-heads": ["3"], "--scale": ["nan", "-1"],
        "--dtype": ["x"], "out_dir": [str(DIGITS)],
    },
    "sglang_vlkv.kernels.aot": {"--json": ["no/such/x", "."], "--arch": ["7", "x"], "--only": ["no such case"]},
    "examples.make_media": {"argument": ["x"]},
    "examples.video_chat.make_clip": {"argument": ["x"]},
    "examples.video_chat.app": {
        "--port": ["0", "70000", "x", "-1"], "--max-mb": ["nan", "-1", "0", "inf", "1e308"], "--server": NO_URL,
        "--host": ["no such host", "256.0.0.1", "a..b"],
    },
    "examples.video_chat.terminal": {
        "--server": NO_URL, "--max-tokens": WHOLE, "--custom-params": ["x", "[1]", "NaN", '{"a": NaN}'],
        "--image": ["no/such", ".", "README.md"], "--video": ["no/such", "README.md"],
    },
    "examples.frontend.describe": {
        "--server": [*NO_URL, "http://127.0.0.1:9"], "--custom-params": ["x", "[1]"], "--picture": ["no/such", "."],
    },
    "examples.frontend.choose": {"--picture": ["no/such", "README.md"], "--server": ["http://127.0.0.1:9"]},
    "examples.frontend.converse": {"--picture": ["no/such", "README.md"], "--server": ["http://127.0.0.1:9"]},
    "examples.frontend.batch": {
        "--pictures": WHOLE, "--task": ["video", "images", "x"], "--server": ["http://127.0.0.1:9"],
    },
    "benchmarks.capacity": {"--rounds": WHOLE, "--clients": WHOLE, "--max-new-tokens": ["1", *WHOLE]},
    "benchmarks.decode_cpu": {"--rounds": WHOLE, "--max-new-tokens": ["1"], "--dtype": ["x"]},
    "benchmarks.policies_cpu": {"--rounds": WHOLE, "--max-new-tokens": ["1"]},
    "benchmarks.overhead": {"--rounds": WHOLE},
    "benchmarks.multi_turn": {
        "--rounds": WHOLE, "--conversations": WHOLE, "--turns": ["1"], "--arrival": POSITIVE, "--think": POSITIVE,
        "--rows": ["x"],
    },
    "benchmarks.fidelity.__main__": {
        "--budgets": SHARE, "--samples": WHOLE, "--workers": WHOLE, "--url": [*NO_URL, "http://127.0.0.1:9"],
        "--questions": ["no/such", ".", str(DIGITS)], "--out": [str(DIGITS)], "--checkpoints": ["no/such"],
        "--rows": ["x"], "--tasks": ["x"],
    },
    "tests.chaos.__main__": {
        "--requests": WHOLE, "--minutes": POSITIVE, "--out": ["no/such/x", "."], "--processes": WHOLE,
        "--clients": WHOLE, "--pool": ["1"], "--deadline": POSITIVE, "--kills": ["-1"], "--seed": ["-1"],
    },
}  # fmt: skip
BESIDE = {  # what a line needs besides
    "sglang_vlkv.inspect": {None: ["--image", str(DIGITS), *ASKS], "--image": ASKS, "--video": ASKS},
    "sglang_vlkv.tinyvlm.ask": {None: [], "--image": ASKS},
    "sglang_vlkv.tinyvlm.train": {None: ["OUT"], "out_dir": []},
    "sglang_vlkv.tinyvlm.build": {None: ["OUT"], "out_dir": []},
    "examples.video_chat.terminal": {None: ["hello"]},
    "benchmarks.fidelity.__main__": {None: ["--quick", "--out", "OUT"], "--out": ["--quick"]},
}


def said_by(module: str, arguments: list[str], capsys) -> str:
    """What a command that fails says; in this process, where it does as ``python -m`` does."""
    module = module if "." in module else f"{module}.__main__"
    try:
        module = importlib.import_module(f"{module}.__main__")
    except ModuleNotFoundError:
        module = importlib.import_module(module)
    try:
        status = module.main(arguments)
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert status == 2, (arguments, status, err)
    assert err.count("\n") == 1 and len(err) > 20 and not controls(err), (arguments, err)
    assert "Traceback" not in err and "object at 0x" not in err and "Errno" not in err, err
    return out


@pytest.mark.parametrize("module", LINES)
def test_wrong_values_are_a_sentence(module, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = sorted(tmp_path.rglob("*"))
    for name, wrong in LINES[module].items():
        needed = BESIDE.get(module, {None: []})
        needed = [word.replace("OUT", str(tmp_path / "out")) for word in needed.get(name, needed[None])]
        for value in wrong:
            given = [f"{name}={value}"] if name.startswith("--") else [value]
            out = said_by(module, [*needed, *given] if name != "endpoint" else ["--once", "--", *given], capsys)
            assert out in ("", "> hello\n"), out
    assert sorted(tmp_path.rglob("*")) == before or module.startswith("benchmarks.fidelity"), "nothing is left"


def test_every_command_line_is_among_them():
    """All that Python runs with ``-m``, but for those that are tried where they are tested."""
    ours = [*(ROOT / "sglang_vlkv").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    ours += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks/fidelity").glob("*.py")]
    ours += (ROOT / "tests/chaos").glob("*.py")
    named = {path for path in ours if '\nif __name__ == "__main__":' in path.read_text()}
    modules = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in named}
    short = {module.removesuffix(".__main__") for module in modules}
    assert {module.removesuffix(".__main__") for module in LINES} >= short - {
        "sglang_vlkv.compatibility", "sglang_vlkv.options.refusals",
    }  # fmt: skip


def test_names_of_files_are_printed_as_they_can_be(capsys, tmp_path):
    path = tmp_path / "a\x1b[31m\nb.png"
    path.write_bytes(b"no picture")
    for module in ("sglang_vlkv.inspect", "sglang_vlkv.tinyvlm.ask"):
        said_by(module, ["--image", str(path), *ASKS], capsys)
    for word in ("--\x1b[31m\n", "--seed=\x9b\n"):
        said_by("sglang_vlkv.tinyvlm.ask", [word], capsys)


# ---- Pictures ----


def picture_file(folder: Path, kind: str, mode: str = "RGB", **options) -> Path:
    path = folder / f"a.{kind}"
    Image.effect_noise((60, 40), 90).convert(mode).save(path, **options)
    return path


def test_pictures_that_are_none(tmp_path):
    png, jpeg = (picture_file(tmp_path, kind).read_bytes() for kind in ("png", "jpg"))
    for name, data in {
        "cut.png": png[: len(png) // 2], "cut.jpg": jpeg[: len(jpeg) // 2], "header.png": png[:33], "empty.png": b"",
        "text.png": b"hello", "svg.png": b"<svg/>", "flipped.png": png[:60] + bytes(b ^ 255 for b in png[60:]),
    }.items():  # fmt: skip
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(Problem, match=f"{name} cannot be read as a picture: [^<>]+\\.$"):
            media.image(path)


# ---- Servers that are not ours, and that die ----


SAID = {"choices": [{"message": {"content": NASTY}, "meta_info": {"kv_policy": {"reason": NASTY}}, "prompt_token_ids": []}]}
STREAM = b'data: {"id": "a", "choices": [{"index": 0, "delta": {"content": "a\\u001b[31m"}}]}\n\n'
STRANGERS = {
    "hangs up": hangs_up,
    "breaks off": sends(b'{"choices": [', length=1000),
    "breaks off a refusal": sends(b'{"error": ', 500, length=1000),
    "a page": sends(b"<html>\x1b[31m" + b"x" * 5000, kind="text/html"),
    "nothing": sends(b""),
    "a list": sends(b"[]"),
    "null": sends(b"null"),
    "a number": sends(b"3"),
    "no choices": sends(b'{"choices": []}'),
    "choices of another kind": sends(b'{"choices": [3], "model_path": 3}'),
    "no UTF-8": sends(b"\xff\xfe"),
    "deep": sends(b"[" * 10**5),
    "a refusal": sends(json.dumps({"error": {"message": NASTY}}).encode(), 400),
    "a strange refusal": sends(json.dumps([NASTY] * 3).encode(), 418),
    "a page that is not there": sends(NASTY.encode(errors="replace"), 404, kind="text/html"),
    "escapes": sends(json.dumps(SAID).encode()),
    "a stream that ends": sends(STREAM, kind="text/event-stream"),
    "a stream that is none": sends(b"data: {\x1b\n\ndata: 3\n\n", kind="text/event-stream"),
    "a stream of nulls": sends(b'data: {"choices": null}\n\ndata: {"choices": [null]}\n\n', kind="text/event-stream"),
}
ASKING = {
    "sglang_vlkv.inspect": ["--image", str(DIGITS), *ASKS, "--url"],
    "sglang_vlkv.tinyvlm.ask": ["--url"],
    "examples.video_chat.terminal": ["hello", "--server"],
    "examples.frontend.converse": ["--server"],
    "benchmarks.fidelity.__main__": ["--quick", "--out", "OUT", "--url"],
}


@pytest.mark.parametrize("module", ASKING)
def test_servers_that_are_not_ours(module, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, answer in STRANGERS.items():
        with answering(answer) as url:
            arguments = [word.replace("OUT", str(tmp_path / "out")) for word in ASKING[module]]
            if (module, name) == ("sglang_vlkv.tinyvlm.ask", "escapes"):  # all that it wants to know
                assert importlib.import_module(module).main([*arguments, url]) == 0
                assert f"answer   {printable(NASTY)}\n" in (said := capsys.readouterr().out)
            else:
                said = said_by(module, [*arguments, url], capsys)
            assert not controls(said), (name, said)
    assert not list(tmp_path.glob("*.png"))


def test_a_server_that_is_asked_says_why_in_its_own_words():
    with answering(sends(b'{"error": {"message": "too long"}}', 400)) as url:
        with pytest.raises(Problem, match="answers HTTP 400: too long$"):
            post(url, "/x", {})
    with pytest.raises(Problem, match="Connection refused.*make serve"):
        post(f"http://127.0.0.1:{free_port()}", "/x", {})


def test_the_app_names_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = importlib.import_module("examples.video_chat.app").main(["--port", str(port)])
    assert status == 2
    assert f"127.0.0.1, port {port}, cannot be listened on: " in capsys.readouterr().err


def test_training_from_a_folder_leaves_what_is_there(tmp_path, capsys):
    """Its weights, too, where it is also the one to write to."""
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"no weights")
    said_by("sglang_vlkv.tinyvlm.train", [str(tmp_path), "--start", str(tmp_path)], capsys)
    assert model.read_bytes() == b"no weights"


def test_a_picture_is_saved_under_any_name(tmp_path, capsys):
    with answering(sends(json.dumps(SAID).encode())) as url:
        main = importlib.import_module("sglang_vlkv.tinyvlm.ask").main
        assert main(["--url", url, "--save", str(tmp_path / "drawn")]) == 0
    assert Image.open(io.BytesIO((tmp_path / "drawn").read_bytes())).format == "PNG"
