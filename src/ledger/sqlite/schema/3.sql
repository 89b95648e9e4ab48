-- Counts of accounts that are not a whole endpoint. `kind` says what `owner` and `part` name: for `models` an endpoint's id, and
-- a pattern of its modelLimits or a model that matches one.
CREATE TABLE account_minute (
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    part TEXT NOT NULL,
    slot INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (kind, owner, part, slot)
) STRICT, WITHOUT ROWID;

-- By calendar day, in the time zone of the limits.
CREATE TABLE account_day (
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    part TEXT NOT NULL,
    day TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (kind, owner, part, day)
) STRICT, WITHOUT ROWID;
