-- What answers cost, in 1e-9 US dollars, and how many of them have no price.
ALTER TABLE token_hour ADD COLUMN nano_usd INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN unpriced INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN nano_usd INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN unpriced INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN nano_usd INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN unpriced INTEGER NOT NULL DEFAULT 0;

-- The same numbers by the callers' own keys.
CREATE TABLE key_day (
    key TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    day INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    prompt INTEGER NOT NULL,
    completion INTEGER NOT NULL,
    total INTEGER NOT NULL,
    cached INTEGER NOT NULL,
    reasoning INTEGER NOT NULL,
    audio INTEGER NOT NULL,
    estimated_requests INTEGER NOT NULL,
    estimated_prompt INTEGER NOT NULL,
    estimated_completion INTEGER NOT NULL,
    streams INTEGER NOT NULL,
    stream_tokens INTEGER NOT NULL,
    first_token_ms INTEGER NOT NULL,
    stream_ms INTEGER NOT NULL,
    nano_usd INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    PRIMARY KEY (key, endpoint, model, day)
) STRICT, WITHOUT ROWID;

-- Since the last reset; `last_used` is in milliseconds of Unix time.
CREATE TABLE key_total (
    key TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    last_used INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    prompt INTEGER NOT NULL,
    completion INTEGER NOT NULL,
    total INTEGER NOT NULL,
    cached INTEGER NOT NULL,
    reasoning INTEGER NOT NULL,
    audio INTEGER NOT NULL,
    estimated_requests INTEGER NOT NULL,
    estimated_prompt INTEGER NOT NULL,
    estimated_completion INTEGER NOT NULL,
    streams INTEGER NOT NULL,
    stream_tokens INTEGER NOT NULL,
    first_token_ms INTEGER NOT NULL,
    stream_ms INTEGER NOT NULL,
    nano_usd INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    PRIMARY KEY (key, endpoint, model)
) STRICT, WITHOUT ROWID;
