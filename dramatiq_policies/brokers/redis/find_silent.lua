-- Write a heartbeat. Then, for one consumer of the queue at a time: find silent workers, and delete expired dead letters.
--
-- KEYS[1]  the broker's namespace
-- ARGV     worker id, queue, heartbeat timeout in ms, pause of other consumers in ms,
--          suffix of worker ids with heartbeats by the clock of the server, offset in the heartbeats, heartbeats to read,
--          ttl of dead letters in ms or '' to keep all, time in ms to observe an old heartbeat at first sight
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
local own_id, queue, timeout, pause, suffix = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local offset, page_size = tonumber(ARGV[6]), tonumber(ARGV[7])
local dead_letter_ttl, observation_ms = tonumber(ARGV[8]), tonumber(ARGV[9])
local heartbeats = namespace .. ':__heartbeats__'
local observed = namespace .. ':__observed__'

redis.call('sadd', namespace .. ':__queues__', queue)
local time = redis.call('time')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('zadd', heartbeats, now, own_id)
if not redis.call('set', namespace .. ':__recovery__.' .. queue, '1', 'nx', 'px', pause) then
  return {}
end

-- Delete expired dead letters, in batches.
if dead_letter_ttl then
  local dead_letters = namespace .. ':' .. queue .. '.XQ'
  for _, id in ipairs(redis.pcall('zrangebyscore', dead_letters, '-inf', now - dead_letter_ttl, 'limit', 0, 5000)) do
    redis.call('zrem', dead_letters, id)
    redis.call('hdel', dead_letters .. '.msgs', id)
  end
end

local function by_server_clock(worker)
  return string.sub(worker, -#suffix) == suffix
end

local function is_silent(worker, heartbeat)
  if by_server_clock(worker) then
    return tonumber(heartbeat) <= now - timeout
  end
  local last_change = redis.call('hget', observed, worker)
  local since = last_change and string.match(last_change, '^(%d+) ')
  if not since or string.sub(last_change, #since + 2) ~= heartbeat then
    since = now
    if not last_change and tonumber(heartbeat) <= now - timeout then
      -- Either dead for long, or a slow clock.
      since = now - math.max(0, timeout - observation_ms)
    end
    redis.call('hset', observed, worker, string.format('%d %s', since, heartbeat))
  end
  return tonumber(since) <= now - timeout
end

if offset >= redis.call('zcard', heartbeats) then
  offset = 0
end
local function holds(worker, other_queue)
  return redis.call('exists', namespace .. ':__acks__.' .. worker .. '.' .. other_queue) == 1
end

local queues = redis.call('smembers', namespace .. ':__queues__')
local function holds_anything(worker)
  for _, other_queue in ipairs(queues) do
    if holds(worker, other_queue) then
      return true
    end
  end
  return false
end

local entries = redis.call('zrange', heartbeats, offset, offset + page_size - 1, 'withscores')
local reply = {offset + page_size}
for i = 1, #entries, 2 do
  local worker, heartbeat = entries[i], entries[i + 1]
  if worker ~= own_id and is_silent(worker, heartbeat) then
    if by_server_clock(worker) and not holds_anything(worker) then
      redis.call('zrem', heartbeats, worker)
      reply[1] = reply[1] - 1
    else
      reply[#reply + 1] = worker
      reply[#reply + 1] = heartbeat
      reply[#reply + 1] = holds(worker, queue) and '1' or ''
    end
  end
end
return reply
