# The habits of this project; `make help` lists them.

SHELL = /bin/bash
.SHELLFLAGS = -eo pipefail -c

# A fresh machine has a toolchain and sudo or root; everything else is installed here.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# What is built is for this machine, or for the architecture that ARCH names as Debian does: ARCH=arm64.
HOST := $(if $(filter aarch64,$(shell uname -m)),arm64,amd64)
ARCH = $(HOST)
$(if $(filter amd64 arm64,$(ARCH)),,$(error ARCH=$(ARCH): amd64 and arm64 are known))
CPU = $(if $(filter arm64,$(ARCH)),aarch64,x86_64)
CARGO_BUILD_TARGET = $(CPU)-unknown-linux-gnu
# One static binary, with no path of this machine in it: what is tested is what is shipped.
RUSTFLAGS = -C target-feature=+crt-static --remap-path-prefix=$(CURDIR)=/src \
	--remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=/cargo
export CARGO_BUILD_TARGET RUSTFLAGS
BUILT = $(or $(CARGO_TARGET_DIR),target)/$(CARGO_BUILD_TARGET)/release
ifneq ($(ARCH),$(HOST))
export CARGO_TARGET_$(shell tr a-z- A-Z_ <<<$(CARGO_BUILD_TARGET))_LINKER = $(CPU)-linux-gnu-gcc
endif
# A CSI client for the demo and the benchmark.
CLIENT = $(BUILT)/examples/csi
KERNEL ?= 6.12
# Sets $binary to the one of an integration test, as cargo names it.
test_binary = binary=$$(cargo test --release --locked --no-run --test $(1) --message-format=json | jq -r 'select(.profile.test and .target.name == "$(1)").executable')
VM = $(SUDO) e2e/vm run --kernel $(KERNEL) --arch $(ARCH) $(if $(SOAK),--env SOAK=1 --timeout 14400) --bin $(BUILT)/csi-driver-squashfs

# `make test` runs its parts side by side; RING notes what each takes. Of those that wait for something with a deadline one runs
# at a time, by a lock on a directory; what takes a processor for long gets the time that they do not need.
RING = e2e/ring $(or $(ring),$@)
ALONE = flock --close e2e $(RING)
BESIDE = chrt --idle 0 $(RING)
# apt-get does not wait for another one that reads the lists.
APT = $(SUDO) env DEBIAN_FRONTEND=noninteractive flock /var/lib/apt apt-get -q

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the release binary
	cargo build --release --locked

# To build for another architecture: Debian's compiler for that, and Rust's standard library, from where the toolchain is.
ifneq ($(ARCH),$(HOST))
build client builder compile: | cross
endif
.PHONY: cross
cross:
	@command -v $(CPU)-linux-gnu-gcc >/dev/null || { $(APT) update && $(APT) -y install gcc-$(subst _,-,$(CPU))-linux-gnu libc6-dev-$(ARCH)-cross; }
	@[ -d "$$(rustc --print target-libdir --target $(CARGO_BUILD_TARGET))" ] || \
		if command -v rustup >/dev/null; then rustup target add $(CARGO_BUILD_TARGET); else \
		$(SUDO) dpkg --add-architecture $(ARCH) && $(APT) update && $(APT) -y install libstd-rust-dev:$(ARCH); fi

.PHONY: client
client: build
	cargo build --release --locked --example csi

.PHONY: builder
builder: ## build the program that makes images, which is no part of the driver
	cargo build --release --locked --package csi-driver-squashfs-build

# The same bytes from the same program: nothing of the time or the machine gets into the archive's layers.
IMAGES = target/image
ARCHIVE = $(IMAGES)/csi-driver-squashfs-$(ARCH).tar
# $(call archive,NAME,CONTAINERFILE,CONTEXT) writes NAME-ARCH.tar into $(IMAGES).
BUILDAH = $(SUDO) buildah --storage-driver vfs --root $(CURDIR)/$(IMAGES)/storage --runroot $(CURDIR)/$(IMAGES)/run
archive = version=$$(release/version); image=ghcr.io/csi-driver-squashfs/$(1):$$version; \
	$(BUILDAH) build --quiet --timestamp 0 --arch $(ARCH) --build-arg VERSION=$$version --tag $$image --file $(2) $(3) && \
	$(BUILDAH) push --quiet $$image oci-archive:$(IMAGES)/$(1)-$(ARCH).tar:$$image && \
	$(SUDO) rm -rf $(IMAGES)/storage $(IMAGES)/run && ls -l $(IMAGES)

