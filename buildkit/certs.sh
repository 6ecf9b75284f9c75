#!/bin/sh
# Makes the certificates with which buildkitd and the function know each other, and those of
# a NATS server for records of builds.
#
#   certs.sh DIR [NAME-OR-ADDRESS...]
#
#   DIR/ca.pem                            the CA's certificate
#   DIR/ca-key.pem                        the CA's key; put it into no Secret
#   DIR/daemon/{ca.pem,cert.pem,key.pem}  for buildkitd, with the names below
#   DIR/client/{ca.pem,cert.pem,key.pem}  for the function
#
# and with SIDES=nats instead of the last two (SIDES="daemon client"):
#
#   DIR/nats/{ca.pem,cert.pem,key.pem}    for the NATS server, with the names below
#   DIR/nats/credential                   the function's user and password there
#
# It keeps a CA and a credential that are in DIR. It replaces certificates only with FORCE=1.
# They are valid for DAYS days (365), and the CA for CA_DAYS days (3650).
set -eu
umask 077

[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2; exit 2; }
dir=$1
shift
days=${DAYS:-365}
ca_days=${CA_DAYS:-3650}
sides=${SIDES:-daemon client}

for side in $sides; do
	case $side in
	daemon | client | nats) ;;
	*) echo "$0: SIDES has neither daemon nor client nor nats: $side" >&2; exit 2 ;;
	esac
done
for side in $sides; do
	if [ -e "$dir/$side/cert.pem" ] && [ "${FORCE:-}" != 1 ]; then
		echo "$0: $dir/$side/cert.pem is there; FORCE=1 replaces it" >&2
		exit 1
	fi
done

# The function expects the name buildkitd at every daemon's address that it dials. It expects
# the address itself of a NATS server. The other names are for buildctl, and for other clients
# that expect the address.
services() { # NAME
	echo "DNS:$1,DNS:$1.openfaas,DNS:$1.openfaas.svc,DNS:$1.openfaas.svc.cluster.local"
}
more="DNS:localhost,IP:127.0.0.1,IP:::1"
for name; do
	case $name in
	*[!0-9a-zA-Z.:*-]* | '') echo "$0: neither a name nor an address: $name" >&2; exit 2 ;;
	*:*) more="$more,IP:$name" ;;
	*[!0-9.]*) more="$more,DNS:$name" ;;
	*) more="$more,IP:$name" ;;
	esac
done

for side in $sides; do
	mkdir -p "$dir/$side"
done
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
subjectAltName = $(services buildkitd),$more
[client]
basicConstraints = critical,CA:false
keyUsage = critical,digitalSignature
extendedKeyUsage = clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
# Servers of a cluster are clients of one another, by the names that nats-three gives them.
[nats]
basicConstraints = critical,CA:false
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth,clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $(services builder-nats),DNS:*.builder-nats-routes,$more
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

for side in $sides; do
	case $side in
	daemon) subject=/CN=buildkitd ;;
	client) subject=/CN=builder ;;
	nats) subject=/CN=builder-nats ;;
	esac
	mkdir "$tmp/$side"
	new_key "$tmp/$side/key.pem"
	openssl req -new -sha256 -config "$tmp/openssl.cnf" -key "$tmp/$side/key.pem" -subj "$subject" -out "$tmp/$side.csr"
	openssl x509 -req -sha256 -in "$tmp/$side.csr" -CA "$tmp/ca.pem" -CAkey "$tmp/ca-key.pem" \
		-set_serial "0x$(openssl rand -hex 16)" -days "$days" \
		-extfile "$tmp/openssl.cnf" -extensions "$side" -out "$tmp/$side/cert.pem" 2>/dev/null
	cp "$tmp/ca.pem" "$tmp/$side/ca.pem"
done
if [ -d "$tmp/nats" ] && [ ! -e "$dir/nats/credential" ]; then
	# The server reads this as a setting too. A letter at the beginning keeps it from being
	# a number there.
	echo "builder:k$(openssl rand -hex 32)" >"$tmp/nats/credential"
fi

# DIR is changed only now, after everything has been made: a failure leaves it as it was.
mv "$tmp/ca-key.pem" "$tmp/ca.pem" "$dir/"
for side in $sides; do
	mv "$tmp/$side"/* "$dir/$side/"
	chmod 644 "$dir/$side/cert.pem" "$dir/$side/ca.pem"
done
chmod 644 "$dir/ca.pem"
echo "$dir: $(echo "$sides" | sed 's/ / and /g') certificates until $(openssl x509 -in "$dir/$side/cert.pem" -noout -enddate | cut -d= -f2)"
