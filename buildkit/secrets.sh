#!/bin/sh
# Creates the Secrets that stack.yml names from files, or replaces them.
#
#   secrets.sh kubectl|faas-cli
#
#   payload-secret     from PAYLOAD_SECRET     (payload-secret)
#   buildkit-ca        from CERTS/client       (buildkit/certs/client)
#   buildkit-cert      from CERTS/client
#   buildkit-key       from CERTS/client
#   registry-config    from REGISTRY_CONFIG    (~/.docker/config.json)
#   build-secrets-key  from BUILD_SECRETS_KEY  (none: without it there is no such Secret)
#   nats-credential    from NATS               (none: without it there are no such Secrets)
#   nats-ca            from NATS
#
# NAMESPACE is the namespace of the functions (openfaas-fn). faas-cli needs a login, and
# reads OPENFAAS_URL.
set -eu

via=${1:-}
case $via in
kubectl | faas-cli) ;;
*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2; exit 2 ;;
esac
command -v "$via" >/dev/null || { echo "$0: $via is not on the PATH" >&2; exit 1; }

namespace=${NAMESPACE:-openfaas-fn}
certs=${CERTS:-$(dirname "$0")/certs}/client
set -- \
	payload-secret "${PAYLOAD_SECRET:-payload-secret}" \
	buildkit-ca "$certs/ca.pem" \
	buildkit-cert "$certs/cert.pem" \
	buildkit-key "$certs/key.pem" \
	registry-config "${REGISTRY_CONFIG:-$HOME/.docker/config.json}"
[ -z "${BUILD_SECRETS_KEY:-}" ] || set -- "$@" build-secrets-key "$BUILD_SECRETS_KEY"
[ -z "${NATS:-}" ] || set -- "$@" nats-credential "$NATS/credential" nats-ca "$NATS/ca.pem"

# No Secret is created unless all files are there.
missing=0
want() { # NAME FILE
	[ -s "$2" ] && return
	missing=1
	case $1 in
	payload-secret) how='faas-cli secret generate -o payload-secret, or openssl rand -hex 32 > payload-secret, or PAYLOAD_SECRET=file' ;;
	buildkit-*) how='make certs' ;;
	nats-*) how='make certs-nats' ;;
	registry-config) how='REGISTRY_CONFIG=config.json' ;;
	*) how='BUILD_SECRETS_KEY=file' ;;
	esac
	echo "$0: $1: $2 is missing or empty: $how" >&2
}
create() { # NAME FILE
	if [ "$via" = faas-cli ]; then
		faas-cli secret create "$1" --from-file "$2" --namespace "$namespace" --replace
		return
	fi
	# Opaque, with the Secret's name as its key: that is the file's name in the function.
	manifest=$(kubectl -n "$namespace" create secret generic "$1" --from-file="$1=$2" --dry-run=client -o yaml)
	echo "$manifest" | kubectl -n "$namespace" apply -f -
}
for step in want create; do
	i=0
	name=
	for arg; do
		i=$((i + 1))
		if [ $((i % 2)) = 1 ]; then name=$arg; else "$step" "$name" "$arg"; fi
	done
	[ $missing = 0 ] || exit 1
done
