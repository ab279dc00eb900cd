-- All transitions of one client's credit bucket: many operations in one call, answered in order.
--
-- The rules, the operations and their answers are those of meterline/domain/buckets.py, the oracle of the tests.
-- scripts.py checks the operations, packs them flat and puts RUN and the limits in capitals before this text.
--
-- KEYS: 1 state, 2 active, 3 touched, 4 bucket, 5 reservations, 6 due, 7 grants
-- ARGV: 1 client id, 2 prefix of the keys of provisional entries, 3 source partitions "topic:p topic:p",
--       4 JSON array of all operations one after another (scripts.py, `packed`); parts name a source by number
--
-- What the operations need is read at once, decided in Lua, and written back at once: a call into Redis costs as
-- much as a whole operation does here. Nothing is written before all of it is decided, except where a drop or a
-- sweep must see what this very call has added. Numbers are doubles, exact up to MICRO_MAX; '%d' prints them
-- exactly on a 64-bit server, which scripts.py checks.

local call, format, find, match, unpack = redis.call, string.format, string.find, string.match, unpack
local client, prefix = ARGV[1], ARGV[2]
local flat = cjson.decode(ARGV[4])
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local ARGUMENTS_MAX = 4000 -- of one call into Redis: Lua's stack holds 8000 values. Even: they come in pairs

-- ---------------------------------------------------------------- what the operations name

local sources = {} -- a source partition: what is known of it, and what this call adds
for name in string.gmatch(ARGV[3], '%S+') do
  sources[#sources + 1] = {
    name = name, key = prefix .. name .. ':' .. client, cutoff = -1, life = 0, progress = -1, settled = -1,
    members = {}, known = {}, added = {},
  }
end

local LENGTHS = {r = 4, v = 2, n = 5, b = 1, T = 4, G = 3, P = 4, A = 3, e = 1}
local starts, op_count = {}, 0 -- where in `flat` each operation begins
local part_members, part_count = {}, 0 -- "offset:credits" of every part, in order
local records, rids, rid_count = {}, {}, 0 -- reservation id -> record; false: unknown

