# SPDX-License-Identifier: Apache-2.0
# A real Kubernetes cluster on this machine: see docs/testbed.md.
# `packages` runs before there is a virtual environment, so it needs nothing but /usr/bin/python3.
TESTBED := PYTHONPATH=tests $(PY) -m cluster.testbed
# images of this repository that every node has from the start
PRELOAD ?= $(shell ls build/images/*.tar 2>/dev/null)

.PHONY: packages tools tools-e2e base-image node-images cluster cluster-down cluster-verify-clean

packages: ## install the Debian packages that are missing (starts no service)
	PYTHONPATH=tests /usr/bin/python3 -m cluster.testbed.packages

tools: venv ## build or find the Go programs: Kubernetes, Helm, CoreDNS
	$(TESTBED) tools

tools-e2e: venv ## build upstream's e2e.test and ginkgo
	$(TESTBED) tools-e2e

base-image: venv ## put localhost/debian:bookworm-slim into buildah's storage
	$(TESTBED) base-image

node-images: tools ## make the images every node starts with, and unpack them once
	$(TESTBED) node-images

cluster: node-images ## bring the cluster up (NODES=3 CNI=ptp|bridge|overlay PROXY=iptables|nftables NETWORKS=1|2 STRICT=0|1)
	$(TESTBED) up $(PRELOAD:%=--preload=%)

cluster-down: venv ## take the cluster down and leave nothing behind
	$(TESTBED) down
	$(TESTBED) verify-clean

cluster-verify-clean: venv ## list what a cluster left behind, if anything
	$(TESTBED) verify-clean