.PHONY: image
image: tools build ## build the container image, an OCI archive below target/image, without a registry or a daemon
	@$(SUDO) rm -rf $(IMAGES)/storage $(IMAGES)/run $(ARCHIVE) && mkdir -p $(IMAGES)
	$(call archive,csi-driver-squashfs,Containerfile,$(BUILT))

ARCHES = amd64 arm64
MULTIARCH = $(IMAGES)/csi-driver-squashfs.tar
.PHONY: image-multiarch
image-multiarch: ## build it for amd64 and arm64, and one OCI archive with both
	for arch in $(ARCHES); do $(MAKE) --no-print-directory image ARCH=$$arch; done
	$(SUDO) rm -f $(MULTIARCH)
	$(SUDO) release/index oci-archive:$(MULTIARCH):ghcr.io/csi-driver-squashfs/csi-driver-squashfs:$$(release/version) \
		$(ARCHES:%=$(IMAGES)/csi-driver-squashfs-%.tar)
	ls -l $(MULTIARCH)

BUILDER_ARCHIVE = target/builder-image/csi-driver-squashfs-build-$(ARCH).tar

.PHONY: builder-image
builder-image: IMAGES = target/builder-image
builder-image: tools builder ## build the container image of the program that makes images, with tar2sqfs in it
	@[ $(HOST) = $(ARCH) ] || { echo "$@: tar2sqfs is this machine's, which is not $(ARCH): run it on one that is"; exit 1; }
	@$(SUDO) rm -rf $(IMAGES) && mkdir -p $(IMAGES)
	builder/root $(IMAGES)/root $(BUILT)/csi-driver-squashfs-build
	$(call archive,csi-driver-squashfs-build,builder/Containerfile,$(IMAGES)/root)

# The version is that of Cargo.toml; release/version knows where else it stands.
.PHONY: version
version: ## write another version wherever it stands: make version VERSION=1.2.3
	release/version set $(VERSION)
	release/version check

# What .github/workflows/release.yml uploads; RELEASING.md has the rest. That runs the first part on a machine of each architecture.
RELEASE = target/release-$(shell release/version)
.PHONY: release
release: release-check ## build all that a release uploads, for this architecture, into target/release-VERSION; uploads nothing
	rm -rf $(RELEASE)
	$(MAKE) --no-print-directory release-programs
	$(MAKE) --no-print-directory release-chart

.PHONY: release-check
release-check:
	@changes=$$(git status --porcelain); [ -z "$$changes" ] || { printf 'release: not all is committed:\n%s\n' "$$changes"; exit 1; }
	@tag=$$(git describe --tags --exact-match --match 'v*') && release/version check "$$tag"
	@release/notes "$$(release/version)" >/dev/null

.PHONY: release-programs
release-programs: image builder-image cargo-cyclonedx
	mkdir -p $(RELEASE)
	cp $(ARCHIVE) $(BUILDER_ARCHIVE) $(RELEASE)
	for program in csi-driver-squashfs csi-driver-squashfs-build; do cp $(BUILT)/$$program $(RELEASE)/$$program-linux-$(ARCH); done
	release/sbom csi-driver-squashfs $(CARGO_BUILD_TARGET) >$(RELEASE)/csi-driver-squashfs-linux-$(ARCH).cdx.json
	release/sbom csi-driver-squashfs-build $(CARGO_BUILD_TARGET) target/builder-image/root >$(RELEASE)/csi-driver-squashfs-build-linux-$(ARCH).cdx.json

.PHONY: release-chart
release-chart: target/tools/helm
	@# Helm writes down the times of files: so they are those of the commit, and the archive is the same when it is made again.
	find charts/csi-driver-squashfs -type f -exec touch --date=@$$(git log -1 --format=%ct) {} +
	target/tools/helm package charts/csi-driver-squashfs --destination $(RELEASE)
	cp manifests/csi-driver-squashfs.yaml $(RELEASE)
	release/notes "$$(release/version)" >$(RELEASE)/notes.md
	cd $(RELEASE) && sha256sum csi-driver-squashfs* >SHA256SUMS && cat SHA256SUMS

# With the credentials of `docker login`. PUBLISH_TO=localhost:5000/try PLAIN_HTTP=1 shows what comes of it.
PUBLISH_TO = ghcr.io/csi-driver-squashfs
.PHONY: release-publish
release-publish: target/tools/helm
	$(SUDO) env HOME=$(HOME) PATH=$(CURDIR)/target/tools:$$PATH release/publish $(if $(PLAIN_HTTP),--plain-http) $(RELEASE) "$$(release/version)" $(PUBLISH_TO)

