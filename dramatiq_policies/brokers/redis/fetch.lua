-- Take messages off a queue, each with the id under which it lies, and say that this worker lives.
--
-- KEYS[1]  the broker's namespace
-- ARGV     the worker's id, queue, how many at most
--
-- Returns {id, body, '1' if it comes back from a worker that died or '', …}. An id without a body was acked at an earlier
-- turn: it is left out. The heartbeat is by the server's clock. Key names are Dramatiq's, but for `__redelivered__`.
local namespace = KEYS[1]
local worker, queue, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
local waiting = namespace .. ':' .. queue
local redelivered = namespace .. ':__redelivered__.' .. queue

local time = redis.call('time')
redis.call('zadd', namespace .. ':__heartbeats__', time[1] * 1000 + math.floor(time[2] / 1000), worker)

local some_marked = redis.call('exists', redelivered) == 1
local taken = {}
while #taken < 3 * most do
  local id = redis.call('lpop', waiting)
  if not id then
    break
  end
  local body = redis.call('hget', waiting .. '.msgs', id)
  if body then
    redis.call('sadd', namespace .. ':__acks__.' .. worker .. '.' .. queue, id)
    taken[#taken + 1] = id
    taken[#taken + 1] = body
    taken[#taken + 1] = some_marked and redis.call('zscore', redelivered, id) and '1' or ''
  end
end
return taken
