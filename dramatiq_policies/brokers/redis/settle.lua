-- Acknowledge one message and enqueue its follow-up messages, in one step.
--
-- KEYS[1]  the broker's namespace
-- KEYS[2]  the register of the idempotency key, if this call completes the key
-- KEYS[3]  the companion of the register, if it has one
-- ARGV     broker id, queue, redis id, body of the dead letter or '', 'keep' to leave the message unacked or '',
--          new value of the register, ttl in ms, value of the register while the claim is ours,
--          value of the companion, its ttl in ms,
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
local broker_id, queue, id, dead_letter, keep_unacked, completed = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local unacked = namespace .. ':__acks__.' .. broker_id .. '.' .. queue
local bodies = namespace .. ':' .. queue .. '.msgs'
local dead_letters = namespace .. ':' .. string.gsub(queue, '%.DQ$', '') .. '.XQ'
local register = KEYS[2]
local first_follow_up = 11
local had_body = true

local is_unacked = redis.call('sismember', unacked, id) == 1
if not is_unacked and keep_unacked == '' then
  local current_value = register and redis.call('get', register)
  if current_value and current_value == completed then
    return 1
  end
  if not register or (current_value ~= ARGV[8] and #ARGV >= first_follow_up) then
    if dead_letter ~= '' and redis.call('hexists', dead_letters .. '.msgs', id) == 1 then
      return 1
    end
    for i = first_follow_up, #ARGV, 3 do
      if redis.call('hexists', namespace .. ':' .. ARGV[i] .. '.msgs', ARGV[i + 1]) == 1 then
        return 1
      end
    end
    return 0
  end
  had_body = false
end
if register then
  redis.call('set', register, completed, 'px', ARGV[7])
  if KEYS[3] then
    redis.call('set', KEYS[3], ARGV[9], 'px', ARGV[10])
  end
end
for i = first_follow_up, #ARGV, 3 do
  local target = namespace .. ':' .. ARGV[i]
  -- A kept message stays in the unacked set. After a lost reply, enqueue nothing twice.
  if redis.call('hexists', target .. '.msgs', ARGV[i + 1]) == 0 then
    redis.call('hset', target .. '.msgs', ARGV[i + 1], ARGV[i + 2])
    redis.call('rpush', target, ARGV[i + 1])
  end
end
if is_unacked and (keep_unacked == '' or dead_letter ~= '') then
  -- Write before removing: Redis does not roll back a script that fails midway (a key of another type).
  if dead_letter ~= '' then
    local time = redis.call('time')
    redis.call('zadd', dead_letters, time[1] * 1000 + math.floor(time[2] / 1000), id)
    redis.call('hset', dead_letters .. '.msgs', id, dead_letter)
  end
  redis.call('srem', unacked, id)
  had_body = redis.call('hdel', bodies, id) == 1
end
return had_body and 1 or 2
