-- Take one message off its queue's unacked set and, in the same step, enqueue what follows from it.
--
-- KEYS[1]  the broker's namespace
-- KEYS[2]  if the message's idempotency key is completed by this: its register
-- ARGV     broker id, queue, the message's redis id, the body of its dead letter or '', 'keep' to leave it unacked or '',
--          what the register is to hold, its ttl in ms and what it holds while the claim is ours, then for each message that
--          follows: queue, redis id, body
--
-- A message that is not in this worker's unacked set was given to another, or this call is repeated after a lost reply. Then
-- nothing more is done, unless the run is remembered as completed ('keep', or a register that still holds the claim): the
-- other worker will hand nothing on, so what follows is enqueued here. Key names are Dramatiq's.
--
-- A dead letter takes the message's place and its id: in the same step it lies among the dead letters, as after Dramatiq's own
-- nack, by the server's clock. Returns 0 if the other worker is to settle the message, else 1.
local namespace = KEYS[1]
local broker_id, queue, id, dead, keep, completed = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local unacked = namespace .. ':__acks__.' .. broker_id .. '.' .. queue
local bodies = namespace .. ':' .. queue .. '.msgs'
local letters = namespace .. ':' .. string.gsub(queue, '%.DQ$', '') .. '.XQ'
local register = KEYS[2]
local first = 9

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
end
if register then
  redis.call('set', register, completed, 'px', ARGV[7])
end
for i = first, #ARGV, 3 do
  local target = namespace .. ':' .. ARGV[i]
  -- One that is kept stays in the set: what a lost call has enqueued already is not enqueued twice.
  if redis.call('hexists', target .. '.msgs', ARGV[i + 1]) == 0 then
    redis.call('hset', target .. '.msgs', ARGV[i + 1], ARGV[i + 2])
    redis.call('rpush', target, ARGV[i + 1])
  end
end
if ours and (keep == '' or dead ~= '') then
  -- Written first, removed then: a script that fails midway (a key of another type) undoes nothing.
  if dead ~= '' then
    local time = redis.call('time')
    redis.call('zadd', letters, time[1] * 1000 + math.floor(time[2] / 1000), id)
    redis.call('hset', letters .. '.msgs', id, dead)
  end
  redis.call('srem', unacked, id)
  redis.call('hdel', bodies, id)
end
return 1
