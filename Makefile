# The habits of this project; `make help` lists them.

# A fresh machine has a toolchain and sudo or root; everything else is installed here.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# A CSI client for the demo and the benchmark.
CLIENT = $(or $(CARGO_TARGET_DIR),target)/release/examples/csi
KERNEL ?= 6.12
# The test binary of the scenarios, as cargo names it.
SCENARIOS = $$(cargo test --release --locked --no-run --test vm --message-format=json | jq -r 'select(.profile.test and .target.name == "vm").executable')
VM = $(SUDO) e2e/vm run --kernel $(KERNEL)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the release binary
	cargo build --release --locked

.PHONY: client
client:
	cargo build --release --locked --bins --example csi

.PHONY: demo
demo: client ## show the main job on real parts, in a virtual machine
	@$(VM) --copy $(CLIENT) --copy e2e/demo -- /root/demo

.PHONY: test
test: test-unit test-host test-vm test-sanity ## run every test: pure logic, this kernel (root), a virtual machine with an NFS server

.PHONY: test-unit
test-unit: ## run the tests of pure logic; no root needed
	cargo test --release --locked --lib --bins

.PHONY: test-host
test-host: tools ## run the tests that need root and this kernel's loop devices, but no NFS
	$(SUDO) $(shell command -v cargo) test --release --locked --test host -- --include-ignored --test-threads=1

.PHONY: test-vm
test-vm: tools ## run the scenarios in the virtual machine (KERNEL=6.1 for another kernel, FILTER=name for one)
	cargo build --release --locked
	$(VM) --copy $(SCENARIOS) -- sh -c '/root/vm-* --include-ignored --test-threads=1 $(FILTER)'

.PHONY: test-sanity
test-sanity: target/tools/csi-sanity build ## run the CSI project's own conformance tests in the virtual machine (needs Go)
	@if [ -x $< ]; then $(VM) --copy $< --copy e2e/sanity -- /root/sanity; \
	else echo "test-sanity: SKIPPED: csi-sanity could not be installed: it needs Go 1.24 or newer"; fi

# In CI nothing is skipped.
target/tools/csi-sanity:
	CGO_ENABLED=0 GOBIN=$(CURDIR)/target/tools go install github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@v5.5.0 || [ -z "$(CI)" ]

.PHONY: soak
soak: export SOAK = 1
soak: tools ## run the long tests at full length
	$(if $(SUDO),$(SUDO) --preserve-env=SOAK) $(shell command -v cargo) test --release --locked --test host -- --include-ignored --test-threads=1

.PHONY: bench
bench: client ## measure against the tools that users would pick, in the virtual machine
	@$(VM) --copy $(CLIENT) --copy e2e/bench -- /root/bench

.PHONY: lint
lint: tools ## check format, lints, licences and advisories, shell scripts
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings
	cargo deny --locked check licenses bans sources
	shellcheck e2e/vm e2e/demo e2e/bench e2e/sanity e2e/guest/build e2e/guest/init e2e/guest/initramfs e2e/guest/nfs-server .ci/run

.PHONY: schema
schema: ## write the JSON Schema of the mount spec anew
	UPDATE_SCHEMA=1 cargo test --release --locked --lib schema

.PHONY: tools
tools: ## install what the tests and lints need
	@missing=; for tool in mksquashfs:squashfs-tools jq:jq shellcheck:shellcheck; do \
		command -v "$${tool%:*}" >/dev/null || missing="$$missing $${tool#*:}"; done; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get -q update && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -q -y install $$missing; fi
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
