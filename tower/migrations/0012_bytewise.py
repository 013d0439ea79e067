"""On Postgres, names and ids are compared byte by byte, as SQLite does, and not by the rules of a language.

Most databases have such rules, those of English in Postgres' own image, and each comparison on the way to a row asked them. Titles keep
them: they are what people look for without regard to case.
"""

from peewee import PostgresqlDatabase

from tower.errors import SettingsError

#: In the order in which others lock them.
TABLES = (
    *("task", "task_label", "task_event", "task_log", "task_artifact", "task_start"),
    *("rule", "worker", "api_key", "audit", "saved_view"),
)
_TEXTS = """
SELECT attname FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND atttypid = 'text'::regtype AND attname <> 'title'
"""
_VIEWS = """
SELECT DISTINCT ev_class::regclass::text FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid
WHERE pg_depend.classid = 'pg_rewrite'::regclass AND refobjid = ANY (%s::regclass[]) ORDER BY 1
"""


def up(migrator, db):
    """Compare the texts of each table by their bytes; tables stay as they are, indexes are built anew."""
    if not isinstance(db, PostgresqlDatabase):
        return
    if views := [row[0] for row in db.execute_sql(_VIEWS, (list(TABLES),)).fetchall()]:
        cure = "which cannot be changed beneath them: drop them, start the tower, and create them again"
        raise SettingsError(f"Views show the tower's tables, {cure}. They are: {', '.join(views)}")
    db.execute_sql("SET LOCAL statement_timeout = 0")
    db.execute_sql(f"LOCK TABLE {', '.join(TABLES)} IN ACCESS EXCLUSIVE MODE")
    for table in TABLES:
        names = [row[0] for row in db.execute_sql(_TEXTS, (table,)).fetchall()]
        changes = (f'ALTER COLUMN "{name}" TYPE text COLLATE "C"' for name in names)
        db.execute_sql(f"ALTER TABLE {table} {', '.join(changes)}")
