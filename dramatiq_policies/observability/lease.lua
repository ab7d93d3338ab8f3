-- Take, keep or give up a lease.
--
-- KEYS[1]  the lease
-- ARGV     who wants it, for how long in ms; 0 to give it up
--
-- Returns 1 if the caller holds it now.
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
