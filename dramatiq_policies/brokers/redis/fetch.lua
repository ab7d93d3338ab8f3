-- Fetch messages, and write a heartbeat by the clock of the server.
--
-- KEYS[1]  the broker's namespace
-- ARGV     worker id, queue, limit
--
-- Returns {redis id, body, '1' if recovered from a dead worker or '', …}. Ids without a body are acknowledged already, and skipped.
-- Key names are Dramatiq's, except `__redelivered__`.
local namespace = KEYS[1]
local worker, queue, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
local ready_queue = namespace .. ':' .. queue
local redelivered = namespace .. ':__redelivered__.' .. queue

local time = redis.call('time')
redis.call('zadd', namespace .. ':__heartbeats__', time[1] * 1000 + math.floor(time[2] / 1000), worker)

local any_redelivered = redis.call('exists', redelivered) == 1
local fetched = {}
while #fetched < 3 * limit do
  local id = redis.call('lpop', ready_queue)
  if not id then
    break
  end
  local body = redis.call('hget', ready_queue .. '.msgs', id)
  if body then
    redis.call('sadd', namespace .. ':__acks__.' .. worker .. '.' .. queue, id)
    fetched[#fetched + 1] = id
    fetched[#fetched + 1] = body
    fetched[#fetched + 1] = any_redelivered and redis.call('zscore', redelivered, id) and '1' or ''
  end
end
return fetched
