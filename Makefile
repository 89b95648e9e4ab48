# Two commands do all the set-up on a fresh machine: `make run` and `make test`. Everything else is a part of them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# What is built is looked for in target/.
unexport CARGO_TARGET_DIR
BINARY := target/release/api-together
# Built for trying out and for small gateways: in half the time, without what makes a release fast
QUICK := target/quick/api-together

.PHONY: help
help: ## List the targets
	grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The commit, which `--version` shows of what is built to be used
build release-api-together: export API_TOGETHER_COMMIT = $(shell git rev-parse --short=10 HEAD 2>/dev/null)

.PHONY: build
build: build-tools ## Build target/quick/api-together (2 to 5 minutes on two cores the first time, seconds afterwards)
	echo "==> building $(QUICK) (2 to 5 minutes on two cores the first time, seconds afterwards)"
	cargo build --profile quick --locked

.PHONY: run
run: build ## Build the program, and serve conf/apis.json (or .yaml), or the demo if there is none
	for config in conf/apis.json conf/apis.yaml conf/apis.yml; do
	  if [ -e "$$config" ]; then
	    echo "==> serving $$config"
	    exec $(QUICK) --config "$$config"
	  fi
	done
	echo "==> there is no conf/apis.json yet (copy conf/apis.example.json to make one), so this is the demo"
	exec $(QUICK) demo

.PHONY: run-cluster
run-cluster: build ## Three processes on one Redis with a replica and sentinels, nginx before them, on loopback; CONFIG=FILE for your own
	$(get-redis)
	$(call install,nginx,nginx-light)
	$(call install,curl,curl)
	cargo build --profile quick --locked --example simulator
	PATH="$(CURDIR)/target/tools:$$PATH" exec packaging/cluster/run $(QUICK) target/quick/examples/simulator

PREFIX ?= /usr/local
.PHONY: install
install: release ## Install the program, its manual page and completions below PREFIX (/usr/local); PROFILE_GUIDED=no builds faster
	install -D -m 755 $(BINARY) "$(DESTDIR)$(PREFIX)/bin/api-together"
	install -d "$(DESTDIR)$(PREFIX)/share/man/man1" "$(DESTDIR)$(PREFIX)/share/bash-completion/completions" \
	  "$(DESTDIR)$(PREFIX)/share/zsh/site-functions" "$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d"
	$(BINARY) man > "$(DESTDIR)$(PREFIX)/share/man/man1/api-together.1"
	$(BINARY) completions bash > "$(DESTDIR)$(PREFIX)/share/bash-completion/completions/api-together"
	$(BINARY) completions zsh > "$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_api-together"
	$(BINARY) completions fish > "$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/api-together.fish"
	echo "installed $(DESTDIR)$(PREFIX)/bin/api-together"

.PHONY: test
test: build-tools client-tools ## Run all tests: unit, integration, and the official OpenAI clients
	$(get-redis)
	echo "==> unit and integration tests"
	cargo test --locked -- --skip cluster::
	echo "==> several processes on one Redis, by themselves since they take the whole machine"
	PATH="$(CURDIR)/target/tools:$$PATH" cargo test --locked --test it -- --test-threads 2 cluster::
	echo "==> the ledger's tests on each kind of server"
	$(call install,debootstrap,debootstrap)
	PATH="$(CURDIR)/target/tools:$$PATH" tests/ledgers/run
	echo "==> traces by OTLP, a feature of its own"
	cargo test --locked --features otlp --test it -- traces::
	echo "==> client tests"
	cargo build --locked
	tests/clients/run target/debug/api-together
	# npm came with the client tests.
	PATH="$(CURDIR)/tests/clients/.venv/bin:$$PATH" packaging/test-manifests target/debug/api-together
	echo "==> metrics and alerts, by Prometheus's own tool"
	$(get-promtool)
	$(call install,curl,curl)
	PATH="$$PATH:$(CURDIR)/target/tools" tests/metrics/run target/debug/api-together
	echo "==> thousands of strangers, by slowhttptest among others"
	$(call install,slowhttptest,slowhttptest)
	cargo build --locked --example simulator
	python3 benches/strangers.py --check target/debug/api-together

