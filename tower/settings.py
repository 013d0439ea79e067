"""Every setting, typed, from the environment; nothing else in the tower reads it."""

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from tower import faults
from tower.errors import SettingsError

LOOPBACK = ("127.0.0.1", "::1", "localhost")

#: Names never handed to a child process: what they hold opens the tower itself, or means the tower's own port and folder.
_PRIVATE = re.compile(r"^(DATABASE_URL|REDIS_URL|TRACE_DIR|HOST|PORT|TOWER_.*)$")

#: Who asks, between the slashes and the last @; a password that is not percent-encoded may hold any character.
_ACCOUNT = re.compile(r"(?P<user>[^:/?#]*)(?P<secret>.*)@", re.DOTALL)
_DAY_S = 86_400
_LONGEST_DAYS = 36_500
#: What the names of variables begin with that hold secrets for tasks.
_SECRET = "TOWER_SECRET_"  # noqa: S105  # a name, no secret
_ENCODE = "percent-encode special characters in the password (@ is %40, / is %2F, # is %23, ? is %3F)"


class Settings(BaseSettings):
    """How this process is to behave; every default works on a laptop."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    database_url: str = Field(
        "sqlite:///./devops_control_tower.db",
        validation_alias="DATABASE_URL",
        description="Where rows live: `sqlite:///path`, `postgres://…` or `postgresql://…`; percent-encode what is special in a password.",
    )
    redis_url: str | None = Field(
        None,
        validation_alias="REDIS_URL",
        description="The broker for messages (`redis://…`). Unset: embedded, the server runs the tasks itself.",
    )
    trace_dir: Path = Field(Path("logs"), validation_alias="TRACE_DIR", description="Where each task's folder is written.")
    host: str = Field("127.0.0.1", validation_alias="HOST", description="The address the server binds.")
    port: int = Field(8000, ge=0, le=65535, validation_alias="PORT", description="The port the server binds.")
    anonymous: Literal["loopback", "nobody", "viewer", "operator", "admin"] = Field(
        "loopback",
        validation_alias="TOWER_ANONYMOUS",
        description="What whoever shows no key may do: everything, on `loopback` alone; what `viewer`, `operator` or `admin` may; "
        "or nothing, if `nobody`.",
    )
    bootstrap_key: SecretStr | None = Field(
        None,
        min_length=20,
        validation_alias="TOWER_BOOTSTRAP_KEY",
        description="A key for the first admin, 20 characters or more; it opens everything while it is set.",
    )
    session_secret: SecretStr | None = Field(
        None,
        min_length=20,
        validation_alias="TOWER_SESSION_SECRET",
        description="What signs browser sessions, the same for all servers of a tower. Unset: made and kept in TOWER_RUN_DIR.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        validation_alias="TOWER_ALLOWED_HOSTS",
        description="More names the `Host` header may carry, comma-separated; loopback names always may.",
    )
    slots: int = Field(8, ge=1, le=256, validation_alias="TOWER_SLOTS", description="Tasks the embedded worker runs at once.")
    worker_nice: int = Field(
        5,
        ge=0,
        le=19,
        validation_alias="TOWER_WORKER_NICE",
        description="How far a worker process stands back for others of its session on a busy machine, as `nice` counts: 0 to 19. "
        "With more than 0 it takes fewer and longer turns on a core as well (Linux 6.12 and later).",
    )
    lease_s: float = Field(
        30.0,
        ge=1,
        le=_DAY_S,
        allow_inf_nan=False,
        validation_alias="TOWER_LEASE_S",
        description="Seconds without a heartbeat after which a running task is taken from its worker.",
    )
    beat_s: float = Field(
        1.0,
        gt=0,
        le=_DAY_S,
        allow_inf_nan=False,
        validation_alias="TOWER_BEAT_S",
        description="Seconds between two heartbeats; also how fast a cancel arrives.",
    )
    sweep_s: float = Field(
        2.0,
        gt=0,
        le=_DAY_S,
        allow_inf_nan=False,
        validation_alias="TOWER_SWEEP_S",
        description="Seconds between two passes of the sweep.",
    )
    max_losses: int = Field(
        3,
        ge=1,
        validation_alias="TOWER_MAX_LOSSES",
        description="Workers a task may lose before it fails as `worker_lost`; lost twice, with one chance left, it runs alone among such.",
    )
    shutdown_grace_s: float = Field(
        10.0,
        ge=0,
        le=_DAY_S,
        allow_inf_nan=False,
        validation_alias="TOWER_SHUTDOWN_GRACE_S",
        description="Seconds a worker process lets tasks go on after SIGTERM before it hands them back; the embedded one does so at once.",
    )
    run_dir: Path | None = Field(
        None,
        validation_alias="TOWER_RUN_DIR",
        description="Where each worker locks a file while it lives: a folder of its user's own. Unset: one in the temporary folder.",
    )
    max_body_mb: int = Field(
        10, ge=1, le=100, validation_alias="TOWER_MAX_BODY_MB", description="Largest request body, and largest result, in MB."
    )
    log_limit_mb: int = Field(
        100, ge=1, validation_alias="TOWER_LOG_LIMIT_MB", description="Output kept of one attempt, in MB; the rest is cut with a mark."
    )
    artifact_limit_mb: int = Field(
        64, ge=1, validation_alias="TOWER_ARTIFACT_LIMIT_MB", description="Files kept of one attempt, in MB together."
    )
    keep_succeeded_days: float = Field(
        30.0,
        ge=0,
        le=_LONGEST_DAYS,
        allow_inf_nan=False,
        validation_alias="TOWER_KEEP_SUCCEEDED_DAYS",
        description="Days after which tasks that succeeded are removed, with rows, log, files and folder; 0 keeps them for ever.",
    )
    keep_cancelled_days: float = Field(
        30.0,
        ge=0,
        le=_LONGEST_DAYS,
        allow_inf_nan=False,
        validation_alias="TOWER_KEEP_CANCELLED_DAYS",
        description="Days after which tasks that were cancelled are removed, with rows, log, files and folder; 0 keeps them for ever.",
    )
    keep_failed_days: float = Field(
        90.0,
        ge=0,
        le=_LONGEST_DAYS,
        allow_inf_nan=False,
        validation_alias="TOWER_KEEP_FAILED_DAYS",
        description="Days after which tasks that failed are removed, with rows, log, files and folder; 0 keeps them for ever.",
    )
    keep_timed_out_days: float = Field(
        90.0,
        ge=0,
        le=_LONGEST_DAYS,
        allow_inf_nan=False,
        validation_alias="TOWER_KEEP_TIMED_OUT_DAYS",
        description="Days after which tasks that timed out are removed, with rows, log, files and folder; 0 keeps them for ever.",
    )
    keep_audit_days: float = Field(
        365.0,
        ge=0,
        le=_LONGEST_DAYS,
        allow_inf_nan=False,
        validation_alias="TOWER_KEEP_AUDIT_DAYS",
        description="Days after which entries of the record of who did what are removed; 0 keeps them for ever.",
    )
    secrets_dir: Path | None = Field(
        None,
        validation_alias="TOWER_SECRETS_DIR",
        description="A folder whose files are secrets that tasks may name, as `secret://NAME`; beside the variables `TOWER_SECRET_NAME`.",
    )
    db_pool: int = Field(
        32,
        ge=4,
        le=1000,
        validation_alias="TOWER_DB_POOL",
        description="Most database connections this process opens. On Postgres a server opens one more, and a busy worker's scribe one.",
    )
    log_format: Literal["text", "json"] = Field(
        "text", validation_alias="TOWER_LOG_FORMAT", description="How the process log is written: `text` or `json`."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", validation_alias="TOWER_LOG_LEVEL", description="How much the process log says."
    )
    fault: str | None = Field(
        None,
        validation_alias="TOWER_FAULT",
        description="For tests alone: what shall break where, as in `claim.after_commit:1:kill`; see docs/reliability.md.",
    )
    url: str = Field("http://127.0.0.1:8000", validation_alias="TOWER_URL", description="The tower that the command line talks to.")
    key: SecretStr | None = Field(None, min_length=20, validation_alias="TOWER_KEY", description="The key that the command line shows it.")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the documented variables and no other: pydantic's own source would take a field's bare name, such as URL, as well."""
        found = {env_name(field): os.environ.get(env_name(field)) for field in cls.model_fields}
        return init_settings, InitSettingsSource(cls, {name: value for name, value in found.items() if value is not None})

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip().lower() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("redis_url", "run_dir", "secrets_dir", "bootstrap_key", "session_secret", "key", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return value or None

    @field_validator("log_format", "log_level", "anonymous", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("fault")
    @classmethod
    def _known_fault(cls, value: str | None) -> str | None:
        faults.parse(value or "")
        return value or None

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        scheme, _, rest = value.partition("://")
        if scheme not in ("sqlite", "postgres", "postgresql"):
            raise ValueError("expected sqlite:///path, postgres://… or postgresql://…")
        if scheme == "sqlite" and (not rest.startswith("/") or rest in ("/", "/:memory:")):
            raise ValueError("expected a file, as in sqlite:///./devops_control_tower.db (three slashes; memory is not durable)")
        if scheme != "sqlite":
            parts = _read_url(value, f"{scheme}://user:password@host:5432/tower")
            if not parts.hostname and "host" not in dict(parse_qsl(parts.query)):
                raise ValueError(f"there is no host in it; expected {scheme}://host:5432/tower, and {_ENCODE}")
        return value

    @field_validator("redis_url")
    @classmethod
    def _known_broker(cls, value: str | None) -> str | None:
        scheme, _, rest = (value or "").partition("://")
        if value is not None and (scheme not in ("redis", "rediss", "unix") or not rest):
            raise ValueError("expected redis://host:port/0")
        if scheme in ("redis", "rediss") and value and not _read_url(value, f"{scheme}://user:password@host:6379/0").hostname:
            raise ValueError(f"there is no host in it; expected {scheme}://host:6379/0, and {_ENCODE}")
        return value

    @field_validator("url")
    @classmethod
    def _known_tower(cls, value: str) -> str:
        if value.partition("://")[0].lower() not in ("http", "https") or not _read_url(value, "http://host:port").hostname:
            raise ValueError("expected http://host:port")
        return value

    @property
    def embedded(self) -> bool:
        """Whether the server itself runs the tasks, because there is no broker between processes."""
        return self.redis_url is None

    def masked(self) -> dict[str, Any]:
        """Return the effective settings by their names in the environment, without secrets."""
        values = self.model_dump(mode="json")
        for name in ("database_url", "redis_url", "url"):
            values[name] = mask_url(values[name])
        return {env_name(name): value for name, value in values.items()}

    def warnings(self) -> list[str]:
        """Return what works but is probably not meant, each with its cure."""
        found = []
        if self.beat_s * 3 > self.lease_s:
            found.append(
                f"TOWER_BEAT_S={self.beat_s:g} is too slow for TOWER_LEASE_S={self.lease_s:g}: three beats should fit into a lease."
            )
        if self.redis_url and self.database_url.startswith("sqlite"):
            found.append("REDIS_URL is set but DATABASE_URL is SQLite: server and workers must share one local disk; use Postgres.")
        if self.anonymous in ("operator", "admin"):
            whoever = f"whoever reaches HOST={self.host} may run commands here; something else must guard it."
            found.append(f"TOWER_ANONYMOUS={self.anonymous}: {whoever}")
        if self.host not in LOOPBACK and self.anonymous == "loopback" and self.bootstrap_key is None:
            found.append(f"HOST={self.host}: only requests with a key are answered; set TOWER_BOOTSTRAP_KEY to make the first.")
        if self.host not in LOOPBACK and not self.allowed_hosts:
            found.append(f"HOST={self.host} but TOWER_ALLOWED_HOSTS is empty: only requests for a loopback name are answered.")
        if self.trace_dir.exists() and not (self.trace_dir.is_dir() and os.access(self.trace_dir, os.W_OK)):
            found.append(f"TRACE_DIR={self.trace_dir} is no folder this process can write to: tasks run, but leave no trace.")
        if self.fault:
            found.append(f"TOWER_FAULT={self.fault}: this tower breaks on purpose; unset it unless you are testing it.")
        known = {env_name(field) for field in type(self).model_fields}
        strange = (name for name in os.environ if name.startswith("TOWER_") and not name.startswith(_SECRET) and name not in known)
        for name in sorted(strange):
            near = difflib.get_close_matches(name, known, n=1)
            found.append(f"{name} is not a setting.{f' Did you mean {near[0]}?' if near else ''}")
        return found


#: Settings that nobody is ever shown, not even when they are wrong.
_SECRETS, _MASK = ("bootstrap_key", "session_secret", "key"), "***"


def load(**overrides: Any) -> Settings:
    """Read the settings from the environment, under those overrides that are not None; raise SettingsError naming each that is wrong.

    An override is named after the option of the command line that it comes from.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    options = {env_name(name): f"--{name}" for name in given}
    try:
        return Settings(**given)
    except ValidationError as error:
        found = [(str(item["loc"][0]), item) for item in error.errors(include_url=False)]
        secret = {env_name(name) for name in _SECRETS}
        wrong = [(env_name(name), _MASK if env_name(name) in secret else mask_url(str(item["input"])), item["msg"]) for name, item in found]
        lines = [f"{options.get(name, name)}={value!r}: {said.removeprefix('Value error, ')}" for name, value, said in wrong]
        raise SettingsError("These settings cannot be used. " + " · ".join(lines)) from None


def env_name(field: str) -> str:
    """Return the environment variable of a field."""
    known = Settings.model_fields.get(field)
    return str(known.validation_alias) if known else field


def mask_url(url: str | None) -> str | None:
    """Return the URL without its password and query; less of it if one cannot tell where the password ends."""
    if not url:
        return url
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        return "***" if re.search("[@=?]", url) else url
    account = None if url.startswith("sqlite:///") else _ACCOUNT.match(rest)
    place = rest[account.end() :] if account else rest
    told = f"{scheme}://"
    if account:
        if re.search(r"\?.*=", account["secret"], re.DOTALL):  # an @ in the query: what follows may be secret as well
            return f"{told}{account['user']}:***"
        told += f"{account['user']}{':***' if account['secret'] else ''}@"
    told += re.split("[?#]", place, maxsplit=1)[0]
    try:
        urlsplit(told).port  # noqa: B018  # a password without an @ after it stands where the port would
    except ValueError:
        return f"{scheme}://***"
    return told + ("?***" if "?" in place else "")


def _read_url(url: str, expected: str) -> SplitResult:
    """Return the parts of a URL; raise ValueError, without any part of it, if host and port cannot be told."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018
    except ValueError:
        why = "Invalid IPv6 URL" if "[" in url or "]" in url else "Invalid host or port"
        raise ValueError(f"{why}; expected {expected}, and {_ENCODE}") from None
    if "@" in parts.path + parts.query.partition("=")[0] + parts.fragment:
        raise ValueError(f"there is an @ behind the host; expected {expected}, and {_ENCODE}")
    return parts


def secret(name: str, folder: Path | None) -> str | None:
    """Return a secret that tasks may name: TOWER_SECRET_<name>, or the file of that name in the folder, without the newline at its end.

    Returns None if there is neither; raises OSError for a file that cannot be read, UnicodeDecodeError for one that is no text.
    """
    given = os.environ.get(f"{_SECRET}{name}")
    if given is not None or folder is None:
        return given
    try:
        return (folder / name).read_text("utf-8").removesuffix("\n")
    except FileNotFoundError:
        return None


def child_environment() -> dict[str, str]:
    """Return the environment for a child process: this one's, without what opens the tower."""
    return {name: value for name, value in os.environ.items() if not _PRIVATE.match(name)}
