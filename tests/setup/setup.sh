#!/bin/bash
# Installs the packages that targets of the Makefile need and this machine lacks.
#
#	setup.sh TARGET...
#
# It is for a Debian or Ubuntu that has Go, git, gcc and make. It prints the missing
# packages and installs them with apt-get, as root. Without root, without apt-get or with
# SETUP=no it only prints them, and exits with 1. It prints nothing if nothing is missing.
set -euo pipefail

# Another apt-get may hold a lock for this many seconds.
patience=600

say() {
	echo "setup: $*" >&2
}

# The checks below look for files and not for packages: a program need not have been
# installed by apt-get.
has() {
	type -P "$1" >/dev/null
}

certificates() {
	local file
	for file in "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do
		if [ -s "$file" ]; then
			return 0
		fi
	done
	return 1
}

# gcc alone cannot link: Debian's package of it does not depend on libc6-dev.
links() {
	gcc -x c -o /dev/null - <<<'int main(void) { return 0; }' 2>/dev/null
}

seccomp() {
	pkg-config --exists libseccomp 2>/dev/null
}

# Images are made of busybox and contain no libraries.
static_busybox() {
	local path
	path=$(type -P busybox) && ! ldd "$path" >/dev/null 2>&1
}

# The names are those that chromedp looks for. Each is started: Ubuntu has a program
# chromium-browser that does nothing but ask for the snap.
browser() {
	local name
	for name in headless_shell headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
		if "$name" --version >/dev/null 2>&1; then
			return 0
		fi
	done
	return 1
}

ubuntu() {
	[[ -e /etc/os-release && $'\n'$(</etc/os-release)$'\n' == *$'\nID=ubuntu\n'* ]]
}

# The missing packages, and the problems that the user has to solve.
packages=()
problems=()

need() { # PACKAGE
	[[ " ${packages[*]} " == *" $1 "* ]] || packages+=("$1")
}

problem() { # TEXT
	local text
	for text in "${problems[@]}"; do
		if [ "$text" = "$1" ]; then
			return 0
		fi
	done
	problems+=("$1")
}

need_go() {
	has go || problem 'go is not on the PATH, which sudo replaces: get it from https://go.dev/dl/'
	certificates || need ca-certificates
}

# The race detector is linked with gcc.
need_compiler() {
	need_go
	has gcc || need gcc
	links || need libc6-dev
}

need_stack() { # TARGET
	[ "$(id -u)" = 0 ] || problem "make $1 needs root, for buildkitd and runc: sudo -E make $1"
	need_compiler
	has pkg-config || need pkg-config
	seccomp || need libseccomp-dev
	has openssl || need openssl
	static_busybox || need busybox-static
	has mount || need mount
}

need_end_to_end() { # TARGET
	need_stack "$1"
	has curl || need curl
	has mkfs.ext4 || need e2fsprogs
	has git || need git
	has gzip || need gzip
	has iptables || need iptables
	has jq || need jq
	has node || need nodejs
	has python3 || need python3
	has tar || need tar
	has zstd || need zstd
	if ! browser; then
		if ubuntu; then
			problem 'tests/page needs a browser, and apt-get has none on Ubuntu: install google-chrome, or chromium by snap'
		else
			need chromium
		fi
	fi
}

need_kubernetes() { # TARGET
	need_stack "$1"
	has /usr/lib/cni/ptp || need containernetworking-plugins
	has conntrack || need conntrack
	has etcd || need etcd-server
	has ip || need iproute2
	has iptables || need iptables
	has newuidmap || need uidmap
	has pgrep || need procps
	has setcap || need libcap2-bin
}

need_vuln() {
	need_go
	has curl || need curl
}

need_lint() {
	need_vuln
	need_compiler
	has git || need git
	has shellcheck || need shellcheck
}

# find_missing sets packages and problems.
find_missing() { # TARGET...
	local target
	packages=() problems=()
	for target; do
		case $target in
		help | envelope | certs | certs-nats | secrets | tenant | tenant-forget | clean) ;;
		run | up | publish | bench | bench-pool | bench-records) need_stack "$target" ;;
		test | test-e2e | test-timing) need_end_to_end "$target" ;;
		test-unit) need_compiler ;;
		test-k8s) need_kubernetes "$target" ;;
		test-fuzz) need_go ;;
		lint) need_lint ;;
		vuln) need_vuln ;;
		*) problem "no packages are listed for the target $target" ;;
		esac
	done
}

# apt_get shows what apt-get prints only when it fails. apt-get waits for dpkg's lock by
# itself, but not for the locks of its lists and its archives: it is called again until
# it has them.
apt_get() {
	local out deadline=$((SECONDS + patience))
	until out=$(LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get -qq -o "DPkg::Lock::Timeout=$patience" "$@" 2>&1 </dev/null); do
		if [[ $out != *'Could not get lock'* || $SECONDS -ge $deadline ]]; then
			say "apt-get $*: $out"
			return 1
		fi
		sleep 1
	done
}

find_missing "$@"
if [ ${#packages[@]} -gt 0 ]; then
	if ! has apt-get; then
		problem "missing, by the names of Debian's packages: ${packages[*]}"
	elif [ "${SETUP:-}" = no ] || [ "$(id -u)" != 0 ]; then
		problem "missing: apt-get install --no-install-recommends ${packages[*]}"
	else
		say "installing ${packages[*]}"
		apt_get update || say 'going on with the lists of packages that are there'
		apt_get install -y --no-upgrade --no-install-recommends "${packages[@]}"
		find_missing "$@"
		[ ${#packages[@]} = 0 ] || problem "installed, but not found: ${packages[*]}"
	fi
fi
for text in "${problems[@]}"; do
	say "$text"
done
[ ${#problems[@]} = 0 ]
