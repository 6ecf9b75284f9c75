#!/bin/bash
# Prints a signed text envelope of a build, to paste into the OpenFaaS UI: it
# can send text only, and no headers.
#
#	envelope.sh FOLDER PAYLOAD_SECRET_FILE [IMAGE [TENANT]]
#
# A folder with a Dockerfile is a build context. Any other is a function for lang
# golang-middleware, and is put together with the template as faas-cli does.
# Without an image the build is not pushed. A tenant of the builder names itself.
set -euo pipefail
export LC_ALL=C

fail() {
	echo "envelope: $*" >&2
	exit 1
}

((2 <= $# && $# <= 4)) || fail 'usage: envelope.sh FOLDER PAYLOAD_SECRET_FILE [IMAGE [TENANT]]'
folder=$1 secret=$2 image=${3:-} tenant=${4:-}
template=$(dirname "$0")/../template/golang-middleware

[ -d "$folder" ] || fail "$folder is not a folder"
[ -r "$secret" ] || fail "the payload secret cannot be read from $secret: name its file with PAYLOAD_SECRET"
key=$(<"$secret")
key=${key#"${key%%[![:space:]]*}"}
key=${key%"${key##*[![:space:]]}"}
[ -n "$key" ] || fail "$secret is empty"
[[ $image != *[!A-Za-z0-9._:/-]* ]] || fail "$image is not the name of an image"
[[ $tenant != *[!a-z0-9._-]* ]] || fail "$tenant is not the name of a tenant"

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
if [ -e "$folder/Dockerfile" ]; then
	cp -a "$folder/." "$dir/context"
elif [ -e "$folder/handler.go" ]; then
	cp -a "$template/." "$dir/context"
	rm -rf "$dir/context/function"
	cp -a "$folder/." "$dir/context/function"
else
	fail "$folder has neither a Dockerfile nor the handler.go of a golang-middleware function"
fi
if [ -n "$image" ]; then
	printf '{"image":"%s"}' "$image" >"$dir/com.openfaas.docker.config"
else
	printf '{"skipPush":true}' >"$dir/com.openfaas.docker.config"
	echo 'envelope: IMAGE is not set, so what is built will not be pushed' >&2
fi

tar -C "$dir" -czf "$dir/request" com.openfaas.docker.config context
mac=$(openssl dgst -sha256 -hmac "$key" <"$dir/request")
printf '{"signature":"sha256=%s",%s"tar":"%s"}\n' "${mac##* }" "${tenant:+\"tenant\":\"$tenant\",}" "$(base64 -w0 "$dir/request")"
