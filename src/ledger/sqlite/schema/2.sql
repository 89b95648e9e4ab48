-- Details of the tokens where endpoints tell them; estimates where they tell nothing, never mixed with what was told; how fast
-- streams were: how many, their answers' tokens, and the times to the first token and from there to the end, summed up.
ALTER TABLE token_hour ADD COLUMN cached INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN reasoning INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN audio INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN estimated_requests INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN estimated_prompt INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN estimated_completion INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN streams INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN stream_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN first_token_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_hour ADD COLUMN stream_ms INTEGER NOT NULL DEFAULT 0;

ALTER TABLE token_day ADD COLUMN cached INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN reasoning INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN audio INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN estimated_requests INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN estimated_prompt INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN estimated_completion INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN streams INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN stream_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN first_token_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_day ADD COLUMN stream_ms INTEGER NOT NULL DEFAULT 0;

ALTER TABLE token_total ADD COLUMN cached INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN reasoning INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN audio INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN estimated_requests INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN estimated_prompt INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN estimated_completion INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN streams INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN stream_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN first_token_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token_total ADD COLUMN stream_ms INTEGER NOT NULL DEFAULT 0;
