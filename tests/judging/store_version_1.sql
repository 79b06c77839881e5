PRAGMA journal_mode = WAL;
PRAGMA application_id = 1165520978;
PRAGMA user_version = 1;
CREATE TABLE rubrics (
    key TEXT PRIMARY KEY, asked BLOB NOT NULL, answer TEXT NOT NULL, rubric TEXT NOT NULL, created REAL NOT NULL
);
CREATE TABLE judgements (
    key TEXT PRIMARY KEY, asked BLOB NOT NULL, answer TEXT NOT NULL,
    value REAL, reason TEXT, evidence TEXT, created REAL NOT NULL,
    kind TEXT NOT NULL AS (CASE WHEN reason IS NULL THEN 'Scored' ELSE 'Abstained' END),
    CHECK ((value IS NULL) <> (reason IS NULL))
);
