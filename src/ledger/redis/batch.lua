-- One batch of a process: what it writes, what it claims, and what it reads, in one step of the server.
--
-- KEYS[1]  what all keys begin with, hash tag included
-- ARGV     the header, then operations one after the other. redis/wire.rs writes both and reads the reply.
--
-- Counts are integers below 2^53, which Lua holds exactly.

local call = redis.call
local base = KEYS[1]
local at = 0

local function text()
  at = at + 1
  return ARGV[at]
end

local function number()
  at = at + 1
  return tonumber(ARGV[at])
end

local function int(value)
  return string.format('%.0f', value)
end

-- The header.
local member = text()
local seq = number()            -- number of this batch; 0 if it only reads
local acked = number()          -- the last one whose reply the process has
local mode = text()             -- 'first', 'again' (claims are too late), 'offer' (counts that this server may have lost)
local slot_ms, slots = number(), number()
local grace_ms = number()       -- time in which all processes offer what a new server may have lost
local dead_ms = number()        -- time after which a process that was not heard of does not count as in flight
local part_of_left = number()   -- the part of what is left that may be drawn ahead
local heard_to = number()       -- number of the last notice that the process has
local estimate = number()       -- the ledger's time as the process knows it; 0 if it does not
local is_sure = number() == 1   -- the estimate is of a call that was sent again
local test_ms = number()        -- the time of tests; 0 for the server's

-- Time. The ledger's own goes on evenly even if the server's clock is set, or another server's differs: `shift` makes up for it.
local wall
if test_ms > 0 then
  wall = test_ms
else
  local time = call('TIME')
  wall = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
local state_key = base .. 'state'
local state = call('HMGET', state_key, 'epoch', 'open_at', 'shift', 'last', 'notices', 'unsure')
local epoch, open_at = state[1], tonumber(state[2]) or 0
local shift, last = tonumber(state[3]) or 0, tonumber(state[4])
local server = string.match(call('INFO', 'replication'), 'master_replid:(%w+)') or ''
local now = wall + shift
-- A step of the clock is one if both the process and the record of the last call say so. A call that came late seems to say that the
-- clock is ahead; it is sent again to be sure. What no process could say yet is set right by the next one that can.
local STEP_MS = 250
local is_new_server = server ~= epoch
local seems_ahead, is_late = last and now - last > STEP_MS, false
if estimate == 0 then
  if is_new_server or seems_ahead then call('HSET', state_key, 'unsure', '1') end
else
  if math.abs(now - estimate) > STEP_MS then
    local is_back = last and now < last and estimate >= last
    local is_ahead = seems_ahead and estimate < now
    if not last or is_new_server or state[6] or is_back or is_ahead and is_sure then
      shift = estimate - wall
      now, last = estimate, nil
      call('HSET', state_key, 'shift', int(shift))
    elseif is_ahead then
      is_late = true
    end
  end
  if state[6] then call('HDEL', state_key, 'unsure') end
end
if last and now < last then now = last end
if is_new_server and not is_late then
  open_at = now + grace_ms
  call('HSET', state_key, 'epoch', server, 'open_at', int(open_at))
end
if not is_late then call('HSET', state_key, 'last', int(now)) end

-- What this server has of the process.
local member_key = base .. 'member:' .. member
local known = call('HMGET', member_key, 'seq', 'verdict', 'at')
local stored = tonumber(known[1]) or 0
call('HSET', base .. 'heard', member, int(now))

local function reply(status, verdict, counted_at, rows)
  return { status, int(now), int(wall), server, int(open_at), int(stored), verdict, int(counted_at), rows }
end

if is_late then return reply('late', '', now, {}) end

if mode ~= 'offer' and stored < acked then
  -- The last writes of the process are lost, and with them perhaps those of others.
  if open_at < now + grace_ms then
    open_at = now + grace_ms
    call('HSET', state_key, 'open_at', int(open_at))
  end
  return reply('behind', '', now, {})
end

local slot = math.floor(now / slot_ms)
local oldest = slot + 1 - slots

-- Accounts: the sliding minute, and days. Each is read once in a batch, and written once at its end.
local accounts, touched = {}, {}

