#!/bin/sh
# Makes the certificates with which buildkitd and the function know each other.
#
#   certs.sh DIR [NAME-OR-ADDRESS...]
#
#   DIR/ca.pem                            the CA's certificate
#   DIR/ca-key.pem                        the CA's key; put it into no Secret
#   DIR/daemon/{ca.pem,cert.pem,key.pem}  for buildkitd, with the names below
#   DIR/client/{ca.pem,cert.pem,key.pem}  for the function
#
# It keeps a CA that is in DIR. It replaces certificates only with FORCE=1. They are valid
# for DAYS days (365), and the CA for CA_DAYS days (3650).
set -eu
umask 077

[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2; exit 2; }
dir=$1
shift
days=${DAYS:-365}
ca_days=${CA_DAYS:-3650}

for side in daemon client; do
	if [ -e "$dir/$side/cert.pem" ] && [ "${FORCE:-}" != 1 ]; then
		echo "$0: $dir/$side/cert.pem is there; FORCE=1 replaces it" >&2
		exit 1
	fi
done

# The function expects the name buildkitd at every address that it dials. The other names
# are for buildctl and for clients that expect the address.
names="DNS:buildkitd,DNS:buildkitd.openfaas,DNS:buildkitd.openfaas.svc,DNS:buildkitd.openfaas.svc.cluster.local,DNS:localhost,IP:127.0.0.1,IP:::1"
for name; do
	case $name in
	*[!0-9a-zA-Z.:*-]* | '') echo "$0: neither a name nor an address: $name" >&2; exit 2 ;;
	*:*) names="$names,IP:$name" ;;
	*[!0-9.]*) names="$names,DNS:$name" ;;
	*) names="$names,IP:$name" ;;
	esac
done

mkdir -p "$dir/daemon" "$dir/client"
# Inside DIR, so that finished files are moved into place on one file system.
tmp=$(mktemp -d "$dir/.certs.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

cat >"$tmp/openssl.cnf" <<EOF
[req]
distinguished_name = name
prompt = no
[name]
CN = builder CA
[ca]
basicConstraints = critical,CA:true,pathlen:0
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[daemon]
basicConstraints = critical,CA:false
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
[client]
basicConstraints = critical,CA:false
keyUsage = critical,digitalSignature
extendedKeyUsage = clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
EOF

new_key() {
	openssl ecparam -name prime256v1 -genkey -noout -out "$1"
}

if [ -e "$dir/ca-key.pem" ]; then
	cp "$dir/ca.pem" "$tmp/ca.pem"
	cp "$dir/ca-key.pem" "$tmp/ca-key.pem"
	if ! openssl x509 -in "$tmp/ca.pem" -noout -checkend $((days * 86400)) >/dev/null; then
		echo "$0: $dir/ca.pem ends within $days days: make a new CA in another folder" >&2
		exit 1
	fi
else
	new_key "$tmp/ca-key.pem"
	openssl req -x509 -new -sha256 -config "$tmp/openssl.cnf" -extensions ca \
		-key "$tmp/ca-key.pem" -days "$ca_days" -out "$tmp/ca.pem"
fi

for side in daemon client; do
	case $side in
	daemon) subject=/CN=buildkitd ;;
	client) subject=/CN=builder ;;
	esac
	mkdir "$tmp/$side"
	new_key "$tmp/$side/key.pem"
	openssl req -new -sha256 -config "$tmp/openssl.cnf" -key "$tmp/$side/key.pem" -subj "$subject" -out "$tmp/$side.csr"
	openssl x509 -req -sha256 -in "$tmp/$side.csr" -CA "$tmp/ca.pem" -CAkey "$tmp/ca-key.pem" \
		-set_serial "0x$(openssl rand -hex 16)" -days "$days" \
		-extfile "$tmp/openssl.cnf" -extensions "$side" -out "$tmp/$side/cert.pem" 2>/dev/null
	cp "$tmp/ca.pem" "$tmp/$side/ca.pem"
done

# DIR is changed only now, after everything has been made: a failure leaves it as it was.
mv "$tmp/ca-key.pem" "$tmp/ca.pem" "$dir/"
for side in daemon client; do
	mv "$tmp/$side/ca.pem" "$tmp/$side/key.pem" "$tmp/$side/cert.pem" "$dir/$side/"
	chmod 644 "$dir/$side/cert.pem" "$dir/$side/ca.pem"
done
chmod 644 "$dir/ca.pem"
echo "$dir: daemon and client certificates until $(openssl x509 -in "$dir/daemon/cert.pem" -noout -enddate | cut -d= -f2)"
