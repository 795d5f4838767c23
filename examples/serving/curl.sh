#!/bin/sh
# A running `minim3 serve` from a shell. URL and KEY can be set from outside:
#   URL=http://127.0.0.1:8000 KEY=secret sh examples/serving/curl.sh [PICTURE]
set -eu
URL=${URL:-http://127.0.0.1:8000}
KEY=${KEY:-none}

post() {
    curl --silent --show-error --fail-with-body --no-buffer "$URL$1" \
        --header "Authorization: Bearer $KEY" --header "Content-Type: application/json" --data "$2"
    echo
}

echo "# ready?"
curl --silent --show-error --fail-with-body "$URL/ready"
echo

echo "# a question"
post /v1/chat/completions '{
  "messages": [{"role": "user", "content": "What is 3 plus 4?"}],
  "chat_template_kwargs": {"thinking_mode": "disabled"}
}'

echo "# as a stream, with usage at its end"
post /v1/chat/completions '{
  "messages": [{"role": "user", "content": "What is 12 plus 5?"}],
  "stream": true, "stream_options": {"include_usage": true}
}'

echo "# an answer that is JSON of a schema"
post /v1/chat/completions '{
  "messages": [{"role": "user", "content": "Three red circles."}],
  "max_tokens": 100,
  "response_format": {"type": "json_schema", "json_schema": {"name": "scene", "strict": true, "schema": {
    "type": "object", "additionalProperties": false, "required": ["colour"],
    "properties": {"colour": {"enum": ["red", "green", "blue"]}}}}}
}'

echo "# plain continuation, with log-probabilities"
post /v1/completions '{"prompt": "The red", "max_tokens": 4, "logprobs": 2}'

echo "# token ids"
post /tokenize '{"messages": [{"role": "user", "content": "Hello"}]}'

if [ $# -gt 0 ]; then
    echo "# a picture"
    data=$(base64 < "$1" | tr -d '\n')
    post /v1/chat/completions '{"messages": [{"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "data:image/png;base64,'"$data"'"}},
      {"type": "text", "text": "How many objects are there?"}]}]}'
fi
