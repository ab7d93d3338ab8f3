-- Forget workers that have fallen silent and hold nothing: their heartbeats go, unless they have changed.
--
-- KEYS[1]  the broker's namespace
-- ARGV     for each worker: its id, the heartbeat with which it fell silent
local heartbeats = KEYS[1] .. ':__heartbeats__'
for i = 1, #ARGV, 2 do
  if redis.call('zscore', heartbeats, ARGV[i]) == ARGV[i + 1] then
    redis.call('zrem', heartbeats, ARGV[i])
    redis.call('hdel', KEYS[1] .. ':__observed__', ARGV[i])
  end
end
