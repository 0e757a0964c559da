-- The requests that wrk sends: `wrk -s load.lua URL -- SCENARIO INCIDENTS SEED`. The report is one line of JSON.

-- wrk asks for one request that it only inspects, before the first that it sends.
local scenario, incidents, seed, sent = nil, 1, 1, -1
local thread

-- Changes sent so far; global, because only globals can be read from outside the thread.
changes = 0

local statuses = {"new", "completed", "failed"}
local sources = {"operator", "monitoring", "partner"}
local json = {["Content-Type"] = "application/json"}

local function fixed()
  return wrk.format("GET", "/fixed")
end

local function list()
  return wrk.format("GET", "/incident/get?page=1&limit=10")
end

-- Gives each incident a status that it does not have: in the first pass `completed`, or `failed`
-- for every third incident, which was completed from the start. The seed is the number of changes
-- made before.
local function update()
  local turn = seed + changes
  changes = changes + 1
  local id = turn % incidents + 1
  local round = math.floor(turn / incidents) + (id % 3 == 1 and 1 or 0)
  return wrk.format("PATCH", "/incident/update-status?incident_id=" .. id .. "&status=" .. statuses[2 + round % 2])
end

-- One change, which invalidates every cached page, and then each page once: 20 numbers, 16 sizes
-- and 16 filters.
local function list_uncached()
  local turn = (sent - 1) % 5121
  if turn == 0 then
    return update()
  end
  local mixed = turn * 1999 % 5120
  local page = mixed % 20 + 1
  local limit = math.floor(mixed / 20) % 16 + 10
  local filter = math.floor(mixed / 320)
  local path = "/incident/get?page=" .. page .. "&limit=" .. limit
  if filter % 4 > 0 then
    path = path .. "&status=" .. statuses[filter % 4]
  end
  if filter >= 4 then
    path = path .. "&source=" .. sources[math.floor(filter / 4)]
  end
  return wrk.format("GET", path)
end

local function get()
  return wrk.format("GET", "/incident/get/" .. math.random(incidents))
end

local function create()
  local body = '{"incident_message":"Disk ' .. sent .. ' of db ' .. seed
    .. ' is full","source":"' .. sources[sent % 3 + 1] .. '"}'
  return wrk.format("POST", "/incident/create", json, body)
end

local function mixed()
  if sent % 20 == 0 then
    return update()
  end
  return list()
end

-- Deep pages, each of them once.
local function deep()
  return wrk.format("GET", "/incident/get?page=" .. (50000 + seed + sent) .. "&limit=10")
end

local function deep_changed()
  if sent % 2 == 1 then
    return update()
  end
  return deep()
end

local scenarios = {
  fixed = fixed, list_cached = list, list_uncached = list_uncached, get = get, create = create,
  update = update, mixed = mixed, deep = deep,
  deep_changed = deep_changed,
}

function setup(one)
  thread = one
end

function init(arguments)
  scenario = scenarios[arguments[1]]
  incidents = tonumber(arguments[2])
  seed = tonumber(arguments[3])
  math.randomseed(seed)
end

function request()
  sent = sent + 1
  if sent == 0 then
    return list()
  end
  return scenario()
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%d,"changes":%d,"seconds":%f,"errors":%d,"p50":%f,"p95":%f,"p99":%f,"max":%f}\n',
    summary.requests, thread:get("changes"), summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3))
end
