-- Remove one message from the dead letters of a queue, or from the queue, and enqueue its successor in the same step.
--
-- KEYS[1]  the broker's namespace
-- ARGV     'dead' or 'ready', queue, redis id, expected position in the queue, id to leave at this position,
--          then the successor, if any: queue, redis id, body
--
-- Returns the position of the next message of the queue (0 for dead letters). Returns -1, and changes nothing, if another
-- process has taken the message. Key names are Dramatiq's.
local namespace = KEYS[1]
local source = namespace .. ':' .. ARGV[2]
local id = ARGV[3]
local next_position = 0

if ARGV[1] == 'dead' then
  source = source .. '.XQ'
  if redis.call('zrem', source, id) == 0 then
    return -1
  end
else
  local position = tonumber(ARGV[4])
  if redis.call('lindex', source, position) ~= id then
    position = redis.call('lpos', source, id)
    if not position then
      return -1
    end
  end
  if position == 0 then
    redis.call('lpop', source)
  else
    -- lrem would scan all messages in front, at every call.
    redis.call('lset', source, position, ARGV[5])
    next_position = position + 1
  end
end
redis.call('hdel', source .. '.msgs', id)
if ARGV[6] then
  local target = namespace .. ':' .. ARGV[6]
  redis.call('hset', target .. '.msgs', ARGV[7], ARGV[8])
  redis.call('rpush', target, ARGV[7])
end
return next_position
