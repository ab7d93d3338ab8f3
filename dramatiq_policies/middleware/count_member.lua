-- Count a group's member at its barrier, once.
--
-- KEYS[1]  the barrier: the number of missing members, in Dramatiq's format
-- KEYS[2]  the counted members, and '>' with the completing member
-- ARGV     the member's message id, ttl in milliseconds
--
-- Returns 1 if this member completes the group. A repeated call returns 1 again: the callbacks may not have been enqueued.
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
