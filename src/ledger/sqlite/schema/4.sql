-- Where things are: the endpoint at which a caller made a file, a response or another object, and the one that holds the cache of a
-- session. `kind` says what `name` is: an object's id, or a hash. `until` is when the row is forgotten, in seconds of Unix time.
CREATE TABLE place (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    owner TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    organization TEXT NOT NULL,
    until INTEGER NOT NULL,
    PRIMARY KEY (kind, name, owner, endpoint)
) STRICT, WITHOUT ROWID;

CREATE INDEX place_until ON place (kind, until);

-- Models that endpoints have listed, as they answered, for a start while they are down.
CREATE TABLE model_list (
    endpoint TEXT PRIMARY KEY,
    list TEXT NOT NULL
) STRICT, WITHOUT ROWID;
