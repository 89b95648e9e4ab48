-- What was spent of the budgets of callers' keys, by period, and what is reserved of it for requests under way. `kind` is the unit and
-- the length of the period, such as `usd/day`; amounts are 1e-9 US dollars or tokens. `until` is when the row may be forgotten, in
-- seconds of Unix time; NULL for never.
CREATE TABLE budget (
    key TEXT NOT NULL,
    kind TEXT NOT NULL,
    period INTEGER NOT NULL,
    spent INTEGER NOT NULL,
    reserved INTEGER NOT NULL,
    until INTEGER,
    PRIMARY KEY (key, kind, period)
) STRICT, WITHOUT ROWID;

CREATE INDEX budget_until ON budget (until);

-- Each reservation, with the process that made it. `known` is what it comes to if that process dies.
CREATE TABLE reservation (
    owner INTEGER NOT NULL,
    id INTEGER NOT NULL,
    key TEXT NOT NULL,
    kind TEXT NOT NULL,
    period INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    known INTEGER NOT NULL,
    PRIMARY KEY (owner, id, kind)
) STRICT, WITHOUT ROWID;

-- When each of these processes was last heard of, in milliseconds since the machine's start.
CREATE TABLE reservation_owner (
    owner INTEGER PRIMARY KEY,
    heard INTEGER NOT NULL
) STRICT;
