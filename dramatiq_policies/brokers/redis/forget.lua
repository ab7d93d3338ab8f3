-- Remove the heartbeats of silent workers without messages, unless the heartbeat has changed.
--
-- KEYS[1]  the broker's namespace
-- ARGV     for each worker: worker id, last heartbeat
local heartbeats = KEYS[1] .. ':__heartbeats__'
for i = 1, #ARGV, 2 do
  if redis.call('zscore', heartbeats, ARGV[i]) == ARGV[i + 1] then
    redis.call('zrem', heartbeats, ARGV[i])
    redis.call('hdel', KEYS[1] .. ':__observed__', ARGV[i])
  end
end