.PHONY: lint
lint: build-tools ## Formatting, lints, documentation, licences, configs and generated files, all without a warning
	echo "==> formatting"
	cargo fmt --check
	echo "==> lints"
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --features otlp -- -D warnings
	echo "==> documentation"
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items
	echo "==> licences, banned crates and sources of dependencies"
	$(call install-deny)
	cargo deny --locked check licenses bans sources
	echo "==> the configs in conf/"
	cargo build --locked
	count=0
	# The variables that they name
	export API_TOGETHER_KEY=sk-7d1f93a8c05e42b67d1f93a8 OPENAI_API_KEY=sk-0123456789abcdef GEMINI_API_KEY=0123456789abcdef
	export SECOND_OPENAI_API_KEY=sk-0123456789abcdef ARK_API_KEY=0123456789abcdef
	for config in conf/apis.*.json conf/apis.*.yaml; do
	  [ "$$config" = conf/apis.schema.json ] && continue
	  target/debug/api-together check "$$config"
	  count=$$((count + 1))
	done
	[ "$$count" -ge 2 ] || { echo "only $$count configs were found in conf/" >&2; exit 1; }
	target/debug/api-together -t --config conf/apis.example.json --conf conf/pingora.yaml
	echo "==> generated files"
	docs/generate --check target/debug/api-together

FUZZ_SECONDS ?= 60

.PHONY: fuzz
fuzz: build-tools ## Feed random bytes to the readers of answers and of errors, for a minute each (FUZZ_SECONDS=600 for ten)
	# The flags of cargo-fuzz, without the sanitizers, which need a nightly compiler.
	export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	  -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=4"
	# Only with a target named do these flags not apply to build scripts, which have no fuzzer to report to.
	target=$$(rustc -vV | sed -n 's/^host: //p')
	cargo build --release --locked --manifest-path fuzz/Cargo.toml --target "$$target"
	mkdir -p fuzz/corpus/seeds fuzz/corpus/answer fuzz/corpus/error
	for answer in tests/fixtures/answers/*.{sse,json}; do
	  for options in '\0\7\1' '\1\377\0'; do
	    printf "$$options" | cat - "$$answer" > "fuzz/corpus/seeds/$${options//\\/_}-$${answer##*/}"
	  done
	done
	mkdir -p fuzz/artifacts
	for reader in answer error; do
	  "fuzz/target/$$target/release/$$reader" -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -rss_limit_mb=2048 -print_final_stats=1 \
	    -artifact_prefix=fuzz/artifacts/ "fuzz/corpus/$$reader" fuzz/corpus/seeds
	done