local function read_parts(at)
  local last = at + 3 * flat[at]
  for i = at + 1, last, 3 do
    local members = sources[flat[i]].members
    local member = format('%d:%d', flat[i + 1], flat[i + 2])
    part_count = part_count + 1
    part_members[part_count] = member
    members[#members + 1] = member
  end
  return last + 1
end

local at, size = 1, #flat
while at <= size do
  local kind, rid = flat[at], flat[at + 1]
  op_count = op_count + 1
  starts[op_count] = at
  if kind == 's' then
    at = read_parts(at + 3)
  elseif kind == 'l' then
    at = read_parts(at + 6)
  else
    at = at + LENGTHS[kind]
    if kind ~= 'r' and kind ~= 'n' and kind ~= 'v' then rid = nil end
  end
  if rid and records[rid] == nil then
    records[rid] = false
    rid_count = rid_count + 1
    rids[rid_count] = rid
  end
end

-- ---------------------------------------------------------------- what Redis knows

local state_fields = {'run', 'gen', 'open'}
local bucket_fields = {'gen', 'granted', 'base', 'life', 'prov', 'held', 'period', 'parts'}
for i = 1, #sources do
  state_fields[3 + i] = 'x:' .. sources[i].name
  bucket_fields[8 + i] = 'c:' .. sources[i].name
end
local state = call('HMGET', KEYS[1], unpack(state_fields))
local bucket = call('HMGET', KEYS[4], unpack(bucket_fields))

-- The text of this script names the process it was loaded into: a server that was restarted since the shard's
-- generation began, or that lost it, is not believed.
local trusted = state[1] == RUN
local open = trusted and state[3] == '1'
local gen = state[2] or '0'

if bucket[1] and bucket[1] ~= gen then -- an older generation's: nothing in it counts any more
  local stale = {KEYS[4], KEYS[5], KEYS[6], KEYS[7]}
  for name in string.gmatch(bucket[8] or '', '%S+') do stale[#stale + 1] = prefix .. name .. ':' .. client end
  call('UNLINK', unpack(stale))
  bucket = {}
end

local granted, base, life = tonumber(bucket[2] or 0), tonumber(bucket[3] or 0), tonumber(bucket[4] or 0)
local prov, held = tonumber(bucket[5] or 0), tonumber(bucket[6] or 0)
local period = bucket[7] and tonumber(bucket[7])
local listed, listed_changed = {}, false -- names of the sources that have provisional entries
for name in string.gmatch(bucket[8] or '', '%S+') do listed[name] = true end

for i = 1, #sources do
  local source = sources[i]
  local members, known = source.members, source.known
  if bucket[8 + i] then
    local cutoff, sum = match(bucket[8 + i], '^(%d+) (-?%d+)$')
    source.cutoff, source.life = tonumber(cutoff), tonumber(sum)
  end
  source.progress = tonumber(state[3 + i] or -1)
  source.settled = math.max(source.cutoff, source.progress)
  if listed[source.name] then
    for first = 1, #members, ARGUMENTS_MAX do
      local last = math.min(first + ARGUMENTS_MAX - 1, #members)
      local scores = call('ZMSCORE', source.key, unpack(members, first, last))
      for j = 1, #scores do
        if scores[j] then known[members[first + j - 1]] = true end
      end
    end
  end
end

local function parsed(text)
  local word, hold, reserved, time, seq, parts = match(text, '^(%a+) (%d+) (%d+) (%d+) (%d+) (.+)$')
  return {
    state = word, hold = tonumber(hold), n = tonumber(reserved), time = tonumber(time), seq = tonumber(seq),
    parts = parts == '-' and '' or parts, dirty = false,
  }
end

for first = 1, rid_count, ARGUMENTS_MAX do
  local last = math.min(first + ARGUMENTS_MAX - 1, rid_count)
  local texts = call('HMGET', KEYS[5], unpack(rids, first, last))
  for j = 1, #texts do
    if texts[j] then records[rids[first + j - 1]] = parsed(texts[j]) end
  end
end

-- ---------------------------------------------------------------- what will be written

local changed, touched, refused, swept, more_due, look_at = false, false, false, false, false, nil
local fields, field_count = {}, 0
local dirty, dirty_count = {}, 0 -- ids of the records that changed
local grants, grant_ids = {}, {}

local function write(rid, record)
  changed = true
  if not record.dirty then
    record.dirty = true
    dirty_count = dirty_count + 1
    dirty[dirty_count] = rid
  end
end

local function set(field, value)
  fields[field_count + 1], fields[field_count + 2] = field, value
  field_count = field_count + 2
  changed = true
end

local function call_in_pieces(command, key, arguments)
  local count = #arguments
  if count <= ARGUMENTS_MAX then
    call(command, key, unpack(arguments))
    return
  end
  for first = 1, count, ARGUMENTS_MAX do
    call(command, key, unpack(arguments, first, math.min(first + ARGUMENTS_MAX - 1, count)))
  end
end

local function write_bucket()
  if listed_changed then
    local names = {}
    for name in pairs(listed) do names[#names + 1] = name end
    table.sort(names)
    set('parts', table.concat(names, ' '))
    listed_changed = false
  end
  if bucket[1] ~= gen then
    set('gen', gen)
    bucket[1] = gen
  end
  set('prov', format('%d', prov))
  set('held', format('%d', held))
  call_in_pieces('HSET', KEYS[4], fields)
  fields, field_count, changed = {}, 0, false
end

local function write_records()
  local texts, times = {}, {}
  for i = 1, dirty_count do
    local rid = dirty[i]
    local record = records[rid]
    local time, parts, pair = record.time, record.parts, 2 * i
    texts[pair - 1] = rid
    texts[pair] = format('%s %d %d %d %d %s',
      record.state, record.hold, record.n, time, record.seq, parts == '' and '-' or parts)
    times[pair - 1], times[pair] = time, rid
    record.dirty = false
    if not look_at or time < look_at then look_at = time end
  end
  call_in_pieces('HSET', KEYS[5], texts)
  call_in_pieces('ZADD', KEYS[6], times)
  dirty, dirty_count = {}, 0
end

local function write_back()
  if changed then write_bucket() end
  if dirty_count > 0 then write_records() end
  for i = 1, #sources do
    local source = sources[i]
    if source.added[1] then
      call_in_pieces('ZADD', source.key, source.added)
      source.added = {}
      look_at = math.min(look_at or now + SWEEP_MS, now + SWEEP_MS)
    end
  end
  if grant_ids[1] then
    call_in_pieces('SADD', KEYS[7], grant_ids)
    grant_ids = {}
  end
end

-- ---------------------------------------------------------------- rules

local TOO_LARGE = 'e beyond 9007199254740991 micro-credits a bucket is not exact'

local function available() return granted - (life - base) - prov - held end

-- Every step on the way to `available` is exact, or the operation is refused.
local function fits(granted_, base_, life_, prov_, held_)
  local most, least = MICRO_MAX, -MICRO_MAX
  local used = life_ - base_
  local left = granted_ - used
  local low = left - prov_
  local rest = low - held_
  return prov_ <= most and held_ <= most and rest >= least and rest <= most and low >= least and low <= most
    and left >= least and left <= most and used >= least and used <= most
    and granted_ >= least and granted_ <= most and base_ >= least and base_ <= most
    and life_ >= least and life_ <= most
end

-- A hold may be taken again only where the caller's generation, or its server, was lost.
local function lost_since(callers_gen) return not trusted or callers_gen < tonumber(gen) end

local function new_record(word, hold, time, seq, parts)
  return {state = word, hold = hold, n = hold, time = time, seq = seq, parts = parts, dirty = false}
end

local function finish(rid, record, word)
  held = held - record.hold
  record.hold, record.state, record.time = 0, word, now + TERMINAL_KEEP_MS
  write(rid, record)
end

local part_no = 0 -- parts are met in the order in which they were read

-- The parts from `at` on become provisional unless a total or the progress covers them, or they are known.
-- With a record, only parts new to it count, and each lowers its hold. All of them or, refused, none.
local function take_parts(at, record, extra_hold)
  local count = flat[at]
  local hold, text, new, sum, fresh = 0, '', 0, 0, nil
  if record then hold, text = record.hold, record.parts end
  for i = at + 1, at + 3 * count, 3 do
    local source, offset, amount = sources[flat[i]], flat[i + 1], flat[i + 2]
    part_no = part_no + 1
    local member = part_members[part_no]
    local counts = true
    if record then
      local position = format(',%s:%d:', source.name, offset)
      if text ~= '' and find(text, position, 1, true) then
        counts = false
      else
        text = format('%s%s%d', text, position, amount)
        hold = amount < hold and hold - amount or 0
        new = new + 1
      end
    end
    if counts and amount > 0 and offset > source.settled and not source.known[member] then
      source.known[member] = true
      sum = sum + amount
      fresh = fresh or {}
      fresh[#fresh + 1] = i
      fresh[#fresh + 1] = member
    end
  end
  local lowered = record and record.hold - hold or 0
  local refusal
  if new > 0 and #text > 8 * PARTS_MAX and select(2, string.gsub(text, ',', '')) > PARTS_MAX then
    refusal = 'e a reservation has at most ' .. PARTS_MAX .. ' parts'
  elseif not fits(granted, base, life, prov + sum, held - lowered + extra_hold) then
    refusal = TOO_LARGE
  end
  if fresh then
    for i = 1, #fresh, 2 do
      local source, member = sources[flat[fresh[i]]], fresh[i + 1]
      if refusal then
        source.known[member] = nil
      else
        local added, last = source.added, #source.added
        added[last + 1], added[last + 2] = flat[fresh[i] + 1], member
        if not listed[source.name] then listed[source.name], listed_changed = true, true end
      end
    end
  end
  if refusal then return refusal end
  if sum > 0 then prov, changed = prov + sum, true end
  if record then
    held = held - lowered
    record.hold, record.parts = hold, text
  end
  return nil, new
end

-- ---------------------------------------------------------------- operations of tasks

local run, grant_answers = {}, {}

local function grant_answer(time) return format('g %d %s', time, gen) end

function run.r(at)
  local rid, n, ttl = flat[at + 1], flat[at + 2], flat[at + 3]
  if not trusted then return 'c' end
  local record = records[rid]
  if record then
    if record.state ~= 'held' then return record.state == 'settled' and 'd' or 't' end
    if record.n ~= n then return format('x %d', record.n) end
    return grant_answer(record.time)
  end
  if not open then return 'c' end
  local left = available()
  if left < n then
    refused = true
    return format('r %d', left)
  end
  held = held + n
  record = new_record('held', n, now + ttl, 0, '')
  records[rid] = record
  write(rid, record)
  local answer = grant_answers[ttl]
  if not answer then
    answer = grant_answer(now + ttl)
    grant_answers[ttl] = answer
  end
  return answer
end

function run.s(at)
  local rid, final = flat[at + 1], flat[at + 2] == 1
  local record = records[rid]
  local unknown = not record
  if unknown then record = final and new_record('unknown', 0, 0, 0, '') or nil end
  local refusal, new = take_parts(at + 3, record, 0)
  if refusal then return refusal end
  if not record then return 'ok' end
  if unknown then records[rid] = record end
  if final and record.state ~= 'settled' then
    finish(rid, record, 'settled')
  elseif new > 0 then
    write(rid, record)
  end
  return 'ok'
end

function run.v(at)
  local rid = flat[at + 1]
  local record = records[rid]
  if not record then
    -- Remembered: a reserve under way when its caller gave up must not take a hold that nobody will free.
    record = new_record('void', 0, now + TERMINAL_KEEP_MS, 0, '')
    records[rid] = record
    write(rid, record)
    return 'u'
  end
  if record.state == 'held' then finish(rid, record, record.parts == '' and 'void' or 'settled') end
  return record.state == 'settled' and 's' or 'ok'
end

function run.n(at)
  local rid, n, ttl = flat[at + 1], flat[at + 2], flat[at + 3]
  local record = records[rid]
  if not record then
    if not lost_since(flat[at + 4]) then return 'l' end
    if not fits(granted, base, life, prov, held + n) then return TOO_LARGE end
    held = held + n
    record = new_record('held', n, now + ttl, 0, '')
    records[rid] = record
    write(rid, record)
  elseif record.state ~= 'held' then
    return 'l'
  elseif record.time < now + ttl then
    record.time = now + ttl
    write(rid, record)
  end
  return grant_answer(record.time)
end

function run.b()
  return format('%d %d %d %d %d %s %s %s',
    granted, life - base, prov, held, available(), open and '1' or '0', gen, period and format('%d', period) or '-')
end

-- ---------------------------------------------------------------- leases, the log and the sweep

-- Made only when asked for: a closure costs as much as a tenth of an operation.
local function rare_operations()
  local rare = {}

  local function drop_provisional(name, upto)
    local key, bound = prefix .. name .. ':' .. client, format('%d', upto)
    local gone = call('ZRANGE', key, '-inf', bound, 'BYSCORE')
    if #gone == 0 then return end
    for i = 1, #gone do prov = prov - tonumber(match(gone[i], ':(%d+)$')) end
    call('ZREMRANGEBYSCORE', key, '-inf', bound)
    if call('EXISTS', key) == 0 then listed[name], listed_changed = nil, true end
    changed = true
  end

  -- Everything appended before this moment, less the skew, is accounted; nil: not known of every partition.
  local function log_clock()
    local known = call('HMGET', KEYS[1], 'partitions', 'topic', 'skew_ms')
    local names = {}
    for p = 0, tonumber(known[1] or 0) - 1 do names[p + 1] = 't:' .. known[2] .. ':' .. p end
    if #names == 0 then return nil end
    local least = math.huge
    local times = call('HMGET', KEYS[1], unpack(names))
    for i = 1, #names do
      if not times[i] then return nil end
      least = math.min(least, tonumber(times[i]))
    end
    return least - tonumber(known[3] or 0)
  end

  function rare.l(at)
    local rid, seq, hold, ttl = flat[at + 1], flat[at + 2], flat[at + 3], flat[at + 4]
    local record = records[rid]
    local taken_again = not record and lost_since(flat[at + 5])
    local has_parts = flat[at + 6] > 0
    local refusal = take_parts(at + 6, nil, taken_again and hold or 0)
    if refusal then return refusal end
    if taken_again then
      held = held + hold
      record = new_record('held', hold, now + ttl, seq, has_parts and '+' or '')
      records[rid] = record
      write(rid, record)
      return format('g %d %d', record.time, hold)
    end
    if not record or record.state ~= 'held' then return 'l' end
    if seq <= record.seq then return 'o' end
    -- What its parts were held for is provisional, or charged, from now on: only the rest still stands.
    local standing = record.hold
    for i = at + 7, at + 6 + 3 * flat[at + 6], 3 do standing = standing - math.min(standing, flat[i + 2]) end
    if hold > standing and (not open or available() < hold - record.hold) then hold = standing end
    held = held + (hold - record.hold) -- in this order every step is exact
    record.hold, record.seq, record.time = hold, seq, math.max(record.time, now + ttl)
    -- A lease has very many parts and states its hold absolutely: that there were some is enough to keep.
    if has_parts and record.parts == '' then record.parts = '+' end
    write(rid, record)
    return format('g %d %d', record.time, hold)
  end

  function rare.T(at)
    local source, cutoff, sum = sources[flat[at + 1]], flat[at + 2], flat[at + 3]
    if cutoff <= source.cutoff then return cutoff == source.cutoff and sum ~= source.life and '!' or 'o' end
    local change = sum - source.life
    local after = life + change
    if math.abs(change) > MICRO_MAX or not fits(granted, base, after, prov, held) then return TOO_LARGE end
    write_back() -- entries of this very call may be among those to drop
    life, source.cutoff, source.life = after, cutoff, sum
    source.settled = math.max(cutoff, source.progress)
    set('c:' .. source.name, format('%d %d', cutoff, sum))
    set('life', format('%d', life))
    touched = true
    if listed[source.name] then drop_provisional(source.name, cutoff) end
    return 'ok'
  end

  function rare.G(at)
    local id, amount = flat[at + 1], flat[at + 2]
    if grants[id] or call('SISMEMBER', KEYS[7], id) == 1 then return 'o' end
    if not fits(granted + amount, base, life, prov, held) then return TOO_LARGE end
    granted, grants[id] = granted + amount, true
    grant_ids[#grant_ids + 1] = id
    set('granted', format('%d', granted))
    return 'ok'
  end

  function rare.P(at)
    local start, sum, amount = flat[at + 1], flat[at + 2], flat[at + 3]
    if period and start <= period then return 'o' end
    if not fits(amount, sum, life, prov, held) then return TOO_LARGE end
    period, base, granted = start, sum, amount
    set('period', format('%d', period))
    set('base', format('%d', base))
    set('granted', format('%d', granted))
    return 'ok'
  end

  function rare.A(at)
    local field = 'al:' .. flat[at + 1] .. ':' .. flat[at + 2]
    if call('HSETNX', KEYS[4], field, '1') == 0 then return '0' end
    changed = true
    return '1'
  end

  function rare.e()
    write_back()
    swept = true
    local accounted = log_clock()
    local expired, forgotten = 0, {}
    local due = call('ZRANGE', KEYS[6], '-inf', format('(%d', now), 'BYSCORE', 'LIMIT', 0, SWEEP_MAX)
    local texts = due[1] and call('HMGET', KEYS[5], unpack(due)) or {}
    for i = 1, #due do
      local rid, record = due[i], parsed(texts[i])
      if record.state ~= 'held' then
        forgotten[#forgotten + 1] = rid
        records[rid] = false
      elseif accounted and accounted >= record.time then
        records[rid] = record
        finish(rid, record, 'expired')
        expired = expired + 1
      end
    end
    if forgotten[1] then
      call('HDEL', KEYS[5], unpack(forgotten))
      call('ZREM', KEYS[6], unpack(forgotten))
    end
    more_due = #due == SWEEP_MAX and expired + #forgotten > 0
    local names = {}
    for name in pairs(listed) do names[#names + 1] = name end
    for i = 1, #names do
      local progress = call('HGET', KEYS[1], 'x:' .. names[i])
      if progress then drop_provisional(names[i], tonumber(progress)) end
    end
    return 'ok ' .. expired
  end

  return rare
end

local answers, rare = {}, nil
for i = 1, op_count do
  local at = starts[i]
  local operation = run[flat[at]]
  if not operation then
    rare = rare or rare_operations()
    operation = rare[flat[at]]
  end
  answers[i] = operation(at)
end
write_back()

if touched then call('SADD', KEYS[3], 't:' .. client) end
if refused then call('SADD', KEYS[3], 'r:' .. client) end
if swept then
  local first = call('ZRANGE', KEYS[6], 0, 0, 'WITHSCORES')
  local soon = now + SWEEP_MS
  if more_due then
    call('ZADD', KEYS[2], now, client)
  elseif next(listed) then
    call('ZADD', KEYS[2], soon, client)
  elseif first[2] then
    call('ZADD', KEYS[2], math.max(tonumber(first[2]), soon), client)
  else
    call('ZREM', KEYS[2], client)
  end
elseif look_at then
  call('ZADD', KEYS[2], 'LT', look_at, client)
end
return answers
