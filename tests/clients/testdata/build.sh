#!/bin/bash
# The steps of the Function Builder API's own documentation, with the tools of a
# shell. BUILDER is the URL, PAYLOAD_SECRET a file, IMAGE what to push. It is run
# in a folder that holds context/, and something beside it that is not meant.
set -euo pipefail

printf '{"image": "%s"}' "$IMAGE" > com.openfaas.docker.config
tar cvf req.tar --exclude=req.tar . > /dev/null

HMAC=$(openssl dgst -sha256 -hmac "$(cat "$PAYLOAD_SECRET")" req.tar | sed -e 's/^.* //')
curl -s "$BUILDER/build" -X POST \
	-H "X-Build-Signature: sha256=$HMAC" \
	-H 'Content-Type: application/octet-stream' \
	--data-binary @req.tar > answer.json

jq -r .status answer.json
jq -r .imageName answer.json
jq -r .digest answer.json
jq -r '.warnings[]' answer.json
