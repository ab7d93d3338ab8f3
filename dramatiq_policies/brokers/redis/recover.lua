-- Put what a silent worker holds of a queue back on it, and its dead letters where they belong.
--
-- KEYS[1]  the broker's namespace
-- ARGV     queue, the worker's id, the heartbeat with which it fell silent, '1' if what comes back may have been begun or '',
--          then for each message: redis id, '' or its body that somebody has read, '' or 'dead' if that is a dead letter
--
-- A worker that has spoken again meanwhile keeps its messages; one that another has put back, or that its worker has settled,
-- is left as it is. A body that may be a dead letter (0.1.0 writes one in the message's place before it moves it) is not
-- moved but returned, to be read; and moved only if it is still the one that was read.
--
-- Returns {how many came back, how many were dead letters, then of each that is to be read: redis id, body}. Key names are
-- Dramatiq's, but for `__redelivered__`.
local namespace = KEYS[1]
local queue, worker, beat, begun = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local unacked = namespace .. ':__acks__.' .. worker .. '.' .. queue
local waiting = namespace .. ':' .. queue
local bodies, letters = waiting .. '.msgs', waiting .. '.XQ'
local redelivered = namespace .. ':__redelivered__.' .. queue
-- No dead letter of 0.1.0 that is larger is looked for here. Whoever fetches it sees that it is one.
local most_bytes = 1000000
local a_week = 604800000

if redis.call('zscore', namespace .. ':__heartbeats__', worker) ~= beat then
  return {0, 0}
end
local time = redis.call('time')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local moved, dead, unread = 0, 0, {}
for i = 5, #ARGV, 3 do
  local id, read, letter = ARGV[i], ARGV[i + 1], ARGV[i + 2] == 'dead'
  if redis.call('sismember', unacked, id) == 1 then
    local body
    if begun == '1' and redis.call('hstrlen', bodies, id) <= most_bytes then
      body = redis.call('hget', bodies, id)
    end
    if read ~= '' and body ~= read then
      -- Changed since it was read.
    elseif read == '' and body and string.find(body, 'failure', 1, true) then
      if #unread < 40 then
        unread[#unread + 1] = id
        unread[#unread + 1] = body
      end
    else
      -- Written first, removed then: a script that fails midway (a key of another type) undoes nothing.
      if letter then
        redis.call('zadd', letters, now, id)
        redis.call('hset', letters .. '.msgs', id, body)
        redis.call('hdel', bodies, id)
        dead = dead + 1
      elseif redis.call('hexists', bodies, id) == 1 then
        if begun == '1' then
          redis.call('zadd', redelivered, now, id)
        end
        redis.call('rpush', waiting, id)
        moved = moved + 1
      end
      redis.call('srem', unacked, id)
    end
  end
end
if moved > 0 and begun == '1' then
  redis.call('zremrangebyscore', redelivered, '-inf', now - a_week)
  redis.call('pexpire', redelivered, a_week)
end
return {moved, dead, unpack(unread)}
