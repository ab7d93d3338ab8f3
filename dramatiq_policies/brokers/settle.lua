-- Take one message off its queue's unacked set and, in the same step, put in place what follows from it.
--
-- KEYS[1]  the broker's namespace
-- ARGV     now (ms), broker id, queue, the message's redis id, its dead-letter queue or '', the dead letter's body,
--          then for each message that follows: queue, redis id, body
--
-- Removing the id is the condition of all else: a call that is repeated after a lost reply does nothing, and so does
-- one for a message that was given to another worker meanwhile. Key names are Dramatiq's.
local namespace = KEYS[1]
local now, broker_id, queue, id, dead_queue, dead = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

if redis.call('srem', namespace .. ':__acks__.' .. broker_id .. '.' .. queue, id) == 0 then
  return 0
end
redis.call('hdel', namespace .. ':' .. queue .. '.msgs', id)
if dead_queue ~= '' then
  local letters = namespace .. ':' .. dead_queue .. '.XQ'
  redis.call('zadd', letters, now, id)
  redis.call('hset', letters .. '.msgs', id, dead)
end
for i = 7, #ARGV, 3 do
  local target = namespace .. ':' .. ARGV[i]
  redis.call('hset', target .. '.msgs', ARGV[i + 1], ARGV[i + 2])
  redis.call('rpush', target, ARGV[i + 1])
end
return 1
