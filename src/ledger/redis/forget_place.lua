-- Forgets the places of a thing that belong to an owner. KEYS[1] the thing; ARGV the owner.
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(field, 1, #ARGV[1] + 1) == ARGV[1] .. ':' then redis.call('HDEL', KEYS[1], field) end
end
