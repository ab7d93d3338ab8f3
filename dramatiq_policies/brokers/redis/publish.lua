-- Enqueue messages.
--
-- KEYS[1]  the broker's namespace
-- ARGV     for each message: queue, redis id, body
--
-- A message whose body is there is not enqueued again: this call repeats a call with a lost reply. The id goes first: where the
-- queue is of another type, no body is left behind. Returns for each message '' or the error. Key names are Dramatiq's.
local namespace = KEYS[1]
local errors = {}

local function refused(answer)
  return type(answer) == 'table' and answer.err
end

local function enqueue(queue, id, body)
  local bodies = queue .. '.msgs'
  local known = redis.pcall('hexists', bodies, id)
  if known == 1 or refused(known) then
    return refused(known) or ''
  end
  return refused(redis.pcall('rpush', queue, id)) or refused(redis.pcall('hset', bodies, id, body)) or ''
end

for i = 1, #ARGV, 3 do
  errors[#errors + 1] = enqueue(namespace .. ':' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
return errors
