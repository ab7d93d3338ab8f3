-- Requeue the messages of a silent worker, and move its dead letters to the dead letters of the queue.
--
-- KEYS[1]  the broker's namespace
-- ARGV     queue, worker id, last heartbeat of the worker, '1' if the messages may have begun or '',
--          then for each message: redis id, the body as read by the caller or '', 'dead' if the body is a dead letter or ''
--
-- A worker with a new heartbeat keeps its messages. Messages requeued by another process or settled by the worker are skipped.
-- If a body may be a dead letter (0.1.0 writes the dead letter in place before the move), the script returns the body to
-- the caller. The next call moves the body only if unchanged.
--
-- Returns {requeued messages, moved dead letters, then for each body to read: redis id, body}. Key names are Dramatiq's,
-- except `__redelivered__`.
local namespace = KEYS[1]
local queue, worker, heartbeat, may_have_begun = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local unacked = namespace .. ':__acks__.' .. worker .. '.' .. queue
local ready_queue = namespace .. ':' .. queue
local bodies, dead_letters = ready_queue .. '.msgs', ready_queue .. '.XQ'
local redelivered = namespace .. ':__redelivered__.' .. queue
-- Larger bodies are not checked for dead letters here, but by the worker after the fetch.
local max_checked_bytes = 1000000
local week_ms = 604800000

if redis.call('zscore', namespace .. ':__heartbeats__', worker) ~= heartbeat then
  return {0, 0}
end
local time = redis.call('time')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local requeued, moved_dead_letters, to_read = 0, 0, {}
for i = 5, #ARGV, 3 do
  local id, body_read, is_dead_letter = ARGV[i], ARGV[i + 1], ARGV[i + 2] == 'dead'
  if redis.call('sismember', unacked, id) == 1 then
    local body
    if may_have_begun == '1' and redis.call('hstrlen', bodies, id) <= max_checked_bytes then
      body = redis.call('hget', bodies, id)
    end
    if body_read ~= '' and body ~= body_read then
      -- Changed since the caller read the body.
    elseif body_read == '' and body and string.find(body, 'failure', 1, true) then
      if #to_read < 40 then
        to_read[#to_read + 1] = id
        to_read[#to_read + 1] = body
      end
    else
      -- Write before removing: Redis does not roll back a script that fails midway (a key of another type).
      if is_dead_letter then
        redis.call('zadd', dead_letters, now, id)
        redis.call('hset', dead_letters .. '.msgs', id, body)
        redis.call('hdel', bodies, id)
        moved_dead_letters = moved_dead_letters + 1
      elseif redis.call('hexists', bodies, id) == 1 then
        if may_have_begun == '1' then
          redis.call('zadd', redelivered, now, id)
        end
        redis.call('rpush', ready_queue, id)
        requeued = requeued + 1
      end
      redis.call('srem', unacked, id)
    end
  end
end
if requeued > 0 and may_have_begun == '1' then
  redis.call('zremrangebyscore', redelivered, '-inf', now - week_ms)
  redis.call('pexpire', redelivered, week_ms)
end
return {requeued, moved_dead_letters, unpack(to_read)}
