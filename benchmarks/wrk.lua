-- Sends the bodies in a file (a line each) in turn, and prints what was measured as one line of JSON.

local requests = {}
local index = 0

function init(args)
  for body in io.lines(args[1]) do
    local headers = { ["Content-Type"] = "application/json" }
    requests[#requests + 1] = wrk.format("POST", nil, headers, body)
  end
end

function request()
  index = index % #requests + 1
  return requests[index]
end

function done(summary, latency, _)
  local errors = summary.errors
  local n_errors = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    '\n{"requests_per_s": %.6f, "p50_ms": %.6f, "p99_ms": %.6f, "n_errors": %d}\n',
    (summary.requests - errors.status) / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, n_errors
  ))
end
