# For a Debian or Ubuntu with Go, git, gcc and make. Each target first installs the missing
# packages that it needs. To install them takes root. SETUP=no only prints them, and stops.
# A target that starts daemons always needs root, for buildkitd and runc.

SHELL := /bin/bash -euo pipefail -c
.DEFAULT_GOAL := help

FUNCTION ?=
IMAGE ?=
REGISTRY_CONFIG ?=
PAYLOAD_SECRET ?= payload-secret
BUILD_SECRETS_KEY ?=
NATS ?=
NAME ?=
IMAGES ?=
VIA ?= kubectl
STANDINS ?= auto
OPENFAAS ?= true
DIR ?= buildkit/certs
TENANTS ?= tenants.yml
FUZZTIME ?= 20s

# Not go run, which would not pass SIGTERM on.
stack = go -C tests build -o ../.cache/bin/stack ./cmd/stack && exec .cache/bin/stack
flags = -standins=$(STANDINS) $(if $(REGISTRY_CONFIG),-registry-config=$(REGISTRY_CONFIG))

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: setup ## build, push, pull back and run a sample, or FUNCTION=dir IMAGE=ref
	@$(stack) run $(flags) $(if $(FUNCTION),-function=$(FUNCTION)) $(if $(IMAGE),-image=$(IMAGE))

.PHONY: up
up: setup ## leave the builder running with its daemons behind OpenFaaS until Ctrl-C; OPENFAAS=false leaves OpenFaaS out
	@$(stack) up $(flags) -openfaas=$(OPENFAAS)

.PHONY: publish
publish: setup ## build the builder's own image with itself and push it: IMAGE=ref [REGISTRY_CONFIG=config.json]
	@$(stack) publish $(flags) -image=$(IMAGE)

.PHONY: envelope
envelope: ## print a signed build to paste into the OpenFaaS UI: FUNCTION=dir [IMAGE=ref] [TENANT=name] [PAYLOAD_SECRET=file]
	@tests/envelope.sh $(or $(FUNCTION),tests/testdata/hello) "$(PAYLOAD_SECRET)" "$(IMAGE)" "$(TENANT)"

.PHONY: test
test: setup test-unit test-e2e ## all tests but test-timing, test-k8s and test-fuzz

# First without cgo, as in the image. Then with the race detector, under which everything
# takes ten times as long: -short shrinks the largest inputs. Tests that measure memory
# are built without it alone. Four packages at a time, since some of them wait more than
# they compute.
.PHONY: test-unit
test-unit: setup ## the function's and the template's own tests: no root, no network, no daemon
	CGO_ENABLED=0 go -C builder test -p 4 -timeout 20m ./payload ./server ./...
	go -C builder test -race -short -p 4 -timeout 20m ./payload ./server ./...
	go -C template/golang-middleware test -race -timeout 20m ./... ./function/...

# The tests of strangers run alone: they have a limit for how long signed builds wait meanwhile.
.PHONY: test-e2e
test-e2e: setup ## end-to-end tests against real daemons
	$(MAKE) --no-print-directory -j2 test-packages test-apart
	go -C tests test -count=1 -timeout 40m -run 'Strangers$$' ./faults

# Each package starts its own stack. The function has the race detector. The tests of most packages
# do without: with it, a run takes a fifth more of the processor. Two packages run at a time, the
# longest first, so that none of these runs alone at the end. -count=1: the test cache would not
# notice a change of the function, which is another module. MAKEFLAGS is empty because tests call
# make, which would look for the job server of this one.
raced = client cmd/stack manifests records stack
.PHONY: test-packages
test-packages:
	all=$$(go -C tests list ./... | grep -vE '/tests/($(subst $() ,|,$(raced)))$$'); \
		MAKEFLAGS= go -C tests test -count=1 -p 2 -timeout 40m -skip 'Strangers$$|^TestSelf$$' ./faults ./clients ./openfaas ./content ./builds $$all

# The longest of all tests, which compiles the function in an image. Then, with the race detector,
# the packages that run the function's store in their own process, and those that all others use.
.PHONY: test-apart
test-apart:
	status=0; \
		MAKEFLAGS= go -C tests test -count=1 -timeout 40m -run '^TestSelf$$' ./clients || status=1; \
		MAKEFLAGS= go -C tests test -race -count=1 -p 1 -timeout 40m $(addprefix ./,$(raced)) || status=1; \
		exit $$status

# This takes long, and needs a machine that does nothing else, so make test leaves it out.
.PHONY: test-timing
test-timing: setup ## faults with narrow limits, three rounds of strangers and 1000 builds, tenants in force, a leader of NATS killed; on a machine that does nothing else
	go -C tests test -count=1 -timeout 60m ./faults -timing -rounds=3 -soak=1000
	go -C tests test -count=1 -timeout 10m -run '^TestInForce$$' ./tenants -timing
	go -C tests test -race -count=1 -timeout 10m -run '^TestLeaderKilled$$' ./records -timing

# This takes half an hour on a fresh machine, half of it to compile Kubernetes, so make test
# leaves it out.
.PHONY: test-k8s
test-k8s: setup ## the manifests and the function on a real Kubernetes of one node, made here
	go -C tests test -tags k8s -count=1 -timeout 90m -v ./k8s