# By the identity of the workflow that runs it, without a key.
.PHONY: release-sign
release-sign:
	awk '{ print $$2 "@" $$3 }' $(RELEASE)/published | xargs -n 1 cosign sign --yes --recursive
	cosign sign-blob --yes --bundle $(RELEASE)/SHA256SUMS.sigstore.json $(RELEASE)/SHA256SUMS

.PHONY: demo
demo: client ## show the main job on real parts, in a virtual machine
	@$(VM) --copy $(CLIENT) --copy e2e/lib.sh --copy e2e/demo -- /root/demo

RINGS = test-unit test-host test-python test-builder test-vm test-selinux test-sanity test-chart test-prometheus test-image test-kubernetes

.PHONY: test
test: ## run every test: pure logic, this kernel (root), a virtual machine with an NFS server, Kubernetes
	@rm -rf target/rings target/rings.output
	@$(MAKE) --no-print-directory --jobs --output-sync --keep-going ALL=1 $(RINGS) || true; e2e/ring --summary $(RINGS)

# Before any of them, so that none waits for a processor while the compiler has both.
ifdef ALL
build client test-unit test-host test-vm: | compile
endif

.PHONY: compile
compile:
	$(RING) cargo test --release --locked --no-run

.PHONY: test-unit
test-unit: ## run the tests of pure logic, and of the core on a double of the kernel; no root needed
	$(RING) cargo test --release --locked --lib --bins
	cargo test --release --locked --package csi-driver-squashfs-build

.PHONY: test-host
test-host: tools ## run the tests that need root and this kernel's loop devices, but no NFS
	$(call test_binary,host); $(ALONE) $(SUDO) $$binary --include-ignored --test-threads=1

# Debian's grpcio is that of its release: the test is about one version, which names the authority in a certain way.
target/python/complete: private ring = python
target/python/complete: e2e/python/requirements.txt | tools
	python3 -m venv --clear $(@D)
	$(RING) $(@D)/bin/pip install -q --disable-pip-version-check --only-binary :all: --require-hashes -r $<
	touch $@

.PHONY: test-python
test-python: target/python/complete build ## call every service as clients in Python do, on gRPC's C core (root)
	$(ALONE) $(SUDO) $(<D)/bin/python e2e/python/calls.py $(BUILT)/csi-driver-squashfs

# Debian's package would start a server: only the program is taken from it.
REGISTRY = target/tools/docker-registry
$(REGISTRY): | tools
	$(APT) update
	mkdir -p $(@D) && cd $(@D) && flock /var/lib/apt apt-get -q download docker-registry && \
		dpkg-deb --fsys-tarfile docker-registry_*.deb | tar -x --strip-components=3 ./usr/bin/docker-registry && rm docker-registry_*.deb

.PHONY: test-builder
test-builder: $(REGISTRY) build builder-image ## make images of real container images, from a real registry, and look into them (root)
	$(ALONE) $(SUDO) e2e/builder/run $(BUILT)/csi-driver-squashfs-build $(BUILT)/csi-driver-squashfs $(REGISTRY) \
		$(BUILDER_ARCHIVE)

.PHONY: vm
vm: tools
	$(RING) $(SUDO) e2e/vm build --kernel $(KERNEL) --arch $(ARCH)

.PHONY: test-vm
test-vm: vm build ## run the scenarios in the virtual machine (FILTER=name for one, KERNEL=6.1 or newest for another kernel, ARCH=arm64 for a machine of that, SOAK=1 at full length)
	$(call test_binary,vm); $(ALONE) $(VM) --copy $$binary -- sh -c '/root/vm-* --include-ignored --test-threads=1 $(FILTER)'

.PHONY: test-sanity
test-sanity: target/tools/csi-sanity vm build ## run the CSI project's own conformance tests in the virtual machine (needs Go)
	$(ALONE) $(VM) --copy $< --copy e2e/lib.sh --copy e2e/sanity -- /root/sanity

.PHONY: test-selinux
test-selinux: vm client ## read and write as containers do where SELinux is enforced, in the virtual machine
	$(ALONE) $(VM) --append security=selinux --copy $(CLIENT) --copy e2e/lib.sh --copy e2e/selinux -- /root/selinux

