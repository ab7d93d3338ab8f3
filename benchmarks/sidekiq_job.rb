# The benchmark's job on Sidekiq with Active Job; see peers.py.
require "json"
require "sidekiq"
require "active_job"
Redis.sadd_returns_boolean = false if Redis.respond_to?(:sadd_returns_boolean=)

URL = { url: ENV.fetch("BENCH_REDIS") }
JOBS = Integer(ENV.fetch("BENCH_JOBS"))
TRANSIENT = Float(ENV.fetch("FAIL_TRANSIENT"))
PERMANENT = Float(ENV.fetch("FAIL_PERMANENT"))
Sidekiq.configure_client { |config| config.redis = URL }
Sidekiq.configure_server do |config|
  config.redis = URL
  # Retries of Active Job pass through the schedule. It is looked at five times a second and from the start, not every
  # five seconds after the first ten: otherwise a short run measures that wait and nothing else.
  options = config.respond_to?(:[]=) ? config : Sidekiq.options
  options[:poll_interval_average] = 0.2
end
require "sidekiq/scheduled"
Sidekiq::Scheduled::Poller.prepend(Module.new { def initial_wait = nil })

class Transient < StandardError; end
class Permanent < StandardError; end

$lock = Mutex.new
$ended = 0
$first = nil
$failed_once = {}

def now = [Process.clock_gettime(Process::CLOCK_MONOTONIC), Process.clock_gettime(Process::CLOCK_PROCESS_CPUTIME_ID)]

ActiveJob::Base.queue_adapter = :sidekiq
ActiveJob::Base.logger = Logger.new(nil)

class BenchJob < ActiveJob::Base
  queue_as ENV.fetch("BENCH_QUEUE")
  retry_on Transient, wait: 0, attempts: 6
  discard_on Permanent

  def perform(number)
    draw = (number * 2_654_435_761 % 2**32) / (2**32).to_f
    $lock.synchronize do
      $first ||= now
      if draw < TRANSIENT && !$failed_once.key?(number)
        $failed_once[number] = true
        raise Transient
      end
      $ended += 1
      report if $ended == JOBS
    end
    raise Permanent if draw >= TRANSIENT && draw < TRANSIENT + PERMANENT
  end

  def report
    wall, cpu = now.zip($first).map { |last, first| last - first }
    STDOUT.puts({ rate: JOBS / wall, cpu_us: cpu / JOBS * 1e6 }.to_json)
    STDOUT.flush
    Process.kill(:KILL, Process.pid)
  end
end

def push_all
  began = now.first
  JOBS.times { |number| BenchJob.perform_later(number) }
  puts({ enqueue_rate: JOBS / (now.first - began) }.to_json)
end