# Without -fuzzminimizetime, go test spends the time on making inputs smaller.
.PHONY: test-fuzz
test-fuzz: setup ## every fuzz target for FUZZTIME each
	@found=0; for pkg in $$(go -C builder list ./...); do \
		for target in $$(go -C builder test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			found=1; echo "$$pkg $$target"; \
			go -C builder test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$pkg; \
		done; \
	done; \
	[ $$found = 1 ] || { echo 'no fuzz target found'; exit 1; }

.PHONY: bench
bench: setup ## time the function against buildctl and the BuildKit client
	go -C tests run ./cmd/bench

.PHONY: bench-pool
bench-pool: setup ## time rebuilds on three daemons with the function's placement against random placement
	go -C tests run ./cmd/bench-pool

.PHONY: bench-records
bench-records: setup ## measure the store of build records on NATS servers; on a machine that does nothing else
	go -C tests test -run '^$$' -bench . -benchtime 1x -timeout 30m -p 1 ./records ./builds

.PHONY: certs
certs: ## the CA and both certificates for buildkitd and the function: DIR=buildkit/certs, FORCE=1 replaces
	buildkit/certs.sh $(DIR)

.PHONY: certs-nats
certs-nats: ## the certificate and the credential of a NATS server for records of builds: DIR=buildkit/certs, FORCE=1 replaces the certificate
	SIDES=nats buildkit/certs.sh $(DIR)

.PHONY: secrets
secrets: ## the Secrets that stack.yml names: VIA=kubectl or faas-cli, PAYLOAD_SECRET=, REGISTRY_CONFIG=, BUILD_SECRETS_KEY=, NATS=buildkit/certs/nats
	@PAYLOAD_SECRET=$(PAYLOAD_SECRET) REGISTRY_CONFIG=$(REGISTRY_CONFIG) BUILD_SECRETS_KEY=$(BUILD_SECRETS_KEY) NATS=$(NATS) buildkit/secrets.sh $(VIA)

.PHONY: tenant
tenant: ## print an entry of the file of tenants, with a new id and a new key: NAME=acme IMAGES=registry.example.com/acme
	@buildkit/tenant.sh '$(NAME)' '$(IMAGES)'

.PHONY: tenant-forget
tenant-forget: ## remove a tenant's contexts, cache tags and records: ID=, CONTEXT_REPOSITORY=, CACHE_REPOSITORY=, TENANTS=, REGISTRY_CONFIG=, REGISTRY_CA=host=file, NATS_URL=, NATS=buildkit/certs/nats, PAYLOAD_SECRET=
	@go -C builder build -o ../.cache/bin/tenant-forget ./cmd/tenant-forget
	@.cache/bin/tenant-forget -id=$(ID) -contexts=$(CONTEXT_REPOSITORY) -cache=$(CACHE_REPOSITORY) \
		$(addprefix -tenants=,$(TENANTS)) $(addprefix -ca=,$(REGISTRY_CA)) -registry-config=$(or $(REGISTRY_CONFIG),$$HOME/.docker/config.json) \
		$(if $(NATS_URL),-nats=$(NATS_URL) -payload-secret=$(PAYLOAD_SECRET) $(if $(NATS),-nats-credential=$(NATS)/credential -nats-ca=$(NATS)/ca.pem))

# go vet and staticcheck read the tests on Kubernetes too, which need a tag.
.PHONY: lint
lint: setup vuln ## gofmt, shellcheck, go vet, staticcheck, go mod tidy and govulncheck
	@unformatted=$$(git ls-files '*.go' | xargs gofmt -l); [ -z "$$unformatted" ] || { echo "not formatted: $$unformatted"; exit 1; }
	shellcheck .ci/run $$(git ls-files '*.sh')
	go -C builder vet ./...
	go -C tests vet -tags k8s ./...
	go -C template/golang-middleware vet ./... ./function/...
	go -C tests/tools/staticcheck build -o ../../../.cache/bin/staticcheck honnef.co/go/tools/cmd/staticcheck
	cd builder && ../.cache/bin/staticcheck ./...
	cd tests && ../.cache/bin/staticcheck -tags k8s ./...
	cd template/golang-middleware && ../../.cache/bin/staticcheck ./... ./function/...
	@for mod in $$(git ls-files '*go.mod'); do echo "go mod tidy -diff of $$mod"; GOWORK=off go -C $$(dirname $$mod) mod tidy -diff; done

# govulncheck asks vuln.go.dev for what is known of each module.
.PHONY: vuln
vuln: setup ## govulncheck alone
	@if curl -sSf -m 20 -o /dev/null https://vuln.go.dev/index/db.json; then \
		go -C tests/tools/govulncheck build -o ../../../.cache/bin/govulncheck golang.org/x/vuln/cmd/govulncheck; \
		for module in builder tests; do echo "govulncheck of $$module"; (cd $$module && ../.cache/bin/govulncheck ./...); done; \
	else echo 'NOT CHECKED for vulnerabilities: vuln.go.dev cannot be reached'; fi

.PHONY: clean
clean: ## remove what was built; the next run takes minutes again
	rm -rf .cache

# It runs once for all targets that make was called with, and before them.
.PHONY: setup
setup:
	@tests/setup/setup.sh $(MAKECMDGOALS)
