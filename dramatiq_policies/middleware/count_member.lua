-- Count a group's member at its barrier, once.
--
-- KEYS[1]  the barrier: how many members are missing, as Dramatiq keeps it
-- KEYS[2]  the members that were counted, and '>' with the one that completed the group
-- ARGV     the member's message id, ttl in milliseconds
--
-- Returns 1 if this member completes the group, also when it is counted again: its callbacks may not have been enqueued.
if redis.call('sadd', KEYS[2], ARGV[1]) == 0 then
  return redis.call('sismember', KEYS[2], '>' .. ARGV[1])
end
redis.call('pexpire', KEYS[2], ARGV[2])
local missing = tonumber(redis.call('get', KEYS[1]) or '0') - 1
if missing < 1 then
  redis.call('sadd', KEYS[2], '>' .. ARGV[1])
  return 1
end
redis.call('set', KEYS[1], missing, 'px', ARGV[2])
return 0
