-- Write a register and its companion.
--
-- KEYS  the register, the companion
-- ARGV  value and ttl in milliseconds of the register, then of the companion
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
redis.call('set', KEYS[2], ARGV[3], 'px', ARGV[4])
return 1