# The fastest build, by profile-guided optimisation (PGO): an instrumented build serves the load of benches/train.rs, and its
# profile guides the second build. PROFILE_GUIDED=no builds without a profile, which is faster and needs fewer tools.
PROFILE_GUIDED ?= yes
GUIDED := target/guided
TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')
LLVM = $(shell rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
# The compiler's own if it came with one (rustup component add llvm-tools), else Debian's of the same version
PROFDATA = $(or $(wildcard $(shell rustc --print sysroot)/lib/rustlib/$(TRIPLE)/bin/llvm-profdata),llvm-profdata-$(LLVM))
# For api-together or bare: cargo's target, and the path of its binary
cargo-target = $(if $(filter api-together,$(1)),--bin,--example) $(1)
built = release/$(if $(filter api-together,$(1)),,examples/)$(1)
# Adds a flag for the compiler to RUSTFLAGS, in the form that allows for a path with spaces. Like RUSTFLAGS itself it stands in for
# the flags of cargo's own config.
with-flag = CARGO_ENCODED_RUSTFLAGS="$$(flags=($${RUSTFLAGS-} "$(1)"); IFS=$$'\x1f'; printf '%s' "$${flags[*]}")"

.PHONY: release
release: release-api-together ## Build target/release/api-together as fast as it can be (15 minutes on two cores)

.PHONY: release-api-together release-bare
ifeq ($(PROFILE_GUIDED),yes)
release-api-together release-bare: release-%: $(GUIDED)/%.profdata
	echo "==> building $* with its profile"
	$(call with-flag,-Cprofile-use=$(CURDIR)/$<) \
	  cargo build --release --locked --target $(TRIPLE) --target-dir $(GUIDED)/$* $(call cargo-target,$*)
	install -D -p $(GUIDED)/$*/$(TRIPLE)/$(call built,$*) target/$(call built,$*)
else ifeq ($(PROFILE_GUIDED),no)
release-api-together release-bare: release-%: build-tools
	echo "==> building $*"
	cargo build --release --locked $(call cargo-target,$*)
else
$(error PROFILE_GUIDED is "$(PROFILE_GUIDED)"; say yes or no)
endif

$(GUIDED)/api-together.profdata: $(shell find src -name '*.rs')
$(GUIDED)/bare.profdata: benches/bare.rs benches/bare/proxy.rs
$(GUIDED)/%.profdata: benches/train.rs tests/it/authority.rs Cargo.toml Cargo.lock $(GUIDED)/compiler | build-tools
	command -v $(PROFDATA) >/dev/null || \
	  echo "==> merging a profile needs $(PROFDATA), or: rustup component add llvm-tools; PROFILE_GUIDED=no builds without a profile"
	$(call install,$(PROFDATA),llvm-$(LLVM))
	echo "==> building $* with instrumentation"
	$(call with-flag,-Cprofile-generate) \
	  cargo build --release --locked --target $(TRIPLE) --target-dir $(GUIDED)/counting $(call cargo-target,$*)
	echo "==> recording a profile of $* under load"
	cargo build --locked --example train
	# Cargo does not notice that a profile has changed, so the build made with the last one is removed.
	rm -rf $(GUIDED)/$*.counts $(GUIDED)/$*
	LLVM_PROFILE_FILE="$(CURDIR)/$(GUIDED)/$*.counts/%p.profraw" \
	  target/debug/examples/train $* $(GUIDED)/counting/$(TRIPLE)/$(call built,$*)
	$(PROFDATA) merge -o $@ $(GUIDED)/$*.counts

# A profile fits one version of the compiler.
$(GUIDED)/compiler: FORCE | build-tools
	mkdir -p $(GUIDED)
	rustc -vV | cmp -s - $@ || rustc -vV > $@

.PHONY: FORCE
FORCE:

.PHONY: deb
deb: release ## Build the Debian package, into target/debian/
	command -v cargo-deb >/dev/null || { echo "==> cargo-deb is missing: installing it with cargo"; cargo install --locked cargo-deb; }
	mkdir -p target/package
	$(BINARY) man > target/package/api-together.1
	$(BINARY) completions bash > target/package/api-together.bash
	$(BINARY) completions zsh > target/package/_api-together
	$(BINARY) completions fish > target/package/api-together.fish
	cargo deb --no-build --locked

.PHONY: test-deb
test-deb: deb ## Install, reload, upgrade, stop, crash and remove the package under a systemd of its own: as root
	$(call install,debootstrap,debootstrap)
	$(call install,systemd-nspawn,systemd-container)
	cargo build --locked --example simulator
	packaging/debian/test "$$(ls -t target/debian/*.deb | head -n 1)" target/debug/examples/simulator

.PHONY: dist
dist: deb ## Make a tarball, the Debian package, a bill of materials (CycloneDX) and checksums, in target/dist/
	command -v cargo-cyclonedx >/dev/null || { echo "==> cargo-cyclonedx is missing: installing it with cargo"; cargo install --locked cargo-cyclonedx; }
	packaging/dist $(BINARY) target/dist

.PHONY: test-image
test-image: release ## Put the image's file system together as the Dockerfile would, and run it as nobody on a read-only root: as root
	cargo build --locked --example simulator
	packaging/docker/test $(BINARY) target/debug/examples/simulator

.PHONY: soak
soak: build-tools client-tools ## Run the long forms of tests that are short in make test, and the guided build (an hour and a half)
	$(MAKE) release
	ISOLATION_SECONDS=3600 cargo test --locked --test it -- --nocapture isolation
	SIM_SCHEDULES=10000 cargo test --locked --test it -- --nocapture sim
	SIM_SCHEDULES=10000 cargo test --locked --lib -- --nocapture whatever_comes_no_budget
	SESSIONS=1000 cargo test --locked --test it -- --nocapture realtime
	SIM_SCHEDULES=5000 PATH="$(CURDIR)/target/tools:$$PATH" tests/ledgers/run redis
	KILLS=20 FAILOVERS=10 PATH="$(CURDIR)/target/tools:$$PATH" cargo test --locked --test it -- --nocapture cluster
	tests/clients/run $(BINARY)
	tests/clients/.venv/bin/python tests/clients/realtime_soak.py --binary $(BINARY)
	RELOADS=200 UPGRADES=20 STREAM_SECONDS=30 cargo test --locked --test it -- --nocapture reload::reloads_under_load upgrade::upgrades_under_load

# Programs for the benchmarks: the load generator, nginx, and other gateways where their registries can be reached
LITELLM_VERSION := 1.100.5
PORTKEY_VERSION := 1.15.2

.PHONY: bench-programs
bench-programs: release-api-together release-bare
	command -v oha >/dev/null || { echo "==> oha is missing: installing it with cargo"; cargo install --locked oha; }
	PATH="$$PATH:/usr/sbin"
	$(call install,nginx,nginx-light)
	$(call install,taskset,util-linux)
	$(call install,python3,python3 python3-venv)
	echo "==> building the programs to measure with"
	cargo build --release --locked --example endpoint --example streams --example bare_system

.PHONY: bench-gateways
bench-gateways: # LiteLLM and Portkey, into target/bench/; the comparison leaves out one that cannot be installed
	mkdir -p target/bench/portkey
	if [ ! -x target/bench/litellm/bin/litellm ]; then
	  echo "==> installing LiteLLM $(LITELLM_VERSION)"
	  { python3 -m venv target/bench/litellm && target/bench/litellm/bin/pip install -q 'litellm[proxy]==$(LITELLM_VERSION)'; } \
	    || echo "LiteLLM cannot be installed here"
	fi
	if [ ! -d target/bench/portkey/node_modules ]; then
	  echo "==> installing Portkey $(PORTKEY_VERSION)"
	  (cd target/bench/portkey && npm install --no-fund --no-audit --silent @portkey-ai/gateway@$(PORTKEY_VERSION)) \
	    || echo "Portkey cannot be installed here"
	fi

.PHONY: bench
bench: bench-programs bench-gateways ## Compare with bare Pingora, nginx and other gateways (40 minutes, and 25 to build); the figures go into BENCHMARKS.md
	python3 benches/compare.py --write

.PHONY: bench-strangers
bench-strangers: bench-programs ## Callers' latencies beside five thousand strangers and slowhttptest, and without them, in turns
	$(call install,slowhttptest,slowhttptest)
	python3 benches/strangers.py

.PHONY: bench-request-log
bench-request-log: build-tools ## Measure the request log: its writer at 2,000 requests a second, searches in a million (ROWS=10000000 for ten)
	cargo bench --locked --bench request_log

.PHONY: bench-scale
bench-scale: bench-programs ## Ten thousand streams, two hundred endpoints, five hundred large bodies; into BENCHMARKS.md too
	python3 benches/scale.py --write

.PHONY: bench-instructions
bench-instructions: build-tools ## Count the instructions of each stage and compare them with the stored counts
	$(call install,valgrind,valgrind)
	cargo bench --locked --bench instructions

.PHONY: bench-instructions-write
bench-instructions-write: build-tools ## Store new instruction counts of each stage
	$(call install,valgrind,valgrind)
	cargo bench --locked --bench instructions -- --write

.PHONY: bench-limits
bench-limits: build-tools ## Measure what limits, keys, budgets and key pools cost: requests a second and latencies against none of them
	command -v oha >/dev/null || { echo "==> oha is missing: installing it with cargo"; cargo install --locked oha; }
	$(call install,jq,jq)
	$(call install,curl,curl)
	echo "==> building the release"
	cargo build --release --locked --bin api-together --example simulator
	benches/limits

.PHONY: advisories
advisories: build-tools ## Look for known vulnerabilities in dependencies; needs the advisory database, which is on GitHub
	$(call install-deny)
	cargo deny --locked check advisories

.PHONY: generated
generated: build-tools ## Write the config's schema and the reference tables in docs/ anew
	cargo build --locked
	docs/generate target/debug/api-together

define install-deny
	command -v cargo-deny >/dev/null || { echo "==> cargo-deny is missing: installing it with cargo"; cargo install --locked cargo-deny; }
endef

# Redis' programs, of which the server's package would start one: the checker of its files is the same program.
define get-redis
	$(call install,redis-cli,redis-tools)
	if ! command -v redis-server >/dev/null && [ ! -x target/tools/redis-server ]; then
	  command -v redis-check-rdb >/dev/null || { echo "redis-server is missing; put it into the PATH" >&2; exit 1; }
	  mkdir -p target/tools
	  ln -sf "$$(command -v redis-check-rdb)" target/tools/redis-server
	fi
	$(call install,openssl,openssl)
endef

# Prometheus's tool, out of Debian's package: installing that would start servers.
define get-promtool
	if ! command -v promtool >/dev/null && [ ! -x target/tools/promtool ]; then
	  echo "==> promtool is missing: taking it out of Debian's package, which is not installed"
	  mkdir -p target/tools
	  (cd target/tools && apt-get download -q prometheus \
	    && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xf - --strip-components=3 ./usr/bin/promtool && rm prometheus_*.deb) \
	    || { echo "promtool is missing and cannot be taken from a package here; put it into the PATH" >&2; exit 1; }
	fi
endef

# Installs Debian packages if it can, or says what to install: $(call install,program,packages)
define install
	if ! command -v '$(1)' >/dev/null; then
	  echo "==> $(1) is missing: installing $(2)"
	  if [ "$$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi
	  if command -v apt-get >/dev/null && $$as_root true 2>/dev/null; then
	    $$as_root apt-get update -q
	    DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -q -y --no-install-recommends $(2)
	  else
	    echo "$(1) is missing and cannot be installed from here. Install it, on Debian or Ubuntu with" >&2
	    echo "    sudo apt-get install $(2)" >&2
	    exit 1
	  fi
	fi
endef

.PHONY: build-tools
build-tools: # Tools for the build: Rust, a C compiler, cmake
	if ! command -v cargo >/dev/null; then
	  echo "Rust is missing. Install it with" >&2
	  echo "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" >&2
	  exit 1
	fi
	needed=$$(sed -n 's/^rust-version = "\(.*\)"$$/\1/p' Cargo.toml)
	found=$$(rustc --version | cut -d' ' -f2 | cut -d- -f1)
	if [ "$$(printf '%s\n' "$$needed" "$$found" | sort -V | head -n 1)" != "$$needed" ]; then
	  echo "Rust $$found is too old: api-together needs $$needed or newer." >&2
	  echo "Update it with 'rustup update', or install it from https://rustup.rs (a distribution's own package is often older)." >&2
	  exit 1
	fi
	$(call install,cc,build-essential)
	$(call install,cmake,cmake)

.PHONY: client-tools
client-tools: # Tools for the client tests: Python with venv; Node.js comes with their packages
	$(call install,python3,python3 python3-venv)
	if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
	  $(call install,venv (a part of Python),python3-venv)
	fi
	$(call install,chromium,chromium)
