#!/bin/sh
# Prints an entry of the file of tenants, with a new id and a new key, to paste below
# "tenants:".
#
#   tenant.sh NAME IMAGES
#
# IMAGES are prefixes of repositories, with commas between them. The id and the key are
# random: 64 bits, and 256 bits.
set -eu

usage() {
	echo 'usage: make tenant NAME=acme IMAGES=registry.example.com/acme[,…]' >&2
	exit 2
}
[ $# = 2 ] || usage
name=$1 images=$2
case $name in '' | *[!a-z0-9._-]*) usage ;; esac
case $images in '' | *[!A-Za-z0-9.:/_,-]*) usage ;; esac

hex() { # BYTES
	od -An -v -tx1 -N"$1" /dev/urandom | tr -d ' \n'
}
cat <<ENTRY
  $name:
    id: t-$(hex 8)
    keys:
      - {id: k1, secret: "$(hex 32)"}
    images: ["$(echo "$images" | sed 's/,/", "/g')"]
ENTRY
