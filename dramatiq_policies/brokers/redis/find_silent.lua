-- Write a heartbeat. Then, for one consumer of the queue at a time: find silent workers, and delete expired dead letters.
--
-- KEYS[1]  the broker's namespace
-- ARGV     worker id, queue, heartbeat timeout in ms, pause of other consumers in ms,
--          suffix of worker ids with heartbeats by the clock of the server, offset in the heartbeats, heartbeats to read,
--          ttl of dead letters in ms or '' to keep all, time in ms to watch an old heartbeat at first sight
--
-- Returns {} if another consumer has checked, else {next offset, worker, heartbeat, '1' if the worker holds messages of the
-- queue or '', …}.
--
-- Plain Dramatiq and version 0.1.0 write heartbeats by the clock of the worker, which may be wrong. Such a worker is silent if
-- the heartbeat has not *changed* for the timeout by the clock of the server. `__observed__` has the time of the last change.
--
-- A silent worker of this version without messages of any queue in `__queues__` is removed at once, because consumers add their
-- queue before their first fetch. The queues of other versions are unknown: see `forget.lua`. Key names are Dramatiq's, except
-- `__observed__`, `__queues__` and `__recovery__`.
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

-- Delete expired dead letters, in batches.
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
      -- Either dead for long, or a slow clock.
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
