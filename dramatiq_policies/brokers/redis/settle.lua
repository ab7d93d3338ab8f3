-- Acknowledge one message and enqueue its follow-up messages, in one step.
--
-- KEYS[1]  the broker's namespace
-- KEYS[2]  the register of the idempotency key, if this call completes the key
-- ARGV     broker id, queue, redis id, body of the dead letter or '', 'keep' to leave the message unacked or '',
--          new value of the register, ttl in ms, value of the register while the claim is ours,
--          then for each follow-up message: queue, redis id, body
--
-- If the message is not in the unacked set of this worker, either another worker has the message, or this call repeats a call
-- with a lost reply. The script then enqueues nothing, unless the key counts as completed ('keep', or the register still holds
-- the claim): the other worker will skip the message, so this worker must enqueue the follow-up messages.
-- Key names are Dramatiq's.
--
-- The dead letter gets the id of the message and the time of the server, as after Dramatiq's nack.
-- Returns 0 if the other worker must settle the message, 2 if the message is settled and Redis did not have the message any more,
-- else 1.
local namespace = KEYS[1]
local broker_id, queue, id, dead, keep, completed = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local unacked = namespace .. ':__acks__.' .. broker_id .. '.' .. queue
local bodies = namespace .. ':' .. queue .. '.msgs'
local letters = namespace .. ':' .. string.gsub(queue, '%.DQ$', '') .. '.XQ'
local register = KEYS[2]
local first = 9
local had = true

local ours = redis.call('sismember', unacked, id) == 1
if not ours and keep == '' then
  local held = register and redis.call('get', register)
  if held and held == completed then
    return 1
  end
  if not register or (held ~= ARGV[8] and #ARGV >= first) then
    if dead ~= '' and redis.call('hexists', letters .. '.msgs', id) == 1 then
      return 1
    end
    for i = first, #ARGV, 3 do
      if redis.call('hexists', namespace .. ':' .. ARGV[i] .. '.msgs', ARGV[i + 1]) == 1 then
        return 1
      end
    end
    return 0
  end
  had = false
end
if register then
  redis.call('set', register, completed, 'px', ARGV[7])
end
for i = first, #ARGV, 3 do
  local target = namespace .. ':' .. ARGV[i]
  -- A kept message stays in the unacked set. After a lost reply, enqueue nothing twice.
  if redis.call('hexists', target .. '.msgs', ARGV[i + 1]) == 0 then
    redis.call('hset', target .. '.msgs', ARGV[i + 1], ARGV[i + 2])
    redis.call('rpush', target, ARGV[i + 1])
  end
end
if ours and (keep == '' or dead ~= '') then
  -- Write before removing: Redis does not roll back a script that fails midway (a key of another type).
  if dead ~= '' then
    local time = redis.call('time')
    redis.call('zadd', letters, time[1] * 1000 + math.floor(time[2] / 1000), id)
    redis.call('hset', letters .. '.msgs', id, dead)
  end
  redis.call('srem', unacked, id)
  had = redis.call('hdel', bodies, id) == 1
end
return had and 1 or 2
