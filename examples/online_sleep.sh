#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Serve a model, put it to sleep and wake it over HTTP.
#
#   examples/online_sleep.sh MODEL [PORT] [further options of vllm serve]
#
# On a simulated NPU: npu-sim examples/online_sleep.sh MODEL
set -euo pipefail

MODEL=${1:?usage: online_sleep.sh MODEL [PORT] [further options of vllm serve]}
PORT=${2:-8000}
URL=http://127.0.0.1:$PORT

export VLLM_SERVER_DEV_MODE="1"
export VLLM_WORKER_MULTIPROC_METHOD="spawn"
export VLLM_ASCEND_ENABLE_NZ="0"

vllm serve "$MODEL" --enable-sleep-mode --port "$PORT" "${@:3}" &
SERVER=$!
trap 'kill $SERVER 2>/dev/null; wait $SERVER 2>/dev/null || true' EXIT

until curl -sf "$URL/health" >/dev/null; do
  kill -0 $SERVER 2>/dev/null || { echo "the server did not start" >&2; exit 1; }
  sleep 0.5
done

call() {
  echo "+ curl $*"
  curl -sS --fail-with-body "$@"
  echo
}

# sleep level 1
call -X POST "$URL/sleep" \
    -H "Content-Type: application/json" \
    -d '{"level": "1"}'

call -X GET "$URL/is_sleeping"

# sleep level 2
call -X POST "$URL/sleep" \
    -H "Content-Type: application/json" \
    -d '{"level": "2"}'

# wake up with tag, tags must be in ["weights", "kv_cache"]
call -X POST "$URL/wake_up?tags=weights"

call -X GET "$URL/is_sleeping"

# level 2 discarded the weights: load them again before the first request
call -X POST "$URL/collective_rpc" \
    -H "Content-Type: application/json" \
    -d '{"method": "reload_weights"}'

# wake up
call -X POST "$URL/wake_up"

call -X POST "$URL/is_sleeping"

call -X POST "$URL/reset_prefix_cache"

# after sleep and wake up, the serving is still available
call "$URL/v1/completions" \
    -H "Content-Type: application/json" \
    -d '{
        "model": "'"$MODEL"'",
        "prompt": "The future of AI is",
        "max_tokens": 7,
        "temperature": 0
    }'
