# SPDX-License-Identifier: Apache-2.0
# Every target is described by `make help`. Each part keeps its own targets in a file under make/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python

include $(sort $(wildcard make/*.mk))

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-zA-Z_-]+:.*## ' Makefile make/*.mk | sort | awk -F':.*## ' '{printf "  %-24s %s\n", $$1, $$2}'
