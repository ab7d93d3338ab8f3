-- Fetch messages, and write a heartbeat by the clock of the server.
--
-- KEYS[1]  the broker's namespace
-- ARGV     worker id, queue, limit
--
-- Returns {redis id, body, '1' if recovered from a dead worker or '', …}. Ids without a body are acknowledged already, and skipped.
-- Key names are Dramatiq's, except `__redelivered__`.
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
