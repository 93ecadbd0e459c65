# The commands of this repository; each is a script in deploy/ that also says what it does.
PROFILE ?= embedded
DETACH  ?=

.DEFAULT_GOAL := help
.PHONY: help up down test check audit soak bench-up bench-load bench-audits bench-node bench-greedy bench-settlement bench-trust bench-sim demo-chain docs clean-data

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "%-16s %s\n", $$1, $$2 }'

up: ## install, build and start the network here (PROFILE=embedded|cluster, DETACH=1 to return when it is ready)
	@exec deploy/up "$(PROFILE)" "$(DETACH)"

down: ## end what `make up` started; its data stays
	@exec deploy/down

check: ## the quick inner loop: format, clippy, the pure crates' unit tests
	@exec deploy/test quick

test: ## everything: format, clippy, unit, property, integration and end-to-end tests
	@exec deploy/test all

audit: ## licences, sources and banned crates (cargo-deny); lint and breaking changes of proto/ (buf)
	@exec deploy/audit

soak: ## settlement under random faults by seed -> target/reports/chaos-settlement.json (SEED, SCHEDULES, ANVIL, OPERATIONS)
	@exec deploy/soak

bench-up: ## measure start and first answer -> target/reports/bench-up.json (COLD=1: from an empty machine's state)
	@exec deploy/bench-up

bench-load: ## answers and first tokens at 1 and at 8 clients -> target/reports/bench-load.json
	@exec deploy/bench-load

bench-audits: ## what a referee adds to the time of an answer -> target/reports/bench-audits.json
	@exec deploy/bench-load audits

bench-node: ## the engine beside llama.cpp, which it compiles on first use -> target/reports/bench-node.json, .svg
	@exec deploy/bench-node

bench-greedy: ## greedy answers to 50 prompts beside llama.cpp's, each parting with its gap -> target/reports/bench-greedy.json
	@exec deploy/bench-node greedy

bench-trust: ## honest and cheating answers before every layer -> target/reports/bench-trust.json, .svg (QUICK=1: few prompts)
	@exec deploy/bench-trust

bench-sim: ## a network of thousands with cheaters -> target/reports/bench-sim.json (QUICK=1: a small one)
	@exec deploy/bench-sim

bench-settlement: ## receipts, ledger postings and gas -> target/reports/bench-settlement.json
	@exec deploy/bench-settlement

demo-chain: ## the way of money on a devnet of its own: deposit, ask, settle, claim, slash a cheat, vote a model in and ask it
	@exec deploy/demo-chain

docs: ## build docs/book with mdBook, which it installs on first use
	@exec deploy/docs

clean-data: ## end the network here and delete its data: ledger, chain, history, keys
	@exec deploy/down --delete-data
