"""docs/requests.md: its commands and programs run, and what it says of fields and limits is so."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from sglang_vlkv.frontend.reports import ReportStore
from sglang_vlkv.options.config import OPERATOR_OPTIONS, REQUEST_KEYS, Settings
from sglang_vlkv.policies import policies
from tests.documents import quoted, section, table
from tests.serving import ROOT
from tests.test_endpoints import ENDPOINTS, HEADER, IMAGE, generate, report, stored

TEXT = (ROOT / "docs" / "requests.md").read_text()
COMMANDS = re.findall(r"```bash\n(curl .*?)```", TEXT, re.DOTALL)
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
URL = "http://127.0.0.1:30000"


def path_of(command: str) -> str:
    return command.split(URL)[1].split()[0]


def test_every_endpoint_is_named_and_has_an_example():
    assert all(f"`{endpoint.path}`" in TEXT for endpoint in ENDPOINTS)
    without = {"/invocations", "/api/generate"}  # like the one before them
    assert {path_of(command) for command in COMMANDS} | without == {e.path for e in ENDPOINTS}


@pytest.mark.parametrize("command", COMMANDS, ids=path_of)
def test_a_command_is_served_as_it_asks(any_policy, command):
    command = command.replace("curl -s ", "curl -si ", 1).replace(URL, any_policy.url)
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    head, body = run.stdout.split("\n\n", 1)
    assert " 200 " in head.splitlines()[0], run.stdout + run.stderr
    assert json.loads(body)
    seen = stored(any_policy, re.search(rf"(?im)^{HEADER}: (\w+)", head)[1])
    if "digits.png" in command:
        assert (seen["policy"], seen["budget"]) == ("h2o", 0.2)
    else:
        assert (seen["policy"], seen["reason"]) == ("none", "no image or video")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.splitlines()[0])
def test_a_program_runs(any_policy, program, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(program.replace(URL, any_policy.url), "requests.md", "exec"), {})
    printed = capsys.readouterr().out
    if "sgl.function" in program:
        assert printed.splitlines() == ["h2o vlkv snapkv"] * 2
    else:
        assert stored(any_policy, printed.strip())["reason"] == "no image or video"


def rows(heading: str, column: str) -> list[str]:
    """What stands in code in the first cells of a table below a heading."""
    return [name for cell, *_ in table(section(TEXT, heading), column) for name in quoted(cell)]


def test_the_tables_are_complete(any_policy):
    assert rows("Fields", "`custom_params`") == [*REQUEST_KEYS, "kv_report"]
    operators = {"allow_override", "min_budget", "max_budget"}
    assert operators <= set(rows("What an operator allows", "option")) & set(OPERATOR_OPTIONS)
    assert f"| `min_budget` | {Settings.min_budget} |" in TEXT
    seen, listed = set(), set(rows("Reports", "field"))
    for custom in ({"kv_policy": "h2o", "kv_report": "positions"}, None):
        seen |= set(report(any_policy.post("/generate", generate(IMAGE, custom)).json()))
    assert seen - {"reason"} == listed - {"ranks"}  # of several ranks only


def test_the_limits_are_those_of_the_code():
    bounds = {"max_rows": 4096, "draft_tokens": 256, "future": 65_536, "visual": 100_000}
    for option, most in bounds.items():
        assert re.search(rf"`{option}`.* \| {most:,}\b", TEXT), option
    for option, policy, value in [
        ("max_rows", "vlkv", 4096), ("draft_tokens", "vlkv", 256), ("future", "expected", 65_536),
        ("visual", "given", [0] * 100_000),
    ]:  # fmt: skip
        policies()[policy](**{option: value})
        more = [*value, 0] if isinstance(value, list) else value + 1
        with pytest.raises(ValueError, match=option):
            policies()[policy](**{option: more})
    store = ReportStore()
    assert (store._max_age, store._max_reports) == (600, 10_000) and "last 10,000" in TEXT
