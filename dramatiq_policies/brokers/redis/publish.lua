-- Enqueue messages.
--
-- KEYS[1]  the broker's namespace
-- ARGV     for each message: queue, redis id, body
--
-- A message whose body is there is not enqueued again: this call repeats a call with a lost reply. The id goes first: where the
-- queue is of another type, no body is left behind. Returns for each message '' or the error. Key names are Dramatiq's.
local namespace = KEYS[1]
local errors = {}

local function error_of(reply)
  return type(reply) == 'table' and reply.err
end

local function enqueue(queue, id, body)
  local bodies = queue .. '.msgs'
  local is_enqueued = redis.pcall('hexists', bodies, id)
  if is_enqueued == 1 or error_of(is_enqueued) then
    return error_of(is_enqueued) or ''
  end
  return error_of(redis.pcall('rpush', queue, id)) or error_of(redis.pcall('hset', bodies, id, body)) or ''
end

for i = 1, #ARGV, 3 do
  errors[#errors + 1] = enqueue(namespace .. ':' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
return errors
