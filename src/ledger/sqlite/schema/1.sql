-- What is needed to open it: the machine's start that the stamps count from, and until when the minute's counts may be
-- incomplete.
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT
) STRICT, WITHOUT ROWID;

-- What was counted in the last minute. A slot is a quarter of a second, counted from the machine's start.
CREATE TABLE minute (
    endpoint TEXT NOT NULL,
    slot INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (endpoint, slot)
) STRICT, WITHOUT ROWID;

-- What was counted by calendar day, in the endpoint's time zone.
CREATE TABLE day (
    endpoint TEXT NOT NULL,
    day TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (endpoint, day)
) STRICT, WITHOUT ROWID;

-- Token statistics. Hours and days begin at these seconds of Unix time, in the server's time zone.
CREATE TABLE token_hour (
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    hour INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    prompt INTEGER NOT NULL,
    completion INTEGER NOT NULL,
    total INTEGER NOT NULL,
    PRIMARY KEY (endpoint, model, hour)
) STRICT, WITHOUT ROWID;

CREATE TABLE token_day (
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    day INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    prompt INTEGER NOT NULL,
    completion INTEGER NOT NULL,
    total INTEGER NOT NULL,
    PRIMARY KEY (endpoint, model, day)
) STRICT, WITHOUT ROWID;

-- Since the last reset; `last_used` is in milliseconds of Unix time.
CREATE TABLE token_total (
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    last_used INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    prompt INTEGER NOT NULL,
    completion INTEGER NOT NULL,
    total INTEGER NOT NULL,
    PRIMARY KEY (endpoint, model)
) STRICT, WITHOUT ROWID;
