-- Notes a place of a thing. KEYS[1] the thing; ARGV owner, endpoint, organization, until (seconds), '1' for a session, which is at one
-- place only.
local key, owner, endpoint, until_s = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[4])
if ARGV[5] == '1' then
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if string.sub(field, 1, #owner + 1) == owner .. ':' and field ~= owner .. ':' .. endpoint then
      redis.call('HDEL', key, field)
    end
  end
end
local before = redis.call('HGET', key, owner .. ':' .. endpoint)
local known = before and tonumber(string.match(before, '^%d+')) or 0
if known > until_s then until_s = known end
redis.call('HSET', key, owner .. ':' .. endpoint, string.format('%.0f', until_s) .. ' ' .. ARGV[3])
local left = until_s - tonumber(redis.call('TIME')[1])
if redis.call('TTL', key) < left then redis.call('EXPIREAT', key, string.format('%.0f', until_s)) end
