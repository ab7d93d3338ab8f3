-- The index of delayed messages, by due time.
--
-- KEYS[1]  the broker's namespace
-- ARGV     command, broker id, delay queue, then:
--   add      for each message: redis id, due time (ms). Moves the messages from the unacked set of this worker to the index.
--   fetch    current time (ms), limit. Moves due messages from the index to the unacked set of this worker. Returns the due
--            time of the next message or false, then for each due message: redis id, body.
--   release  heartbeat timeout (ms), limit. Requeues messages, unless another worker uses the index. Returns the count.
--
-- The ids in the index form the unacked set of a pseudo worker. Each call renews the heartbeat of the pseudo worker. Once no
-- worker calls this script (all run plain Dramatiq or 0.1.0), the recovery of dead workers, Dramatiq's or ours, requeues the
-- messages. The unacked set is the truth: an entry of the index without an id in the set is ignored. Other key names are
-- Dramatiq's.
local namespace, command, worker, queue = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local pseudo_worker = 'dramatiq_policies.delayed.' .. queue
local index_unacked = namespace .. ':__acks__.' .. pseudo_worker .. '.' .. queue
local worker_unacked = namespace .. ':__acks__.' .. worker .. '.' .. queue
local ready_queue = namespace .. ':' .. queue
local bodies = ready_queue .. '.msgs'
local index = namespace .. ':__delayed__.' .. queue
local users = index .. '.workers'
local heartbeats = namespace .. ':__heartbeats__'
local clock = redis.call('time')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

if command == 'add' then
  for i = 4, #ARGV, 2 do
    if redis.call('srem', worker_unacked, ARGV[i]) == 1 then
      redis.call('sadd', index_unacked, ARGV[i])
      redis.call('zadd', index, ARGV[i + 1], ARGV[i])
    end
  end
end

local reply = {false}
if command == 'fetch' then
  for _, id in ipairs(redis.call('zrangebyscore', index, '-inf', ARGV[4], 'limit', 0, ARGV[5])) do
    redis.call('zrem', index, id)
    if redis.call('srem', index_unacked, id) == 1 then
      local body = redis.call('hget', bodies, id)
      if body then
        redis.call('sadd', worker_unacked, id)
        reply[#reply + 1] = id
        reply[#reply + 1] = body
      end
    end
  end
  local nearest = redis.call('zrange', index, 0, 0, 'withscores')
  reply[1] = nearest[2] or false
end

if command == 'release' then
  redis.call('zrem', users, worker)
  reply = 0
  if redis.call('zcount', users, now - ARGV[4], '+inf') == 0 then
    local ids = redis.call('zrange', index, 0, ARGV[5] - 1)
    if #ids == 0 then
      ids = redis.call('srandmember', index_unacked, ARGV[5])
    end
    for _, id in ipairs(ids) do
      redis.call('zrem', index, id)
      if redis.call('srem', index_unacked, id) == 1 and redis.call('hexists', bodies, id) == 1 then
        redis.call('rpush', ready_queue, id)
      end
    end
    reply = #ids
  end
else
  redis.call('zadd', users, now, worker)
end

if redis.call('exists', index_unacked) == 1 then
  redis.call('zadd', heartbeats, now, pseudo_worker)
else
  redis.call('zrem', heartbeats, pseudo_worker)
  redis.call('del', index, users)
end
return reply
