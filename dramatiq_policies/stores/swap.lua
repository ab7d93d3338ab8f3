-- Compare and swap a register.
--
-- KEYS[1]  the register
-- ARGV     expected value or '' for absent, new value or '' to remove, ttl in milliseconds; or only 'read'
--
-- Returns nil after a write, else {current value or '', milliseconds until expiry}.
local current = redis.call('get', KEYS[1])
if not ARGV[2] or (current or '') ~= ARGV[1] then
  return {current or '', redis.call('pttl', KEYS[1])}
end
if ARGV[2] == '' then
  redis.call('del', KEYS[1])
else
  redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3])
end
return false
