-- Take one message off its queue's unacked set and, in the same step, enqueue what follows from it.
--
-- KEYS[1]  the broker's namespace
-- KEYS[2]  if the message's idempotency key is completed by this: its register
-- ARGV     broker id, queue, the message's redis id, the body of its dead letter or '', 'keep' to leave it unacked or '',
--          what the register is to hold and its ttl in ms, then for each message that follows: queue, redis id, body
--
-- That the id is in the unacked set is the condition of all else: a call that is repeated after a lost reply does
-- nothing, and so does one for a message that was given to another worker meanwhile. Key names are Dramatiq's.
--
-- A dead letter is only written in the place of the message here: Dramatiq's own nack then moves it.
local namespace = KEYS[1]
local broker_id, queue, id, dead, keep, completed = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local unacked = namespace .. ':__acks__.' .. broker_id .. '.' .. queue
local bodies = namespace .. ':' .. queue .. '.msgs'

local ours = redis.call('sismember', unacked, id) == 1
local register = KEYS[2]
if register and (ours or #ARGV == 7) then
  redis.call('set', register, completed, 'px', ARGV[7])
end
if not ours then
  return register and redis.call('get', register) == completed and 1 or 0
end
for i = 8, #ARGV, 3 do
  local target = namespace .. ':' .. ARGV[i]
  -- One that is kept stays in the set: what a lost call has enqueued already is not enqueued twice.
  if redis.call('hexists', target .. '.msgs', ARGV[i + 1]) == 0 then
    redis.call('hset', target .. '.msgs', ARGV[i + 1], ARGV[i + 2])
    redis.call('rpush', target, ARGV[i + 1])
  end
end
if dead ~= '' then
  redis.call('hset', bodies, id, dead)
elseif keep == '' then
  redis.call('srem', unacked, id)
  redis.call('hdel', bodies, id)
end
return 1
