"""Secrets are hidden in whatever form they are printed."""

import base64
import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Tower
from tower import db
from tower.masking import HIDDEN, SHORTEST, Mask
from tower.models import TABLES

_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), max_size=30)
_SECRETS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), min_size=SHORTEST, max_size=60)


def printed(secret: str, before: str = "", after: str = "") -> dict[str, str]:
    """How programs print a secret, alone or within more."""
    data, beside = secret.encode(), before.encode() + secret.encode() + after.encode()
    return {
        "raw": before + secret + after,
        "json": json.dumps(before + secret + after),
        "json in json": json.dumps(json.dumps({"key": secret})),
        "json as it is": json.dumps(secret, ensure_ascii=False),
        "url": quote(secret, safe=""),
        "url as a path": quote(secret),
        "form": quote_plus(secret),
        "hex": data.hex(),
        "HEX": data.hex().upper(),
        "base64": base64.b64encode(data).decode(),
        "base64 within more": base64.b64encode(beside).decode(),
        "base64 for urls": base64.urlsafe_b64encode(beside).decode(),
        "base64 in lines": base64.encodebytes(data).decode(),
        "repr": repr(secret),
    }


def decoded(text: str) -> set[str]:
    """What somebody finds who looks at a text in the common ways."""
    found = {text}
    for decode in (base64.b64decode, base64.urlsafe_b64decode, bytes.fromhex):
        try:
            found.add(decode(text).decode("utf-8", "ignore"))  # type: ignore[operator]
        except ValueError:
            continue
    return found


@given(secret=_SECRETS, before=_TEXT, after=_TEXT)
def test_no_form_of_a_secret_is_left(secret: str, before: str, after: str) -> None:
    """Wherever in a text it stands."""
    mask = Mask()
    mask.add(secret)
    for form, text in printed(secret, before, after).items():
        hidden = mask.text(text)
        assert HIDDEN in hidden, form
        assert not any(secret in found for found in decoded(hidden)), form


@given(secret=_SECRETS, parts=st.lists(st.binary(max_size=40), max_size=5), size=st.integers(1, 50))
def test_a_secret_across_two_pieces_is_found(secret: str, parts: list[bytes], size: int) -> None:
    """Of a file that is kept; the rest of it is as it was."""
    mask = Mask()
    mask.add(secret)
    whole = secret.encode().join([b"<", *parts, b">"])
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert b"".join(mask.stream(pieces)) == b"".join(mask.stream([whole]))
    assert secret.encode() not in b"".join(mask.stream(pieces))
    assert b"".join(Mask().stream(pieces)) == whole


def test_a_secret_of_several_lines_is_hidden_line_by_line() -> None:
    """As a key in a file is; and its base64, which programs break into lines."""
    secret = "-----BEGIN KEY-----\n" + "\n".join("MIIE" + chr(65 + n) * 60 for n in range(6)) + "\n-----END KEY-----\n"
    mask = Mask()
    mask.add(secret)
    assert [mask.text(line) for line in secret.splitlines()] == [HIDDEN] * 8
    for text in (base64.encodebytes(secret.encode()), base64.b64encode(secret.encode())):
        left = "".join(line for line in mask.text(text.decode()).splitlines() if line != HIDDEN)
        assert len(left.replace(HIDDEN, "")) < 24


@pytest.mark.parametrize("length", [8, 9, 10, 11])
def test_nothing_of_the_base64_of_a_secret_alone_is_left(length: int) -> None:
    """Neither the last character nor the padding, which are not certain within more."""
    mask = Mask()
    mask.add("s3cr3t-!~ÿ?"[:length])
    data = "s3cr3t-!~ÿ?"[:length].encode()
    for text in (base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode(), base64.b64encode(data).decode().rstrip("=")):
        assert mask.text(f"a {text} b") == "a *** b"


def test_values_are_hidden_in_names_and_numbers_too() -> None:
    """And the result stays JSON."""
    mask = Mask()
    mask.add("1234567890")
    assert mask.value({"a 1234567890": [1234567890, "x1234567890x", 1.5, True, None]}) == {"a ***": [HIDDEN, "x***x", 1.5, True, None]}
    assert Mask().value({"n": [1]}) == {"n": [1]}


