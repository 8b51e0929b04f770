# SPDX-License-Identifier: Apache-2.0
# The tests, from pure to real. `make test` is the only set-up they need.
.PHONY: test unit bpf api cluster-test cluster-test-setups demo

PYTEST := .venv/bin/pytest
RESULTS := build/results

test: packages venv kbuild tools check unit bpf api demo cluster-test ## everything, on this machine: unit, bpf, API server, demo, cluster
	$(MAKE) cluster-down
	PYTHONPATH=tests $(PY) -m cluster.testbed verify-clean

unit: venv ## pure tests, no root
	$(PYTEST) tests/unit -q -p no:cacheprovider --junitxml=$(RESULTS)/unit.xml

bpf: venv kbuild ## every program through the verifier, packet stories by PROG_TEST_RUN (root)
	$(PYTEST) tests/bpf -q -p no:cacheprovider --junitxml=$(RESULTS)/bpf.xml

api: venv tools ## CRDs and their rules against a real API server
	$(PYTEST) tests/api -q -p no:cacheprovider --junitxml=$(RESULTS)/api.xml

demo: packages venv kbuild tools image cluster ## bring up a cluster, take it over from kube-proxy, show what it does
	PYTHONPATH=tests $(PY) -m cluster.demo

cluster-test: packages venv kbuild tools image cluster ## the dataplane on a real cluster (root)
	$(PYTEST) tests/cluster -q -p no:cacheprovider --durations=15 --junitxml=$(RESULTS)/cluster.xml

SETUPS ?= CNI=overlay NETWORKS=2,STRICT=1
SETUP_TESTS := tests/cluster/test_10_services.py tests/cluster/test_17_networks.py tests/cluster/test_20_policy.py

cluster-test-setups: packages venv kbuild tools image ## services, networks and policy on other networks, one after the other
	for setup in $(SETUPS); do \
		$(MAKE) cluster-down && $(MAKE) cluster $$(echo $$setup | tr , ' ') && \
		$(PYTEST) $(SETUP_TESTS) -q -p no:cacheprovider --junitxml=$(RESULTS)/cluster-$$setup.xml || exit 1; \
	done
	$(MAKE) cluster-down
