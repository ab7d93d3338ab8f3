-- Take one message out of a queue's dead letters, or out of the queue itself, and in the same step enqueue its successor.
--
-- KEYS[1]  the broker's namespace
-- ARGV     'dead' or 'ready', queue, redis id, then what follows or nothing: queue, redis id, body
--
-- Returns 0, and does nothing, if the id is not there: somebody else has taken it. Key names are Dramatiq's.
local namespace = KEYS[1]
local source = namespace .. ':' .. ARGV[2]

if ARGV[1] == 'dead' then
  source = source .. '.XQ'
  if redis.call('zrem', source, ARGV[3]) == 0 then
    return 0
  end
-- From the front, where it is, and no further: a whole queue is moved in as many steps as it has messages.
elseif redis.call('lrem', source, 1, ARGV[3]) == 0 then
  return 0
end
redis.call('hdel', source .. '.msgs', ARGV[3])
if ARGV[4] then
  local target = namespace .. ':' .. ARGV[4]
  redis.call('hset', target .. '.msgs', ARGV[5], ARGV[6])
  redis.call('rpush', target, ARGV[5])
end
return 1