#: What a test plants and nobody may find.
PLANTED = 'geheim/+"\\n=ü 🗼 1234567'
SPOKEN = """
import base64, json, os, sys, time, urllib.parse
secret = os.environ["PLANTED"]
data = secret.encode()
for text in (secret, json.dumps(secret), json.dumps(json.dumps(secret)), urllib.parse.quote(secret, safe=""),
             urllib.parse.quote_plus(secret), data.hex(), data.hex().upper(), base64.b64encode(data).decode(),
             base64.b64encode(b"user:" + data).decode(),
             base64.urlsafe_b64encode(b"u:" + data + b"?").decode(), repr(secret)):
    print("said:", text, flush=True)
sys.stdout.write(secret[:9]); sys.stdout.flush(); time.sleep(0.3); print(secret[9:], flush=True)
sys.stdout.buffer.write(data[:20]); sys.stdout.flush(); time.sleep(0.1); sys.stdout.buffer.write(data[20:] + b"\\n")
sys.stdout.write("x" * 16380 + secret[:9]); sys.stdout.flush(); time.sleep(0.3); print(secret[9:] + "y" * 40_000)
open("kept.txt", "w").write("z" * 300_000 + secret + json.dumps(secret))
print(secret, file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TOWER_SECRET_PLANTED", PLANTED)
    return PLANTED


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_secret_of_a_command_is_nowhere_to_be_found(
    tower: Tower, planted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, exit_code: int
) -> None:
    """In no row, file, log or answer, raw or encoded, whole or in two writes, also when it fails and is shown to the next attempt."""
    payload = {
        "argv": ["python3", "-c", SPOKEN, str(exit_code)],
        "cwd": str(tmp_path),
        "env": {"PLANTED": "secret://PLANTED"},
        "artifacts": ["kept.txt"],
    }
    task_id = tower.enqueue("command", payload, max_attempts=2)
    found = tower.wait(task_id, seconds=60)
    assert found["status"] == ("failed" if exit_code else "succeeded"), found["error"]
    client = tower.client
    texts = [client.get(f"/tasks/{task_id}{call}").text for call in ("", "/events", "/log", "/log?follow=true", "/files", "/why")]
    texts += [path.read_bytes().decode("utf-8", "replace") for path in (tower.settings.trace_dir / task_id).rglob("*") if path.is_file()]
    with db.database.connection_context():
        for table in TABLES:
            for row in table.select().tuples():
                texts += [bytes(cell).decode("utf-8", "replace") if isinstance(cell, memoryview | bytes) else str(cell) for cell in row]
    texts.append(caplog.text)
    assert sum(text.count("said: ***") + text.count('said: "***') for text in texts) > 20
    data = planted.encode()
    forms = {form: text for form, text in printed(planted).items() if form != "repr"}
    forms |= {"half": planted[:16], "base64 of half": base64.b64encode(data).decode()[:16], "hex of half": data.hex()[:30]}
    forms |= {"the other half": planted[8:], "its hex": data.hex()[30:]}
    for form, text in forms.items():
        assert not [place for place in texts if text.strip() in place], form
    assert "secret://PLANTED" in texts[0]


def test_what_is_told_of_the_end_of_an_output_does_not_begin_in_a_secret(sqlite_tower: Tower, planted: str) -> None:
    """It is cut to some thousand characters, which could leave half of one."""
    program = "import os; print(os.environ['KEY'] + 'x' * 3990); raise SystemExit(3)"
    payload = {"argv": ["python3", "-c", program], "env": {"KEY": "secret://PLANTED"}}
    error = sqlite_tower.wait(sqlite_tower.enqueue("command", payload))["error"]
    assert error["details"]["tail"].strip("x") in ("***", "**", "*", "")


def test_a_secret_comes_from_a_file_as_well(sqlite_tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder of secrets, without the newline that editors add."""
    (tmp_path / "FILED").write_text("a secret of a file\n")
    (tmp_path / "SHORT").write_text("short\n")
    monkeypatch.setattr("actors.attempt.secret", lambda name, folder: __import__("tower.settings").settings.secret(name, tmp_path))
    command = 'printf \'%s\' "$KEY" | wc -c; echo "$KEY"'
    tower = sqlite_tower
    task_id = tower.enqueue("command", {"argv": ["sh", "-c", command], "env": {"KEY": "secret://FILED"}})
    assert tower.wait(task_id)["status"] == "succeeded"
    log = tower.client.get(f"/tasks/{task_id}/log").text
    assert "] 18" in log and "] ***" in log and "a secret of a file" not in log
    for name, said in (("SHORT", "shorter than 8 characters"), ("ABSENT", "There is no secret 'ABSENT' on the worker")):
        found = tower.wait(tower.enqueue("command", {"argv": ["true"], "env": {"KEY": f"secret://{name}"}}, max_attempts=3))
        assert (found["status"], found["error"]["code"], found["attempt"]) == ("failed", "secret_unusable", 1)
        assert said in found["error"]["message"] and "short\n" not in json.dumps(found)


def test_a_secret_goes_into_a_header(sqlite_tower: Tower, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an http task; what the other side makes of it is hidden as well."""
    seen = list[dict[str, Any]]()

    async def exchange(payload: Any, task: Any) -> dict[str, Any]:
        seen.append(payload.headers)
        return {"status": 200, "body": f"you sent {payload.headers['authorization']}", "length": len(shlex.quote("x"))}

    monkeypatch.setenv("TOWER_SECRET_TOKEN", "token-0123456789")
    monkeypatch.setattr("actors.handlers.http._exchange", exchange)
    headers = {"authorization": "Bearer secret://TOKEN"}
    found = sqlite_tower.wait(sqlite_tower.enqueue("http", {"url": "http://127.0.0.1:1/", "headers": headers}))
    assert seen == [{"authorization": "Bearer token-0123456789"}]
    assert found["result"]["body"] == "you sent Bearer ***"
    assert found["payload"]["headers"] == headers


@pytest.mark.parametrize("named", ["secret://", "secret://../etc/passwd", "secret://a b", "secret://1A"])
def test_a_name_that_no_secret_has_is_refused(sqlite_tower: Tower, named: str) -> None:
    """When the task is asked for."""
    answer = sqlite_tower.client.post("/tasks/enqueue", json={"type": "command", "payload": {"argv": ["true"], "env": {"KEY": named}}})
    assert answer.status_code == 422
    assert "as in secret://GITHUB_TOKEN" in answer.json()["detail"]
