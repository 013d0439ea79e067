"""Settings: where they come from, what stops the start, and what is never shown."""

from typing import Any

import pytest

from tower.errors import SettingsError
from tower.settings import Settings, env_name, load, mask_url

ENCODE = "percent-encode special characters in the password"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every setting out of the environment."""
    for field in Settings.model_fields:
        monkeypatch.delenv(env_name(field), raising=False)


def refusal(**overrides: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load(**overrides)
    return caught.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgres://me:geheim@db:5432/tower", "postgres://me:***@db:5432/tower"),
        ("postgres://me:ge/heim@db/tower", "postgres://me:***@db/tower"),
        ("postgres://me:ge#heim@db/tower", "postgres://me:***@db/tower"),
        ("postgres://me:ge?heim@db/tower", "postgres://me:***@db/tower"),
        ("postgres://me:ge@heim@db/tower", "postgres://me:***@db/tower"),
        ("postgres://me:g@e/h?e#im@db/tower", "postgres://me:***@db/tower"),
        ("postgres://me:1/geheim@db/tower", "postgres://me:***@db/tower"),
        ("postgres://me:ge\nheim@db/tower", "postgres://me:***@db/tower"),
        ("postgres://db/tower?user=me&password=geheim", "postgres://db/tower?***"),
        ("postgres://db/tower?password=ge@heim", "postgres://db:***"),
        ("postgres://me:geheim@db/tower?sslpassword=ge@heim", "postgres://me:***"),
        ("postgres://me@db/tower", "postgres://me@db/tower"),
        ("redis://:geheim@cache:6379/0", "redis://:***@cache:6379/0"),
        ("redis://:geheim", "redis://***"),
        ("redis://me:geheim@[bad", "redis://***"),
        ("redis://cache:6379/0#geheim", "redis://cache:6379/0"),
        ("http://me:ge[h]eim@host:8000", "http://me:***@host:8000"),
        ("host=db password=geheim", "***"),
        ("me:geheim@db", "***"),
        ("localhost:8000", "localhost:8000"),
        ("sqlite:////home/me@corp/a:b.db", "sqlite:////home/me@corp/a:b.db"),
        ("", ""),
        (None, None),
    ],
)
def test_no_part_of_a_password_is_shown(url: str | None, shown: str | None) -> None:
    """Whatever stands between the first colon and the last @ is masked, and so is the query."""
    assert mask_url(url) == shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgres://me:geheim@db:54x32/tower"),
        ("DATABASE_URL", "postgres://me:ge/heim@db/tower"),
        ("DATABASE_URL", "postgres://me:1/geheim@db/tower"),
        ("DATABASE_URL", "postgres://me:1?geheim@db/tower"),
        ("DATABASE_URL", "postgres://me:1#geheim@db/tower"),
        ("DATABASE_URL", "postgresql://me:ge[heim@db/tower"),
        ("DATABASE_URL", "postgresql://me:geheim℀@db/tower"),
        ("DATABASE_URL", "postgres://me:geheim@/tower"),
        ("DATABASE_URL", "postgres:///tower"),
        ("REDIS_URL", "redis://:geheim"),
        ("REDIS_URL", "redis://:ge/heim@cache:6379/0"),
        ("REDIS_URL", "rediss://:ge#heim@cache:6379/0"),
        ("REDIS_URL", "redis://:geheim@cache:99999/0"),
        ("REDIS_URL", "redis://:geheim@/0"),
        ("REDIS_URL", "redis:///0"),
        ("TOWER_URL", "http://me:ge/heim@tower.example"),
    ],
)
def test_a_url_whose_host_cannot_be_told_says_how_to_write_a_password(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A sentence with the variable and the cure instead of a traceback, and nothing of the secret."""
    monkeypatch.setenv(name, value)
    said = refusal()

    assert f"{name}='" in said and ENCODE in said
    assert "heim" not in said and "me:ge" not in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgres://me:g%40e%2Fheim@db:5432/tower?sslmode=require"),
        ("DATABASE_URL", "postgres:///tower?host=/run/postgresql"),
        ("DATABASE_URL", "postgres://db/tower?user=me@corp"),
        ("DATABASE_URL", "sqlite:////home/me@corp/tower.db"),
        ("REDIS_URL", "rediss://:g%23@[::1]:6379/0"),
        ("REDIS_URL", "unix:///run/redis.sock"),
        ("TOWER_URL", "HTTPS://me:geheim@tower.example/below"),
    ],
)
def test_a_url_that_is_written_well_is_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Sockets, IPv6 and encoded passwords are none of the mistakes."""
    monkeypatch.setenv(name, value)

    assert value in load().model_dump(mode="json").values()


@pytest.mark.parametrize("name", ["TOWER_LEASE_S", "TOWER_BEAT_S", "TOWER_SWEEP_S", "TOWER_SHUTDOWN_GRACE_S"])
@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e300", "soon"])
def test_a_number_of_seconds_is_finite(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """No thread can wait for ever, or for longer than a clock counts."""
    monkeypatch.setenv(name, value)

    assert f"{name}='{value}': Input should be" in refusal()


def test_only_the_documented_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """URL, SLOTS or LOG_LEVEL belong to other programs; so does a variable in another case."""
    for field in Settings.model_fields:
        for stranger in (field, field.upper(), env_name(field).lower()):
            if stranger != env_name(field):
                monkeypatch.setenv(stranger, "not for the tower")

    assert load() == Settings.model_construct()


def test_every_documented_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that cannot be used shows that it was looked at; one that can arrives."""
    monkeypatch.setenv("TRACE_DIR", "elsewhere")
    monkeypatch.setenv("TOWER_RUN_DIR", "run")
    monkeypatch.setenv("TOWER_SECRETS_DIR", "secrets")
    monkeypatch.setenv("HOST", "127.0.0.2")
    monkeypatch.setenv("TOWER_ALLOWED_HOSTS", "a.example, B.example")
    found = load()
    assert (str(found.trace_dir), str(found.run_dir), str(found.secrets_dir), found.host) == ("elsewhere", "run", "secrets", "127.0.0.2")
    assert found.allowed_hosts == ("a.example", "b.example")

    taken = ("trace_dir", "run_dir", "secrets_dir", "host", "allowed_hosts")
    rest = [env_name(field) for field in Settings.model_fields if field not in taken]
    for name in rest:
        monkeypatch.setenv(name, "?")
    said = refusal()
    assert [name for name in rest if f"{name}='" not in said] == []


def test_a_field_given_by_name_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `tower up --port` does, and every test."""
    monkeypatch.setenv("PORT", "8001")
    monkeypatch.setenv("TOWER_SLOTS", "5")

    assert (load(port=8002, host=None).port, Settings(port=8003).port, Settings(slots=4).slots, load().slots) == (8002, 8003, 4, 5)


def test_a_wrong_option_is_not_blamed_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake is named where it was made."""
    monkeypatch.setenv("TOWER_SLOTS", "many")
    monkeypatch.setenv("TOWER_URL", "http://127.0.0.1:8000")
    said = refusal(url="localhost:8000")

    assert "--url='localhost:8000': expected http://host:port" in said
    assert "TOWER_SLOTS='many': Input should be a valid integer" in said
    assert "TOWER_URL" not in said and "environment" not in said