local function expire(account, from)
  local fields = {}
  for s = from, oldest - 1 do
    fields[#fields + 1] = 'a' .. s
    fields[#fields + 1] = 't' .. s
  end
  local values = call('HMGET', account.minute, unpack(fields))
  for i = 1, #fields, 2 do
    account.a = account.a - (tonumber(values[i]) or 0)
    account.t = account.t - (tonumber(values[i + 1]) or 0)
  end
  call('HDEL', account.minute, unpack(fields))
  account.from = oldest
  account.is_changed = true
end

local function find(id)
  local account = accounts[id]
  if account then return account end
  local minute = base .. 'minute:' .. id
  local head = call('HMGET', minute, 'a', 't', 'from', 'to', 'a' .. slot, 't' .. slot)
  account = {
    id = id, minute = minute, day = base .. 'day:' .. id,
    a = tonumber(head[1]) or 0, t = tonumber(head[2]) or 0,
    from = tonumber(head[3]) or slot, to = tonumber(head[4]) or slot,
    slots = { [slot] = { tonumber(head[5]) or 0, tonumber(head[6]) or 0 } }, changed = {}, lasts = not head[1],
    days = {}, changed_days = {},
  }
  if account.to < oldest then
    call('DEL', minute)
    account.a, account.t, account.from, account.to, account.lasts = 0, 0, slot, slot, true
  elseif account.from < oldest then
    expire(account, account.from)
  end
  accounts[id] = account
  touched[#touched + 1] = account
  return account
end

local function day_of(account, date)
  local day = account.days[date]
  if not day then
    local values = call('HMGET', account.day, 'a' .. date, 't' .. date)
    day = { tonumber(values[1]) or 0, tonumber(values[2]) or 0, not (values[1] or values[2]) }
    account.days[date] = day
  end
  return day
end

-- Adds to the counts of a slot and of days. None becomes negative: what was removed meanwhile cannot be taken back.
local function add(account, s, dates, attempts, tokens)
  if s >= oldest then
    local counts = account.slots[s]
    if not counts then
      local values = call('HMGET', account.minute, 'a' .. s, 't' .. s)
      counts = { tonumber(values[1]) or 0, tonumber(values[2]) or 0 }
      account.slots[s] = counts
    end
    local a, t = math.max(counts[1] + attempts, 0), math.max(counts[2] + tokens, 0)
    account.a = account.a + a - counts[1]
    account.t = account.t + t - counts[2]
    counts[1], counts[2] = a, t
    if s < account.from then account.from = s end
    if s > account.to then account.to, account.lasts = s, true end
    account.changed[s] = true
    account.is_changed = true
  end
  for _, date in ipairs(dates) do
    local day = day_of(account, date)
    day[1], day[2] = math.max(day[1] + attempts, 0), math.max(day[2] + tokens, 0)
    account.changed_days[date] = true
  end
end

local MINUTES_KEPT_MS = 2 * 86400000
local DAYS_KEPT_MS = 400 * 86400000
local DAY_FIELDS_MAX = 900

local function forget_days(account)
  if call('HLEN', account.day) <= DAY_FIELDS_MAX then return end
  local dates = {}
  for _, field in ipairs(call('HKEYS', account.day)) do
    dates[#dates + 1] = string.sub(field, 2)
  end
  table.sort(dates)
  for i = 1, math.floor(#dates / 2) do
    call('HDEL', account.day, 'a' .. dates[i], 't' .. dates[i])
  end
end

local function write_accounts()
  for _, account in ipairs(touched) do
    if account.is_changed then
      local fields = { 'a', int(account.a), 't', int(account.t), 'from', int(account.from), 'to', int(account.to) }
      for s in pairs(account.changed) do
        local counts = account.slots[s]
        fields[#fields + 1], fields[#fields + 2] = 'a' .. s, int(counts[1])
        fields[#fields + 1], fields[#fields + 2] = 't' .. s, int(counts[2])
      end
      call('HSET', account.minute, unpack(fields))
      -- By the server's clock, which may be set: slots are dropped by the ledger's time, and this is for accounts that nobody uses any more.
      if account.lasts then call('PEXPIRE', account.minute, MINUTES_KEPT_MS) end
    end
    for date in pairs(account.changed_days) do
      local day = account.days[date]
      call('HSET', account.day, 'a' .. date, int(day[1]), 't' .. date, int(day[2]))
      if day[3] then
        call('PEXPIRE', account.day, DAYS_KEPT_MS)
        forget_days(account)
        if string.sub(account.id, 1, 7) == 'models:' then
          call('ZADD', base .. 'models', wall, account.id)
          call('ZREMRANGEBYRANK', base .. 'models', 0, -1001)
        end
      end
    end
  end
end

-- Requests in flight: each process writes how many it has, and those of a process that is not heard of do not count.
-- They do again once it is heard of.
local FLIGHTS_KEPT_MS = 86400000
local heard_cache = {}
local function silence_of(other)
  local heard = heard_cache[other]
  if heard == nil then
    heard = tonumber(call('HGET', base .. 'heard', other)) or 0
    heard_cache[other] = heard
  end
  return now - heard
end

local function others_in_flight(id)
  local key, others = base .. 'flight:' .. id, 0
  local rows = call('HGETALL', key)
  for i = 1, #rows, 2 do
    if rows[i] ~= member then
      local silence = silence_of(rows[i])
      if silence < dead_ms then
        others = others + tonumber(rows[i + 1])
      elseif silence > FLIGHTS_KEPT_MS then
        call('HDEL', key, rows[i])
      end
    end
  end
  return others
end

local own_in_flight = {}

local function set_in_flight(id, count)
  own_in_flight[id] = count
  if count > 0 then
    call('HSET', base .. 'flight:' .. id, member, int(count))
  else
    call('HDEL', base .. 'flight:' .. id, member)
  end
end

-- Budgets: what is spent and reserved, by period.
local function budget_key(id)
  return base .. 'budget:' .. id
end

local function budget_of(id, period)
  local values = call('HMGET', budget_key(id), 's' .. period, 'r' .. period)
  return tonumber(values[1]) or 0, tonumber(values[2]) or 0
end

local function change_budget(id, period, ends, spent, reserved)
  local key = budget_key(id)
  local before = { budget_of(id, period) }
  local is_new = call('HEXISTS', key, 'e' .. period) == 0
  call('HSET', key,
    's' .. period, int(math.max(before[1] + spent, 0)), 'r' .. period, int(math.max(before[2] + reserved, 0)))
  if is_new then
    call('HSET', key, 'e' .. period, ends)
    -- Periods that are over are forgotten when another one begins.
    local rows = call('HGETALL', key)
    for i = 1, #rows, 2 do
      local name, value = rows[i], tonumber(rows[i + 1])
      if string.sub(name, 1, 1) == 'e' and value and value > 0 and value < math.floor(wall / 1000) then
        local over = string.sub(name, 2)
        call('HDEL', key, 's' .. over, 'r' .. over, 'e' .. over)
      end
    end
  end
end

-- The latest period that anything was taken in, of those that have begun.
local function latest_period(id)
  local latest
  for _, name in ipairs(call('HKEYS', budget_key(id))) do
    if string.sub(name, 1, 1) == 'e' then
      local period = tonumber(string.sub(name, 2))
      if period * 1000 <= wall and (not latest or period > latest) then latest = period end
    end
  end
  return latest
end

local FIVE_HOURS = 5 * 3600

-- A period of five hours that another process has begun meanwhile is the one that counts.
local function is_current(part)
  if not part.is_five_hours then return true end
  local latest = latest_period(part.budget)
  return not latest or latest == part.period or latest + FIVE_HOURS <= math.floor(wall / 1000)
end

local function read_part()
  return {
    budget = text(), is_five_hours = text() == '1', period = number(), ends = text(),
    amount = text(), known = text(), more = number(), limit = number(), field = text(),
  }
end

local function has_room(part)
  if now < open_at then return false end
  local spent, reserved = budget_of(part.budget, int(part.period))
  return part.more == 0 or spent + reserved + part.more <= part.limit
end

local function reservation_key(owner)
  return base .. 'reserved:' .. owner
end

local function put_reservation(owner, part)
  local row = table.concat({ part.budget, int(part.period), part.amount, part.known }, ' ')
  call('HSET', reservation_key(owner), part.field, row)
  call('SADD', base .. 'owners', owner)
end

-- Claims.
local INFINITE = math.huge

local function read_account()
  local of = { id = text(), rpm = number(), rpd = number(), tpm = number(), tpd = number(), most = number() }
  of.in_flight, of.dates = number(), {}
  for _ = 1, number() do of.dates[#of.dates + 1] = text() end
  return of
end

local function read_set()
  local set = {}
  for _ = 1, number() do set[#set + 1] = read_account() end
  return set
end

local function room_for_tokens(limit, used, each)
  if limit < 0 then return INFINITE end
  if each == 0 then return used < limit and INFINITE or 0 end
  -- What is more than the limit takes all of it.
  if used == 0 then return math.max(math.floor(limit / each), 1) end
  return math.max(math.floor((limit - used) / each), 0)
end

-- Returns how many draws an account has room for, and how many attempts.
local function room(of, each)
  local account = find(of.id)
  local attempts, draws = INFINITE, INFINITE
  local is_limited = of.rpm >= 0 or of.rpd >= 0 or of.tpm >= 0 or of.tpd >= 0 or of.most >= 0
  if is_limited and now < open_at then return 0, 0 end
  if of.rpm >= 0 then attempts = math.min(attempts, of.rpm - account.a) end
  draws = math.min(draws, room_for_tokens(of.tpm, account.t, each))
  for _, date in ipairs(of.dates) do
    if of.rpd >= 0 or of.tpd >= 0 then
      local day = day_of(account, date)
      if of.rpd >= 0 then attempts = math.min(attempts, of.rpd - day[1]) end
      draws = math.min(draws, room_for_tokens(of.tpd, day[2], each))
    end
  end
  if of.most >= 0 then
    draws = math.min(draws, of.most - (own_in_flight[of.id] or of.in_flight) - others_in_flight(of.id))
  end
  return math.min(draws, attempts), attempts
end

local function room_of(set, each)
  local draws, attempts = INFINITE, INFINITE
  for _, of in ipairs(set) do
    local of_draws, of_attempts = room(of, each)
    draws, attempts = math.min(draws, of_draws), math.min(attempts, of_attempts)
  end
  return math.max(draws, 0), math.max(attempts, 0)
end

local function take(set, draws, ahead, each)
  for _, of in ipairs(set) do
    add(find(of.id), slot, of.dates, draws + ahead, draws * each)
    if of.most >= 0 then set_in_flight(of.id, (own_in_flight[of.id] or of.in_flight) + draws) end
  end
end

local function ahead_of(wanted, attempts, draws)
  if wanted == 0 or attempts == INFINITE then return wanted end
  return math.max(math.min(wanted, math.floor((attempts - draws) / part_of_left)), 0)
end

local verdicts = {}

-- Reads. They see what this batch has written.
local reads, read_before = {}, {}

local function read_account_row(id, dates)
  local name = id .. ' ' .. table.concat(dates, ' ')
  if read_before[name] then return end
  read_before[name] = true
  reads[#reads + 1] = function()
    local account = find(id)
    local row, all = { 'account', id }, call('HGETALL', account.minute)
    for i = 1, #all, 2 do
      local kind, s = string.sub(all[i], 1, 1), tonumber(string.sub(all[i], 2))
      if s and s >= oldest and (kind == 'a' or kind == 't') then
        row[#row + 1], row[#row + 2] = all[i], all[i + 1]
      end
    end
    row[#row + 1], row[#row + 2] = 'f', int(others_in_flight(id))
    for _, date in ipairs(dates) do
      local day = day_of(account, date)
      row[#row + 1], row[#row + 2] = 'd' .. date, int(day[1]) .. ' ' .. int(day[2])
    end
    return row
  end
end

local function read_budget_row(id)
  if read_before[id] then return end
  read_before[id] = true
  reads[#reads + 1] = function()
    local row, all = { 'budget', id }, call('HGETALL', budget_key(id))
    for i = 1, #all do row[#row + 1] = all[i] end
    return row
  end
end

-- What has less room than the process thought is read for it.
local function read_again(endpoint, caller, parts)
  for _, set in ipairs({ endpoint, caller }) do
    for _, of in ipairs(set) do read_account_row(of.id, of.dates) end
  end
  for _, part in ipairs(parts) do read_budget_row(part.budget) end
end

local function claim()
  local draws, each = number(), number()
  local ahead_endpoint, ahead_caller = number(), number()
  local endpoint, caller = read_set(), read_set()
  local owner, parts = text(), {}
  for _ = 1, number() do parts[#parts + 1] = read_part() end
  if mode ~= 'first' then
    verdicts[#verdicts + 1] = '0,0,0'
    return
  end
  local of_endpoint, endpoint_attempts = room_of(endpoint, 0)
  local of_caller, caller_attempts = room_of(caller, each)
  local granted = math.min(draws, of_endpoint, of_caller)
  for _, part in ipairs(parts) do
    if not is_current(part) or not has_room(part) then granted = 0 end
  end
  if granted < draws then read_again(endpoint, caller, parts) end
  if granted == 0 then
    verdicts[#verdicts + 1] = '0,0,0'
    return
  end
  local ahead_e, ahead_c = 0, 0
  if granted == draws then
    ahead_e = ahead_of(ahead_endpoint, endpoint_attempts, granted)
    ahead_c = ahead_of(ahead_caller, caller_attempts, granted)
  end
  take(endpoint, granted, ahead_e, 0)
  take(caller, granted, ahead_c, each)
  for _, part in ipairs(parts) do
    put_reservation(owner, part)
    change_budget(part.budget, int(part.period), part.ends, 0, part.more)
  end
  verdicts[#verdicts + 1] = int(granted) .. ',' .. int(ahead_e) .. ',' .. int(ahead_c)
end

local function grow()
  local owner, parts = text(), {}
  for _ = 1, number() do parts[#parts + 1] = read_part() end
  local key = reservation_key(owner)
  if mode ~= 'first' then
    verdicts[#verdicts + 1] = 'none'
    return
  end
  local fits = true
  for _, part in ipairs(parts) do
    if call('HEXISTS', key, part.field) == 0 then
      verdicts[#verdicts + 1] = 'gone'
      return
    end
    fits = fits and has_room(part)
  end
  for _, part in ipairs(parts) do
    local before = tonumber(string.match(call('HGET', key, part.field), '^%S+ %S+ (%d+)')) or 0
    part.amount = int(before + (fits and part.more or 0))
    put_reservation(owner, part)
    if not fits then read_budget_row(part.budget) end
    if fits then change_budget(part.budget, int(part.period), part.ends, 0, part.more) end
  end
  verdicts[#verdicts + 1] = fits and 'done' or 'none'
end

-- Operations.
local operations = {}

function operations.add()
  local id, s, dates = text(), number(), {}
  for _ = 1, number() do dates[#dates + 1] = text() end
  local attempts, tokens = number(), number()
  add(find(id), s, dates, attempts, tokens)
end

function operations.flight()
  local id, count = text(), number()
  set_in_flight(id, count)
end

operations.claim = claim
operations.grow = grow

function operations.budget()
  local id, period, ends, spent, reserved = text(), text(), text(), number(), number()
  change_budget(id, period, ends, spent, reserved)
end

function operations.settle()
  local owner, field, id, period, ends = text(), text(), text(), text(), text()
  local amount, spent, if_gone = number(), number(), number()
  local key = reservation_key(owner)
  local row = call('HGET', key, field)
  if row then
    -- What it has grown by is given back with it, whether the process knows of that or not.
    call('HDEL', key, field)
    change_budget(id, period, ends, spent, -(tonumber(string.match(row, '^%S+ %S+ (%d+)')) or amount))
    if call('EXISTS', key) == 0 then call('SREM', base .. 'owners', owner) end
  elseif if_gone ~= 0 then
    change_budget(id, period, ends, if_gone, 0)
  end
end

function operations.hear()
  call('HSET', base .. 'heard', text(), int(now))
end

-- What processes say to each other: the last word on each subject, in the order in which it was said.
local NOTICES_MAX = 10000
local NOTICES_AT_ONCE = 100

function operations.notice()
  local subject, until_s, said = text(), text(), text()
  local count = call('HINCRBY', state_key, 'notices', 1)
  call('HSET', base .. 'notices', subject, table.concat({ int(count), until_s, member, said }, ' '))
  call('ZADD', base .. 'notices-order', count, subject)
  local surplus = call('ZCARD', base .. 'notices-order') - NOTICES_MAX
  if surplus > 0 then
    local old = call('ZPOPMIN', base .. 'notices-order', surplus)
    for i = 1, #old, 2 do call('HDEL', base .. 'notices', old[i]) end
  end
end

local function add_notices(rows)
  local count_of_all = tonumber(state[5]) or 0
  -- A server that has lost them counts anew.
  if count_of_all < heard_to then heard_to = 0 end
  if count_of_all <= heard_to then return end
  local found = call('ZRANGEBYSCORE', base .. 'notices-order', '(' .. int(heard_to), '+inf', 'WITHSCORES',
    'LIMIT', 0, NOTICES_AT_ONCE)
  for i = 1, #found, 2 do
    local subject = found[i]
    local row = call('HGET', base .. 'notices', subject) or ''
    local count, until_s, of, said = string.match(row, '^(%d+) (%-?%d+) (%x+) (.*)$')
    if count and of ~= member and tonumber(until_s) * 1000 > wall then
      rows[#rows + 1] = { 'notice', subject, until_s, said }
    end
  end
  if #found > 0 then rows[#rows + 1] = { 'heard', found[#found] } end
end

-- Token statistics: rows of packed numbers, and a list of the hours or days that there are.
function operations.tokens()
  local table_name, moment, kept, field, used = text(), text(), number(), text(), number()
  local key, is_new = base .. 'tokens:' .. table_name, false
  if moment ~= '' then
    local list = key
    key = key .. ':' .. moment
    is_new = call('ZADD', list, moment, moment) == 1
    if is_new then call('ZREMRANGEBYSCORE', list, '-inf', math.floor(wall / 1000) - kept) end
  end
  local before, columns = call('HGET', key, field), {}
  for word in string.gmatch(before or '', '%S+') do columns[#columns + 1] = tonumber(word) end
  for i = 1, number() do
    columns[i + 1] = (columns[i + 1] or 0) + number()
  end
  columns[1] = math.max(columns[1] or 0, used)
  for i, value in ipairs(columns) do columns[i] = int(value) end
  call('HSET', key, field, table.concat(columns, ' '))
  if is_new then call('EXPIRE', key, kept) end
end

function operations.read_account()
  local id, dates = text(), {}
  for _ = 1, number() do dates[#dates + 1] = text() end
  read_account_row(id, dates)
end

function operations.read_budget()
  read_budget_row(text())
end

-- A reservation that was made before, offered again.
function operations.reserve()
  local owner, part = text(), read_part()
  put_reservation(owner, part)
  change_budget(part.budget, int(part.period), part.ends, 0, part.more)
end

if mode == 'offer' then
  -- Offered to a server that had this batch last; otherwise it has the offer already.
  if stored ~= seq then return reply('known', '', now, {}) end
elseif seq > 0 and seq <= stored then
  -- It is here already: its reply was lost, or it comes twice.
  return reply(seq == stored and 'known' or 'old', known[2] or '', tonumber(known[3]) or now, {})
end

while at < #ARGV do
  operations[text()]()
end
write_accounts()

local MEMBERS_KEPT_MS = 7 * 86400000

local function forget_members()
  local rows = call('HGETALL', base .. 'heard')
  for i = 1, #rows, 2 do
    if now - tonumber(rows[i + 1]) > MEMBERS_KEPT_MS then
      call('HDEL', base .. 'heard', rows[i])
      call('DEL', base .. 'member:' .. rows[i])
    end
  end
end

local verdict = table.concat(verdicts, ';')
if seq > 0 or mode == 'offer' then
  stored = mode == 'offer' and acked or seq
  call('HSET', member_key, 'seq', int(stored), 'verdict', verdict, 'at', int(now))
  if seq % 4096 == 1 then forget_members() end
end
local rows = {}
for i, read in ipairs(reads) do rows[i] = read() end
add_notices(rows)
return reply('ok', verdict, now, rows)
