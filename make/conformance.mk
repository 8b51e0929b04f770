# SPDX-License-Identifier: Apache-2.0
# Upstream's own tests on a cluster that the demo brought up. Not part of `make test`.
CONFORMANCE := PYTHONPATH=tests $(PY) -m cluster.conformance

.PHONY: conformance-services conformance-policy

conformance-services: demo tools-e2e ## upstream's service, DNS and conntrack specs
	$(CONFORMANCE) services

conformance-policy: demo tools-e2e ## upstream's NetworkPolicy specs
	$(CONFORMANCE) policy
