-- Put what a dead worker holds of a queue back on it.
--
-- KEYS[1]  the broker's namespace
-- ARGV     queue, the worker's id, the time (ms) since which it must have been silent, then for each message: redis id, body
--
-- A worker that has spoken again meanwhile keeps its messages, and what another has put back is not put back twice. Key
-- names are Dramatiq's. Returns how many messages were moved.
local namespace = KEYS[1]
local queue, worker, silent_since = ARGV[1], ARGV[2], tonumber(ARGV[3])
local unacked = namespace .. ':__acks__.' .. worker .. '.' .. queue
local bodies = namespace .. ':' .. queue .. '.msgs'

local beat = redis.call('zscore', namespace .. ':__heartbeats__', worker)
if beat and tonumber(beat) > silent_since then
  return 0
end
local moved = 0
for i = 4, #ARGV, 2 do
  if redis.call('srem', unacked, ARGV[i]) == 1 and redis.call('hexists', bodies, ARGV[i]) == 1 then
    redis.call('hset', bodies, ARGV[i], ARGV[i + 1])
    redis.call('rpush', namespace .. ':' .. queue, ARGV[i])
    moved = moved + 1
  end
end
return moved
