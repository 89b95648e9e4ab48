-- Names that come again and again: of endpoints, keys, models of the config, rules. What clients make up stands where it is used.
CREATE TABLE name (
  id INTEGER PRIMARY KEY,
  text TEXT NOT NULL UNIQUE
);

-- What requests are searched by, in the order in which they ended. `key`, `endpoint`, `model` and `fault` are ids of names, or texts.
CREATE TABLE request (
  id INTEGER PRIMARY KEY,
  ended INTEGER NOT NULL,          -- milliseconds of Unix time
  number INTEGER NOT NULL,         -- hash of detail.request_id, to find it by
  key,                             -- of the client
  endpoint,                        -- the last one that was asked
  tried TEXT,                      -- ids of the names of those before it, as in ',3,17,'; null if there were none
  model,                           -- as the client named it
  status INTEGER,                  -- null if the client got none
  fault,                           -- null if there was none
  session INTEGER                  -- hash of its name
);

-- All else of the request of the same id. Times are in microseconds.
CREATE TABLE detail (
  id INTEGER PRIMARY KEY,
  request_id TEXT NOT NULL,
  trace BLOB,                      -- id of the trace, 16 bytes
  address TEXT,
  tags,                            -- JSON: the labels of the client's key
  method,
  path,
  fallback,                        -- model that served in place of the one that was asked for
  endpoint_model,                  -- model that the endpoint was sent, if it is another
  lane,                            -- key that the endpoint was sent, as far as it is shown
  affinity,
  stream INTEGER NOT NULL,
  trouble,
  rule,
  queued INTEGER NOT NULL,
  first_byte INTEGER,
  first_token INTEGER,
  generation INTEGER,              -- from the first token to the end
  total INTEGER NOT NULL,
  prompt_tokens INTEGER,
  completion_tokens INTEGER,
  total_tokens INTEGER,
  cached_tokens INTEGER,
  reasoning_tokens INTEGER,
  audio_tokens INTEGER,
  cost INTEGER,                    -- 1e-9 US dollars
  request_bytes INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  held TEXT,                       -- JSON: the endpoints that could not be asked in the end, and why
  outside,                         -- JSON: the endpoints that could not have been asked at all, and why
  cause TEXT,
  config INTEGER NOT NULL          -- version of the config that it ran under
);

-- Attempts. The id is that of the request times 128, plus the attempt's place.
CREATE TABLE attempt (
  id INTEGER PRIMARY KEY,
  began INTEGER NOT NULL,          -- microseconds after the request came
  took INTEGER NOT NULL,           -- microseconds
  first_byte INTEGER,              -- microseconds after it began
  endpoint,
  lane,
  model,
  span INTEGER NOT NULL,           -- id of the attempt's span of the trace
  outcome,
  status INTEGER,
  trouble,
  rule,
  passed_over TEXT                 -- JSON: the candidates that could not be asked in its place, and why
);

-- Bodies, of keys that ask for it. The id is that of the request times 2, plus 1 for the answer's.
CREATE TABLE body (
  id INTEGER PRIMARY KEY,
  length INTEGER NOT NULL,         -- bytes of the whole body
  kept INTEGER NOT NULL,           -- bytes of it that are here
  zstd BLOB NOT NULL
);
