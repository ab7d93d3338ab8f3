-- Acquire, renew or release a lease.
--
-- KEYS[1]  the lease
-- ARGV     owner, ttl in ms; 0 to release
--
-- Returns 1 if the owner holds the lease, else 0.
local holder = redis.call('get', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
if ARGV[2] == '0' then
  redis.call('del', KEYS[1])
  return 0
end
redis.call('set', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
