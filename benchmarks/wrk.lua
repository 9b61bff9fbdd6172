-- Sends the bodies in a file (a line each) in turn, and prints what was measured as one line of JSON.
-- After "--": the file, and the number of connections.

local ffi = require("ffi")
local requests = {}
local index = 0
local thread

-- done() runs in another Lua state than init(), which is told the number: it asks this one thread for it.
function setup(only_thread)
  thread = only_thread
end

function init(args)
  connections = tonumber(args[2])
  for body in io.lines(args[1]) do
    local headers = { ["Content-Type"] = "application/json" }
    requests[#requests + 1] = wrk.format("POST", nil, headers, body)
  end
end

function request()
  index = index % #requests + 1
  return requests[index]
end

-- Gives what wrk counted: an array of how many answers took so many microseconds, and its lowest and highest index.
-- This is in the memory behind what it gives to done(), after two other numbers and these two (stats.h). Its own way
-- there, latency(i), looks through all of it for each i, which takes ten seconds where answers are many or slow.
local function counted_by_wrk(latency)
  local numbers = ffi.cast("uint64_t **", latency)[0]
  local min, max = tonumber(numbers[2]), tonumber(numbers[3])
  assert(min == latency.min and max == latency.max, "this version of wrk keeps its numbers in another way")
  return numbers + 4, min, max
end

-- Gives how many answers took so many microseconds, as a function.
-- Before done(), wrk adds answers that never came to what it counted: for each one that took n microseconds, others of
-- n - expected, n - 2 * expected and so on, as long as that is more than expected, the mean time of a connection's
-- requests (stats_correct() in its stats.c). So it tells what clients would see who ask at fixed times, not what those
-- saw that were there. Above expected, what it counts at a value is what came there, and all it counts at one more
-- expected.
local function answers_that_came(counted, max, expected)
  return function(value)
    local is_added_to = value > expected and value + expected <= max
    return tonumber(counted[value] - (is_added_to and counted[value + expected] or 0))
  end
end

-- The smallest value that at least so large a part of the answers do not exceed.
local function quantile(count, min, max, total, part)
  local left = math.ceil(part * total)
  for value = min, max do
    left = left - count(value)
    if left <= 0 then
      return value
    end
  end
  return 0
end

function done(summary, latency, _)
  local errors = summary.errors
  local n_errors = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  -- Of less than one answer a connection, wrk expects nothing.
  local answers_each = math.floor(summary.requests / thread:get("connections"))
  local expected = answers_each > 0 and math.floor(summary.duration / answers_each) or math.huge
  local counted, min, max = counted_by_wrk(latency)
  local count, total = answers_that_came(counted, max, expected), 0
  for value = min, max do
    total = total + count(value)
  end
  assert(total == summary.requests - errors.timeout, "this version of wrk adds in another way")
  io.write(string.format(
    '\n{"requests_per_s": %.6f, "p50_ms": %.6f, "p99_ms": %.6f, "n_errors": %d}\n',
    (summary.requests - errors.status) / summary.duration * 1e6,
    quantile(count, min, max, total, 0.5) / 1e3, quantile(count, min, max, total, 0.99) / 1e3, n_errors
  ))
end
