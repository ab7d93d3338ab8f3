-- Write a register if it holds what is expected.
--
-- KEYS[1]  the register
-- ARGV     expected or '' for absent, value or '' to remove it, ttl in milliseconds; or 'read' alone to look
--
-- Returns nothing if it was written, else what it holds ('' for nothing) and for how many more milliseconds.
local found = redis.call('get', KEYS[1])
if not ARGV[2] or (found or '') ~= ARGV[1] then
  return {found or '', redis.call('pttl', KEYS[1])}
end
if ARGV[2] == '' then
  redis.call('del', KEYS[1])
else
  redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3])
end
return false
