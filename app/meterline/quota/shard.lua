-- What the clients of one shard share: its generation, whether its buckets may be believed, and how far the
-- log is accounted. Only the quota app calls it. RUN is put before this text by scripts.py.
--
-- KEYS: 1 state
-- ARGV: 1 operation, then its arguments; the answers are described in scripts.py

local call = redis.call
local op = ARGV[1]
local known = call('HMGET', KEYS[1], 'run', 'gen', 'beat', 'partitions')
local run, gen, beat, partitions = known[1], known[2] or '0', known[3], known[4] -- 0: none yet, or lost

if op == 'look' then
  local answer = {RUN}
  for _, text in ipairs(call('HGETALL', KEYS[1])) do answer[#answer + 1] = text end
  return answer
end

if op == 'begin' then -- gen partitions topic skew_ms
  if tonumber(ARGV[2]) <= tonumber(gen) then return 'o' end
  call('DEL', KEYS[1]) -- progress says what *these* buckets have seen: the new, empty ones have seen nothing
  call('HSET', KEYS[1], 'run', RUN, 'gen', ARGV[2], 'open', '0', 'beat', '0',
    'partitions', ARGV[3], 'topic', ARGV[4], 'skew_ms', ARGV[5])
  return 'ok'
end

if gen == '0' or gen ~= ARGV[2] then return '0' end

if op == 'adopt' then -- gen
  call('HSET', KEYS[1], 'run', RUN)
  return 'ok'
end

if run ~= RUN then return 'r' end

if op == 'beat' then -- gen n partitions topic
  -- Never lower: a guardian that stalled and wakes up must not make its successor believe in a roll-back.
  call('HSET', KEYS[1], 'beat', string.format('%.0f', math.max(tonumber(beat), tonumber(ARGV[3]))),
    'partitions', string.format('%.0f', math.max(tonumber(partitions), tonumber(ARGV[4]))), 'topic', ARGV[5])
  return 'ok ' .. beat
end

if op == 'progress' then -- gen topic p published_until accounted_until
  local at = ARGV[3] .. ':' .. ARGV[4]
  local before = call('HMGET', KEYS[1], 'x:' .. at, 't:' .. at)
  if tonumber(ARGV[5]) > tonumber(before[1] or -2) then call('HSET', KEYS[1], 'x:' .. at, ARGV[5]) end
  if tonumber(ARGV[6]) > tonumber(before[2] or -2) then call('HSET', KEYS[1], 't:' .. at, ARGV[6]) end
  return 'ok'
end

if op == 'open' then -- gen
  call('HSET', KEYS[1], 'open', '1')
  return 'ok'
end

return redis.error_reply('ERR unknown operation ' .. op)