# Where a target needs Go, it says so. The compiler collects no garbage before it has 2 GiB: that is a fifth of its time.
GO = $(or $(shell command -v go),$(error $@ needs Go 1.26 or newer: https://go.dev/dl))
cgo = 0
tags = grpcnotrace
# Downloads come before: the network has deadlines that are missed by what gets no processor.
GO_FETCH = CGO_ENABLED=$(cgo) $(GO) list -C $(<D) -tags $(tags) -deps tool >/dev/null
GO_BESIDE = CGO_ENABLED=$(cgo) GOGC=off GOMEMLIMIT=2GiB $(BESIDE) $(GO)
GO_BUILD = $(GO_BESIDE) build -C $(<D) -trimpath -tags $(tags) -ldflags "-s -w $(1)"
# The programs of other projects that tests run, and those that render and check the chart.
PROGRAMS = $(addprefix target/tools/,csi-sanity helm-docs kubeconform kube-score yq)
$(PROGRAMS): private ring = programs
$(PROGRAMS) &: e2e/programs/go.mod
	$(GO_FETCH)
	$(call GO_BUILD) -o $(CURDIR)/$(@D)/ tool
	touch $(PROGRAMS)

target/tools/actionlint: private ring = actionlint
target/tools/actionlint: e2e/lint/go.mod
	$(GO_FETCH)
	$(call GO_BUILD) -o $(CURDIR)/$(@D)/ tool
	touch $@

# It is made of the libraries of Kubernetes. Builds at the same time would compile twice what they share.
target/tools/helm: private ring = helm
target/tools/helm: e2e/kubernetes/go.mod | $(PROGRAMS)
	$(GO_FETCH)
	$(call GO_BUILD) -o $(CURDIR)/$@ helm.sh/helm/v4/cmd/helm
	touch $@

# Debian's package would start a server: only the programs are taken from it.
PROMETHEUS = target/tools/prometheus target/tools/promtool
$(PROMETHEUS) &: | tools
	$(APT) update
	mkdir -p $(@D) && cd $(@D) && flock /var/lib/apt apt-get -q download prometheus && \
		dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 ./usr/bin/prometheus ./usr/bin/promtool && \
		rm prometheus_*.deb

target/tools/kubernetes-schemas/complete: private ring = schemas
target/tools/kubernetes-schemas/complete: charts/tools/schemas | tools
	$(RING) $< $(@D)

.PHONY: chart
chart: $(PROGRAMS) target/tools/helm ## write what follows from the Helm chart anew: its README.md and the manifests (needs Go)
	PATH=$(CURDIR)/target/tools:$$PATH charts/tools/generate charts/csi-driver-squashfs/README.md manifests/csi-driver-squashfs.yaml charts/csi-driver-squashfs/values.schema.json

.PHONY: test-chart
test-chart: tools $(PROGRAMS) target/tools/helm $(PROMETHEUS) target/tools/kubernetes-schemas/complete build ## check the Helm chart and the manifests (needs Go; first time: five minutes)
	$(BESIDE) e2e/chart --driver $(BUILT)/csi-driver-squashfs

.PHONY: test-image
test-image: image ## look into the container image, and make it again
	$(RING) e2e/image $(ARCHIVE)

.PHONY: test-prometheus
test-prometheus: vm client target/tools/helm target/tools/yq $(PROMETHEUS) ## run the alerts and the dashboard on a real Prometheus, in the virtual machine (needs Go)
	$(ALONE) $(VM) $(addprefix --bin ,target/tools/helm target/tools/yq $(PROMETHEUS)) --copy $(CLIENT) --copy charts/csi-driver-squashfs --copy e2e/prometheus -- /root/prometheus

# A Kubernetes cluster to test with, as static programs; all in one build, as they share most of their packages.
KUBERNETES = $(addprefix target/tools/kubernetes/,containerd containerd-shim-runc-v2 csi-provisioner etcd kube-apiserver \
	kube-controller-manager kube-scheduler kubectl kubelet)
# What depends on a version, such as the kubeVersion of a chart, believes what is linked in.
$(KUBERNETES): private ring = kubernetes
$(KUBERNETES) &: e2e/kubernetes/go.mod | target/tools/helm
	version=$$(awk '$$1 == "k8s.io/kubernetes" { print $$2 }' $<); numbers=$${version#v}; minor=$${numbers#*.}; \
	linked=k8s.io/component-base/version; tools=$$($(GO) list -C $(<D) tool | grep -v -e ^helm -e /runc$$ -e /agnhost$$); \
	$(call GO_BUILD,-X $$linked.gitVersion=$$version -X $$linked.gitMajor=$${numbers%%.*} -X $$linked.gitMinor=$${minor%%.*}) \
		-o $(CURDIR)/$(@D)/ $$tools
	mv $(@D)/server $(@D)/etcd
	touch $(KUBERNETES)

# In part it is C, with libseccomp; static all the same, as the builder's Debian need not be the guest's.
RUNC = target/tools/kubernetes/runc
$(RUNC): private ring = runc
$(RUNC): private cgo = 1
$(RUNC): private tags = seccomp,netgo,osusergo
$(RUNC): e2e/kubernetes/go.mod | target/tools/helm tools
	$(GO_FETCH)
	$(call GO_BUILD,-extldflags -static) -o $(CURDIR)/$@ github.com/opencontainers/runc
	touch $@

.PHONY: programs
programs: $(PROGRAMS) target/tools/helm

.PHONY: kubernetes
kubernetes: $(KUBERNETES) $(RUNC) ## build etcd, containerd, runc and the parts of Kubernetes that tests run (needs Go; first time: eight minutes and 4 GB)

.PHONY: test-controller
test-controller: kubernetes target/tools/helm build
	$(ALONE) e2e/kubernetes/cluster e2e/kubernetes/controller $(BUILT)/csi-driver-squashfs

.PHONY: test-kubernetes
test-kubernetes: test-controller vm $(REGISTRY) image builder-image ## run the driver in a real cluster (needs Go; 20 minutes where the machine is emulated)
	$(ALONE) $(VM) --memory 4096 --timeout 3600 $(addprefix --bin ,$(KUBERNETES) $(RUNC) target/tools/helm $(REGISTRY)) \
		--copy $(ARCHIVE) --copy $(BUILDER_ARCHIVE) --copy charts --copy manifests/examples --copy manifests/gc.yaml --copy manifests/try-it.yaml --copy e2e/lib.sh --copy e2e/kubernetes \
		-- /root/kubernetes/node /root/kubernetes/scenarios $(FILTER)

# Kubernetes' own tests of CSI drivers, and the program that their pods run.
STORAGE = target/tools/storage.test target/tools/agnhost
$(STORAGE): private ring = storage
$(STORAGE) &: e2e/kubernetes/go.mod e2e/kubernetes/storage/suite_test.go | target/tools/helm
	CGO_ENABLED=$(cgo) $(GO) list -C $(<D) -test -deps ./storage >/dev/null
	$(GO_BESIDE) test -C $(<D) -trimpath -ldflags "-s -w" -c -o $(CURDIR)/target/tools/storage.test ./storage
	$(GO_BESIDE) build -C $(<D) -trimpath -ldflags "-s -w" -o $(CURDIR)/target/tools/agnhost k8s.io/kubernetes/test/images/agnhost
	touch $(STORAGE)

.PHONY: test-storage
test-storage: kubernetes $(STORAGE) target/tools/helm vm image ## run Kubernetes' own tests of CSI drivers (needs Go; hours where the machine is emulated; FILTER=read-only for one definition, FOCUS=name for some tests)
	$(ALONE) $(VM) --memory 4096 --timeout 14400 --out target/storage $(addprefix --bin ,$(KUBERNETES) $(RUNC) target/tools/helm $(STORAGE)) \
		$(if $(FOCUS),--env FOCUS="$(FOCUS)") --copy $(ARCHIVE) --copy charts --copy e2e/lib.sh --copy e2e/kubernetes -- /root/kubernetes/node /root/kubernetes/storage/run $(FILTER)

.PHONY: soak
soak: tools ## run the long tests at full length
	$(call test_binary,host); $(SUDO) env SOAK=1 $$binary --include-ignored --test-threads=1
	SOAK=1 cargo test --release --locked --lib many_rounds

# What a scientific Python program imports, as images.
STACK = target/stack
$(STACK)/complete: private ring = stack
$(STACK)/complete: e2e/bench/requirements.txt e2e/bench/stack e2e/bench/loaded.py | tools vm
	$(SUDO) rm -rf $(@D)
	python3 -m venv $(@D)/python
	$(RING) $(@D)/python/bin/pip download -q --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.13 \
		--platform manylinux2014_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 --require-hashes -r $< -d $(@D)/wheels
	$(SUDO) e2e/bench/stack $< $(@D)/wheels $(@D)
	touch $@

# Each in a machine of its own. That of the tests has 3 GiB; a server with more memory offers an rsize of 1 MiB.
BENCHES = tree python weights nodes
.PHONY: bench $(BENCHES:%=bench-%)
bench: $(addprefix bench-,$(or $(FILTER),$(BENCHES))) ## measure against what users would pick, in the virtual machine, into target/bench: an hour; FILTER=tree for one part
$(BENCHES:%=bench-%): memory = 8192
bench-tree: memory = 3072
bench-python bench-nodes: $(STACK)/complete
bench-python bench-nodes: stack = $(addprefix --copy $(STACK)/,stack.sqsh sorted.sqsh stack.erofs)
$(BENCHES:%=bench-%): bench-%: client
	@$(VM) --memory $(memory) --timeout 3600 --out target/bench --copy $(CLIENT) --copy e2e/lib.sh --copy e2e/bench $(stack) -- /root/bench/$*

.PHONY: plots
plots: ## draw what the last make bench measured, into docs/pictures
	/usr/bin/python3 -c 'import matplotlib' 2>/dev/null || { $(APT) update && $(APT) -y install python3-matplotlib; }
	mkdir -p docs/pictures && cp $(BENCHES:%=target/bench/%.csv) docs/pictures
	/usr/bin/python3 e2e/plots docs/pictures

.PHONY: recording
recording: client ## record make demo anew, as docs/pictures/demo.svg
	$(VM) --copy $(CLIENT) --copy e2e/lib.sh --copy e2e/demo -- /root/demo | \
		e2e/record "make demo: the main job of the driver, step by step" >target/demo.svg
	mkdir -p docs/pictures && mv target/demo.svg docs/pictures/

.PHONY: lint
lint: tools cargo-deny advisories target/tools/actionlint ## check format, lints, licences and advisories, shell scripts, workflows, links of docs/, the version (needs Go)
	release/version check
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	cargo deny --locked check licenses bans sources
	@tree='cargo tree --locked --package csi-driver-squashfs --target $(CARGO_BUILD_TARGET) --prefix none --no-dedupe --format {p}:{f} --edges'; \
	other=$$(comm -23 <($$tree normal | sort -u) <($$tree normal,dev | sort -u)); \
	[ -z "$$other" ] || { printf 'tests compile these with other features, so what they test is not what is shipped:\n%s\n' "$$other"; exit 1; }
	shellcheck -x $$(git grep --untracked -lE '^(#!/bin/(ba)?sh|# shellcheck shell=bash)$$')
	target/tools/actionlint
	docs/site source target/docs-source

# The chapters are made by docs/site, so that no text stands in two places.
MDBOOK = target/tools/bin/mdbook
$(MDBOOK):
	cargo install --debug --locked --root target/tools --no-default-features --features search --version 0.5.4 mdbook

.PHONY: docs
docs: $(MDBOOK) ## build the site of the documentation into target/docs, and follow the links in it
	docs/site source target/docs-source
	$(MDBOOK) build
	docs/site check target/docs

# The database comes from a git server that not every network reaches.
.PHONY: advisories
advisories: cargo-deny
	@if answer=$$(timeout 300 cargo deny fetch db 2>&1 </dev/null); then \
		cargo deny --locked check advisories; \
	else \
		printf 'SKIPPED: advisories: the RustSec database cannot be fetched: %s\n' "$$(grep . <<<"$$answer" | tail -n 1)"; \
	fi

.PHONY: schema
schema: ## write the JSON Schema of the mount spec anew
	UPDATE_SCHEMA=1 cargo test --release --locked --lib schema

.PHONY: tools
tools: ## install what the tests and lints need
	@missing=; for tool in mksquashfs:squashfs-tools tar2sqfs:squashfs-tools-ng openssl:openssl curl:curl jq:jq shellcheck:shellcheck buildah:buildah pkg-config:pkgconf; do \
		command -v "$${tool%:*}" >/dev/null || missing="$$missing $${tool#*:}"; done; \
	python3 -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	[ -e /usr/include/seccomp.h ] || missing="$$missing libseccomp-dev"; \
	[ -d /usr/share/ca-certificates/mozilla ] || missing="$$missing ca-certificates"; \
	if [ -n "$$missing" ]; then \
		$(APT) update && $(APT) -y install $$missing; fi

# Without optimization it is there in a fraction of the time, and it has little to do.
.PHONY: cargo-deny
cargo-deny:
	@cargo deny --version >/dev/null 2>&1 || cargo install --debug --locked cargo-deny

# Of one version, as it runs where releases are made.
.PHONY: cargo-cyclonedx
cargo-cyclonedx:
	@cargo cyclonedx --version >/dev/null 2>&1 || cargo install --debug --locked --version 0.5.9 cargo-cyclonedx
