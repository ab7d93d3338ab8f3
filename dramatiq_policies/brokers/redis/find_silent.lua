-- Say that this worker lives. For the one that looks after a queue at this time: find the workers that have fallen silent.
--
-- KEYS[1]  the broker's namespace
-- ARGV     the worker's id, queue, for how many ms a living worker may be silent, for how many ms nobody else need look,
--          the end of ids whose heartbeats are by the server's clock, where in the heartbeats to begin, how many to read,
--          for how many ms dead letters are kept or '' to leave them, for how many ms to watch an old heartbeat that is seen first
--
-- Returns {} if another looks, else {where to go on, worker, its heartbeat, '1' if it holds messages of the queue or '', …}.
--
-- Plain Dramatiq, and 0.1.0 of this library, write heartbeats by the worker's clock, which may be wrong: so such a worker is
-- silent if its heartbeat has not *changed* for so long by the server's clock. When each was seen to change stands in
-- `__observed__`.
--
-- A silent worker of this version that holds nothing of any queue in `__queues__` is forgotten at once: its consumers have
-- added their queues before they took anything. Which queues another version reads is not known: see `forget.lua`. Key names
-- are Dramatiq's, but for `__observed__`, `__queues__` and `__recovery__`.
local namespace = KEYS[1]
local me, queue, timeout, pause, suffix = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local from, most, kept, watch = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local heartbeats = namespace .. ':__heartbeats__'
local observed = namespace .. ':__observed__'

redis.call('sadd', namespace .. ':__queues__', queue)
local time = redis.call('time')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('zadd', heartbeats, now, me)
if not redis.call('set', namespace .. ':__recovery__.' .. queue, '1', 'nx', 'px', pause) then
  return {}
end

-- Dead letters that have been kept long enough, some at a time.
if kept then
  local letters = namespace .. ':' .. queue .. '.XQ'
  for _, id in ipairs(redis.pcall('zrangebyscore', letters, '-inf', now - kept, 'limit', 0, 5000)) do
    redis.call('zrem', letters, id)
    redis.call('hdel', letters .. '.msgs', id)
  end
end

local function by_server_clock(worker)
  return string.sub(worker, -#suffix) == suffix
end

local function is_silent(worker, beat)
  if by_server_clock(worker) then
    return tonumber(beat) <= now - timeout
  end
  local seen = redis.call('hget', observed, worker)
  local since = seen and string.match(seen, '^(%d+) ')
  if not since or string.sub(seen, #since + 2) ~= beat then
    since = now
    if not seen and tonumber(beat) <= now - timeout then
      -- It has either been dead for long, or a clock that is behind.
      since = now - math.max(0, timeout - watch)
    end
    redis.call('hset', observed, worker, string.format('%d %s', since, beat))
  end
  return tonumber(since) <= now - timeout
end

if from >= redis.call('zcard', heartbeats) then
  from = 0
end
local function holds(worker, of)
  return redis.call('exists', namespace .. ':__acks__.' .. worker .. '.' .. of) == 1
end

local queues = redis.call('smembers', namespace .. ':__queues__')
local function holds_anything(worker)
  for _, of in ipairs(queues) do
    if holds(worker, of) then
      return true
    end
  end
  return false
end

local entries = redis.call('zrange', heartbeats, from, from + most - 1, 'withscores')
local found = {from + most}
for i = 1, #entries, 2 do
  local worker, beat = entries[i], entries[i + 1]
  if worker ~= me and is_silent(worker, beat) then
    if by_server_clock(worker) and not holds_anything(worker) then
      redis.call('zrem', heartbeats, worker)
      found[1] = found[1] - 1
    else
      found[#found + 1] = worker
      found[#found + 1] = beat
      found[#found + 1] = holds(worker, queue) and '1' or ''
    end
  end
end
return found
